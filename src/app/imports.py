"""Importing torch and Lightning: what takes most of the time of a short command."""

import gc
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Spare the garbage collector the objects that modules are made of: they stay to the end.

    Lightning's own handlers go: what it warns of reaches the root logger, which Hydra has set up.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
    for noise in (
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's own call
        r"The number of training batches .* is smaller than the logging interval",
    ):
        warnings.filterwarnings("ignore", noise)
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).setLevel(logging.WARNING)
        logging.getLogger(name).propagate = True
