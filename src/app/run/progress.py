"""What the user sees while a run goes on: a line per epoch, and in a terminal a bar below."""

import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from app.accumulate import Accumulation
from app.config import describe
from app.optim import described
from app.parallel.split import micro_batch_size, samples_of_epoch, share_of


def progress(*, refresh_every_n_batches: int) -> pl.Callback:
    """A line per epoch; where the output is a terminal, with a rich bar below.

    Args:
        refresh_every_n_batches: how often the bar is drawn, >= 1.
    """
    if not sys.stdout.isatty():
        return EpochLines()
    from lightning.pytorch.callbacks import RichProgressBar

    class Bar(EpochLines, RichProgressBar):  # here, or a run without a terminal imported rich
        """The bar of the epoch, below the lines of those before."""

    return Bar(refresh_rate=refresh_every_n_batches)


class EpochLines(pl.Callback):
    """Prints the metrics of each epoch on one line."""

    _started_at = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._started_at = time.monotonic()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        metrics = sorted(trainer.callback_metrics.items())  # on every rank: they are means over all
        if not trainer.is_global_zero:
            return
        epochs = "" if trainer.max_epochs in (None, -1) else f"/{trainer.max_epochs}"
        text = "  ".join(f"{name} {float(value):.4g}" for name, value in metrics)
        seconds = time.monotonic() - self._started_at
        print(
            f"epoch {trainer.current_epoch + 1}{epochs}  step {trainer.global_step}  {text}"
            f"  {seconds:.0f} s",
            flush=True,
        )


class StartTable(pl.Callback):
    """Prints what is on when training starts: techniques, effective batch, optimizer steps.

    Attributes:
        beside: what makes further rows.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.beside: list[Callable[[], list[tuple[str, str]]]] = []
        self.batch: dict[str, Any] = {}
        self.num_parameters: int | None = None
        self._config = dict(config)
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
            *describe(self._config),
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
        if trainer.global_step:
            rows.append(("continues", f"after optimizer step {trainer.global_step}"))
        print("\n".join(f"{name:<12}{text}" for name, text in rows), flush=True)


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
