"""Signals that ask for an end, from schedulers, launchers and people."""

import multiprocessing
import os
import signal
import threading

ENDS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
)
"""What asks a run to end; Windows knows no SIGUSR1."""


def leave_to_parent() -> None:
    """Make a helper process end when its parent says so, and not by signals to the whole group.

    Schedulers, torchrun and Ctrl-C signal every process of a job. The training process
    finishes its step on that and saves, for which it still needs its helpers.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):
        return
    # A handler couldn't tell who has sent a signal; whoever waits for it is told.
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDS)
    threading.Thread(target=_end_at_parents_word, daemon=True).start()


def end_with_parent() -> None:
    """End this helper process once its parent has ended, and ignore Ctrl-C.

    A parent that is killed can't tell its helpers, which would wait for ever. Ctrl-C goes to
    the whole process group; the parent decides what becomes of it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _end_at_parents_word() -> None:
    # With some start methods the system's parent is a server that forks.
    starter = multiprocessing.parent_process()
    parent = starter.pid if starter else os.getppid()
    while True:
        if signal.sigwaitinfo({signal.SIGTERM}).si_pid == parent:
            os._exit(0)
