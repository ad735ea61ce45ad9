import errno
import json

import pytest
import torch

from casc.checkpoints import format as checkpoint
from casc.checkpoints.state import State
from casc.errors import UserError


def make_state(step, seed=0) -> State:
    generator = torch.Generator().manual_seed(seed)
    conv = torch.randn(4, 3, 3, 3, generator=generator).to(memory_format=torch.channels_last)
    return State(
        step,
        {"a.weight": conv.requires_grad_(), "b": torch.randn(5, generator=generator)},
        {"a.running_mean": torch.randn(4, generator=generator), "n": torch.tensor(3)},
        {"a.weight": torch.randn(4, 3, 3, 3, generator=generator)},
        {"skipped": torch.tensor(seed), "loss_scale": torch.tensor(2.0**seed)},
    )


def write(folder, step, seed=0):
    return checkpoint.save(
        folder, make_state(step, seed), metadata={"recipe": "{}"}, position={"step": step}
    )


def test_round_trip(tmp_path):
    path = write(tmp_path, 12, seed=1)
    state = checkpoint.restore(make_state(0, seed=2), checkpoint.load(path), path)
    assert state.step == 12
    for found, expected in zip(state[1:], make_state(12, seed=1)[1:], strict=True):
        for name in expected:
            assert torch.equal(found[name], expected[name])
    assert state.params["a.weight"].is_contiguous(memory_format=torch.channels_last)
    assert state.params["a.weight"].requires_grad
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", [checkpoint.WEIGHTS, checkpoint.STATE, checkpoint.MANIFEST])
@pytest.mark.parametrize("damage", ["cut", "flip", "missing"])
def test_damage_is_found(tmp_path, name, damage):
    write(tmp_path, 1)
    file = write(tmp_path, 2) / name
    data = file.read_bytes()
    if damage == "cut":
        file.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        middle = data.index(b"sha256") if name == checkpoint.MANIFEST else len(data) - 3
        file.write_bytes(data[:middle] + bytes([data[middle] ^ 8]) + data[middle + 1 :])
    else:
        file.unlink()
    with pytest.raises(checkpoint.CorruptCheckpointError, match=name):
        checkpoint.load(file.parent)
    warnings = []
    assert checkpoint.newest(tmp_path, warnings.append) == tmp_path / "step-00000001"
    (warning,) = warnings
    assert name in warning


def test_a_save_that_fails_leaves_the_others(tmp_path, monkeypatch):
    first = write(tmp_path, 1)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "fsync", full)
        with pytest.raises(UserError, match=r"step-00000002.*No space left.*untouched"):
            write(tmp_path, 2)
    checkpoint.verify(first)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_what_an_interrupted_save_leaves_is_no_checkpoint(tmp_path):
    write(tmp_path, 1)
    (tmp_path / ".step-00000002.77").mkdir()
    (tmp_path / ".step-00000002.77" / checkpoint.WEIGHTS).write_bytes(b"half")
    assert checkpoint.newest(tmp_path, pytest.fail) == tmp_path / "step-00000001"
    checkpoint.remove_partial(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_saving_a_step_again_replaces_it(tmp_path):
    write(tmp_path, 1, seed=1)
    path = write(tmp_path, 1, seed=2)
    loaded = checkpoint.load(path)
    assert torch.equal(loaded.weights["b"], make_state(1, seed=2).params["b"])


def test_keeps_the_last_and_the_best(tmp_path):
    for step, figure in ((1, 0.1), (2, 0.5), (3, None), (4, 0.3), (5, 0.5), (6, 0.2), (7, 0.2)):
        path = write(tmp_path, step)
        if figure is not None:
            checkpoint.add_metrics(path, {"mask_ap": figure, "box_ap": 1 - figure})
        checkpoint.prune(tmp_path, keep_last=2, keep_best="mask_ap")
    # Of equals the newer, but what is gone is gone: 2 was dropped when 5 came level.
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "best", "step-00000005", "step-00000006", "step-00000007",
    ]  # fmt: skip
    assert (tmp_path / "best").resolve().name == "step-00000005"
    assert checkpoint.best(tmp_path, "box_ap") == (tmp_path / "step-00000007", 0.8)
    checkpoint.prune(tmp_path, keep_last=0, keep_best=None)
    assert len(checkpoint.list_checkpoints(tmp_path)) == 3
    checkpoint.prune(tmp_path, keep_last=1, keep_best=None)
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path)] == ["step-00000007"]


def test_newest_is_by_step_not_by_name(tmp_path):
    for step in (99_999_999, 100_000_000):
        write(tmp_path, step)
    assert checkpoint.newest(tmp_path, pytest.fail) == tmp_path / "step-100000000"


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_another_model_is_refused(tmp_path, change):
    path = write(tmp_path, 1)
    loaded = checkpoint.load(path)
    if change == "missing":
        del loaded.weights["b"]
    elif change == "extra":
        loaded.weights["c"] = torch.zeros(1)
    else:
        loaded.momentum["a.weight"] = torch.zeros(4, 3, 1, 1)
    with pytest.raises(UserError, match=r"tensor '(b|c|a.weight)' doesn't fit"):
        checkpoint.restore(make_state(0), loaded, path)


def test_manifest_is_readable_by_others(tmp_path):
    """Anybody can check it with sha256sum."""
    import hashlib

    path = write(tmp_path, 3)
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    assert manifest["step"] == 3
    for name, facts in manifest["files"].items():
        assert hashlib.sha256((path / name).read_bytes()).hexdigest() == facts["sha256"]


def remake(path, edit):
    """Write a checkpoint's files changed, with hashes that agree."""
    import hashlib

    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    for name in (checkpoint.WEIGHTS, checkpoint.STATE):
        with safe_open(path / name, "pt") as file:
            metadata = file.metadata()
        metadata = edit(name, metadata)
        save_file(load_file(path / name), path / name, metadata=metadata)
        data = (path / name).read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        manifest["files"][name] = {"bytes": len(data), "sha256": digest}
    manifest = edit(checkpoint.MANIFEST, manifest)
    (path / checkpoint.MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("where", "change", "said"),
    [
        (checkpoint.WEIGHTS, {"recipe": None}, "no 'recipe'"),
        (checkpoint.WEIGHTS, {"recipe": "[" * 100_000}, "nested too deeply"),
        (checkpoint.WEIGHTS, {"recipe": '{"a":' * 90 + "1" + "}" * 90}, "more than 64 deep"),
        (checkpoint.WEIGHTS, {"format": "other"}, "format is 'other'"),
        (checkpoint.STATE, {"position": None}, "no 'position'"),
        (checkpoint.STATE, {"position": '{"step": true}'}, "step is True"),
        (checkpoint.MANIFEST, {"format": None}, "format is None"),
        (checkpoint.MANIFEST, {"version": "1"}, "version is '1'"),
    ],
)
def test_what_cant_be_resumed_is_passed_over_with_its_reason(tmp_path, where, change, said):
    write(tmp_path, 1)

    def edit(name, values):
        changed = {**values, **change} if name == where else values
        return {key: value for key, value in changed.items() if value is not None}

    remake(write(tmp_path, 2), edit)
    warnings = []
    assert checkpoint.newest(tmp_path, warnings.append) == tmp_path / "step-00000001"
    assert said in warnings[0]
    assert where in warnings[0]


@pytest.mark.parametrize("where", [checkpoint.MANIFEST, checkpoint.WEIGHTS])
def test_a_newer_version_is_refused_not_passed_over(tmp_path, where):
    write(tmp_path, 1)
    two = 2 if where == checkpoint.MANIFEST else "2"
    remake(write(tmp_path, 2), lambda name, v: {**v, "version": two} if name == where else v)
    with pytest.raises(UserError, match=r"version is 2, this casc reads 1; update casc"):
        checkpoint.newest(tmp_path, pytest.fail)


def test_a_damaged_best_costs_no_whole_checkpoint(tmp_path):
    for step, figure in ((1, 0.9), (2, 0.5)):
        checkpoint.add_metrics(write(tmp_path, step), {"mask_ap": figure})
    (tmp_path / "step-00000001" / checkpoint.WEIGHTS).unlink()
    newest = write(tmp_path, 3)
    checkpoint.prune(tmp_path, keep_last=1, keep_best="mask_ap", newest=newest)
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path)] == [
        "step-00000003",
        "step-00000002",
    ]
    assert (tmp_path / "best").resolve().name == "step-00000002"


def test_a_damaged_newer_one_doesnt_count_among_the_last(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step)
    (tmp_path / "step-00000003" / checkpoint.STATE).write_bytes(b"half")
    checkpoint.prune(tmp_path, keep_last=1, keep_best=None)
    assert checkpoint.newest(tmp_path, lambda text: None) == tmp_path / "step-00000002"
    assert not (tmp_path / "step-00000001").exists()


def test_a_deletion_that_is_killed_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    for step in (1, 2):
        write(tmp_path, step)

    def killed(path, **_):
        if path.exists():
            (path / checkpoint.WEIGHTS).unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.prune(tmp_path, keep_last=1, keep_best=None)
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path)] == ["step-00000002"]
    (tmp_path / ".best.77").symlink_to("step-00000002")
    checkpoint.remove_partial(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000002"]
