"""The averaged tensors beside the module's own, updated and shown without a copy."""

from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from app.errors import Refused


class Shadow:
    """The averaged tensors of a module, and which of both, average or raw, the module now holds.

    Begins as a copy of the module's. A shadow is of its tensor's dtype, but at least float32.
    `keep` names tensors to take in though frozen. Tensors are listed once: an update costs one
    foreach pass, and a swap one assignment a tensor.

    Of a sharded tensor the shadow is of this rank's shard. The strategy holds the memory of a shard
    too, so with `sharded` a swap copies.
    """

    def __init__(
        self, module: torch.nn.Module, keep: Container[str] = (), *, sharded: bool = False
    ) -> None:
        self.average_is_live = False
        self._sharded = sharded
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
            torch._foreach_lerp_(averages, self._shards(live), weight)
        for live, averages in self._wider:
            torch._foreach_mul_(averages, 1 - weight)
            torch._foreach_add_(averages, self._shards(live), alpha=weight)

    @torch.no_grad()
    def swap(self) -> None:
        """Show the average where the raw tensors are live, and the other way round; exact."""
        self._follow_buffers()
        if self._sharded:
            shown = self._raw if self.average_is_live else self._averages
            shards = {name: _shard(tensor) for name, tensor in self._live.items()}
            raw = {name: shard.clone() for name, shard in shards.items()}
            for name, shard in shards.items():
                shard.copy_(shown[name])
            self._raw = {} if self.average_is_live else raw
        elif self.average_is_live:
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

    def whole_wider(self) -> dict[str, Tensor]:
        """`wider`, gathered from all ranks, which all call it."""
        return {name: _like(self._live[name], avg) for name, avg in self.wider().items()}

    @torch.no_grad()
    def adopt_shards(self, wider: Mapping[str, Tensor]) -> None:
        """Take this rank's shard of whole averages that are wider than the module's tensors."""
        for name, whole in wider.items():
            tensor = self._live[name]
            if isinstance(tensor, DTensor):
                whole = distribute_tensor(
                    whole.to(tensor.device), tensor.device_mesh, tensor.placements
                ).to_local()
            self._averages[name].copy_(whole)

    def names(self) -> dict[int, str]:
        """The name of each live tensor, by `id`: tied ones stand in a state dict several times."""
        self._follow_buffers()
        return {id(tensor): name for name, tensor in self._live.items()}

    @torch.no_grad()
    def restore(self, raw: Mapping[str, Tensor], averages: Mapping[str, Tensor]) -> None:
        """Take `averages` for the average, the live tensors where it has none; make `raw` live.

        Raises Refused where the module lacks one of `raw`.
        """
        if missing := raw.keys() - self._live.keys():
            raise Refused(
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
            name = name.replace("_fsdp_wrapped_module.", "")
            if id(tensor) in seen or not wanted:
                continue
            if not self.average_is_live and not _fits(self._averages.get(name), tensor):
                dtype = torch.promote_types(tensor.dtype, torch.float32)
                self._averages[name] = _shard(tensor.detach()).to(dtype, copy=True)
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

    def _shards(self, live: list[Tensor]) -> list[Tensor]:
        return [_shard(tensor) for tensor in live] if self._sharded else live

    def _follow_buffers(self) -> None:
        for owner, key, tensor in self._buffers:
            if owner.get(key) is not tensor:  # assigned to, not changed in place
                self.scan()
                return


def _shard(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, in its memory; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _like(tensor: Tensor, average: Tensor) -> Tensor:
    """The whole average of a tensor, on the CPU."""
    if isinstance(tensor, DTensor):
        average = DTensor.from_local(
            average,
            tensor.device_mesh,
            tensor.placements,
            shape=tensor.shape,
            stride=tensor.stride(),
        ).full_tensor()
    return average.cpu()


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
    tensor = _shard(tensor)
    return (
        average is not None
        and average.shape == tensor.shape
        and average.device == tensor.device
        and average.dtype == torch.promote_types(tensor.dtype, torch.float32)
    )
