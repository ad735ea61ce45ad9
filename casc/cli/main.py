"""Train, evaluate and use Cascade Mask R-CNN.

`casc COMMAND --help` explains a command, `casc train NAME --help` a recipe; `casc --version` says
which casc this is. Data sets are made by data_tools.
"""

import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Annotated, NoReturn

import tyro

import casc
from casc.arguments import overview, parse_arguments, reader_may_leave
from casc.cli.bench import BenchCommand, with_default
from casc.cli.convert import ConvertCommand
from casc.cli.doctor import DoctorCommand
from casc.cli.eval import EvalCommand
from casc.cli.export import ExportCommand
from casc.cli.predict import PredictCommand
from casc.cli.push import PushCommand
from casc.cli.recipes import RecipesCommand, TrainCommand, train
from casc.cli.report import ReportCommand
from casc.cli.verify import VerifyCommand
from casc.cli.weights import WeightsCommand
from casc.errors import UserError, is_out_of_memory, told
from casc.inference.settings import Settings, Views
from casc.printing import plain, say

Command = (
    Annotated[TrainCommand, tyro.conf.subcommand("train")]
    | Annotated[RecipesCommand, tyro.conf.subcommand("recipes")]
    | Annotated[EvalCommand, tyro.conf.subcommand("eval")]
    | Annotated[PredictCommand, tyro.conf.subcommand("predict")]
    | Annotated[ReportCommand, tyro.conf.subcommand("report")]
    | Annotated[VerifyCommand, tyro.conf.subcommand("verify")]
    | Annotated[BenchCommand, tyro.conf.subcommand("bench")]
    | Annotated[DoctorCommand, tyro.conf.subcommand("doctor")]
    | Annotated[WeightsCommand, tyro.conf.subcommand("weights")]
    | Annotated[PushCommand, tyro.conf.subcommand("push")]
    | Annotated[ConvertCommand, tyro.conf.subcommand("convert")]
    | Annotated[ExportCommand, tyro.conf.subcommand("export")]
)

_GROUPS = {
    "options": ("help", "out", ""),
    "from scores to detections": tuple(f.name.replace("_", "-") for f in fields(Settings)),
    "looking more than once": tuple(f.name for f in fields(Views)),
    "where and how to compute": ("device", "dtype", "compile", "replay"),
    "reading shards": ("loading.",),
}
"""How `--help` of a command lists the flags."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 if all is well, 1 if not, 2 on wrong usage."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    with reader_may_leave():
        sys.exit(_run(given))


def _run(arguments: list[str]) -> int:
    if arguments in (["-h"], ["--help"]):
        say(overview(Command, "casc", __doc__ or ""))
        return 0
    if arguments == ["--version"]:
        say(f"casc {casc.__version__}")
        return 0
    if arguments[:1] == ["train"] and arguments[1:] and not arguments[1].startswith("-"):
        train(arguments[1], arguments[2:])
        return 0
    command = parse_arguments(
        Command,
        with_default(arguments),
        prog="casc",
        description=__doc__,
        groups=_GROUPS,
    )
    try:
        return command.run()
    except BrokenPipeError:
        raise
    except (UserError, OSError) as error:
        say(plain(f"casc: {told(error)}"), sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        say(plain(f"casc: {told(error)}"), sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
