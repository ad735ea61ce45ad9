"""The command line: every command of `casc`, each a file of this room.

Training is `python -m casc.recipes.NAME`.
"""

import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import tyro

from casc.arguments import parse_arguments
from casc.cli.bench import BenchCommand, with_default
from casc.cli.convert import ConvertCommand
from casc.cli.doctor import DoctorCommand
from casc.cli.eval import EvalCommand
from casc.cli.export import ExportCommand
from casc.cli.predict import PredictCommand
from casc.cli.report import ReportCommand
from casc.cli.verify import VerifyCommand
from casc.errors import UserError

Command = (
    Annotated[EvalCommand, tyro.conf.subcommand("eval")]
    | Annotated[PredictCommand, tyro.conf.subcommand("predict")]
    | Annotated[ReportCommand, tyro.conf.subcommand("report")]
    | Annotated[VerifyCommand, tyro.conf.subcommand("verify")]
    | Annotated[BenchCommand, tyro.conf.subcommand("bench")]
    | Annotated[DoctorCommand, tyro.conf.subcommand("doctor")]
    | Annotated[ConvertCommand, tyro.conf.subcommand("convert")]
    | Annotated[ExportCommand, tyro.conf.subcommand("export")]
)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 if all is well, 1 if not, 2 on wrong usage."""
    command = parse_arguments(
        Command,
        with_default(sys.argv[1:] if arguments is None else arguments),
        prog="casc",
        description=__doc__,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    try:
        code = command.run()
    except (UserError, OSError) as error:
        print(f"casc: {error}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)
