"""Frozen dataclasses to JSON and back, with errors that name the field."""

import dataclasses
import sys
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from casc.errors import UserError
from casc.printing import redacted

T = TypeVar("T")


def to_json(value: Any) -> Any:
    """A config as dicts, lists and plain values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [to_json(entry) for entry in value]
    # What is stored is published too: it has no passwords and signatures of addresses.
    return redacted(str(value)) if isinstance(value, (Path, str)) else value


def from_json(kind: type[T], value: Any, where: str = "") -> T:
    """The config that `to_json` made `value` from; fields that are missing get their default.

    Args:
        kind: the dataclass.
        value: parsed JSON.
        where: what errors call the value's place, such as a file.

    Raises:
        UserError: unknown or missing field, or a value of another type.
    """
    return _convert(kind, value, where)


def differences(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """The leaves in which two configs' JSON differ, by dotted field name."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = {}
        for key in [*old, *(key for key in new if key not in old)]:
            for name, pair in differences(old.get(key), new.get(key)).items():
                found[f"{key}.{name}" if name else key] = pair
        return found
    return {} if old == new else {"": (old, new)}


def _convert(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return _convert(arguments[0], value, where)
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, value, where)
    if origin in (Union, types.UnionType):
        kinds = [option for option in arguments if dataclasses.is_dataclass(option)]
        if kinds and isinstance(value, dict):
            # The one that has most of these fields; errors are of that one then.
            names = [{field.name for field in dataclasses.fields(kind)} for kind in kinds]
            shared = [len(known & value.keys()) for known in names]
            return _dataclass(kinds[shared.index(max(shared))], value, where)
        for option in arguments:
            try:
                return _convert(option, value, where)
            except UserError:
                continue
    elif origin is Literal:
        if value in arguments:
            return value
    elif origin is tuple and isinstance(value, list):
        many = len(arguments) == 2 and arguments[1] is Ellipsis
        kinds = arguments[:1] * len(value) if many else arguments
        if len(kinds) == len(value):
            pairs = enumerate(zip(kinds, value, strict=True))
            return tuple(_convert(k, entry, f"{where}[{i}]") for i, (k, entry) in pairs)
    elif origin is dict and isinstance(value, dict):
        keys, kinds = arguments
        return {
            _convert(keys, key, where): _convert(kinds, entry, f"{where}.{key:.60}")
            for key, entry in value.items()
        }
    elif kind is Any:
        return value
    elif kind is Path and isinstance(value, str):
        return Path(value)
    elif kind is float and type(value) is int and abs(value) <= sys.float_info.max:
        return float(value)
    elif isinstance(kind, type) and type(value) is kind:
        return value
    elif kind is None and value is None:
        return None
    raise UserError(f"{where}: {value!r:.60} is not a {getattr(kind, '__name__', kind)}")


def _dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected an object, got {value!r:.60}")
    hints = typing.get_type_hints(kind, include_extras=True)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(value) - set(fields))
    if unknown:
        raise UserError(
            f"{where}: unknown field {unknown[0]!r:.60} of {kind.__name__}; written by another"
            " version of casc?"
        )
    given = {
        name: _convert(hints[name], entry, f"{where}.{name}".lstrip("."))
        for name, entry in value.items()
    }
    for name, field in fields.items():
        has_default = (
            field.default is not dataclasses.MISSING
            or field.default_factory is not dataclasses.MISSING
        )
        if name not in given and not has_default:
            raise UserError(f"{where}: field {name!r} of {kind.__name__} is missing")
    return kind(**given)
