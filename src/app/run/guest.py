"""What looks after our techniques in a Trainer that is not ours."""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.pytorch.utilities import rank_zero_info

from app.errors import Refused
from app.parallel.sharded import Sharded
from app.record.metrics import HasStepMetrics, next_line
from app.run.beside import TECHNIQUES, refuse_lightnings
from app.run.trainer import Trainer

HERE = (
    "app.callbacks: the techniques act as in app.run. What only a run of app.run holds: a number "
    "of optimizer steps that is exact where the accumulation changes, a cut run that goes on bit "
    "for bit, and checkpoints that are whole after a power cut"
)


class Guest(pl.Callback):
    """Refuses what the techniques cannot act with, as a fit begins, and logs what they measure.

    Every `log_every_n_steps` optimizer steps, through the trainer's loggers. Stands behind them.

    Raises:
        Refused: where the weights are sharded by others, Lightning's accumulation or averages
            are in the same trainer, or one of ours twice.
    """

    def __init__(self) -> None:
        self._has_spoken = False
        self._num_steps = self._global_step = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._num_steps = self._global_step = 0
        _refuse_strategy(trainer.strategy)
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks:
            if not isinstance(callback, BatchSizeFinder | LearningRateFinder):  # act before the fit
                refuse_lightnings("the callbacks of the trainer", callback)
        for group, kind in TECHNIQUES.items():
            several = [type(one).__name__ for one in callbacks if isinstance(one, kind)]
            if len(several) > 1:
                raise Refused(
                    f"{group} must be one a trainer, got {' and '.join(several)}; keep one of the "
                    "callbacks"
                )
        if not self._has_spoken and not isinstance(trainer, Trainer):
            self._has_spoken = True
            rank_zero_info(HERE)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if trainer.global_step == self._global_step:
            return
        self._global_step = trainer.global_step
        self._num_steps += 1
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every == 0 or self._num_steps % every != 0:
            return
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        metrics: Mapping[str, float] = {
            name: value
            for one in callbacks
            if isinstance(one, HasStepMetrics)
            for name, value in one.step_metrics().items()
        }
        for logger in trainer.loggers if metrics else ():
            logger.log_metrics(dict(metrics), step=next_line(trainer))


def _refuse_strategy(strategy: Strategy) -> None:
    is_whole = isinstance(strategy, SingleDeviceStrategy | DDPStrategy | Sharded)
    if not is_whole or isinstance(strategy, DeepSpeedStrategy):
        raise Refused(
            f"the strategy of the trainer must leave each process all weights, got "
            f"{type(strategy).__name__}; use ddp, or app.run('strategy=fsdp', ...)"
        )
