"""A rank that is asked to stop: it notes it at once, and leaves at the end of a batch."""

import signal
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import SIGTERMException


class LeavesAtBatchEnd(pl.Callback):
    """Ends a run of several ranks after SIGTERM at the end of a batch, on each rank by itself.

    Lightning's handler talks to the other ranks from inside the signal, where they listen to
    something else: the run hangs, or trains on numbers that were not meant for it.

    Attributes:
        received: the signal that asked this rank to stop, also Ctrl-C's; None before.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning puts back what was there before the fit
        signal.signal(signal.SIGTERM, self._note)
        signal.signal(signal.SIGINT, self._note)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._leave()

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._leave()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        if number == signal.SIGINT:
            raise KeyboardInterrupt

    def _leave(self) -> None:
        if self.received == signal.SIGTERM:
            raise SIGTERMException
