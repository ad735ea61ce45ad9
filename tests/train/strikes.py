"""A chaos program: runs are struck, resumed to their end, and must end in the undisturbed bytes.

    just chaos --minutes 60

A series is one run: some starts that are struck, each otherwise, and one that is left alone. The
first strike of each series is at the next of all file operations that there are, so that in time
each is struck; the others are drawn.
"""

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import chaos
from chaos import Aim

from casc.checkpoints.format import MANIFEST, list_checkpoints, verify
from casc.train.recipe import Recipe
from data_tools.plan import Settings

KILL, TERM, STOP = int(signal.SIGKILL), int(signal.SIGTERM), int(signal.SIGSTOP)
FOR_GOOD = 10**9
GRACE, LIMIT = 30.0, 1200.0
"""Seconds that a rank may take to miss another, and any start to its end."""

# What a start may end with, by what happened to it. A signal finds Python's own handlers, or
# none, before the run and after it; 1 is one line.
ENDS = {
    "kill": {-KILL, 1}, "torn": {-KILL, 1}, "kill one": {-KILL, 1}, "moment": {-KILL, 1},
    "worker": {1}, "full disk": {1}, "terminate": {128 + TERM, -TERM, 1},
    "storm": {128 + TERM, -TERM, 1}, "stop": set(), "clock": set(), "none": set(),
}  # fmt: skip


@dataclass(frozen=True)
class Strike:
    """What happens to one start."""

    kind: str
    aim: Aim
    after: float = 0.0
    """Seconds, where it isn't at a file operation."""


@dataclass
class Account:
    """What a campaign came to."""

    struck: Counter[str] = field(default_factory=Counter)
    """Starts that were struck, by kind."""
    kills: int = 0
    """Starts in which a process was ended by SIGKILL."""
    series: Counter[str] = field(default_factory=Counter)
    """Finished ones, by what was run."""
    failures: list[str] = field(default_factory=list)

    def note(self, strike: Strike, codes: list[int | None], output: Path) -> None:
        """Count a start, if it was struck before it had come to its end."""
        # An attempt under torchrun is killed and started again; the last one isn't.
        again = max(len(list(output.parent.glob(f"{output.stem}.attempt-*"))) - 1, 0)
        count = output.with_suffix(".count")
        done = int(count.read_text()) if count.exists() else 0
        if any(codes) or again or done >= strike.aim.first > 0:
            self.struck[strike.kind] += 1
        self.kills += again or -KILL in codes

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(self.struck.items()))
        series = ", ".join(f"{name} {count}" for name, count in sorted(self.series.items()))
        return (
            f"{self.kills} kills; {sum(self.struck.values())} starts struck ({kinds});"
            f" {sum(self.series.values())} series ended in the undisturbed bytes ({series});"
            f" {len(self.failures)} failures"
        )


OF_RANKS = (
    "kill", "kill", "torn", "full disk", "terminate", "stop", "clock", "moment", "moment", "worker",
    "storm",
)  # fmt: skip
OF_TWO = (*OF_RANKS, "kill one", "kill one")
OF_AGENTS = ("kill", "torn", "moment", "worker", "clock")
OF_SHARDING = ("kill", "torn", "full disk", "clock")


def draw(rng: random.Random, case: "Case") -> Strike:
    """A strike within so many operations, or seconds, as the undisturbed run has."""
    kind, at = rng.choice(case.kinds), rng.randint(1, case.operations)
    return Strike(
        kind, aims(rng, case, at).get(kind, Aim(case.folder)), rng.uniform(0, case.seconds)
    )


def aims(rng: random.Random, case: "Case", at: int) -> dict[str, Aim]:
    """Strikes at an operation, by kind."""
    folder, world = case.folder, case.world
    one = rng.choice([None, *range(world)])
    return {
        "kill": Aim(folder, at, signal=KILL),
        "torn": Aim(folder, at, signal=KILL, torn=True),
        "kill one": Aim(folder, at, signal=KILL, rank=rng.randrange(world)),
        "full disk": Aim(
            folder, at, rng.choice([at, at + 1, at + 9, FOR_GOOD]), error=errno.ENOSPC
        ),
        "terminate": Aim(folder, at, signal=TERM, rank=one),
        "stop": Aim(folder, at, signal=STOP, rank=one),
        "clock": Aim(folder, at, jump=rng.choice([-(10**8), -3600, 60, 3600, 10**8])),
    }


def watch(ranks: list, strike: Strike, rng: random.Random, output: Path) -> list[int | None]:
    """Do to the ranks what isn't done at a file operation, and wait for their end."""
    began, ended, next_storm, struck = time.monotonic(), 0.0, strike.after, False
    while any(rank.is_alive() for rank in ranks):
        now = time.monotonic() - began
        codes = [rank.exitcode for rank in ranks]
        if strike.kind == "moment" and now >= strike.after and not struck:
            chaos.kill(ranks)
            struck = True
        elif strike.kind == "worker" and now >= strike.after and not struck:
            for pid in rng.sample(workers := children(ranks), min(len(workers), 1)):
                with suppress(ProcessLookupError):
                    os.kill(pid, KILL)
                struck = True
        elif strike.kind == "storm" and now >= next_storm:
            chaos.kill(ranks, TERM)
            next_storm = now + rng.choice([0.0, 0.001, 0.05, 0.3, 2.5])
        elif strike.kind == "stop":
            for rank in ranks:
                if state_of(rank.pid) == "T":
                    time.sleep(rng.choice([0.0, 0.2, 1.0]))
                    os.kill(rank.pid, signal.SIGCONT)
        if any(code is not None for code in codes):
            ended = ended or now
            all_of_them = strike.kind in ("kill", "torn", "moment")
            if (-KILL in codes and all_of_them) or (now - ended > GRACE and not joined(output)):
                chaos.kill(ranks)
        if now > LIMIT:
            chaos.kill(ranks, signal.SIGUSR2)  # their stacks
            time.sleep(1)
            chaos.kill(ranks)
            break
        time.sleep(0.004)
    chaos.kill(ranks)  # workers whose rank was killed
    for rank in ranks:
        rank.join()
    return [rank.exitcode for rank in ranks]


def joined(output: Path) -> bool:
    """Whether the ranks of this start have found each other."""
    return "output in" in output.read_text(errors="replace")


def children(ranks: list) -> list[int]:
    """The loading workers."""
    found = []
    for rank in ranks:
        with suppress(OSError):
            for task in Path(f"/proc/{rank.pid}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
    return [pid for pid in found if "tracker" not in command_of(pid)]


def command_of(pid: int) -> str:
    """What a process was started as."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def state_of(pid: int) -> str:
    """The letter that the system has for what a process is at."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def faults(strike: Strike, codes: list[int | None], output: Path) -> Iterator[str]:
    """What isn't as it has to be of how a start ended."""
    text = output.read_text(errors="replace")
    said = [line for line in text.splitlines() if line.startswith("error: ")]
    allowed = ENDS[strike.kind] | {0}
    if not set(codes) <= allowed:
        yield f"ended with {codes}"
    # torchrun's own come with its time in front.
    if any(line.startswith(("Traceback", "Fatal Python error")) for line in text.splitlines()):
        yield "a traceback"
    # One that was signalled to end takes all with it, alike, once there is something to save.
    if 128 + TERM in codes and set(codes) != {128 + TERM} and strike.kind == "terminate":
        yield f"not all saved and left alike: {codes}"
    if 1 in codes and not said:
        yield "status 1 without a line"


def end_of(folder: Path) -> dict[str, str]:
    """What is left of a run: its last checkpoint by content, and all names of checkpoints."""
    checkpoints = folder / "checkpoints"
    (last, *_) = list_checkpoints(checkpoints)
    verify(last)
    found = {p.name: content(p) for p in last.iterdir() if p.name != MANIFEST}
    left = [p.name for p in [*folder.iterdir(), *checkpoints.iterdir()] if p.name.startswith(".")]
    return {**found, "checkpoint": last.name, "left over": " ".join(left)}


def content(file: Path) -> str:
    """A hash of a file; of safetensors', whose metadata has no order, of its header's values."""
    data = file.read_bytes()
    if file.suffix == ".safetensors":
        at = 8 + int.from_bytes(data[:8], "little")
        data = json.dumps(json.loads(data[8:at]), sort_keys=True).encode() + data[at:]
    return hashlib.sha256(data).hexdigest()


def tree_of(folder: Path) -> dict[str, str]:
    """All files below a folder by content."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@dataclass
class Case:
    """Something that is run until it ends, whatever happens to it meanwhile."""

    name: str
    world: int
    folder: Path
    """What it writes, below which operations are counted."""
    start: Callable[[Path, Aim], list]
    """Starts it; what it prints goes to the file."""
    end: Callable[[Path], dict[str, str]]
    kinds: tuple[str, ...]
    """Of strikes."""
    strikes: int
    """At most so many starts are struck in a series."""
    weight: int
    """Of so many series in a round."""
    restarts: int = 0
    """How often it starts itself again when it is killed."""
    expected: dict[str, str] = field(default_factory=dict)
    operations: int = 0
    seconds: float = 0.0
    next: int = 1
    """The operation to begin the next series with."""

    def undisturbed(self) -> None:
        """Run it alone, to know its end, its operations and its seconds."""
        output = self.folder.parent / f"{self.name}.txt"
        began = time.monotonic()
        codes = watch(self.start(output, Aim(self.folder)), NOTHING, random.Random(0), output)
        assert codes == [0] * self.world, output.read_text()[-3000:]
        self.seconds = time.monotonic() - began
        self.operations = int(output.with_suffix(".count").read_text())
        self.expected = self.end(self.folder)
        shutil.rmtree(self.folder)


NOTHING = Strike("none", Aim(Path("/nowhere")))


def series(case: Case, number: int, rng: random.Random, account: Account) -> bool:
    """One series; whether it has ended as it should."""
    place = case.folder.parent / f"{case.name}-{number}"
    first = case.next
    case.next = case.next % case.operations + 1
    history: list[str] = []
    for start in range(case.strikes + 1):
        strike = draw(rng, case)
        if start == case.strikes:
            strike = NOTHING
        elif start == 0:
            kind = rng.choice(["kill", "torn", "full disk"] if case.restarts == 0 else ["kill"])
            strike = Strike(kind, replace(aims(rng, case, first)[kind], last=FOR_GOOD))
        output = place.with_suffix(f".{start}.txt")
        output.touch()
        codes = watch(case.start(output, strike.aim), strike, rng, output)
        account.note(strike, codes, output)
        history.append(f"{strike.kind} at {strike.aim.first or f'{strike.after:.2f} s'}: {codes}")
        wrong = list(faults(strike, codes, output))
        if strike is NOTHING and any(codes):
            wrong.append("did not go on to its end")
        if not any(codes) and not wrong:
            wrong = differing(case)
            if not wrong:
                account.series[case.name] += 1
                shutil.rmtree(case.folder, ignore_errors=True)
                for path in case.folder.parent.glob(f"{place.name}.*"):
                    path.unlink()
                return True
        if wrong:
            kept = place.with_suffix(".kept")
            if case.folder.exists():
                case.folder.rename(kept)
            account.failures.append(
                f"{place.name}: {'; '.join(wrong)}; {' | '.join(history)}; see {output}"
            )
            return False
    raise AssertionError("the last start is left alone, and so is right or wrong")


def differing(case: Case) -> list[str]:
    """What differs from the undisturbed end."""
    found = case.end(case.folder)
    return [
        f"{name} differs" for name in {**found, **case.expected}
        if found.get(name) != case.expected.get(name)
    ]  # fmt: skip


def campaign(
    cases: list[Case], minutes: float | None, seed: int, say: Callable[[str], Any], few: int = 8
) -> Account:
    """Series after series until the time is over; without a time, so few."""
    account, rng = Account(), random.Random(seed)
    until = time.monotonic() + 60 * (minutes or 0)
    for case in cases:
        case.undisturbed()
        say(f"{case.name}: {case.operations} file operations in {case.seconds:.1f} s")
    number, turns = 0, [case for case in cases for _ in range(case.weight)]
    rng.shuffle(turns)
    while time.monotonic() < until if minutes else number < few:
        case = turns[number % len(turns)]
        number += 1
        if not series(case, number, rng, account):
            say(account.failures[-1])
        if number % 5 == 0:
            say(str(account))
    return account


def training(name: str, recipe: Recipe, world: int, *, strikes: int, weight: int) -> Case:
    """A run on so many ranks."""
    return Case(
        name, world, recipe.folder, lambda output, at: chaos.start(recipe, output, world, at),
        end_of, OF_TWO if world > 1 else OF_RANKS, strikes, weight,
    )  # fmt: skip


def under_torchrun(recipe: Recipe, *, weight: int) -> Case:
    """Two ranks under torchrun's agent, which starts them again."""

    def start(output: Path, at: Aim) -> list:
        agent = chaos.server().Process(target=chaos.agent, args=(recipe, output, at))
        agent.start()
        return [agent]

    return Case("torchrun", 1, recipe.folder, start, end_of, OF_AGENTS, 2, weight, restarts=3)


def sharding(coco: Path, out: Path, settings: Settings, *, weight: int) -> Case:
    """`data_tools shard`, which goes on where it was."""

    def start(output: Path, at: Aim) -> list:
        process = chaos.server().Process(target=chaos.shard, args=(coco, out, settings, output, at))
        process.start()
        return [process]

    return Case("sharding", 1, out, start, tree_of, OF_SHARDING, 12, weight)
