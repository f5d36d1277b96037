"""The learning-rate range test (arXiv 1506.01186) over a throwaway run."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch

from app.tuner.lr_rules import diverged, sweep
from app.tuner.probe import free, throwaway


class Sweep(pl.Callback):
    """Sets the learning rate of each optimizer step of a fit and records the step's loss.

    One point per optimizer step: the mean loss of its micro-batches, over all ranks. One multiplier
    moves all parameter groups, so that their ratios stay. Ends the fit where the loss diverges.

    Args:
        rates: learning rates of the tuned key, one for each optimizer step.
        base: the value that the tuned key has now, > 0.
        smoothing: of the loss that divergence is judged by, 0 to below 1.
        divergence: how many times the range seen so far the loss may rise above its best.
        optimizer: position of the optimizer that is swept; None sweeps all.
    """

    def __init__(
        self,
        *,
        rates: Sequence[float],
        base: float,
        smoothing: float,
        divergence: float,
        optimizer: int | None,
    ) -> None:
        self.rates = list(rates)
        self.losses: list[float] = []
        self._base = base
        self._smoothing = smoothing
        self._divergence = divergence
        self._optimizer = optimizer
        self._initial: list[list[float]] = []
        self._window: list[torch.Tensor] = []
        self._global_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._initial = [
            [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
            for optimizer in trainer.optimizers
        ]

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
            raise ValueError(
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
            self.losses, beta=self._smoothing, factor=self._divergence
        ):
            trainer.should_stop = True


def range_test(
    config: Mapping[str, Any],
    *,
    settings: Mapping[str, Any],
    base: float,
    optimizer: int | None,
    callbacks: Sequence[pl.Callback],
) -> tuple[list[float], list[float]]:
    """All learning rates of a sweep, and the mean losses of its steps up to where it diverged.

    Raises ValueError where the first loss is not finite.
    """
    rates = sweep(
        num_steps=settings["num_steps"],
        lowest=settings["lowest"],
        highest=settings["highest"],
        mode=settings["mode"],
    )
    sweeping = Sweep(
        rates=rates,
        base=base,
        smoothing=settings["smoothing"],
        divergence=settings["divergence"],
        optimizer=optimizer,
    )
    # an average does not touch the loss that is trained on
    run = throwaway(
        {**config, "averaging": None},
        num_steps=None,
        validates=False,
        callbacks=[sweeping, *callbacks],
    )
    run.trainer.fit(run.model, datamodule=run.data)
    free(run)
    if not sweeping.losses or not math.isfinite(sweeping.losses[0]):
        raise ValueError(
            f"tuner.lr needs a finite loss to begin with, got {sweeping.losses[:1]}; look at the "
            "data and the model, or use tuner=none"
        )
    return rates, sweeping.losses
