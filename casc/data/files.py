"""What files need to outlive the machine going down."""

import errno
import os
from pathlib import Path

# What network file systems say of a folder.
_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF, errno.EACCES)


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk: without, a file's content may outlive its name.

    Where the system or the file system has no such thing, nothing is done.

    Raises:
        OSError: the disk failed or is full.
    """
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)
