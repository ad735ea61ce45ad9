"""One run to a folder, whatever became of the run before."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import chaos
import pytest

from casc.checkpoints import format as checkpoint
from casc.errors import UserError
from casc.train import run_lock as module
from casc.train.loop import train
from casc.train.run_lock import NAME, run_lock

HOLD = """
import sys, time
from pathlib import Path
from casc.train.run_lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def hold(folder: Path) -> None:
    with run_lock(folder):
        assert (folder / NAME).exists()


def elsewhere(folder: Path) -> Path:
    """Makes the lock one of another machine."""
    path = folder / NAME
    held = json.loads(path.read_text())
    path.write_text(json.dumps({**held, "host": "node7", "machine": "node7 another boot"}))
    return path


def test_a_second_run_is_refused_in_one_line(tiny_recipe, other):
    recipe = replace(tiny_recipe, max_steps=1)
    with pytest.raises(UserError, match=rf"--out .*: process {other.pid} on .* trains in") as told:
        train(recipe)
    assert "\n" not in str(told.value)
    assert [path.name for path in recipe.folder.iterdir()] == [NAME]


def test_what_a_killed_run_left_is_taken_over(tiny_recipe, other, tmp_path):
    other.kill()  # not waited for: its number is still there, as that of a zombie
    assert (tmp_path / "run" / NAME).exists()
    until = time.monotonic() + 20
    while module._born(other.pid) and time.monotonic() < until:
        time.sleep(0.01)
    train(replace(tiny_recipe, max_steps=1))
    assert not (tmp_path / "run" / NAME).exists()
    assert checkpoint.list_checkpoints(tmp_path / "run/checkpoints")


def test_a_number_that_is_used_again_is_another_process(tmp_path):
    with run_lock(tmp_path):
        text = json.loads((tmp_path / NAME).read_text())
    (tmp_path / NAME).write_text(json.dumps({**text, "born": "1"}))
    hold(tmp_path)


def test_another_machine_is_known_by_its_heartbeat(other, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "STALE", 0.6)
    path = elsewhere(tmp_path / "run")
    over = threading.Event()

    def beat() -> None:
        while not over.wait(0.1):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UserError, match=rf"process {other.pid} on node7 trains in"):
            hold(tmp_path / "run")
    finally:
        over.set()
        thread.join()
    hold(tmp_path / "run")  # no heartbeat any more


def test_an_old_heartbeat_needs_no_waiting(other, tmp_path, monkeypatch):
    monkeypatch.setattr(module.time, "sleep", lambda seconds: pytest.fail("waited"))
    path = elsewhere(tmp_path / "run")
    os.utime(path, (0, 0))
    hold(tmp_path / "run")


def test_a_run_that_was_taken_over_saves_nothing(tmp_path):
    with run_lock(tmp_path) as lock:
        path = elsewhere(tmp_path)
        held = json.loads(path.read_text())
        path.write_text(json.dumps({**held, "token": "of another"}))
        with pytest.raises(UserError, match=r"process \d+ on node7 has taken this run over"):
            lock.check()
    assert path.exists(), "it is the other's"


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"pid": "x"}', "\0" * 100, "[" * 10_000])
def test_a_file_that_is_no_lock_is_named(tmp_path, text):
    (tmp_path / NAME).write_text(text)
    with pytest.raises(UserError, match=r"run\.lock: isn't what casc writes there; delete it"):
        hold(tmp_path)


def test_file_systems_without_links(tmp_path, monkeypatch):
    def no_links(*_: object) -> None:
        raise OSError("not supported")

    monkeypatch.setattr(module.os, "link", no_links)
    with run_lock(tmp_path), pytest.raises(UserError, match="trains in this folder"):
        hold(tmp_path)
    hold(tmp_path)


def test_many_take_over_one_at_a_time(other, tmp_path):
    other.kill()
    other.wait()
    folder, held, most = tmp_path / "run", [0], []
    start = threading.Barrier(8)

    def compete() -> None:
        start.wait()
        try:
            with run_lock(folder):
                held[0] += 1
                most.append(held[0])
                time.sleep(0.2)
                held[0] -= 1
        except UserError:
            pass

    threads = [threading.Thread(target=compete) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most
    assert set(most) == {1}
    assert not list(folder.glob(".run.lock*"))


def test_what_was_read_before_another_took_over_is_not_acted_on(other, tmp_path, monkeypatch):
    """A run that saw a dead one's lock, and stood still, removes none that was made since."""
    other.kill()
    other.wait()
    path, wait, really = tmp_path / "run" / NAME, module._wait_until_dead, Path.unlink
    with contextlib.ExitStack() as runs:

        def stand_still(holder, lock, draft):
            wait(holder, lock, draft)
            if holder.pid == other.pid:
                monkeypatch.setattr(module, "_wait_until_dead", wait)
                runs.enter_context(run_lock(tmp_path / "run"))
                monkeypatch.setattr(Path, "rename", lambda *_: pytest.fail("moved away"))
                monkeypatch.setattr(Path, "unlink", unlink)

        def unlink(self, missing_ok=False):
            assert self != path, "the lock of a run that is alive"
            really(self, missing_ok)

        monkeypatch.setattr(module, "_wait_until_dead", stand_still)
        with pytest.raises(UserError, match=rf"process {os.getpid()} on .* trains in"):
            hold(tmp_path / "run")
        assert path.exists()
        monkeypatch.undo()


@pytest.mark.parametrize("killed", [1, 2])
def test_who_was_killed_taking_over_holds_nobody_up(other, tmp_path, killed):
    other.kill()
    other.wait()
    folder = tmp_path / "run"
    last = module._read(folder / NAME)
    assert last is not None
    for number in range(killed):
        claim = module._claim(folder / NAME, last)
        last = last._replace(token=f"killed {number}")
        claim.write_text(json.dumps(last._asdict()))
    hold(folder)
    assert not list(folder.glob(".run.lock*"))


def test_one_that_takes_over_is_left_alone(other, tmp_path):
    with run_lock(tmp_path / "another") as lock:
        alive = lock.holder
    other.kill()
    other.wait()
    folder = tmp_path / "run"
    dead = module._read(folder / NAME)
    assert dead is not None
    claim = module._claim(folder / NAME, dead)
    claim.write_text(json.dumps(alive._asdict()))
    with pytest.raises(UserError, match=rf"process {os.getpid()} on .* trains in"):
        hold(folder)
    assert (folder / NAME).exists()
    assert claim.exists()


def test_ranks_are_one_run(tiny_recipe, tmp_path):
    """Two ranks share the lock; a second pair is refused, each rank in one line."""
    recipe = replace(chaos.hurried(tiny_recipe, steps=400), save_steps=None)
    ranks = chaos.start(recipe, tmp_path / "first.txt")
    until = time.monotonic() + 60
    while chaos.last_step(recipe) < 1 and time.monotonic() < until:
        time.sleep(0.01)
    statuses = chaos.finish(chaos.start(recipe, tmp_path / "second.txt"), 60)
    chaos.kill(ranks, signal.SIGKILL)
    chaos.finish(ranks, 300)
    output = (tmp_path / "second.txt").read_text()
    assert statuses == [1, 1], output
    assert f"process {ranks[0].pid} on " in output
    assert "Traceback" not in output
    # What two killed ranks left holds nobody up.
    few = replace(recipe, max_steps=chaos.last_step(recipe) + 1)
    third = chaos.start(few, tmp_path / "third.txt")
    assert chaos.finish(third, 60) == [0, 0], (tmp_path / "third.txt").read_text()


def test_what_a_kill_left_beside_the_lock_is_swept(tmp_path):
    """A draft of this machine's dead process goes at once, one of another machine by its age."""
    with run_lock(tmp_path) as lock:
        mine = module._aside(lock.path, lock.holder)
        dead = module._aside(lock.path, lock.holder._replace(born="1"))
        far = module._aside(lock.path, lock.holder._replace(machine="another"))
        old = module._aside(lock.path, lock.holder._replace(machine="another"))
        for path in (mine, dead, far, old):
            path.write_text("")
        os.utime(old, (0, 0))
    hold(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([mine, far])


def test_a_claim_whose_lock_is_gone_is_swept(tmp_path):
    """Who was killed between removing a dead run's lock and its own claim."""
    with run_lock(tmp_path) as lock:
        claims = {}
        for name, change in {"alive": {}, "dead": {"born": "1"}, "far": {"machine": "b"}}.items():
            claims[name] = module._claim(lock.path, lock.holder._replace(token=name))
            claims[name].write_text(json.dumps(lock.holder._replace(**change)._asdict()))
    hold(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([claims["alive"], claims["far"]])


def test_a_full_disk_leaves_no_draft(tmp_path, monkeypatch):
    def full(path: Path, *_: object, **__: object) -> int:
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match="can't be written"):
        hold(tmp_path)
    assert not list(tmp_path.iterdir())
