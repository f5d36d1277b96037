"""Running a copy of the model, with the same weights, without a trace in the run."""

import copy
import inspect
from collections import deque
from itertools import chain, islice
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset
from torchmetrics import Metric

from app.errors import Refused
from app.parallel.sharded import Sharded
from app.parallel.split import mean_over_ranks

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
STATISTICS = ("running_mean", "running_var")


def stand_in(pl_module: pl.LightningModule, trainer: pl.Trainer) -> pl.LightningModule:
    """A copy that shares the values of the parameters, and no other state.

    Running it leaves the original's modes, buffers, metrics and attributes alone. Tensors and data
    sets that are plain attributes are shared. Raises Refused where the model cannot be copied.
    """
    outside = [trainer, trainer.strategy, trainer.datamodule]  # type: ignore[attr-defined]
    outside += trainer.callbacks  # type: ignore[attr-defined]
    outside += [*trainer.loggers, *trainer.optimizers]
    memo: dict[int, Any] = {id(value): value for value in outside}
    for module in pl_module.modules():
        for value in vars(module).values():
            for item in value if isinstance(value, list | tuple | deque) else [value]:
                if isinstance(item, Tensor):  # one with a graph cannot be copied
                    is_state = isinstance(module, Metric)
                    memo[id(item)] = item.detach().clone() if is_state else item
                elif isinstance(item, Dataset | DataLoader):
                    memo[id(item)] = item
    for parameter in pl_module.parameters():
        # a tensor of its own: Lightning moves a model it has evaluated to the CPU
        alias = nn.Parameter(parameter.data, requires_grad=parameter.requires_grad)
        memo[id(parameter)] = alias
    memo.update((id(buffer), buffer.detach().clone()) for buffer in pl_module.buffers())
    try:
        twin = copy.deepcopy(pl_module, memo)
    except (TypeError, RuntimeError) as error:
        raise Refused(
            f"averaging needs a copy of {type(pl_module).__name__}, and that failed: {error}; type "
            "averaging.bn_batches=null averaging.validate=averaged to do without"
        ) from error
    twin._metric_attributes = None  # Lightning's list of them, by the ids of the originals
    for module in twin.modules():
        if isinstance(module, Metric):
            module.reset()
    return twin


def second_loader(loader: Any) -> Any:
    """A loader of the same data whose iteration leaves the position of the first alone."""
    twin = copy.copy(loader)
    for name in ("loader", "batch_sampler", "sampler", "generator"):
        if vars(loader).get(name) is not None if hasattr(loader, "__dict__") else False:
            vars(twin)[name] = second_loader(vars(loader)[name])
    if isinstance(twin, DataLoader):
        twin._iterator = None  # that of persistent workers
    return twin


@torch.no_grad()
def recompute_norms(
    trainer: pl.Trainer, pl_module: pl.LightningModule, *, names: list[str], num_batches: int
) -> bool:
    """Compute the running statistics of the named BatchNorms anew, in place, from training batches.

    The mean over at most `num_batches` batches, with everything but them in evaluation mode. Runs
    `training_step` of a copy; the random state and the loaders are left as they were. False, and
    nothing is changed, where the data yields no batch a second time. Source: torch's update_bn.
    """
    with isolate_rng():
        loaders = CombinedLoader(tree_map(second_loader, trainer.train_dataloader))
        num_batches = int(min(num_batches, trainer.num_training_batches))
        batches = (batch for batch, _, _ in islice(iter(loaders), num_batches))
        first = next(batches, None)
        if first is None:
            return False
        twin = stand_in(pl_module, trainer).eval()
        twin.trainer = trainer
        twin.log = _log_nothing  # type: ignore[method-assign]
        data = trainer.datamodule  # type: ignore[attr-defined]
        has_hook = is_overridden("on_before_batch_transfer", data, pl.LightningDataModule)
        hooks = data if has_hook else pl_module
        takes_index = len(inspect.signature(twin.training_step).parameters) > 1
        norms = {name: norm for name, norm in norms_of(twin) if name in names}
        for norm in norms.values():
            norm.train()
            norm.momentum = None
            norm.reset_running_stats()
        for index, batch in enumerate(chain([first], batches)):
            batch = trainer.precision_plugin.convert_input(batch)
            batch = hooks.on_before_batch_transfer(batch, 0)
            batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
            with trainer.precision_plugin.train_step_context():
                twin.training_step(*([batch, index] if takes_index else [batch]))
    for name, live in norms_of(pl_module):
        if name in norms:
            for key in STATISTICS:
                mean = mean_over_ranks(trainer, norms[name].get_buffer(key))
                live.get_buffer(key).copy_(mean)
    return True


def _log_nothing(*args: Any, **kwargs: Any) -> None:
    """Take the place of `LightningModule.log`, whatever it is called with."""


def evaluate(
    trainer: pl.Trainer, pl_module: pl.LightningModule, evaluator: pl.Trainer
) -> dict[str, float]:
    """The metrics of the validation data, without a trace in the run, its model or its loggers."""
    loaders = trainer.val_dataloaders
    if isinstance(loaders, CombinedLoader):
        loaders = loaders.iterables
    with isolate_rng():
        evaluator.validate(
            stand_in(pl_module, trainer),
            dataloaders=tree_map(second_loader, loaders),
            verbose=False,
        )
    return {name: float(value) for name, value in evaluator.callback_metrics.items()}


def evaluator_like(trainer: pl.Trainer) -> pl.Trainer:
    """A trainer that evaluates this process' share of the data as `trainer` does, without a log."""
    device = trainer.strategy.root_device
    return pl.Trainer(
        accelerator=device.type,
        devices=1 if device.index is None else [device.index],
        plugins=[LightningEnvironment()],
        precision=trainer.precision,
        limit_val_batches=trainer.limit_val_batches,
        logger=DummyLogger(),  # a model may draw into self.logger.experiment
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        inference_mode=False,
    )


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
    if isinstance(trainer.strategy, Sharded):
        raise Refused(
            f"averaging.bn_batches runs a copy of {model}, which cannot be made of sharded "
            f"weights; {instead}"
        )
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
    stand_in(pl_module, trainer)
