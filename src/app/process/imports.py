"""Importing torch and Lightning: what takes most of the time of a short command."""

import gc
import logging
import signal
import sys
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


OTHER = "pytorch_lightning"
"""The other name under which Lightning's code is installed, with classes of its own."""


def one_lightning() -> None:
    """Let a module of the user's that imports `pytorch_lightning` get `lightning.pytorch`.

    The code is the same, and its classes would be others. Where it is imported already it stays.
    """
    import lightning.pytorch as pl

    if OTHER not in sys.modules:
        for name in [name for name in sys.modules if f"{name}.".startswith(f"{pl.__name__}.")]:
            sys.modules[name.replace(pl.__name__, OTHER, 1)] = sys.modules[name]
