"""The long form: CASC_CHAOS_KILLS=20 python -m pytest -s tests/train/test_chaos.py"""

import os
import signal
import sys
from collections import Counter

import chaos
import pytest

pytestmark = pytest.mark.skipif(
    not hasattr(signal, "SIGKILL") or sys.platform == "darwin", reason="needs /proc and SIGKILL"
)


def test_killed_at_any_moment_a_run_ends_in_the_same_bits(tiny_recipe, tmp_path, capsys):
    kills = int(os.environ.get("CASC_CHAOS_KILLS", "5"))
    recipe = chaos.hurried(tiny_recipe, steps=chaos.STEPS * kills)
    done, whole = chaos.trial(recipe, tmp_path, kills=kills, seed=4)
    with capsys.disabled():
        if "CASC_CHAOS_KILLS" in os.environ:
            for kill in done:
                print(f"after {kill.after:6.2f} s, last logged step {kill.step:3d}, {kill.where}")
            print(f"undisturbed {whole:.1f} s;", dict(Counter(kill.where for kill in done)))
    assert len(done) == kills, "the run ended before it was killed so often"
