import multiprocessing
import os
import signal
import time

import pytest

from casc.signals import leave_to_parent

pytestmark = pytest.mark.skipif(
    not hasattr(signal, "sigwaitinfo"), reason="this system can't tell who sent a signal"
)


def helper(ready):
    leave_to_parent()
    ready.set()
    time.sleep(60)


def test_a_helper_ends_at_its_parents_word_only():
    context = multiprocessing.get_context("forkserver")
    ready = context.Event()
    process = context.Process(target=helper, args=(ready,), daemon=True)
    process.start()
    assert process.pid is not None
    assert ready.wait(30)
    # The fork server is the parent here, so these come from a stranger.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(process.pid, number)
    process.join(0.5)
    assert process.is_alive()
    process.kill()
    process.join()


def test_a_parents_word_is_heard():
    pid = os.fork()
    if not pid:
        leave_to_parent()
        time.sleep(60)
        os._exit(1)
    time.sleep(0.2)
    os.kill(pid, signal.SIGTERM)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) in (0, -signal.SIGTERM)
