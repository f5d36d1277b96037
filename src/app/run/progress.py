"""What the user sees while a run goes on: a line per epoch, and in a terminal a bar below."""

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl

if TYPE_CHECKING:
    from rich.progress import Task


def progress(*, refresh_every_n_batches: int) -> pl.Callback:
    """A line per epoch; where the output is a terminal, with a rich bar below.

    Args:
        refresh_every_n_batches: how often the bar is drawn, >= 1.
    """
    if not sys.stdout.isatty():
        return EpochLines()
    from lightning.pytorch.callbacks import RichProgressBar
    from rich.progress import TextColumn

    class Bar(EpochLines, RichProgressBar):  # here, or a run without a terminal imported rich
        """The bar of the epoch, below the lines of those before."""

        def configure_columns(self, trainer: pl.Trainer) -> list[Any]:
            columns = super().configure_columns(trainer)
            return [Named(columns[0].text_format), *columns[1:]]

    class Named(TextColumn):
        """What a bar is of: an epoch, counted as the lines count."""

        def render(self, task: "Task") -> Any:
            if "Epoch" in task.description:  # Lightning's, counted from 0
                task.description = f"{bar.epoch.capitalize():{len(bar.validation_description)}}"
            return super().render(task)

    bar = Bar(refresh_rate=refresh_every_n_batches)
    return bar


def draws(callback: pl.Callback) -> bool:
    """Whether a callback is a bar of somebody else's."""
    return isinstance(callback, pl.callbacks.ProgressBar) and not isinstance(callback, EpochLines)


def with_one_bar(callbacks: Sequence[pl.Callback]) -> list[pl.Callback]:
    """The callbacks, of ours the lines alone where somebody else's bar is drawn."""
    if not any(map(draws, callbacks)):
        return list(callbacks)
    return [EpochLines() if isinstance(one, EpochLines) else one for one in callbacks]


class EpochLines(pl.Callback):
    """Prints the metrics of each epoch on one line.

    Attributes:
        epoch: the one that is trained and the last one, counted from 1.
    """

    epoch = ""
    _started_at = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._started_at = time.monotonic()
        self._count(trainer)  # one that goes on inside an epoch does not begin it

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._count(trainer)
        super().on_train_epoch_start(trainer, pl_module)

    def _count(self, trainer: pl.Trainer) -> None:
        last = "" if trainer.max_epochs in (None, -1) else f"/{trainer.max_epochs}"
        self.epoch = f"epoch {trainer.current_epoch + 1}{last}"

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        metrics = sorted(trainer.callback_metrics.items())  # on every rank: they are means over all
        if not trainer.is_global_zero:
            return
        text = "  ".join(f"{name} {float(value):.4g}" for name, value in metrics)
        seconds = time.monotonic() - self._started_at
        print(f"{self.epoch}  step {trainer.global_step}  {text}  {seconds:.0f} s", flush=True)
