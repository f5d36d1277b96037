"""The layers of the model, printed when training starts."""

import sys

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelSummary, RichModelSummary
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities.model_summary.model_summary import summarize
from lightning.pytorch.utilities.model_summary.model_summary_deepspeed import DeepSpeedSummary


def summary(*, max_depth: int) -> pl.Callback:
    """Lightning's summary of a model: in colours where the output is a terminal.

    Args:
        max_depth: levels of modules in modules, >= 0, where 0 prints nothing; -1 for all.
    """
    kind = RichModelSummary if sys.stdout.isatty() else PlainSummary
    return kind(max_depth=max_depth)


class PlainSummary(ModelSummary):
    """Lightning's, printed: it logs, which nobody sees where no logging is set up."""

    def __init__(self, max_depth: int) -> None:
        super().__init__(max_depth=max_depth)
        self._depth = max_depth

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._depth == 0:
            return
        strategy = trainer.strategy
        is_split = isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3
        make = DeepSpeedSummary if is_split else summarize
        text = str(make(pl_module, max_depth=self._depth))
        if trainer.is_global_zero:
            print(text, flush=True)
