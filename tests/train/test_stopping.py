import json
import os
import signal
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import chaos
import pytest
import torch

from casc.checkpoints import format as checkpoint
from casc.distributed import ALONE, Ranks, is_lost
from casc.errors import UserError
from casc.train import stopping
from casc.train.launch import errors_in_one_line
from casc.train.loop import train
from casc.train.meter import Meter
from casc.train.stopping import SafePoints, StoppedError, Stopping

ENDS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]


@pytest.fixture
def signalled(monkeypatch):
    """Sends this process a signal in the middle of a step."""
    add = Meter.add_images

    def at(step, number):
        def watch(meter, now, *rest):
            if now == step:
                os.kill(os.getpid(), number)
            add(meter, now, *rest)

        monkeypatch.setattr(Meter, "add_images", watch)

    return at


def records(recipe, kind):
    lines = (recipe.folder / "log.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


@pytest.mark.parametrize("number", ENDS)
def test_a_signal_ends_the_run_after_its_step(tiny_recipe, signalled, number, capfd, tmp_path):
    recipe = replace(tiny_recipe, max_steps=4)
    # A shell's background jobs start with SIGINT ignored.
    before = signal.getsignal(number)
    signalled(1, number)
    with pytest.raises(SystemExit) as raised, errors_in_one_line():
        train(recipe)
    assert raised.value.code == 128 + number
    output = capfd.readouterr()
    name = signal.Signals(number).name
    assert f"{name}: leaving after the step; again to leave at once" in output.err
    assert f"{name}: saved at step 2; the same command goes on" in output.out
    assert f"(exit status {128 + number})" in output.out
    checkpoint.verify(recipe.folder / "checkpoints/step-00000002")
    assert not (recipe.folder / "logs/crash-rank-0.txt").exists()
    # What was there before listens again.
    assert signal.getsignal(number) == before
    signalled(-1, number)
    again = train(recipe).state
    straight = train(replace(recipe, out=tmp_path / "straight")).state
    for a, b in zip(again[1:], straight[1:], strict=True):
        assert all(torch.equal(a[name], b[name]) for name in b)
    assert [r["step"] for r in records(recipe, "train")] == [1, 2, 3, 4]


def test_an_evaluation_is_broken_off_and_made_up_for(tiny_recipe, monkeypatch):
    recipe = replace(tiny_recipe, max_steps=6, evaluate_every=1)
    evaluate = stopping.Stopping.between_steps

    def once(self):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self)

    monkeypatch.setattr(Stopping, "between_steps", once)
    with pytest.raises(StoppedError):
        train(recipe)
    folder = recipe.folder / "checkpoints/step-00000005"
    assert folder.is_dir()
    assert not (folder / "metrics.json").exists()
    monkeypatch.setattr(Stopping, "between_steps", evaluate)
    train(replace(recipe, keep_last=0))
    assert [record["step"] for record in records(recipe, "evaluation")] == [5, 6]
    assert (folder / "metrics.json").exists()


def test_nothing_is_saved_where_nothing_is_to_be(tiny_recipe, signalled, capsys):
    signalled(0, signal.SIGTERM)
    with pytest.raises(StoppedError):
        train(replace(tiny_recipe, save_every=0))
    assert "SIGTERM: nothing is saved (--save-every 0)" in capsys.readouterr().out


def test_again_leaves_at_once(monkeypatch):
    left = []
    monkeypatch.setattr(os, "_exit", left.append)
    with Stopping(ALONE) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        # Launchers repeat what the scheduler has sent to everyone.
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.poll_result() == signal.SIGTERM
        assert not left
        monkeypatch.setattr(stopping, "REPEAT", 0.0)
        time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        assert left == [128 + signal.SIGTERM]


def test_ranks_stop_at_the_same_step(tiny_recipe, tmp_path):
    """One rank's loader gets on at first; only one of the two ranks is signalled."""
    recipe = chaos.hurried(tiny_recipe, steps=400)
    recipe = replace(recipe, save_steps=None, save_every=1000)
    ranks = chaos.start(recipe, tmp_path / "output.txt")
    until = time.monotonic() + 60
    while chaos.last_step(recipe) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(ranks[1].pid, signal.SIGUSR1)
    statuses = chaos.finish(ranks, 300)
    output = (tmp_path / "output.txt").read_text()
    assert statuses == [128 + signal.SIGUSR1] * 2, output
    (newest,) = checkpoint.list_checkpoints(recipe.folder / "checkpoints")
    step = int(newest.name.removeprefix("step-"))
    assert f"SIGUSR1: saved at step {step};" in output
    assert chaos.last_step(recipe) == step


def test_a_rank_that_is_killed_is_missed(tiny_recipe, tmp_path):
    recipe = chaos.hurried(tiny_recipe, steps=400)
    recipe = replace(recipe, save_steps=None, save_every=1000)
    ranks = chaos.start(recipe, tmp_path / "output.txt")
    until = time.monotonic() + 60
    while chaos.last_step(recipe) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    ranks[1].kill()
    statuses = chaos.finish(ranks, 300)
    output = (tmp_path / "output.txt").read_text()
    assert statuses == [1, -signal.SIGKILL], output
    assert "rank 0: lost touch with another rank (computing, step" in output
    assert "the same command goes on from the newest checkpoint" in output
    report = (recipe.folder / "logs/crash-rank-0.txt").read_text()
    assert "images    [" in report
    assert "versions  casc " in report
    own = (recipe.folder / "logs/rank-0.jsonl").read_text()
    assert '"kind": "crash"' in own
    assert '"kind": "start"' in (recipe.folder / "logs/rank-1.jsonl").read_text()


def test_other_processes_go_on_in_the_middle_of_an_epoch(tiny_recipe, tmp_path, monkeypatch):
    """2 steps by two ranks, 1 by one rank with two workers, 2 by one that accumulates."""
    recipe = replace(tiny_recipe, max_steps=5, save_steps=1, keep_last=0)
    two = replace(recipe, batch=1, max_steps=2)
    ranks = chaos.start(two, tmp_path / "output.txt")
    assert chaos.finish(ranks, 300) == [0, 0], (tmp_path / "output.txt").read_text()
    loading = replace(recipe.loading, workers=2, window=3)
    train(replace(recipe, max_steps=3, loading=loading))
    seen = []
    add = Meter.add_images

    def watch(meter, step, image_id, *rest):
        seen.append((step, image_id.tolist()))
        add(meter, step, image_id, *rest)

    monkeypatch.setattr(Meter, "add_images", watch)
    train(replace(recipe, batch=1, accumulate=2))
    monkeypatch.undo()
    assert [step for step, _ in seen] == [3, 4]
    position = checkpoint.load(recipe.folder / "checkpoints/step-00000004").position
    assert [list(phase.values()) for phase in position["phases"]] == [
        [2, 2, 1, 1, 4],
        [3, 1, 2, 2, 3],
        [4, 1, 2, 1, 4],
    ]
    with pytest.raises(UserError, match=r"images_per_step 2, now it is 3; steps, epochs"):
        train(replace(recipe, batch=3))


def test_a_signal_inside_an_evaluation_waits_for_a_safe_point(tiny_recipe, monkeypatch):
    """Handlers only take note: what they interrupt may hold a lock, or swallow what they raise."""
    recipe = replace(tiny_recipe, max_steps=6, evaluate_every=1)
    pass_by, at = SafePoints.pass_by, []

    def swallowing(self):
        at.append(len(at))
        if len(at) == 2:  # after the first batch
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.01)
            except SystemExit:
                pytest.fail("raised where the signal came")
        pass_by(self)

    monkeypatch.setattr(SafePoints, "pass_by", swallowing)
    with pytest.raises(StoppedError) as stopped:
        train(recipe)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert len(at) == 2
    folder = recipe.folder / "checkpoints/step-00000005"
    assert folder.is_dir()
    assert not (folder / "metrics.json").exists()


class Meeting:
    """The second of two ranks by what it leaves in the store; the first one is this process."""

    def __init__(self, monkeypatch, alive, arrives, signalled=0):
        self.texts, self.looks = {}, 0
        self.alive, self.arrives = alive, arrives
        monkeypatch.setattr(stopping, "meeting_point", lambda: self)
        monkeypatch.setattr(stopping.time, "sleep", lambda _: None)
        first: Any = SimpleNamespace(group=object(), number=signalled, ranks=Ranks(2, 0))
        self.points = SafePoints(first, 1)

    def set(self, key, value):
        self.texts[key] = value

    def get(self, key):
        return self.texts[key]

    def add(self, key, amount):
        assert (key, amount) == ("casc signs of life of rank 1", 0)
        return min(self.looks, self.alive)

    def check(self, keys):
        if keys not in (["casc stop 1: rank 1 is done"], ["casc stop 1: rank 1 leaves"]):
            return all(key in self.texts for key in keys)
        self.looks += 1
        return self.looks > self.arrives


def test_a_rank_that_is_long_over_its_evaluation_is_waited_for(monkeypatch):
    pauses = int(stopping.MISSED / (stopping.LOOK / 5))
    Meeting(monkeypatch, alive=9 * pauses, arrives=9 * pauses).points.meet()
    Meeting(monkeypatch, alive=1, arrives=pauses // 2).points.meet()


def test_the_rank_that_keeps_the_store_leaves_when_the_other_knows(monkeypatch):
    meeting = Meeting(monkeypatch, alive=10**9, arrives=50, signalled=signal.SIGTERM)
    with pytest.raises(StoppedError):
        meeting.points.pass_by()
    assert meeting.looks == 51
    assert meeting.texts["casc stop 1"] == "15"


@pytest.mark.parametrize("alive", [0, 10**9])
def test_it_does_not_wait_long_for_one_that_never_reads(monkeypatch, alive):
    """One that is gone, or compiles for minutes."""
    with pytest.raises(StoppedError):
        Meeting(monkeypatch, alive, arrives=10**9, signalled=signal.SIGTERM).points.meet()


def test_a_rank_that_ends_without_a_word_is_not_waited_for_forever(monkeypatch):
    with pytest.raises(RuntimeError, match="rank 1, of which there has been no sign of life") as e:
        Meeting(monkeypatch, alive=30, arrives=10**9).points.meet()
    assert is_lost(e.value)


@pytest.mark.slow
def test_a_rank_killed_in_an_evaluation_ends_it_on_the_other(tiny_recipe, write_shards, tmp_path):
    """Without an agent that ends the rest; what is killed says nothing."""
    write_shards(tiny_recipe.data, {"train": [(0, 6, True)], "val": [(0, 600, True)]})
    recipe = replace(chaos.hurried(tiny_recipe, steps=2), evaluate_every=1, epochs=1, max_steps=2)
    ranks = chaos.start(recipe, tmp_path / "output.txt")
    in_the_evaluation(recipe)
    os.kill(ranks[1].pid, signal.SIGKILL)
    assert chaos.finish(ranks, 150) == [1, -signal.SIGKILL]
    assert "lost touch with another rank (evaluating" in (tmp_path / "output.txt").read_text()


def in_the_evaluation(recipe):
    """Wait for it."""
    log, until = recipe.folder / "log.jsonl", time.monotonic() + 60
    while time.monotonic() < until:
        if log.exists() and "evaluating on val" in log.read_text():
            break
        time.sleep(0.01)
    time.sleep(0.3)


def test_a_signal_to_one_rank_ends_an_evaluation_on_all(tiny_recipe, write_shards, tmp_path):
    write_shards(tiny_recipe.data, {"train": [(0, 6, True)], "val": [(0, 600, True)]})
    recipe = replace(chaos.hurried(tiny_recipe, steps=2), evaluate_every=1, epochs=1, max_steps=2)
    ranks = chaos.start(recipe, tmp_path / "output.txt")
    in_the_evaluation(recipe)
    os.kill(ranks[1].pid, signal.SIGTERM)
    statuses = chaos.finish(ranks, 300)
    output = (tmp_path / "output.txt").read_text()
    assert statuses == [128 + signal.SIGTERM] * 2, output
    assert "SIGTERM: saved at step 2" in output
    assert not list((recipe.folder / "evaluations").iterdir())


def test_a_rank_that_dies_before_the_first_step_is_missed_in_one_line(tiny_recipe, tmp_path):
    recipe = chaos.hurried(tiny_recipe, steps=2)
    chaos.server()
    if not chaos.LIBRARY.exists():
        pytest.skip("needs a C compiler")
    # As the main rank opens its log, having joined the other.
    at = chaos.Aim(recipe.folder / "logs", 1, signal=signal.SIGKILL, rank=1)
    ranks = chaos.start(recipe, tmp_path / "output.txt", at=at)
    statuses = chaos.finish(ranks, 300)
    output = (tmp_path / "output.txt").read_text()
    assert statuses == [1, -signal.SIGKILL], output
    assert output.count("error: rank 0") == 1, output
    assert "lost touch with another rank" in output
    assert "Traceback" not in output
