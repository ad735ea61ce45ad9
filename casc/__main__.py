"""Run as `python -m casc`."""

from casc.cli import main

if __name__ == "__main__":
    main()
