"""Steps of torch's own optimizers, of which Lightning tells no callback."""

from functools import partial
from typing import Any

import lightning.pytorch as pl
from torch.optim import Optimizer

from app.clip import Clip
from app.errors import Refused


class ClipsRaw(pl.Callback):
    """Lets a clip rule act where a model steps what `self.optimizers(use_pl_optimizer=False)` gave.

    Acts right before the optimizer does; not on a step that Lightning makes, where the rule itself
    is called.

    Raises:
        Refused: where the optimizer is given a closure, whose gradients are not yet there.
    """

    def __init__(self, clip: Clip) -> None:
        self._clip = clip
        self._hooks: list[Any] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not pl_module.automatic_optimization:
            act = partial(self._act, trainer, pl_module)
            self._hooks = [one.register_step_pre_hook(act) for one in trainer.optimizers]

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _act(
        self,
        trainer: pl.Trainer,
        model: pl.LightningModule,
        optimizer: Optimizer,
        args: tuple[Any, ...],
        settings: dict[str, Any],
    ) -> None:
        made = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total
        if made.ready > made.completed:
            return
        if any(value is not None for value in (*args[1:], settings.get("closure"))):
            raise Refused(
                f"clip cannot act where {type(model).__name__} gives torch's own optimizer a "
                "closure; step what self.optimizers() returns, or use clip=none"
            )
        self._clip.on_before_optimizer_step(trainer, model, optimizer)
