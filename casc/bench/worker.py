"""What is timed runs in a process of its own: its memory and compilations are then its own.

Several of them take turns, step by step, so that a slow minute of the machine falls on all.
"""

import multiprocessing
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from casc.bench.batch import Job
from casc.errors import UserError


class Subject(Protocol):
    """Something that can be timed."""

    def step(self) -> dict[str, float]:
        """Do one step and give the seconds of its parts."""
        ...

    def facts(self) -> dict[str, Any]:
        """What there is to say after the last step."""
        ...


class Worker:
    """A process that does one step whenever it is asked to.

    Raises:
        UserError: in any method, with the process's own message, when it failed, or when all
            of its answers together have taken longer than the timeout.
    """

    def __init__(self, job: Job, timeout: float | None = None):
        context = multiprocessing.get_context("spawn")
        self.job = job
        self.deadline = None if timeout is None else time.monotonic() + timeout
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, job), daemon=True)
        self.process.start()
        theirs.close()

    def step(self) -> dict[str, float]:
        """Seconds of one step: `step_s`, and those of its parts. The first one compiles."""
        return self._ask("step")

    def facts(self) -> dict[str, Any]:
        """`peak_rss_gib` and what the subject has to say."""
        return self._ask("facts")

    def memory(self) -> dict[str, float]:
        """`peak_rss_gib`, and `peak_device_gib` of an accelerator."""
        return self._ask("memory")

    def compilations(self) -> dict[str, int]:
        """Graphs, graph breaks and recompilations so far."""
        return self._ask("compilations")

    def trace(self, file: Path) -> None:
        """Write a trace of a few more steps."""
        self._ask(file)

    def close(self) -> None:
        """End the process."""
        self.pipe.close()
        late = self.deadline is not None and time.monotonic() > self.deadline
        self.process.join(0 if late else 10)
        self.process.kill()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, what: str | Path) -> Any:
        job = self.job
        try:
            self.pipe.send(what)
            if self.deadline is not None and not self.pipe.poll(self.deadline - time.monotonic()):
                raise UserError(f"{job.who} {job.what}: the time was over")
            answer = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(10)
            code = self.process.exitcode
            raise UserError(f"{job.who} {job.what}: its process ended with code {code}") from None
        if isinstance(answer, str):
            raise UserError(f"{job.who} {job.what} {job.dtype} on {job.device}: {answer}")
        return answer


def _serve(pipe: Connection, job: Job) -> None:
    # What libraries print must not mix with the report.
    os.dup2(sys.stderr.fileno(), 1)
    subject: Subject | None = None
    while True:
        try:
            question = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            if subject is None:
                subject = _subject(job)
            answer: Any
            if question == "step":
                answer = _timed(subject.step)
            elif isinstance(question, Path):
                answer = trace(subject, question)
            elif question == "compilations":
                answer = compilations()
            elif question == "memory":
                answer = _memory(job)
            else:
                # First of all: looking closer needs memory of its own.
                answer = _memory(job) | subject.facts()
        except UserError as error:
            answer = str(error)
        except Exception as error:
            traceback.print_exc()
            answer = f"{type(error).__name__}: {error}"
        pipe.send(answer)


def compilations() -> dict[str, int]:
    """Graphs, graph breaks and recompilations of this process so far."""
    from torch._dynamo.utils import counters

    return {
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(counters["graph_break"].values()),
        "recompiles": len(counters["recompiles"]),
    }


def _timed(step: Callable[[], dict[str, float]]) -> dict[str, float]:
    start = time.perf_counter()
    parts = step()
    return {"step_s": time.perf_counter() - start} | parts


def trace(subject: Subject, file: Path) -> None:
    """Write a trace of a few steps; see `casc.train.profile`."""
    from casc.train.profile import NEEDED, profiling

    with profiling(file) as traced:
        for _ in range(NEEDED):
            subject.step()
            traced()


def _memory(job: Job) -> dict[str, float]:
    import torch

    memory = {"peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    device = torch.device(job.device)
    if device.type != "cpu":
        memory["peak_device_gib"] = torch.accelerator.max_memory_allocated(device) / 2**30
    return memory


def _subject(job: Job) -> Subject:
    import torch

    from casc.bench import inference, peers, train

    if job.threads:
        torch.set_num_threads(job.threads)
    kinds = {
        ("train", "casc"): train.Training if job.replay is None else train.WholeStep,
        ("inference", "casc"): inference.Inference,
        ("train", "torchvision"): peers.Training,
        ("inference", "torchvision"): peers.Inference,
    }
    return kinds[job.what, job.who](job)
