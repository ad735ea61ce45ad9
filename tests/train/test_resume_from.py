"""Going back to an earlier checkpoint, with other optimiser settings, and losing nothing."""

import json
from dataclasses import replace

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

from casc.checkpoints import format as checkpoint
from casc.checkpoints.format import list_checkpoints, prune
from casc.errors import UserError
from casc.train.loop import train


@pytest.fixture
def run(tiny_recipe):
    """A run of 4 steps with a checkpoint of each, and the recipe to change it with."""
    recipe = replace(tiny_recipe, max_steps=4, save_steps=1, keep_last=0)
    train(recipe)
    return recipe


def slower(recipe, **changes):
    return replace(recipe, optim=replace(recipe.optim, lr=0.001), **changes)


def steps(recipe):
    return sorted(int(p.name[5:]) for p in list_checkpoints(recipe.folder / "checkpoints"))


def test_other_settings_from_an_earlier_step(run, tmp_path, capsys):
    with pytest.raises(UserError, match=r"--resume-from STEP --allow optim"):
        train(slower(run))
    with pytest.raises(UserError, match=r"--resume-from STEP --allow optim"):
        train(slower(run, resume_from=2))
    assert steps(run) == [1, 2, 3, 4], "what is refused moves nothing"
    capsys.readouterr()
    changed = slower(run, resume_from=2, allow=("optim",))
    train(replace(changed, max_steps=3))
    said = capsys.readouterr().out
    assert "--allow optim: --optim.lr was 0.01, from here on it is 0.001" in said
    assert "later checkpoints are in" in said
    assert steps(run) == [1, 2, 3]
    aside = run.folder / "checkpoints/set-aside-1"
    assert sorted(path.name for path in aside.iterdir()) == ["step-00000003", "step-00000004"]
    checkpoint.verify(aside / "step-00000004")
    old = load_file(aside / "step-00000003/weights.safetensors")
    new = load_file(run.folder / "checkpoints/step-00000003/weights.safetensors")
    assert any(not torch.equal(old[name], new[name]) for name in old)
    # The same command goes on with what it has done, and does so as often as it is started.
    train(changed)
    assert steps(run) == [1, 2, 3, 4]
    assert not (run.folder / "checkpoints/set-aside-2").exists()
    log = (run.folder / "log.jsonl").read_text()
    assert "--optim.lr was 0.01" in log
    runs = [r for r in map(json.loads, log.splitlines()) if r["kind"] == "run"]
    assert runs[-1]["recipe"]["resume_from"] == 2


def test_only_what_is_allowed(run):
    with pytest.raises(UserError, match=r"--seed: the run in"):
        train(slower(run, resume_from=2, allow=("optim",), seed=5))
    with pytest.raises(UserError, match=r"--resume-from 9: .* it has 4, 3, 2, 1"):
        train(replace(run, resume_from=9))
    with pytest.raises(UserError, match="goes with --resume-from STEP"):
        train(replace(run, allow=("optim",)))


def test_an_earlier_step_without_changes_gives_the_same_bits(run):
    weights = run.folder / "checkpoints/step-00000004/weights.safetensors"
    before = load_file(weights)
    train(replace(run, resume_from=2))
    after = load_file(weights)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_last_from_before_a_skipped_update_is_kept(run):
    folder = run.folder / "checkpoints"
    for step in (2, 3, 4):  # as though updates had been skipped from the second on
        path = folder / f"step-{step:08d}"
        file = path / "state.safetensors"
        with safetensors.safe_open(file, "pt") as opened:
            said = opened.metadata()
        tensors = load_file(file)
        (name,) = [name for name in tensors if name.endswith("skipped")]
        tensors[name] = torch.tensor(step)
        save_file(tensors, file, said)
        manifest = json.loads((path / checkpoint.MANIFEST).read_text())
        manifest["files"]["state.safetensors"] = {
            key: fact(file) for key, fact in checkpoint._FACTS.items()
        }
        (path / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    prune(folder, keep_last=1, keep_best=None)
    assert steps(run) == [1, 4]
