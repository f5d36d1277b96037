"""The learning-rate range test (arXiv 1506.01186) over a throwaway run."""

import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch

from app.config import Config
from app.errors import Refused
from app.tuner.lr_rules import beta_for, diverged, sweep
from app.tuner.probe import fit, release_memory, throwaway

if TYPE_CHECKING:
    from conf.tuner.schema import LearningRate

FEWEST = 10
"""Steps of an interrupted sweep that still make a curve."""

MOST_OPTIMIZERS = 8
"""A bound for the trainer, which counts the steps of all optimizers; the sweep ends the fit."""


class RateSweep(pl.Callback):
    """Sets the learning rate of each optimizer step of a fit and records the step's loss.

    One point per optimizer step: the mean loss of its micro-batches, over all ranks. One multiplier
    moves all parameter groups, so that their ratios stay. Ends the fit where the loss diverges.

    Args:
        rates: learning rates of the tuned key, one for each optimizer step.
        base: the value that the tuned key has now, > 0.
        divergence: how many times the range seen so far the loss may rise above its best.
        optimizer: position of the optimizer that is swept; None sweeps all.
        from_now: whether `base` is the rate of this moment, not the configured one.
    """

    def __init__(
        self,
        *,
        rates: Sequence[float],
        base: float,
        divergence: float,
        optimizer: int | None,
        from_now: bool,
    ) -> None:
        self.rates = list(rates)
        self.losses: list[float] = []
        self._base = base
        self._divergence = divergence
        self._optimizer = optimizer
        self._from_now = from_now
        self._initial: list[list[float]] = []
        self._window: list[torch.Tensor] = []
        self._global_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._initial = [
            [float(group["lr"] if self._from_now else configured_lr(group)) for group in groups]
            for groups in (optimizer.param_groups for optimizer in trainer.optimizers)
        ]
        # a plateau is of a validation, and a sweep has none
        configs = trainer.strategy.lr_scheduler_configs
        trainer.strategy.lr_scheduler_configs = [c for c in configs if not c.reduce_on_plateau]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        multiplier = self.rates[min(len(self.losses), len(self.rates) - 1)] / self._base
        for position, optimizer in enumerate(trainer.optimizers):
            if self._optimizer in (None, position):
                initial = self._initial[position]
                for group, lr in zip(optimizer.param_groups, initial, strict=True):
                    group["lr"] = lr * multiplier

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
        if loss is None:
            loss = trainer.callback_metrics.get("train_loss")
        if loss is None:
            raise Refused(
                f"tuner.lr needs the loss of {type(pl_module).__name__}: return it from "
                "training_step, or log it as train_loss"
            )
        self._window.append(loss.detach())
        if trainer.global_step == self._global_step:
            return
        self._global_step = trainer.global_step
        mean = torch.stack(self._window).mean()
        self._window = []
        if trainer.world_size > 1:
            mean = trainer.strategy.reduce(mean, reduce_op="mean")
        self.losses.append(float(mean))
        if len(self.losses) == len(self.rates) or diverged(
            self.losses, beta=beta_for(len(self.rates)), factor=self._divergence
        ):
            trainer.should_stop = True


class RateBar(pl.Callback):
    """A bar of the sweep's optimizer steps where the output is a terminal."""

    def __init__(self, sweeping: RateSweep) -> None:
        self._sweeping = sweeping
        self._bar: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if sys.stdout.isatty():
            from rich.progress import Progress

            self._bar = Progress(transient=True)
            self._bar.start()
            self._bar.add_task("learning rate", total=len(self._sweeping.rates))

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=len(self._sweeping.losses))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def configured_lr(group: Mapping[str, Any]) -> float:
    """The learning rate that a parameter group was made with, whatever a schedule made of it."""
    lr: float = group.get("max_lr", group.get("initial_lr", group["lr"]))
    return lr


def range_test(
    config: Config,
    *,
    settings: "LearningRate",
    base: float,
    optimizer: int | None,
    from_now: bool,
    callbacks: Sequence[pl.Callback],
) -> tuple[list[float], list[float], bool]:
    """All rates of a sweep, the mean losses of its steps up to where it diverged, is it complete.

    Not complete is one that Ctrl-C ended after ten steps; before, KeyboardInterrupt is raised.

    Raises Refused where the first loss is not finite.
    """
    rates = sweep(
        num_steps=settings.num_steps,
        lowest=settings.lowest,
        highest=settings.highest,
        mode=settings.mode.value,
    )
    sweeping = RateSweep(
        rates=rates,
        base=base,
        divergence=settings.divergence,
        optimizer=optimizer,
        from_now=from_now,
    )
    # an average does not touch the loss that is trained on
    run = throwaway(
        config.but(averaging=None),
        num_steps=MOST_OPTIMIZERS * len(rates),
        validates=False,
        callbacks=[*callbacks, sweeping, RateBar(sweeping)],
    )
    complete = True
    try:
        fit(run)
    except KeyboardInterrupt:
        if len(sweeping.losses) < FEWEST:
            raise
        complete = False
    finally:
        del run
        release_memory()
    if not sweeping.losses or not math.isfinite(sweeping.losses[0]):
        raise Refused(
            f"tuner.lr needs a finite loss to begin with, got {sweeping.losses[:1]}; look at the "
            "data and the model, or use tuner=none"
        )
    return rates, sweeping.losses, complete
