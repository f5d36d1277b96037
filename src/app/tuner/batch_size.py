"""Probes of the micro-batch: real optimizer steps and an evaluation step at a given size."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from app.resume import ResumableLoader, rebuilt
from app.tuner.probe import free, is_out_of_memory, throwaway
from app.tuner.search import Trial

Agree = Callable[[bool], bool]


def agree_on_smallest(fits: bool) -> bool:
    """Whether a size fits on every rank. The only place where ranks wait for each other."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return fits
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    answer = torch.tensor(int(fits), device=device)
    torch.distributed.all_reduce(answer, op=torch.distributed.ReduceOp.MIN)
    return bool(answer)


class Prober:
    """Runs what the fit will run, at one micro-batch size after another.

    A probe is `steps_per_trial` optimizer steps with their whole accumulation windows, clipping and
    averaging, then an evaluation step. Only an out-of-memory error means that a size does not fit;
    any other error is raised. Under several processes each probes by itself, and all take the
    answer of the rank with the least memory.

    Args:
        steps_per_trial: optimizer steps of a probe, >= 2.
        memory_fraction: share of the device's memory that a probe may use.
        with_size: the configuration at a size, all that follows from it resolved anew.
    """

    def __init__(
        self,
        *,
        steps_per_trial: int,
        memory_fraction: float,
        with_size: Callable[[int], Mapping[str, Any]],
    ) -> None:
        self._steps_per_trial = steps_per_trial
        self._memory_fraction = memory_fraction
        self._with_size = with_size

    @property
    def capacity_bytes(self) -> int | None:
        """Memory of the device that may be used; None where the device does not report it."""
        if not torch.cuda.is_available():
            return None
        total: int = torch.cuda.mem_get_info()[1]
        return int(total * self._memory_fraction)

    def __call__(self, size: int) -> Trial:
        """Probe one size."""
        run, seconds, peak = None, 0.0, None
        timer = StepTimer()
        try:
            run = throwaway(
                self._with_size(size),
                num_steps=self._steps_per_trial,
                validates=True,
                callbacks=[timer, LongestFirst()],
            )
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            run.trainer.fit(run.model, datamodule=run.data)
            fits = True
            seconds = timer.seconds
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            fits = False
        finally:
            if torch.cuda.is_available():
                peak = torch.cuda.max_memory_reserved()
            free(run)
        capacity = self.capacity_bytes
        if peak is not None and capacity is not None and peak > capacity:
            fits = False
        fits = agree_on_smallest(fits)
        rate = size * timer.num_batches / seconds if fits and seconds > 0 else None
        return Trial(size=size, fits=fits, peak_bytes=peak if fits else None, samples_per_s=rate)


class StepTimer(pl.Callback):
    """Measures the micro-batches after the first optimizer step, which warms up."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.num_batches = 0
        self._since = 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step > 0:
            self._since = _now(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if self._since > 0:
            self.seconds += _now(trainer) - self._since
            self.num_batches += 1
            self._since = 0.0


def _now(trainer: pl.Trainer) -> float:
    if trainer.strategy.root_device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class LongestFirst(pl.Callback):
    """Serves the longest samples first, where samples differ in length: the worst case."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        loaders = trainer.train_dataloader
        for loader in loaders if isinstance(loaders, list | tuple) else [loaders]:
            if isinstance(loader, ResumableLoader) and type(loader.loader) is DataLoader:
                loader.loader = longest_first(loader.loader)


def longest_first(loader: DataLoader[Any], *, limit_s: float = 2.0) -> DataLoader[Any]:
    """A loader whose every batch is of the longest samples; the same one where all are alike.

    Looks at samples for `limit_s` seconds.
    """
    until = time.monotonic() + limit_s
    lengths = []
    for index in range(len(loader.dataset)):  # type: ignore[arg-type]
        lengths.append(num_elements(loader.dataset[index]))
        if time.monotonic() > until:
            break
    if loader.batch_size is None or min(lengths) == max(lengths):
        return loader
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return rebuilt(loader, batch_sampler=[order[: loader.batch_size]] * len(loader))


def num_elements(sample: Any) -> int:
    """Numbers in all tensors and sequences of a sample."""
    if isinstance(sample, torch.Tensor):
        return sample.numel()
    if isinstance(sample, Mapping):
        return sum(num_elements(value) for value in sample.values())
    if isinstance(sample, Sequence):
        return sum(num_elements(value) for value in sample)
    return int(getattr(sample, "size", 1))
