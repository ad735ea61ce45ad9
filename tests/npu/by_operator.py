"""Is the emulated NPU like the real torch_npu? Launches, copies and reads of a step, by operator.

    PYTHONPATH=tests/npu/emulator:. python tests/npu/by_operator.py count emulated.json
    CASC_NPU_COUNTER=libascendcl.so:libhccl.so python tests/npu/by_operator.py count real.json
    python tests/npu/by_operator.py compare emulated.json real.json

The second needs the real package, over a stand-in for CANN's runtime that counts what is asked
of it: libraries with `fake_reset()` and `fake_dump(path)`, which writes lines NAME CALLS CAPTURED
for each kernel (aclnn...) and runtime call ([memcpyAsync H2D], [syncStream], ...). Its kernels
needn't compute. Set TASK_QUEUE_ENABLE=0 for it, so that each launch falls to the operator that
makes it. Run all three again with each release of torch_npu.
"""

import ctypes
import json
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "programs"))
KINDS = ("calls", "launches", "copies", "reads")
# Of all launches of a step, how far the emulated device may be off.
TOLERANCE = 0.01


def emulated() -> Any:
    """Counts by the emulator's own recording."""
    from torch_npu.recording import recording

    @contextmanager
    def counting(row: list[int]) -> Iterator[None]:
        with recording() as found:
            yield
        numbers = sum(found.launches.values()), len(found.copies), len(found.reads)
        for kind, number in enumerate((1, *numbers)):
            row[kind] += number

    return counting


def real(libraries: str) -> Any:
    """Counts by the stand-ins for CANN's runtime, each of which has counters of its own."""
    runtimes = [ctypes.CDLL(library) for library in libraries.split(os.pathsep)]
    path = Path(tempfile.mkdtemp()) / "counts"

    @contextmanager
    def counting(row: list[int]) -> Iterator[None]:
        for runtime in runtimes:
            runtime.fake_reset()
        yield
        lines = []
        for runtime in runtimes:
            runtime.fake_dump(str(path).encode())
            lines += path.read_text().splitlines()
        found: defaultdict[str, int] = defaultdict(int)
        for line in lines:
            name, calls, _ = line.rsplit(" ", 2)
            launched = name.startswith("aclnn") or "ACLOP" in name or "D2D" in name
            for word in ("H2D", "D2H", "sync"):
                # "[memcpy H2D sync]" is a copy; "[syncStream]" is none.
                found[word] += int(calls) * (name.startswith("[" + word) or word + "]" in name
                                             or word + " sync" in name)  # fmt: skip
            found["launched"] += int(calls) * launched
        # A read is one copy, and a wait if that isn't part of it.
        numbers = found["launched"], found["H2D"], max(found["D2H"], found["sync"])
        for kind, number in enumerate((1, *numbers)):
            row[kind] += number

    return counting


def count(path: Path, *, full: bool) -> None:
    """Count one step of the loop: batch, losses, gradients, update, figures."""
    import counts as small  # type: ignore[import-not-found]  # found by the path above
    from torch.utils._python_dispatch import TorchDispatchMode

    libraries = os.environ.get("CASC_NPU_COUNTER")
    counting = real(libraries) if libraries else emulated()
    rows: defaultdict[str, list[int]] = defaultdict(lambda: [0] * len(KINDS))

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            with counting(rows[str(func)]):
                return func(*args, **(kwargs or {}))

    if full:  # the reference's number of boxes, on its canvas
        small.CANVAS = (800, 1088)
        small.IMAGE = replace(small.IMAGE, short=800, long=1088)
        rpn = replace(small.MODEL.rpn, train_pre_nms=2000, train_proposals=2000, samples=256)
        heads = replace(small.MODEL.box_head, samples=512)
        small.MODEL = replace(small.MODEL, rpn=rpn, box_head=heads)
    step = small.casc_step("full")
    for number in (0, 0):
        step(number)
    with Counting():
        step(1)
    path.write_text(json.dumps(dict(sorted(rows.items())), indent=1))
    print(path, dict(zip(KINDS, map(sum, zip(*rows.values(), strict=True)), strict=True)))


def compare(ours: Path, theirs: Path) -> bool:
    """Print where the two differ; whether launches are near enough, copies and reads the same."""
    found = [json.loads(path.read_text()) for path in (ours, theirs)]
    print(f"{'operator':<62}" + "".join(f"{kind:>16}" for kind in KINDS))
    nothing = [0] * len(KINDS)
    for name in sorted(found[0].keys() | found[1].keys()):
        emulated_row, real_row = (rows.get(name, nothing) for rows in found)
        if emulated_row[1:] != real_row[1:]:
            pairs = [f"{a} / {b}" for a, b in zip(emulated_row, real_row, strict=True)]
            print(f"{name:<62}" + "".join(f"{pair:>16}" for pair in pairs))
    totals = [[sum(row[kind] for row in rows.values()) for kind in range(4)] for rows in found]
    print(f"{'all':<62}" + "".join(f"{a:>8} / {b:>5}" for a, b in zip(*totals, strict=True)))
    (_, launches, *rest), (_, right, *right_rest) = totals
    return abs(launches - right) <= TOLERANCE * right and rest == right_rest


if __name__ == "__main__":
    what, *paths = sys.argv[1:]
    if what == "count":
        count(Path(paths[0]), full="full" in paths[1:])
    elif not compare(*map(Path, paths)):
        sys.exit("the emulated device differs")
