"""The running statistics of an average's BatchNorms, computed anew from training batches."""

import inspect
from itertools import chain, islice
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn
from torch.utils._pytree import tree_map

from app.averaging.apart import apart
from app.errors import Refused
from app.parallel.split import mean_over_ranks, second_loader

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
STATISTICS = ("running_mean", "running_var")


@torch.no_grad()
def recompute_norms(
    trainer: pl.Trainer, pl_module: pl.LightningModule, *, names: list[str], num_batches: int
) -> bool:
    """Compute the running statistics of the named BatchNorms anew, in place, from training batches.

    The mean over at most `num_batches` batches, with everything but them in evaluation mode. Runs
    `training_step`, of which nothing is left but the statistics. False, and nothing is changed,
    where the data yields no batch a second time. Source: torch's update_bn.
    """
    means = {}
    with apart(trainer, pl_module, parameters=True):
        loaders = CombinedLoader(tree_map(second_loader, trainer.train_dataloader))
        num_batches = int(min(num_batches, trainer.num_training_batches))
        batches = (batch for batch, _, _ in islice(iter(loaders), num_batches))
        first = next(batches, None)
        if first is None:
            return False
        pl_module.eval()
        pl_module.log = _log_nothing  # type: ignore[method-assign]
        data = trainer.datamodule  # type: ignore[attr-defined]
        has_hook = is_overridden("on_before_batch_transfer", data, pl.LightningDataModule)
        hooks = data if has_hook else pl_module
        step = pl_module.training_step
        takes_index = is_param_in_hook_signature(step, "batch_idx", min_args=2)
        norms = {name: norm for name, norm in norms_of(pl_module) if name in names}
        for norm in norms.values():
            norm.train()
            norm.momentum = None
            norm.reset_running_stats()
        for index, batch in enumerate(chain([first], batches)):
            batch = trainer.precision_plugin.convert_input(batch)
            batch = hooks.on_before_batch_transfer(batch, 0)
            batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
            with trainer.precision_plugin.train_step_context():
                step(*([batch, index] if takes_index else [batch]))
        for norm in norms.values():
            for key in STATISTICS:
                means[norm, key] = mean_over_ranks(trainer, norm.get_buffer(key)).clone()
    for (norm, key), mean in means.items():
        norm.get_buffer(key).copy_(mean)
    return True


def _log_nothing(*args: Any, **kwargs: Any) -> None:
    """Take the place of `LightningModule.log`, whatever it is called with."""


def norms_of(module: nn.Module) -> list[tuple[str, Any]]:
    """The BatchNorms that keep statistics, by name."""
    return [
        (name, part)
        for name, part in module.named_modules()
        if isinstance(part, NORMS) and part.running_mean is not None
    ]


def refuse_norms(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Raise Refused where the model has BatchNorms and `recompute_norms` could not run it."""
    if not norms_of(pl_module):
        return
    model = type(pl_module).__name__
    instead = "type averaging.bn_batches=null"
    parameters = inspect.signature(pl_module.training_step).parameters
    for why, is_so in (
        ("it steps its own optimizers (automatic_optimization=False)",
         not pl_module.automatic_optimization),
        ("its training_step takes dataloader_iter", "dataloader_iter" in parameters),
    ):  # fmt: skip
        if is_so:
            raise Refused(
                f"averaging.bn_batches cannot act with {model}: {why}; {instead} to average the "
                "running statistics instead"
            )
