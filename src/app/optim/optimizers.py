"""What makes the optimizer of a run and its schedule, and an optimizer that is not torch's own."""

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any

import lightning.pytorch as pl
from torch.optim import Optimizer

from app.config import Config
from app.errors import Refused
from app.optim.groups import Grouping, rate_of
from app.optim.matrices import Split
from app.optim.on_shards import refuse_whole_only
from app.optim.schedules import MakeSchedule
from app.parallel.sharded import Sharded
from app.process.targets import BESIDE, given_by_run, located, makes_itself

MakeOptimizer = Callable[[Any], Optimizer]
"""Takes parameters, or groups of them."""


def optimizer_of(
    config: Mapping[str, Any], make: Callable[[Any], Any]
) -> tuple[MakeOptimizer, Grouping]:
    """What makes the optimizer of a configuration, and how its parameters are grouped.

    Args:
        config: names a class whose objects make an optimizer of parameters, as those here, or
            anything that makes one of parameters, as torch's classes. A rate that is null is its
            own.
        make: instantiates what a mapping names.
    """
    settings = {key: value for key, value in config.items() if key not in BESIDE["optimizer"]}
    if settings.get("lr", 0) is None:
        del settings["lr"]
    found = located("optimizer", config["_target_"])
    scale = config.get("adamw_lr_scale")
    grouping = Grouping(
        rules=config.get("groups") or (),
        layer_decay=config.get("layer_decay"),
        split=scale and Split(adamw_for=config.get("adamw_for"), adamw_lr_scale=scale),
    )
    if makes_itself(found, config):
        return make(settings), grouping
    theirs, name = make({**settings, "_partial_": True}), given_by_run("optimizer", found)
    return lambda params: theirs(**{name: params}) if name else theirs(params), grouping


def with_rate(config: Config) -> Config:
    """A configuration that says the rate which the class of its optimizer has by default."""
    optimizer = config.plain["optimizer"]
    if optimizer is None or optimizer.get("lr") is not None:
        return config
    parameters = signature(located("optimizer", optimizer["_target_"])).parameters
    rate = parameters["lr"].default if "lr" in parameters else None
    return config.changed({"optimizer.lr": rate}) if isinstance(rate, float) else config


def configure_optimizers(
    model: pl.LightningModule,
    make_optimizer: MakeOptimizer,
    make_schedule: MakeSchedule | None,
    grouping: Grouping | None = None,
) -> dict[str, Any]:
    """What `configure_optimizers` returns: an optimizer over all parameters and its schedule.

    Frozen parameters are in it: without a gradient they do not move, and unfreezing them works.
    """
    groups = grouping.of(model) if grouping else []
    if isinstance(model.trainer.strategy, Sharded):
        refuse_whole_only(make_optimizer, model.trainer.strategy)
    optimizer = make_optimizer(groups or model.parameters())
    if not isinstance(optimizer, Optimizer):
        raise Refused(
            f"optimizer._target_ must make an Optimizer, and makes a {type(optimizer).__name__}; "
            "type optimizer._target_=torch.optim.Adam"
        )
    if grouping:
        grouping.settle(optimizer, groups)
    if make_schedule is None:
        return {"optimizer": optimizer}
    if rate_of(optimizer) is None:
        raise Refused(
            f"scheduler needs a rate to set, and {type(optimizer).__name__} makes its own; type "
            "optimizer.lr=0.001, or use scheduler=none"
        )
    schedule = make_schedule(optimizer, model.trainer)
    if grouping:
        grouping.refuse_levelled(optimizer, schedule)
    return {"optimizer": optimizer, "lr_scheduler": schedule}


class AdamW8bit:
    """AdamW of bitsandbytes, whose moments are of 8 bits (arXiv 2110.02861).

    Args:
        min_8bit_size: smaller tensors keep moments of 32 bits.
        The others are AdamW's.
    """

    def __init__(
        self,
        *,
        lr: float,
        betas: Sequence[float],
        eps: float,
        weight_decay: float,
        min_8bit_size: int,
    ) -> None:
        self.lr = lr
        self.betas = betas
        self.eps = eps
        self.weight_decay = weight_decay
        self.min_8bit_size = min_8bit_size

    def __call__(self, parameters: Any) -> Optimizer:
        from bitsandbytes.optim import AdamW8bit as Theirs  # optional, and slow to import

        optimizer: Optimizer = Theirs(
            parameters,
            lr=self.lr,
            betas=(self.betas[0], self.betas[1]),
            eps=self.eps,
            weight_decay=self.weight_decay,
            min_8bit_size=self.min_8bit_size,
        )
        return optimizer
