"""The long form: just chaos --minutes 60"""

import signal
import sys
from dataclasses import replace

import chaos
import pytest
import strikes

from casc.model.preprocess import ImageConfig
from casc.train.recipe import Recipe
from data_tools.plan import Settings
from data_tools.synth import SynthSettings, synthesise

pytestmark = pytest.mark.skipif(
    not hasattr(signal, "SIGKILL") or sys.platform == "darwin", reason="needs /proc and SIGKILL"
)


@pytest.mark.slow
def test_whatever_happens_a_run_ends_in_the_same_bytes(tiny_recipe, tmp_path, capsys, request):
    """In the suite eight series."""
    chaos.server()
    if not chaos.LIBRARY.exists():
        pytest.skip("needs a C compiler")
    minutes = request.config.getoption("--minutes")
    synthesise(tmp_path / "coco", {"train": 9}, SynthSettings(size=64, classes=5))
    settings = Settings(
        aspects=(1.0,), max_size=None, samples_per_shard=3, shard_mib=256.0, trace_tolerance=None
    )
    recipe = replace(
        chaos.hurried(tiny_recipe, steps=4),
        evaluate_every=1,
        epochs=2,
        image=ImageConfig(short=32, long=32),
        model=replace(tiny_recipe.model, stages=tiny_recipe.model.stages[:1]),
    )

    def run(name: str, ranks: int) -> Recipe:
        return replace(recipe, out=tmp_path / name / "run", batch=4 // ranks)

    cases = [
        strikes.training("one", run("one", 1), 1, strikes=4, weight=8),
        strikes.training("two", run("two", 2), 2, strikes=4, weight=8),
        strikes.under_torchrun(run("torchrun", 2), weight=1),
        strikes.sharding(tmp_path / "coco", tmp_path / "sharding/out", settings, weight=8),
    ]
    for case in cases:
        case.folder.parent.mkdir()

    def say(text: object) -> None:
        with capsys.disabled():
            print(text, flush=True)

    seed = request.config.getoption("--seed")
    account = strikes.campaign(cases, minutes, seed, say if minutes else str)
    if minutes:
        say(account)
    assert not account.failures, "\n".join(account.failures)
    assert account.kills > 0
