"""The Trainer of a run: Lightning's, with the arguments a run chooses and an exact step count."""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch import profilers
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import CheckpointIO, LayerSync, Precision
from lightning.pytorch.strategies import Strategy

from app.accumulate import num_steps
from app.averaging import AveragingTrainer
from app.errors import Refused
from app.precision import use_matmul
from app.process.ranks import LOOPBACK, keep_to_loopback, started_elsewhere, store_at
from app.resume.hooks import switch_off_inherited

THREADS_PER_CORE = 8
"""More than these wait for each other, for minutes, in each operation."""


def refuse_hardware(threads: int | None, accelerator: str) -> None:
    """Raise Refused where this machine has not what a configuration asks for."""
    num_cores = os.cpu_count() or 1
    if threads is not None and threads > THREADS_PER_CORE * num_cores:
        raise Refused(
            f"trainer.threads must be <= {THREADS_PER_CORE * num_cores} on a machine of "
            f"{num_cores} cores, got {threads}; type trainer.threads=null"
        )
    has: dict[str, Callable[[], bool]] = {
        "gpu": torch.accelerator.is_available,
        "mps": torch.backends.mps.is_available,
        "tpu": lambda: find_spec("torch_xla") is not None,
    }
    if accelerator in has and not has[accelerator]():
        raise Refused(
            f"trainer.accelerator={accelerator} finds none here; type trainer.accelerator=cpu"
        )


PROFILERS = {
    "simple": profilers.SimpleProfiler,
    "advanced": profilers.AdvancedProfiler,
    "pytorch": profilers.PyTorchProfiler,
}


def made_profiler(kind: str | None, folder: Path) -> profilers.Profiler | None:
    """A profiler of Lightning's that writes into the folder; None where none is asked for."""
    return None if kind is None else PROFILERS[kind](dirpath=folder, filename="profile")


def refuse_plugins(plugins: Mapping[str, Any], *, precision: str) -> bool:
    """Whether one of the plugins is the arithmetic, in place of a mode of `precision`.

    Raises Refused where one does what something here does.
    """
    taken: dict[type, str] = {
        CheckpointIO: "a CheckpointIO, as the files of a run are made and read by "
        "callbacks.checkpoint; leave it out",
        ClusterEnvironment: "a ClusterEnvironment, as the ranks are started by strategy and "
        "launch; leave it out, and type strategy=ddp",
    }
    if precision != "32-true":
        taken[Precision] = f"a Precision beside that of the group, {precision}; type precision=fp32"
    for name, plugin in plugins.items():
        said = next((text for kind, text in taken.items() if isinstance(plugin, kind)), None)
        if said is None and not isinstance(plugin, Precision | LayerSync):
            said = f"a {type(plugin).__name__}; leave it out"
        if said is not None:
            raise Refused(f"trainer.plugins.{name} must be a LayerSync or a Precision, got {said}")
    return any(isinstance(plugin, Precision) for plugin in plugins.values())


class _Alone(LightningEnvironment):
    """A process that no other one looks for; its process group, where it has one, is for itself."""

    @cached_property
    def _store(self) -> Any:
        keep_to_loopback(os.environ)
        return store_at(LOOPBACK, size=1)

    @property
    def main_port(self) -> int:
        port: int = self._store.port
        return port


class Trainer(AveragingTrainer):
    """Lightning's Trainer; its `estimated_stepping_batches` knows accumulation schedules.

    Args:
        max_epochs, max_steps, max_minutes: the run ends at whichever comes first; None is no
            limit. A step is an optimizer step.
        min_epochs, min_steps: before which nothing else ends it early.
        devices, num_nodes: processes of each machine, and machines.
        threads: intra-op threads of torch on the CPU; None: torch's own choice. Tiny models
            are faster with one, and give the same weights on every machine load.
        deterministic: refuse operations that have no deterministic implementation.
        overfit_batches: train on the first of them only, and validate on as many, if not limited.
        profiler: simple, advanced or pytorch; writes into `run_dir`.
        plugins: Lightning's, by the names that say which one is refused.
        strategy: Lightning's, or its name. "auto" trains this process alone, also where it is one
            of several.
        run_dir: folder of the run.
        The others are Lightning's.
    """

    callbacks: list[pl.Callback]

    def __init__(
        self,
        *,
        max_epochs: int | None,
        max_steps: int | None,
        max_minutes: float | None,
        min_epochs: int | None,
        min_steps: int | None,
        accelerator: str,
        devices: int,
        num_nodes: int,
        sync_batchnorm: bool,
        threads: int | None,
        deterministic: bool | str,
        benchmark: bool | None,
        limit_train_batches: int | float | None,
        limit_val_batches: int | float | None,
        limit_test_batches: int | float | None,
        limit_predict_batches: int | float | None,
        overfit_batches: int | float | None,
        val_check_interval: int | float,
        check_val_every_n_epoch: int | None,
        num_sanity_val_steps: int,
        log_every_n_steps: int,
        detect_anomaly: bool,
        inference_mode: bool,
        reload_dataloaders_every_n_epochs: int,
        profiler: str | None,
        plugins: dict[str, Any],
        enable_autolog_hparams: bool,
        strategy: Strategy | str,
        precision: str,
        matmul: str,
        run_dir: Path,
        callbacks: Sequence[pl.Callback],
        loggers: Sequence[Logger],
        checkpoint_io: CheckpointIO,
        enable_progress_bar: bool,
    ) -> None:
        # of no concern: what starts the processes is chosen by `launch`
        warnings.filterwarnings("ignore", "The `srun` command is available on your system")
        for callback in callbacks:
            switch_off_inherited(callback)
        use_matmul(matmul, mode=precision, accelerator=accelerator)
        refuse_hardware(threads, accelerator)
        if threads is None and "OMP_NUM_THREADS" in os.environ:
            threads = int(os.environ["OMP_NUM_THREADS"])  # a forked process has read it before
        if threads is not None:
            torch.set_num_threads(threads)
        if (
            precision == "16-mixed"
            and accelerator == "auto"
            and not torch.accelerator.is_available()
        ):
            raise Refused("precision=fp16 needs a GPU, and there is none here; use precision=bf16")
        on: int | list[int] = devices
        is_one_of_several = started_elsewhere()
        if strategy == "auto":
            num_nodes, on = 1, 1
            if is_one_of_several and accelerator != "cpu" and torch.cuda.is_available():
                on = [int(os.environ["LOCAL_RANK"])]
        # not Lightning's for SLURM, which would requeue by itself
        joins = is_one_of_several and strategy != "auto"
        environment = TorchElasticEnvironment() if joins else _Alone()
        has_own = refuse_plugins(plugins, precision=precision)
        if overfit_batches is not None:  # not Lightning's: it would take the loaders apart
            limit_train_batches = overfit_batches
            limit_val_batches = overfit_batches if limit_val_batches is None else limit_val_batches
        super().__init__(
            max_epochs=-1 if max_epochs is None else max_epochs,
            max_steps=-1 if max_steps is None else max_steps,
            min_epochs=min_epochs,
            min_steps=min_steps,
            max_time=None if max_minutes is None else {"seconds": round(60 * max_minutes)},
            accelerator=accelerator,
            strategy=strategy,
            devices=on,
            num_nodes=num_nodes,
            sync_batchnorm=sync_batchnorm,
            use_distributed_sampler=False,  # DataParallel splits the data
            deterministic=deterministic,  # type: ignore[arg-type]  # checked by the schema
            benchmark=benchmark,
            limit_train_batches=limit_train_batches,
            limit_val_batches=limit_val_batches,
            limit_test_batches=limit_test_batches,
            limit_predict_batches=limit_predict_batches,
            val_check_interval=val_check_interval,
            check_val_every_n_epoch=check_val_every_n_epoch,
            num_sanity_val_steps=num_sanity_val_steps,
            log_every_n_steps=log_every_n_steps,
            detect_anomaly=detect_anomaly,
            inference_mode=inference_mode,
            reload_dataloaders_every_n_epochs=reload_dataloaders_every_n_epochs,
            profiler=made_profiler(profiler, run_dir),
            enable_autolog_hparams=enable_autolog_hparams,
            precision=None if has_own else precision,  # type: ignore[arg-type]  # likewise
            default_root_dir=run_dir,
            callbacks=list(callbacks),
            logger=list(loggers),
            plugins=[checkpoint_io, environment, *plugins.values()],
            enable_checkpointing=any(isinstance(c, pl.callbacks.Checkpoint) for c in callbacks),
            enable_progress_bar=enable_progress_bar,
            enable_model_summary=False,
        )

    @property
    def estimated_stepping_batches(self) -> int | float:
        """Optimizer steps of the whole run, exactly; inf where neither data nor limits tell."""
        return num_steps(self, super().estimated_stepping_batches)
