"""Probes of the micro-batch: throwaway runs with an evaluation step at their end."""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import torch

from app.config import SINGLE, Config, is_single
from app.errors import NoBatch
from app.process.ranks import ranks
from app.record.loggers import NoLogger
from app.run.build import (
    LOADERS_OF,
    build_model_and_data,
    build_trainer,
    data_with,
    holds_whole_model,
)
from app.run.checkpoint import Kept
from app.throwaway.run import Steps, fit, release_memory, throwaway
from app.throwaway.samples import FirstBatch, longest_first_of_all, shapes_of
from app.tuner.keys import shares
from app.tuner.search import NoEffect, Trial

OUT_OF_MEMORY = (
    "out of memory",  # CUDA, HIP (ROCm), XPU, MPS
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
)
"""What drivers say, in lower case, where torch does not raise its own OutOfMemoryError."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on whatever device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        text in str(error).lower() for text in OUT_OF_MEMORY
    )


def of_all_ranks(trial: Trial) -> Trial:
    """What the ranks found together: the answer of the one with the least memory.

    The only place where they wait for each other: one that runs out of memory leaves none hanging.
    """
    found = [Trial(**fields) for fields in ranks().gathered(asdict(trial))]
    if not all(other.fits for other in found):
        return Trial(size=trial.size, fits=False, peak_bytes=None, samples_per_s=None)
    peaks = [other.peak_bytes for other in found if other.peak_bytes is not None]
    rates = [other.samples_per_s for other in found if other.samples_per_s is not None]
    return Trial(
        size=trial.size,
        fits=True,
        peak_bytes=max(peaks, default=None),
        samples_per_s=min(rates, default=None),
    )


class Prober:
    """Tries one micro-batch size after another.

    One does not fit where memory runs out, or nothing was trained; any other error is raised.

    Args:
        attempt: runs a size and returns its samples per second; None where that is not measured.
        on_gpu: whether the memory of a CUDA or ROCm device is the limit.
        memory_fraction: share of the device's memory that may be used.
    """

    def __init__(
        self, *, attempt: Callable[[int], float | None], on_gpu: bool, memory_fraction: float
    ) -> None:
        self._attempt = attempt
        self._on_gpu = on_gpu
        self.reason = ""
        self.capacity_bytes: int | None = None
        if on_gpu:
            self.capacity_bytes = int(torch.cuda.mem_get_info()[1] * memory_fraction)

    def __call__(self, size: int) -> Trial:
        """Try one size."""
        rate, peak, self.reason = None, None, ""
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
        try:
            rate = self._attempt(size)
            fits = True
        except Untrained as reason:
            self.reason, fits = f": {reason}", False
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            fits = False
        if self._on_gpu:
            peak = torch.cuda.max_memory_reserved()
            fits = fits and (self.capacity_bytes is None or peak <= self.capacity_bytes)
        release_memory()
        return of_all_ranks(Trial(size=size, fits=fits, peak_bytes=peak, samples_per_s=rate))


class Untrained(Exception):  # noqa: N818  # reads as the sentence it is
    """A micro-batch has not fitted, for another reason than memory: nothing was trained with it."""


class Attempt:
    """Runs what the fit will run, at one micro-batch after another.

    Some optimizer steps with their whole accumulation windows, clipping and averaging, then an
    evaluation step. Of several ranks with whole models each tries by itself.

    Args:
        changed: the configuration with a micro-batch.
        num_steps: optimizer steps, >= 2: the second one has the optimizer's state.

    Raises:
        Untrained: where the loader serves nothing, or what it has served for a smaller size.
        NoEffect: where it serves the same, whatever the size.
    """

    def __init__(
        self, changed: Callable[[int], Config], *, served: "Served", num_steps: int
    ) -> None:
        self._changed, self._served, self._num_steps = changed, served, num_steps

    def __call__(self, size: int) -> float | None:
        """Run a size; returns its samples per second."""
        config, num_ranks = self._changed(size), None
        if not is_single(config.strategy) and holds_whole_model(config):
            num_ranks = shares(config.plain)
            config = config.but(strategy={"_target_": SINGLE})  # whose memory is the same
        timer = StepTimer(self._num_steps)
        run = throwaway(
            config,
            steps=timer,
            validates=True,
            num_ranks=num_ranks,
            served=longest_first_of_all,
        )
        with suppress(NoBatch):
            fit(run)
        if timer.num_steps == 0:
            raise Untrained("no batch is served")
        if timer.shapes is not None:
            self._served.compare(size, timer.shapes)
        return size * timer.num_timed / timer.seconds if timer.seconds > 0 else None


class Served:
    """What the first batch held at each size of a search.

    Args:
        key: whose value is the size.
        given: the value it has; what is alike below it may be so for want of room, where the key
            counts tokens.
    """

    def __init__(self, key: str, given: float) -> None:
        self.key, self._given = key, given
        self._served: dict[int, list[list[int]]] = {}

    def compare(self, size: int, shapes: list[list[int]]) -> None:
        """Raises Untrained or NoEffect, as `Attempt` says."""
        alike = [other for other, served in self._served.items() if served == shapes]
        self._served[size] = shapes
        if not alike:
            return
        if len(alike) == len(self._served) - 1:
            if size < self._given:
                return
            raise NoEffect(
                f"{self.key} has no effect: the first batch is the same at {size} and at "
                f"{alike[0]}; type tuner.batch_size.key=KEY, or let the loader heed it"
            )
        if min(alike) < size:
            raise Untrained(f"no more is served than at {min(alike)}")


def try_evaluation(config: Config, size: int, *, stage: str, served: Served) -> None:
    """Run one batch of an evaluation: test, validate or predict.

    Raises Untrained or NoEffect where the loader serves no more for this size than for another one.
    """
    config = config.unchecked({served.key: size})
    model, data = build_model_and_data(config)
    first = FirstBatch()
    with TemporaryDirectory() as folder:
        trainer = build_trainer(
            config, callbacks=[first, Kept(dirpath=folder)], loggers=[NoLogger(save_dir=folder)]
        )
        if data is not None:  # also a model with loaders of its own may ask it
            trainer.datamodule, data.trainer = data, trainer  # type: ignore[attr-defined]
        data = data_with(f"{LOADERS_OF.get(stage, stage)}_dataloader", model, data)
        trainer.limit_test_batches = trainer.limit_val_batches = trainer.limit_predict_batches = 1
        if stage == "predict":
            trainer.predict(model, datamodule=data)
        elif stage == "test":
            trainer.test(model, datamodule=data, verbose=False)
        else:
            trainer.validate(model, datamodule=data, verbose=False)
    if first.shapes is not None:
        served.compare(size, first.shapes)


class StepTimer(Steps):
    """Measures the micro-batches after the first optimizer step, which warms up, and notes what the
    first one holds."""

    def __init__(self, enough: float) -> None:
        super().__init__(enough)
        self.seconds = 0.0
        self.num_timed = 0
        self.shapes: list[list[int]] | None = None
        self._since = 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if self.num_batches == 0:
            self.shapes = shapes_of(args[1])
        if self.num_steps > 0:
            self._since = _now(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        super().on_train_batch_end(trainer, *args)
        if self._since > 0:
            self.seconds += _now(trainer) - self._since
            self.num_timed += 1
            self._since = 0.0


def _now(trainer: pl.Trainer) -> float:
    if trainer.strategy.root_device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
