"""Muon for hidden matrices, and AdamW for what is none, in one optimizer."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from app.errors import Refused
from app.optim.matrices import IS_MUONS
from app.parallel.sharded import placed_like

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPS = 1e-7
TOGETHER = 2**24
"""The most numbers of matrices of one shape that are iterated on together, unless one has more."""


def orthogonalized(matrices: Tensor, *, num_steps: int, dtype: torch.dtype) -> Tensor:
    """Matrices (number, rows, columns) with singular values near 1, about 0.7 to 1.2.

    Newton-Schulz iterations, as torch.optim.Muon makes them of each matrix alone.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrices.size(1) > matrices.size(2)
    x = matrices.to(dtype)
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=EPS)
    for _ in range(num_steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def rate_factor(shape: torch.Size, adjust: str) -> float:
    """What the rate of a matrix of this shape (rows, columns) is multiplied by."""
    rows, columns = shape
    if adjust == "original":
        return math.sqrt(max(1, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns))


class Muon:
    """Muon for hidden matrices (kellerjordan.github.io/posts/muon), AdamW for the rest.

    Args:
        adjust: by what the rate of a matrix is multiplied, "original" or "match_rms_adamw".
        ns_dtype: in which the matrices are orthogonalized.
        The others are Muon's, and from `betas` on AdamW's.
    """

    def __init__(
        self,
        *,
        lr: float,
        weight_decay: float,
        momentum: float,
        nesterov: bool,
        ns_steps: int,
        ns_dtype: str,
        adjust: str,
        betas: Sequence[float],
        eps: float,
    ) -> None:
        self.settings = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "ns_dtype": ns_dtype,
            "adjust": adjust,
            "betas": tuple(betas),
            "eps": eps,
        }

    def __call__(self, groups: Any) -> Optimizer:
        groups = list(groups)
        if not all(isinstance(group, dict) and IS_MUONS in group for group in groups):
            raise Refused("optimizer._target_=app.optim.Muon needs the keys of optimizer=muon")
        return MuonAdamW(groups, self.settings)


class MuonAdamW(Optimizer):
    """Steps each group by one of the two, as `IS_MUONS` says."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            stepped = [p for p in group["params"] if p.grad is not None]
            if any(p.grad.is_sparse for p in stepped):
                raise Refused(
                    "optimizer=muon takes no sparse gradients, and the model makes some, as "
                    "nn.Embedding(sparse=True) does; make them dense"
                )
            if group[IS_MUONS]:
                self._step_matrices(group, stepped)
            elif stepped:
                self._step_others(group, stepped)
        return loss

    def _step_matrices(self, group: dict[str, Any], stepped: list[Tensor]) -> None:
        dtype, rate = getattr(torch, group["ns_dtype"]), float(group["lr"])
        for some in _of_one_shape(stepped):
            updates = torch.stack([_whole(self._direction(group, p)).flatten(1) for p in some])
            updates = orthogonalized(updates, num_steps=group["ns_steps"], dtype=dtype)
            factor = rate_factor(updates.shape[1:], group["adjust"])
            for parameter, update in zip(some, updates, strict=True):
                update = update.reshape(parameter.shape)
                if isinstance(parameter, DTensor):
                    update = placed_like(parameter, update)
                parameter.mul_(1 - rate * group["weight_decay"])
                parameter.add_(update, alpha=-rate * factor)

    def _direction(self, group: dict[str, Any], parameter: Tensor) -> Tensor:
        """The gradient with its momentum."""
        grad, state = parameter.grad, self.state[parameter]
        assert grad is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        momentum: Tensor = state["momentum_buffer"]
        momentum.lerp_(grad, 1 - group["momentum"])
        return grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum

    def _step_others(self, group: dict[str, Any], stepped: list[Tensor]) -> None:
        for parameter in stepped:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        states = [self.state[parameter] for parameter in stepped]
        is_complex = any(parameter.is_complex() for parameter in stepped)
        adamw(
            stepped,
            [p.grad for p in stepped if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=not is_complex and all(p.device.type == "cpu" for p in stepped),
            has_complex=is_complex,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _of_one_shape(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Those that are stacked: of one shape, dtype and device, a bounded number of them."""

    def kind(parameter: Tensor) -> tuple[Any, ...]:
        return tuple(parameter.shape), str(parameter.dtype), str(parameter.device)

    for (shape, *_), found in groupby(sorted(parameters, key=kind), kind):
        alike, number = list(found), max(1, TOGETHER // math.prod(shape))
        yield from (alike[begin : begin + number] for begin in range(0, len(alike), number))


def _whole(tensor: Tensor) -> Tensor:
    """A tensor with the elements of all ranks, each of which calls it."""
    if not isinstance(tensor, DTensor):
        return tensor
    there: Any = tensor.to(tensor.device_mesh.device_type)  # shards may be kept on the CPU
    whole: Tensor = there.full_tensor()
    return whole
