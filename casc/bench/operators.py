"""`casc bench operators`: each operator beside the straightforward way of doing it."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from casc.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from casc.bench.operator_cases import Case


class Times(NamedTuple):
    """Milliseconds over the repetitions."""

    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""


class Row(NamedTuple):
    """One operator's forward or backward pass; None where there is no such way to run it."""

    name: str
    part: Literal["forward", "backward"]
    compiled: Times | None
    eager: Times
    usual: Times
    difference: float
    """Between ours, compiled as well as eager, and the usual results (or gradients)."""
    tolerance: float
    compile_s: float | None
    """The first compiled run, from whatever caches there are; both passes together."""

    @property
    def equal(self) -> bool:
        """Whether the difference is in tolerance (a NaN is not)."""
        return self.difference <= self.tolerance

    @property
    def speedup(self) -> float:
        """How many times faster than the usual way, as the product runs it."""
        return self.usual.median / (self.compiled or self.eager).median


@dataclass(frozen=True)
class OperatorsCommand:
    """Time each operator against the straightforward way, and compare their results.

    Sizes are those of a training step at 800x1088 with two images; inputs are made up.
    All ways of a row run in turn, so that a busy machine slows them alike. Exits with 1 if
    a difference exceeds its tolerance.
    """

    only: tuple[str, ...] = ()
    """Names of the operators to run; all if none is given."""
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    """Of features and mask head; boxes and targets are float32 always."""
    repeat: int = 9
    """Timed runs of each way, after one that is not."""
    compile: bool = True
    """Time the compiled operators too; --no-compile leaves them out."""
    json: bool = False
    """Print one JSON object."""
    device: str = "auto"
    """auto: the accelerator if there is one, else the CPU. Or cpu, cuda, npu, ..."""

    def run(self) -> int:
        """Measure; 1 if a result is out of tolerance."""
        import sys

        import torch

        from casc.bench.operator_cases import cases
        from casc.bench.operator_inputs import Sizes
        from casc.device.devices import choose_device, choose_dtype

        if self.repeat < 1:
            raise UserError("--repeat must be at least 1")
        device = choose_device(self.device)
        dtype = choose_dtype(self.dtype, device)
        known = cases(Sizes(), dtype, device)
        for name in self.only:
            if name not in known:
                raise UserError(f"--only {name}: expected some of {', '.join(known)}")
        rows: list[Row] = []
        for name in self.only or known:
            print(f"{name} ...", file=sys.stderr, flush=True)
            # Compiled code of one case shouldn't count against the limits of the next.
            torch.compiler.reset()
            made = known[name]()
            rows += measure(name, made, self.repeat, device, compile=self.compile)
        setting = {
            "device": str(device),
            "threads": torch.get_num_threads(),
            "dtype": str(dtype).removeprefix("torch."),
            "repeat": self.repeat,
        }
        if self.json:
            print(json.dumps(setting | {"operators": [_as_dict(row) for row in rows]}))
        else:
            print("  ".join(f"{k} {v}" for k, v in setting.items()))
            print(format_table(rows))
        return 0 if all(row.equal for row in rows) else 1


def measure(
    name: str, case: "Case", repeat: int, device: "torch.device", *, compile: bool
) -> list[Row]:
    """Run all ways of an operator in turn, and compare their results and gradients.

    Args:
        name: for the rows.
        case: the operator.
        repeat: timed runs of each way.
        device: where it runs.
        compile: whether to run the compiled way too.

    Returns:
        A row for the forward pass and, where there are leaves, one for the backward.
    """
    import torch

    ways = {"eager": case.ours, "usual": case.usual}
    if compile and case.compiles:
        ways["compiled"] = torch.compile(case.ours, fullgraph=True, dynamic=False)
    first = {way: _run(run, case.leaves, device) for way, run in ways.items()}
    timed: dict[str, list[_Run]] = {way: [] for way in ways}
    for _ in range(repeat):
        for way, run in ways.items():
            # Kept results would make each run allocate anew: only the times stay.
            timed[way].append(_run(run, case.leaves, device)._replace(result=None, gradients=()))
    ours = [way for way in ways if way != "usual"]
    compile_s = None
    if "compiled" in ways:
        compile_s = first["compiled"].forward + first["compiled"].backward

    def row(
        part: Literal["forward", "backward"], seconds: Callable[["_Run"], float], difference: float
    ) -> Row:
        times = {way: _times([1e3 * seconds(r) for r in runs]) for way, runs in timed.items()}
        return Row(
            name,
            part,
            times.get("compiled"),
            times["eager"],
            times["usual"],
            difference,
            case.tolerance,
            compile_s,
        )

    expected = first["usual"]
    results = _worst([case.difference(first[w].result, expected.result) for w in ours])
    rows = [row("forward", lambda r: r.forward, results)]
    if case.leaves:
        gradients = [case.difference(first[w].gradients, expected.gradients) for w in ours]
        rows.append(row("backward", lambda r: r.backward, _worst(gradients)))
    return rows


def format_table(rows: Sequence[Row]) -> str:
    """A line per operator and pass: medians in ms with their quartiles."""
    head = ("operator", "pass", "compiled ms", "eager ms", "usual ms", "speed-up", "difference")
    lines: list[tuple[str, ...]] = [head]
    for row in rows:
        verdict = "<=" if row.equal else "EXCEEDS"
        lines.append(
            (
                row.name,
                row.part,
                _show(row.compiled),
                _show(row.eager),
                _show(row.usual),
                f"{row.speedup:.1f}",
                f"{row.difference:.2g} {verdict} {row.tolerance:.2g}",
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


class _Run(NamedTuple):
    forward: float
    """Seconds."""
    backward: float
    result: Any
    gradients: "tuple[Tensor, ...]"


def _run(run: Callable[[], Any], leaves: "tuple[Tensor, ...]", device: "torch.device") -> _Run:
    import time

    import torch

    from casc.device.devices import synchronize

    synchronize(device)
    start = time.perf_counter()
    with torch.set_grad_enabled(bool(leaves)):
        result = run()
    synchronize(device)
    middle = time.perf_counter()
    if not leaves:
        return _Run(middle - start, 0.0, result, ())
    # Any gradient will do that isn't the same everywhere: the result's own values.
    upstream = result.detach().clone()
    synchronize(device)
    begin = time.perf_counter()
    gradients = torch.autograd.grad(result, leaves, upstream)
    synchronize(device)
    return _Run(middle - start, time.perf_counter() - begin, result.detach(), gradients)


def _times(milliseconds: list[float]) -> Times:
    import numpy as np

    low, median, high = np.quantile(milliseconds, [0.25, 0.5, 0.75])
    return Times(float(median), float(low), float(high))


def _worst(differences: list[float]) -> float:
    """The largest, or NaN if there is one."""
    return next((d for d in differences if d != d), max(differences))


def _show(times: Times | None) -> str:
    if times is None:
        return "-"
    return f"{times.median:.3g} ({times.low:.3g}-{times.high:.3g})"


def _as_dict(row: Row) -> dict[str, Any]:
    result = row._asdict()
    for way in ("compiled", "eager", "usual"):
        times = result.pop(way)
        result[f"{way}_ms"] = times and times._asdict()
    return result | {"equal": row.equal, "speedup": row.speedup}
