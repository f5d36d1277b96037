"""Continuing a run bit-exactly: the random state, the place in the data, and what is trained."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import CombinedLoader, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from app.errors import Refused
from app.parallel.split import rebuilt, share_of
from app.process.random_state import draw_apart, random_state, set_random_state
from app.run.hooks import switch_off
from app.run.measured import Measured
from app.run.modes import modes_of, set_modes, set_trained

log = logging.getLogger(__name__)


class ResumableLoader:
    """A loader of training batches whose position a checkpoint can hold.

    A loader with `state_dict` and `load_state_dict` finds its place itself. Any other one over a
    map-style data set is started from the random state its epoch began with, and the batches that
    were trained on are drawn again and dropped: samplers, augmentations and worker processes then
    stand where they stood. An iterable data set without a state starts anew and says so.

    Iterating begins when the first batch is asked for, so that a restored position is in time.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = without_persistent_workers(loader)
        self._epoch_start: dict[str, Any] = {}
        self._num_served = 0
        self._restored: dict[str, Any] | None = None

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # not yet set: a copy is being made
            raise AttributeError(name)
        return getattr(self.loader, name)

    def state_dict(self) -> dict[str, Any]:
        """Empty: Lightning asks, and restores it in some cases only; ExactResume does in all."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Nothing: see `state_dict`."""

    def __iter__(self) -> Iterator[Any]:
        restored, self._restored = self._restored, None
        after = random_state()
        if restored is not None:
            self._set_generators(restored["generators"])
            set_random_state(restored["epoch_start"])
        self._epoch_start = {"epoch_start": random_state(), "generators": self._generators()}
        self._num_served = 0
        batches = iter(self.loader)
        if restored is not None:
            for self._num_served in range(1, restored["num_served"] + 1):
                next(batches)
            set_random_state(after)
        for batch in batches:
            self._num_served += 1
            yield batch

    def position(self, *, mid_epoch: bool) -> dict[str, Any]:
        """Where the loader stands, in plain values; empty between epochs if it has no state."""
        if _is_stateful(self.loader):
            return {"loader": self.loader.state_dict()}
        if self._restored is not None:  # no batch was asked for since
            return self._restored
        if not mid_epoch:
            return {"generators": self._generators()}
        return {**self._epoch_start, "num_served": self._num_served}

    def restore(self, position: Mapping[str, Any], *, epoch: int) -> None:
        """Go on from what `position` returned with the next batch asked for."""
        if "loader" in position:
            self.loader.load_state_dict(position["loader"])
        elif "num_served" not in position:
            self._set_generators(position["generators"])
        elif isinstance(getattr(self.loader, "dataset", None), IterableDataset):
            rank_zero_warn(
                f"resuming in epoch {epoch}: the iterable data set has no state_dict, so its first "
                f"{position['num_served']} batches, already trained on, are served again"
            )
        else:
            log.info(
                f"resuming in epoch {epoch}: drawing {position['num_served']} batches again to "
                "find the place in the data"
            )
            self._restored = dict(position)

    def _own_generators(self) -> list[torch.Generator]:
        loader = self.loader
        holders = (loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None))
        found = [getattr(holder, "generator", None) for holder in holders]
        return [generator for generator in found if isinstance(generator, torch.Generator)]

    def _generators(self) -> list[torch.Tensor]:
        return [generator.get_state() for generator in self._own_generators()]

    def _set_generators(self, states: list[torch.Tensor]) -> None:
        for generator, state in zip(self._own_generators(), states, strict=True):
            generator.set_state(state)


def without_persistent_workers(loader: Any) -> Any:
    """The same loader with new workers every epoch: the random state of kept ones is out of reach.

    Raises Refused for a subclass of DataLoader that keeps its workers.
    """
    if not getattr(loader, "persistent_workers", False):
        return loader
    if type(loader) is not DataLoader:
        raise Refused(
            f"{type(loader).__name__} keeps its workers between epochs, and their random state "
            "cannot be saved; give it persistent_workers=False, or type resume=never"
        )
    return rebuilt(loader, persistent_workers=False)


def resumable(loaders: Any) -> tuple[Any, list[ResumableLoader]]:
    """What `train_dataloader` returned with each loader in it made resumable, and those loaders."""
    if not isinstance(loaders, CombinedLoader):
        if not isinstance(loaders, Mapping | list | tuple):
            loader = ResumableLoader(loaders)
            return loader, [loader]
        loaders = CombinedLoader(loaders, "max_size_cycle")
    found = [ResumableLoader(loader) for loader in loaders.flattened]
    loaders.flattened = found
    return loaders, found


class ExactResume(pl.Callback):
    """Keeps the random state and the position in the data of every rank with each checkpoint.

    And which parameters were trained, which norms tracked, and the mode of each module. Restores
    all of it when a continued fit starts to train. In a new fit the ranks but the first draw
    from generators of their own from there on: dropout differs between shares of the data.

    Attributes:
        metrics: what was measured when the checkpoint was written that the fit continues from: a
            fit that had already ended measures nothing again.
        repeats_validation: whether the checkpoints of a running validation are written as if it had
            not begun, so that a continued fit makes it first.
    """

    def __init__(self) -> None:
        self.repeats_validation = False
        self._before_validation: dict[str, Any] = {}
        self._measured = Measured()
        self._loaders: list[ResumableLoader] = []
        self.metrics: dict[str, float] = {}
        self._restored: dict[str, Any] | None = None
        self._weights: dict[str, Any] | None = None

    def resumable(self, loaders: Any) -> Any:
        """What `train_dataloader` returned, made to find its place again."""
        loaders, self._loaders = resumable(loaders)
        return loaders

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        mid_epoch = not trainer.is_last_batch
        if self.repeats_validation:
            _rewind_validation(checkpoint)
        mine = {
            **(self._before_validation if self.repeats_validation else self._now(trainer)),
            "positions": [loader.position(mid_epoch=mid_epoch) for loader in self._loaders],
            "modes": modes_of(trainer, pl_module),
        }
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
        self._weights = checkpoint["state_dict"]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        weights, self._weights = self._weights, None
        if weights is not None and trainer.precision == "64-true":
            # Lightning has loaded them before the model was of that precision
            pl_module.load_state_dict(weights)
        if self._restored is not None:  # the model, or a callback, may have frozen them in setup
            set_trained(pl_module, self._restored["modes"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        restored, self._restored = self._restored, None
        if restored is None:
            draw_apart(share_of(trainer).rank)
            return
        for loader, position in zip(self._loaders, restored["positions"], strict=True):
            loader.restore(position, epoch=trainer.current_epoch)
        self._measured.restore(trainer, pl_module, restored["measured"])
        set_modes(pl_module, restored["modes"])
        for name, value in self.metrics.items():
            trainer.callback_metrics[name] = _as_measured(value)
        set_random_state(restored["random_state"])
        self._before_validation = restored  # the fit may begin with a validation

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self._measured.go_on(trainer)
        if not self._measured.waiting:
            switch_off(self, "on_train_batch_start")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._measured.go_on(trainer)
        self._measured.waiting = {}

    def note_before_validation(self, trainer: pl.Trainer) -> None:
        """Note the state before a validation draws random numbers, starts workers, or measures."""
        self._before_validation = self._now(trainer)

    def _now(self, trainer: pl.Trainer) -> dict[str, Any]:
        measured = self._measured.state(trainer, trainer.lightning_module)
        return {"random_state": random_state(), "measured": measured}


def _as_measured(value: float) -> Tensor:
    """A metric as it was, in the precision that holds it."""
    single = torch.tensor(value)
    return single if float(single) == value else torch.tensor(value, dtype=torch.float64)


def _rewind_validation(checkpoint: dict[str, Any]) -> None:
    """Let Lightning, where it loads the checkpoint, go back to the first batch of a validation.

    It goes back to one of which a batch was started and not processed, and then skips none.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
    done = {"ready": 0, "started": 0, "processed": 0, "completed": 0}
    progress["current"] = {**done, "ready": 1, "started": 1}
    progress["total"] = {**done, "ready": 1, "started": 1}
    progress["is_last_batch"] = False


def _is_stateful(loader: Any) -> bool:
    return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
