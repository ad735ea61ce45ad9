"""JSON files: read with errors that name the file, written so that no reader sees half of one."""

import json
import os
from pathlib import Path
from typing import Any

from casc.errors import UserError


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file.

    Raises:
        UserError: naming the file.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not found") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: can't be read as JSON ({error})") from None


def write_json(data: object, path: str | os.PathLike[str], *, indent: int | None = 1) -> None:
    """Write a JSON file so that a reader never sees half of it."""
    file = Path(path)
    temporary = file.with_name(f".{file.name}.tmp")
    text = json.dumps(data, indent=indent, allow_nan=False) + "\n"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)
