import errno
import json
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from casc.checkpoints import format as checkpoint
from casc.errors import UserError
from casc.train import saving
from casc.train.loop import train


def records(recipe, kind):
    lines = (recipe.folder / "log.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


@pytest.fixture
def held(monkeypatch):
    """Saves that wait, once they have begun, until `go` is set."""
    write, begun, go = checkpoint.save, threading.Event(), threading.Event()

    def save(*args, **kwargs):
        begun.set()
        assert go.wait(60)
        return write(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save", save)
    return begun, go


def test_steps_go_on_while_a_checkpoint_is_written(tiny_recipe, held, tmp_path, monkeypatch):
    begun, go = held
    after = []
    look = saving.Saver.poll

    def watch(saver):
        if begun.is_set() and saver.write:
            after.append(saver.write.step)
        if len(after) == 3:  # three steps were made during the write of step 1
            go.set()
        look(saver)

    monkeypatch.setattr(saving.Saver, "poll", watch)
    recipe = replace(tiny_recipe, max_steps=5, save_steps=100, keep_last=0)
    monkeypatch.setattr(
        "casc.train.run.Run.due", lambda run, step, every, *_: every and step in (1, 5)
    )
    train(recipe)
    assert after[:3] == [1, 1, 1]
    # What was written is the state of the step at which the save began.
    straight = replace(recipe, out=tmp_path / "straight")
    go.set()
    train(straight)
    for step in (1, 5):
        loaded = [
            checkpoint.load(checkpoint.path_of(r.folder / "checkpoints", step))
            for r in (recipe, straight)
        ]
        for a, b in zip(loaded[0][:3], loaded[1][:3], strict=True):
            assert all(torch.equal(a[name], b[name]) for name in b)
    saves = records(recipe, "save")
    assert [record["step"] for record in saves] == [1, 5]
    assert all(record["stall_seconds"] >= 0 for record in saves)


def test_a_save_waits_for_the_one_before_and_says_so(tiny_recipe, held, capsys, monkeypatch):
    begun, go = held
    wait = saving.Saver.wait

    def release(saver, **arguments):
        threading.Timer(0.5, go.set).start()
        wait(saver, **arguments)

    monkeypatch.setattr(saving.Saver, "wait", release)
    train(replace(tiny_recipe, max_steps=2, save_steps=1))
    assert begun.is_set()
    output = capsys.readouterr().out
    assert "warning: step 2 waited" in output
    assert "for the checkpoint of step 1 to be written: save less often (--save-steps)" in output


def full(path, *_, **__):
    raise OSError(errno.ENOSPC, "No space left on device", str(path))


def test_a_full_disk_costs_one_checkpoint(tiny_recipe, monkeypatch, capsys):
    write = checkpoint.save_file
    calls = []

    def save_file(tensors, path, metadata):
        calls.append(path)
        if "step-00000002" in str(path):
            Path(path).write_bytes(b"half")
            full(path)
        write(tensors, path, metadata=metadata)

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    recipe = replace(tiny_recipe, max_steps=3, save_steps=1, keep_last=0)
    assert train(recipe).state.step == 3
    output = capsys.readouterr().out
    assert "step-00000002: could not be saved ([Errno 28] No space left on device" in output
    assert "earlier checkpoints are untouched; training goes on" in output
    folder = recipe.folder / "checkpoints"
    assert [path.name for path in checkpoint.list_checkpoints(folder)] == [
        "step-00000003",
        "step-00000001",
    ]
    assert not list(folder.glob(".*"))
    assert "could not be saved" in (recipe.folder / "logs/rank-0.jsonl").read_text()


def test_the_last_save_must_not_fail(tiny_recipe, monkeypatch):
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match=r"step-00000002: could not be saved"):
        train(replace(tiny_recipe, max_steps=2))


SMALL_DISK = """
import sys
from pathlib import Path
import torch
from casc.errors import UserError
from casc.checkpoints import format as checkpoint
from casc.train.state import State

def state(step, size):
    return State(step, {"a": torch.full((size,), float(step))}, {}, {}, {})

folder = Path(sys.argv[1])
checkpoint.save(folder, state(1, 100_000), metadata={"recipe": "{}"}, position={"step": 1})
try:
    checkpoint.save(folder, state(2, 1_000_000), metadata={"recipe": "{}"}, position={"step": 2})
except UserError as error:
    print(error)
warnings = []
assert checkpoint.newest(folder, warnings.append).name == "step-00000001" and not warnings
assert checkpoint.load(folder / "step-00000001").weights["a"].eq(1).all()
assert not list(folder.glob(".*"))
checkpoint.save(folder, state(3, 100_000), metadata={"recipe": "{}"}, position={"step": 3})
"""


def test_a_disk_that_really_is_full(tmp_path):
    if not shutil.which("unshare"):
        pytest.skip("needs unshare to mount a small file system")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=2m tmpfs {disk}"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("mounting a file system isn't permitted here")
    command = f'{mount} && exec "$0" -c "$1" {disk}'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", command, sys.executable, SMALL_DISK],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "step-00000002: could not be saved" in done.stdout
    assert "No space left on device" in done.stdout
    assert "earlier checkpoints are untouched" in done.stdout


def test_an_output_folder_that_cannot_be_written(tiny_recipe, tmp_path):
    # Permissions don't hold root back; a file in the place of a folder does.
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out .*file/run: can't be written \(.*Not a directory"):
        train(replace(tiny_recipe, out=tmp_path / "file/run"))


def test_what_was_passed_over_does_not_displace_what_is_saved(tmp_path, tiny_recipe, capsys):
    recipe = replace(tiny_recipe, max_steps=4, save_steps=2, keep_last=2)
    train(recipe)
    folder = recipe.folder / "checkpoints"
    newest = folder / "step-00000004"
    (newest / "weights.safetensors").unlink()
    train(replace(recipe, save_steps=1, keep_last=1, max_steps=3))
    assert "weights.safetensors: No such file" in capsys.readouterr().out
    assert (folder / "step-00000003/checkpoint.json").exists()
    assert train(replace(recipe, keep_last=1)).state.step == 4
    assert [path.name for path in checkpoint.list_checkpoints(folder)] == ["step-00000004"]


def damages():
    def truncate(path):
        file = path / "weights.safetensors"
        file.write_bytes(file.read_bytes()[:-7])

    def flip(path):
        file = path / "state.safetensors"
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 16
        file.write_bytes(data)

    def lose(path):
        (path / "state.safetensors").unlink()

    def empty(path):
        shutil.rmtree(path)
        path.mkdir()

    def torn_manifest(path):
        (path / "checkpoint.json").write_text('{"format": "casc-che')

    def half_written(path):
        path.rename(path.with_name(f".{path.name}.12345"))
        (path.with_name(f".{path.name}.12345") / "checkpoint.json").unlink()

    return [truncate, flip, lose, empty, torn_manifest, half_written]


@pytest.mark.parametrize("damage", damages(), ids=lambda function: function.__name__)
def test_a_run_goes_on_before_a_damaged_checkpoint(tiny_recipe, tmp_path, damage, capsys):
    recipe = replace(tiny_recipe, max_steps=3, save_steps=1, keep_last=0)
    straight = train(recipe).state
    newest = recipe.folder / "checkpoints/step-00000003"
    damage(newest)
    capsys.readouterr()
    again = train(recipe).state
    output = capsys.readouterr().out
    assert "continuing from" in output
    assert "step-00000002 at step 2" in output
    named = f"warning: {newest}" in output and "using the checkpoint before it" in output
    assert named == (damage.__name__ != "half_written")
    for a, b in zip(straight[1:], again[1:], strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    checkpoint.verify(newest)
    assert not list(newest.parent.glob(".*"))


def test_steps_alone_decide_when_there_is_nothing_to_save_by_epoch(tiny_recipe):
    train(replace(tiny_recipe, max_steps=5, save_every=0, save_steps=2, keep_last=0))
    saved = checkpoint.list_checkpoints(tiny_recipe.folder / "checkpoints")
    assert [path.name[-1] for path in saved] == ["5", "4", "2"]


@pytest.mark.parametrize("name", ["checkpoints", "evaluations", "logs"])
def test_a_folder_that_cant_be_written_is_told_before_the_first_step(
    tiny_recipe, name, monkeypatch
):
    tiny_recipe.folder.mkdir()
    (tiny_recipe.folder / name).symlink_to("/proc")  # which not even root can write
    monkeypatch.setattr("casc.train.step.TrainStep.__call__", lambda *_: pytest.fail("a step"))
    with pytest.raises(UserError, match=r"--out .*can't be written"):
        train(replace(tiny_recipe, max_steps=1))
