"""Sharded weights: strategies on which every technique works, and checkpoints are whole."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
import torch.backends.mha
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim import Optimizer

from app.blocks import find_blocks, num_parameters
from app.errors import Refused
from app.process.ranks import ranks

STEPS = ("training_step", "validation_step", "test_step", "predict_step", "forward")


class Blocks:
    """Which modules of a model are sharded as a whole."""

    def __init__(self, classes: Sequence[str], min_parameters: int | None) -> None:
        self._classes = list(classes)
        self._min_parameters = min_parameters

    def find(self, model: nn.Module) -> list[nn.Module]:
        """Inner ones first; none where the model is one block."""
        least = self._min_parameters
        if not self._classes and (least is None or num_parameters(model) < least):
            return []
        found = find_blocks(
            model,
            classes=self._classes,
            min_parameters=self._min_parameters,
            prefix="strategy.shard_",
        )
        return list(found.values())


def placed_like(parameter: Tensor, whole: Tensor) -> Tensor:
    """A whole tensor of the shape of `parameter`, on its device, of its dtype, sharded as it is."""
    whole = whole.to(parameter.device, parameter.dtype)
    if isinstance(parameter, DTensor):
        return distribute_tensor(whole, parameter.device_mesh, parameter.placements)
    return whole


class Spread(NamedTuple):
    """The process groups over which a sharded tensor is spread, one for each mesh dimension.

    `elements`: over which its elements are; `units`: over which each of its output units is, the
    slices of dimension 0 (a vector is one unit).
    """

    elements: tuple[Any, ...]
    units: tuple[Any, ...]


class Sharded(Strategy):
    """What our strategies with sharded weights share: one checkpoint file, of whole tensors.

    Any strategy can load it. The file is written and read by the trainer's CheckpointIO, like that
    of every other strategy. Lightning's own read it past the CheckpointIO, and hand callbacks a
    checkpoint without weights.

    Attributes:
        showing: makes the context in which the weights for a checkpoint are gathered: an average
            shows itself there.
    """

    showing: Callable[[], AbstractContextManager[Any]] = nullcontext

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        with self.showing():
            return self.gathered_weights()

    def gathered_weights(self) -> dict[str, Any]:
        """The whole tensors of the weights as they are, on the CPU of rank 0; elsewhere nothing.

        Every rank calls it.
        """
        found: dict[str, Any] = super().lightning_module_state_dict()
        return found

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        self.scatter_weights(checkpoint["state_dict"], strict=strict)

    @abstractmethod
    def scatter_weights(self, weights: Mapping[str, Tensor], *, strict: bool) -> None:
        """Load whole tensors, which every rank holds."""

    @abstractmethod
    def free_gathered(self) -> None:
        """Free what an evaluation has left gathered of the weights: shards may then change."""

    @abstractmethod
    def spread_over(self, parameter: Tensor) -> Spread:
        """How a parameter and its gradient are sharded."""


class Fsdp(Sharded, FSDPStrategy):
    """Lightning's FSDPStrategy with checkpoints like those of every other strategy."""

    def __init__(self, *, blocks: Blocks, **settings: Any) -> None:
        super().__init__(auto_wrap_policy=self._is_block, **settings)
        self._blocks = blocks
        self._found: set[nn.Module] = set()
        self._wrapped: nn.Module | None = None

    def _setup_model(self, model: nn.Module) -> nn.Module:
        if self._wrapped is not None and self._wrapped.module is model:
            return self._wrapped  # a test after the fit: wrapped again, shards would be sharded
        self._found = set(self._blocks.find(model))
        # torch's transformer would read the weights of blocks that are not gathered
        torch.backends.mha.set_fastpath_enabled(False)
        if self.root_device.type == "cpu":
            from torch.distributed.fsdp import FullyShardedDataParallel

            # Lightning names no device here, which means a GPU
            self._wrapped = FullyShardedDataParallel(
                model,
                mixed_precision=self.mixed_precision_config,
                sharding_strategy=self.sharding_strategy,
                device_id=self.root_device,
                **self.kwargs,
            )
        else:
            self._wrapped = super()._setup_model(model)
        return self._wrapped

    def _is_block(self, module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
        return recurse or module in self._found

    def gathered_weights(self) -> dict[str, Any]:
        with self._whole(rank0_only=True) as model:
            found: dict[str, Any] = model.state_dict()
        return found

    def scatter_weights(self, weights: Mapping[str, Tensor], *, strict: bool) -> None:
        with self._whole(rank0_only=False) as model:
            model.load_state_dict(weights, strict=strict)

    def spread_over(self, parameter: Tensor) -> Spread:
        assert self.model is not None
        group = self.model.process_group  # of the shards: all ranks, or with hybrid a machine's
        return Spread((group,), (group,))

    def free_gathered(self) -> None:
        from torch.distributed.fsdp import FullyShardedDataParallel

        assert self.model is not None
        for module in FullyShardedDataParallel.fsdp_modules(self.model):
            if module._handle is not None and module._handle.uses_sharded_strategy:
                module._handle.reshard(free_unsharded_flat_param=True)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        from torch.distributed.fsdp import FullyShardedDataParallel, OptimStateKeyType

        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        with self._whole(rank0_only=True) as model:
            state = FullyShardedDataParallel.optim_state_dict(model, optimizer)
            if not state:
                return {}
            return FullyShardedDataParallel.rekey_optim_state_dict(
                state, OptimStateKeyType.PARAM_ID, model
            )

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        from torch.distributed.fsdp import FullyShardedDataParallel, OptimStateKeyType

        states = checkpoint["optimizer_states"]
        with self._whole(rank0_only=False) as model:
            for optimizer, state in zip(self.optimizers, states, strict=True):
                by_name = FullyShardedDataParallel.rekey_optim_state_dict(
                    state, OptimStateKeyType.PARAM_NAME, model
                )
                flat = FullyShardedDataParallel.optim_state_dict_to_load(model, optimizer, by_name)
                optimizer.load_state_dict(flat)

    @contextmanager
    def _whole(self, *, rank0_only: bool) -> Iterator[nn.Module]:
        """The model while its state dict, and its optimizers', are of whole tensors."""
        from torch.distributed.fsdp import (
            FullOptimStateDictConfig,
            FullStateDictConfig,
            FullyShardedDataParallel,
            StateDictType,
        )

        assert self.model is not None
        # on a CPU there is nothing to move, and torch frees what it believes moved
        how = {"offload_to_cpu": self.root_device.type != "cpu", "rank0_only": rank0_only}
        with FullyShardedDataParallel.state_dict_type(
            self.model,
            StateDictType.FULL_STATE_DICT,
            FullStateDictConfig(**how),
            FullOptimStateDictConfig(**how),
        ):
            yield self.model


class Fsdp2(Sharded, ModelParallelStrategy):
    """Lightning's ModelParallelStrategy, which also shards a model without `configure_model`.

    Args:
        blocks: modules that are sharded each as a whole.
        offload: keep the shards in the memory of the CPU.
        reshard_after_forward: free a gathered block until its backward pass.
        tensor_parallel_size: devices that split a linear layer.
        colwise: patterns of names of linear layers split by their outputs.
        rowwise: patterns of names of linear layers split by their inputs.
        timeout_min: minutes that a rank waits for the others.

    Raises:
        Refused: where a pattern matches no linear layer, or a model without `configure_model`
            steps its own optimizers.
    """

    def __init__(
        self,
        *,
        blocks: Blocks,
        offload: bool,
        reshard_after_forward: bool,
        tensor_parallel_size: int,
        colwise: Sequence[str],
        rowwise: Sequence[str],
        timeout_min: float,
    ) -> None:
        super().__init__(
            data_parallel_size=ranks().size // tensor_parallel_size,
            tensor_parallel_size=tensor_parallel_size,
            save_distributed_checkpoint=False,
            timeout=timedelta(minutes=timeout_min),
        )
        self._blocks = blocks
        self._offload = offload
        self._reshard_after_forward = reshard_after_forward
        self._colwise = list(colwise)
        self._rowwise = list(rowwise)

    def connect(self, model: pl.LightningModule) -> None:
        super().connect(model)
        if not is_overridden("configure_model", model):
            model.configure_model = partial(self._shard, model)  # type: ignore[method-assign]

    def scatter_weights(self, weights: Mapping[str, Tensor], *, strict: bool) -> None:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        assert self.model is not None
        options = StateDictOptions(full_state_dict=True, strict=strict)
        set_model_state_dict(self.model, dict(weights), options=options)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        from lightning.fabric.strategies.model_parallel import _rekey_optimizer_state_if_needed
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            set_optimizer_state_dict,
        )

        assert self.model is not None
        options = StateDictOptions(full_state_dict=True)
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            by_name = _rekey_optimizer_state_if_needed(state, self.model)
            set_optimizer_state_dict(
                self.model, optimizer, optim_state_dict=by_name, options=options
            )

    def free_gathered(self) -> None:
        from torch.distributed.fsdp import FSDPModule

        assert self.model is not None
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def spread_over(self, parameter: Tensor) -> Spread:
        if not isinstance(parameter, DTensor):
            return Spread((), ())
        sharded = [
            (parameter.device_mesh.get_group(dimension), placement.dim)
            for dimension, placement in enumerate(parameter.placements)
            if isinstance(placement, Shard)
        ]
        return Spread(
            tuple(group for group, _ in sharded),
            tuple(group for group, dim in sharded if dim != 0 or parameter.ndim < 2),
        )

    def _shard(self, model: pl.LightningModule) -> None:
        """What Lightning asks of a model's own `configure_model`: shard it, once."""
        from torch.distributed.fsdp import (
            CPUOffloadPolicy,
            FSDPModule,
            OffloadPolicy,
            fully_shard,
            register_fsdp_forward_method,
        )

        if isinstance(model, FSDPModule):  # a test after the fit
            return
        if not model.automatic_optimization:
            raise Refused(
                f"strategy=fsdp2 cannot shard {type(model).__name__}, which steps its own "
                "optimizers (automatic_optimization=False); give it a configure_model, or use "
                "strategy=ddp"
            )
        self._split_layers(model)
        settings: dict[str, Any] = {
            "mesh": self.device_mesh["data_parallel"],
            "offload_policy": CPUOffloadPolicy() if self._offload else OffloadPolicy(),
        }
        model.to(self.root_device)
        steps = [name for name in STEPS if is_overridden(name, model)]
        for block in self._blocks.find(model):
            fully_shard(block, reshard_after_forward=self._reshard_after_forward, **settings)
        fully_shard(model, **settings)
        for name in steps:
            register_fsdp_forward_method(model, name)

    def _split_layers(self, model: nn.Module) -> None:
        from torch.distributed.tensor.parallel import (
            ColwiseParallel,
            RowwiseParallel,
            parallelize_module,
        )

        linear = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
        plan: dict[str, Any] = {}
        for key, patterns, style in (
            ("colwise", self._colwise, ColwiseParallel),
            ("rowwise", self._rowwise, RowwiseParallel),
        ):
            for pattern in patterns:
                matched = [name for name in linear if fnmatchcase(name, pattern)]
                if not matched:
                    raise Refused(
                        f"strategy.{key} must match names of linear layers, got {pattern}; "
                        f"{type(model).__name__} has {', '.join(linear) or 'none'}"
                    )
                plan |= {name: style() for name in matched}
        if plan:
            parallelize_module(model, self.device_mesh["tensor_parallel"], plan)
