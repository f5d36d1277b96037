"""The averaged tensors beside the module's own, updated and shown without a copy."""

from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parameter import is_lazy

from app.errors import Refused

AVERAGE = "average"

Sets = Mapping[str, Mapping[str, Tensor]]


def moves(name: str, tensor: Tensor) -> bool:
    """Whether training changes a parameter or buffer, and a mean of its values has a meaning."""
    is_parameter = isinstance(tensor, torch.nn.Parameter)
    return tensor.requires_grad if is_parameter else bool(torch.isfinite(tensor).all())


class Shadow:
    """Sets of tensors beside a module's, and which the module now holds: average or raw ones.

    A set has a tensor for each one that is averaged, of its dtype, but at least float32; of a
    sharded one, this rank's shard. There is one set to begin with, the average: a copy of the
    module's tensors. They are listed once: an update costs one foreach pass, and a swap one
    assignment a tensor. The strategy holds the memory of a shard too, so that one is copied.

    Args:
        wanted: whether a floating parameter or persistent buffer is averaged, by name and value.
        restored: what `whole_sets` gave, to go on from; what it names is averaged, wanted or not.
        edited: what the average is, of this rank's shards, in place of what `restored` says.

    Raises:
        Refused: where the module lacks a tensor of `restored`.

    Attributes:
        module: of which they are.
        sets: the tensors, by the label of the set and the name of the tensor.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        wanted: Callable[[str, Tensor], bool] = moves,
        restored: Sets | None = None,
        edited: Mapping[str, Tensor] | None = None,
    ) -> None:
        restored = restored or {AVERAGE: {}}
        self.average_is_live = False
        self.sets: dict[str, dict[str, Tensor]] = {label: {} for label in restored}
        self.module = module
        self._wanted = wanted
        self._raw: dict[str, Tensor] = {}  # while the average is live
        self._live: dict[str, Tensor] = {}
        self._scan(restored[AVERAGE])
        self._restore(restored, edited or {})

    def scan(self) -> None:
        """List the tensors anew; new ones join each set with their present value."""
        self._scan(self.sets[AVERAGE])

    def live(self) -> dict[str, Tensor]:
        """What the module holds, by name."""
        self._follow_buffers()
        return {name: _shard(tensor.detach()) for name, tensor in self._live.items()}

    @torch.no_grad()
    def update(self, weight: float) -> None:
        """Move the average towards the live tensors: by the share `weight`, 0 to 1."""
        assert not self.average_is_live
        self._follow_buffers()
        for live, averages in self._groups:
            shards = list(map(_shard, live)) if self._is_sharded else live
            if live[0].dtype == averages[0].dtype:
                torch._foreach_lerp_(averages, shards, weight)
            else:
                torch._foreach_mul_(averages, 1 - weight)
                torch._foreach_add_(averages, shards, alpha=weight)

    def keep(self, label: str) -> None:
        """Make a set of the live tensors as they are now."""
        assert not self.average_is_live
        self.sets[label] = {name: _wide_copy(tensor) for name, tensor in self.live().items()}

    @torch.no_grad()
    def combine(self, shares: Mapping[str, float]) -> None:
        """Make the average the sum of other sets, each times its share."""
        assert not self.average_is_live
        for name, average in self.sets[AVERAGE].items():
            average.zero_()
            for label, share in shares.items():
                average.add_(self.sets[label][name], alpha=share)

    @torch.no_grad()
    def swap(self) -> None:
        """Show the average where the raw tensors are live, and the other way round; exact."""
        self._follow_buffers()
        hides = self.average_is_live
        shown = self._raw if hides else self._narrow_average()
        raw = {} if hides else {name: tensor.data for name, tensor in self._live.items()}
        if self._is_sharded:
            for name, tensor in self._live.items():
                if isinstance(tensor, DTensor):
                    shard = tensor.to_local()
                    raw[name] = shard.clone()
                    shard.copy_(shown[name])
                else:
                    tensor.data = shown[name]
        else:
            for name, tensor in self._live.items():
                tensor.data = shown[name]
        self._raw = {} if hides else raw
        self.average_is_live = not hides

    def adopt(self, names: Container[str]) -> None:
        """Make the live average of these, changed in place, the average; unknown names are not."""
        assert self.average_is_live
        for name, average in self.sets[AVERAGE].items():
            if name in names and average.dtype != self._live[name].dtype:
                average.copy_(self._live[name])

    def share(self, names: Container[str]) -> None:
        """Average these no more: from now on both models hold what the module now has of them."""
        for kept in (*self.sets.values(), self._raw, self._live):
            for name in [name for name in kept if name in names]:
                del kept[name]
        self.scan()

    def whole_sets(self, *, here: bool) -> dict[str, dict[str, Tensor]]:
        """The sets with whole tensors, gathered from all ranks, which all call it; empty elsewhere.

        Args:
            here: whether this rank is to have them.
        """
        found: dict[str, dict[str, Tensor]] = {label: {} for label in self.sets}
        for label, kept in self.sets.items():
            for name, part in kept.items():
                whole = _whole(part, self._live[name])
                if here:
                    found[label][name] = whole
        return found

    def _narrow_average(self) -> dict[str, Tensor]:
        """The average in the module's dtype."""
        average = self.sets[AVERAGE]
        if all(live[0].dtype == averages[0].dtype for live, averages in self._groups):
            return average
        return {name: average[name].to(tensor.dtype) for name, tensor in self._live.items()}

    def _scan(self, keep: Container[str]) -> None:
        self._live, self._buffers = {}, []
        seen = set()
        for name, slots, tensor in _floating(self.module):
            if id(tensor) in seen or not (name in keep or self._wanted(name, tensor)):
                continue
            for kept in [] if self.average_is_live else self.sets.values():
                if not _fits(kept.get(name), tensor):
                    kept[name] = _wide_copy(_shard(tensor.detach()))
            if name in self.sets[AVERAGE]:
                seen.add(id(tensor))
                self._live[name] = tensor
                if slots is not None:
                    self._buffers.append((slots, name.rpartition(".")[2], tensor))
        groups: dict[tuple[Any, ...], tuple[list[Tensor], list[Tensor]]] = {}
        for label, kept in self.sets.items():
            self.sets[label] = {name: kept[name] for name in self._live}
        for name, tensor in self._live.items():
            live, averages = groups.setdefault((tensor.device, tensor.dtype), ([], []))
            live.append(tensor)
            averages.append(self.sets[AVERAGE][name])
        self._groups = [*groups.values()]
        self._is_sharded = any(isinstance(tensor, DTensor) for tensor in self._live.values())

    def _restore(self, restored: Sets, edited: Mapping[str, Tensor]) -> None:
        missing = restored[AVERAGE].keys() - self._live.keys()
        if missing and not edited:
            raise Refused(
                f"the checkpoint holds an average of weights that {type(self.module).__name__} "
                f"has not: {', '.join(sorted(missing))}; resume with the model it was written with"
            )
        for label, tensors in restored.items():
            for name in tensors.keys() - missing - edited.keys():
                self.sets[label][name].copy_(_part(tensors[name], self._live[name]))
        for name in edited.keys() & self._live.keys():
            self.sets[AVERAGE][name].copy_(edited[name])

    def _follow_buffers(self) -> None:
        for slots, key, tensor in self._buffers:
            if slots.get(key) is not tensor:  # assigned to, not changed in place
                self.scan()
                return


class Watch:
    """Finds the floating buffers of a module that were changed since it was made."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._before = {name: now.detach().clone() for name, now in self._buffers()}
        self._lazy = {name for name, buffer in module.named_buffers() if is_lazy(buffer)}

    def changed(self) -> set[str]:
        """The names of those that hold other values, or are new."""
        return {
            name
            for name, now in self._buffers()
            if name not in self._lazy
            and (name not in self._before or not _same_values(self._before[name], now))
        }

    def _buffers(self) -> Iterator[tuple[str, Tensor]]:
        for name, slots, tensor in _floating(self._module):
            if slots is not None:
                yield name, tensor


def loaded_otherwise(
    module: torch.nn.Module, average: Mapping[str, Tensor], wanted: Callable[[str, Tensor], bool]
) -> dict[str, Tensor]:
    """Copies of what a module has loaded in place of an average, where that is not the average.

    Of sharded tensors, this rank's shards.
    """
    found = {}
    for name, _, tensor in _floating(module):
        shard = _shard(tensor.detach())
        if name in average and average[name].shape == tensor.shape:
            part = _part(average[name], tensor).to(shard)
            if not _same_values(part, shard):
                found[name] = _wide_copy(shard)
        elif name in average or wanted(name, tensor):
            found[name] = _wide_copy(shard)
    return found


def _same_values(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def _shard(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, in its memory; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _wide_copy(tensor: Tensor) -> Tensor:
    return tensor.to(_wide(tensor), copy=True)


def _whole(part: Tensor, live: Tensor) -> Tensor:
    """The whole of what is sharded as `live` is, on the CPU; itself where that is not sharded."""
    if not isinstance(live, DTensor):
        return part
    mesh = live.device_mesh
    part = part.to(mesh.device_type)  # from the CPU, where shards are kept there
    whole = DTensor.from_local(part, mesh, live.placements, shape=live.shape, stride=live.stride())
    return whole.full_tensor().cpu()


def _part(whole: Tensor, live: Tensor) -> Tensor:
    """What `_whole` was made of; every rank holds the whole."""
    if not isinstance(live, DTensor):
        return whole
    mesh, placements = live.device_mesh, live.placements
    return distribute_tensor(whole, mesh, placements, src_data_rank=None).to_local()


def _floating(
    module: torch.nn.Module,
) -> Iterator[tuple[str, dict[str, Tensor | None] | None, Tensor]]:
    """Each floating parameter and buffer of the state dict: name, where a buffer stands, tensor.

    A tied one has its first name; a buffer that modules share comes once for each.
    """
    for name, parameter in module.named_parameters():
        if is_lazy(parameter):  # no batch has told its shape yet
            continue
        if parameter.is_floating_point() or parameter.is_complex():
            yield name, None, parameter
    for prefix, owner in module.named_modules():
        for key, buffer in owner._buffers.items():
            if buffer is None or key in owner._non_persistent_buffers_set or is_lazy(buffer):
                continue
            if buffer.is_floating_point() or buffer.is_complex():
                yield f"{prefix}.{key}" if prefix else key, owner._buffers, buffer


def _fits(kept: Tensor | None, tensor: Tensor) -> bool:
    tensor = _shard(tensor)
    return (
        kept is not None
        and kept.shape == tensor.shape
        and kept.device == tensor.device
        and kept.dtype == _wide(tensor)
    )
