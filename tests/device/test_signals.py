import multiprocessing
import os
import signal
import subprocess
import time

import pytest

from casc.device.signals import leave_to_parent

pytestmark = pytest.mark.skipif(
    not hasattr(signal, "sigwaitinfo"), reason="this system can't tell who sent a signal"
)


def helper(ready):
    leave_to_parent()
    ready.set()
    time.sleep(60)


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_a_helper_ends_at_its_parents_word_only(method):
    context = multiprocessing.get_context(method)
    ready = context.Event()
    process = context.Process(target=helper, args=(ready,), daemon=True)
    process.start()
    assert process.pid is not None
    assert ready.wait(60)
    for name in ("INT", "TERM", "USR1"):  # from a stranger
        subprocess.run(["sh", "-c", f"kill -{name} {process.pid}"], check=True)
    process.join(0.5)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGTERM)
    process.join(30)
    assert process.exitcode == 0
