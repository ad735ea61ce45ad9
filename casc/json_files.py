"""JSON that we read: typed, limited in size and depth, with errors that name the file."""

import errno
import json
import os
import stat
from pathlib import Path
from types import UnionType
from typing import Any, BinaryIO, NoReturn, TypeVar, cast, get_args, get_origin

from casc.errors import UserError

T = TypeVar("T")

MOST_BYTES = 256 * 2**20
"""A file of ours is smaller by orders of magnitude; annotation files have a limit of their own."""
MOST_COCO_BYTES = 8 * 2**30
"""Of annotations and results in COCO's formats; those of COCO itself have half a gigabyte."""
MOST_DEPTH = 64


def open_plain(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file to be read; a pipe or a device, on which reading may never end, isn't one.

    Raises:
        OSError: it can't be opened, or isn't a plain file.
    """
    # Opening a pipe would wait for whoever writes into it.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        raise OSError(errno.EINVAL, "not a plain file", str(path))
    return os.fdopen(descriptor, "rb")


def read_plain(path: str | os.PathLike[str], most_bytes: int) -> bytes:
    """All of a plain file, or one byte more than `most_bytes` of a larger one.

    Raises:
        OSError: as `open_plain`.
    """
    with open_plain(path) as file:
        # Memory is asked for before there is anything to read.
        return file.read(min(most_bytes, os.fstat(file.fileno()).st_size) + 1)


def parse_json(
    text: str | bytes,
    name: str,
    kind: "type[T] | UnionType" = dict[str, Any],
    *,
    most_bytes: int = MOST_BYTES,
    most_depth: int = MOST_DEPTH,
    error: type[UserError] = UserError,
) -> T:
    """The value that a JSON text stands for.

    Args:
        text: the text, or UTF-8.
        name: what errors call it: a file, with the field if it is a part of one.
        kind: what it has to be: dict, list, ...
        most_bytes: a longer text is refused unread.
        most_depth: of lists and objects in each other.
        error: what to raise.

    Raises:
        UserError: the text is too long, too deep, no JSON, has numbers that JSON doesn't (NaN,
            Infinity), or is of another type.
    """
    if len(text) > most_bytes:
        raise error(f"{name}: is larger than {most_bytes:,} bytes")
    try:
        value = json.loads(text, parse_constant=_no_number)
    except RecursionError:
        raise error(f"{name}: not valid JSON (lists or objects are nested too deeply)") from None
    except ValueError as wrong:
        raise error(f"{name}: not valid JSON ({wrong})") from None
    level = [value]
    for _ in range(most_depth + 1):
        level = [
            entry
            for outer in level
            if isinstance(outer, (dict, list))
            for entry in (outer.values() if isinstance(outer, dict) else outer)
        ]
    if level:
        raise error(f"{name}: lists or objects are nested more than {most_depth} deep")
    wanted = get_origin(kind) if get_origin(kind) in (dict, list) else kind
    if wanted is not object and not isinstance(value, cast("type", wanted)):
        expected = " or ".join(_WORDS[part] for part in get_args(wanted) or (wanted,))
        raise error(f"{name}: expected {expected}, got {_WORDS.get(type(value), 'a number')}")
    return value


def read_json(
    path: str | os.PathLike[str],
    kind: type[T] = dict[str, Any],
    *,
    most_bytes: int = MOST_BYTES,
    error: type[UserError] = UserError,
) -> T:
    """Read a JSON file; arguments are as for `parse_json`.

    Raises:
        UserError: naming the file: it isn't there, can't be read, or as `parse_json` says.
    """
    try:
        data = read_plain(path, most_bytes)
        text = data.decode("utf-8") if len(data) <= most_bytes else data
    except FileNotFoundError:
        raise error(f"{path}: not found") from None
    except (OSError, UnicodeDecodeError) as wrong:
        raise error(f"{path}: can't be read as JSON ({wrong})") from None
    return parse_json(text, str(path), kind, most_bytes=most_bytes, error=error)


def write_json(data: object, path: str | os.PathLike[str], *, indent: int | None = 1) -> None:
    """Write a JSON file so that a reader never sees half of it."""
    file = Path(path)
    temporary = file.with_name(f".{file.name}.tmp")
    text = json.dumps(data, indent=indent, allow_nan=False) + "\n"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)


_WORDS = {
    dict: "an object", list: "a list", str: "a text", int: "a whole number", type(None): "null"
}  # fmt: skip


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")
