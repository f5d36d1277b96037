"""Ending a trial of a study early: by the objective that it has come to so far."""

from functools import cached_property
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from app.study import PRUNED, STORAGE, open_study

PARTS = 1000
"""Of an epoch: the study counts in whole numbers. Epochs compare also between batch sizes."""


class PrunesTrial(pl.Callback):
    """Reports the objective to the trial's study after each validation, and heeds its pruner.

    A pruned fit ends there as a fit that is stopped early does, with its average and its
    checkpoints. Rank 0 reports; the ranks are one trial. Validations of a trial that is run again
    are not reported twice.

    Args:
        run_dir: folder of the run, in that of the study.
        trial: number of the trial, >= 0.
        objective: a metric of the validation.
        pruner: median (Vizier, KDD 2017) or halving (arXiv 1810.05934).
        prune_after_trials: with median, trials that end before one is pruned, >= 0.
        prune_after_epochs: of a trial, before it is pruned, >= 0; with halving, before it is first
            compared, > 0.

    Attributes:
        has_pruned: whether the fit was ended.
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
        self._run_dir = Path(run_dir)
        self._number = trial
        self._objective = objective
        self._pruner = pruner
        self._after_trials = prune_after_trials
        self._after = round(PARTS * prune_after_epochs)
        self.has_pruned = False

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self._objective not in trainer.callback_metrics:
            return
        value = float(trainer.callback_metrics[self._objective])
        is_hopeless = trainer.is_global_zero and self._reported(value, _parts_of_epochs(trainer))
        if trainer.strategy.broadcast(is_hopeless):
            self.has_pruned = trainer.should_stop = True

    def _reported(self, value: float, step: int) -> bool:
        """Whether the study would prune the trial."""
        if step not in self._trial.study.trials[self._number].intermediate_values:
            self._trial.report(value, step)
        is_hopeless: bool = self._trial.should_prune()
        if is_hopeless:
            self._trial.set_user_attr(PRUNED, step / PARTS)
        return is_hopeless

    @cached_property
    def _trial(self) -> Any:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        folders = self._run_dir.absolute().parents
        study = open_study(next(f / STORAGE for f in folders if (f / STORAGE).exists()))
        study.pruner = self._made_pruner()
        return optuna.trial.Trial(study, study.trials[self._number]._trial_id)

    def _made_pruner(self) -> Any:
        from optuna import pruners

        if self._pruner == "halving":
            return pruners.SuccessiveHalvingPruner(min_resource=max(1, self._after))
        return pruners.MedianPruner(n_startup_trials=self._after_trials, n_warmup_steps=self._after)


def _parts_of_epochs(trainer: pl.Trainer) -> int:
    """How far a fit is; in optimizer steps where epochs have no length."""
    per_epoch = trainer.num_training_batches
    if per_epoch == float("inf"):
        return trainer.global_step
    return round(PARTS * (trainer.fit_loop.total_batch_idx + 1) / per_epoch)
