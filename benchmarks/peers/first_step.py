"""Ends the process behind its first optimizer step: what it took then is the time to that step."""

import os
from typing import Any

import lightning.pytorch as pl


class FirstStep(pl.Callback):
    """Leaves at the end of the first batch, without what an interpreter does at its end."""

    def on_train_batch_end(self, *args: Any) -> None:
        os._exit(0)
