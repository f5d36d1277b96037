"""Handing runs to SLURM, with submitit. Needs no torch."""

import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, open_dict

from app.config import SINGLE, check
from app.errors import Refused
from app.launch.start import of_hydra
from app.run.folder import RunFolder, result_in
from app.run.states import SLURM_JOB
from app.slurm.submitted import Submitted
from app.tuner.keys import startable, with_overrides

FILES = "slurm"
"""The folder of what submitit writes: the script, the pickled jobs, what tasks print."""


def submit(jobs: Sequence[Submitted], *, settings: Any, folder: Path) -> list[str]:
    """Hand jobs to SLURM, an array for all that need the same; their numbers, in this order.

    Raises Refused, with what sbatch says, where it does not take them.
    """
    import submitit
    from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf, SlurmQueueConf

    shared = {name for name in BaseQueueConf.__dataclass_fields__ if name != "submitit_folder"}
    arrays: dict[str, list[Submitted]] = {}
    needs: dict[str, SlurmQueueConf] = {}
    for job in jobs:
        need = resources(job.cfg, settings=settings, name=folder.absolute().parent.name)
        needs[repr(need)] = need
        arrays.setdefault(repr(need), []).append(job)
    ids: dict[int, str] = {}
    for key, members in arrays.items():
        executor = submitit.AutoExecutor(folder, cluster="slurm")
        names = set(submitit.SlurmExecutor._valid_parameters())
        given = {
            name if name in shared else f"slurm_{name}": value
            for name, value in asdict(needs[key]).items()
            if value is not None and (name in shared or name in names)
        }
        # a task that fails ends the others, which would wait for it
        executor.update_parameters(**given, slurm_srun_args=["--kill-on-bad-exit=1"])
        try:
            submitted = executor.submit_array(members)
        except submitit.core.utils.FailedJobError as error:
            said = [line for line in str(error).splitlines() if "sbatch: error" in line]
            raise Refused(f"SLURM takes no such job: {'; '.join(said) or error}") from None
        for member, one in zip(members, submitted, strict=True):
            ids[id(member)] = one.job_id
            content = {
                "status": "queued",
                "name": member.cfg.name,
                SLURM_JOB: one.job_id,
                "submitted_at": time.time(),
            }
            run = RunFolder(member.folder)
            run.path.mkdir(parents=True, exist_ok=True)
            if result_in(run.path).get(SLURM_JOB) != one.job_id:  # or it has begun
                run.write_result({**content, **_earlier(run)})
    return [ids[id(job)] for job in jobs]


def resources(cfg: DictConfig, *, settings: Any, name: str) -> Any:
    """What a job needs of SLURM, in the words of hydra-submitit-launcher."""
    from hydra_plugins.hydra_submitit_launcher.config import SlurmQueueConf

    devices = int(cfg.trainer.devices)
    accelerator = cfg.trainer.accelerator.value
    has_gpus = accelerator == "gpu" or (
        accelerator == "auto" and partition_has_gpus(settings.partition)
    )
    return SlurmQueueConf(
        name=name,
        nodes=cfg.trainer.num_nodes,
        tasks_per_node=devices,
        gpus_per_node=devices if has_gpus else None,
        cpus_per_task=settings.cpus_per_task,
        mem_gb=settings.mem_gb,
        timeout_min=settings.timeout_min,
        stderr_to_stdout=True,
        partition=settings.partition,
        account=settings.account,
        qos=settings.qos,
        constraint=settings.constraint,
        setup=list(settings.setup) or None,
        signal_delay_s=settings.signal_s,
        array_parallelism=settings.max_parallel,
        additional_parameters={"requeue": True, **settings.options},
    )


def partition_has_gpus(partition: str | None) -> bool:
    """Whether SLURM says so, of a partition or of all where none is named."""
    which = [] if partition is None else ["--partition", partition]
    command = ["sinfo", "--noheader", "--format=%G", *which]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return "gpu" in done.stdout


def resolved(cfg: DictConfig) -> DictConfig:
    """A run's configuration that needs nothing of Hydra, checked, with a number of devices.

    Raises Refused where it is not allowed, or says only that all devices of a machine be used.
    """
    if "hydra" in cfg:
        with open_dict(cfg):
            del cfg["hydra"]
    cfg = with_overrides(cfg, of_hydra(cfg))
    if cfg.trainer.devices == "auto":
        if cfg.strategy._target_ != SINGLE:
            raise Refused(
                "trainer.devices must be a number with launch=slurm: what is here need not be on "
                "the machines of the cluster; type trainer.devices=4"
            )
        cfg = with_overrides(cfg, {"trainer.devices": 1})
    check(startable(cfg))
    return cfg


def refuse_without_slurm() -> None:
    if shutil.which("sbatch") is None:
        raise Refused(
            "launch=slurm needs SLURM, and there is no sbatch here; type launch=local with -m, or "
            "launch=none"
        )


def _earlier(run: RunFolder) -> dict[str, Any]:
    """What an earlier attempt had come to, which is not lost while the next one waits."""
    before = result_in(run.path)
    return {key: before[key] for key in ("metrics", "checkpoints") if key in before}


def short(ids: Sequence[str]) -> str:
    """Numbers, at most a few."""
    return ", ".join(ids) if len(ids) <= 4 else f"{ids[0]} to {ids[-1]}"
