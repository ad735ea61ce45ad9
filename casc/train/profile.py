"""A trace of a few training steps, for Perfetto (https://ui.perfetto.dev) or chrome://tracing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import profile, schedule, supported_activities

from casc.errors import UserError

SKIPPED = 2
"""Steps before the profiler starts: what is new in them happens once."""
WARM_UP = 1
"""Steps that the profiler watches and throws away, as its own start is slow."""
STEPS = 3
"""Steps in the trace."""
NEEDED = SKIPPED + WARM_UP + STEPS


def check_profile(file: Path | None, steps: int = NEEDED) -> None:
    """Refuse a trace that can't be made.

    Args:
        file: where it is to go; None is fine.
        steps: that the run still has to make.

    Raises:
        UserError: naming the flag.
    """
    if file is None:
        return
    if not file.name.endswith((".json", ".json.gz")):
        raise UserError(f"--profile {file}: a trace's name ends in .json.gz, or in .json")
    if steps < NEEDED:
        raise UserError(
            f"--profile: the trace needs {NEEDED} steps ({STEPS} after {NEEDED - STEPS} that aren't"
            f" in it), the run has {steps}"
        )


@contextmanager
def profiling(
    file: Path | None, say: Callable[[str], object] = print
) -> Iterator[Callable[[], object]]:
    """Trace the steps made within, or only those that the trace is of.

    Operators with their shapes, on the host and on the device as far as torch can see it. Each
    traced step is marked `ProfilerStep#n`.

    Args:
        file: Chrome's trace format, compressed if its name ends in .gz; None traces nothing.
        say: is told where the trace is, once it is written.

    Yields:
        A function to call after each step.

    Raises:
        UserError: the file can't be written.
    """
    if file is None:
        yield lambda: None
        return

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # torch only logs that it couldn't write, so look first.
        file.write_bytes(b"")
    except OSError as error:
        raise UserError(f"--profile {file}: can't be written ({error.strerror})") from None

    def write(finished: profile) -> None:
        finished.export_chrome_trace(str(file))
        say(f"a trace of {STEPS} steps is in {file}; open it in https://ui.perfetto.dev")

    plan = schedule(wait=SKIPPED, warmup=WARM_UP, active=STEPS, repeat=1)
    with profile(
        activities=supported_activities(),
        schedule=plan,
        on_trace_ready=write,
        record_shapes=True,
        acc_events=True,
    ) as profiler:
        yield profiler.step
