"""From a recipe's command line to a run: `python -m casc.recipes.NAME`."""

import sys

from casc.data.index import read_index
from casc.devices import choose_device
from casc.errors import UserError
from casc.recipe import Recipe, check, describe, parse
from casc.train.distributed import ranks_from_environment
from casc.train.loop import train


def launch(recipe: Recipe, description: str | None, args: list[str] | None = None) -> None:
    """Change the recipe by the command line and train, or say what would be done.

    What the user can mend ends in one line on stderr and exit status 1.

    Args:
        recipe: with its defaults.
        description: what `--help` says above the fields, usually the recipe's docstring.
        args: of the command line; by default sys.argv.
    """
    try:
        recipe, dry_run = parse(recipe, description, args)
        if dry_run:
            index = read_index(recipe.data)
            world = ranks_from_environment().world
            check(recipe, index, world)
            print(describe(recipe, index, choose_device(recipe.device), world))
        else:
            train(recipe)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(
            f"\ninterrupted; the same command goes on from the newest checkpoint in {recipe.folder}"
        )
