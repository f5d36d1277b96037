"""Gradient accumulation: the mean over the micro-batches of a window, whatever its length."""

import inspect
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from app.errors import Refused
from app.parallel.data_parallel import DataParallel, rescale
from app.parallel.sharded import placed_like
from app.parallel.sizes import accumulation_factor
from app.parallel.split import mean_over_ranks, micro_batch_size, samples_of_epoch, share_of

__all__ = ["Accumulation", "ConstantAccumulation", "EffectiveBatch", "ScheduledAccumulation"]


def scheduled_factor(factors: Mapping[int, int], position: int) -> int:
    """The factor in force at an epoch or optimizer step: that of the last start passed."""
    return factors[max(start for start in factors if start <= position)]


def count_steps(
    *, num_batches: int, num_epochs: int, by_epoch: Mapping[int, int], by_step: Mapping[int, int]
) -> int:
    """Optimizer steps of a run of `num_epochs` epochs of `num_batches` micro-batches.

    The factor is the product of both schedules. A window ends with its epoch.
    """
    step = 0
    for epoch in range(num_epochs):
        batch = 0
        while batch < num_batches:
            factor = scheduled_factor(by_epoch, epoch) * scheduled_factor(by_step, step)
            windows = math.ceil((num_batches - batch) / factor)
            next_change = min((start for start in by_step if start > step), default=math.inf)
            windows = int(min(windows, next_change - step))
            step += windows
            batch += windows * factor
    return step


class Window(int):
    """The accumulation window a run is in; its number is the factor.

    Lightning asks `batches % trainer.accumulate_grad_batches == 0` for "is an edge of a window
    here?", both to zero the gradients and to step, which is true only for factors that never
    change within an epoch. A Window answers that question for the window it stands for.

    Attributes:
        start, end: in micro-batches of the epoch.
        ends: whether the end is an edge: after a None, only where a step was made all the same.
    """

    start: int
    end: int
    ends: bool

    def __new__(cls, factor: int, start: int) -> "Window":
        window = super().__new__(cls, factor)
        window.start = start
        window.end = start + factor
        window.ends = True
        return window

    def __getnewargs__(self) -> tuple[int, int]:  # type: ignore[override]
        return int(self), self.start

    def __rmod__(self, num_batches: int) -> int:
        is_edge = num_batches == self.start or (self.ends and num_batches == self.end)
        return 0 if is_edge else 1


class Accumulation(pl.Callback):
    """Opens a window on its first micro-batch; on its last one rescales the gradient to the mean.

    Lightning divides each loss by the factor, so only a window that turned out shorter, or one
    with weights, costs a pass over the gradients. Stands before all other callbacks: they see the
    loss, not the loss over the factor. A checkpoint written inside a window holds its gradients.

    Args:
        weight_by: key or attribute of the batch that holds its count; None weights all alike.

    Raises:
        Refused: where the model steps its own optimizers (manual optimization), with LBFGS
            (it evaluates a batch several times a step), where a batch lacks `weight_by`, or the
            trainer accumulates too.
    """

    def __init__(self, *, weight_by: str | None) -> None:
        self.weight_by = weight_by
        self._window: Window | None = None
        self._num_batches = 0
        self._total_weight = 0.0
        self._weight = 1.0
        self._gradients: dict[str, Tensor] = {}
        self._stays_as_begun = False
        self._num_ranks: int | None = None
        self._parallel: DataParallel | None = None
        self._is_open = self._has_stepped = False

    @property
    @abstractmethod
    def schedules(self) -> tuple[Mapping[int, int], Mapping[int, int]]:
        """Factors by first epoch and by first optimizer step."""

    def total_steps(self, *, num_batches: int, num_epochs: int) -> int:
        """Optimizer steps of the whole run."""
        by_epoch, by_step = self.schedules
        return count_steps(
            num_batches=num_batches, num_epochs=num_epochs, by_epoch=by_epoch, by_step=by_step
        )

    def stay_as_begun(self, *, num_ranks: int | None) -> None:
        """Keep the factor of the first optimizer step: for a throwaway run.

        Args:
            num_ranks: ranks that such a run stands for; None: as many as it has.
        """
        self._stays_as_begun, self._num_ranks = True, num_ranks

    @staticmethod
    def refuse_manual_optimization(pl_module: pl.LightningModule) -> None:
        """Raise ValueError where the model steps its own optimizers."""
        if not pl_module.automatic_optimization:
            raise Refused(
                f"accumulate cannot act with {type(pl_module).__name__}: it steps its own "
                "optimizers (automatic_optimization=False); accumulate inside its training_step "
                "and use accumulate=none"
            )

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self.refuse_manual_optimization(pl_module)
        given = trainer.accumulate_grad_batches
        if given != 1 and not isinstance(given, Window):
            raise Refused(
                f"trainer.accumulate_grad_batches must be 1 beside an accumulation, got {given}; "
                "leave it out"
            )
        if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
            raise Refused(
                f"accumulate cannot act with {type(pl_module).__name__}, whose training_step takes "
                "dataloader_iter: Lightning does not tell when its batches begin; let it take "
                "batch, or use accumulate=none"
            )
        self._gradients = {}
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        self._parallel = next((c for c in callbacks if isinstance(c, DataParallel)), None)
        self._open(trainer, 0)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._is_open = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in trainer.optimizers):
            raise _evaluates_again(trainer)
        if self._gradients:
            for name, parameter in pl_module.named_parameters():
                if name in self._gradients:
                    parameter.grad = placed_like(parameter, self._gradients[name])
            self._gradients = {}

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        window, self._has_stepped = self._window, False
        assert window is not None
        # not `== end`: that batch may be one that the loader left out by yielding None
        if not (self._is_open and window.start <= batch_idx < window.end):
            window = self._open(trainer, batch_idx)
            self._is_open = True
        window.ends = batch_idx + 1 == window.end
        counts = self.weight_by is not None
        self._weight = self._count(batch, self.weight_by) if self.weight_by is not None else 1.0
        if self._parallel is not None and self._parallel.only_fills(batch_idx, counts=counts):
            self._weight = 0.0

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        if self._has_stepped and self._window != 1:  # as SAM does
            raise _evaluates_again(trainer)
        weight = self._weight
        self._num_batches += 1
        self._total_weight += weight
        if weight != 1.0:
            loss.register_hook(lambda gradient: gradient * weight)  # type: ignore[no-untyped-call]

    def on_before_optimizer_step(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        assert self._window is not None
        total = self._mean_weight(trainer, pl_module)
        if total != float(self._window):
            stepped = (p for group in optimizer.param_groups for p in group["params"])
            rescale(stepped, self._window / total if total else None)
        self._num_batches, self._total_weight = 0, 0.0
        self._has_stepped = True

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        assert self._window is not None
        if batch is None and self._num_batches:
            self._step_after_none(trainer, pl_module, batch_idx)
        if self._window != 1 and isinstance(outputs, dict) and "loss" in outputs:
            outputs["loss"] = outputs["loss"] * int(self._window)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._window is None:  # saved without a fit, after validating or testing
            return
        checkpoint["accumulation"] = {
            "factor": int(self._window),
            "start": self._window.start,
            "num_batches": self._num_batches,
            "total_weight": self._mean_weight(trainer, pl_module),
            # only the first rank writes: each then goes on with the mean, which adds up to the same
            "gradients": {
                name: self._saved(trainer, parameter.grad)
                for name, parameter in pl_module.named_parameters()
                if self._num_batches and parameter.grad is not None
            },
        }

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # only a fit goes on inside a window
        if trainer.state.fn != "fit" or "accumulation" not in checkpoint:
            return
        saved = checkpoint["accumulation"]
        self._window = trainer.accumulate_grad_batches = Window(saved["factor"], saved["start"])
        self._is_open = True
        self._num_batches, self._total_weight = saved["num_batches"], saved["total_weight"]
        self._gradients = saved["gradients"]

    @staticmethod
    def _saved(trainer: pl.Trainer, gradient: Tensor) -> Tensor:
        if isinstance(gradient, DTensor):
            return gradient.full_tensor()  # of all ranks already
        return mean_over_ranks(trainer, gradient)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        trainer.accumulate_grad_batches = 1

    def step_metrics(self) -> dict[str, float]:
        """The factor in force."""
        assert self._window is not None
        return {"accumulation_factor": float(self._window)}

    def _step_after_none(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch_idx: int
    ) -> None:
        """Make the step of a window whose last micro-batch is None, which Lightning passes over."""
        window, loop = self._window, trainer.fit_loop.epoch_loop
        assert window is not None
        if batch_idx + 1 != window.end and not trainer.is_last_batch:
            return
        step = loop.automatic_optimization.optim_progress.optimizer.step
        step.increment_ready()
        nothing = torch.zeros((), device=pl_module.device)
        optimizer: Any = pl_module.optimizers()
        pl_module.optimizer_step(trainer.current_epoch, batch_idx, optimizer, lambda: nothing)
        step.increment_completed()
        window.ends = True
        if not trainer.is_last_batch:  # there Lightning has stepped the schedules
            loop.update_lr_schedulers("step", update_plateau_schedulers=False)

    def _open(self, trainer: pl.Trainer, batch_idx: int) -> Window:
        by_epoch, by_step = self.schedules
        begun = self._stays_as_begun
        factor = scheduled_factor(by_epoch, 0 if begun else trainer.current_epoch)
        factor *= scheduled_factor(by_step, 0 if begun else trainer.global_step)
        self._window = trainer.accumulate_grad_batches = Window(factor, batch_idx)
        self._is_open = False
        self._num_batches, self._total_weight = 0, 0.0
        return self._window

    def _mean_weight(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> float:
        if trainer.world_size == 1 or not (
            self.weight_by is not None or (self._parallel and self._parallel.may_lack_batches)
        ):
            return self._total_weight
        weight = torch.tensor(self._total_weight, dtype=torch.float64, device=pl_module.device)
        return float(mean_over_ranks(trainer, weight))

    @staticmethod
    def _count(batch: Any, key: str) -> float:
        in_mapping = isinstance(batch, Mapping) and key in batch
        count = batch[key] if in_mapping else getattr(batch, key, None)
        if count is None or callable(count):  # `count` is a method of every tuple
            held = f"holds {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else None
            raise Refused(
                f"accumulate.weight_by must name a key or attribute of the batch, got {key}; "
                f"the batch {held or f'is a {type(batch).__name__}'}"
            )
        return float(count.sum() if isinstance(count, Tensor) else count)


def _evaluates_again(trainer: pl.Trainer) -> Refused:
    return Refused(
        f"accumulate cannot act with {type(trainer.optimizers[0]).__name__}, which evaluates a "
        "batch several times a step; use accumulate=none"
    )


def num_steps(trainer: pl.Trainer, estimate: int | float) -> int | float:
    """Optimizer steps of the whole run, exactly; inf where neither data nor limits tell.

    Args:
        estimate: Lightning's `estimated_stepping_batches`, which takes one factor for all epochs.
    """
    if estimate == -1:  # data without a length, and no max_steps
        return math.inf
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    accumulation = next((c for c in callbacks if isinstance(c, Accumulation)), None)
    if accumulation is None or math.inf in (estimate, trainer.num_training_batches):
        return estimate
    if trainer.max_epochs in (None, -1):
        return estimate
    assert trainer.max_epochs is not None
    steps = accumulation.total_steps(
        num_batches=int(trainer.num_training_batches), num_epochs=trainer.max_epochs
    )
    return steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)


class ConstantAccumulation(Accumulation):
    """The same `factor` (>= 1) throughout."""

    def __init__(self, *, factor: int, weight_by: str | None) -> None:
        super().__init__(weight_by=weight_by)
        self.factor = factor

    @property
    def schedules(self) -> tuple[Mapping[int, int], Mapping[int, int]]:
        return {0: self.factor}, {0: 1}


class ScheduledAccumulation(Accumulation):
    """The factor of the last start passed, counted in epochs or optimizer steps from 0.

    Lightning's GradientAccumulationScheduler knows epochs only and starts a resumed epoch at 1.
    """

    def __init__(
        self, *, by: str, starts: Sequence[int], factors: Sequence[int], weight_by: str | None
    ) -> None:
        super().__init__(weight_by=weight_by)
        self.by = by
        self.starts = list(starts)
        self.factors = list(factors)

    @property
    def schedules(self) -> tuple[Mapping[int, int], Mapping[int, int]]:
        factors = dict(zip(self.starts, self.factors, strict=True))
        return ({0: 1}, factors) if self.by == "step" else (factors, {0: 1})

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        batches = trainer.num_training_batches
        if self._stays_as_begun or self.by == "epoch":
            return
        if batches == math.inf or trainer.max_epochs in (None, -1):
            return
        assert trainer.max_epochs is not None
        steps = self.total_steps(num_batches=int(batches), num_epochs=trainer.max_epochs)
        late = [start for start in self.starts if start >= steps]
        if late:
            raise Refused(
                f"accumulate.starts has {late}, which the run of {steps} optimizer steps never "
                "reaches; leave them out"
            )


class EffectiveBatch(Accumulation):
    """The factor that makes micro-batch x factor x world size exactly `batch_size`.

    Raises:
        Refused: where there is no such factor, or the loader's micro-batch is another one.
    """

    def __init__(self, *, batch_size: int, micro_batch_size: int, weight_by: str | None) -> None:
        super().__init__(weight_by=weight_by)
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self._factor = 1

    @property
    def schedules(self) -> tuple[Mapping[int, int], Mapping[int, int]]:
        return {0: self._factor}, {0: 1}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self.set_micro_batch_size(
                self.micro_batch_size, world_size=self._num_ranks or share_of(trainer).size
            )
        super().setup(trainer, pl_module, stage)

    def set_micro_batch_size(self, size: int, *, world_size: int) -> None:
        """Go on from another micro-batch, at the same effective batch, from the next window on."""
        self._factor = accumulation_factor(
            batch_size=self.batch_size, micro_batch_size=size, world_size=world_size
        )
        self.micro_batch_size = size

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        loader = trainer.train_dataloader
        served, samples = micro_batch_size(loader), samples_of_epoch(loader)
        if samples is not None and samples < self.batch_size:
            world_size = self._num_ranks or share_of(trainer).size
            size = max(1, min(self.micro_batch_size, samples // world_size))
            raise Refused(
                f"accumulate.batch_size must be at most the {samples} samples of an epoch, got "
                f"{self.batch_size}; type a micro-batch of {size} and accumulate.batch_size="
                f"{samples // (size * world_size) * size * world_size or size * world_size}"
            )
        if served not in (None, self.micro_batch_size):
            raise Refused(
                f"accumulate.micro_batch_size must be the loader's batch size {served}, "
                f"got {self.micro_batch_size}; type accumulate.micro_batch_size={served}"
            )
