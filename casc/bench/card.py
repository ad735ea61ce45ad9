"""`casc bench card`: all that there is to know of a card, as one JSON file and one page.

Each part is a process of its own, so that one that dies, hangs or finds no memory costs the
others nothing; after each, the file is written anew with what is known by then.
"""

import gzip
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from casc.bench.against import spread
from casc.bench.batch import Job, Load
from casc.bench.worker import Worker
from casc.device.replay import replay_missing
from casc.draw.html import document, escape, table
from casc.errors import UserError
from casc.train.profile import STEPS

TRACE = "trace.json.gz"
_MOST_KERNELS = 40
_VERIFIED = {True: "passed", False: "did NOT pass", None: "was not run"}


@dataclass(frozen=True)
class CardPlan:
    """What is run, the most telling first: what the time doesn't suffice for is left out."""

    out: Path
    goldens: Path | None
    """None where there are none."""
    device: str
    dtype: str
    compile: bool
    canvases: Sequence[tuple[int, int]]
    batches: Sequence[int]
    """Of the training step."""
    inference_batches: Sequence[int]
    steps: int
    seconds: float
    """For everything together."""


def measure_card(plan: CardPlan, say: Callable[[str], object]) -> dict[str, Any]:
    """Run all parts, and write `card.json`, `card.html` and a trace as they become known.

    Returns:
        The report; what failed is in it, as a line each.
    """
    began = time.monotonic()
    report: dict[str, Any] = {
        "device": plan.device, "dtype": plan.dtype, "compiled": plan.compile,
        "doctor": None, "verify": None, "steps": [], "kernels": [], "not_run": [],
    }  # fmt: skip

    def left() -> float:
        return plan.seconds - (time.monotonic() - began)

    report["doctor"] = _doctor(left())
    _write(plan, report)
    say("verify")
    # On a slow machine this alone could take all the time.
    report["verify"] = _verify(plan, left() / 2)
    _write(plan, report)
    for job in jobs(plan):
        name = job_name(job)
        if left() <= 0:
            report["not_run"].append(f"{name}: the time was over")
            continue
        say(name)
        # A replayed graph hides its kernels' names from some profilers.
        wanted = job.replay is False and not report["kernels"]
        trace = plan.out / TRACE if wanted else None
        report["steps"].append(_step(job, plan.steps, left(), trace))
        if trace is not None and trace.is_file():
            report["kernels"] = kernels(trace)
        report["seconds"] = round(time.monotonic() - began)
        _write(plan, report)
    _write(plan, report)
    return report


def jobs(plan: CardPlan) -> Iterator[Job]:
    """The steps in the order in which they are timed: small before large, a canvas after another.

    The first canvas's smallest training batch comes first, then its smallest inference batch.
    """
    whole = [
        (place, size, what, canvas, batch)
        for what, batches in (("train", plan.batches), ("inference", plan.inference_batches))
        for place, canvas in enumerate(plan.canvases)
        for size, batch in enumerate(batches)
    ]
    for _, _, what, canvas, batch in sorted(
        whole, key=lambda one: (2 * one[0] + one[1], one[2] == "inference")
    ):
        load = Load(canvas=canvas, batch=batch)
        job = Job(what, "casc", load, plan.dtype, plan.device, plan.compile)  # type: ignore[arg-type]
        if what == "inference":
            yield job
            continue
        if replay_missing(torch.device(plan.device)) is None:
            yield replace(job, replay=True)
        yield replace(job, replay=False)


def job_name(job: Job) -> str:
    """As people call it."""
    height, width = job.load.canvas
    how = {None: "", True: ", replayed", False: ", launched"}[job.replay]
    return f"{job.what}, batch {job.load.batch}, {height} x {width}{how}"


def kernels(trace: Path) -> list[dict[str, Any]]:
    """What takes a traced step's time on the device: name, calls and microseconds a step.

    On a CPU its operators, each without those that it calls.
    """
    with gzip.open(trace, "rt", encoding="utf-8") as file:
        events = [e for e in json.load(file)["traceEvents"] if e.get("ph") == "X"]
    # What CUDA's and NPU's profilers call the work of the device itself.
    found = [e for e in events if str(e.get("cat", "")).lower() in ("kernel", "gpu_memcpy")]
    times = [(str(e["name"]), float(e["dur"])) for e in found] or _own_times(events)
    by_name: dict[str, list[float]] = defaultdict(list)
    for name, duration in times:
        by_name[name].append(duration)
    total = sum(sum(durations) for durations in by_name.values()) or 1.0
    rows = [
        {
            "name": name,
            "calls": len(durations) / STEPS,
            "us": sum(durations) / STEPS,
            "share": sum(durations) / total,
        }
        for name, durations in by_name.items()
    ]
    return sorted(rows, key=lambda row: -row["us"])[:_MOST_KERNELS]


def card_page(report: dict[str, Any], title: str) -> str:
    """The report as a page that needs no network."""
    doctor = report["doctor"] or {}
    findings = [
        [(f"{f['part']}: {f['name']}", None), (f["value"], None), (f["state"], f["state"])]
        for f in doctor.get("findings", [])
    ]
    steps = [
        [
            (row["name"], None),
            _figure(row, "img_per_s", ".2f"),
            _figure(row, "step_s", ".4f"),
            (" to ".join(f"{row['step_s_spread'][k]:.4f}" for k in ("low", "high")), None)
            if "step_s_spread" in row
            else ("", None),
            _figure(row, "first_step_s", ".1f"),
            _figure(row, "peak_device_gib", ".1f"),
            _figure(row, "peak_rss_gib", ".1f"),
            (row.get("error", ""), None),
        ]
        for row in report["steps"]
    ]
    costs = [
        [
            (row["name"][:120], None),
            (f"{row['calls']:.1f}", row["calls"]),
            (f"{row['us']:,.0f}", row["us"]),
            (f"{100 * row['share']:.1f} %", row["share"]),
        ]
        for row in report["kernels"]
    ]
    verified = report["verify"] or {"passed": None, "lines": ["not run"]}
    summary = (
        f"<p>{escape(report['device'])}, {escape(report['dtype'])},"
        f" {'compiled' if report['compiled'] else 'eager'};"
        f" {report.get('seconds', 0):,} seconds in all."
        f" Verify {_VERIFIED[verified['passed']]}.</p>"
    )
    if report["not_run"]:
        rows = "".join(f"<li>{escape(line)}</li>" for line in report["not_run"])
        summary += f"<p>Not run:</p><ul>{rows}</ul>"
    columns = (
        *("step", "images/s", "seconds", "from, to", "first step, s"),
        *("device, GiB", "host, GiB", "what failed"),
    )
    return document(
        title,
        [
            ("summary", "Summary", summary),
            ("steps", "Steps", table("Medians of the timed steps", columns, steps, sortable=True)),
            (
                "kernels",
                "Kernels",
                table(
                    "A training step's time on the device",
                    ("kernel", "calls a step", "microseconds a step", "share"),
                    costs,
                    sortable=True,
                    filtered="Kernels with",
                ),
            ),
            ("doctor", "Machine", table("casc doctor", ("part", "found", "state"), findings)),
            ("verify", "Verify", f"<pre>{escape(chr(10).join(verified['lines']))}</pre>"),
        ],
    )


def _doctor(seconds: float) -> dict[str, Any]:
    done = _casc(["doctor", "--json"], seconds)
    try:
        return json.loads(done.stdout)
    except ValueError:
        return {"usable": [], "findings": [], "error": (done.stderr or done.stdout)[-2000:]}


def _verify(plan: CardPlan, seconds: float) -> dict[str, Any]:
    if plan.goldens is None:
        return {"passed": None, "lines": ["not run: no golden files; give them by --goldens"]}
    command = ["verify", str(plan.goldens), "--device", plan.device]
    done = _casc(command, seconds)
    lines = [*done.stdout.splitlines(), *done.stderr.splitlines()[-20:]]
    return {"passed": done.returncode == 0, "lines": lines}


def _casc(arguments: Sequence[str], seconds: float) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "casc", *arguments]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=max(seconds, 1)
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", "the time was over")


def _step(job: Job, steps: int, seconds: float, trace: Path | None) -> dict[str, Any]:
    height, width = job.load.canvas
    row: dict[str, Any] = {
        "name": job_name(job), "what": job.what, "batch": job.load.batch,
        "canvas": [height, width],
    }  # fmt: skip
    try:
        with Worker(job, timeout=seconds) as worker:
            row["first_step_s"] = worker.step()["step_s"]
            worker.step()
            times = [worker.step()["step_s"] for _ in range(steps)]
            row["step_s"] = statistics.median(times)
            row["step_s_spread"] = spread(times)._asdict()
            row["img_per_s"] = job.load.batch / row["step_s"]
            row |= worker.memory()
            if trace is not None:
                worker.trace(trace)
    except UserError as error:
        row["error"] = str(error)
    return row


def _own_times(events: Sequence[dict[str, Any]]) -> list[tuple[str, float]]:
    """The CPU operators' own time: without the time of operators within them."""
    operators: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "cpu_op":
            operators[event.get("tid")].append(event)
    found = []
    for thread in operators.values():
        open_: list[list[Any]] = []  # [name, end, own time], the innermost last
        for event in sorted(thread, key=lambda e: (e["ts"], -e["dur"])):
            while open_ and open_[-1][1] <= event["ts"]:
                name, _, own = open_.pop()
                found.append((name, own))
            if open_:
                open_[-1][2] -= event["dur"]
            open_.append([str(event["name"]), event["ts"] + event["dur"], float(event["dur"])])
        found += [(name, own) for name, _, own in open_]
    return found


def _figure(row: dict[str, Any], name: str, form: str) -> tuple[str, float | None]:
    value = row.get(name)
    return ("", None) if value is None else (format(value, form), value)


def _write(plan: CardPlan, report: dict[str, Any]) -> None:
    title = f"casc on {plan.device}"
    for name, text in (
        ("card.json", json.dumps(report, indent=1)),
        ("card.html", card_page(report, title)),
    ):
        temporary = plan.out / f".{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(plan.out / name)
