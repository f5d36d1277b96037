"""Whether an optimizer of any library steps shards as it steps whole tensors."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.optim import Optimizer

from app.errors import Refused
from app.parallel.sharded import Sharded

NUM_STEPS = 5
TOLERANCE = 1e-6
"""Of what the weights move, in float64."""


def refuse_whole_only(make: Callable[[Any], Optimizer], strategy: Sharded) -> None:
    """Raise Refused where an optimizer, tried on a few numbers, steps their shards otherwise.

    One that takes norms or sums over its weights may take them over those of a rank, and `p.data =`
    leaves a shard as it was. One that cannot step these numbers whole is not tried. All ranks call
    it.
    """
    generator = torch.Generator().manual_seed(0)
    rows = 2 * strategy.world_size
    values, gradients, noise = (
        [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        for shapes in [((rows, 3), (rows,))] * 3
    )
    steps = [[g + 0.1 * k * n for g, n in zip(gradients, noise, strict=True)]
             for k in range(NUM_STEPS)]  # fmt: skip
    with isolate_rng():
        try:
            kind, whole = _stepped(make, [value.clone() for value in values], steps)
        except Exception:  # of somebody else's class: anything
            return
        why = "moves them otherwise than whole ones"
        try:
            _, shards = _stepped(
                make,
                [strategy.spread(value.clone()) for value in values],
                [[strategy.spread(gradient) for gradient in step] for step in steps],
            )
            found = [shard.full_tensor().cpu() for shard in shards]  # type: ignore[attr-defined]
            moved, apart = (
                torch.cat([(a - b).flatten() for a, b in zip(others, whole, strict=True)]).norm()
                for others in (values, found)
            )
            if apart <= TOLERANCE * moved or not moved.isfinite():
                return
        except Exception as error:
            why = f"raises {type(error).__name__}: {' '.join(str(error).split()):.100}"
    raise Refused(
        f"optimizer: {kind} cannot step the shards of strategy=fsdp: it {why}; type strategy=ddp, "
        "or another optimizer"
    )


def _stepped(
    make: Callable[[Any], Optimizer], values: Sequence[Tensor], steps: Sequence[Sequence[Tensor]]
) -> tuple[str, list[Tensor]]:
    """The name of an optimizer's class, and what it makes of values by their gradients."""
    parameters = [nn.Parameter(value) for value in values]
    optimizer = make(parameters)
    for gradients in steps:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step(lambda: 0.0)
    return type(optimizer).__name__, [parameter.detach() for parameter in parameters]
