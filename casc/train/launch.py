"""From a recipe's command line to a run: `python -m casc.recipes.NAME`."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from casc.arguments import reader_may_leave
from casc.data.index import read_index
from casc.device.devices import choose_device
from casc.distributed import ranks_from_environment
from casc.errors import TransientError, UserError, is_out_of_memory, told
from casc.printing import plain, say
from casc.train.derived import describe, facts
from casc.train.loop import Summary, train
from casc.train.recipe import Recipe, parse, resolved
from casc.train.recipe_checks import check, check_settings
from casc.train.sinks import Sink
from casc.train.start import resumption


def launch(
    recipe: Recipe,
    description: str | None,
    args: list[str] | None = None,
    *,
    prepare: Callable[[Recipe], object] = lambda recipe: None,
    sinks: Sequence[Sink] = (),
    fitted: Callable[[Recipe], Recipe] | None = None,
) -> Summary | None:
    """Change the recipe by the command line and train, or say what would be done.

    What the user can mend ends in one line on stderr and exit status 1.

    Args:
        recipe: with its defaults.
        description: what `--help` says above the fields, usually the recipe's docstring.
        args: of the command line; by default sys.argv.
        prepare: is called with the resolved recipe before a run, to make what it needs.
        sinks: functions that get each record of the log as well, on the main rank.
        fitted: gives, of the recipe as changed, one with other defaults, such as those that belong
            to its starting weights; what the command line says goes before them.

    Returns:
        How the run ended; None after `--dry-run`.
    """
    with reader_may_leave():
        if fitted is not None:
            asked, _ = parse(recipe, description, args)
            with errors_in_one_line():
                recipe = fitted(asked)
        recipe, dry_run = parse(recipe, description, args)
    with errors_in_one_line():
        world = ranks_from_environment().world
        check_settings(resolved(recipe), world)  # before data is made for it
        if not dry_run:
            prepare(recipe)
            return train(recipe, sinks=sinks)
        index = read_index(recipe.data, recipe.loading)
        check(recipe, index, world)
        say(describe(recipe, index, choose_device(recipe.device), world))
        recipe = resolved(recipe)
        for line in resumption(recipe, index, facts(recipe, index, world)):
            say(f"existing run    {line}")
    return None


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """End the program with a line on stderr where the user can mend what went wrong."""
    try:
        yield
    except TransientError as error:
        _end(f"{error}; the same command goes on from the newest checkpoint")
    except (UserError, OSError) as error:
        _end(told(error))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        _end(told(error))
    except KeyboardInterrupt:
        say("interrupted; the same command goes on from the newest checkpoint", sys.stderr)
        sys.exit(130)


def _end(text: str) -> NoReturn:
    # What an error quotes may come from anywhere, also where it isn't ours.
    sys.exit(plain(f"error: {text}"))
