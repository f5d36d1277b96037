"""Continuing a run bit-exactly: the random state, the place in the data, and what is trained."""

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from app.parallel.split import share_of
from app.process.random_state import (
    draw_apart,
    random_state,
    sampling_state,
    set_random_state,
    under,
)
from app.process.ranks import ranks
from app.resume.held import Held, held_by
from app.resume.hooks import switch_off
from app.resume.modes import modes_of, set_modes, set_trained
from app.resume.position import ResumableLoader, resumable
from app.resume.unfinished import Unfinished


class ExactResume(pl.Callback):
    """Keeps the random state and the position in the data of every rank with each checkpoint.

    And which parameters were trained, which norms tracked, the mode of each module, and what the
    modules count and draw from. Restores all of it when a continued fit starts to train. In a new
    fit the ranks but the first draw from generators of their own from there on: dropout differs
    between shares of the data.

    Args:
        fillers: of `ResumableLoader`.

    Attributes:
        metrics: what was measured when the checkpoint was written that the fit continues from: a
            fit that had already ended measures nothing again.
        repeats_validation: whether the checkpoints of a running validation are written as if it had
            not begun, so that a continued fit makes it first.
    """

    def __init__(self, fillers: set[int] | None = None) -> None:
        self._fillers = fillers
        self.repeats_validation = False
        self._before_validation: dict[str, Any] = {}
        self._unfinished = Unfinished()
        self._held: Held | None = None
        self._loaders: list[ResumableLoader] = []
        self._made_from: dict[str, Any] = {}
        self._positions: list[dict[str, Any]] = []
        self._has_started = False
        self.metrics: dict[str, float] = {}
        self._restored: dict[str, Any] | None = None
        self._weights: dict[str, Any] | None = None
        self._begins_again = False
        self._max_steps: int | None = None

    @contextmanager
    def making(self) -> Iterator[None]:
        """Let `train_dataloader` draw what it drew in the fit that is continued, and, made anew
        within one, what rank 0 draws."""
        if made_from := (self._restored or {}).get("made_from"):
            set_random_state(made_from)
        self._made_from = random_state()
        is_apart = self._has_started or bool(made_from)  # the ranks began with one state
        state = ranks().first(sampling_state) if is_apart else {}
        with under(state) if is_apart and not ranks().is_first else nullcontext():
            yield

    def resumable(self, loaders: Any) -> Any:
        """What `train_dataloader` returned, made to find its place again."""
        loaders, self._loaders = resumable(loaders, self._fillers)
        for loader in self._loaders:
            loader.waits = self._has_started and loader.asks_ahead  # made anew, for its epoch
        self._restore_positions()
        return loaders

    def _restore_positions(self) -> None:
        """Tell the loaders where they stand, once it is known and they are there; again where they
        are made anew before the first batch."""
        if not self._loaders:
            return
        for loader, position in zip(self._loaders, self._positions, strict=bool(self._positions)):
            loader.restore(position, epoch=position["epoch"])

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        mid_epoch = not trainer.is_last_batch
        if self.repeats_validation:
            _rewind_validation(checkpoint)
        mine = {
            **(
                self._before_validation
                if self.repeats_validation
                else self._now(trainer, epoch_ends=not mid_epoch)
            ),
            "positions": [
                loader.position(mid_epoch=mid_epoch, is_ahead=mid_epoch and _is_ahead(trainer))
                for loader in self._loaders
            ],
            "epoch": trainer.current_epoch,
            "modes": modes_of(trainer, pl_module),
        }
        if trainer.reload_dataloaders_every_n_epochs:  # type: ignore[attr-defined]
            mine["made_from"] = self._made_from
        metrics = trainer.callback_metrics.items()
        checkpoint["metrics"] = self.metrics | {name: float(value) for name, value in metrics}
        checkpoint["resume"] = [mine]
        if trainer.world_size > 1:
            checkpoint["resume"] = [mine] * trainer.world_size
            torch.distributed.all_gather_object(checkpoint["resume"], mine)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.metrics = checkpoint.get("metrics", {})
        every_rank = checkpoint.get("resume")
        self._restored = every_rank and every_rank[trainer.global_rank]
        if self._restored:
            epoch = {"epoch": self._restored["epoch"]}
            self._positions = [{**one, **epoch} for one in self._restored["positions"]]
        has_begun = bool(self._loaders)  # sharded weights are restored late
        self._restore_positions()
        self._begins_again = has_begun
        self._weights = checkpoint["state_dict"]
        steps = trainer.max_steps
        if trainer.state.fn == "fit" and checkpoint["global_step"] < steps:
            self._max_steps = steps
            if trainer.strategy.restore_checkpoint_after_setup:
                self._hide_max_steps(trainer)

    def _hide_max_steps(self, trainer: pl.Trainer) -> None:
        """Let Lightning restore its loops as in a fit without a number of steps: in one with it, it
        takes an epoch that has ended for one that goes on."""
        trainer.fit_loop.epoch_loop.max_steps = -1

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._max_steps is not None:
            self._hide_max_steps(trainer)
        weights, self._weights = self._weights, None
        if weights is not None and trainer.precision == "64-true":
            # Lightning has loaded them before the model was of that precision
            pl_module.load_state_dict(weights)
        if self._restored is not None:  # the model, or a callback, may have frozen them in setup
            set_trained(pl_module, self._restored["modes"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._has_started = True
        if self._max_steps is not None:
            trainer.fit_loop.epoch_loop.max_steps, self._max_steps = self._max_steps, None
        restored, self._restored = self._restored, None
        self._held = held_by(pl_module)
        if restored is None:
            draw_apart(share_of(trainer).rank)
            return
        if self._begins_again and _is_ahead(trainer):  # drop what was fetched before
            iter(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]
        self._unfinished.restore(trainer, pl_module, restored["unfinished"])
        set_modes(pl_module, restored["modes"])
        if "held" in restored:
            self._held.set_state(restored["held"], device=pl_module.device)
        for name, value in self.metrics.items():
            trainer.callback_metrics[name] = _as_measured(value)
        set_random_state(restored["random_state"])
        self._before_validation = restored  # the fit may begin with a validation

    def begin_epoch(self, model: pl.LightningModule, on_train_epoch_start: Any) -> None:
        """Call a model's own hook, and fetch the first batch anew where it was asked for early."""
        on_train_epoch_start()
        if any(loader.waits for loader in self._loaders):
            for loader in self._loaders:
                loader.waits = False
            if model.trainer.fit_loop.is_resuming:  # Lightning itself does only in later epochs
                iter(model.trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self._positions = []
        self._unfinished.go_on(trainer)
        if not self._unfinished.waiting:
            switch_off(self, "on_train_batch_start")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._unfinished.end(trainer, pl_module)

    def note_before_validation(self, trainer: pl.Trainer) -> None:
        """Note the state before a validation draws random numbers, starts workers, or measures."""
        self._before_validation = self._now(trainer, epoch_ends=False)

    def _now(self, trainer: pl.Trainer, *, epoch_ends: bool) -> dict[str, Any]:
        model = trainer.lightning_module
        unfinished = self._unfinished.state(trainer, model, epoch_ends=epoch_ends)
        held = self._held.state() if self._held is not None else None
        kept = {} if held is None else {"held": held}
        return {"random_state": random_state(), "unfinished": unfinished, **kept}


def _as_measured(value: float) -> Tensor:
    """A metric as it was, in the precision that holds it."""
    single = torch.tensor(value)
    return single if float(single) == value else torch.tensor(value, dtype=torch.float64)


def _is_ahead(trainer: pl.Trainer) -> bool:
    """Whether Lightning has asked for one batch more than it has trained on.

    It does where no length tells the last one, and the model does not fetch batches itself.
    """
    step = inspect.signature(trainer.lightning_module.training_step)
    return trainer.num_training_batches == math.inf and "dataloader_iter" not in step.parameters


def _rewind_validation(checkpoint: dict[str, Any]) -> None:
    """Let Lightning, where it loads the checkpoint, go back to the first batch of a validation.

    It goes back to one of which a batch was started and not processed, and then skips none.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
    done = {"ready": 0, "started": 0, "processed": 0, "completed": 0}
    progress["current"] = {**done, "ready": 1, "started": 1}
    progress["total"] = {**done, "ready": 1, "started": 1}
    progress["is_last_batch"] = False
