"""What files need to outlive the machine going down."""

import contextlib
import os
from pathlib import Path


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk: without, a file's content may outlive its name."""
    with contextlib.suppress(OSError):  # some network file systems can't
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
