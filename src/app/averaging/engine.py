"""What every average does: when Lightning calls it, what it shows, saves, delivers and resumes."""

import copy
import inspect
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from app.averaging.shadow import Shadow
from app.averaging.twin import (
    STATISTICS,
    evaluate,
    evaluator_like,
    norms_of,
    recompute_norms,
    stand_in,
)
from app.errors import Refused
from app.parallel.sharded import Sharded

RAW = "raw_weights"
WIDE = "averaged_weights_float32"

log = logging.getLogger(__name__)


class Averaging(pl.Callback, ABC):
    """Keeps the average, shows it to whatever evaluates, saves or delivers, and resumes it exactly.

    Acts in `on_train_batch_end`: counts batches in which an optimizer really stepped (two that step
    in one batch are one step) and updates where the rule says so. A rule has two methods:
    `should_update` and `weight`. The state belongs to one fit.

    Args:
        start_step: optimizer steps trained before averaging may begin, >= 0; None: no bound.
        every_n_steps: optimizer steps from update to update; None: at the end of each epoch.
        validate: averaged, raw or both: whose metrics a validation measures. `both` evaluates the
            raw weights as well, on their own, and logs `raw_<metric>`, once averaging has started.
        bn_batches: training batches from which the average's BatchNorm statistics are computed; a
            checkpoint written inside an epoch without a validation holds averaged ones. None:
            averages the running statistics.

    Raises:
        Refused: where `bn_batches` cannot act, or a second average is in the same trainer.
    """

    def __init__(
        self,
        *,
        start_step: int | None,
        every_n_steps: int | None,
        validate: str,
        bn_batches: int | None,
    ) -> None:
        self.start_step = start_step
        self.every_n_steps = every_n_steps
        self.validate = validate
        self.bn_batches = bn_batches
        self._handles: list[RemovableHandle] = []
        self._files: _AveragedCheckpoints | None = None
        self._sharded: Sharded | None = None
        self._shadow: Shadow | None = None
        self._evaluator: pl.Trainer | None = None
        self._restored: dict[str, dict[str, Tensor]] = {}
        self._restored_averages: dict[str, Tensor] = {}
        self._raw_metrics: dict[str, float] = {}
        self._norms: list[str] = []
        self._stepped = False  # in this batch
        self._reset()

    @abstractmethod
    def should_update(self, *, step: int, epoch: int, epoch_end: bool) -> bool:
        """Whether to update now.

        Asked after each optimizer step, and, with `epoch_end`, before the validation that follows
        the last batch of each epoch in which weights changed since the last update.

        Args:
            step: the optimizer step just made, counted from 0.
            epoch: the epoch it belongs to, counted from 0.
            epoch_end: False after a step, True at the end of the epoch.
        """

    @abstractmethod
    def weight(self, *, num_updates: int) -> float:
        """The share, 0 to 1, of the present weights in the average; `num_updates` went before."""

    @abstractmethod
    def starts_at(self) -> str:
        """The keys that say when the average starts, as typed."""

    def step_metrics(self) -> dict[str, float]:
        """The number of models in the average."""
        return {"averaged_models": float(self._num_updates)}

    # what Lightning calls, in the order in which it does

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._release(trainer)
        if stage != "fit":
            return
        self._reset()
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if sum(isinstance(callback, Averaging) for callback in callbacks) > 1:
            raise Refused(
                "averaging must be one average a run, got several; keep one of the callbacks"
            )
        self._sharded = trainer.strategy if isinstance(trainer.strategy, Sharded) else None
        if self._sharded is not None:  # only the first rank would write, and all have to gather
            self._sharded.showing = self._showing
            return
        self._files = _AveragedCheckpoints(self, pl_module, trainer.strategy.checkpoint_io)
        trainer.strategy.checkpoint_io = self._files

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn == "fit":
            found = [key for key in (RAW, WIDE) if key in checkpoint]
            self._restored = {key: checkpoint[key] for key in found}
            self._restored_averages = checkpoint["state_dict"] if found else {}

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._sharded is None:
            return
        if self._shadow is None:
            checkpoint |= self._restored
            return
        with self._showing(average=False):
            raw = self._sharded.gathered_weights()
        averaged = set(self._shadow.names().values())
        checkpoint[RAW] = {name: tensor for name, tensor in raw.items() if name in averaged}
        if wider := self._shadow.whole_wider():
            checkpoint[WIDE] = wider

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._num_steps = state_dict["num_steps"]
        self._num_updates = state_dict["num_updates"]
        self._moved = state_dict["moved"]
        self._ended_epoch = state_dict["ended_epoch"]
        self._norms_stale = state_dict["norms_stale"]

    def state_dict(self) -> dict[str, Any]:
        return {
            "num_steps": self._num_steps,
            "num_updates": self._num_updates,
            "moved": self._moved,
            "ended_epoch": self._ended_epoch,
            "norms_stale": self._norms_stale,
        }

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._check_norms(trainer, pl_module)
        if self.validate == "both":
            self._evaluator = evaluator_like(trainer)
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
            step, epoch = self._num_steps - 1, trainer.current_epoch
            if self.should_update(step=step, epoch=epoch, epoch_end=False):
                self._update(pl_module)
        if trainer.is_last_batch or _stops_here(trainer):
            self._end_epoch(trainer.current_epoch, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._raw_metrics = {}
        if self._shadow is None:
            return
        self._refresh_norms(trainer, pl_module)
        if self._evaluator is not None:
            self._raw_metrics = evaluate(trainer, pl_module, self._evaluator)
        if self.validate != "raw":
            self._swap(self._shadow)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for name, value in self._raw_metrics.items():
            name = name.replace("/dataloader_idx_", "_dataloader_")  # Lightning keeps that name
            pl_module.log(f"raw_{name}", value, sync_dist=trainer.world_size > 1)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._show_raw()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end_epoch(trainer.current_epoch, pl_module)  # if it ended without a last batch
        self._refresh_norms(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._remove_hooks()
        if self._shadow is None:
            rank_zero_warn(
                f"averaging never started: {self.starts_at()} was not reached in "
                f"{self._num_steps} optimizer steps and {trainer.current_epoch} epochs, so the run "
                "delivers its raw weights; let averaging start earlier, or type averaging=none"
            )
            return
        self._refresh_norms(trainer, pl_module)
        self._swap(self._shadow)
        self._delivered = True
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
            self._release(trainer)

    # how

    def _reset(self) -> None:
        self._num_steps = 0
        self._num_updates = 0
        self._stepped = False
        self._moved = False  # since the last update
        self._ended_epoch = -1
        self._norms = []
        self._norms_stale = False
        self._scan_due = False
        self._delivered = False
        self._shadow, self._evaluator = None, None
        self._restored, self._restored_averages, self._raw_metrics = {}, {}, {}

    def _release(self, trainer: pl.Trainer) -> None:
        """Let go of what one fit held; the model keeps what it shows."""
        self._remove_hooks()
        self._show_raw()
        self._shadow, self._evaluator = None, None
        self._restored, self._restored_averages = {}, {}
        if self._sharded is not None:
            self._sharded.showing, self._sharded = nullcontext, None
        files, self._files = self._files, None
        if files is not None and trainer.strategy.checkpoint_io is files:
            trainer.strategy.checkpoint_io = files.inner

    @contextmanager
    def _showing(self, *, average: bool = True) -> Iterator[None]:
        """Show the average, once it has begun, or the raw weights."""
        shadow = self._shadow
        swaps = shadow is not None and shadow.average_is_live != average
        if shadow is not None and swaps:
            self._swap(shadow)
        try:
            yield
        finally:
            if shadow is not None and swaps:
                self._swap(shadow)

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _swap(self, shadow: Shadow) -> None:
        if self._sharded is not None:
            self._sharded.free_gathered()  # what was gathered before would not know of the swap
        shadow.swap()

    def _show_raw(self) -> None:
        if self._shadow is not None and self._shadow.average_is_live and not self._delivered:
            self._swap(self._shadow)

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

    def _update(self, pl_module: pl.LightningModule) -> None:
        if self._shadow is None:
            self._shadow = Shadow(pl_module, sharded=self._sharded is not None)
            self._note_norms(pl_module)
            log.info(
                f"averaging={type(self).__name__.lower()} starts at optimizer step "
                f"{self._num_steps}"
            )
        else:
            if self._scan_due:
                self._shadow.scan()
                self._note_norms(pl_module)
            self._shadow.update(self.weight(num_updates=self._num_updates))
        self._scan_due, self._moved = False, False
        self._num_updates += 1
        self._norms_stale = True

    def _end_epoch(self, epoch: int, pl_module: pl.LightningModule) -> None:
        if epoch == self._ended_epoch:
            return
        self._ended_epoch = epoch
        step = self._num_steps - 1
        if self._moved and self.should_update(step=step, epoch=epoch, epoch_end=True):
            self._update(pl_module)

    def _check_norms(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model = type(pl_module).__name__
        if self._sharded is not None and self.bn_batches is not None and norms_of(pl_module):
            raise Refused(
                f"averaging.bn_batches runs a copy of {model}, which cannot be made of sharded "
                "weights; type averaging.bn_batches=null"
            )
        instead = "type averaging.bn_batches=null to average the running statistics instead"
        if self.bn_batches is not None and norms_of(pl_module):
            if not pl_module.automatic_optimization:
                raise Refused(
                    f"averaging.bn_batches cannot act with {model}: it steps its own optimizers "
                    f"(automatic_optimization=False); {instead}"
                )
            if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
                raise Refused(
                    f"averaging.bn_batches cannot act with {model}: its training_step takes "
                    f"dataloader_iter; {instead}"
                )
            stand_in(pl_module, trainer)

    def _note_norms(self, pl_module: pl.LightningModule) -> None:
        if self.bn_batches is not None:
            self._norms = [name for name, norm in norms_of(pl_module) if norm.training]

    def _refresh_norms(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._shadow is None or not self._norms_stale or not self._norms:
            return
        assert self.bn_batches is not None
        assert not self._shadow.average_is_live
        self._norms_stale = False
        self._swap(self._shadow)
        done = recompute_norms(trainer, pl_module, names=self._norms, num_batches=self.bn_batches)
        self._shadow.adopt(f"{norm}.{key}" for norm in self._norms for key in STATISTICS)
        self._swap(self._shadow)
        if not done:
            rank_zero_warn(
                f"averaging.bn_batches={self.bn_batches} found no training batch: the data yields "
                "none a second time, so the running statistics are averaged instead; type "
                "averaging.bn_batches=null"
            )

    def _resume(self, pl_module: pl.LightningModule) -> None:
        restored, self._restored = self._restored, {}
        averages, self._restored_averages = self._restored_averages, {}
        if RAW not in restored and self._num_updates == 0:
            return
        keep = restored.get(RAW, {})
        self._shadow = Shadow(pl_module, keep=keep, sharded=self._sharded is not None)
        if RAW in restored and self._sharded is not None:  # the average is what was loaded
            self._shadow.adopt_shards(restored.get(WIDE, {}))
            self._sharded.scatter_weights({**averages, **restored[RAW]}, strict=False)
        elif RAW in restored:
            names = self._shadow.names()
            averages = {  # again: 64-true loads it before the model is of that precision
                names[id(tensor)]: averages[key]
                for key, tensor in pl_module.state_dict(keep_vars=True).items()
                if key in averages and id(tensor) in names
            }
            self._shadow.restore(restored[RAW], {**averages, **restored.get(WIDE, {})})
        else:
            rank_zero_warn(
                "the checkpoint holds an average but no raw weights: it was written after its run "
                "had ended; training goes on from the average"
            )
        if self._num_updates == 0:
            self._shadow = None
            log.info("the checkpoint is of another kind of average: this one starts anew")
        self._note_norms(pl_module)

    def averaged(self, checkpoint: dict[str, Any], pl_module: pl.LightningModule) -> dict[str, Any]:
        """The checkpoint with the average for state dict, and the raw weights beside it.

        Files that hold the weights only get no raw ones.
        """
        is_whole = "optimizer_states" in checkpoint
        if self._shadow is None:
            return {**checkpoint, **self._restored} if is_whole else checkpoint
        tensors = self._shadow.tensors()
        names = self._shadow.names()
        state = copy.copy(checkpoint["state_dict"])
        for key, tensor in pl_module.state_dict(keep_vars=True).items():
            if key in state and id(tensor) in names:
                state[key] = tensors[names[id(tensor)]][0]
        checkpoint = {**checkpoint, "state_dict": state}
        if is_whole:
            checkpoint[RAW] = {name: raw for name, (_, raw) in tensors.items()}
            if wider := self._shadow.wider():
                checkpoint[WIDE] = wider
        return checkpoint


class _AveragedCheckpoints(CheckpointIO):
    """Puts the average into every file, also those for which Lightning calls no callback."""

    def __init__(
        self, averaging: Averaging, pl_module: pl.LightningModule, inner: CheckpointIO
    ) -> None:
        self.inner = inner
        self._averaging = averaging
        self._module = pl_module

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        averaged = self._averaging.averaged(checkpoint, self._module)
        self.inner.save_checkpoint(averaged, path, storage_options=storage_options)

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        if map_location is None:  # the inner one's own default
            return self.inner.load_checkpoint(path, weights_only=weights_only)
        return self.inner.load_checkpoint(path, map_location, weights_only)

    def remove_checkpoint(self, path: Any) -> None:
        self.inner.remove_checkpoint(path)

    def teardown(self) -> None:
        self.inner.teardown()


def _stops_here(trainer: pl.Trainer) -> bool:
    """Whether Lightning ends the run after this batch, wherever in its epoch that is."""
    if trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps:
        return True
    return (
        trainer.should_stop
        and (trainer.min_epochs is None or trainer.current_epoch >= trainer.min_epochs)
        and (trainer.min_steps is None or trainer.global_step >= trainer.min_steps)
    )
