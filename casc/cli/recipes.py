"""`casc recipes` and `casc train NAME`: the recipes by name, and a run of one."""

import ast
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from casc.arguments import refuse
from casc.errors import UserError
from casc.printing import say

if TYPE_CHECKING:  # torch takes seconds to import, which --help needn't wait for
    from casc.train.recipe import Recipe

_PACKAGE = "casc.recipes"


@dataclass(frozen=True)
class RecipesCommand:
    """List the recipes: what each is, what it costs, and what to expect of it.

    Examples: `casc recipes`; `casc train coco_1x --help` for a recipe's settings.
    """

    def run(self) -> int:
        """List them."""
        for name, text in descriptions().items():
            say(name)
            paragraphs = [" ".join(part.split()) for part in text.split("\n\n")]
            say(f"    {paragraphs[0]}")
            for wanted in ("What it costs:", "What to expect:"):
                for part in paragraphs:
                    if part.startswith(wanted):
                        say(f"    {part[5].upper()}{part[6:]}")
        return 0


@dataclass(frozen=True)
class TrainCommand:
    """Train as a recipe says; without a name, list the recipes.

    `casc train NAME ...` is `python -m casc.recipes.NAME ...`; with torchrun, which starts a
    process for each device, it is `torchrun --nproc-per-node 8 -m casc train NAME ...`.

    Examples: `casc train coco_1x --data shards --dry-run`; `casc train demo`.
    """

    name: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="[NAME]")]] = ""
    """The recipe; its own flags follow, and `casc train NAME --help` lists them."""

    def run(self) -> int:
        """List the recipes; with a name `train` is called instead."""
        return RecipesCommand().run()


def descriptions() -> dict[str, str]:
    """Give each recipe's docstring by its name, importing none."""
    spec = importlib.util.find_spec(_PACKAGE)
    folders = [] if spec is None else spec.submodule_search_locations or []
    files = sorted(file for folder in folders for file in Path(folder).glob("[!_]*.py"))
    sources = {file.stem: ast.parse(file.read_text(encoding="utf-8")) for file in files}
    return {name: ast.get_docstring(source) or "" for name, source in sources.items()}


def recipe_named(name: str) -> "Recipe":
    """Give a recipe with its own settings.

    Raises:
        UserError: there is none of that name.
    """
    known = list(descriptions())
    if name not in known:
        raise UserError(f"--recipe {name}: there is {', '.join(known)}")
    return getattr(importlib.import_module(f"{_PACKAGE}.{name}"), name)()


def train(name: str, arguments: Sequence[str]) -> None:
    """Run a recipe with these arguments, as `python -m casc.recipes.NAME` does."""
    known = list(descriptions())
    if name not in known:
        refuse("casc train", f"no recipe {name!r}; there is {', '.join(known)}")
    sys.argv = [f"casc train {name}", *arguments]
    from casc.train.launch import launch

    module = importlib.import_module(f"{_PACKAGE}.{name}")
    if hasattr(module, "main"):  # the recipe does more than train, such as making its data
        module.main(list(arguments))
    else:
        launch(getattr(module, name)(), module.__doc__, list(arguments))
