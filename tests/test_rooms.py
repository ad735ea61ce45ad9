"""What import-linter doesn't check: private names stay in their file, and the picture is whole."""

import ast
import runpy
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("casc", "data_tools", "recipes")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def private_imports(source: str) -> list[str]:
    """Names with a leading underscore that are imported from a file of this project."""
    return [
        f"{node.module}.{alias.name}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom)
        and (node.level or (node.module or "").split(".")[0] in PACKAGES)
        for alias in node.names
        if alias.name.startswith("_")
    ]


def test_private_names_stay_where_they_are():
    assert private_imports("from casc.model.rpn import _decode") == ["casc.model.rpn._decode"]
    found = {str(path): private_imports(path.read_text(encoding="utf-8")) for path in FILES}
    assert not {path: names for path, names in found.items() if names}


def test_every_room_is_in_the_contract_and_in_the_picture():
    pytest.importorskip("grimp", reason="import-linter isn't installed")
    drawn = runpy.run_path(str(ROOT / "docs" / "plot_rooms.py"), run_name="rooms")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = settings["tool"]["importlinter"]["contracts"][0]["layers"]
    contract = {room.strip() for layer in layers for room in layer.split("|")}
    assert contract == {*drawn["PLACES"], *drawn["GROUND"]}
    rooms = {f"casc.{path.stem}" for path in (ROOT / "casc").iterdir() if path.name[0] not in "._"}
    assert rooms - {"casc.recipes"} <= contract
