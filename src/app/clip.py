"""Gradient clipping: the rules behind the presets of `conf/clip`, whose schema is the method card.

A rule is a `Clip` with one method, `measure`; what is common to all (whose gradients, what to do
with a non-finite norm, what is reported) stands in `Clip` alone.
"""

import math
from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from app.blocks import is_matrix
from app.errors import Refused
from app.parallel.sharded import Sharded, Spread

__all__ = ["AdaptiveClip", "Clip", "Measured", "NormClip", "PercentileClip", "ValueClip"]

Measured = tuple[float, Callable[[], None] | None]
"""The gradient norm, and what clips in place; None where nothing is over its bound."""


def total_norm(grads: list[Tensor], norm_type: float) -> Tensor:
    """The p-norm over all elements of all tensors, a scalar on the first one's device."""
    if not all(grad.is_cpu for grad in grads):
        return get_total_norm(grads, norm_type)
    if norm_type == math.inf:  # 15 times faster than vector_norm
        return torch.stack([end for grad in grads for end in torch.aminmax(grad)]).abs().amax()
    # get_total_norm without its grouping by device: as slow as the norm of a small model
    norms = torch.stack(torch._foreach_norm(grads, norm_type))
    norm: Tensor = torch.linalg.vector_norm(norms, norm_type)
    return norm


def sharded_norm(
    grads: list[Tensor],
    norm_type: float,
    spread: list[tuple[Any, ...]],
    all_groups: list[tuple[Any, ...]],
    device: torch.device,
) -> Tensor:
    """The p-norm over all elements of all shards, a scalar on `device`; every rank calls it.

    `spread` says for each gradient over which process groups its elements are spread; `all_groups`
    are those of all parameters, for a rank may have no gradient of some.
    """
    is_max = norm_type == math.inf
    reduce = torch.distributed.ReduceOp.MAX if is_max else torch.distributed.ReduceOp.SUM
    parts = []
    for groups in all_groups:
        mine = [g for g, over in zip(grads, spread, strict=True) if over == groups and g.numel()]
        norm = total_norm(mine, norm_type).float() if mine else torch.zeros((), device=device)
        part = norm.to(device) if is_max else norm.to(device) ** norm_type
        for group in groups:
            torch.distributed.all_reduce(part, reduce, group=group)
        parts.append(part)
    together = torch.stack(parts)
    return together.amax() if is_max else together.sum() ** (1 / norm_type)


def scale_to_(grads: list[Tensor], norm: float, bound: float) -> None:
    """Scale `grads`, whose norm is `norm`, to `bound`, in place; torch's 1e-6 included."""
    torch._foreach_mul_(grads, bound / (norm + 1e-6))


def clamp_(grads: list[Tensor], bound: float) -> None:
    """Clamp every element to [-bound, bound], in place."""
    if grads[0].is_cpu:  # where the loop is faster
        for grad in grads:
            grad.clamp_(-bound, bound)
    else:
        torch._foreach_clamp_min_(grads, -bound)
        torch._foreach_clamp_max_(grads, bound)


def unit_norms(tensors: list[Tensor]) -> Tensor:
    """2-norms of all output units of all tensors, shape (units,), in the tensors' order.

    A unit is a slice of dimension 0; a vector or a scalar is one unit, as in timm.
    """
    norm = torch.linalg.vector_norm
    return torch.cat(
        [norm(t, dim=tuple(range(1, t.ndim))) if t.ndim > 1 else norm(t)[None] for t in tensors]
    )


def adaptive_scales(
    weight_norms: Tensor, grad_norms: Tensor, clip_factor: float, eps: float
) -> Tensor:
    """min(1, clip_factor * max(|w|, eps) / |g|) of every unit, shape (units,); arXiv 2102.06171."""
    bounds = weight_norms.clamp_min(eps).mul_(clip_factor)
    return bounds.div_(grad_norms).clamp_max_(1.0)


def whole_unit_norms(tensors: list[Tensor], spread: list[Spread]) -> Tensor:
    """`unit_norms` of shards, each the norm of its whole unit; every rank calls it."""
    sizes = [len(t) if t.ndim > 1 else 1 for t in tensors]
    norms = list(torch.split(unit_norms(tensors), sizes))
    for groups in dict.fromkeys(over.units for over in spread):
        at = [i for i, over in enumerate(spread) if over.units == groups]
        squares = torch.cat([norms[i] for i in at]).square()
        for group in groups:
            torch.distributed.all_reduce(squares, group=group)
        for i, part in zip(at, torch.split(squares, [len(norms[i]) for i in at]), strict=True):
            norms[i] = part.sqrt()
    return torch.cat(norms)


def scale_units_(groups: list[tuple[list[Tensor], Tensor]]) -> None:
    """Scale every output unit by its entry of the scales, shape (units,), in place.

    A group is the gradients on one device and the scales of all their units.
    """
    for grads, scales in groups:
        parts = torch.split(scales, [len(g) if g.ndim > 1 else 1 for g in grads])
        shapes = [(-1, *(1,) * (g.ndim - 1)) if g.ndim > 1 else () for g in grads]
        torch._foreach_mul_(grads, [part.view(s) for part, s in zip(parts, shapes, strict=True)])


def percentile_of(ordered: list[float], percentile: float) -> float:
    """The percentile, in [0, 100], of an ascending list, interpolated linearly as in numpy."""
    place = (len(ordered) - 1) * percentile / 100
    low = math.floor(place)
    high = math.ceil(place)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def zero_nonfinite_(grads: list[Tensor]) -> None:
    """Set NaN and Inf elements to 0, in place."""
    for grad in grads:
        grad.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


@dataclass(kw_only=True)
class Tally:
    """What happened to one optimizer since the last report."""

    norm_sum: float = 0.0
    num_norms: int = 0
    num_clipped: int = 0
    num_applied: int = 0
    num_skipped: int = 0

    def metrics(self, suffix: str) -> dict[str, float]:
        """Without the entries that no step has filled."""
        found: dict[str, float] = {}
        if self.num_norms > 0:
            found[f"grad_norm{suffix}"] = self.norm_sum / self.num_norms
        if self.num_applied > 0:
            found[f"clipped_share{suffix}"] = self.num_clipped / self.num_applied
        if self.num_skipped > 0:
            found[f"skipped_steps{suffix}"] = float(self.num_skipped)
        return found


class Clip(Callback, ABC):
    """What all rules share: acts once per optimizer step, on that optimizer's gradients.

    `nonfinite`, for a norm that is NaN or Inf: "skip" makes the optimizer step change nothing
    (schedulers and counters go on), "error" raises FloatingPointError, "clip" zeroes the non-finite
    elements and clips the rest, or skips where the norm overflows even so. Under a GradScaler every
    such step is skipped, as the scaler will do.

    Lightning's own clipping, but also under manual optimization and with fused optimizers in
    16-mixed, where Lightning refuses or clips scaled gradients.
    """

    def __init__(self, *, nonfinite: str) -> None:
        self.nonfinite = nonfinite
        self._tallies: list[Tally] = []
        self._model_clips = False
        self._strategy: Sharded | None = None
        self._spread: dict[int, Spread] = {}
        self._groups: list[tuple[Any, ...]] = []

    @abstractmethod
    def measure(self, position: int, params: list[Tensor], grads: list[Tensor]) -> Measured:
        """Measure the gradients, unscaled, of one step, with one wait for the device.

        `position` is the optimizer's in `trainer.optimizers`. `grads` are those of `params`; of a
        sparse gradient, the values: (num_rows, ...); of a sharded one, this rank's shard. Take
        norms by `self.total_norm`: it is that of the whole model.
        """

    def total_norm(self, grads: list[Tensor], norm_type: float) -> Tensor:
        """The p-norm over all elements of all gradients, also where they are sharded."""
        if self._strategy is None:
            return total_norm(grads, norm_type)
        spread = [self._spread[id(grad)].elements for grad in grads]
        return sharded_norm(grads, norm_type, spread, self._groups, self._strategy.root_device)

    def lightning_rule(self) -> tuple[float, str] | None:
        """This rule as Lightning's `gradient_clip_val` and `..._algorithm`, where it has it."""
        return None

    def step_metrics(self) -> dict[str, float]:
        """What happened since the last call.

        `grad_norm`: mean before clipping, over the steps with a finite norm. `clipped_share`: of
        the steps not skipped. `skipped_steps`: their count, if any. With several optimizers each
        name ends in the optimizer's position: `grad_norm/0`.
        """
        several = len(self._tallies) > 1
        found: dict[str, float] = {}
        for position, tally in enumerate(self._tallies):
            found |= tally.metrics(f"/{position}" if several else "")
        self._tallies = [Tally() for _ in self._tallies]
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"tallies": [asdict(tally) for tally in self._tallies]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._tallies = [Tally(**counts) for counts in state_dict["tallies"]]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the last fit; hand the rule to a model that does the clipping itself."""
        if stage != "fit":
            return
        if trainer.gradient_clip_val is not None:
            raise Refused(
                "trainer.gradient_clip_val must be null beside a clip preset, got "
                f"{trainer.gradient_clip_val}; to clip by Lightning alone use clip=none"
            )
        self._tallies = []
        self._strategy = trainer.strategy if isinstance(trainer.strategy, Sharded) else None
        rule = self.lightning_rule()
        overridden = is_overridden("configure_gradient_clipping", pl_module)
        if rule is not None and overridden and pl_module.automatic_optimization:
            self._model_clips = True
            trainer.gradient_clip_val = rule[0]
            trainer.gradient_clip_algorithm = GradClipAlgorithmType(rule[1])

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._take_back(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._take_back(trainer)

    def _take_back(self, trainer: Trainer) -> None:
        if self._model_clips:
            self._model_clips = False
            trainer.gradient_clip_val = None
            trainer.gradient_clip_algorithm = None

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Measure, settle a non-finite norm, clip, count."""
        stepped = [p for group in optimizer.param_groups for p in group["params"]]
        params = [p for p in stepped if p.grad is not None]
        if not params and self._strategy is None:
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            scaler.unscale_(optimizer)  # Lightning leaves it to the fused step: too late for us
        if len(self._tallies) != len(trainer.optimizers):
            self._tallies = [Tally() for _ in trainer.optimizers]
        position = trainer.optimizers.index(optimizer)
        tally = self._tallies[position]

        grads = [_elements(p) for p in params]
        if self._strategy is not None:
            over = self._strategy.spread_over
            self._spread = {id(g): over(p) for g, p in zip(grads, params, strict=True)}
            self._groups = list(dict.fromkeys(over(p).elements for p in stepped))
        norm, clip = self.measure(position, params, grads)
        zeroed = not math.isfinite(norm) and self.nonfinite == "clip" and scaler is None
        if zeroed:
            zero_nonfinite_(grads)
            norm, clip = self.measure(position, params, grads)
        norm = float(norm)  # a rule of the user's may give a tensor
        if not math.isfinite(norm):
            if self.nonfinite == "error" and scaler is None:
                raise FloatingPointError(_report(norm, trainer.global_step, pl_module, params))
            for param in params:
                param.grad = None  # torch's optimizers pass over such a parameter altogether
            tally.num_skipped += 1
            return

        tally.num_applied += 1
        if not zeroed:
            tally.norm_sum += norm
            tally.num_norms += 1
        if zeroed or clip is not None:
            tally.num_clipped += 1
        if clip is not None and not self._model_clips:
            clip()


def _elements(param: Tensor) -> Tensor:
    """The gradient; of a sparse one its values, of a sharded one its shard: views of it."""
    grad = param.grad
    assert grad is not None
    if isinstance(grad, DTensor):
        return grad.to_local()
    if not grad.is_sparse:
        return grad
    param.grad = grad.coalesce()
    return param.grad.values()


def _report(norm: float, step: int, model: LightningModule, params: list[Tensor]) -> str:
    stepped = set(params)
    bad = [
        name
        for name, param in model.named_parameters()
        if param in stepped and not _elements(param).isfinite().all()
    ]
    where = ", ".join(bad[:3]) if bad else "the sum over all elements"
    return (
        f"the gradient norm must be finite, got {norm} at optimizer step {step}, first in {where}; "
        "to skip such steps use clip.nonfinite=skip"
    )


class NormClip(Clip):
    """Scale all gradients of an optimizer so that their p-norm is at most `max_norm`, > 0.

    Source: arXiv 1211.5063; the numbers are `torch.nn.utils.clip_grad_norm_`'s, but gradients
    within the bound are not touched.
    """

    def __init__(self, *, max_norm: float, norm_type: float, nonfinite: str) -> None:
        super().__init__(nonfinite=nonfinite)
        self.max_norm = max_norm
        self.norm_type = norm_type

    def measure(self, position: int, params: list[Tensor], grads: list[Tensor]) -> Measured:
        norm = self.total_norm(grads, self.norm_type).item()
        over = norm > self.max_norm
        return norm, partial(scale_to_, grads, norm, self.max_norm) if over else None

    def lightning_rule(self) -> tuple[float, str] | None:
        return (self.max_norm, "norm") if self.norm_type == 2 else None


class ValueClip(Clip):
    """Clamp every gradient element to [-max_value, max_value], max_value > 0.

    Source: `torch.nn.utils.clip_grad_value_`, but gradients within the bound are not touched. The
    norm reported is the 2-norm.
    """

    def __init__(self, *, max_value: float, nonfinite: str) -> None:
        super().__init__(nonfinite=nonfinite)
        self.max_value = max_value

    def measure(self, position: int, params: list[Tensor], grads: list[Tensor]) -> Measured:
        both = [self.total_norm(grads, 2.0), self.total_norm(grads, math.inf)]
        norm, largest = torch.stack(both).tolist()
        return norm, partial(clamp_, grads, self.max_value) if largest > self.max_value else None

    def lightning_rule(self) -> tuple[float, str] | None:
        return self.max_value, "value"


class AdaptiveClip(Clip):
    """Scale each output unit's gradient to at most `clip_factor` times the norm of its weights.

    The weight norm counts as at least `eps`; both > 0. `exclude` holds patterns on parameter names,
    `exclude_head` leaves alone what the last module with a trainable matrix of its own owns.
    Raises Refused for a pattern that matches nothing, a head not found, a sparse gradient.

    Source: AGC, arXiv 2102.06171, with timm's units, but in one pass over all parameters.
    """

    def __init__(
        self,
        *,
        clip_factor: float,
        eps: float,
        exclude_head: bool,
        exclude: list[str],
        nonfinite: str,
    ) -> None:
        super().__init__(nonfinite=nonfinite)
        self.clip_factor = clip_factor
        self.eps = eps
        self.exclude_head = exclude_head
        self.exclude = exclude
        self._excluded: set[Tensor] = set()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the parameters to leave alone."""
        named = dict(pl_module.named_parameters())
        self._excluded = set()
        for pattern in self.exclude:
            found = [param for name, param in named.items() if fnmatchcase(name, pattern)]
            if not found:
                raise Refused(
                    f"clip.exclude must match parameter names, got {pattern}; "
                    f"the names are {', '.join(named)}"
                )
            self._excluded.update(found)
        if self.exclude_head:
            owned = [(part, [*part.parameters(recurse=False)]) for part in pl_module.modules()]
            heads = [own for part, own in owned if any(is_matrix(p, part) for p in own)]
            if not heads:
                raise Refused(
                    "clip.exclude_head must find a module with a trainable matrix, got none in "
                    f"{type(pl_module).__name__}; type clip.exclude_head=false"
                )
            self._excluded.update(heads[-1])

    def measure(self, position: int, params: list[Tensor], grads: list[Tensor]) -> Measured:
        groups: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = {}
        left_alone = []
        for param, grad in zip(params, grads, strict=True):
            if param in self._excluded:
                left_alone.append(grad)
                continue
            weight = param.to_local() if isinstance(param, DTensor) else param
            if grad.shape != weight.shape:
                raise Refused(
                    "clip=adaptive must have dense gradients, got a sparse one of a parameter of "
                    f"shape {tuple(param.shape)}; name that parameter in clip.exclude"
                )
            weights, bounded = groups.setdefault(grad.device, ([], []))
            weights.append(weight)
            bounded.append(grad)

        norms = [self.total_norm(left_alone, 2.0)] if left_alone else []
        smallest = []
        scaled = []
        for weights, bounded in groups.values():
            if self._strategy is None:
                grad_norms, weight_norms = unit_norms(bounded), unit_norms(weights)
                norms.append(torch.linalg.vector_norm(grad_norms))
            else:
                spread = [self._spread[id(grad)] for grad in bounded]
                grad_norms = whole_unit_norms(bounded, spread)
                weight_norms = whole_unit_norms(weights, spread)
                norms.append(self.total_norm(bounded, 2.0))
            scales = adaptive_scales(weight_norms, grad_norms, self.clip_factor, self.eps)
            smallest.append(scales.min() if len(scales) else scales.new_ones(()))
            scaled.append((bounded, scales))

        device = norms[0].device
        found = torch.stack([n.to(device) for n in norms + smallest]).tolist()
        norm = math.hypot(*found[: len(norms)])
        over = min(found[len(norms) :], default=1.0) < 1
        return norm, partial(scale_units_, scaled) if over else None


class PercentileClip(Clip):
    """Scale all gradients so that their 2-norm is at most a percentile of the norms so far.

    `percentile` is in (0, 100]; `history` the number of steps remembered, >= 2 or None for all. The
    step's own norm is in the history that bounds it. One history per optimizer, kept in the
    checkpoint; a non-finite norm never enters.

    Source: AutoClip, arXiv 2007.14469.
    """

    def __init__(self, *, percentile: float, history: int | None, nonfinite: str) -> None:
        super().__init__(nonfinite=nonfinite)
        self.percentile = percentile
        self.history = history
        self._recent: defaultdict[int, deque[float]] = defaultdict(deque)
        self._ordered: defaultdict[int, list[float]] = defaultdict(list)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._recent.clear()
            self._ordered.clear()

    def measure(self, position: int, params: list[Tensor], grads: list[Tensor]) -> Measured:
        norm = self.total_norm(grads, 2.0).item()
        if not math.isfinite(norm):
            return norm, None
        recent, ordered = self._recent[position], self._ordered[position]
        recent.append(norm)
        insort(ordered, norm)
        if self.history is not None and len(recent) > self.history:
            del ordered[bisect_left(ordered, recent.popleft())]
        bound = percentile_of(ordered, self.percentile)
        return norm, partial(scale_to_, grads, norm, bound) if norm > bound else None

    def state_dict(self) -> dict[str, Any]:
        norms = {position: list(norms) for position, norms in self._recent.items()}
        return {**super().state_dict(), "norms": norms}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for position, norms in state_dict["norms"].items():
            self._recent[position].extend(norms)
            self._ordered[position].extend(sorted(norms))
