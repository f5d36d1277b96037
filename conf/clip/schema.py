"""Gradient clipping: bounds the gradient of one optimizer step before it is applied.

Acts in `on_before_optimizer_step`: once per optimizer step, after accumulation and unscaling, under
automatic and manual optimization alike. Use it where single steps blow up: high learning rates,
recurrent and transformer models, reinforcement learning.

| preset     | what it bounds                                    | when              | source     |
|------------|---------------------------------------------------|-------------------|------------|
| norm       | the norm over all gradients of the optimizer      | the usual choice  | 1211.5063  |
| value      | each element by itself, changing the direction    | few huge elements | torch      |
| adaptive   | each output unit's norm, relative to its weights' | no batch norm     | 2102.06171 |
| percentile | the norm, by a percentile of the norms so far     | scale unknown     | 2007.14469 |
| custom     | what a class of yours says, such as single layers | none of these     |            |

A number is an arXiv id. A step whose norm is NaN or Inf is `clip.nonfinite`'s business: a skipped
step changes no weight and no optimizer state. In 16-mixed precision the gradient scaler skips such
steps, whatever is set. Every rule reports `grad_norm` (before clipping), `clipped_share` and
`skipped_steps`. A model that overrides `configure_gradient_clipping` keeps its say: norm (with
norm_type=2) and value hand it their number and leave the clipping to it, the others clip first.

A rule of your own: a class derived from `app.clip.Clip` with one method, `measure`, chosen by
`clip=custom clip._target_=theirs.MyClip`; what it takes is typed as `+clip.bound=0.1`.
"""

from dataclasses import dataclass
from enum import StrEnum
from math import inf
from typing import ClassVar

from omegaconf import MISSING

from ..rules import MANY, number

OFF = "to switch clipping off use clip=none"

NonFinite = StrEnum("NonFinite", "skip error clip")
"""What to do with a step whose gradient norm is NaN or Inf."""


@dataclass(kw_only=True)
class NormClip:
    """Scale all gradients of an optimizer so that their common norm is at most `max_norm`."""

    _target_: str = "app.clip.NormClip"
    max_norm: float = number(above=0, at_most=inf, instead=OFF)
    """Upper bound of the norm, > 0; `inf` only measures."""
    norm_type: float = number(above=0, at_most=inf, instead="type {key}=2")
    """p of the p-norm, > 0; `inf` bounds the largest element."""
    nonfinite: NonFinite = MISSING
    """skip the step, stop with an error, or zero the non-finite elements and clip the rest."""


@dataclass(kw_only=True)
class ValueClip:
    """Clamp every gradient element to [-max_value, max_value]."""

    _target_: str = "app.clip.ValueClip"
    max_value: float = number(above=0, at_most=inf, instead=OFF)
    """Upper bound of an element's absolute value, > 0; `inf` only measures."""
    nonfinite: NonFinite = MISSING
    """skip the step, stop with an error, or zero the non-finite elements and clip the rest."""


@dataclass(kw_only=True)
class AdaptiveClip:
    """Scale each output unit's gradient to at most `clip_factor` times the norm of its weights."""

    _target_: str = "app.clip.AdaptiveClip"
    clip_factor: float = number(above=0, at_most=1_000_000, instead=OFF)
    """Upper bound of gradient norm / weight norm, > 0; smaller for larger batches."""
    eps: float = number(above=0, at_most=1_000_000, instead="type {key}=1e-3")
    """Lower bound of the weight norm, > 0: lets units that start at zero move."""
    exclude_head: bool = MISSING
    """Leave alone the last module in definition order that owns a trainable matrix."""
    exclude: list[str] = MISSING
    """Leave alone the parameters whose names match one of these patterns, as `encoder.*`."""
    nonfinite: NonFinite = MISSING
    """skip the step, stop with an error, or zero the non-finite elements and clip the rest."""


@dataclass(kw_only=True)
class PercentileClip:
    """Scale all gradients so that their norm is at most a percentile of the norms so far."""

    _target_: str = "app.clip.PercentileClip"
    percentile: float = number(above=0, at_most=100, rule="be in (0, 100]", instead=OFF)
    """Which percentile of the history bounds the norm, in (0, 100]; 100 never clips."""
    history: int | None = number(
        at_least=2,
        at_most=MANY,
        rule="be >= 2 or null",
        instead="to keep every step type {key}=null",
    )
    """Length of the history in optimizer steps, >= 2; null keeps (and saves) every step."""
    nonfinite: NonFinite = MISSING
    """skip the step, stop with an error, or zero the non-finite elements and clip the rest."""


@dataclass(kw_only=True)
class Custom:
    """A rule of your own, with what it takes."""

    _takes_settings_: ClassVar[bool] = True

    _target_: str = MISSING
    nonfinite: NonFinite = MISSING
    """skip the step, stop with an error, or zero the non-finite elements and clip the rest; not
    given to a class that does not take it."""


PRESETS = {
    "norm": NormClip,
    "value": ValueClip,
    "adaptive": AdaptiveClip,
    "percentile": PercentileClip,
    "custom": Custom,
}
