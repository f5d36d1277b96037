"""What several ranks need beside averaged gradients: their shares, and the same answer on each."""

import gc
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import CombinedLoader, rank_zero_warn
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import default_collate
from torchmetrics import Metric, MetricCollection

from app.errors import Refused
from app.parallel.split import WHOLE, SharedSampler, each, mean_over_ranks, share_of, split

SUMS = ("sum", sum, torch.sum)
"""What Lightning takes for a sum of what is logged."""


class DataParallel(pl.Callback):
    """Splits the data between the ranks, and makes what is measured that of all ranks.

    In `on_before_backward`, per micro-batch: weights the loss where the samples of the last step do
    not divide evenly, so that a step is the mean over its samples as on one process. Whatever is
    logged while evaluating is the mean over the ranks, so that all of them decide alike (Lightning
    leaves it to `sync_dist`, and rounds the weights of uneven shares). Buffers that a forward pass
    changes, such as BatchNorm's, are rank 0's before each evaluation, as in the checkpoint. Where
    other parameters are trained than in the epoch before, DistributedDataParallel is told.

    A rank whose loader yields None takes part in the step, which is the mean over what came: its
    last batch is served again, and counts 0. (Lightning refuses a `training_step` that returns it.)

    Args:
        weighted: false where the losses are weighted by counts of the batches.
        accumulates: whether an accumulation divides the gradients by what came.

    Attributes:
        fillers: the micro-batches of the epoch for which this rank had none; filled by who serves.
        may_lack_batches: whether a rank may have none: the ranks then ask each other in each step.
    """

    def __init__(self, *, weighted: bool, accumulates: bool) -> None:
        self._weighted = weighted
        self._accumulates = accumulates
        self._share = WHOLE
        self._samplers: list[Any] = []
        self._evaluated: dict[str, list[Any]] = {}  # the samplers, by what has made their loaders
        self._before_repeat: list[tuple[Metric, dict[str, Any], int]] | None = None
        self._told = False
        self._weight = 1.0
        self._trained: set[str] = set()  # as DistributedDataParallel knows
        self._asks, self._asked_after = False, 0
        self._lacks = False
        self.fillers: set[int] = set()
        self.may_lack_batches = False

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
        if trainer.world_size == 1:
            return
        if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in trainer.optimizers):
            raise Refused(
                "strategy cannot split the batches of LBFGS: each rank would end its search of a "
                "step by a loss of its own; type strategy=single"
            )
        if self._asks and not pl_module.automatic_optimization:
            for optimizer in trainer.optimizers:
                compare_at_first_step(trainer, pl_module, optimizer)

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
        self._lacks = batch_idx in self.fillers
        weight = self._weight_of(batch_idx)
        if not self._weighted and weight:  # by counts, of which only a repeated sample has none
            weight = 1.0
        self._weight = 0.0 if self._lacks else weight

    def only_fills(self, batch_idx: int, *, counts: bool) -> bool:
        """Whether a micro-batch of this rank is not in the mean over what came.

        Args:
            counts: whether the mean is over counts of the batches, not over micro-batches.
        """
        repeats = counts and self._weight_of(batch_idx) == 0.0
        return repeats or batch_idx in self.fillers

    def _weight_of(self, batch_idx: int) -> float:
        """Of this rank's loss: of several loaders in one step, where they are split alike."""
        found = {sampler.weight(batch_idx % len(sampler)) for sampler in self._samplers}
        if len(found) > 1 and not self._told:
            self._told = True
            rank_zero_warn(
                f"the loaders of step {batch_idx} do not divide alike between the "
                f"{self._share.size} ranks, so its loss is not weighted as on one process; give "
                "them drop_last=True, or as many samples each"
            )
        return found.pop() if len(found) == 1 else 1.0

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        weight = self._weight
        if weight != 1.0:
            loss.register_hook(lambda gradient: gradient * weight)  # type: ignore[no-untyped-call]

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._asked_after != trainer.global_step:  # what a validation has unfrozen is in time
            self._refuse_unfrozen(trainer, pl_module)

    def _refuse_unfrozen(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise Refused where a parameter was trained that DistributedDataParallel left alone."""
        self._asked_after = trainer.global_step
        if not isinstance(trainer.model, DistributedDataParallel):
            return
        if unfrozen := sorted(trained(pl_module) - self._trained):
            raise Refused(
                f"{unfrozen[0]} of {type(pl_module).__name__} was unfrozen inside epoch "
                f"{trainer.current_epoch}, and the ranks did not average its gradients; unfreeze "
                "it in on_train_epoch_start, or type strategy=single"
            )

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.may_lack_batches and not self._accumulates:
            came = torch.tensor(float(not self._lacks), device=pl_module.device)
            mean = float(mean_over_ranks(trainer, came))
            if mean != 1.0:
                rescale(pl_module.parameters(), 1 / mean if mean else None)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        make_buffers_alike(trainer, pl_module)
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._refuse_unfrozen(trainer, pl_module)

    def on_validation_batch_start(self, *args: Any) -> None:
        self._begin_evaluation("val_dataloader", *args)

    def on_validation_batch_end(self, *args: Any) -> None:
        self._end_evaluation()

    def on_test_batch_start(self, *args: Any) -> None:
        self._begin_evaluation("test_dataloader", *args)

    def on_test_batch_end(self, *args: Any) -> None:
        self._end_evaluation()

    def _begin_evaluation(
        self,
        name: str,
        trainer: pl.Trainer,
        model: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Note the metrics before a batch that repeats a sample, which counts only once."""
        samplers = self._evaluated.get(name, [])
        sampler = samplers[dataloader_idx] if dataloader_idx < len(samplers) else None
        if sampler is None or not sampler.repeats(batch_idx):
            return
        self._before_repeat = [
            (metric, {key: _copy_of(value) for key, value in metric.metric_state.items()},
             metric.update_count)
            for metric in metrics_in(model).values()
        ]  # fmt: skip

    def _end_evaluation(self) -> None:
        for metric, state, count in self._before_repeat or []:
            for key, value in state.items():
                setattr(metric, key, value)
            metric._update_count, metric._computed = count, None
        self._before_repeat = None

    def loaders(self, name: str, loaders: Any) -> Any:
        """What serves this rank's share of what a method of this name has returned."""
        trains = name == "train_dataloader"
        unsplit: list[Any] = []

        def one(loader: Any) -> Any:
            found, is_split = split(loader, share=self._share, evaluates=not trains)
            if not is_split:
                unsplit.append(loader)
            return found

        loaders = each(one, loaders)
        if unsplit:
            what = getattr(unsplit[0], "dataset", unsplit[0])
            rank_zero_warn(
                f"{type(what).__name__} cannot be split between the {self._share.size} ranks from "
                "outside: it has to yield each rank its own samples, or all train on the same ones"
            )
        is_combined = isinstance(loaders, CombinedLoader)
        found = loaders.flattened if is_combined else torch.utils._pytree.tree_leaves(loaders)
        samplers = [self._sampler_of(loader) for loader in found]
        if not trains:
            self._evaluated[name] = samplers
        else:
            self._samplers = samplers if None not in samplers else []
            self.may_lack_batches = self._share.size > 1 and may_yield_none(loaders)
        return loaders

    def _sampler_of(self, loaders: Any) -> Any:
        """What knows the weights, and what is repeated."""
        if self._share.size == 1:
            return None
        if hasattr(loaders, "shard"):
            return loaders
        for name in ("batch_sampler", "sampler"):
            if isinstance(sampler := getattr(loaders, name, None), SharedSampler):
                return sampler
        return None

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
                settings["batch_size"] = float(size) if self._before_repeat is None else 0.0
                if self._before_repeat is not None and settings.get("reduce_fx") in SUMS:
                    value = value * 0
        log(name, value, *args, **settings)


def metrics_in(model: pl.LightningModule) -> dict[str, Metric]:
    """The metrics of a model, by name; those that share a state have copies of it."""
    for part in model.modules():
        if isinstance(part, MetricCollection):
            list(part.items())
    return {name: part for name, part in model.named_modules() if isinstance(part, Metric)}


def _copy_of(state: Any) -> Any:
    return [*state] if isinstance(state, list) else state.detach().clone()


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
    open_window = [(parameter, parameter.grad) for parameter in pl_module.parameters()]
    for parameter, _ in open_window:
        parameter.grad = None
    settle_buckets(strategy.model, pl_module)
    for parameter, gradient in open_window:
        parameter.grad = gradient


def compare_at_first_step(
    trainer: pl.Trainer, model: pl.LightningModule, optimizer: torch.optim.Optimizer
) -> None:
    """Raise Refused at the first step of an optimizer where the ranks would take another each.

    A model that steps by hand averages its gradients by `manual_backward`, and by nothing else.
    """

    def compare(*args: Any) -> None:
        handle.remove()
        own = [p.grad for group in optimizer.param_groups for p in group["params"]]
        sums = [grad.detach().double().abs().sum() for grad in own if grad is not None]
        mine = torch.stack(sums).sum() if sums else torch.zeros((), dtype=torch.float64)
        mean = mean_over_ranks(trainer, mine.to(trainer.strategy.root_device))
        if not torch.isclose(mine.to(mean.device), mean, rtol=1e-6):
            raise Refused(
                f"the gradients of {type(model).__name__} differ between the ranks: its "
                "training_step does not average them; call self.manual_backward(loss) in place of "
                "loss.backward(), and where a loss is of a part of the weights, as a GAN's, type "
                "strategy=ddp_find_unused; or type strategy=single"
            )

    handle = optimizer.register_step_pre_hook(compare)


def rescale(parameters: Iterable[Tensor], scale: float | None) -> None:
    """Multiply the gradients of parameters; None: take them away, as none came."""
    stepped = [parameter for parameter in parameters if parameter.grad is not None]
    if scale is None:
        for parameter in stepped:
            parameter.grad = None
    elif gradients := [parameter.grad for parameter in stepped if parameter.grad is not None]:
        torch._foreach_mul_(gradients, scale)


def may_yield_none(loaders: Any) -> bool:
    """Whether what serves the batches may leave one out: all that collates in a way of its own."""
    if isinstance(loaders, CombinedLoader | Mapping | list | tuple) or hasattr(loaders, "shard"):
        return False
    return getattr(loaders, "collate_fn", None) is not default_collate


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
