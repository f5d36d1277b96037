"""How a process ends that others wait for. Needs no torch."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from functools import partial
from multiprocessing import connection

GRACE_S = 10.0
"""How long a rank may take to end after SIGTERM."""


def end_in_time(*, grace_s: float) -> None:
    """End this process with the one that started it, however that ends, and soon after SIGTERM.

    A thread sees to it: the main one may wait for a peer that is gone. Else this process is like
    one that was typed: Ctrl-C interrupts it, and it starts others the way its system does.

    Args:
        grace_s: seconds that the main thread has after SIGTERM.
    """
    starter = multiprocessing.parent_process()
    assert starter is not None
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def watch() -> None:
        signalled = False
        while not signalled:
            ready = connection.wait([starter.sentinel, reader])
            if starter.sentinel in ready:
                leave(1)
            signalled = signal.SIGTERM in os.read(reader, 64)
        time.sleep(grace_s)
        leave(128 + signal.SIGTERM)

    # a handler, or the signal ends the process at once; Lightning sets its own in a fit
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
    # or each of a DataLoader's workers would be forked from a server of its own, without torch
    multiprocessing.set_start_method(None, force=True)
    os.register_at_fork(after_in_child=partial(signal.set_wakeup_fd, -1))  # not ours to hear
    threading.Thread(target=watch, daemon=True).start()


def leave(exit_code: int) -> None:
    """Exit without waiting for any thread, and take the DataLoader's workers along."""
    for child in multiprocessing.active_children():
        child.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
