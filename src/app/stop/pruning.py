"""Ending a trial of a study early: by the objective that it has come to so far."""

import math
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from app.errors import Refused
from app.process.ranks import ranks
from app.record.trials import PRUNED, STORAGE, STUDY, open_study, url

PARTS = 1000
"""Of an epoch: the study counts in whole numbers. Epochs compare also between batch sizes."""


class PrunesTrial(pl.Callback):
    """Reports the objective to the trial's study after each validation, and heeds its pruner.

    A pruned fit ends there as a fit that is stopped early does, with its average and its
    checkpoints. Rank 0 reports; the ranks are one trial. A trial that is run again reports no
    validation twice, and stays pruned where it was. NaN is reported as the worst there is.

    Args:
        run_dir: folder of the run, in that of the study.
        trial: number of the trial, >= 0.
        objective: a metric of the validation.
        pruner: median (Vizier, KDD 2017) or halving (arXiv 1810.05934).
        prune_after_trials: with median, trials that end before one is pruned, >= 0.
        prune_after_epochs: of a trial, before it is pruned, >= 0; with halving, before it is first
            compared, > 0.

    Attributes:
        has_pruned: whether the trial was pruned, known when the fit has ended.

    Raises Refused where the folder is not in that of a study.
    """

    def __init__(
        self,
        *,
        run_dir: str,
        trial: int,
        objective: str,
        pruner: str,
        prune_after_trials: int,
        prune_after_epochs: float,
    ) -> None:
        self._storage = _storage_of(Path(run_dir))
        self._number = trial
        self._objective = objective
        self._pruner = pruner
        self._after_trials = prune_after_trials
        self._after = round(PARTS * prune_after_epochs)
        self.has_pruned = False

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if ranks().first(lambda: self._is_hopeless(trainer)):
            trainer.should_stop = True

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.has_pruned = ranks().first(self._was_pruned)

    def _was_pruned(self) -> bool:
        """Also where the fit had ended before, and nothing was left to validate."""
        trial = self._read()
        if not trial.intermediate_values:
            rank_zero_warn(
                f"objective={self._objective} was not there after a validation: the trial could "
                "not be pruned; name a metric of the validation, or type sweep.pruner=none"
            )
        return PRUNED in trial.user_attrs

    def _is_hopeless(self, trainer: pl.Trainer) -> bool:
        """Report the objective, where it was measured; whether the study would prune the trial."""
        if self._objective not in trainer.callback_metrics:
            return False
        value = float(trainer.callback_metrics[self._objective])
        if math.isnan(value):  # of which Optuna's storage keeps nothing
            value = math.inf if self._trial.study.direction.name == "MINIMIZE" else -math.inf
        step, before = _parts_of_epochs(trainer), self._read()
        if PRUNED in before.user_attrs:
            return True
        if step not in before.intermediate_values:
            self._trial.report(value, step)
        is_hopeless = bool(self._trial.should_prune())  # a scalar of numpy is no plain value
        if is_hopeless:
            self._trial.set_user_attr(PRUNED, True)
        return is_hopeless

    def _read(self) -> Any:
        """What the storage says of the trial now."""
        return self._trial.storage.get_trial(self._id)

    @cached_property
    def _trial(self) -> Any:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = open_study(self._storage)
        study.pruner = self._made_pruner()
        return optuna.trial.Trial(study, self._id)

    @cached_property
    def _id(self) -> int:
        """What the storage calls the trial."""
        from optuna.storages import RDBStorage

        storage = RDBStorage(url(self._storage))
        study = storage.get_study_id_from_name(STUDY)
        return int(storage.get_trial_id_from_study_id_trial_number(study, self._number))

    def _made_pruner(self) -> Any:
        from optuna import pruners

        if self._pruner == "halving":
            return pruners.SuccessiveHalvingPruner(min_resource=max(1, self._after))
        return pruners.MedianPruner(n_startup_trials=self._after_trials, n_warmup_steps=self._after)


def _storage_of(run_dir: Path) -> Path:
    """The storage of the study whose folder a run's is in."""
    for folder in run_dir.absolute().parents:
        if (folder / STORAGE).exists():
            return folder / STORAGE
    raise Refused(
        f"run_dir must be in the folder of the study, beside its {STORAGE}, got {run_dir}; leave "
        "run_dir away, or type sweep.pruner=none"
    )


def _parts_of_epochs(trainer: pl.Trainer) -> int:
    """How far a fit is; in optimizer steps where epochs have no length."""
    per_epoch = trainer.num_training_batches
    if per_epoch == float("inf"):
        return trainer.global_step
    # not by all batches so far: a tuner may change their size from one epoch to the next
    epochs = trainer.current_epoch + (trainer.fit_loop.batch_idx + 1) / per_epoch
    return round(PARTS * epochs)
