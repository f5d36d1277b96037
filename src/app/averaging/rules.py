"""The averages: when to update, and by how much."""

import math
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from app.accumulate import num_steps
from app.averaging.engine import Averaging
from app.errors import Refused
from app.optim import TIMES

__all__ = ["Ema", "FromEpoch", "Swa", "Uniform"]


def decay_of(
    *,
    decay: float | None,
    half_life_steps: float | None,
    horizon: float,
    num_steps: float,
    every_n_steps: int,
) -> float:
    """The share of the average that one update keeps: 0 to below 1.

    Given, or from the half-life, or such that it remembers `horizon` of a run of `num_steps`.
    Raises Refused where the length is needed and unknown (not a positive finite number).
    """
    if decay is not None:
        return decay
    if half_life_steps is not None:
        return float(0.5 ** (every_n_steps / half_life_steps))
    if not 0 < num_steps < math.inf:
        raise Refused(
            "averaging.decay must be given where the length of the run is not known, got null; "
            "type averaging.decay=0.999, or give the run a length with trainer.max_steps"
        )
    return max(0.0, 1 - every_n_steps / (horizon * num_steps))


def warmed_up(*, decay: float, num_updates: int, gamma: float, power: float) -> float:
    """The decay of update `num_updates` (from 0) while it grows to `decay`. Source: timm."""
    return min(decay, float(1 - (1 + num_updates / gamma) ** -power))


def annealed(*, start: float, end: float, progress: float, strategy: str) -> float:
    """From `start` to `end` while progress goes from 0 to 1, as cos or linear. As torch's SWALR."""
    progress = min(1.0, progress)
    share = (1 - math.cos(math.pi * progress)) / 2 if strategy == "cos" else progress
    return start + (end - start) * share


def first_epoch(*, start: int | float, max_epochs: int | None) -> int:
    """The epoch, from 0, that a number of epochs (int) or a share of the run (float) stands for.

    Raises Refused for a share of a run without a number of epochs.
    """
    if isinstance(start, int):
        return start
    if max_epochs is None or max_epochs < 0:
        raise Refused(
            "averaging.start must be a number of epochs or null where trainer.max_epochs sets no "
            f"end, got {start}; type averaging.start=10, or averaging.start=null "
            "averaging.start_step=1000"
        )
    return math.floor(round(start * max_epochs, 9))


@dataclass(kw_only=True, eq=False)
class FromEpoch(Averaging):
    """An average that may be given an epoch to begin at.

    Args:
        start_epoch: epochs trained before averaging may begin, >= 0; None: no bound.
        start_step, every_n_steps, validate, bn_batches: see `Averaging`.
    """

    start_epoch: int | None

    def first_epoch(self, trainer: pl.Trainer) -> int | None:
        return self.start_epoch


@dataclass(kw_only=True, eq=False)
class Uniform(FromEpoch):
    """The mean over all updates."""


@dataclass(kw_only=True, eq=False)
class Ema(FromEpoch):
    """Exponential moving average of the weights; see `decay_of` and `warmed_up` for the decay.

    Args:
        decay: share of the average that an update keeps, 0 to below 1; or None.
        half_life_steps: optimizer steps after which weights count half, > 0; or None.
        horizon: share of the run that is remembered where both are None, above 0 to 1.
        warmup: whether the decay grows to its value.
        warmup_gamma: updates that the warm-up is counted in, > 0.
        warmup_power: exponent of the warm-up, > 0.
    """

    every_n_steps: int
    decay: float | None
    half_life_steps: float | None
    horizon: float
    warmup: bool
    warmup_gamma: float
    warmup_power: float

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._decay = decay_of(
            decay=self.decay,
            half_life_steps=self.half_life_steps,
            horizon=self.horizon,
            num_steps=num_steps(trainer, trainer.estimated_stepping_batches),
            every_n_steps=self.every_n_steps,
        )
        super().on_train_start(trainer, pl_module)

    def weight(self, *, num_updates: int) -> float:
        if not self.warmup:
            return 1 - self._decay
        return 1 - warmed_up(
            decay=self._decay,
            num_updates=num_updates,
            gamma=self.warmup_gamma,
            power=self.warmup_power,
        )

    def step_metrics(self) -> dict[str, float]:
        """The decay of the next update; nothing before the first."""
        if self._num_updates == 0:
            return {}
        return {"ema_decay": 1 - self.weight(num_updates=self._num_updates)}


@dataclass(kw_only=True, eq=False)
class Swa(Averaging):
    """The mean over the ends of the epochs from the start to the last, at a rate of its own.

    The rate is set in `on_train_batch_start`, in every group of every optimizer, from the first
    batch that may be averaged on, over whatever a scheduler says. Source: arXiv 1803.05407;
    Lightning's averages the ends of the epochs before.

    Args:
        start: epochs trained before (int), or that share of trainer.max_epochs (float); or None.
        lr: the rate, > 0, one for all (times the `lr_scale` of its parameter group) or a list with
            one a group; or None.
        lr_factor: the rate where `lr` is None, > 0, as a share of what each group's is when
            averaging begins; None as well leaves the schedule alone.
        anneal_epochs: epochs from the rate at the start to that one, >= 0; or None.
        anneal_steps: the same in optimizer steps, >= 0; or None.
        anneal_strategy: cos or linear.
        start_step, every_n_steps, validate, bn_batches: see `Averaging`.

    Raises:
        Refused: where `lr` is a list of another length than there are parameter groups, or more
            than ten times the rate of a group, or `start` a share of a run without a number of
            epochs.
    """

    start: int | float | None
    lr: float | list[float] | None
    lr_factor: float | None
    anneal_epochs: int | None
    anneal_steps: int | None
    anneal_strategy: str

    def _reset(self) -> None:
        super()._reset()
        self._rates: list[float] = []  # of the groups, when the annealing began
        self._annealing_since = [-1, -1]  # epoch, optimizer step

    def begin_at_once(self) -> None:
        super().begin_at_once()
        self.start = self.lr = self.lr_factor = None

    def first_epoch(self, trainer: pl.Trainer) -> int | None:
        if self.start is None:
            return None
        return first_epoch(start=self.start, max_epochs=trainer.max_epochs)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        groups, model = _groups(trainer), type(pl_module).__name__
        if isinstance(self.lr, list) and len(self.lr) != len(groups):
            raise Refused(
                f"averaging.lr must be one number, or {len(groups)} for the parameter groups of "
                f"{model}, got {self.lr}; type averaging.lr={self.lr[0]}"
            )
        for index, group in enumerate(groups if self.lr is not None else ()):
            rate = max(float(group.get(key) or 0) for key in ("lr", "initial_lr", "max_lr"))
            typed = self._typed(group, index)
            if rate and typed > 10 * rate * (1 + 1e-9):
                raise Refused(
                    f"averaging.lr must be at most ten times the rate of the run, which is "
                    f"{rate:g} in parameter group {index} of {model}, got {typed:g}; for half of "
                    "the run's rate type averaging.lr=null averaging.lr_factor=0.5"
                )
        super().on_train_start(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        epoch = trainer.current_epoch
        is_scheduled = self.lr is None and self.lr_factor is None
        if is_scheduled or not self.has_started(step=self._num_steps, epoch=epoch):
            return
        groups = _groups(trainer)
        if not self._rates:
            self._annealing_since = [epoch, self._num_steps]
        self._rates += [float(group["lr"]) for group in groups[len(self._rates) :]]
        targets = self._targets(groups, pl_module, epoch)
        progress = self._annealing_progress(epoch)
        for group, rate, target in zip(groups, self._rates, targets, strict=True):
            value = annealed(
                start=rate, end=target, progress=progress, strategy=self.anneal_strategy
            )
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(value)
            else:
                group["lr"] = value

    def state_dict(self) -> dict[str, Any]:
        annealing = {"rates": list(self._rates), "annealing_since": list(self._annealing_since)}
        return {**super().state_dict(), **annealing}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._rates = list(state_dict["rates"])
        self._annealing_since = list(state_dict["annealing_since"])

    def _typed(self, group: dict[str, Any], index: int) -> float:
        """What `lr` says of a group."""
        assert self.lr is not None
        return self.lr[index] if isinstance(self.lr, list) else self.lr * group.get(TIMES, 1.0)

    def _targets(
        self, groups: list[dict[str, Any]], pl_module: pl.LightningModule, epoch: int
    ) -> list[float]:
        """The rate of each group at the end of the annealing."""
        if self.lr is None:
            assert self.lr_factor is not None
            return [self.lr_factor * rate for rate in self._rates]
        if isinstance(self.lr, list) and len(self.lr) != len(self._rates):
            raise Refused(
                f"averaging.lr must have a rate for each of the {len(self._rates)} parameter "
                f"groups of {type(pl_module).__name__}, of which some were added in epoch {epoch}, "
                f"got {self.lr}; type one rate for all, averaging.lr={self.lr[0]}, or "
                "averaging.lr=null for averaging.lr_factor"
            )
        return [self._typed(group, index) for index, group in enumerate(groups)]

    def _annealing_progress(self, epoch: int) -> float:
        since_epoch, since_step = self._annealing_since
        if self.anneal_steps is not None:
            return _share(self._num_steps - since_step, self.anneal_steps)
        assert self.anneal_epochs is not None
        return _share(epoch - since_epoch, self.anneal_epochs)


def _groups(trainer: pl.Trainer) -> list[dict[str, Any]]:
    """The parameter groups of all optimizers."""
    return [group for optimizer in trainer.optimizers for group in optimizer.param_groups]


def _share(done: int, whole: int) -> float:
    return 1.0 if done >= whole else done / whole
