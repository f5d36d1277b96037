"""The layers of any model, counted from its output: for rates that fall towards the input."""

from collections.abc import Iterator
from importlib import import_module

from torch import nn
from torch.nn.parameter import is_lazy

STACKS = (nn.ModuleList, nn.Sequential)


def layers_above(model: nn.Module) -> dict[str, int]:
    """For each parameter by name, over how many layers of the model it is counted from its output.

    Models of timm say themselves what their layers are (`group_matcher`), and what is beside them
    counts as their top. Of others the layers are the blocks in each ModuleList or Sequential that
    holds several of one class. What is registered before the first block is one layer below it,
    what comes after the last one the top; what is between two goes with the next one.
    """
    layers = _of_timm(model) or _of_stacks(model)
    above = {number: place for place, number in enumerate(sorted({*layers.values()}, reverse=True))}
    return {name: above[number] for name, number in layers.items()}


def _of_timm(model: nn.Module) -> dict[str, int]:
    found: dict[str, int] = {}
    for path, net in model.named_modules():
        prefix = f"{path}." if path else ""
        if hasattr(net, "group_matcher") and not any(name.startswith(prefix) for name in found):
            group = import_module("timm.models").group_parameters
            layers = group(net, net.group_matcher(coarse=False), reverse=True)
            top = max(layers.values())
            found |= {f"{prefix}{name}": number - top for name, number in layers.items()}
    return {name: found.get(name, 0) for name, _ in model.named_parameters()} if found else {}


def _of_stacks(model: nn.Module) -> dict[str, int]:
    blocks = [*_blocks(model, "", is_inside=False)]
    found: dict[str, int] = {}
    begun = 0
    for name, _ in model.named_parameters():
        places = [place for place, block in enumerate(blocks, 1) if name.startswith(block)]
        begun = max(begun, *places, 0)
        found[name] = places[0] if places else begun + 1 if begun else 0
    return found


def _blocks(module: nn.Module, path: str, *, is_inside: bool) -> Iterator[str]:
    """How the names of the parameters of each block begin; a stack in a stack is its blocks."""
    children = [(f"{path}{name}.", child) for name, child in module.named_children()]
    children = [(name, child) for name, child in children if any(map(_is_wide, child.parameters()))]
    is_stack = isinstance(module, STACKS) and len(children) > len({type(c) for _, c in children})
    for name, child in children:
        if is_stack:
            inner = _blocks(child, name, is_inside=True) if isinstance(child, STACKS) else ()
            yield from list(inner) or [name]
        elif not is_inside or isinstance(child, STACKS):
            yield from _blocks(child, name, is_inside=is_inside)


def _is_wide(parameter: nn.Parameter) -> bool:
    """Whether it may be of a layer of its own: a norm in a stack goes with the next one."""
    return is_lazy(parameter) or parameter.ndim > 1
