"""The finders inside a fit, at the start of given epochs."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.seed import isolate_rng

from app.accumulate import EffectiveBatch
from app.config import Config
from app.errors import Refused
from app.optim import rate_of
from app.parallel.split import share_of
from app.process.ranks import ranks
from app.throwaway.rates import scale_rates
from app.throwaway.trace import left_as_found
from app.tuner.find import batch_size_of, say
from app.tuner.keys import BATCH_SIZE_KEYS, tuned_key
from app.tuner.lr import range_test
from app.tuner.lr_rules import suggest
from app.tuner.plots import draw_batch_size, draw_lr

if TYPE_CHECKING:
    from conf.tuner.schema import BatchSize, LearningRate


class LrAtMilestones(pl.Callback):
    """Searches the learning rate again, say after unfreezing, and goes on from the answer.

    Acts in `on_train_epoch_start`. The sweep runs on a throwaway model with the weights, frozen or
    not, and the optimizer state of this moment: the run itself, its averages, its loaders and its
    random state are not touched. One multiplier moves all parameter groups and what schedules
    compute them from, so that a schedule continues from the new rate; where one would not, that is
    said, and nothing changed. A second model and optimizer are in memory meanwhile.

    Args:
        config: of the run.
        epochs: at whose start it searches, > 0.
        settings: of the finder.
    """

    def __init__(self, *, config: Config, epochs: Sequence[int], settings: "LearningRate") -> None:
        self.found: dict[int, float] = {}
        self._config = config
        self._epochs = list(epochs)
        self._settings = settings

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epoch = trainer.current_epoch
        if epoch not in self._epochs:
            return
        settings = self._settings
        base = float(rate_of(trainer.optimizers[0]) or 0)
        with isolate_rng(), left_as_found(self._config.plain):
            lrs, losses, complete = range_test(
                self._config,
                settings=settings,
                base=base,
                optimizer=None,
                from_now=True,
                callbacks=[Transplant(trainer, pl_module)],
            )
        if not complete:
            raise KeyboardInterrupt
        found = suggest(lrs, losses, rule=settings.rule.value)
        path = Path(self._config.run_dir) / f"lr_find_epoch_{epoch}"
        if ranks().is_first:
            draw_lr(lrs, losses, found, key="learning rate", path=path)
        if found.doubt is not None:
            say(f"tuner: epoch {epoch}: {found.doubt}")
        if found.lr is None or (found.doubt is not None and settings.on_doubt == "keep"):
            return
        unscaled = scale_rates(trainer, found.lr / base)
        if unscaled is not None:
            say(
                f"tuner: epoch {epoch}: the learning rate stays {base:.3g}: {unscaled} would not "
                f"go on from {found.lr:.3g}; for no search type 'tuner.milestones=[]'"
            )
            return
        say(f"tuner: epoch {epoch}: learning rate {base:.3g} -> {found.lr:.3g}")
        self.found[epoch] = found.lr

    def state_dict(self) -> dict[str, Any]:
        return {"found": dict(self.found)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.found = dict(state_dict["found"])


class BatchSizeAtMilestones(pl.Callback):
    """Searches the micro-batch again, say after unfreezing, and serves the answer from there on.

    Acts in `on_train_epoch_end`, before the epoch of the milestone, whose loaders are then made
    anew. The probes run on throwaway objects beside the run, whose memory counts as used. With
    `accumulate=effective` the effective batch stays what was asked for.

    Args:
        config: of the run.
        epochs: at whose start it searches, > 0.
        settings: of the finder.
    """

    def __init__(self, *, config: Config, epochs: Sequence[int], settings: "BatchSize") -> None:
        self._config = config
        self._epochs = list(epochs)
        self._key = tuned_key(
            config.plain,
            chosen=settings.key,
            candidates=BATCH_SIZE_KEYS,
            setting="tuner.batch_size.key",
        )

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        if epoch not in self._epochs:
            return
        with isolate_rng(), left_as_found(self._config.plain):
            answer, reason, _ = batch_size_of(self._config, key=self._key)
        if not answer.complete:
            raise KeyboardInterrupt
        say(f"tuner: epoch {epoch}: {self._key}={answer.size}: {reason}")
        path = Path(self._config.run_dir) / f"batch_size_epoch_{epoch}"
        draw_batch_size(answer, reason=reason, key=self._key, path=path)
        self._serve(trainer, answer.size)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        owner, name = self._owner(trainer)
        checkpoint["tuned_batch_size"] = getattr(owner, name)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if "tuned_batch_size" in checkpoint:
            self._serve(trainer, checkpoint["tuned_batch_size"])

    def _serve(self, trainer: pl.Trainer, size: int) -> None:
        owner, name = self._owner(trainer)
        setattr(owner, name, size)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, EffectiveBatch):
                callback.set_micro_batch_size(size, world_size=share_of(trainer).size)

    def _owner(self, trainer: pl.Trainer) -> tuple[Any, str]:
        """The object that makes the loaders, and its attribute that says their batch size."""
        group, _, name = self._key.partition(".")
        owner = trainer.lightning_module if group == "model" else trainer.datamodule  # type: ignore[attr-defined]
        if not hasattr(owner, name):
            raise Refused(
                f"tuner.milestones cannot change {self._key}: {type(owner).__name__} does not keep "
                f"it as its attribute {name}; type tuner.batch_size=null"
            )
        return owner, name


class Transplant(pl.Callback):
    """Gives a throwaway run the weights, the frozen state and the optimizer state of another, and
    its epoch: callbacks freeze by it."""

    def __init__(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        self._epoch = trainer.current_epoch
        self._model = model
        self._optimizers = trainer.optimizers

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epochs: Any = trainer.fit_loop.epoch_progress.current
        epochs.completed = epochs.processed = self._epoch
        pl_module.load_state_dict(self._model.state_dict())
        mine = dict(pl_module.named_parameters())
        names = {parameter: name for name, parameter in self._model.named_parameters()}
        for parameter, name in names.items():
            mine[name].requires_grad_(parameter.requires_grad)
        for twin, optimizer in zip(trainer.optimizers, self._optimizers, strict=True):
            for group in optimizer.param_groups[len(twin.param_groups) :]:
                added = [mine[names[parameter]] for parameter in group["params"]]
                twin.add_param_group({**group, "params": added})  # of a fine-tuning callback
            twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def finders_of(config: Config) -> list[pl.Callback]:
    """The finders that a configuration wants inside its fit."""
    tuner = config.tuner
    found: list[pl.Callback] = []
    if tuner is None or not tuner.milestones:
        return found
    at: Any = {"config": config, "epochs": tuner.milestones}
    if tuner.batch_size is not None:
        found.append(BatchSizeAtMilestones(**at, settings=tuner.batch_size))
    if tuner.lr is not None:
        found.append(LrAtMilestones(**at, settings=tuner.lr))
    return found
