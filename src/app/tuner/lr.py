"""The learning-rate range test (arXiv 1506.01186) over a throwaway run."""

import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from torch.optim import Optimizer

from app.config import Config
from app.errors import Refused
from app.throwaway.rates import number, set_rate
from app.throwaway.run import Steps, end, end_before_training, fit, release_memory, throwaway
from app.tuner.lr_rules import beta_for, diverged, sweep
from app.tuner.search import NoEffect

if TYPE_CHECKING:
    from conf.tuner.schema import LearningRate

FEWEST = 10
"""Steps of an interrupted sweep that still make a curve."""

MOST_WITHOUT_LOSS = 100
"""Optimizer steps without a loss, after which it is asked for."""


class RateSweep(Steps):
    """Sets the learning rate of each optimizer step of a fit and records the step's loss.

    One point per optimizer step: the mean loss of its micro-batches, over all ranks; of a step
    without a loss, none. One multiplier moves all parameter groups whose rate follows the tuned
    key, so that their ratios stay. Ends the fit where the loss diverges.

    Args:
        rates: learning rates of the tuned key, one for each optimizer step.
        base: the value that the tuned key has now, > 0.
        divergence: how many times the range seen so far the loss may rise above its best.
        optimizer: position of the optimizer that is swept; None sweeps all.
        from_now: whether `base` is the rate of this moment, not the configured one.
        elsewhere: the rates of all groups at another value of the tuned key; None lets all follow.
    """

    def __init__(
        self,
        *,
        rates: Sequence[float],
        base: float,
        divergence: float,
        optimizer: int | None,
        from_now: bool,
        elsewhere: Sequence[Sequence[float]] | None,
    ) -> None:
        super().__init__(enough=math.inf)
        self.rates = list(rates)
        self.losses: list[float] = []
        self.initial: list[list[float]] = []
        self.is_ineffective = self.has_diverged = False
        self._base = base
        self._divergence = divergence
        self._optimizer = optimizer
        self._from_now = from_now
        self._elsewhere = elsewhere
        self._window: list[torch.Tensor] = []
        self._passed_back: list[torch.Tensor] = []
        self._multiplier = 1.0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self.is_ineffective = self._elsewhere is not None and not self._followers(trainer)
        if self.is_ineffective:
            end_before_training(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.initial = rates_of(trainer, from_now=self._from_now)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        rate = self.rates[min(len(self.losses), len(self.rates) - 1)]
        for position, optimizer in enumerate(trainer.optimizers):
            self._note_added(position, optimizer)
        self._multiplier = rate / self._base
        for position, optimizer in enumerate(trainer.optimizers):
            self.before_step(position, optimizer)

    def before_step(self, position: int, optimizer: Optimizer) -> None:
        """Set the rates, also over those that the model, or a callback, has set meanwhile."""
        if self._optimizer in (None, position):
            for number, (group, lr) in enumerate(
                zip(optimizer.param_groups, self.initial[position], strict=False)
            ):
                if self._follows(position, number, lr):
                    set_rate(group, lr * self._multiplier)

    def after_step(self, position: int, optimizer: Optimizer) -> None:
        """Raise Refused where the model has set rates of its own between two of ours."""
        if self._optimizer in (None, position):
            for number, (group, lr) in enumerate(
                zip(optimizer.param_groups, self.initial[position], strict=False)
            ):
                wanted = lr * self._multiplier
                if self._follows(position, number, lr) and not math.isclose(
                    float(group["lr"]), wanted, rel_tol=1e-5
                ):
                    raise Refused(
                        f"tuner.lr cannot act where training_step sets the learning rate itself, "
                        f"to {float(group['lr']):.3g}; type tuner=none"
                    )

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor
    ) -> None:
        if not pl_module.automatic_optimization:
            self._passed_back.append(loss.detach())

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        super().on_train_batch_end(trainer, *args)
        model, outputs = trainer.lightning_module, args[1]
        loss = self._loss(trainer, model, outputs)
        if loss is not None:
            self._window.append(torch.as_tensor(loss, device=model.device).detach().float().mean())
        self._passed_back = []
        if not self.has_stepped:
            return
        found = torch.tensor([0.0, 0.0], device=model.device)
        for one in self._window:
            found += torch.stack([one, torch.ones_like(one)])
        self._window = []
        if trainer.world_size > 1:
            found = trainer.strategy.reduce(found, reduce_op="sum")
        total, count = found.tolist()
        if count > 0:
            self.losses.append(total / count)
        elif self.num_steps >= MOST_WITHOUT_LOSS + len(self.losses):
            raise Refused(
                f"tuner.lr needs the loss of {type(model).__name__}: return it from "
                "training_step, or log it as train_loss"
            )
        beta = beta_for(len(self.rates))
        losses = self.losses
        self.has_diverged = bool(losses) and diverged(losses, beta=beta, factor=self._divergence)
        if len(self.losses) == len(self.rates) or self.has_diverged:
            end(trainer)

    def _loss(self, trainer: pl.Trainer, model: pl.LightningModule, outputs: Any) -> Any:
        """Of a micro-batch: what was returned, else, where the model steps itself, logged, or else
        passed back; None where there is none."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
        if loss is not None or model.automatic_optimization:
            return loss
        logged = trainer.callback_metrics.get("train_loss")
        if logged is not None or not self._passed_back:
            return logged
        return torch.stack([one.float().mean() for one in self._passed_back]).mean()

    def _note_added(self, position: int, optimizer: Optimizer) -> None:
        """Take in parameter groups that a callback has added since, at the rate of the others."""
        known = self.initial[position]
        for group in optimizer.param_groups[len(known) :]:
            known.append(float(group["lr"]) / self._multiplier)

    def _followers(self, trainer: pl.Trainer) -> int:
        """How many groups of the swept optimizers follow the tuned key."""
        return sum(
            self._follows(position, number, lr)
            for position, rates in enumerate(rates_of(trainer, from_now=False))
            if self._optimizer in (None, position)
            for number, lr in enumerate(rates)
        )

    def _follows(self, position: int, number: int, lr: float) -> bool:
        """Whether a group's rate is another one where the tuned key is."""
        if self._elsewhere is None or position >= len(self._elsewhere):
            return True
        rates = self._elsewhere[position]
        return number >= len(rates) or not math.isclose(lr, rates[number], rel_tol=1e-9)


class Rates(Steps):
    """Notes the learning rates of all parameter groups, and ends the run before its first step."""

    def __init__(self) -> None:
        super().__init__(enough=math.inf)
        self.found: list[list[float]] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self.found = rates_of(trainer, from_now=False)
        end_before_training(trainer)


def rates_of(trainer: pl.Trainer, *, from_now: bool) -> list[list[float]]:
    """The learning rates of each optimizer's groups, of this moment or as they were made."""
    return [
        [
            number(group.get("lr")) if from_now else configured_lr(group)
            for group in one.param_groups
        ]
        for one in trainer.optimizers
    ]


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
    return number(group.get("max_lr", group.get("initial_lr", group.get("lr"))))


def range_test(
    config: Config,
    *,
    settings: "LearningRate",
    base: float,
    optimizer: int | None,
    from_now: bool,
    callbacks: Sequence[pl.Callback],
    key: str | None = None,
) -> tuple[list[float], list[float], bool]:
    """All rates of a sweep, the mean losses of its steps up to where it diverged, is it complete.

    Not complete is one that Ctrl-C ended after ten steps; before, KeyboardInterrupt is raised.

    Args:
        key: whose value is `base`; None where all groups are swept, whatever they follow.

    Raises:
        NoEffect: where no rate follows `key`.
        Refused: where the first loss is not finite, or the data, or the time, end too soon.
    """
    rates = sweep(
        num_steps=settings.num_steps,
        lowest=settings.lowest,
        highest=settings.highest,
        mode=settings.mode.value,
    )
    # an average does not touch the loss that is trained on
    config, elsewhere = config.but(averaging=None), None
    if key is not None:
        # one that a model of its own may read and not use
        rates_elsewhere = Rates()
        other = config.changed({key: base / 2}).but(averaging=None)
        fit(throwaway(other, steps=rates_elsewhere, validates=False))
        elsewhere = rates_elsewhere.found
    sweeping = RateSweep(
        rates=rates,
        base=base,
        divergence=settings.divergence,
        optimizer=optimizer,
        from_now=from_now,
        elsewhere=elsewhere,
    )
    run = throwaway(
        config,
        steps=sweeping,
        validates=False,
        callbacks=[*callbacks, RateBar(sweeping)],
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
    if sweeping.is_ineffective:
        raise NoEffect(
            f"{key} has no effect: the optimizers have the rates {elsewhere} at {base:g} and at "
            f"{base / 2:g}; type tuner.lr.key=KEY"
        )
    if sweeping.losses and not math.isfinite(sweeping.losses[0]):
        raise Refused(
            f"tuner.lr needs a finite loss to begin with, got {sweeping.losses[:1]}; look at the "
            "data and the model, or use tuner=none"
        )
    if len(sweeping.losses) < FEWEST and not sweeping.has_diverged:
        raise Refused(
            f"tuner.lr needs the losses of {FEWEST} optimizer steps at least, and got those of "
            f"{len(sweeping.losses)} from {sweeping.num_batches} micro-batches; look at the data, "
            "and at trainer.max_minutes, or use tuner=none"
        )
    return rates, sweeping.losses, complete
