"""`launch=slurm`: runs as jobs of SLURM, submitted with submitit. Needs no torch."""

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.types import TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from app.config import check
from app.errors import JobsFailed, Refused
from app.folder import ENDED, RunFolder
from app.launch import SINGLE
from app.launch.batch import LOST, Batch
from app.launch.job import LOG
from app.launch.slurm_states import SLURM_JOB, refresh, result_in, state_of, states
from app.launch.start import of_hydra
from app.launch.submitted import Submitted
from app.sweep.journal import UNREADABLE, Job
from app.sweep.progress import Progress, counts, first_line
from app.tuner.keys import startable, with_overrides

FILES = "slurm"
"""The folder of what submitit writes: the script, the pickled jobs, what tasks print."""

POLL_S = 1.0
"""How often the results of jobs are looked for."""

ASK_S = 5.0
"""How often SLURM is asked for the states of jobs."""


class Cluster:
    """The jobs of one sweep as jobs of SLURM: an array for all that need the same resources.

    Args:
        loader, task, config: of `Batch`.

    Raises Refused where there is no SLURM here, or the sweep's folder is held by another process or
    holds another sweep.
    """

    def __init__(self, *, loader: ConfigLoader, task: TaskFunction, config: DictConfig) -> None:
        _refuse_without_slurm()
        self._batch = Batch(loader=loader, task=task, config=config)
        if config.sweep is not None and not self._batch.settings.wait:
            raise Refused(
                "launch.wait=false returns before a trial has a value, and sweep=optuna chooses "
                "the next by it; type launch.wait=true"
            )

    def launch(self, job_overrides: Sequence[Sequence[str]]) -> Sequence[JobReturn]:
        """Submit what is neither finished nor submitted of a batch; the values of all its jobs.

        With `launch.wait=false` no job has one.

        Raises SystemExit where waiting was interrupted: 128 and the signal.
        """
        return self._batch.launch(job_overrides, self._run)

    def _run(
        self, jobs: Sequence[Job], todo: list[Job], progress: Progress
    ) -> signal.Signals | None:
        top, settings = self._batch.folder, self._batch.settings
        runs = {job.job: self._prepared(job) for job in todo}  # before the first is submitted
        unreadable = [job for job in todo if job.state == UNREADABLE]
        for job in unreadable:
            progress.say(f"{job.error}; job {job.job} of the sweep is submitted again")
        new = [job for job in todo if job.state in LOST or job in unreadable or not job.attempt]
        ids = submit([runs[job.job] for job in new], settings=settings, folder=top.path / FILES)
        for job in new:
            job.state, job.error, job.attempt = "queued", None, job.attempt + 1
            top.note(job, "folder", "error", "attempt")
        if ids:
            progress.say(f"submitted {len(new)} job{'s' if len(new) > 1 else ''}: {_short(ids)}")
        if not settings.wait:
            progress.say(f"states and results: python -m app.report {top.path}")
            return None
        watch = {runs[job.job].folder: job for job in todo}
        stopped_by = Waiting(watch, progress, settings.on_interrupt.value).run()
        for job in todo:
            if job.state in ENDED:
                job.value = _objective(runs[job.job])
            else:
                top.note(job, "error")  # the job itself may not have come to say so
        return stopped_by

    def _prepared(self, job: Job) -> Submitted:
        """A job that can be pickled. Raises Refused where it is not allowed."""
        cfg = self._batch.composed(job)
        with read_write(cfg.hydra), open_dict(cfg.hydra):
            cfg.hydra.runtime.output_dir = str(self._batch.folder.path / str(job.folder))
        HydraConfig.instance().set_config(cfg)
        return Submitted(
            cfg=resolved(cfg),
            typed=list(job.overrides),
            sweep=self._batch.folder.path,
            number=job.job,
            attempt=job.attempt + 1,
            environment=_environment(),
        )


def submit_run(cfg: DictConfig, typed: Sequence[str]) -> float | None:
    """Submit one run; its objective, where it is waited for and has one.

    Raises:
        Refused: where it is not allowed, or there is no SLURM here.
        JobsFailed: where it was waited for, and failed.
    """
    folder = RunFolder(Path(cfg.run_dir))
    try:
        _refuse_without_slurm()
        run = Submitted(
            cfg=resolved(cfg),
            typed=list(typed),
            sweep=None,
            number=0,
            attempt=1,
            environment=_environment(),
        )
        config = check(run.cfg)
    except ValueError:
        folder.remove_if_empty()
        raise
    if config["resume"] == "never":
        folder.move_aside()
        run.cfg.resume = "auto"  # also when it is requeued
    folder.forget_torn()
    folder.refuse_changes(config)
    settings: Any = OmegaConf.to_object(cfg.launch)
    result = folder.read_result() or {}
    if result.get("status") in ENDED:
        print(f"{folder.path} is {result['status']}; see {folder.result_path}")
        return None
    job = Job(job=0, overrides=list(typed), folder=folder.path.name)
    refresh(folder.path.parent, [job])
    if SLURM_JOB in result and job.state in ("queued", "running"):
        print(f"job {result[SLURM_JOB]} of SLURM trains {folder.path}: {job.state}", flush=True)
    else:
        ids = submit([run], settings=settings, folder=folder.path / FILES)
        print(f"submitted job {_short(ids)}; what it prints: {folder.path / LOG}", flush=True)
    if not settings.wait:
        print(f"state and result: python -m app.report {folder.path}")
        return None
    stopped_by = Waiting({folder.path: job}, Progress([job]), settings.on_interrupt.value).run()
    if stopped_by is not None:
        raise SystemExit(128 + stopped_by)
    if job.state not in ENDED:
        error = first_line(job.error) or job.state
        raise JobsFailed(f"{folder.path}: {error}\n    {folder.path / LOG}")
    return _objective(run)


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


class Waiting:
    """Waits for jobs of SLURM, says what becomes of them, and asks about them on Ctrl-C.

    Args:
        jobs: by the folders of their runs; are told their states.
        on_interrupt: ask, cancel or leave.
    """

    def __init__(self, jobs: Mapping[Path, Job], progress: Progress, on_interrupt: str) -> None:
        self._jobs = jobs
        self._progress = progress
        self._on_interrupt = on_interrupt
        self._left = dict(jobs)
        self._running: set[Path] = set()
        self._numbers: dict[Path, str] = {}

    def run(self) -> signal.Signals | None:
        """Wait to their ends; SIGINT where it was interrupted."""
        asked_at = -ASK_S
        said: dict[str, str] = {}
        try:
            while self._left:
                if time.monotonic() - asked_at > ASK_S:
                    said, asked_at = states(self._ids()), time.monotonic()
                for folder, job in list(self._left.items()):
                    self._look(folder, job, said)
                waiting = len(self._left) - len(self._running)
                self._progress.live(waiting=waiting)
                if self._left:
                    time.sleep(POLL_S)
        except KeyboardInterrupt:
            self._interrupted()
            return signal.SIGINT
        finally:
            self._progress.close()
        return None

    def _look(self, folder: Path, job: Job, said: Mapping[str, str]) -> None:
        result = self._result(folder)
        job.state, job.error = state_of(result, said.get(self._numbers.get(folder, "")))
        if job.state == UNREADABLE:
            job.state = "failed"  # SLURM runs it no more, and nobody knows what it came to
        if job.state == "running" and folder not in self._running:
            self._running.add(folder)
            self._progress.started(job)
        if job.state in ("queued", "running"):
            return
        if folder not in self._running:
            self._progress.started(job)
        job.seconds = sum((result.get("seconds") or {}).values()) or None
        del self._left[folder]
        self._running.discard(folder)
        self._progress.ended(job, waiting=len(self._left) - len(self._running))

    def _result(self, folder: Path) -> dict[str, Any]:
        """What a run came to so far; remembers the number of its job."""
        result = result_in(folder)
        if SLURM_JOB in result:
            self._numbers[folder] = result[SLURM_JOB]
        return result

    def _ids(self) -> list[str]:
        for folder in self._left:
            self._result(folder)
        return [self._numbers[folder] for folder in self._left if folder in self._numbers]

    def _interrupted(self) -> None:
        ids = self._ids()
        choice = self._on_interrupt
        if choice == "ask":
            choice = "leave"
            if sys.stdin.isatty():
                print(f"\r{counts(list(self._jobs.values()))}")
                typed = input(f"cancel the {len(ids)} jobs that have not ended? [y/N] ")
                choice = "cancel" if typed.strip().lower().startswith("y") else "leave"
        if choice == "cancel":
            subprocess.run(["scancel", *ids], check=False)
            print(f"cancelled {_short(ids)}")
        else:
            print(f"SLURM goes on with {_short(ids)}; to end them type scancel {' '.join(ids)}")


def _objective(run: Submitted) -> float | None:
    """What the run came to, in the metric that a sweeper looks at."""
    metrics: dict[str, float] = result_in(run.folder).get("metrics", {})
    return None if run.cfg.objective is None else metrics.get(run.cfg.objective)


def _refuse_without_slurm() -> None:
    if shutil.which("sbatch") is None:
        raise Refused(
            "launch=slurm needs SLURM, and there is no sbatch here; type launch=local with -m, or "
            "launch=none"
        )


def _environment() -> dict[str, str]:
    """What `hydra.job.env_set` says."""
    return {str(key): str(value) for key, value in HydraConfig.get().job.env_set.items()}


def _earlier(run: RunFolder) -> dict[str, Any]:
    """What an earlier attempt had come to, which is not lost while the next one waits."""
    before = result_in(run.path)
    return {key: before[key] for key in ("metrics", "checkpoints") if key in before}


def _short(ids: Sequence[str]) -> str:
    """Numbers, at most a few."""
    return ", ".join(ids) if len(ids) <= 4 else f"{ids[0]} to {ids[-1]}"
