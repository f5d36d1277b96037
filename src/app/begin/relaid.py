"""The schedules of a run that was made longer: as they were, or laid out anew."""

import copy
import math
import warnings
from typing import Any

import lightning.pytorch as pl
import torch
from torch.optim import SGD, Optimizer

from app.errors import Refused

IN_GROUPS = ("lr", "momentum", "betas")
"""What schedules set."""


class Relaid(pl.Callback):
    """Refuses schedules that would not go on as in a run of the new length, or lays them out anew.

    Before a continued fit restores its schedules they are those of the new length. Stepped as often
    as those of the checkpoint they have its rates, where the length decides nothing.

    Args:
        lays_out: whether to lay them out anew.
    """

    def __init__(self, *, lays_out: bool) -> None:
        self._lays_out = lays_out
        self._twins: list[tuple[Any, Optimizer]] = []

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if checkpoint.get("has_ended"):
            raise Refused(
                "extend: the run had not ended by its length, and would end again where it did; "
                "begin a run of another name= with init_from=PATH"
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for config in trainer.lr_scheduler_configs:
            optimizer = config.scheduler.optimizer
            twin = SGD([{"params": [torch.zeros(1)]} for _ in optimizer.param_groups], lr=1.0)
            twin.defaults = dict(optimizer.defaults)
            for mine, theirs in zip(twin.param_groups, optimizer.param_groups, strict=True):
                mine |= {k: copy.deepcopy(value) for k, value in theirs.items() if k != "params"}
            memo: dict[int, Any] = {
                id(optimizer): twin, id(pl_module): pl_module, id(trainer): trainer
            }  # fmt: skip
            self._twins.append((copy.deepcopy(config.scheduler, memo), twin))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for config, (schedule, twin) in zip(trainer.lr_scheduler_configs, self._twins, strict=True):
            if config.reduce_on_plateau:
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the twin makes no steps
                for _ in range(int(config.scheduler.last_epoch)):
                    pl_module.lr_scheduler_step(schedule, None)
            groups = config.scheduler.optimizer.param_groups
            pairs = list(zip(groups, twin.param_groups, strict=True))
            if all(math.isclose(a["lr"], b["lr"], rel_tol=1e-6, abs_tol=1e-30) for a, b in pairs):
                config.scheduler.load_state_dict(schedule.state_dict())  # a length may be in it
                continue
            if not self._lays_out:
                raise Refused(
                    f"extend changes the length over which {type(config.scheduler).__name__} is "
                    "laid out; to lay it out anew type extend=relay"
                )
            config.scheduler.load_state_dict(schedule.state_dict())
            for group, other in pairs:
                group |= {name: other[name] for name in IN_GROUPS if name in group}
        self._twins = []
