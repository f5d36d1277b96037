"""Importing torch and Lightning: what takes most of the time of a short command."""

import gc
import logging
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from app.process.asked import HEEDED


@contextmanager
def importing() -> Iterator[None]:
    """Spare the garbage collector the objects that modules are made of: they stay to the end.

    Signals that ask to stop wait for the end: an exception inside of torch aborts the process.
    Lightning's own handlers go: what it warns of reaches the root logger, which Hydra has set up.
    """
    gc.disable()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HEEDED)
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    for noise in (
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's own call
        r"The number of training batches .* is smaller than the logging interval",
    ):
        warnings.filterwarnings("ignore", noise)
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).setLevel(logging.WARNING)
        logging.getLogger(name).propagate = True
