"""Handing runs to SLURM, with submitit. Needs no torch."""

import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, open_dict

from app.begin.branch import branched
from app.config import Config, check, is_single, with_overrides
from app.errors import Refused
from app.launch.start import of_hydra
from app.record.folder import RunFolder, result_in
from app.record.states import SLURM_JOB, State
from app.slurm.submitted import Submitted
from app.tuner.keys import startable

FILES = "slurm"
"""The folder of what submitit writes: the script, the pickled jobs, what tasks print."""


def submit(jobs: Sequence[Submitted], *, settings: Any, folder: Path) -> list[str]:
    """Hand jobs to SLURM, an array for all that need the same; their numbers, in this order.

    Raises Refused, with what sbatch says, where it does not take them.
    """
    import submitit

    arrays: dict[str, list[Submitted]] = {}
    needs: dict[str, dict[str, Any]] = {}
    for job in jobs:
        need = parameters(job.cfg, settings=settings, name=folder.absolute().parent.name)
        needs[repr(need)] = need
        arrays.setdefault(repr(need), []).append(job)
    ids: dict[int, str] = {}
    for key, members in arrays.items():
        executor = submitit.AutoExecutor(folder, cluster="slurm")
        executor.update_parameters(**needs[key])
        try:
            submitted = executor.submit_array(members)
        except submitit.core.utils.FailedJobError as error:
            said = [line for line in str(error).splitlines() if "sbatch: error" in line]
            raise Refused(f"SLURM takes no such job: {'; '.join(said) or error}") from None
        for member, one in zip(members, submitted, strict=True):
            ids[id(member)] = one.job_id
            content = {
                "status": State.queued,
                "name": member.cfg.name,
                SLURM_JOB: one.job_id,
                "submitted_at": time.time(),
            }
            run = RunFolder(member.folder)
            run.path.mkdir(parents=True, exist_ok=True)
            if result_in(run.path).get(SLURM_JOB) != one.job_id:  # or it has begun
                run.write_result({**content, **_earlier(run)})
    return [ids[id(job)] for job in jobs]


def parameters(cfg: DictConfig, *, settings: Any, name: str) -> dict[str, Any]:
    """What a job needs of SLURM, in the words of submitit; None is the cluster's choice."""
    devices = int(cfg.trainer.devices)
    accelerator = cfg.trainer.accelerator.value
    has_gpus = accelerator == "gpu" or (
        accelerator == "auto" and partition_has_gpus(settings.partition)
    )
    return {
        "name": name,
        "nodes": cfg.trainer.num_nodes,
        "tasks_per_node": devices,
        "gpus_per_node": devices if has_gpus else None,
        "cpus_per_task": settings.cpus_per_task,
        "mem_gb": settings.mem_gb,
        "timeout_min": settings.timeout_min,
        "stderr_to_stdout": True,
        "slurm_partition": settings.partition,
        "slurm_account": settings.account,
        "slurm_qos": settings.qos,
        "slurm_constraint": settings.constraint,
        "slurm_setup": list(settings.setup) or None,
        "slurm_signal_delay_s": settings.signal_s,
        "slurm_array_parallelism": settings.max_parallel,
        "slurm_additional_parameters": {"requeue": True, **settings.options},
        # a task that fails ends the others, which would wait for it
        "slurm_srun_args": ["--kill-on-bad-exit=1"],
    }


def partition_has_gpus(partition: str | None) -> bool:
    """Whether SLURM says so, of a partition or of all where none is named."""
    which = [] if partition is None else ["--partition", partition]
    command = ["sinfo", "--noheader", "--format=%G", *which]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return "gpu" in done.stdout


def resolved(cfg: DictConfig) -> Config:
    """A run's configuration that needs nothing of Hydra, with a number of devices.

    Raises Refused where it is not allowed, or says only that all devices of a machine be used.
    """
    if "hydra" in cfg:
        with open_dict(cfg):
            del cfg["hydra"]
    cfg = branched(with_overrides(cfg, of_hydra(cfg)))
    if cfg.trainer.devices == "auto":
        if not is_single(cfg.strategy):
            raise Refused(
                "trainer.devices must be a number with launch=slurm: what is here need not be on "
                "the machines of the cluster; type trainer.devices=4"
            )
        cfg = with_overrides(cfg, {"trainer.devices": 1})
    return check(startable(cfg))


def refuse_without_slurm() -> None:
    if shutil.which("sbatch") is None:
        raise Refused(
            "launch=slurm needs SLURM, and there is no sbatch here; type launch=local with -m, or "
            "launch=none"
        )


def _earlier(run: RunFolder) -> dict[str, Any]:
    """What an earlier attempt had come to, which is not lost while the next one waits."""
    before = result_in(run.path)
    return {key: before[key] for key in ("metrics", "metrics_of", "checkpoints") if key in before}


def short(ids: Sequence[str]) -> str:
    """Numbers, at most a few."""
    return ", ".join(ids) if len(ids) <= 4 else f"{ids[0]} to {ids[-1]}"
