"""`casc verify` has teeth: mistakes of one line that once passed it, and some of each kind."""

import subprocess
import sys
from pathlib import Path

import mutants
import pytest
from mutants import MUTANTS, TREE

TRIED = (
    "features doubled on the way to the box head",
    "all stages refine as the first",
    "the fixed grid's features doubled",
    "boxes not mirrored",
)


def test_all_mutants_fit_the_code():
    assert len({m.name for m in MUTANTS}) == len(MUTANTS) >= 45
    for mutant in MUTANTS:
        assert (TREE / "casc" / mutant.file).read_text().count(mutant.old) == 1, mutant.name
        assert mutant.old != mutant.new
        for file in mutant.tests:
            assert (TREE / "tests" / file).is_file(), file


@pytest.mark.slow
def test_verify_finds_mistakes():
    command = [sys.executable, str(Path(mutants.__file__)), "--jobs", "2", *TRIED]
    done = subprocess.run(command, capture_output=True, text=True, cwd=TREE)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in TRIED:
        assert f"| {name} | verify: " in done.stdout
