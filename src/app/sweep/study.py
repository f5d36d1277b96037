"""A study: a sweep whose jobs Optuna chooses, kept in the folder of the sweep. Needs no torch."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from app.cli import TaskOfCommand
from app.errors import JobsFailed, RankFailed, Refused
from app.process.files import write_atomically
from app.run.trials import PRUNED, STORAGE, STUDY, may_be_reported, open_study, url
from app.sweep.folder import SweepFolder

log = logging.getLogger(__name__)

BEST = "optimization_results.yaml"


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
        task_function.has_begun = True
        sweeper = OptunaSweeperImpl(
            sampler=None,
            direction=config.direction.value,
            storage=None,
            study_name=STUDY,
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
        # as Hydra's own sweeper does
        write_atomically(folder.path / "multirun.yaml", OmegaConf.to_yaml(config))
        try:
            study = open_study(folder.path / STORAGE)
        except KeyError:
            study = optuna.create_study(
                study_name=STUDY,
                storage=url(folder.path / STORAGE),
                direction=config.direction.value,
            )
        if study.direction.name.lower() != config.direction.value:
            raise Refused(
                f"{folder.path} holds a study with direction={study.direction.name.lower()}; give "
                "this one another name="
            )
        states = optuna.trial.TrialState
        for trial in study.get_trials(states=(states.RUNNING,)):  # whose command was cut
            is_pruned = PRUNED in trial.user_attrs
            study.tell(trial.number, state=states.PRUNED if is_pruned else states.FAIL)
        num_before = len(study.trials)
        if num_before:
            print(f"continuing {folder.path}: {num_before} trials of {settings.num_trials}")
        if settings.pruner != "none" and not may_be_reported(config.objective):
            print(f"objective={config.objective} is measured after the fit: no trial is pruned")
        self._sampler = _sampler(settings, seed=config.seed + num_before)
        self._sweeper, self._study, self._folder = sweeper, study, folder

    def sweep(self, arguments: list[str]) -> None:
        """Run the trials that are left.

        Raises JobsFailed where the first trials failed, more failed than are allowed, or all did.
        """
        from hydra_plugins.hydra_optuna_sweeper._impl import create_params_from_overrides

        settings = self._settings
        space, fixed = create_params_from_overrides(
            [*self._sweeper._parse_sweeper_params_config(), *arguments]
        )
        while (left := settings.num_trials - len(self._study.trials)) > 0:
            self._study.sampler = self._sampler
            trials = [self._study.ask() for _ in range(min(left, settings.num_parallel))]
            typed = self._sweeper._configure_trials(trials, space, fixed)
            # the number of a trial is that of its job, and one that its run can report to
            jobs = [
                [*words, f"sweep.trial={trial.number}"]
                for words, trial in zip(typed, trials, strict=True)
            ]
            returned = self._sweeper.launcher.launch(jobs, initial_job_idx=trials[0].number)
            # anew: Optuna does not read again what others wrote of trials that it has asked for
            self._study = open_study(self._folder.path / STORAGE)
            errors = [self._told(trial, job) for trial, job in zip(trials, returned, strict=True)]
            failures = [error for error in errors if error is not None]
            none_ran = all(job.status is JobStatus.FAILED for job in returned)
            is_first_batch = len(self._study.trials) == len(trials)
            is_over = len(failures) / len(trials) > settings.max_failure_rate or (
                is_first_batch and none_ran
            )
            different = list(dict.fromkeys(failures))  # a queue has one that lists all its jobs
            for error in different[is_over:]:
                log.warning("Failed experiment: %s", error)
            if is_over:
                raise different[0]
        self._write_best()

    def _told(self, trial: Any, job: JobReturn) -> Exception | None:
        """Tell the study what a trial came to; its error, where it failed."""
        from optuna.trial import TrialState

        try:
            value = float(job.return_value)
            is_pruned = PRUNED in self._study.trials[trial.number].user_attrs
            if not is_pruned and not math.isfinite(value):
                raise JobsFailed(f"{self._config.objective} is {value}")
        except RankFailed as failure:
            error: Exception = JobsFailed(str(failure))
        except Exception as failure:
            error = failure
        else:
            if is_pruned:
                self._study.tell(trial.number, state=TrialState.PRUNED)
            else:
                self._study.tell(trial.number, value)
            return None
        self._study.tell(trial.number, state=TrialState.FAIL)
        return error

    def _write_best(self) -> None:
        """Raises JobsFailed where no trial came to an objective."""
        from optuna.trial import TrialState

        study = self._study
        if not study.get_trials(states=(TrialState.COMPLETE,)):
            raise JobsFailed(f"none of {len(study.trials)} trials came to an objective")
        best = study.best_trial
        content = {"name": "optuna", "best_params": best.params, "best_value": best.value}
        write_atomically(self._folder.path / BEST, OmegaConf.to_yaml(content))
        print(
            f"best: trial {best.number}, {self._config.objective} {best.value:.4g}, {best.params}"
        )


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
