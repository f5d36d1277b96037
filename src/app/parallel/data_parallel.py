"""What several ranks need beside averaged gradients: their shares, and the same answer on each."""

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import CombinedLoader, rank_zero_warn
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torchmetrics import Metric

from app.errors import Refused
from app.parallel.split import WHOLE, SharedSampler, share_of, split


class DataParallel(pl.Callback):
    """Splits the data between the ranks, and makes what is measured that of all ranks.

    In `on_before_backward`, per micro-batch: weights the loss where the samples of the last step do
    not divide evenly, so that a step is the mean over its samples as on one process. Whatever is
    logged while evaluating is the mean over the ranks, so that all of them decide alike (Lightning
    leaves it to `sync_dist`, and rounds the weights of uneven shares). Buffers that a forward pass
    changes, such as BatchNorm's, are rank 0's before each evaluation, as in the checkpoint. Where
    other parameters are trained than in the epoch before, DistributedDataParallel is told.

    Args:
        weighted: false where the losses are weighted by counts of the batches.
    """

    def __init__(self, *, weighted: bool) -> None:
        self._weighted = weighted
        self._share = WHOLE
        self._sampler: Any = None
        self._weight = 1.0
        self._trained: set[str] = set()  # as DistributedDataParallel knows
        self._asks = False

    def log(self, model: pl.LightningModule, log: Callable[..., None]) -> Callable[..., None]:
        """What logs the mean over the ranks in place of a model's own method."""
        return partial(self._log, model, log)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._share = share_of(trainer)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(trainer.model, DistributedDataParallel):  # no gradient is restored yet
            self._trained = trained(pl_module)
            settle_buckets(trainer.model, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._asks = isinstance(trainer.model, DistributedDataParallel)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._asks = isinstance(trainer.model, DistributedDataParallel)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._asks:  # after all hooks of the epoch's start
            self._asks = False
            if (now := trained(pl_module)) != self._trained:
                self._trained = now
                wrap_again(trainer, pl_module)
        if self._sampler is not None:
            self._weight = self._sampler.weight(batch_idx)

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        weight = self._weight
        if weight != 1.0:
            loss.register_hook(lambda gradient: gradient * weight)  # type: ignore[no-untyped-call]

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not isinstance(trainer.model, DistributedDataParallel):
            return
        if unfrozen := sorted(trained(pl_module) - self._trained):
            raise Refused(
                f"{unfrozen[0]} of {type(pl_module).__name__} was unfrozen inside epoch "
                f"{trainer.current_epoch}, and the ranks did not average its gradients; unfreeze "
                "it in on_train_epoch_start, or type strategy=auto"
            )

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        make_buffers_alike(trainer, pl_module)

    def loaders(self, name: str, loaders: Any) -> Any:
        """What serves this rank's share of what a method of this name has returned."""
        trains = name == "train_dataloader"
        unsplit: list[Any] = []

        def one(loader: Any) -> Any:
            found, is_split = split(loader, share=self._share, evaluates=not trains)
            if not is_split:
                unsplit.append(loader)
            return found

        if isinstance(loaders, CombinedLoader):
            loaders.flattened = [one(loader) for loader in loaders.flattened]
        else:
            loaders = torch.utils._pytree.tree_map(one, loaders)
        if unsplit:
            what = getattr(unsplit[0], "dataset", unsplit[0])
            rank_zero_warn(
                f"{type(what).__name__} cannot be split between the {self._share.size} ranks from "
                "outside: it has to yield each rank its own samples, or all train on the same ones"
            )
        if trains:
            self._sampler = self._sampler_of(loaders)
        return loaders

    def _sampler_of(self, loaders: Any) -> Any:
        """What knows the weights; None where several loaders make a step, or counts weight it."""
        if not self._weighted or self._share.size == 1:
            return None
        if hasattr(loaders, "shard"):
            return loaders
        sampler = getattr(loaders, "batch_sampler", None) or getattr(loaders, "sampler", None)
        return sampler if isinstance(sampler, SharedSampler) else None

    def _log(
        self,
        model: pl.LightningModule,
        log: Callable[..., None],
        name: str,
        value: Any,
        *args: Any,
        **settings: Any,
    ) -> None:
        trainer = model._trainer
        if trainer is not None and self._share.size > 1 and not trainer.training:
            settings["sync_dist"] = True
            results = trainer._results
            if results is not None and results.batch is not None and not isinstance(value, Metric):
                size = settings.get("batch_size") or extract_batch_size(results.batch)
                # Lightning takes the mean of whole numbers over the ranks, rounded down
                settings["batch_size"] = float(size)
        log(name, value, *args, **settings)


def make_buffers_alike(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Give every rank the buffers of rank 0; all of them call it."""
    if share_of(trainer).size > 1:
        for buffer in pl_module.buffers():
            if type(buffer) is Tensor and buffer.device == trainer.strategy.root_device:
                torch.distributed.broadcast(buffer, src=0)


def trained(module: pl.LightningModule) -> set[str]:
    """The names of the parameters that are trained."""
    return {name for name, p in module.named_parameters() if p.requires_grad}


def wrap_again(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Let DistributedDataParallel average the gradients of the parameters that are trained now.

    It lists them once, when it is made: one that is unfrozen later would differ between the ranks.
    All ranks call it, between two steps.
    """
    strategy: Any = trainer.strategy
    strategy.model = pl_module
    gc.collect()  # the one before, whose hooks are on the parameters as long as it is there
    strategy.configure_ddp()
    settle_buckets(strategy.model, pl_module)


def settle_buckets(parallel: DistributedDataParallel, model: pl.LightningModule) -> None:
    """Let DistributedDataParallel lay out its buckets as in all later steps before the first one.

    It lays them out anew after the first backward pass, in the order in which gradients came, and
    the layout decides in which order three or more ranks add them up: the first step of a continued
    run would be rounded differently from the same step of the run that was not cut. A backward pass
    that gives zeros, in the same order in every fit, takes the place of the first one.
    """
    if parallel.static_graph or parallel.find_unused_parameters:
        return  # is not laid out anew, or learns the graph from its first pass
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def zero() -> Tensor:
        return torch.stack([(parameter * 0).sum().float() for parameter in trained]).sum()

    before = vars(model).get("forward")
    model.forward = zero  # type: ignore[method-assign]
    try:
        parallel().backward()
    finally:
        del model.forward
        if before is not None:
            model.forward = before  # type: ignore[method-assign]
    for parameter in trained:
        parameter.grad = None
