"""Command lines from dataclasses, by tyro; what it doesn't know is told in one line."""

import contextlib
import difflib
import io
import itertools
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn, get_args

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
    groups: Mapping[str, Sequence[str]] | None = None,
) -> Any:
    """The command that the arguments mean.

    Ends the program after `--help`, and with exit status 2 on wrong usage: one line names what is
    missing or can't be read, or the flags that there aren't, and the ones that are most like them.

    Args:
        kind: a dataclass, or a union of subcommands.
        arguments: without the program's name.
        prog: the program's name, by default that of the file that runs.
        description: for `--help`.
        default: a value of `kind` whose fields are the defaults.
        config: tyro's markers.
        groups: how `--help` puts flags together; see `regrouped`. By default by their prefix.
    """
    options: dict[str, Any] = {"prog": prog, "description": description, "config": config}
    if default is not None:
        options["default"] = default
    said = io.StringIO()
    shown = _Page()
    try:
        with (
            contextlib.redirect_stderr(said),
            _one_column(shown) if groups else contextlib.nullcontext(),
        ):
            command, unknown = tyro.cli(kind, args=arguments, return_unknown_args=True, **options)
    except SystemExit as stop:
        if groups and not stop.code:
            sys.stdout.write(regrouped(shown.getvalue(), groups))
            raise
        # What tyro takes for a missing argument may follow from a flag that there isn't.
        if not stop.code:
            raise
        if not (unknown := _unknown_flags(kind, arguments, options)):
            refuse(prog, _in_one_line(said.getvalue(), kind, arguments))
        refuse(prog, _unknown(unknown, _known_flags(kind, arguments, options)))
    flags = [text for text in unknown if _FLAG.match(text)]
    if flags:
        refuse(prog, _unknown(flags, _known_flags(kind, arguments, options)))
    if unknown:
        refuse(prog, f"unexpected argument {unknown[0]!r}")
    return command


def overview(kind: Any, prog: str, description: str) -> str:
    """A program's own `--help`: each subcommand with the first line of what it says of itself.

    Args:
        kind: the union of subcommands.
        prog: the program's name.
        description: of the program.
    """
    commands = {about.name: command for command, about in map(get_args, get_args(kind))}
    width = max(map(len, commands))
    lines = [f"usage: {prog} COMMAND ...", "", description.strip(), ""]
    for name, command in commands.items():
        lines.append(f"  {name:{width}}  {(command.__doc__ or '').strip().splitlines()[0]}")
    return "\n".join(lines)


class _Page(io.StringIO):
    """Text that tyro may draw boxes in where stdout would take them."""

    encoding: str = getattr(sys.__stdout__, "encoding", None) or "utf-8"


@contextlib.contextmanager
def _one_column(page: io.StringIO) -> Iterator[None]:
    """Have what is printed in a page, and no wider than tyro makes one column of."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(min(shutil.get_terminal_size().columns, 120))
    try:
        with contextlib.redirect_stdout(page):
            yield
    finally:
        del os.environ["COLUMNS"]
        if before is not None:
            os.environ["COLUMNS"] = before


def regrouped(text: str, groups: Mapping[str, Sequence[str]]) -> str:
    """A page of `--help` with its flags in boxes of other titles.

    Args:
        text: as tyro prints it: a box for each prefix, a flag's lines one after the other.
        groups: titles in their order, each with the flags that belong there, without "--", and in
            the order that they are listed in. "optim." means all that begin so and aren't listed by
            their whole names; "" all that is left.
    """
    head: list[str] = []
    flags: list[tuple[str, list[str]]] = []
    inside, width = False, 0
    for line in text.splitlines():
        if found := re.match(r"╭─ (.*?) ─", line):
            inside, width = found[1].endswith("options"), len(line)
        if not inside:
            head.append(line)
        elif line.startswith("╰"):
            inside = False
        elif found := re.match(r"│ (?:-h, )?--([\w.-]+)", line):
            flags.append((found[1], [line]))
        elif flags and line.startswith("│      "):
            flags[-1][1].append(line)
    if not flags:
        return text  # in a terminal that has no boxes
    listed = [(title, entry) for title, entries in groups.items() for entry in entries]
    boxes: dict[str, list[tuple[int, list[str]]]] = {title: [] for title in groups}
    for flag, lines in flags:
        fitting = [e for _, e in listed if flag == e or (flag.startswith(e) and e[-1:] in ".")]
        best = max(fitting, key=len)
        place = next(i for i, (_, entry) in enumerate(listed) if entry == best)
        boxes[listed[place][0]].append((place, lines))
    page = "\n".join(head).rstrip("\n") + "\n\n"
    for title, entries in boxes.items():
        if entries:
            inner = [line for _, lines in sorted(entries, key=lambda e: e[0]) for line in lines]
            top = f"╭─ {title} ".ljust(width - 1, "─") + "╮"
            page += "\n".join([top, *inner, "╰" + "─" * (width - 2) + "╯"]) + "\n"
    return page


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


def _in_one_line(box: str, kind: Any, arguments: Sequence[str]) -> str:
    """What tyro says of a mistake in a box of many lines, drawn in ASCII or not."""
    lines = [line.strip("│").rstrip() for line in box.splitlines()]
    rules = [i for i, line in enumerate(lines) if re.fullmatch(r"[ ─╰╯+-]{5,}", line)]
    # The title comes first, and after the text a rule and what `--help` says.
    start = rules[0] + 1 if rules[:1] == [1] else 1
    end = next((i for i in rules if i > start), len(lines))
    inside = [line for line in lines[start:end] if line]
    text = " ".join(line.strip() for line in inside)
    if found := re.match(r"Expected one of \{(.*)\}", text):
        return _no_command(found[1].split(", "), kind, arguments)
    if text.startswith("Missing from "):
        # Each is followed by its help, which is indented further.
        indents = [len(line) - len(line.lstrip()) for line in inside]
        names = [line.strip() for line, n in zip(inside, indents, strict=True) if n == indents[1]]
        return f"{' and '.join(names)} missing"
    text = re.sub(r"^Error parsing (\S+): ", r"\1: ", re.sub(r"\[/?bold\]", "", text)).rstrip(".")
    # Of several types tyro says at length why each doesn't fit.
    if found := re.match(
        r"(\S+): no type matching (\S.*?) could be instantiated from (\[.*?\])", text
    ):
        return f"{found[1]}: expected {found[2].removeprefix('{None}|')}, got {found[3]}"
    return text


def _no_command(names: Sequence[str], kind: Any, arguments: Sequence[str]) -> str:
    words = list(itertools.takewhile(lambda word: not word.startswith("-"), arguments))
    if words and words[0] in {about.name for _, about in map(get_args, get_args(kind))}:
        words = words[1:]
    if not words:
        return f"a command is missing: {', '.join(names)}"
    alike = difflib.get_close_matches(words[0], names, n=1)
    meant = f" (did you mean {alike[0]}?)" if alike else ""
    return f"there is no command {words[0]!r}{meant}: {', '.join(names)}"


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
