"""A study: a sweep whose jobs Optuna chooses, kept in the folder of the sweep. Needs no torch."""

import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Transformer
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from app.cli import TaskOfCommand
from app.errors import JobsFailed, RankFailed, Refused
from app.monitored import followed
from app.process.files import write_atomically
from app.record.trials import PRUNED, STORAGE, STUDY, may_be_reported, open_study, url
from app.sweep.folder import SweepFolder

log = logging.getLogger(__name__)

BEST = "optimization_results.yaml"


class Trials:
    """The trials of the study in the folder of a sweep.

    Args:
        params: keys, and what they are swept over, beside what is typed.

    Raises Refused where its settings are not allowed, or its folder is held.
    """

    def __init__(
        self,
        *,
        params: Mapping[str, str] | None,
        context: HydraContext,
        task: TaskFunction,
        config: DictConfig,
    ) -> None:
        if config.sweep is None:
            raise Refused("hydra/sweeper=study has no settings; type sweep=optuna instead")
        try:
            settings: Any = OmegaConf.to_object(config.sweep)
        except ValueError as error:
            raise Refused(str(error)) from None
        if config.objective is None:
            raise Refused("objective is required with sweep=optuna; type objective=val_loss")
        assert isinstance(task, TaskOfCommand)
        task.has_begun = True
        self._settings, self._config = settings, followed(config)
        if self._config.direction is None:
            raise Refused(
                f"direction must be minimize or maximize where objective={config.objective}, a "
                "name that does not tell which values are better, got null; type direction=maximize"
            )
        self._params = [f"{key}={swept}" for key, swept in (params or {}).items()]
        self._launcher = Plugins.instance().instantiate_launcher(
            config=config, hydra_context=context, task_function=_Trial(task.task)
        )
        self._folder = SweepFolder(Path(config.hydra.sweep.dir))
        if config.launch is None and not self._folder.hold():  # a queue holds it already
            raise Refused(self._folder.held_message())
        # as Hydra's own sweeper does
        write_atomically(self._folder.path / "multirun.yaml", OmegaConf.to_yaml(config))
        self._study = self._begun()
        num_before = len(self._study.trials)
        if num_before:
            path, of = self._folder.path, settings.num_trials
            print(f"continuing {path}: {num_before} trials of {of}")
        if settings.pruner != "none" and not may_be_reported(config.objective):
            print(f"objective={config.objective} is measured after the fit: no trial is pruned")
        self._sampler = _sampler(settings, seed=config.seed + num_before)

    def _begun(self) -> Any:
        """The study, where those trials have failed whose command was cut."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        path, direction = self._folder.path / STORAGE, self._config.direction.value
        try:
            study = open_study(path)
        except KeyError:
            study = optuna.create_study(study_name=STUDY, storage=url(path), direction=direction)
        if study.direction.name.lower() != direction:
            raise Refused(
                f"{self._folder.path} holds a study with direction={study.direction.name.lower()}; "
                "give this one another name="
            )
        states = optuna.trial.TrialState
        for trial in study.get_trials(states=(states.RUNNING,)):
            is_pruned = PRUNED in trial.user_attrs
            study.tell(trial.number, state=states.PRUNED if is_pruned else states.FAIL)
        return study

    def run(self, typed: list[str]) -> None:
        """Run the trials that are left.

        Raises JobsFailed where the first trials failed, more failed than are allowed, or all did.
        """
        settings = self._settings
        fixed, space = space_of([*self._params, *typed])
        while (left := settings.num_trials - len(self._study.trials)) > 0:
            self._study.sampler = self._sampler
            trials = [self._study.ask() for _ in range(min(left, settings.num_parallel))]
            # the number of a trial is that of its job, and one that its run can report to
            jobs = [
                [
                    *(f"{key}={suggest(trial)}" for key, suggest in space.items()),
                    *(f"{key}={value}" for key, value in fixed.items()),
                    f"sweep.trial={trial.number}",
                ]
                for trial in trials
            ]
            returned = self._launcher.launch(jobs, initial_job_idx=trials[0].number)
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


def space_of(typed: list[str]) -> tuple[dict[str, str], dict[str, Callable[[Any], Any]]]:
    """What was typed, by key: of the values that are fixed the text, of those that are swept a
    function that suggests one to a trial."""
    parsed = {one.get_key_element(): one for one in OverridesParser.create().parse_overrides(typed)}
    fixed = {
        key: one.get_value_element_as_str()
        for key, one in parsed.items()
        if not one.is_sweep_override()
    }
    return fixed, {key: _suggesting(key, one) for key, one in parsed.items() if key not in fixed}


def _suggesting(key: str, override: Override) -> Callable[[Any], Any]:
    """The function that suggests a value of what a key is swept over."""
    swept: Any = override.value()
    if override.is_choice_sweep() or getattr(swept, "shuffle", False):
        choices = list(override.sweep_iterator(transformer=Transformer.encode))
        return lambda trial: trial.suggest_categorical(key, choices)
    if override.is_interval_sweep():
        low, high, how = swept.start, swept.end, {"log": "log" in swept.tags}
        are_whole = isinstance(low, int) and isinstance(high, int)
    else:
        low, high, how = swept.start, swept.stop, {"step": swept.step}
        are_whole = all(isinstance(one, int) for one in (low, high, swept.step))
    if are_whole:
        return lambda trial: trial.suggest_int(key, low, high, **how)
    return lambda trial: trial.suggest_float(key, low, high, **how)


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
