"""The jobs that a sweeper wants run, whoever runs them: which are left, and what is told of them.

Needs no torch.
"""

import gc
import shlex
import signal
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from app.cli import NO_JOB, TaskOfCommand
from app.config import is_slurm
from app.errors import JobsFailed, Refused
from app.record.folder import LOG
from app.record.states import State
from app.sweep.composing import Composer
from app.sweep.folder import alone, claim, command, config_dirs, of_one_run, quoted
from app.sweep.journal import Job
from app.sweep.progress import Progress, counts, first_line, labels


class SweepLauncher(ABC):
    """Runs the jobs of one sweep, in its folder, which this process holds.

    Args:
        context: of the sweep; its loader composes the jobs from here on.
        task: what Hydra calls with a job's configuration.
        config: of the sweep; is told the folder.

    Attributes:
        settings: of the preset of `launch`.
        task: what does the work of a job.

    Raises Refused where the folder is held, or holds another sweep.
    """

    def __init__(self, *, context: HydraContext, task: TaskFunction, config: DictConfig) -> None:
        if OmegaConf.select(config, "launch") is None:
            chosen = config.hydra.runtime.choices["hydra/launcher"]
            raise Refused(
                f"hydra/launcher={chosen} has no settings; type launch=local or launch=slurm "
                "instead"
            )
        try:
            self.settings: Any = OmegaConf.to_object(config.launch)
        except ValueError as error:
            raise Refused(str(error)) from None
        self.prepare(config)
        assert isinstance(task, TaskOfCommand)
        self.task = task.task
        task.has_begun = True  # as far as it goes here: jobs are other processes
        self.config = config
        gc.enable()  # a composed job that nobody keeps is more than a MiB of cycles
        loader: Any = Composer(context.config_loader)
        self._loader = context.config_loader = loader
        self.folder, self._definition = claim(config)
        print(f"{self.folder.path}: composing the jobs", flush=True)

    @abstractmethod
    def prepare(self, config: DictConfig) -> None:
        """Make ready, before the folder is held. Raises Refused where no job can run here."""

    @abstractmethod
    def run(self, jobs: list[Job], progress: Progress) -> signal.Signals | None:
        """Run jobs to their ends; the signal that stopped them before, None where none did."""

    def launch(self, job_overrides: Sequence[Sequence[str]]) -> Sequence[JobReturn]:
        """Run what is not done of a batch; the values of all its jobs.

        Raises Refused where there is no job, or one was chosen that is not there; SystemExit where
        the sweep was interrupted: 128 and the signal.
        """
        if not job_overrides:
            raise Refused(NO_JOB)
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        jobs = self.folder.add(self._definition, [list(typed) for typed in job_overrides])
        for job in jobs:
            if job.state == State.finished and not (self.folder.path / job.place).is_dir():
                job.state = State.queued  # somebody wants it anew
        todo = self._chosen(jobs)
        self.folder.refresh(todo)
        progress = Progress(jobs)
        progress.say(self._announcement(jobs, todo))
        stopped_by = self.run(todo, progress) if todo else None
        if stopped_by is not None:
            progress.say(
                f"interrupted: {counts(jobs)}; to go on type the same command, or python -m "
                f"app.sweep resume {shlex.quote(str(self.folder.path))}"
            )
            raise SystemExit(128 + stopped_by)
        lost = [job for job in todo if job.state.is_lost]
        summary = f"{self.folder.path}: {counts(jobs)}"
        if not lost:
            progress.say(summary)
        self.folder.note_end()
        failure = JobsFailed(f"{summary}\n{self._listing(jobs, lost)}")
        return [_Lost(failure) if job in lost else _returned(job) for job in jobs]

    def _chosen(self, jobs: Sequence[Job]) -> list[Job]:
        """The jobs to run. Raises Refused where others are asked for than there are."""
        chosen, known = self.settings.jobs, [job.job for job in jobs]
        if chosen is not None and not {*chosen} <= {*known}:
            raise Refused(
                f"launch.jobs must be numbers of the sweep's jobs, {min(known)} to {max(known)}, "
                f"got {chosen}; type launch.jobs=null"
            )
        wanted = known if chosen is None else chosen
        return [job for job in jobs if job.state.is_to_run and job.job in wanted]

    def _announcement(self, jobs: Sequence[Job], todo: Sequence[Job]) -> str:
        path = self.folder.path
        if all(job.state == State.queued and job.attempt == 0 for job in jobs):
            return f"{path}: {len(jobs)} job{'s' if len(jobs) > 1 else ''}"
        return (
            f"continuing {path}: {counts(jobs)}; {len(todo)} to run "
            "(resume=never starts a sweep anew)"
        )

    def composed(self, job: Job) -> DictConfig:
        """The configuration of a job, with its folder; notes the folder."""
        cfg: DictConfig = self._loader.load_sweep_config(self.config, job.overrides)
        with open_dict(cfg):
            cfg.hydra.job.id = str(job.job)
            cfg.hydra.job.num = job.job
            cfg.hydra.sweep.dir = str(self.folder.path)
            if job.folder is not None:
                cfg.hydra.sweep.subdir = job.folder
            if not is_slurm(cfg.launch):
                cfg.launch = None  # the job is one run
            cfg.resume = "auto"  # also when it is tried again
        HydraConfig.instance().set_config(cfg)
        job.folder = str(cfg.hydra.sweep.subdir)
        return cfg

    def _listing(self, jobs: Sequence[Job], lost: Sequence[Job]) -> str:
        """The jobs that came to nothing, each with its error and the command that runs it again."""
        names = labels(jobs)
        lines = []
        for job in lost:
            error = first_line(job.error) or job.state
            lines += [
                f"#{job.job}  {names[job.job]}",
                f"    {error}",
                f"    {self.folder.path / job.place / LOG}",
                f"    {self._single(job)}",
            ]
        if self.config.sweep is None:  # a study has told itself that they failed
            folder = shlex.quote(str(self.folder.path))
            lines.append(f"all of them: python -m app.sweep retry {folder}")
        return "\n".join(lines)

    def _single(self, job: Job) -> str:
        """The command that runs a job alone, in its folder."""
        words = command()
        start = words[: 3 if words[1] == "-m" else 2]
        flags = alone(self.config.hydra.job.config_name, config_dirs(self.config))
        typed = of_one_run(list(filter_overrides(job.overrides)))
        run_dir = f"hydra.run.dir={quoted(str(self.folder.path / job.place))}"
        return shlex.join([*start, *flags, *typed, run_dir])


class _Lost(JobReturn):
    """What a sweeper gets for a job that failed: raises when it is read."""

    def __init__(self, failure: JobsFailed) -> None:
        super().__init__(status=JobStatus.FAILED)
        self._failure = failure

    @property  # type: ignore[misc]  # nobody sets it
    def return_value(self) -> Any:
        raise self._failure


def _returned(job: Job) -> JobReturn:
    done = JobReturn(overrides=job.overrides, status=JobStatus.COMPLETED)
    done.return_value = job.value
    return done
