"""What every average does: when Lightning calls it, what it shows, saves, delivers and resumes."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from app.averaging.files import (
    AVERAGES,
    RAW,
    around_next_save,
    keep_once,
    read,
    refuse_weights_only,
    written,
)
from app.averaging.norms import STATISTICS, norms_of, recompute_norms, refuse_norms
from app.averaging.shadow import AVERAGE, Sets, Shadow, Watch, loaded_otherwise, moves
from app.averaging.validation import Validation
from app.errors import Refused
from app.parallel.data_parallel import make_buffers_alike
from app.parallel.sharded import Sharded

STATE = ("num_steps", "num_updates", "moved", "ended_epoch", "norms_stale", "shared",
         "began_after")  # fmt: skip
"""What a checkpoint holds of an average beside its tensors."""

log = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
class Averaging(pl.Callback):
    """Keeps the average, shows it to whatever evaluates, saves or delivers, and resumes it exactly.

    Acts in `on_train_batch_end`: counts batches in which an optimizer really stepped (two that step
    in one batch are one step) and updates where the rule says so. A rule is a subclass, a dataclass
    as this one; it overrides what is not as here: `first_epoch`, `should_update`, `averages`, and
    `weight` or, where the average is no step towards the present weights, `update`. As it stands it
    is the mean over all updates. The state belongs to one fit.

    Any Trainer of Lightning will do, but where a checkpoint is of weights only, of which no
    callback is told: that needs an `AveragingTrainer`.

    Args:
        start_step: optimizer steps trained before averaging may begin, >= 0; None: no bound.
        every_n_steps: optimizer steps from update to update; None: at the end of each epoch.
        validate: averaged, raw or both: whose metrics a validation measures. `both` runs it on the
            raw weights first, without a trace, and logs `raw_<metric>`, once averaging has started.
        bn_batches: training batches from which the average's BatchNorm statistics are computed; a
            checkpoint written inside an epoch without a validation holds averaged ones. None:
            averages the running statistics.

    Raises:
        Refused: where `bn_batches` cannot act, a second average is in the same trainer, or a
            checkpoint would be of the raw weights.
    """

    start_step: int | None
    every_n_steps: int | None
    validate: str
    bn_batches: int | None

    def __post_init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._begins_at_once = False
        self._reset()

    def _reset(self) -> None:
        self._first_epoch: int | None = None
        self._num_steps = 0
        self._num_updates = 0
        self._began_after: int | None = None
        self._stepped = False  # in this batch
        self._moved = False  # since the last update
        self._ended_epoch = -1
        self._norms: list[str] = []
        self._norms_stale = False
        self._scan_due = False
        self._delivered = False
        self._sharded: Sharded | None = None
        self._shadow: Shadow | None = None
        self._watch: Watch | None = None  # while a validation runs
        self._shared: list[str] = []  # buffers that a validation has changed
        self._restored: Sets | None = None
        self._edited: dict[str, Tensor] = {}
        self._raw_metrics: dict[str, float] = {}

    def first_epoch(self, trainer: pl.Trainer) -> int | None:
        """Epochs trained before averaging may begin; None: no bound. Asked once, at the start."""
        return None

    def should_update(self, *, step: int, epoch: int, epoch_end: bool) -> bool:
        """Whether to update now.

        Asked after each optimizer step, and, with `epoch_end`, before the validation that follows
        the last batch of each epoch in which weights changed since the last update.

        Args:
            step: the optimizer step just made, counted from 0.
            epoch: the epoch it belongs to, counted from 0.
            epoch_end: False after a step, True at the end of the epoch.
        """
        if not self.has_started(step=step, epoch=epoch):
            return False
        if self.every_n_steps is None:
            return epoch_end
        return not epoch_end and (step + 1 - (self.start_step or 0)) % self.every_n_steps == 0

    def has_started(self, *, step: int, epoch: int) -> bool:
        """Whether an optimizer step, counted from 0, may be averaged."""
        first_step, first_epoch = self.start_step or 0, self._first_epoch or 0
        return step >= first_step and epoch >= first_epoch

    def weight(self, *, num_updates: int) -> float:
        """The share, 0 to 1, of the present weights in the average; `num_updates` went before."""
        return 1 / (num_updates + 1)

    def update(self, shadow: Shadow, *, num_updates: int) -> None:
        """Take the present weights into the average, of which they are the first at 0 updates.

        Sets that the rule keeps in the shadow are in the checkpoints, and restored from them.
        """
        if num_updates > 0:
            shadow.update(self.weight(num_updates=num_updates))

    def averages(self, name: str, tensor: Tensor) -> bool:
        """Whether a floating parameter or buffer is averaged; if not, both models share it.

        A buffer that a validation changes, other than a BatchNorm's, is never asked for again.
        """
        return moves(name, tensor)

    def begin_at_once(self) -> None:
        """Average from the first step on, after each: for a throwaway run, whose memory counts."""
        self._begins_at_once = True
        self.bn_batches, self.validate = None, "averaged"

    @property
    def has_begun(self) -> bool:
        """Whether there is an average, which is then what the run delivers."""
        return self._num_updates > 0

    @property
    def began_after(self) -> int | None:
        """The optimizer step after which the first weights went into the average, from 1."""
        return self._began_after

    def step_metrics(self) -> dict[str, float]:
        """The number of models in the average."""
        return {"averaged_models": float(self._num_updates)}

    @contextmanager
    def showing(self, pl_module: pl.LightningModule, *, average: bool = True) -> Iterator[None]:
        """Show the average, once it has begun, or the raw weights."""
        if self._restored:  # not yet gone on from
            self._resume(pl_module)
        shadow = self._shadow
        swaps = shadow is not None and shadow.average_is_live != average
        if shadow is not None and swaps:
            self._swap(shadow)
        try:
            yield
        finally:
            if shadow is not None and swaps:
                self._swap(shadow)

    # what Lightning calls, in the order in which it does

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._release()
        if stage != "fit":
            return
        self._reset()
        if not isinstance(trainer, AveragingTrainer):
            refuse_weights_only(trainer)
        if len(averages_of(trainer)) > 1:
            raise Refused(
                "averaging must be one average a run, got several; keep one of the callbacks"
            )
        self._sharded = trainer.strategy if isinstance(trainer.strategy, Sharded) else None
        if self.validate == "both":
            loop = trainer.fit_loop.epoch_loop
            loop.val_loop = Validation(trainer, self._measure_raw, instead_of=loop.val_loop)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn == "fit" and RAW in checkpoint:
            self._restored = checkpoint.pop(AVERAGES)
            loaded = loaded_otherwise(pl_module, self._restored[AVERAGE], self._averages)
            asks = trainer.strategy.reduce_boolean_decision(bool(loaded), all=False)
            self._edited = loaded if read(trainer, pl_module, checkpoint, asks=asks) else {}

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._shadow is None:
            return
        if not self._shadow.average_is_live:  # the trainer is none of ours
            with self.showing(pl_module):
                checkpoint["state_dict"] = trainer.strategy.lightning_module_state_dict()
        state = checkpoint["state_dict"]
        with self.showing(pl_module, average=False):
            raw = written(trainer, pl_module, checkpoint)
            if self._sharded is not None:
                keep_once(raw["state_dict"], state)
        sets = self._shadow.whole_sets(here=trainer.is_global_zero)
        if self._sharded is not None:
            keep_once(sets[AVERAGE], state)
        checkpoint |= {RAW: raw, AVERAGES: sets}
        if not self._shadow.average_is_live:
            around_next_save(pl_module, self.showing(pl_module))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name in STATE:
            setattr(self, f"_{name}", state_dict.get(name))

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, f"_{name}") for name in STATE}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._first_epoch = self.first_epoch(trainer)
        if self.bn_batches is not None:
            refuse_norms(trainer, pl_module)
        if self._shadow is None:
            self._resume(pl_module)
        self._handles = [
            optimizer.register_step_post_hook(self._note_step) for optimizer in trainer.optimizers
        ]

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._scan_due = True  # at the next update: other callbacks unfreeze after this one

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self._stepped:
            self._stepped, self._moved = False, True
            self._num_steps += 1
            self._update_if_due(trainer.current_epoch, pl_module, epoch_end=False)
        if trainer.is_last_batch or _stops_here(trainer):
            self._end_epoch(trainer.current_epoch, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != "fit":
            return
        if self._shadow is not None:
            self._refresh_norms(trainer, pl_module)
            if self.validate != "raw":
                self._swap(self._shadow)
        make_buffers_alike(trainer, pl_module)
        self._watch = Watch(pl_module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for name, value in self._raw_metrics.items():
            name = name.replace("/dataloader_idx_", "_dataloader_")  # Lightning keeps that name
            pl_module.log(f"raw_{name}", value, sync_dist=trainer.world_size > 1)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._share_changed(pl_module)
        self._watch, self._raw_metrics = None, {}
        self._show_raw()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end_epoch(trainer.current_epoch, pl_module)  # if it ended without a last batch
        self._refresh_norms(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._remove_hooks()
        if self._shadow is None:
            rank_zero_warn(
                f"averaging never started: {self._starts_at()} was not reached in "
                f"{self._num_steps} optimizer steps and {trainer.current_epoch} epochs, so the run "
                "delivers its raw weights; let averaging start earlier, or type averaging=none"
            )
            return
        self._refresh_norms(trainer, pl_module)
        self._deliver()
        log.info(
            f"averaging: the run delivers the average of {self._num_updates} updates; the raw "
            f"weights are in its checkpoints, under {RAW!r}"
        )

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._remove_hooks()
        self._show_raw()  # the average stays: a checkpoint may yet be written

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            if self._restored:  # nothing was left to train
                self._resume(pl_module)
                self._deliver()
            self._release()

    # how

    def _release(self) -> None:
        """Let go of what one fit held; the model keeps what it shows."""
        self._remove_hooks()
        self._show_raw()
        self._shadow, self._sharded, self._restored, self._watch = None, None, None, None
        self._edited = {}

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _averages(self, name: str, tensor: Tensor) -> bool:
        return name not in self._shared and self.averages(name, tensor)

    def _measure_raw(self, validation: Validation) -> None:
        if self._shadow is not None:
            self._raw_metrics = validation.measure()

    def _share_changed(self, pl_module: nn.Module) -> None:
        """Let both models have the buffers that this validation has changed up to now.

        Not those of a BatchNorm, which belong to the weights.
        """
        changed = self._watch.changed() if self._watch is not None else set()
        if changed:
            changed -= {f"{norm}.{key}" for norm, _ in norms_of(pl_module) for key in STATISTICS}
        if changed:
            self._shared = sorted(changed.union(self._shared))
            if self._shadow is not None:
                self._shadow.share(self._shared)

    def _swap(self, shadow: Shadow) -> None:
        if shadow.average_is_live:
            self._share_changed(shadow.module)
        if self._sharded is not None:
            self._sharded.free_gathered()  # what was gathered before would not know of the swap
        shadow.swap()

    def _show_raw(self) -> None:
        if self._shadow is not None and self._shadow.average_is_live and not self._delivered:
            self._swap(self._shadow)

    def _deliver(self) -> None:
        if self._shadow is not None:
            self._swap(self._shadow)
            self._delivered = True

    def _note_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Note that an optimizer stepped, unless nothing had a gradient or the scaler refused."""
        refused = getattr(optimizer, "found_inf", None)
        if refused is not None and refused.item():
            return
        self._stepped = self._stepped or any(
            parameter.grad is not None
            for group in optimizer.param_groups
            for parameter in group["params"]
        )

    def _update_if_due(self, epoch: int, pl_module: pl.LightningModule, *, epoch_end: bool) -> None:
        due = not epoch_end
        if not self._begins_at_once:
            step = self._num_steps - 1
            due = self.should_update(step=step, epoch=epoch, epoch_end=epoch_end)
        if not due:
            return
        if self._shadow is None:
            self._shadow = Shadow(pl_module, self._averages)
            log.info(f"averaging: {type(self).__name__} starts at optimizer step {self._num_steps}")
            self._note_norms(pl_module)
        elif self._scan_due:
            self._shadow.scan()
            self._note_norms(pl_module)
        if self._num_updates == 0:
            self._began_after = self._num_steps
        self.update(self._shadow, num_updates=self._num_updates)
        self._scan_due, self._moved = False, False
        self._num_updates += 1
        self._norms_stale = True

    def _end_epoch(self, epoch: int, pl_module: pl.LightningModule) -> None:
        if epoch != self._ended_epoch:
            self._ended_epoch = epoch
            if self._moved:
                self._update_if_due(epoch, pl_module, epoch_end=True)

    def _starts_at(self) -> str:
        """The keys that say when the average starts, as typed."""
        keys = sorted(field.name for field in fields(self) if field.name.startswith("start"))
        typed = [
            f"averaging.{key}={value}"
            for key in (*keys, "every_n_steps")
            if (value := getattr(self, key)) is not None
        ]
        return " with ".join(typed) or "the end of an epoch"

    def _note_norms(self, pl_module: pl.LightningModule) -> None:
        if self.bn_batches is not None:
            self._norms = [name for name, norm in norms_of(pl_module) if norm.training]

    def _refresh_norms(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._shadow is None or not self._norms_stale or not self._norms:
            return
        assert self.bn_batches is not None
        self._norms_stale = False
        with self.showing(pl_module):
            done = recompute_norms(
                trainer, pl_module, names=self._norms, num_batches=self.bn_batches
            )
            self._shadow.adopt([f"{norm}.{key}" for norm in self._norms for key in STATISTICS])
        if not done:
            rank_zero_warn(
                f"averaging.bn_batches={self.bn_batches} found no training batch: the data yields "
                "none a second time, so the running statistics are averaged instead; type "
                "averaging.bn_batches=null"
            )

    def _resume(self, pl_module: pl.LightningModule) -> None:
        restored, self._restored = self._restored, None
        edited, self._edited = self._edited, {}
        if self._num_updates == 0:
            if restored is not None:
                log.info("the checkpoint is of another kind of average: this one starts anew")
            return
        if restored is None:
            rank_zero_warn(
                "the checkpoint holds an average but no raw weights: it was written after its run "
                "had ended; training goes on from the average"
            )
        self._shadow = Shadow(pl_module, self._averages, restored, edited)
        self._note_norms(pl_module)


class AveragingTrainer(pl.Trainer):
    """Lightning's Trainer, whose checkpoints are made while the average is shown.

    All of them: of each callback, of the user's own hooks, with weights only, of an exception. What
    the model makes of its weights there it makes of the average; `Averaging` adds the raw ones.
    """

    def save_checkpoint(
        self, filepath: Any, weights_only: bool | None = None, storage_options: Any | None = None
    ) -> None:
        averages = averages_of(self)
        with averages[0].showing(self.lightning_module) if averages else nullcontext():
            super().save_checkpoint(filepath, weights_only, storage_options)


def averages_of(trainer: pl.Trainer) -> list[Averaging]:
    """The averages among the callbacks of a trainer."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, Averaging)]


def _stops_here(trainer: pl.Trainer) -> bool:
    """Whether Lightning ends the run after this batch, wherever in its epoch that is."""
    if trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps:
        return True
    return (
        trainer.should_stop
        and (trainer.min_epochs is None or trainer.current_epoch >= trainer.min_epochs)
        and (trainer.min_steps is None or trainer.global_step >= trainer.min_steps)
    )
