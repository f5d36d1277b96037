"""Sharded weights: a strategy on which every technique works, and checkpoints are whole."""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
import torch.backends.mha
from lightning.fabric.utilities.init import _materialize_distributed_module
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.optim import Optimizer

from app.blocks import find_blocks, num_parameters
from app.errors import Refused
from app.parallel.split import KeepsRandomState

STEPS = ("training_step", "validation_step", "test_step", "predict_step", "forward")


def placed_like(parameter: Tensor, whole: Tensor) -> Tensor:
    """A whole tensor of the shape of `parameter`, on its device, of its dtype, sharded as it is.

    Every rank holds the whole one.
    """
    whole = whole.detach().to(parameter.device, parameter.dtype)
    if not isinstance(parameter, DTensor):
        return whole
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(whole, mesh, placements, src_data_rank=None).to(parameter.device)


def _placed(parameter: Tensor | None, value: Any) -> Any:
    """What an optimizer keeps of a parameter, sharded where it is of its shape."""
    if isinstance(parameter, DTensor) and getattr(value, "shape", None) == parameter.shape:
        return placed_like(parameter, value)
    return value


def _without_views(block: nn.Module, args: Any, output: Any) -> Any:
    """The output of a block, of which none is a view: changed in place, it would lose its hook."""
    if isinstance(output, Tensor | tuple | list):
        return apply_to_collection(output, Tensor, lambda t: t.clone() if t._is_view() else t)
    return output


class Spread(NamedTuple):
    """The process groups over which a sharded tensor is spread, one for each mesh dimension.

    `elements`: over which its elements are; `units`: over which each of its output units is, the
    slices of dimension 0 (a vector is one unit).
    """

    elements: tuple[Any, ...]
    units: tuple[Any, ...]


class Sharded(KeepsRandomState, DDPStrategy):
    """Lightning's DDPStrategy, but the model is sharded by torch's `fully_shard`, not wrapped.

    A checkpoint is one file of whole tensors, as of every other strategy, and any can load it.
    Lightning's ModelParallelStrategy reads it past the CheckpointIO, scales no loss, synchronizes
    no BatchNorm, and shards no model without `configure_model`. A parameter without dimensions is
    on every rank as it is.

    Args:
        start_method: the launcher's concern.
        timeout_min: minutes that a rank waits for the others.
        shard_classes, shard_min_parameters: which modules are sharded each as a whole, as of
            `find_blocks`. Not one that shares a parameter with what is outside of it.
        offload: keep the shards in the memory of the CPU.
        reshard_after_forward: free a gathered block until its backward pass.
        num_replicas: groups of devices that hold the same shards.
        tensor_parallel_size: devices that split a linear layer.
        colwise: patterns of names of linear layers split by their outputs.
        rowwise: patterns of names of linear layers split by their inputs.

    Raises:
        Refused: where a pattern matches no linear layer, or the model cannot be sharded.
    """

    restore_checkpoint_after_setup = True

    def __init__(
        self,
        *,
        start_method: str,
        timeout_min: float,
        shard_classes: Sequence[str],
        shard_min_parameters: int | None,
        offload: bool,
        reshard_after_forward: bool,
        num_replicas: int,
        tensor_parallel_size: int,
        colwise: Sequence[str],
        rowwise: Sequence[str],
    ) -> None:
        super().__init__(timeout=timedelta(minutes=timeout_min))
        self._classes = list(shard_classes)
        self._min_parameters = shard_min_parameters
        self._offload = offload
        self._reshard_after_forward = reshard_after_forward
        self._num_replicas = num_replicas
        self._tensor_parallel_size = tensor_parallel_size
        self._split_by = {"colwise": list(colwise), "rowwise": list(rowwise)}
        self._mesh: DeviceMesh | None = None
        self._scalars: set[nn.Parameter] = set()

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        split = self._tensor_parallel_size
        return {"num_replicas": self.world_size // split, "rank": self.global_rank // split}

    def setup_environment(self) -> None:
        super().setup_environment()
        if self._mesh is None:
            replicas, split = self._num_replicas, self._tensor_parallel_size
            sizes = {"replicate": replicas} if replicas > 1 else {}
            sizes["data_parallel"] = self.world_size // replicas // split
            sizes["tensor_parallel"] = split
            self._mesh = init_device_mesh(
                self.root_device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes)
            )
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._mesh  # where `configure_model` finds it

    def setup(self, trainer: pl.Trainer) -> None:
        """Shard the model, once, where it does not itself; make the optimizers of a fit."""
        model = self.lightning_module
        assert model is not None
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        if not isinstance(model, FSDPModule) or is_overridden("configure_model", model):
            self._place(model, trainer)
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        super().setup_optimizers(trainer)
        assert self.model is not None
        known = set(self.model.parameters())
        if any(
            p not in known for o in self.optimizers for g in o.param_groups for p in g["params"]
        ):
            raise Refused(
                "strategy=fsdp needs optimizers of the sharded parameters, and this model kept "
                "some from before; take them from self.parameters() in configure_optimizers, or "
                "use strategy=ddp"
            )

    def post_backward(self, closure_loss: Tensor) -> None:
        """Average the gradients that are not sharded; those of all micro-batches so far."""
        for scalar in self._scalars:
            if scalar.grad is not None:
                self.reduce(scalar.grad, reduce_op="mean")  # in place

    def on_exception(self, exception: BaseException) -> None:
        """Say what a parameter that was not gathered means, and what to type."""
        mixed = "mixed torch.Tensor and DTensor"
        if mixed in str(exception) and not isinstance(exception, Refused):
            exception.args = (
                f"{exception}; strategy=fsdp gathers a block while its forward runs, and no other "
                "method: call the block, or type strategy.shard_min_parameters=null",
            )

    def teardown(self) -> None:
        """Leave the weights where they are: sharded, on their devices."""
        assert self.cluster_environment is not None
        assert self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The whole tensors of the weights as they are, on the CPU of rank 0; elsewhere nothing.

        Every rank calls it.
        """
        assert self.model is not None
        return self._whole(self.model.state_dict())

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load whole tensors, which every rank holds."""
        assert self.model is not None
        mine, weights = self.model.state_dict(), checkpoint["state_dict"]
        placed = {k: placed_like(mine[k], w) if k in mine else w for k, w in weights.items()}
        self.model.load_state_dict(placed, strict=strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return self._whole(super().optimizer_state(optimizer))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            stepped = [p for group in optimizer.param_groups for p in group["params"]]
            places = [place for group in saved["param_groups"] for place in group["params"]]
            of = dict(zip(places, stepped, strict=False))  # a wrong number is torch's to refuse
            state = {
                place: {key: _placed(of.get(place), value) for key, value in values.items()}
                for place, values in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})

    def free_gathered(self) -> None:
        """Free what an evaluation has left gathered of the weights: shards may then change."""
        assert self.model is not None
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def spread(self, whole: Tensor) -> DTensor:
        """The shards of a tensor that every rank holds, by its first dimension."""
        assert self._mesh is not None
        return distribute_tensor(whole, self._mesh["data_parallel"], [Shard(0)], src_data_rank=None)

    def spread_over(self, parameter: Tensor) -> Spread:
        """How a parameter and its gradient are sharded."""
        if not isinstance(parameter, DTensor):
            return Spread((), ())
        placements: Any = parameter.placements  # of which only those of shards have a `dim`
        sharded = [
            (parameter.device_mesh.get_group(dimension), placement.dim)
            for dimension, placement in enumerate(placements)
            if not isinstance(placement, Replicate)
        ]
        return Spread(
            tuple(group for group, _ in sharded),
            tuple(group for group, dim in sharded if dim != 0 or parameter.ndim < 2),
        )

    def _whole(self, state: Any) -> dict[str, Any]:
        """State with whole tensors, on the CPU of rank 0; elsewhere nothing."""

        def whole(tensor: Any) -> Any:
            if isinstance(tensor, DTensor):
                shard: Any = tensor.to(self.root_device)
                tensor = shard.full_tensor()
            return tensor.cpu() if self.is_global_zero else tensor

        found = apply_to_collection(state, Tensor, whole)
        return dict(found) if self.is_global_zero else {}

    def _place(self, model: pl.LightningModule, trainer: pl.Trainer) -> None:
        shards_itself = is_overridden("configure_model", model)
        if trainer.state.fn == TrainerFn.FITTING and self._layer_sync is not None:
            self.model = self._layer_sync.apply(model)
        _materialize_distributed_module(model, self.root_device)
        self.precision_plugin.convert_module(model)
        model.to(self.root_device)
        if not shards_itself:
            self._shard(model)
        elif self._num_replicas > 1 and not any(
            isinstance(p, DTensor) and "replicate" in (p.device_mesh.mesh_dim_names or ())
            for p in model.parameters()
        ):
            raise Refused(
                f"strategy.num_replicas={self._num_replicas} cannot act on "
                f"{type(model).__name__}, which shards itself; type strategy.num_replicas=1, or "
                "shard it over self.device_mesh['replicate', 'data_parallel']"
            )

    def _shard(self, model: pl.LightningModule) -> None:
        if not model.automatic_optimization:
            raise Refused(
                f"strategy=fsdp cannot shard {type(model).__name__}, which steps its own "
                "optimizers (automatic_optimization=False); give it a configure_model, or use "
                "strategy=ddp"
            )
        for tensor in (*model.parameters(), *model.buffers()):  # drawn alike, or rank 0's
            tensor.data = tensor.data.contiguous()
            torch.distributed.broadcast(tensor.data, src=0)
        self._split_layers(model)
        # torch's transformer would read the weights of blocks that are not gathered
        torch.backends.mha.set_fastpath_enabled(False)
        assert self._mesh is not None
        offloads = self._offload and self.root_device.type != "cpu"
        over = ("replicate", "data_parallel") if self._num_replicas > 1 else "data_parallel"
        self._scalars = {p for p in model.parameters() if p.ndim == 0}
        if self._scalars and getattr(self.precision_plugin, "scaler", None) is not None:
            raise Refused(
                f"precision=fp16 cannot scale the gradients of {type(model).__name__}, which has "
                "parameters without dimensions, with strategy=fsdp; use precision=bf16"
            )
        settings: dict[str, Any] = {
            "mesh": self._mesh[over],
            "offload_policy": CPUOffloadPolicy() if offloads else OffloadPolicy(),
            "ignored_params": self._scalars,
        }
        steps = [name for name in STEPS if is_overridden(name, model)]
        for block in self._blocks(model):
            block.register_forward_hook(_without_views)
            fully_shard(block, reshard_after_forward=self._reshard_after_forward, **settings)
        fully_shard(model, **settings)
        for name in steps:
            register_fsdp_forward_method(model, name)

    def _blocks(self, model: nn.Module) -> list[nn.Module]:
        """Inner ones first; none where the model is one block."""
        least = self._min_parameters
        if not self._classes and (least is None or num_parameters(model) < least):
            return []
        blocks = find_blocks(
            model, classes=self._classes, min_parameters=least, prefix="strategy.shard_"
        )
        owners: dict[nn.Parameter, set[nn.Module]] = {}
        for part in model.modules():
            for parameter in part.parameters(recurse=False):
                owners.setdefault(parameter, set()).add(part)
        return [
            block
            for block in blocks.values()
            if all(owners[parameter] <= {*block.modules()} for parameter in block.parameters())
        ]

    def _split_layers(self, model: nn.Module) -> None:
        styles = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
        split = self._tensor_parallel_size
        linear = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}
        plan: dict[str, Any] = {}
        for key, patterns in self._split_by.items():
            for pattern in patterns:
                matched = [name for name in linear if fnmatchcase(name, pattern)]
                if not matched:
                    raise Refused(
                        f"strategy.{key} must match names of linear layers, got {pattern}; "
                        f"{type(model).__name__} has {', '.join(linear) or 'none'}"
                    )
                for name in matched:
                    layer = linear[name]
                    size = layer.out_features if key == "colwise" else layer.in_features
                    if size % split != 0:
                        raise Refused(
                            f"strategy.tensor_parallel_size must divide the {size} numbers by "
                            f"which {name} is split, got {split}; leave it out of strategy.{key}"
                        )
                    plan[name] = styles[key]()
        if plan:
            assert self._mesh is not None
            parallelize_module(model, self._mesh["tensor_parallel"], plan)
