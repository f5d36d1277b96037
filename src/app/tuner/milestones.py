"""The learning-rate finder inside a fit, at the start of given epochs."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.seed import isolate_rng
from torch.optim import Optimizer

from app.tuner.lr import range_test
from app.tuner.lr_rules import suggest
from app.tuner.plots import draw_lr

SCALED = ("lr", "initial_lr", "max_lr", "min_lr")
"""Entries of a parameter group that schedules compute the learning rate from."""


class LrAtMilestones(pl.Callback):
    """Searches the learning rate again, say after unfreezing, and goes on from the answer.

    Acts in `on_train_epoch_start`. The sweep runs on a throwaway model with the weights, frozen or
    not, and the optimizer state of this moment: the run itself, its averages, its loaders and its
    random state are not touched. One multiplier moves all parameter groups and what schedules
    compute them from, so that a schedule continues from the new rate. A second model and optimizer
    are in memory meanwhile.

    Args:
        config: the checked, resolved configuration of the run.
    """

    def __init__(self, *, config: Mapping[str, Any]) -> None:
        self.found: dict[int, float] = {}
        self._config = config

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epoch = trainer.current_epoch
        if epoch not in self._config["tuner"]["milestones"]:
            return
        settings = self._config["tuner"]["lr"]
        base = float(trainer.optimizers[0].param_groups[0]["lr"])
        with isolate_rng():
            lrs, losses, complete = range_test(
                self._config,
                settings=settings,
                base=base,
                optimizer=None,
                from_now=True,
                callbacks=[Transplant(pl_module, trainer.optimizers)],
            )
        if not complete:
            raise KeyboardInterrupt
        found = suggest(lrs, losses, rule=settings["rule"])
        path = Path(self._config["run_dir"]) / f"lr_find_epoch_{epoch}"
        draw_lr(lrs, losses, found, key="learning rate", path=path)
        if found.doubt is not None:
            print(f"tuner: epoch {epoch}: {found.doubt}", flush=True)
        if found.lr is None or (found.doubt is not None and settings["on_doubt"] == "keep"):
            return
        print(f"tuner: epoch {epoch}: learning rate {base:.3g} -> {found.lr:.3g}", flush=True)
        self.found[epoch] = found.lr
        scale_rates(trainer, found.lr / base)

    def state_dict(self) -> dict[str, Any]:
        return {"found": dict(self.found)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.found = dict(state_dict["found"])


def scale_rates(trainer: pl.Trainer, multiplier: float) -> None:
    """Multiply the learning rates of all groups, and what their schedules start from."""
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            for name in SCALED:
                if isinstance(group.get(name), float):
                    group[name] *= multiplier
    for config in trainer.lr_scheduler_configs:
        if hasattr(config.scheduler, "base_lrs"):
            config.scheduler.base_lrs = [lr * multiplier for lr in config.scheduler.base_lrs]


class Transplant(pl.Callback):
    """Gives a throwaway run the weights, the frozen state and the optimizer state of another."""

    def __init__(self, model: pl.LightningModule, optimizers: list[Optimizer]) -> None:
        self._model = model
        self._optimizers = optimizers

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
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
