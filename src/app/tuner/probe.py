"""A throwaway run: what the fit will run, for a few optimizer steps, without a trace.

A probe of the micro-batch is one, with an evaluation step at its end.
"""

import gc
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader

from app.accumulate import Accumulation
from app.averaging import Averaging
from app.config import SINGLE, Config, is_single
from app.parallel.split import rebuilt
from app.process.ranks import ranks
from app.run.build import (
    Run,
    build,
    build_model_and_data,
    build_techniques,
    build_trainer,
    holds_whole_model,
)
from app.run.signals import Listens
from app.tuner.keys import shares
from app.tuner.search import Trial

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


def throwaway(
    config: Config,
    *,
    num_steps: int,
    validates: bool,
    callbacks: Sequence[pl.Callback],
    num_ranks: int | None = None,
    served: Callable[[Any], Any] | None = None,
) -> Run:
    """Build a run of `num_steps` optimizer steps that leaves no file.

    The techniques are those of the fit; an average starts at once, for its memory counts, and an
    accumulation schedule stays at its first factor. Loggers, checkpoints, the callbacks of the
    configuration and its schedule of the learning rate are off.

    Args:
        validates: whether an evaluation step follows the last optimizer step.
        num_ranks: ranks whose accumulation this one stands for; None: as many as there are.
        served: of `build`.
    """
    techniques = build_techniques(config)
    for technique in techniques:
        if isinstance(technique, Averaging):
            technique.begin_at_once()
        if isinstance(technique, Accumulation):
            technique.stay_as_begun(num_ranks=num_ranks)
    changed = config.but(
        scheduler=None,
        tuner=None,
        sharing=None,  # each size would be a copy of its own
        logger=None,
        callbacks=None,
        trainer={
            "max_epochs": None,
            "max_steps": num_steps,
            "max_minutes": None,
            "limit_train_batches": None,
            "limit_val_batches": 1 if validates else 0,
            "val_check_interval": 1.0,
            "check_val_every_n_epoch": 1,
            "num_sanity_val_steps": 0,
        },
    )
    ends = [EndsEpoch(num_steps)] if validates else []
    return build(changed, [*callbacks, *ends, Listens()], techniques=techniques, served=served)


def fit(run: Run) -> None:
    """Fit a throwaway run. Raises KeyboardInterrupt at Ctrl-C, which Lightning makes an exit."""
    try:
        run.trainer.fit(run.model, datamodule=run.data)
    except SystemExit as stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning ignores it from now on
        raise KeyboardInterrupt from stop


def release_memory() -> None:
    """Give the memory of a throwaway run that nobody holds any more back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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
    """Tries one micro-batch size after another; only running out of memory means it does not fit.

    Any other error is raised.

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
        self.capacity_bytes: int | None = None
        if on_gpu:
            self.capacity_bytes = int(torch.cuda.mem_get_info()[1] * memory_fraction)

    def __call__(self, size: int) -> Trial:
        """Try one size."""
        rate, peak = None, None
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
        try:
            rate = self._attempt(size)
            fits = True
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            fits = False
        if self._on_gpu:
            peak = torch.cuda.max_memory_reserved()
            fits = fits and (self.capacity_bytes is None or peak <= self.capacity_bytes)
        release_memory()
        return of_all_ranks(Trial(size=size, fits=fits, peak_bytes=peak, samples_per_s=rate))


def try_fit(config: Config, *, size: int, num_steps: int) -> float | None:
    """Run what the fit will run at this micro-batch; returns the samples per second.

    `num_steps` optimizer steps, >= 2, with their whole accumulation windows, clipping and
    averaging, then an evaluation step. Of several ranks with whole models each tries by itself.
    """
    timer = StepTimer()
    num_ranks = None
    if not is_single(config.strategy) and holds_whole_model(config):
        num_ranks = shares(config.plain)
        config = config.but(strategy={"_target_": SINGLE})  # whose memory is the same
    run = throwaway(
        config,
        num_steps=num_steps,
        validates=True,
        callbacks=[timer],
        num_ranks=num_ranks,
        served=longest_first_of_all,
    )
    fit(run)
    return size * timer.num_batches / timer.seconds if timer.seconds > 0 else None


def try_evaluation(config: Config, *, stage: str) -> None:
    """Run one batch of an evaluation: test, validate or predict."""
    model, data = build_model_and_data(config)
    trainer = build_trainer(config, callbacks=[], loggers=[])
    trainer.limit_test_batches = trainer.limit_val_batches = trainer.limit_predict_batches = 1
    if stage == "predict":
        trainer.predict(model, datamodule=data)
    elif stage == "test":
        trainer.test(model, datamodule=data, verbose=False)
    else:
        trainer.validate(model, datamodule=data, verbose=False)


class EndsEpoch(pl.Callback):
    """Ends the epoch, and with it the fit, after so many optimizer steps: a validation follows."""

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step >= self._num_steps:
            trainer.should_stop = True


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


def longest_first_of_all(loaders: Any) -> Any:
    """Training loaders that serve the longest samples first, where lengths differ: the worst."""
    return tree_map(lambda one: longest_first(one) if type(one) is DataLoader else one, loaders)


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
