"""The blocks of any model, found by class or size, and a new forward for one of its modules."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from types import MethodType
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy
from torchmetrics import Metric

from app.errors import Refused

Forward = Callable[..., Any]
"""A forward that is not bound: its first argument is the module."""


def find_blocks(
    model: nn.Module, *, classes: Sequence[str], min_parameters: int | None, prefix: str
) -> dict[str, nn.Module]:
    """The blocks below `model` by name, inner ones before the outer ones that hold them.

    Never the model itself, a module without a forward (as ModuleList), a metric, or a part of
    torch's attention, which reads the weights of its parts without calling them.

    Args:
        classes: names of the blocks' classes, as TransformerEncoderLayer.
        min_parameters: where no class is named, a block is a module with at least this many
            parameters beside those of the blocks inside it; >= 1. Source: torch's
            size_based_auto_wrap_policy.
        prefix: how the keys `classes` and `min_parameters` begin where they are typed: `memory.`.

    Raises:
        Refused: where a class, or the size, matches nothing.
    """
    parts = dict(_parts(model))
    if classes:
        for name in classes:
            if name not in {type(part).__name__ for part in parts.values()}:
                raise Refused(_unknown_class(name, model, parts, prefix))
        return {name: part for name, part in parts.items() if type(part).__name__ in classes}
    assert min_parameters is not None
    blocks: dict[str, nn.Module] = {}
    taken: set[nn.Parameter] = set()
    for name, part in parts.items():
        free = set(part.parameters()) - taken
        if sum(map(_size, free)) >= min_parameters:
            blocks[name] = part
            taken |= free
    if not blocks:
        largest = max(map(num_parameters, parts.values()), default=0)
        raise Refused(
            f"{prefix}min_parameters must be at most {largest}, which the largest module in "
            f"{type(model).__name__} has, got {min_parameters}; type {prefix}min_parameters="
            f"{max(1, largest // 2)}"
        )
    return blocks


def outermost(blocks: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Those that are not inside another one."""
    inside = {part for block in blocks.values() for part in block.modules() if part is not block}
    return {name: block for name, block in blocks.items() if block not in inside}


def wrap_forward(module: nn.Module, key: str, wrap: Callable[[Forward], Forward]) -> None:
    """Give this one module, in place, `wrap` of its forward; not again where `key` already did.

    A method bound to the module: names, classes, hooks and the state dict stay, and a deep copy
    calls the forward of the copy. What was pickled comes back with the forward of its class.

    Raises Refused where the forward is not a method, as that of a TorchScript module.
    """
    present = module.forward
    if not isinstance(present, MethodType):
        raise Refused(
            f"{key} needs a forward that is a method, and that of {type(module).__name__} is not "
            f"one; use {key}=none"
        )
    made: Any = present.__func__
    while made is not None and getattr(made, "wrapped_by", None) != key:
        made = getattr(made, "__wrapped__", None)
    if made is None:
        forward = wraps(present.__func__)(wrap(present.__func__))
        forward.wrapped_by = key  # type: ignore[attr-defined]
        module.forward = MethodType(forward, module)


def num_parameters(module: nn.Module) -> int:
    """How many numbers its parameters hold; those of lazy layers none yet."""
    return sum(map(_size, module.parameters()))


def _size(parameter: nn.Parameter) -> int:
    return 0 if is_lazy(parameter) else parameter.numel()


def is_matrix(parameter: nn.Parameter, owner: nn.Module) -> bool:
    """Whether a parameter is trained, and has, or is to have, more than one dimension."""
    is_wide = not hasattr(owner, "running_mean") if is_lazy(parameter) else parameter.ndim > 1
    return parameter.requires_grad and is_wide


def _unknown_class(name: str, model: nn.Module, parts: Mapping[str, nn.Module], prefix: str) -> str:
    numbers = Counter(type(part).__name__ for part in parts.values())
    repeated = [kind for kind, number in numbers.most_common() if number > 1] or list(numbers)
    sizes = Counter(dict.fromkeys(repeated, 0))
    for part in parts.values():
        if type(part).__name__ in sizes:
            sizes[type(part).__name__] += num_parameters(part)
    found = ", ".join(f"{numbers[kind]} {kind}" for kind in repeated) or "no module"
    likely = sizes.most_common(1)[0][0] if sizes else "Block"
    return (
        f"{prefix}classes must name classes of modules in {type(model).__name__}, got {name}; it "
        f"has {found}: type for example '{prefix}classes=[{likely}]'"
    )


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What may be a block, inner modules first; a shared one comes once."""
    seen: set[nn.Module] = set()

    def below(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if isinstance(module, nn.MultiheadAttention):
            return
        for key, child in module.named_children():
            if child in seen or isinstance(child, Metric):
                continue
            seen.add(child)
            yield from below(f"{path}{key}.", child)
            if type(child).forward is not nn.Module.forward:
                yield f"{path}{key}", child

    return below("", model)
