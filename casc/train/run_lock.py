"""One run to a folder: a lock file that names its holder.

It is a file that is made in one step, not a lock of the system's, as those don't hold on every
network file system. What a killed run leaves is known by its process, on the same machine, and
elsewhere by a heartbeat that has stopped: the file's time, which is set anew all the while.
"""

import contextlib
import hashlib
import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from casc.errors import UserError
from casc.json_files import read_json

NAME = "run.lock"
BEAT = 10.0
"""Seconds between heartbeats."""
STALE = 90.0
"""Seconds without one after which a run on another machine is taken to have been killed."""


class Holder(NamedTuple):
    """The process that holds a lock."""

    host: str
    machine: str
    """Differs between machines, between boots, and where process numbers mean others."""
    pid: int
    born: str
    """When the process began, as the system counts: numbers are used again."""
    token: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class RunLock:
    """A lock that is held."""

    def __init__(self, path: Path, holder: Holder) -> None:
        self.path, self.holder = path, holder

    def check(self) -> None:
        """See that no other run has taken the folder over, as it may while this one stood still.

        Raises:
            UserError: one has.
        """
        now = _read(self.path)
        if now is not None and now.token != self.holder.token:
            raise UserError(
                f"{self.path}: {now} has taken this run over while it stood still; this one ends"
                " without saving"
            )


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[RunLock]:
    """Hold a run's folder, which is made if need be.

    Raises:
        UserError: another run holds it, or it can't be written.
    """
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _acquire(folder / NAME)
    except OSError as error:
        raise UserError(f"--out {folder}: can't be written ({error})") from None
    over = threading.Event()
    thread = threading.Thread(target=_beat, args=(lock, over), name="run lock", daemon=True)
    thread.start()
    try:
        yield lock
    finally:
        over.set()
        thread.join()
        with contextlib.suppress(OSError, UserError):
            lock.check()
            lock.path.unlink(missing_ok=True)
            if made:
                folder.rmdir()  # where the run came to nothing


def check_free(folder: Path) -> None:
    """See that no run holds a folder, without taking or changing anything.

    Of another machine's run the clocks have to agree within a minute or so.

    Raises:
        UserError: one holds it.
    """
    path = folder / NAME
    holder = _read(path)
    if holder is None:
        return
    if holder.machine == _machine():
        alive = _born(holder.pid) == holder.born
    else:
        alive = path.exists() and time.time() - path.stat().st_mtime < STALE
    if alive:
        raise UserError(_taken(path, holder))


def _acquire(path: Path) -> RunLock:
    mine = Holder(platform.node(), _machine(), os.getpid(), _born(os.getpid()), uuid.uuid4().hex)
    draft = _aside(path, mine)
    try:
        draft.write_text(json.dumps(mine._asdict()) + "\n", encoding="utf-8")
        unread = 0
        while not _make(draft, path):
            found = _read(path)
            if found is not None:
                _wait_until_dead(found, path, draft)
            if found is None or not _remove(path, found, draft):
                # Its run has just ended, another has just taken over, or this is no lock.
                unread += 1
                if unread > 20:
                    raise UserError(f"{path}: isn't what casc writes there; delete it by hand")
                time.sleep(0.02)
        _sweep(path, draft, mine)
    finally:
        draft.unlink(missing_ok=True)
    return RunLock(path, mine)


def _make(draft: Path, path: Path) -> bool:
    """Give the draft the lock's name, unless there is one; False if so."""
    try:
        os.link(draft, path)
    except FileExistsError:
        return False
    except OSError:  # file systems without links
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(draft.read_text(encoding="utf-8"))
        except FileExistsError:
            return False
    return True


def _wait_until_dead(holder: Holder, path: Path, draft: Path) -> None:
    """Return once the holder is known to be dead.

    Raises:
        UserError: it is alive.
    """
    if holder.machine == _machine():
        if _born(holder.pid) == holder.born:
            raise UserError(_taken(path, holder))
        return
    draft.touch()
    try:
        first = path.stat().st_mtime_ns
        # Both times are the file server's, so clocks of machines needn't agree.
        age = (draft.stat().st_mtime_ns - first) / 1e9
        until = time.monotonic() + STALE - min(max(age, 0), STALE)
        while time.monotonic() < until:
            time.sleep(min(BEAT / 10, STALE / 10))
            with path.open("rb") as file:  # opening is what makes NFS ask its server
                if os.fstat(file.fileno()).st_mtime_ns != first:
                    raise UserError(_taken(path, holder))
    except FileNotFoundError:
        return


def _taken(path: Path, holder: Holder) -> str:
    return (
        f"--out {path.parent}: {holder} trains in this folder; wait for its end or end it, or"
        f" choose another --out (if that process is long gone, delete {path})"
    )


def _aside(path: Path, mine: Holder) -> Path:
    """A name beside the lock that is this process's alone, and tells whose it was."""
    machine = hashlib.sha256(mine.machine.encode()).hexdigest()[:8]
    return path.with_name(f".{path.name}.{machine}.{mine.pid}.{mine.born}.{uuid.uuid4().hex}")


def _sweep(path: Path, draft: Path, mine: Holder) -> None:
    """Delete what processes left that were killed while they took the lock: drafts and claims."""
    machine = draft.name.split(".")[3]
    for left in path.parent.glob(f".{path.name}.*"):
        parts = left.name.split(".")
        claimant = _read(left) if parts[3] == "over" else None
        with contextlib.suppress(OSError):
            if claimant is not None and claimant.machine == mine.machine:
                dead = _born(claimant.pid) != claimant.born
            elif len(parts) == 7 and parts[3] == machine and parts[4].isdecimal():
                dead = _born(int(parts[4])) != parts[5]
            else:  # of another machine
                dead = draft.stat().st_mtime - left.stat().st_mtime > STALE
            if dead:
                left.unlink()


def _remove(path: Path, dead: Holder, draft: Path) -> bool:
    """Remove a dead holder's lock, and not the one that another process may have made since.

    Who makes the claim file of a lock first may remove it, and nobody else: so while a lock is
    there it is the same one. Who claims and is killed has left a claim that the next one claims.

    Returns:
        Whether it is gone. If not, a claim couldn't be read, or all has changed meanwhile.

    Raises:
        UserError: another process is taking over.
    """
    claims = [_claim(path, dead)]
    while not _make(draft, claims[-1]):
        other = _read(claims[-1])
        if other is None:
            return False
        _wait_until_dead(other, claims[-1], draft)
        claims.append(_claim(path, other))
    try:
        # What was read before the claim may be old: a lock that is gone never comes back.
        now = _read(path)
        mine = now is not None and now.token == dead.token
        if mine:
            path.unlink()
        return mine
    finally:
        for claim in claims:
            claim.unlink(missing_ok=True)


def _claim(path: Path, holder: Holder) -> Path:
    return path.with_name(f".{path.name}.over.{holder.token}")


def _beat(lock: RunLock, over: threading.Event) -> None:
    while not over.wait(BEAT):
        # A server that is away for a while comes back, or saving fails and says so.
        with contextlib.suppress(OSError, UserError):
            lock.check()
            os.utime(lock.path)


def _read(path: Path) -> Holder | None:
    """Who holds a lock; None where there is none, or it isn't one."""
    try:
        found: dict[str, Any] = read_json(path, most_bytes=2**16)
        holder = Holder(**found)
    except (UserError, TypeError):
        return None
    kinds = [int if name == "pid" else str for name in Holder._fields]
    return holder if [type(value) for value in holder] == kinds else None


def _machine() -> str:
    """This machine since it was started, and within it the container."""
    parts = [platform.node()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)


def _born(pid: int) -> str:
    """When a process of this machine began; "" when there is none, or it has ended."""
    if Path("/proc/self/stat").exists():
        try:
            about = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            return ""
        return "" if about[0] in "ZX" else about[19]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "alive"
