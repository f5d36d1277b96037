"""`launch=slurm`: runs as jobs of SLURM, submitted with submitit. Needs no torch."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from app.config import Config
from app.errors import JobsFailed, Refused
from app.fit import linked, told_by_classes
from app.record.folder import LOG, RunFolder, result_in
from app.record.states import SLURM_JOB, State
from app.slurm.states import Signs, is_done, signs_of, states, true_state, true_states
from app.slurm.submit import FILES, refuse_without_slurm, resolved, short, submit
from app.slurm.submitted import Submitted
from app.sweep.folder import SweepFolder
from app.sweep.journal import Job
from app.sweep.launcher import SweepLauncher
from app.sweep.progress import Progress, counts, first_line

POLL_S = 1.0
"""How often the results of jobs are looked for."""

ASK_S = 5.0
"""How often SLURM is asked for the states of jobs."""


class Cluster(SweepLauncher):
    """The jobs of one sweep as jobs of SLURM: an array for all that need the same resources."""

    def prepare(self, config: DictConfig) -> None:
        """Raise Refused where there is no SLURM here, or nobody would wait for a trial's value."""
        refuse_without_slurm()
        if config.sweep is not None and not self.settings.wait:
            raise Refused(
                "launch.wait=false returns before a trial has a value, and sweep=optuna chooses "
                "the next by it; type launch.wait=true"
            )

    def run(self, jobs: list[Job], progress: Progress) -> signal.Signals | None:
        """Submit what is not submitted yet, and wait, with `launch.wait=false` not; SIGINT where
        waiting was interrupted."""
        folder, settings = self.folder, self.settings
        runs = {job.job: self._submitted(job) for job in jobs}  # before the first is submitted
        are_there = {job.job for job in jobs if job.attempt and job.state.is_under_way}
        new = [job for job in jobs if job.job not in are_there and not job.state.is_done]
        for job in new:
            if job.state == State.unreadable:
                progress.say(f"{job.error}; job {job.job} of the sweep is submitted again")
        ids = submit([runs[job.job] for job in new], settings=settings, folder=folder.path / FILES)
        for job in new:
            job.state, job.error, job.attempt = State.queued, None, job.attempt + 1
            folder.note(job, "folder", "error", "attempt")
        if ids:
            progress.say(f"submitted {len(new)} job{'s' if len(new) > 1 else ''}: {short(ids)}")
        if not settings.wait:
            progress.say(f"states and results: python -m app.report {folder.path}")
            return None
        watch = {runs[job.job].folder: job for job in jobs}
        stopped_by = Waiting(watch, progress, settings.on_interrupt.value).run()
        for job in jobs:
            if job.state.is_done:
                job.value = _objective(runs[job.job])
            else:
                folder.note(job, "error")  # the job itself may not have come to say so
        return stopped_by

    def _submitted(self, job: Job) -> Submitted:
        """A job that can be pickled. Raises Refused where it is not allowed."""
        cfg = self.composed(job)
        with read_write(cfg.hydra), open_dict(cfg.hydra):
            cfg.hydra.runtime.output_dir = str(self.folder.path / job.place)
        HydraConfig.instance().set_config(cfg)
        note = Noting(self.folder.path, job.job, list(job.overrides))
        return _submitted(resolved(cfg), job.overrides, note=note, attempt=job.attempt + 1)


@dataclass(frozen=True)
class Noting:
    """What a task of SLURM tells the journal of the sweep that its run is a job of."""

    sweep: Path
    number: int
    overrides: list[str]

    def __call__(self, state: State, *names: str, **values: Any) -> None:
        """Note a state, and the keys of a job's event that have changed with it."""
        job = Job(job=self.number, overrides=self.overrides, state=state, **values)
        job.device = os.environ.get("SLURM_JOB_NODELIST")
        SweepFolder(self.sweep).note(job, *names)


def submit_run(cfg: DictConfig, typed: Sequence[str]) -> float | None:
    """Submit one run; its objective, where it is waited for and has one.

    Raises:
        Refused: where it is not allowed, or there is no SLURM here.
        JobsFailed: where it was waited for, and failed.
    """
    folder = RunFolder(Path(cfg.run_dir))
    try:
        refuse_without_slurm()
        config = resolved(cfg)
        run = _submitted(config, typed, note=None, attempt=1)
    except ValueError:
        folder.remove_if_empty()
        raise
    if config.resume == "never":
        folder.move_aside()
        run.cfg.resume = "auto"  # also when it is requeued
    folder.forget_torn()
    if folder.read_config() is not None:  # which has what classes of the user's, and data, told
        config = resolved(linked(told_by_classes(cfg)))
    folder.refuse_changes(config.plain)
    settings: Any = OmegaConf.to_object(cfg.launch)
    result = folder.read_result() or {}
    if is_done(result):
        print(f"{folder.path} is {result['status']}; see {folder.result_path}")
        return None
    job = Job(job=0, overrides=list(typed), folder=folder.path.name)
    ((job.state, _),) = true_states([signs_of(folder.path, job)])
    if SLURM_JOB in result and job.state.is_under_way:
        print(f"job {result[SLURM_JOB]} of SLURM trains {folder.path}: {job.state}", flush=True)
    else:
        ids = submit([run], settings=settings, folder=folder.path / FILES)
        print(f"submitted job {short(ids)}; what it prints: {folder.path / LOG}", flush=True)
    if not settings.wait:
        print(f"state and result: python -m app.report {folder.path}")
        return None
    stopped_by = Waiting({folder.path: job}, Progress([job]), settings.on_interrupt.value).run()
    if stopped_by is not None:
        raise SystemExit(128 + stopped_by)
    if not job.state.is_done:
        error = first_line(job.error) or job.state
        raise JobsFailed(f"{folder.path}: {error}\n    {folder.path / LOG}")
    return _objective(run)


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
        signs = Signs(result={"status": State.queued, SLURM_JOB: None, **result})
        job.state, error = true_state(signs, said.get(self._numbers.get(folder, "")))
        job.error = None if job.state.is_under_way else error
        if job.state == State.unreadable:
            job.state = State.failed  # SLURM runs it no more, and nobody knows what it came to
        if job.state == State.running and folder not in self._running:
            self._running.add(folder)
            self._progress.started(job)
        if job.state.is_under_way:
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
            print(f"cancelled {short(ids)}")
        else:
            print(f"SLURM goes on with {short(ids)}; to end them type scancel {' '.join(ids)}")


def _objective(run: Submitted) -> float | None:
    """What the run came to, in the metric that a sweeper looks at."""
    metrics: dict[str, float] = result_in(run.folder).get("metrics", {})
    return None if run.cfg.objective is None else metrics.get(run.cfg.objective)


def _submitted(
    config: Config, typed: Sequence[str], *, note: Noting | None, attempt: int
) -> Submitted:
    variables = HydraConfig.get().job.env_set
    return Submitted(
        cfg=config.composed,
        typed=list(typed),
        note=note,
        attempt=attempt,
        environment={str(key): str(value) for key, value in variables.items()},
    )
