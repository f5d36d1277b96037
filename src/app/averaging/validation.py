"""The validation of a fit, run once more on the raw weights."""

import copy
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.trainer.states import RunningStage, TrainerFn

from app.averaging.apart import apart
from app.parallel.data_parallel import DataParallel
from app.parallel.split import second_loader

HOOKS = [
    f"on_validation_{when}"
    for when in ("start", "epoch_start", "batch_start", "batch_end", "epoch_end", "end")
]


class Validation(_EvaluationLoop):
    """Lightning's validation inside a fit, with something to do first.

    Args:
        trainer: of the fit.
        before: called with this whenever a validation is about to begin.
        instead_of: the one whose place it takes, with all that it knows.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        before: Callable[["Validation"], None] | None = None,
        instead_of: _EvaluationLoop | None = None,
    ) -> None:
        super().__init__(
            trainer, TrainerFn.FITTING, RunningStage.VALIDATING, verbose=False, inference_mode=False
        )
        if instead_of is not None:
            vars(self).update(vars(instead_of))
        self._before = before

    def run(self) -> Any:
        """Validate, after what is to be done before."""
        if self._before is not None:
            self._before(self)
        return super().run()

    def measure(self) -> dict[str, float]:
        """The metrics of a validation of its own, on second loaders, that leaves no trace.

        The model's hooks see the same trainer, epoch and step as in the one that follows; no hook
        of a callback is called but those that make the ranks alike, and no logger.
        """
        trainer: Any = self.trainer
        self.setup_data()
        if self.skip:
            return {}
        assert self._combined_loader is not None
        loop = Validation(trainer)
        loop._combined_loader = loaders = copy.copy(self._combined_loader)
        loaders.flattened = [second_loader(loader) for loader in loaders.flattened]
        loop._max_batches = self._max_batches
        loop._last_val_dl_reload_epoch = self._last_val_dl_reload_epoch
        shown: Any = (
            trainer.callback_metrics,
            trainer.logged_metrics,
            trainer.progress_bar_metrics,
        )
        before = [dict(metrics) for metrics in shown]
        callbacks = [c for c in trainer.callbacks if not isinstance(c, DataParallel)]
        hooks = [_without_hooks(callback) for callback in callbacks]
        trainer.fit_loop.epoch_loop.val_loop = loop
        try:
            with apart(trainer, trainer.lightning_module):
                loop.run()
                measured = {
                    name: float(value)
                    for name, value in trainer.callback_metrics.items()
                    if before[0].get(name) is not value
                }
        finally:
            trainer.fit_loop.epoch_loop.val_loop = self
            for callback, own in zip(callbacks, hooks, strict=True):
                _with_hooks(callback, own)
            for metrics, kept in zip(shown, before, strict=True):
                metrics.clear()
                metrics.update(kept)
        return measured


def _without_hooks(callback: pl.Callback) -> dict[str, Any]:
    """Let Lightning pass over the hooks of a validation; those that stood in the instance."""
    own = {hook: vars(callback)[hook] for hook in HOOKS if hook in vars(callback)}
    vars(callback).update(dict.fromkeys(HOOKS))
    return own


def _with_hooks(callback: pl.Callback, own: dict[str, Any]) -> None:
    for hook in HOOKS:
        vars(callback).pop(hook, None)
    vars(callback).update(own)
