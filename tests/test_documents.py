"""Every command, link and import in the project's Markdown is of things that there are."""

import ast
import contextlib
import importlib
import importlib.util
import io
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tyro
from torch.distributed.run import get_args_parser

from casc.arguments import parse_arguments
from casc.cli import main as cli
from casc.cli.bench import with_default
from casc.train import launch as launching
from casc.train.recipe import Recipe, parse
from data_tools import cli as data_tools

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md") if (ROOT / name).exists()),
    *sorted((ROOT / "docs").rglob("*.md")),
]
JUST = Path(sys.executable).with_name("just")

# A command of ours, perhaps after a prompt, environment variables or what starts it.
_COMMAND = re.compile(
    r"\s*(?:\$ |[A-Z_]+=\S+ |srun |exec |time |do |- )*"
    r"((?:torchrun|(?:[\w./]*/)?python3?|casc|data_tools|just) .*)"
)


class Found(NamedTuple):
    """A command on a page."""

    page: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


def blocks(text: str) -> Iterator[tuple[int, str, str]]:
    """Code blocks, fenced or indented, as (line number of the first line, language, text)."""
    lines = text.splitlines()
    number = 0
    while number < len(lines):
        line = lines[number]
        if fence := re.match(r"\s*```(\w*)", line):
            first = number = number + 1
            while number < len(lines) and not lines[number].strip().startswith("```"):
                number += 1
            yield first + 1, fence[1], "\n".join(lines[first:number])
        elif line.startswith("    ") and (not number or not lines[number - 1].strip()):
            first = number
            while number < len(lines) and (
                lines[number].startswith("    ") or not lines[number].strip()
            ):
                number += 1
            yield first + 1, "", "\n".join(line[4:] for line in lines[first:number])
            continue
        number += 1


def commands(page: Path) -> Iterator[Found]:
    """What a page tells people to type."""
    name = page.relative_to(ROOT).as_posix()
    for first, language, block in blocks(page.read_text()):
        if language not in ("", "sh", "bash", "shell", "console", "yaml"):
            continue
        lines = block.splitlines()
        number = 0
        while number < len(lines):
            start, text = number, lines[number]
            while text.endswith("\\") and number + 1 < len(lines):
                number += 1
                text = text[:-1] + " " + lines[number].strip()
            number += 1
            # YAML's [a, b, c] is a command, too.
            if listed := re.search(r"(?:command|args): \[(.*)\]", text):
                text = listed[1].replace(",", " ")
            for part in re.split(r"&&|\|\||;| \| ", re.sub(r"(?:^|\s)#.*", "", text)):
                part = re.sub(r"\s\d?>.*", "", part)  # where its output goes
                if command := _COMMAND.fullmatch(part):
                    yield Found(name, first + start, command[1].strip())


FOUND = [found for page in PAGES for found in commands(page)]


def check(command: Sequence[str]) -> None:
    """Parse a command as its program would, without running it.

    Raises:
        SystemExit: of a status other than 0, on a flag or value that it wouldn't take.
        AssertionError: when there is no such program.
    """
    program, arguments = Path(command[0]).name, list(command[1:])
    if program == "casc" and arguments[:1] == ["train"] and arguments[1:]:
        _module(f"casc.recipes.{arguments[1]}", arguments[2:])
    elif program == "casc":
        _parsed(cli.Command, with_default(arguments), program)
    elif program == "data_tools":
        _parsed(data_tools.Command, arguments, program)
    elif program == "torchrun":
        with pytest.MonkeyPatch.context() as patch:
            # argparse tells what the usage is of.
            patch.setattr(sys, "argv", ["torchrun"])
            options = get_args_parser().parse_args(arguments)
        assert options.module, "torchrun without -m"
        _module(options.training_script, options.training_script_args)
    elif program == "just":
        _just(arguments)
    elif arguments[:1] == ["-m"]:
        _module(arguments[1], arguments[2:])
    else:
        script = next((word for word in arguments if not word.startswith("-")), None)
        assert script is None or not script.endswith(".py") or (ROOT / script).is_file()


def _parsed(union: Any, arguments: list[str], program: str) -> None:
    try:
        parse_arguments(union, arguments, prog=program)
    except SystemExit as stop:
        if stop.code:
            raise


def _module(name: str, arguments: list[str]) -> None:
    if name in ("pip", "pytest", "pipx"):
        return
    name = name.replace("casc.recipes.NAME", "casc.recipes.coco_1x")  # stands for any of them
    assert _finds(name), f"there is no module {name}"
    if name.startswith("casc.recipes."):
        _recipe(name, arguments)
    elif name in ("casc", "data_tools"):
        check([name, *arguments])


def _recipe(name: str, arguments: list[str]) -> None:
    """Run a recipe's file with a `launch` that only parses."""

    def launch(recipe: Recipe, description: str | None, args: Any = None, **_: Any) -> None:
        parse(recipe, description, args)

    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).read_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launching, "launch", launch)
        patch.setattr(sys, "argv", [name, *arguments])
        try:
            exec(
                compile(source, spec.origin, "exec"),
                {"__name__": "__main__", "__doc__": "", "__package__": "casc.recipes"},
            )
        except SystemExit as stop:
            if stop.code:
                raise


def _just(arguments: list[str]) -> None:
    """Let just show what it would run, and check that."""
    shown = subprocess.run(
        [JUST, "--justfile", ROOT / "justfile", "--dry-run", *arguments],
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 0, shown.stderr
    if arguments[:1] == ["--list"]:
        return
    for line in shown.stderr.splitlines():
        if line.startswith(".venv/bin/") and " -m pip " not in line:
            check(shlex.split(line))


def _finds(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("found", FOUND, ids=str)
def test_command_is_one_that_its_program_takes(found: Found):
    command = shlex.split(found.text)
    if Path(command[0]).name == "just" and not JUST.exists() and not shutil.which("just"):
        pytest.skip("just isn't installed")
    check(command)


def test_there_are_commands_of_each_program():
    programs = {Path(shlex.split(found.text)[0]).name for found in FOUND}
    assert programs >= {"casc", "data_tools", "torchrun", "just", "python"}
    assert len(FOUND) > 30


@pytest.mark.parametrize(
    "wrong",
    [
        "casc eval runs/a shards --bach 3",
        "casc evaluate runs/a shards",
        "casc bench --canvas 512",
        "data_tools shard coco --wokers 3",
        "python -m casc.recipes.coco_1x --lr 3",
        "python -m casc.recipes.coco_2x",
        "torchrun --standalone --processes 8 -m casc.recipes.coco_1x",
        "torchrun --standalone -m casc.recipes.coco_1x --epochs many",
        "just trane-8p",
        "just demo --epoch 3",
        "python docs/nothing.py",
    ],
)
def test_wrong_command_is_noticed(wrong: str):
    with pytest.raises((SystemExit, AssertionError)) as caught:
        check(shlex.split(wrong))
    if isinstance(caught.value, SystemExit):
        assert caught.value.code


def test_commands_are_found_wherever_they_stand(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(
        "Text with `casc eval` in it.\n\n"
        "    A=1 casc eval a b >file 2>&1  # a comment\n"
        "    casc eval a \\\n        b && data_tools check s\n\n"
        "```sh\n$ srun torchrun -m casc.recipes.coco_1x\n```\n"
        "```python\ncasc = 1\n```\n"
        "```yaml\ncommand: [torchrun, -m, casc.recipes.demo]\n```\n"
    )
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert [found.text for found in commands(page)] == [
        "casc eval a b",
        "casc eval a  b",
        "data_tools check s",
        "torchrun -m casc.recipes.coco_1x",
        "torchrun  -m  casc.recipes.demo",
    ]


# Inline code


SPANS = [
    (page.relative_to(ROOT).as_posix(), span)
    for page in PAGES
    for span in sorted(set(re.findall(r"`((?:casc|data_tools) [a-z][^`]*)`", page.read_text())))
]


@pytest.mark.parametrize(("page", "span"), SPANS)
def test_command_within_text_exists(page: str, span: str, capsys):
    # Such a mention may leave arguments out, but not name a flag that there isn't.
    command = shlex.split(span)
    names = set(re.findall(r"\{([^}]*)\}", _help(command[0]))[0].split(","))
    assert command[1] in names or (command[0] == "casc" and command[1].startswith("-"))
    with contextlib.suppress(SystemExit):
        check(command)
    assert "unknown flag" not in capsys.readouterr().err


def _help(program: str) -> str:
    union = {"casc": cli.Command, "data_tools": data_tools.Command}[program]
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        tyro.cli(union, args=["--help"], prog=program)
    return shown.getvalue().replace("\n", "").replace(" ", "").replace("│", "")


# Links and Python


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        linked = page.parent / file if file else page
        assert linked.exists(), target
        if anchor and linked.suffix == ".md":
            assert anchor in _anchors(linked), target


def _anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_python_imports_what_there_is(page: Path):
    for _, language, block in blocks(page.read_text()):
        if language != "python":
            continue
        for node in ast.walk(ast.parse(block)):
            if not isinstance(node, ast.ImportFrom) or node.module is None:
                continue
            if node.module.split(".")[0] in ("casc", "data_tools"):
                module = importlib.import_module(node.module)
                for name in node.names:
                    assert hasattr(module, name.name), f"{node.module}.{name.name}"


def test_every_page_is_on_the_index():
    index = (ROOT / "docs" / "README.md").read_text()
    linked = set(re.findall(r"\]\(([\w./-]+\.md)\)", index))
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in PAGES if "docs" in page.parts}
    assert pages - {"README.md"} <= linked


def test_contributing_stays_short():
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) < 60


# API reference


def test_reference_builds_without_a_warning(tmp_path):
    pdoc = pytest.importorskip("pdoc", reason="pdoc isn't installed")
    from pdoc import render

    # Pictures of the source take most of the time, and can't go wrong.
    render.configure(docformat="google", show_source=False, search=False)
    pdoc.pdoc("casc", "data_tools", output_directory=tmp_path)  # warnings are errors here
    # A package that lists its names (`__all__`) shows these, not the files that they come from.
    packages = [
        init.parent
        for package in ("casc", "data_tools")
        for init in (ROOT / package).rglob("__init__.py")
        if "__all__" not in init.read_text()
    ]
    public = {
        path.relative_to(ROOT).with_suffix(".html")
        for package in packages
        for path in package.glob("[!_]*.py")
    }
    missing = [path for path in sorted(public) if not (tmp_path / path).is_file()]
    assert missing == []
    page = tmp_path / "casc" / "model" / "anchors.html"
    assert "Pixels per cell of each level" in page.read_text()
