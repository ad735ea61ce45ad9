import json
from dataclasses import replace

import pytest
import torch

from casc.data.index import read_index
from casc.data.plan import plan_epoch
from casc.train import step as step_module
from casc.train import warmup
from casc.train.loop import train
from casc.train.warmup import buckets_ahead


@pytest.fixture
def compiles_nothing(monkeypatch):
    """torch.compile as the identity: what is run is then the same, and quick."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    with torch.compiler.config.patch(cache_key_tag=""):  # type: ignore[attr-defined]
        yield


@pytest.fixture
def compiled_recipe(tiny_recipe, tmp_path):
    return replace(tiny_recipe, compile=True, compile_cache=tmp_path / "cache", max_steps=5)


def said(recipe):
    lines = (recipe.folder / "log.jsonl").read_text().splitlines()
    return [record["text"] for record in map(json.loads, lines) if "text" in record]


@pytest.mark.filterwarnings("ignore")
def test_warming_up_changes_nothing(compiled_recipe, compiles_nothing, tmp_path):
    recipe = compiled_recipe
    ends = []
    for changed in (recipe, replace(recipe, warm_up=False, out=tmp_path / "cold")):
        torch.manual_seed(0)  # the loader draws from it
        ends.append((train(changed), torch.get_rng_state()))
    (warm, state), (cold, expected) = ends
    assert torch.equal(state, expected)
    assert warm.state.step == cold.state.step == 5
    for a, b in zip(warm.state[1:], cold.state[1:], strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert torch.equal(a[name], b[name]), name


def test_every_canvas_is_compiled_before_the_first_step(
    compiled_recipe, compiles_nothing, monkeypatch
):
    made, called = [], []
    real = step_module.make_loss_step

    def make(config, image, canvas, *rest):
        step, number = real(config, image, canvas, *rest), len(made)
        made.append(canvas)

        def call(params, buffers, batch):
            called.append((number, tuple(t.shape for t in batch if t is not None)))
            return step(params, buffers, batch)

        return call

    monkeypatch.setattr(step_module, "make_loss_step", make)
    train(compiled_recipe)
    assert len(made) == 2
    # The first call of each was the warm-up's, and had the shapes of real batches.
    assert [number for number, _ in called[:2]] == [0, 1]
    assert set(called[2:]) == set(called[:2])
    lines = [t for t in said(compiled_recipe) if " canvases" in t or t.startswith("compiled in")]
    assert [line.partition(":")[0] for line in lines[:2]] == [
        "compiling 1 of 2 canvases",
        "compiling 2 of 2 canvases",
    ]
    assert lines[2].startswith("compiled in")


def test_off_is_off(compiled_recipe, compiles_nothing, monkeypatch):
    monkeypatch.setattr(warmup, "warm_up", lambda *_: pytest.fail("warmed up"))
    train(replace(compiled_recipe, warm_up=False, max_steps=1))
    train(replace(compiled_recipe, compile=False, max_steps=2))


def test_buckets_ahead_are_those_that_the_plan_meets(tiny_recipe):
    split = read_index(tiny_recipe.data).splits["train"]
    met = []
    for epoch in range(3):
        plan = plan_epoch(split, seed=0, epoch=epoch, world=1, batch=2, workers=1, window=4)
        met += plan.buckets(0).tolist()
    for start in range(len(met)):
        for stop in range(start, len(met) + 1):
            expected = list(dict.fromkeys(met[start:stop]))
            assert buckets_ahead(tiny_recipe, split, 1, range(start, stop)) == expected


def test_accelerators_that_all_see_do_not_wait_for_each_other(monkeypatch):
    monkeypatch.setattr(warmup.dist, "barrier", lambda: pytest.fail("waited"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    ranks = warmup.Ranks(2, 1)
    with warmup._one_rank_first(ranks, torch.device("cuda", 1), None):  # type: ignore[arg-type]
        pass


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
@pytest.mark.parametrize("local", [0, 1])
def test_one_rank_of_a_machine_compiles_first(monkeypatch, local, device):
    events = []
    monkeypatch.setenv("LOCAL_RANK", str(local))
    monkeypatch.setattr(warmup.dist, "barrier", lambda: events.append("barrier"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)

    class Log:
        def say(self, text):
            pass

    ranks, own = warmup.Ranks(2, local), torch.device(device)
    with warmup._one_rank_first(ranks, own, Log()):  # type: ignore[arg-type]
        events.append("compile")
    assert events == (["compile", "barrier"] if local == 0 else ["barrier", "compile"])
