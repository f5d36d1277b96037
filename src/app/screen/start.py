"""What is printed when training starts: what is on, how large a step is, how many there are."""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from app.accumulate import Accumulation
from app.clip import NormClip, PercentileClip
from app.config import describe
from app.optim import MuonAdamW, described
from app.parallel.split import micro_batch_size, samples_of_epoch, share_of


class StartTable(pl.Callback):
    """Prints what is on when training starts: techniques, effective batch, optimizer steps.

    Args:
        on_continue: is told the optimizer step after which a run goes on.

    Attributes:
        batch: sizes, for result.json.
        beside: what makes further rows.
    """

    def __init__(
        self, config: Mapping[str, Any], on_continue: Callable[[int], None] | None = None
    ) -> None:
        self.beside: list[Callable[[], list[tuple[str, str]]]] = []
        self.batch: dict[str, Any] = {}
        self.num_parameters: int | None = None
        self._config = dict(config)
        self._on_continue = on_continue
        self._num_parameters = 0
        self._lazy: list[torch.nn.Parameter] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        trainable = [p for p in pl_module.parameters() if p.requires_grad]
        self._lazy = [p for p in trainable if is_lazy(p)]
        # before they are sharded
        self._num_parameters = sum(p.numel() for p in trainable if not is_lazy(p))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        accumulation = next((c for c in callbacks if isinstance(c, Accumulation)), None)
        by_epoch, by_step = accumulation.schedules if accumulation else ({0: 1}, {0: 1})
        factors = [a * b for a in by_epoch.values() for b in by_step.values()]
        loaders = tree_leaves(trainer.train_dataloader)
        each = [micro_batch_size(loader) for loader in loaders]
        known = [size for size in each if size is not None]
        micro = sum(known) if len(known) == len(each) else None
        world_size = share_of(trainer).size
        served = _samples_served(trainer, loaders, micro) if len(loaders) == 1 else math.inf
        effective = [_least(micro * world_size * factor, served) for factor in factors if micro]
        sizes = " + ".join(map(str, known)) if micro else "unknown"
        self.batch = {
            "micro_batch": micro,
            "accumulation": _one_or_all(factors),
            "world_size": world_size,
            "effective_batch": _one_or_all(effective),
        }
        if not trainer.is_global_zero:
            return
        steps = trainer.estimated_stepping_batches
        still_lazy = [p for p in self._lazy if is_lazy(p)]
        made = sum(p.numel() for p in self._lazy if not is_lazy(p))  # by the sanity check
        self.num_parameters = self._num_parameters + made
        parameters = f"{self.num_parameters:,} parameters"
        if still_lazy:
            parameters += f", and {len(still_lazy)} that the first batch shapes"
        rows = [
            ("run", self._config["run_dir"]),
            *self._chosen(trainer),
            *(("group", line) for one in trainer.optimizers for line in described(one)),
            (
                "batch",
                f"micro-batch {sizes} x accumulation {self.batch['accumulation']} "
                f"x world size {world_size} = {self.batch['effective_batch'] or 'unknown'}"
                f"{_at_the_end(effective, served)}",
            ),
            ("length", f"{steps} optimizer steps of {parameters}"),
        ]
        rows += [row for make in self.beside for row in make()]
        rows += [("note", note) for note in notes(trainer)]
        if trainer.global_step:
            if self._on_continue is not None:
                self._on_continue(trainer.global_step)
            rows.append(("continues", f"after optimizer step {trainer.global_step}"))
        print("\n".join(f"{name:<12}{text}" for name, text in rows), flush=True)

    def _chosen(self, trainer: pl.Trainer) -> Iterable[tuple[str, str]]:
        """What the configuration has chosen, and where it leaves them to the model, the optimizers
        and schedules that the model has made."""
        rows = describe(self._config)
        if self._config["optimizer"] is None:
            place = sum(name in ("model", "data") for name, _ in rows)
            rows[place:place] = [
                *(("optimizer", of_optimizer(one)) for one in trainer.optimizers),
                *(("scheduler", of_schedule(one)) for one in trainer.lr_scheduler_configs),
            ]
        return rows


def notes(trainer: pl.Trainer) -> Iterable[str]:
    """What is allowed, and does less than one might think."""
    clips = any(isinstance(c, NormClip | PercentileClip) for c in trainer.callbacks)  # type: ignore[attr-defined]
    if clips and any(isinstance(one, MuonAdamW) for one in trainer.optimizers):
        yield (
            "clipping by the norm does little to Muon, whose step has one size whatever the "
            "gradient's (kellerjordan.github.io/posts/muon); it acts on what AdamW steps"
        )


def of_optimizer(optimizer: Optimizer) -> str:
    """Its class and settings, those of all groups where they differ, but for what is its default.

    The learning rate is the one that its schedule starts from.
    """
    groups = optimizer.param_groups
    if not groups:  # Lightning's own, in place of none
        return "the model's configure_optimizers returns none"
    taken = inspect.signature(type(optimizer)).parameters
    defaults = {name: taken[name].default for name in taken if name != "params"}
    words = [type(optimizer).__name__]
    for name in sorted(groups[0].keys() & defaults.keys(), key=["lr", *defaults].index):
        values = [_short(group.get(f"initial_{name}", group.get(name))) for group in groups]
        if name == "lr" or {*values} != {_short(defaults[name])}:
            words.append(f"{name}={'|'.join(values if len({*values}) > 1 else values[:1])}")
    return " ".join([*words, f"in {len(groups)} groups"] if len(groups) > 1 else words)


def of_schedule(config: LRSchedulerConfig) -> str:
    """Its class, and when it steps."""
    often = f"every {config.frequency} {config.interval}s"
    when = f"each {config.interval}" if config.frequency == 1 else often
    followed = f" by {config.monitor}" if config.reduce_on_plateau else ""
    return f"{type(config.scheduler).__name__} {when}{followed}"


def _short(value: Any) -> str:
    value = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
    return f"{value:g}" if isinstance(value, float) else str(value)


def _samples_served(trainer: pl.Trainer, loaders: list[Any], micro: int | None) -> float:
    """Samples that an epoch trains on, with its limit; inf where they are not known."""
    samples = samples_of_epoch(loaders[0])
    if samples is None or micro is None:
        return math.inf
    return min(samples, trainer.num_training_batches * micro * share_of(trainer).size)


def _least(step: int, served: float) -> int:
    """Samples of a step: one ends with its epoch."""
    return int(min(step, served))


def _at_the_end(effective: list[int], served: float) -> str:
    """What is said of a last step of an epoch that is smaller."""
    if len(effective) != 1 or served == math.inf or served % effective[0] == 0:
        return ""
    return f", the last of an epoch {int(served) % effective[0]}"


def _one_or_all(values: list[int]) -> int | list[int] | None:
    return values if len(values) > 1 else values[0] if values else None
