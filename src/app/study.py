"""A study: a sweep whose jobs Optuna chooses, kept in the folder of the sweep. Needs no torch."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from app.cli import REFUSALS, JobsFailed, RankFailed, Refused, TaskOfCommand
from app.sweep.folder import SweepFolder

STORAGE = "study.db"


class Study:
    """The study in the folder of a sweep.

    Raises Refused where its settings are not allowed, or its folder is held.
    """

    def __init__(self, *, params: Mapping[str, str] | None, config: DictConfig) -> None:
        if config.sweep is None:
            raise Refused("hydra/sweeper=study has no settings; type sweep=optuna instead")
        try:
            self._settings: Any = OmegaConf.to_object(config.sweep)
        except ValueError as error:
            raise Refused(str(error)) from None
        if config.objective is None:
            raise Refused("objective is required with sweep=optuna; type objective=val_loss")
        self._params = params
        self._config = config

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction) -> None:
        """Open the study, or begin it."""
        import optuna
        from hydra_plugins.hydra_optuna_sweeper._impl import OptunaSweeperImpl

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        settings, config = self._settings, self._config
        assert isinstance(task_function, TaskOfCommand)
        sweeper = OptunaSweeperImpl(
            sampler=None,
            direction=config.direction.value,
            storage=None,
            study_name="study",
            n_trials=settings.num_trials,
            n_jobs=settings.num_parallel,
            max_failure_rate=settings.max_failure_rate,
            search_space=None,
            custom_search_space=None,
            params=self._params,
        )
        sweeper.setup(
            hydra_context=hydra_context, task_function=_Trial(task_function.task), config=config
        )
        folder = SweepFolder(Path(config.hydra.sweep.dir))
        if config.launch is None and not folder.hold():  # a queue holds it already
            raise Refused(folder.held_message())
        OmegaConf.save(config, folder.path / "multirun.yaml")  # as Hydra's own sweeper does
        sweeper.storage = f"sqlite:///{folder.path}/{STORAGE}"
        names = {"study_name": sweeper.study_name, "storage": sweeper.storage}
        try:
            study = optuna.load_study(**names)
        except KeyError:
            study = optuna.create_study(**names, direction=sweeper.direction)
        if study.direction.name.lower() != sweeper.direction:
            raise Refused(
                f"{folder.path} holds a study with direction={study.direction.name.lower()}; give "
                "this one another name="
            )
        for trial in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)  # its command was cut
        self._num_before = len(study.trials)
        if self._num_before:
            print(f"continuing {folder.path}: {self._num_before} trials of {settings.num_trials}")
        sweeper.job_idx = self._num_before  # the number of a trial is that of its job
        sweeper.n_trials = max(0, settings.num_trials - self._num_before)
        sweeper.sampler = _sampler(settings, seed=config.seed + self._num_before)
        sweeper.launcher = _Judging(sweeper.launcher, objective=config.objective, study=study)
        self._sweeper, self._study = sweeper, study

    def sweep(self, arguments: list[str]) -> None:
        """Run the trials that are left.

        Raises JobsFailed where the first trials failed, more failed than are allowed, or all did.
        """
        from optuna.trial import TrialState

        try:
            self._sweeper.sweep(arguments)
        except RankFailed as failure:
            raise JobsFailed(str(failure)) from None
        except ValueError as error:
            is_ours = isinstance(error, REFUSALS)  # or Optuna finds no best trial
            if is_ours or self._study.get_trials(states=(TrialState.COMPLETE,)):
                raise
            raise JobsFailed(
                f"none of {len(self._study.trials)} trials came to an objective"
            ) from error


def _sampler(settings: Any, *, seed: int) -> Any:
    """A continued study has another seed: it would draw its first trials again."""
    from optuna import samplers

    if settings.sampler == "random":
        return samplers.RandomSampler(seed=seed)
    if settings.sampler == "cmaes":
        return samplers.CmaEsSampler(seed=seed, n_startup_trials=settings.num_random)
    return samplers.TPESampler(seed=seed, n_startup_trials=settings.num_random)


class _Trial(TaskOfCommand):
    """What Hydra calls with a trial's configuration: the sweeper is told what it raises."""

    def __call__(self, cfg: DictConfig) -> Any:
        return self.task(cfg)


class _Judging(Launcher):
    """A launcher whose jobs have failed where their objective is not a finite number."""

    def __init__(self, launcher: Launcher, *, objective: str, study: Any) -> None:
        self._launcher = launcher
        self._objective = objective
        self._study = study

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Nothing: the launcher is set up."""

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run the jobs. Raises their error where all the trials of a new study have one."""
        jobs = self._launcher.launch(job_overrides, initial_job_idx=initial_job_idx)
        if all(job.status is JobStatus.FAILED for job in jobs) and not self._has_finished():
            for job in jobs:
                job.return_value  # noqa: B018  # raises
        return [self._judged(job) for job in jobs]

    def _has_finished(self) -> bool:
        from optuna.trial import TrialState

        return bool(self._study.get_trials(states=(TrialState.COMPLETE, TrialState.FAIL)))

    def _judged(self, job: JobReturn) -> JobReturn:
        if job.status is JobStatus.COMPLETED and not math.isfinite(job.return_value):
            text = f"{self._objective} is {job.return_value}"
            job.status = JobStatus.FAILED
            job.return_value = JobsFailed(text)
        return job
