"""Read other programs' pickles without running anything that is in them.

A pickle is a program: whoever loads one lets it call any function. Here it may name a
handful of things, none of which does more than hold numbers and text.
"""

import io
import os
import pickle
import pickletools
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from casc.errors import UserError
from casc.json_files import open_plain

# MMDetection 3 saves its log of losses beside the weights. These parts of a checkpoint are
# replaced by objects that do nothing, whatever the pickle wants of them.
_IGNORED = ("mmengine.", "mmcv.", "mmdet.", "numpy.", "builtins.getattr")


def load_torch(path: Path) -> Any:
    """What `torch.save` wrote: tensors and plain values, by torch's `weights_only` reader.

    Raises:
        UserError: it isn't such a file, is damaged, or holds something else.
    """
    try:
        open_plain(path).close()  # not a pipe, on which reading might never end
        names, zipped = [], zipfile.is_zipfile(path)
        if zipped:
            with zipfile.ZipFile(path) as archive:
                unpacked = sum(entry.file_size for entry in archive.infolist())
            if unpacked > 4 * path.stat().st_size + 2**20:
                raise UserError(f"{path}: unpacks to {unpacked:,} bytes, which no weights do")
            names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
        for name in names:
            if not name.startswith(_IGNORED):
                raise _refusal(path, name)
        with (
            _open(path) as file,
            torch.serialization.safe_globals([(_Nothing, name) for name in names]),
        ):
            # A zip has its sizes checked by its own reader, which is faster on a path.
            source = path if zipped else file
            loaded = torch.load(source, map_location="cpu", weights_only=True)
        _check_extent(loaded)
        return loaded
    except UserError:
        raise
    except Exception as error:  # the reader raises all sorts of things on damaged files
        # Files of old releases of torch can't be searched beforehand; and what the reader says
        # of them begins with advice to read them unsafely.
        if asked := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise _refusal(path, asked[1]) from None
        why = first_line(error)
        if isinstance(error, EOFError):
            why = "it ends too early" if path.stat().st_size else "it is empty"
        elif isinstance(error, (pickle.UnpicklingError, KeyError)):
            why = "it isn't made of tensors and plain values alone, or is damaged"
        raise UserError(
            f"{path}: not a file of tensors that torch.load reads safely ({why})"
        ) from None


def load_pickle(path: Path) -> Any:
    """A pickle of NumPy arrays and plain values, such as Detectron2's model zoo has.

    Returns:
        What was pickled, with tensors for arrays.

    Raises:
        UserError: it isn't a pickle, is damaged, or asks for anything else.
    """
    try:
        with _open(path) as file:
            _check_program(file)
            file.seek(0)
            loaded = _Restricted(file, encoding="latin1").load()
        _check_extent(loaded)
        return _with_tensors(loaded)
    except _ForbiddenError as error:
        raise _refusal(path, str(error)) from None
    except Exception as error:
        raise UserError(
            f"{path}: not a pickle of arrays that can be read safely ({first_line(error)})"
        ) from None


def first_line(error: BaseException) -> str:
    """An error's text without the advice that some libraries append."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _refusal(path: Path, name: str) -> UserError:
    return UserError(
        f"{path}: its pickle asks for {name}, which no weights need: nothing of it was run or"
        " read; save the state_dict alone where it comes from"
    )


MOST_VALUES = 2_000_000
"""In a checkpoint of another program; those of MMDetection's logs have some thousands."""


def _check_extent(value: Any) -> None:
    """Refuse what is small in a file and endless once it is gone through.

    A pickle may hold one list many times, lists of such lists, and itself; a tensor may show
    one number as a billion.

    Raises:
        ValueError: it is one of these.
    """
    sizes: dict[int, int] = {}
    stack: list[tuple[Any, bool]] = [(value, False)]
    while stack:
        entry, done = stack.pop()
        if isinstance(entry, Tensor):
            shown, stored = entry.numel() * entry.element_size(), entry.untyped_storage().nbytes()
            if shown > stored:
                raise ValueError(f"a tensor of shape {tuple(entry.shape)} has {stored} bytes")
        if not isinstance(entry, (dict, list, tuple, set, frozenset)):
            continue
        inner = [*entry.keys(), *entry.values()] if isinstance(entry, dict) else list(entry)
        if done:
            sizes[id(entry)] = 1 + sum(sizes.get(id(part), 1) for part in inner)
            if sizes[id(entry)] > MOST_VALUES:
                raise ValueError(f"lists in lists that come to more than {MOST_VALUES:,} values")
        elif id(entry) not in sizes:
            sizes[id(entry)] = MOST_VALUES  # until it is known: a list in itself is refused
            stack.append((entry, True))
            stack += [(part, False) for part in inner]


class _Bounded(io.BufferedReader):
    """A file of which no more is asked for than there is: memory is taken before it is read."""

    def read(self, count: int | None = -1, /) -> bytes:
        left = os.fstat(self.fileno()).st_size - self.tell()
        return super().read(left if count is None or count < 0 else min(count, left))


def _open(path: Path) -> _Bounded:
    file = open_plain(path)
    assert isinstance(file, io.BufferedReader)
    return _Bounded(file.detach())


def _check_program(file: _Bounded) -> None:
    """Refuse a pickle that names far places of its memo, which is made as large as the farthest.

    Raises:
        ValueError: it does, or isn't whole.
    """
    count = 0
    for count, (operation, argument, _) in enumerate(pickletools.genops(file), 1):
        if operation.name in _MEMO and not 0 <= int(argument or 0) <= count:
            raise ValueError(f"it puts something at place {argument} of its memo")


_MEMO = ("PUT", "BINPUT", "LONG_BINPUT", "GET", "BINGET", "LONG_BINGET")


class _Nothing:
    """Takes the place of an object that isn't needed."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


class _ForbiddenError(Exception):
    pass


class _Type:
    """A NumPy dtype: floats, integers and booleans only."""

    def __init__(self, code: str, *_: object) -> None:
        if not re.fullmatch(r"[<>|=]?([fiu][1248]|b1)", code):
            raise ValueError(f"an array of dtype {code!r}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1] if state[1] != "|" else "=")


class _Array:
    """An array that is filled by its state, as NumPy pickles one."""

    value: np.ndarray | None = None

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, fortran, data = state
        self.value = _array(data, kind, shape, "F" if fortran else "C")


def _array(data: Any, kind: _Type, shape: tuple[int, ...], order: Any) -> np.ndarray:
    if isinstance(data, str):  # of Python 2
        data = data.encode("latin1")
    if len(data) != prod(shape) * kind.dtype.itemsize:
        raise ValueError(f"an array of shape {shape} has {len(data)} bytes")
    return np.frombuffer(data, kind.dtype).reshape(shape, order=order)


def _from_buffer(data: Any, kind: _Type, shape: tuple[int, ...], order: Any) -> _Array:
    array = _Array()
    array.value = _array(data, kind, shape, order)
    return array


def _scalar(kind: _Type, data: Any) -> Any:
    return _array(data, kind, (), "C").item()


def _no_bytes() -> bytes:
    """How old protocols spell b"" (they encode any other bytes)."""
    return b""


def _encode(text: str, coding: str) -> bytes:
    if coding != "latin1":
        raise ValueError(f"text in {coding}")
    return text.encode("latin1")


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = _KNOWN.get(f"{module}.{name}".replace("numpy._core.", "numpy.core."))
        if known is None:
            raise _ForbiddenError(f"{module}.{name}")
        return known


_KNOWN: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": OrderedDict,
    "numpy.ndarray": _Array,
    "numpy.core.multiarray._reconstruct": _Array,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy.core.numeric._frombuffer": _from_buffer,
    "numpy.dtype": _Type,
    "_codecs.encode": _encode,
    "__builtin__.bytes": _no_bytes,
    "builtins.bytes": _no_bytes,
}


def _with_tensors(value: Any) -> Any:
    if isinstance(value, _Array):
        if value.value is None:
            raise ValueError("an array without data")
        return _tensor(value.value)
    if isinstance(value, dict):
        return {key: _with_tensors(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_tensors(entry) for entry in value]
    return value


def _tensor(array: np.ndarray) -> Tensor:
    # A copy in this machine's byte order: what was unpickled can't be written to.
    return torch.from_numpy(np.array(array, array.dtype.newbyteorder("="), order="C"))
