"""Run as `python -m casc`."""

from casc.cli.main import main

if __name__ == "__main__":
    main()
