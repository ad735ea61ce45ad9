"""Command lines from dataclasses, by tyro; what it doesn't know is told in one line."""

import contextlib
import difflib
import io
import itertools
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import tyro

from casc.printing import plain, say

_FLAG = re.compile(r"--?[a-zA-Z]")


def parse_arguments(
    kind: Any,
    arguments: Sequence[str],
    *,
    prog: str | None = None,
    description: str | None = None,
    default: Any = None,
    config: tuple[Any, ...] = (),
) -> Any:
    """The command that the arguments mean.

    Ends the program after `--help`, and with exit status 2 on wrong usage: one line names the
    flags that there aren't, and the ones that are most like them.

    Args:
        kind: a dataclass, or a union of subcommands.
        arguments: without the program's name.
        prog: the program's name, by default that of the file that runs.
        description: for `--help`.
        default: a value of `kind` whose fields are the defaults.
        config: tyro's markers.
    """
    options: dict[str, Any] = {"prog": prog, "description": description, "config": config}
    if default is not None:
        options["default"] = default
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            command, unknown = tyro.cli(kind, args=arguments, return_unknown_args=True, **options)
    except SystemExit as stop:
        # What tyro takes for a missing argument may follow from a flag that there isn't.
        if not stop.code or not (unknown := _unknown_flags(kind, arguments, options)):
            say(said.getvalue().rstrip("\n"), sys.stderr)
            raise
        refuse(prog, _unknown(unknown, _known_flags(kind, arguments, options)))
    flags = [text for text in unknown if _FLAG.match(text)]
    if flags:
        refuse(prog, _unknown(flags, _known_flags(kind, arguments, options)))
    if unknown:
        refuse(prog, f"unexpected argument {unknown[0]!r}")
    return command


@contextlib.contextmanager
def reader_may_leave() -> Iterator[None]:
    """End the program in silence when whoever reads its output has had enough, as `head` has."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more as it ends, and would tell of it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)


def refuse(prog: str | None, text: str) -> NoReturn:
    """End the program for wrong usage: one line, exit status 2."""
    say(plain(f"{prog or 'error'}: {text}; --help lists what there is"), sys.stderr)
    sys.exit(2)


def _unknown(flags: Sequence[str], known: list[str]) -> str:
    named = ", ".join(flag + _likely(flag.partition("=")[0], known) for flag in flags)
    return f"unknown flag{'s' if len(flags) > 1 else ''} {named}"


def _unknown_flags(kind: Any, arguments: Sequence[str], options: dict[str, Any]) -> list[str]:
    known = {flag.replace("_", "-") for flag in _known_flags(kind, arguments, options)}
    flags = [word for word in arguments if _FLAG.match(word)]
    return [f for f in flags if f.partition("=")[0].replace("_", "-") not in {*known, "-h"}]


def _known_flags(kind: Any, arguments: Sequence[str], options: dict[str, Any]) -> list[str]:
    """The flags that `--help` of the subcommand lists."""
    subcommand = itertools.takewhile(lambda word: not word.startswith("-"), arguments)
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        tyro.cli(kind, args=[*subcommand, "--help"], **options)
    return sorted(set(re.findall(r"(?<![\w-])--[a-z][\w.-]*", shown.getvalue())))


def _likely(flag: str, known: list[str]) -> str:
    """The known flags that somebody may have meant: the same last word, or one like it."""
    last = flag.lstrip("-").replace("_", "-").rpartition(".")[2]
    found = [name for name in known if name.lstrip("-").rpartition(".")[2] == last]
    found += difflib.get_close_matches(flag.replace("_", "-"), known, n=2, cutoff=0.75)
    found = list(dict.fromkeys(found))[:3]
    return f" (did you mean {' or '.join(found)}?)" if found else ""
