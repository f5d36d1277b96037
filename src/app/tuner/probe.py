"""A throwaway run: what the fit will run, for a few optimizer steps, without a trace."""

import gc
import signal
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch

from app.build import Run, build
from app.launch import DDP, SINGLE
from app.launch.signals import Listens
from app.tuner.keys import shares

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
    config: Mapping[str, Any],
    *,
    num_steps: int,
    validates: bool,
    callbacks: Sequence[pl.Callback],
) -> Run:
    """Build a run of `num_steps` optimizer steps that leaves no file.

    The techniques are those of the fit; an average starts at once, for its memory counts, and an
    accumulation schedule stays at its first factor. Loggers, checkpoints, the callbacks of the
    configuration and its schedule of the learning rate are off.
    """
    accumulate = _at_its_start(config["accumulate"])
    factor = _factor({**config, "accumulate": accumulate})
    changed = {
        **config,
        "scheduler": None,
        "tuner": None,
        "sharing": None,  # each size would be a copy of its own
        "logger": None,
        "callbacks": None,
        "accumulate": accumulate,
        "averaging": _at_once(config["averaging"]),
        "trainer": {
            **config["trainer"],
            "max_epochs": None,
            "max_steps": num_steps,
            "max_minutes": None,
            # an evaluation step follows the last batch of an epoch
            "limit_train_batches": num_steps * factor if validates else None,
            "limit_val_batches": 1 if validates else 0,
            "val_check_interval": 1.0,
            "check_val_every_n_epoch": 1,
            "num_sanity_val_steps": 0,
        },
    }
    return build(changed, [*callbacks, Listens()])


def alone(config: Mapping[str, Any]) -> dict[str, Any]:
    """One rank of a run as a run of its own, if it holds a whole model: its memory is the same."""
    if config["strategy"]["_target_"] != DDP:
        return dict(config)
    accumulate = config["accumulate"]
    if accumulate is not None and "batch_size" in accumulate:
        accumulate = _constant(_factor(config), accumulate["weight_by"])
    return {**config, "strategy": {"_target_": SINGLE}, "accumulate": accumulate}


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


def _at_its_start(accumulate: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if accumulate is None or "starts" not in accumulate:
        return None if accumulate is None else dict(accumulate)
    return _constant(accumulate["factors"][0], accumulate["weight_by"])


def _constant(factor: int, weight_by: str | None) -> dict[str, Any]:
    return {
        "_target_": "app.accumulate.ConstantAccumulation",
        "factor": factor,
        "weight_by": weight_by,
    }


def _factor(config: Mapping[str, Any]) -> int:
    """Micro-batches of an optimizer step, on one rank."""
    accumulate = config["accumulate"]
    if accumulate is None:
        return 1
    if "factor" in accumulate:
        return int(accumulate["factor"])
    samples = accumulate["micro_batch_size"] * (shares(config) or 1)
    return int(accumulate["batch_size"] // samples)


def _at_once(averaging: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The average as it will be later in the run: started, and at the configured rate."""
    if averaging is None:
        return None
    started = {"start_step": 0, "start_epoch": None, "start": None, "every_n_steps": 1,
               "lr": None, "bn_batches": None, "validate": "averaged"}  # fmt: skip
    return {key: started.get(key, value) for key, value in averaging.items()}
