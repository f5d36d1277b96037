"""Weight averaging: one engine, three rules.

The average lives beside the weights, as one shadow tensor for each trainable floating parameter and
each floating buffer of the state dict. Everything else (integer buffers, frozen parameters, buffers
with infinities) is shared by both. It is shown by setting data pointers: nothing is copied.
"""

import copy
import inspect
import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Container, Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import CombinedLoader, rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset
from torch.utils.hooks import RemovableHandle
from torchmetrics import Metric

RAW = "raw_weights"
WIDE = "averaged_weights_float32"
STATISTICS = ("running_mean", "running_var")


# --------------------------------------------------------------------------------------- the rules


def is_due(
    *,
    step: int,
    epoch: int,
    epoch_end: bool,
    start_epoch: int | None,
    start_step: int | None,
    every_n_steps: int | None,
) -> bool:
    """Whether to update after optimizer step `step` of `epoch`, or at its end; both from 0.

    Every `every_n_steps` steps behind the start; at the end of each epoch where that is None.
    """
    first = 0 if start_step is None else start_step
    if step < first or (start_epoch is not None and epoch < start_epoch):
        return False
    if every_n_steps is None:
        return epoch_end
    return not epoch_end and (step + 1 - first) % every_n_steps == 0


def decay_of(
    *,
    decay: float | None,
    half_life_steps: float | None,
    horizon: float,
    num_steps: float,
    every_n_steps: int,
) -> float:
    """The share of the average that one update keeps: 0 to below 1.

    Given, or from the half-life, or such that it remembers `horizon` of a run of `num_steps`.
    Raises ValueError where the length is needed and unknown (not a positive finite number).
    """
    if decay is not None:
        return decay
    if half_life_steps is not None:
        return float(0.5 ** (every_n_steps / half_life_steps))
    if not 0 < num_steps < math.inf:
        raise ValueError(
            "averaging.decay must be given where the length of the run is not known, got null; "
            "type averaging.decay=0.999, or give the run a length with trainer.max_steps"
        )
    return max(0.0, 1 - every_n_steps / (horizon * num_steps))


def warmed_up(*, decay: float, num_updates: int, gamma: float, power: float) -> float:
    """The decay of update `num_updates` (from 0) while it grows to `decay`. Source: timm."""
    return min(decay, float(1 - (1 + num_updates / gamma) ** -power))


def annealed(*, start: float, end: float, progress: float, strategy: str) -> float:
    """From `start` to `end` while progress goes from 0 to 1, as cos or linear. As torch's SWALR."""
    progress = min(1.0, progress)
    share = (1 - math.cos(math.pi * progress)) / 2 if strategy == "cos" else progress
    return start + (end - start) * share


def first_epoch(*, start: int | float, max_epochs: int | None) -> int:
    """The epoch, from 0, that a number of epochs (int) or a share of the run (float) stands for.

    Raises ValueError for a share of a run without a number of epochs.
    """
    if isinstance(start, int):
        return start
    if max_epochs is None or max_epochs < 0:
        raise ValueError(
            "averaging.start must be a number of epochs or null where trainer.max_epochs sets no "
            f"end, got {start}; type averaging.start=10, or averaging.start=null "
            "averaging.start_step=1000"
        )
    return math.floor(round(start * max_epochs, 9))


# -------------------------------------------------------------------------------------- the shadow


class Shadow:
    """The averaged tensors of a module, and which of both, average or raw, the module now holds.

    Begins as a copy of the module's. A shadow is of its tensor's dtype, but at least float32.
    `keep` names tensors to take in though frozen. Tensors are listed once: an update costs one
    foreach pass, and a swap one assignment a tensor.
    """

    def __init__(self, module: torch.nn.Module, keep: Container[str] = ()) -> None:
        self.average_is_live = False
        self._module = module
        self._averages: dict[str, Tensor] = {}
        self._raw: dict[str, Tensor] = {}  # while the average is live
        self._live: dict[str, Tensor] = {}
        self._scan(keep)

    def scan(self) -> None:
        """List the tensors anew; newly trainable ones join with their present value."""
        self._scan(self._averages)

    @torch.no_grad()
    def update(self, weight: float) -> None:
        """Move the average towards the live tensors: by the share `weight`, 0 to 1."""
        assert not self.average_is_live
        self._follow_buffers()
        for live, averages in self._same:
            torch._foreach_lerp_(averages, live, weight)
        for live, averages in self._wider:
            torch._foreach_mul_(averages, 1 - weight)
            torch._foreach_add_(averages, live, alpha=weight)

    def swap(self) -> None:
        """Show the average where the raw tensors are live, and the other way round; exact."""
        self._follow_buffers()
        if self.average_is_live:
            for name, tensor in self._live.items():
                tensor.data = self._raw[name]
            self._raw = {}
        else:
            self._raw = {name: tensor.data for name, tensor in self._live.items()}
            for live, averages in self._same:
                for tensor, average in zip(live, averages, strict=True):
                    tensor.data = average
            for name in self._wider_names:
                tensor = self._live[name]
                tensor.data = self._averages[name].to(tensor.dtype)
        self.average_is_live = not self.average_is_live

    def adopt(self, names: Iterable[str]) -> None:
        """Make the live average of these, changed in place, the average; unknown names are not."""
        assert self.average_is_live
        for name in set(names) & set(self._wider_names):
            self._averages[name].copy_(self._live[name])

    def tensors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The average, in the module's dtype, and the raw tensor, by name."""
        self._follow_buffers()
        return {
            name: (live.detach(), self._raw[name])
            if self.average_is_live
            else (self._averages[name].to(live.dtype), live.detach())
            for name, live in self._live.items()
        }

    def wider(self) -> dict[str, Tensor]:
        """The averages that are wider than the module's tensors, by name."""
        return {name: self._averages[name] for name in self._wider_names}

    def names(self) -> dict[int, str]:
        """The name of each live tensor, by `id`: tied ones stand in a state dict several times."""
        self._follow_buffers()
        return {id(tensor): name for name, tensor in self._live.items()}

    @torch.no_grad()
    def restore(self, raw: Mapping[str, Tensor], averages: Mapping[str, Tensor]) -> None:
        """Take `averages` for the average, the live tensors where it has none; make `raw` live.

        Raises ValueError where the module lacks one of `raw`.
        """
        if missing := raw.keys() - self._live.keys():
            raise ValueError(
                f"the checkpoint holds raw weights that {type(self._module).__name__} has not: "
                f"{', '.join(sorted(missing))}; resume with the model it was written with"
            )
        for name, tensor in raw.items():
            if name in averages:
                self._averages[name].copy_(averages[name])
            self._live[name].copy_(tensor)

    def _scan(self, keep: Container[str]) -> None:
        self._live, self._buffers = {}, []
        seen = set()
        for name, owner, key, tensor, is_buffer in _slots(self._module):
            wanted = name in keep or (
                bool(torch.isfinite(tensor).all()) if is_buffer else tensor.requires_grad
            )
            if id(tensor) in seen or not wanted:
                continue
            if not self.average_is_live and not _fits(self._averages.get(name), tensor):
                dtype = torch.promote_types(tensor.dtype, torch.float32)
                self._averages[name] = tensor.detach().to(dtype, copy=True)
            if name in self._averages:
                seen.add(id(tensor))
                self._live[name] = tensor
                if is_buffer:
                    self._buffers.append((owner, key, tensor))
        self._averages = {name: self._averages[name] for name in self._live}
        groups: dict[tuple[Any, ...], tuple[list[Tensor], list[Tensor]]] = {}
        for name, tensor in self._live.items():
            live, averages = groups.setdefault((tensor.device, tensor.dtype), ([], []))
            live.append(tensor)
            averages.append(self._averages[name])
        self._same = [pair for pair in groups.values() if pair[0][0].dtype == pair[1][0].dtype]
        self._wider = [pair for pair in groups.values() if pair[0][0].dtype != pair[1][0].dtype]
        self._wider_names = [
            name
            for name, tensor in self._live.items()
            if tensor.dtype != self._averages[name].dtype
        ]

    def _follow_buffers(self) -> None:
        for owner, key, tensor in self._buffers:
            if owner.get(key) is not tensor:  # assigned to, not changed in place
                self.scan()
                return


def _slots(
    module: torch.nn.Module,
) -> Iterator[tuple[str, dict[str, Tensor | None], str, Tensor, bool]]:
    """Each floating parameter and buffer of the state dict: name, its dict and key, is it a buffer.

    A shared module comes once, a tensor shared by modules once for each.
    """
    for prefix, owner in module.named_modules():
        for slots, is_buffer in ((owner._parameters, False), (owner._buffers, True)):
            for key, tensor in slots.items():
                if tensor is None or not (tensor.is_floating_point() or tensor.is_complex()):
                    continue
                if not (is_buffer and key in owner._non_persistent_buffers_set):
                    yield f"{prefix}.{key}" if prefix else key, slots, key, tensor, is_buffer


def _fits(average: Tensor | None, tensor: Tensor) -> bool:
    return (
        average is not None
        and average.shape == tensor.shape
        and average.device == tensor.device
        and average.dtype == torch.promote_types(tensor.dtype, torch.float32)
    )


# ---------------------------------------------------------------------- evaluating without a trace


def stand_in(pl_module: pl.LightningModule, trainer: pl.Trainer) -> pl.LightningModule:
    """A copy that shares the values of the parameters, and no other state.

    Running it leaves the original's modes, buffers, metrics and attributes alone. Tensors and data
    sets that are plain attributes are shared. Raises ValueError where the model cannot be copied.
    """
    outside = [trainer, trainer.strategy, trainer.datamodule]  # type: ignore[attr-defined]
    outside += [*_callbacks(trainer), *trainer.loggers, *trainer.optimizers]
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
        alias = torch.nn.Parameter(parameter.data, requires_grad=parameter.requires_grad)
        memo[id(parameter)] = alias
    memo.update((id(buffer), buffer.detach().clone()) for buffer in pl_module.buffers())
    try:
        twin = copy.deepcopy(pl_module, memo)
    except (TypeError, RuntimeError) as error:
        raise ValueError(
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
        takes_index = len(inspect.signature(twin.training_step).parameters) > 1
        norms = {name: norm for name, norm in _norms_of(twin) if name in names}
        for norm in norms.values():
            norm.train()
            norm.momentum = None
            norm.reset_running_stats()
        for index, batch in enumerate(chain([first], batches)):
            batch = trainer.precision_plugin.convert_input(batch)
            batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
            batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
            with trainer.precision_plugin.train_step_context():
                twin.training_step(*([batch, index] if takes_index else [batch]))
    for name, live in _norms_of(pl_module):
        if name in norms:
            for key in STATISTICS:
                live.get_buffer(key).copy_(norms[name].get_buffer(key))
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


# -------------------------------------------------------------------------------------- the engine


class Averaging(pl.Callback, ABC):
    """Keeps the average, shows it to whatever evaluates, saves or delivers, and resumes it exactly.

    Acts in `on_train_batch_end`: counts batches in which an optimizer really stepped (two that step
    in one batch are one step) and updates where the rule says so. A rule has two methods:
    `should_update` and `weight`. The state belongs to one fit.

    Args:
        start_step: optimizer steps trained before averaging may begin, >= 0; None: no bound.
        every_n_steps: optimizer steps from update to update; None: at the end of each epoch.
        validate: averaged, raw or both: whose metrics a validation measures. `both` evaluates the
            raw weights as well, on their own, and logs `raw_<metric>`, once averaging has started.
        bn_batches: training batches from which the average's BatchNorm statistics are computed; a
            checkpoint written inside an epoch without a validation holds averaged ones. None:
            averages the running statistics.

    Raises:
        ValueError: where `bn_batches` cannot act, or a second average is in the same trainer.
    """

    def __init__(
        self,
        *,
        start_step: int | None,
        every_n_steps: int | None,
        validate: str,
        bn_batches: int | None,
    ) -> None:
        self.start_step = start_step
        self.every_n_steps = every_n_steps
        self.validate = validate
        self.bn_batches = bn_batches
        self._handles: list[RemovableHandle] = []
        self._files: _AveragedCheckpoints | None = None
        self._shadow: Shadow | None = None
        self._evaluator: pl.Trainer | None = None
        self._restored: dict[str, dict[str, Tensor]] = {}
        self._restored_averages: dict[str, Tensor] = {}
        self._raw_metrics: dict[str, float] = {}
        self._norms: list[str] = []
        self._stepped = False  # in this batch
        self._reset()

    @abstractmethod
    def should_update(self, *, step: int, epoch: int, epoch_end: bool) -> bool:
        """Whether to update now.

        Asked after each optimizer step, and, with `epoch_end`, before the validation that follows
        the last batch of each epoch in which weights changed since the last update.

        Args:
            step: the optimizer step just made, counted from 0.
            epoch: the epoch it belongs to, counted from 0.
            epoch_end: False after a step, True at the end of the epoch.
        """

    @abstractmethod
    def weight(self, *, num_updates: int) -> float:
        """The share, 0 to 1, of the present weights in the average; `num_updates` went before."""

    @abstractmethod
    def starts_at(self) -> str:
        """The keys that say when the average starts, as typed."""

    def step_metrics(self) -> dict[str, float]:
        """The number of models in the average."""
        return {"averaged_models": float(self._num_updates)}

    # what Lightning calls, in the order in which it does

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._release(trainer)
        if stage != "fit":
            return
        self._reset()
        if sum(isinstance(callback, Averaging) for callback in _callbacks(trainer)) > 1:
            raise ValueError(
                "averaging must be one average a run, got several; keep one of the callbacks"
            )
        self._files = _AveragedCheckpoints(self, pl_module, trainer.strategy.checkpoint_io)
        trainer.strategy.checkpoint_io = self._files

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn == "fit":
            found = [key for key in (RAW, WIDE) if key in checkpoint]
            self._restored = {key: checkpoint[key] for key in found}
            self._restored_averages = checkpoint["state_dict"] if found else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._num_steps = state_dict["num_steps"]
        self._num_updates = state_dict["num_updates"]
        self._moved = state_dict["moved"]
        self._ended_epoch = state_dict["ended_epoch"]
        self._norms_stale = state_dict["norms_stale"]

    def state_dict(self) -> dict[str, Any]:
        return {
            "num_steps": self._num_steps,
            "num_updates": self._num_updates,
            "moved": self._moved,
            "ended_epoch": self._ended_epoch,
            "norms_stale": self._norms_stale,
        }

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._check_norms(trainer, pl_module)
        if self.validate == "both":
            self._evaluator = evaluator_like(trainer)
        self._resume(pl_module)
        self._handles = [
            optimizer.register_step_post_hook(self._note_step) for optimizer in trainer.optimizers
        ]

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._scan_due = True  # at the next update: other callbacks unfreeze after this one

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        epoch = trainer.current_epoch
        if self._stepped:
            self._stepped, self._moved = False, True
            self._num_steps += 1
            if self.should_update(step=self._num_steps - 1, epoch=epoch, epoch_end=False):
                self._update(pl_module)
        if trainer.is_last_batch or _stops_here(trainer):
            self._end_epoch(epoch, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._raw_metrics = {}
        if self._shadow is None:
            return
        self._refresh_norms(trainer, pl_module)
        if self._evaluator is not None:
            self._raw_metrics = evaluate(trainer, pl_module, self._evaluator)
        if self.validate != "raw":
            self._shadow.swap()

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for name, value in self._raw_metrics.items():
            name = name.replace("/dataloader_idx_", "_dataloader_")  # Lightning keeps that name
            pl_module.log(f"raw_{name}", value, sync_dist=trainer.world_size > 1)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._show_raw()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end_epoch(trainer.current_epoch, pl_module)  # if it ended without a last batch
        self._refresh_norms(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._remove_hooks()
        if self._shadow is None:
            rank_zero_warn(
                f"averaging never started: {self.starts_at()} was not reached in "
                f"{self._num_steps} optimizer steps and {trainer.current_epoch} epochs, so the run "
                "delivers its raw weights; let averaging start earlier, or type averaging=none"
            )
            return
        self._refresh_norms(trainer, pl_module)
        self._shadow.swap()
        self._delivered = True
        rank_zero_info(
            f"averaging: the run delivers the average of {self._num_updates} updates; the raw "
            f"weights are in its checkpoints, under {RAW!r}"
        )

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._remove_hooks()
        self._show_raw()  # the average stays: a checkpoint may yet be written

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._release(trainer)

    # how

    def _reset(self) -> None:
        self._num_steps = 0
        self._num_updates = 0
        self._stepped = False
        self._moved = False  # since the last update
        self._ended_epoch = -1
        self._norms = []
        self._norms_stale = False
        self._scan_due = False
        self._delivered = False
        self._shadow, self._evaluator = None, None
        self._restored, self._restored_averages, self._raw_metrics = {}, {}, {}

    def _release(self, trainer: pl.Trainer) -> None:
        """Let go of what one fit held; the model keeps what it shows."""
        self._remove_hooks()
        self._show_raw()
        self._shadow, self._evaluator = None, None
        self._restored, self._restored_averages = {}, {}
        files, self._files = self._files, None
        if files is not None and trainer.strategy.checkpoint_io is files:
            trainer.strategy.checkpoint_io = files.inner

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _show_raw(self) -> None:
        if self._shadow is not None and self._shadow.average_is_live and not self._delivered:
            self._shadow.swap()

    def _note_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Note that an optimizer stepped, unless nothing had a gradient or the scaler refused."""
        refused = getattr(optimizer, "found_inf", None)
        if refused is not None and refused.item():
            return
        self._stepped = self._stepped or any(
            parameter.grad is not None
            for group in optimizer.param_groups
            for parameter in group["params"]
        )

    def _update(self, pl_module: pl.LightningModule) -> None:
        if self._shadow is None:
            self._shadow = Shadow(pl_module)
            self._note_norms(pl_module)
            rank_zero_info(
                f"averaging={type(self).__name__.lower()} starts at optimizer step "
                f"{self._num_steps}"
            )
        else:
            if self._scan_due:
                self._shadow.scan()
                self._note_norms(pl_module)
            self._shadow.update(self.weight(num_updates=self._num_updates))
        self._scan_due, self._moved = False, False
        self._num_updates += 1
        self._norms_stale = True

    def _end_epoch(self, epoch: int, pl_module: pl.LightningModule) -> None:
        if epoch == self._ended_epoch:
            return
        self._ended_epoch = epoch
        step = self._num_steps - 1
        if self._moved and self.should_update(step=step, epoch=epoch, epoch_end=True):
            self._update(pl_module)

    def _check_norms(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model = type(pl_module).__name__
        instead = "type averaging.bn_batches=null to average the running statistics instead"
        if self.bn_batches is not None and _norms_of(pl_module):
            if not pl_module.automatic_optimization:
                raise ValueError(
                    f"averaging.bn_batches cannot act with {model}: it steps its own optimizers "
                    f"(automatic_optimization=False); {instead}"
                )
            if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
                raise ValueError(
                    f"averaging.bn_batches cannot act with {model}: its training_step takes "
                    f"dataloader_iter; {instead}"
                )
            stand_in(pl_module, trainer)

    def _note_norms(self, pl_module: pl.LightningModule) -> None:
        if self.bn_batches is not None:
            self._norms = [name for name, norm in _norms_of(pl_module) if norm.training]

    def _refresh_norms(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._shadow is None or not self._norms_stale or not self._norms:
            return
        assert self.bn_batches is not None
        assert not self._shadow.average_is_live
        self._norms_stale = False
        self._shadow.swap()
        done = recompute_norms(trainer, pl_module, names=self._norms, num_batches=self.bn_batches)
        self._shadow.adopt(f"{norm}.{key}" for norm in self._norms for key in STATISTICS)
        self._shadow.swap()
        if not done:
            rank_zero_warn(
                f"averaging.bn_batches={self.bn_batches} found no training batch: the data yields "
                "none a second time, so the running statistics are averaged instead; type "
                "averaging.bn_batches=null"
            )

    def _resume(self, pl_module: pl.LightningModule) -> None:
        restored, self._restored = self._restored, {}
        averages, self._restored_averages = self._restored_averages, {}
        if RAW not in restored and self._num_updates == 0:
            return
        self._shadow = Shadow(pl_module, keep=restored.get(RAW, {}))
        if RAW in restored:
            names = self._shadow.names()
            averages = {  # again: 64-true loads it before the model is of that precision
                names[id(tensor)]: averages[key]
                for key, tensor in pl_module.state_dict(keep_vars=True).items()
                if key in averages and id(tensor) in names
            }
            self._shadow.restore(restored[RAW], {**averages, **restored.get(WIDE, {})})
        else:
            rank_zero_warn(
                "the checkpoint holds an average but no raw weights: it was written after its run "
                "had ended; training goes on from the average"
            )
        if self._num_updates == 0:
            self._shadow = None
            rank_zero_info("the checkpoint is of another kind of average: this one starts anew")
        self._note_norms(pl_module)

    def averaged(self, checkpoint: dict[str, Any], pl_module: pl.LightningModule) -> dict[str, Any]:
        """The checkpoint with the average for state dict, and the raw weights beside it.

        Files that hold the weights only get no raw ones.
        """
        is_whole = "optimizer_states" in checkpoint
        if self._shadow is None:
            return {**checkpoint, **self._restored} if is_whole else checkpoint
        tensors = self._shadow.tensors()
        names = self._shadow.names()
        state = copy.copy(checkpoint["state_dict"])
        for key, tensor in pl_module.state_dict(keep_vars=True).items():
            if key in state and id(tensor) in names:
                state[key] = tensors[names[id(tensor)]][0]
        checkpoint = {**checkpoint, "state_dict": state}
        if is_whole:
            checkpoint[RAW] = {name: raw for name, (_, raw) in tensors.items()}
            if wider := self._shadow.wider():
                checkpoint[WIDE] = wider
        return checkpoint


class _AveragedCheckpoints(CheckpointIO):
    """Puts the average into every file, also those for which Lightning calls no callback."""

    def __init__(
        self, averaging: Averaging, pl_module: pl.LightningModule, inner: CheckpointIO
    ) -> None:
        self.inner = inner
        self._averaging = averaging
        self._module = pl_module

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        averaged = self._averaging.averaged(checkpoint, self._module)
        self.inner.save_checkpoint(averaged, path, storage_options=storage_options)

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        if map_location is None:  # the inner one's own default
            return self.inner.load_checkpoint(path, weights_only=weights_only)
        return self.inner.load_checkpoint(path, map_location, weights_only)

    def remove_checkpoint(self, path: Any) -> None:
        self.inner.remove_checkpoint(path)

    def teardown(self) -> None:
        self.inner.teardown()


def _callbacks(trainer: pl.Trainer) -> list[pl.Callback]:
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def _norms_of(module: torch.nn.Module) -> list[tuple[str, _BatchNorm]]:
    """The BatchNorms that keep statistics, by name."""
    return [
        (name, part)
        for name, part in module.named_modules()
        if isinstance(part, _BatchNorm) and part.running_mean is not None
    ]


def _stops_here(trainer: pl.Trainer) -> bool:
    """Whether Lightning ends the run after this batch, wherever in its epoch that is."""
    if trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps:
        return True
    return (
        trainer.should_stop
        and (trainer.min_epochs is None or trainer.current_epoch >= trainer.min_epochs)
        and (trainer.min_steps is None or trainer.global_step >= trainer.min_steps)
    )


class Ema(Averaging):
    """Exponential moving average of the weights; see `decay_of` and `warmed_up` for the decay.

    Args:
        start_epoch: epochs trained before averaging may begin, >= 0; None: no bound.
        decay: share of the average that an update keeps, 0 to below 1; or None.
        half_life_steps: optimizer steps after which weights count half, > 0; or None.
        horizon: share of the run that is remembered where both are None, above 0 to 1.
        warmup: whether the decay grows to its value.
        warmup_gamma: updates that the warm-up is counted in, > 0.
        warmup_power: exponent of the warm-up, > 0.
        start_step, every_n_steps, validate, bn_batches: see `Averaging`.
    """

    every_n_steps: int

    def __init__(
        self,
        *,
        decay: float | None,
        half_life_steps: float | None,
        horizon: float,
        warmup: bool,
        warmup_gamma: float,
        warmup_power: float,
        start_epoch: int | None,
        start_step: int | None,
        every_n_steps: int,
        validate: str,
        bn_batches: int | None,
    ) -> None:
        super().__init__(
            start_step=start_step,
            every_n_steps=every_n_steps,
            validate=validate,
            bn_batches=bn_batches,
        )
        self.decay = decay
        self.half_life_steps = half_life_steps
        self.horizon = horizon
        self.warmup = warmup
        self.warmup_gamma = warmup_gamma
        self.warmup_power = warmup_power
        self.start_epoch = start_epoch
        self._decay = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._decay = decay_of(
            decay=self.decay,
            half_life_steps=self.half_life_steps,
            horizon=self.horizon,
            num_steps=trainer.estimated_stepping_batches,
            every_n_steps=self.every_n_steps,
        )
        super().on_train_start(trainer, pl_module)

    def should_update(self, *, step: int, epoch: int, epoch_end: bool) -> bool:
        return is_due(
            step=step,
            epoch=epoch,
            epoch_end=epoch_end,
            start_epoch=self.start_epoch,
            start_step=self.start_step,
            every_n_steps=self.every_n_steps,
        )

    def weight(self, *, num_updates: int) -> float:
        if not self.warmup:
            return 1 - self._decay
        return 1 - warmed_up(
            decay=self._decay,
            num_updates=num_updates,
            gamma=self.warmup_gamma,
            power=self.warmup_power,
        )

    def starts_at(self) -> str:
        return _starts_at("start_epoch", self.start_epoch, self)

    def step_metrics(self) -> dict[str, float]:
        """The decay of the next update; nothing before the first."""
        if self._num_updates == 0:
            return {}
        return {"ema_decay": 1 - self.weight(num_updates=self._num_updates)}


class Uniform(Averaging):
    """The mean over all updates.

    Args:
        start_epoch: epochs trained before averaging may begin, >= 0; None: no bound.
        start_step, every_n_steps, validate, bn_batches: see `Averaging`.
    """

    def __init__(
        self,
        *,
        start_epoch: int | None,
        start_step: int | None,
        every_n_steps: int | None,
        validate: str,
        bn_batches: int | None,
    ) -> None:
        super().__init__(
            start_step=start_step,
            every_n_steps=every_n_steps,
            validate=validate,
            bn_batches=bn_batches,
        )
        self.start_epoch = start_epoch

    def should_update(self, *, step: int, epoch: int, epoch_end: bool) -> bool:
        return is_due(
            step=step,
            epoch=epoch,
            epoch_end=epoch_end,
            start_epoch=self.start_epoch,
            start_step=self.start_step,
            every_n_steps=self.every_n_steps,
        )

    def weight(self, *, num_updates: int) -> float:
        return 1 / (num_updates + 1)

    def starts_at(self) -> str:
        return _starts_at("start_epoch", self.start_epoch, self)


class Swa(Averaging):
    """The mean over the ends of the epochs from the start to the last, at a rate of its own.

    The rate is set in `on_train_batch_start`, in every group of every optimizer, from the first
    batch that may be averaged on, over whatever a scheduler says. Source: arXiv 1803.05407;
    Lightning's averages the ends of the epochs before.

    Args:
        start: epochs trained before (int), or that share of trainer.max_epochs (float); or None.
        lr: the rate, > 0, one for all or a list with one a group; None leaves the schedule alone.
        anneal_epochs: epochs from the rate at the start to `lr`, >= 0; or None.
        anneal_steps: the same in optimizer steps, >= 0; or None.
        anneal_strategy: cos or linear.
        start_step, every_n_steps, validate, bn_batches: see `Averaging`.

    Raises:
        ValueError: where `lr` is a list of another length than there are parameter groups, or
            `start` a share of a run without a number of epochs.
    """

    def __init__(
        self,
        *,
        start: int | float | None,
        start_step: int | None,
        lr: float | list[float] | None,
        anneal_epochs: int | None,
        anneal_steps: int | None,
        anneal_strategy: str,
        every_n_steps: int | None,
        validate: str,
        bn_batches: int | None,
    ) -> None:
        super().__init__(
            start_step=start_step,
            every_n_steps=every_n_steps,
            validate=validate,
            bn_batches=bn_batches,
        )
        self.start = start
        self.lr = lr
        self.anneal_epochs = anneal_epochs
        self.anneal_steps = anneal_steps
        self.anneal_strategy = anneal_strategy
        self._start_epoch: int | None = None

    def _reset(self) -> None:
        super()._reset()
        self._rates: list[float] = []  # of the groups, when the annealing began
        self._annealing_since = [-1, -1]  # epoch, optimizer step

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start_epoch = None
        if self.start is not None:
            self._start_epoch = first_epoch(start=self.start, max_epochs=trainer.max_epochs)
        num_groups = sum(len(optimizer.param_groups) for optimizer in trainer.optimizers)
        if isinstance(self.lr, list) and len(self.lr) != num_groups:
            raise ValueError(
                f"averaging.lr must be one number, or {num_groups} for the parameter groups of "
                f"{type(pl_module).__name__}, got {self.lr}; type averaging.lr={self.lr[0]}"
            )
        super().on_train_start(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.lr is None or not self._may_average(trainer.current_epoch, self._num_steps):
            return
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        if not self._rates:
            self._annealing_since = [trainer.current_epoch, self._num_steps]
        self._rates += [float(group["lr"]) for group in groups[len(self._rates) :]]
        targets = self.lr if isinstance(self.lr, list) else [self.lr] * len(groups)
        progress = self._annealing_progress(trainer.current_epoch)
        for group, rate, target in zip(groups, self._rates, targets, strict=True):
            value = annealed(
                start=rate, end=target, progress=progress, strategy=self.anneal_strategy
            )
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(value)
            else:
                group["lr"] = value

    def should_update(self, *, step: int, epoch: int, epoch_end: bool) -> bool:
        return is_due(
            step=step,
            epoch=epoch,
            epoch_end=epoch_end,
            start_epoch=self._start_epoch,
            start_step=self.start_step,
            every_n_steps=self.every_n_steps,
        )

    def weight(self, *, num_updates: int) -> float:
        return 1 / (num_updates + 1)

    def starts_at(self) -> str:
        return _starts_at("start", self.start, self)

    def state_dict(self) -> dict[str, Any]:
        annealing = {"rates": list(self._rates), "annealing_since": list(self._annealing_since)}
        return {**super().state_dict(), **annealing}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._rates = list(state_dict["rates"])
        self._annealing_since = list(state_dict["annealing_since"])

    def _may_average(self, epoch: int, step: int) -> bool:
        return (self._start_epoch is None or epoch >= self._start_epoch) and (
            self.start_step is None or step >= self.start_step
        )

    def _annealing_progress(self, epoch: int) -> float:
        since_epoch, since_step = self._annealing_since
        if self.anneal_steps is not None:
            return _share(self._num_steps - since_step, self.anneal_steps)
        assert self.anneal_epochs is not None
        return _share(epoch - since_epoch, self.anneal_epochs)


def _share(done: int, whole: int) -> float:
    return 1.0 if done >= whole else done / whole


def _starts_at(key: str, start: float | None, averaging: Averaging) -> str:
    starts = {key: start, "start_step": averaging.start_step}
    typed = [f"averaging.{name}={value}" for name, value in starts.items() if value is not None]
    if averaging.every_n_steps is not None:
        typed.append(f"averaging.every_n_steps={averaging.every_n_steps}")
    return " with ".join(typed) or "the end of an epoch"
