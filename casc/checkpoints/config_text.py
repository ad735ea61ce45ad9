"""Read a config of MMDetection, which is Python source, without running it.

Checkpoints hold the config that they were trained with as text: assignments of nested
`dict(...)`, lists and plain values. These are all that is understood here.
"""

import ast
from typing import Any

from casc.errors import UserError


class Unknown:
    """Stands for an expression that isn't a plain value."""

    def __repr__(self) -> str:
        return "an expression"


def read_config(text: str, source: str) -> dict[str, Any]:
    """The assignments of a config by name.

    Raises:
        UserError: it isn't Python source.
    """
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"{source}: the config in its meta can't be read ({error})") from None
    found: dict[str, Any] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = _value(node.value)
    return found


def at(config: Any, path: str, default: Any = None) -> Any:
    """The value at a path of keys and positions, such as `model.roi_head.bbox_head.0.type`."""
    for key in path.split("."):
        if isinstance(config, dict):
            config = config.get(key, _ABSENT)
        elif isinstance(config, (list, tuple)) and key.isdigit() and int(key) < len(config):
            config = config[int(key)]
        else:
            return default
        if config is _ABSENT:
            return default
    return config


_ABSENT = object()


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant():
            return node.value
        case ast.List() | ast.Set():
            return [_value(entry) for entry in node.elts]
        case ast.Tuple():
            return [_value(entry) for entry in node.elts]
        case ast.Dict():
            pairs = zip(node.keys, node.values, strict=True)
            return {k.value: _value(v) for k, v in pairs if isinstance(k, ast.Constant)}
        case ast.Call(func=ast.Name(id="dict"), args=[]):
            return {word.arg: _value(word.value) for word in node.keywords if word.arg}
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return -number
        case ast.BinOp(
            left=ast.Constant(value=int() | float() as a),
            op=ast.Div(),
            right=ast.Constant(value=int() | float() as b),
        ) if b:
            return a / b
    return Unknown()
