"""Gradient clipping: bounds the gradient of one optimizer step before it is applied.

Acts in `on_before_optimizer_step`: once per optimizer step, after accumulation and unscaling, under
automatic and manual optimization alike. Use it where single steps blow up: high learning rates,
recurrent and transformer models, reinforcement learning.

| preset     | what it bounds                                            | source                  |
|------------|-----------------------------------------------------------|-------------------------|
| norm       | the norm over all gradients of the optimizer              | Pascanu, arXiv 1211.5063 |
"""

from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING

from ..rules import require


class NonFinite(str, Enum):
    """What to do with a step whose gradient holds NaN or Inf."""

    skip = "skip"
    error = "error"
    clip = "clip"


@dataclass(kw_only=True)
class NormClip:
    """Scale all gradients of an optimizer so that their common norm is at most `max_norm`."""

    _target_: str = "app.clip.NormClip"
    max_norm: float = MISSING
    """Upper bound of the norm, > 0."""
    norm_type: float = MISSING
    """p of the p-norm, > 0; `inf` bounds the largest element."""
    nonfinite: NonFinite = MISSING
    """skip the step, stop with an error, or zero the non-finite elements and clip the rest."""

    def __post_init__(self) -> None:
        off = "to switch clipping off use clip=none"
        require(self.max_norm > 0, "clip.max_norm", "be > 0", self.max_norm, off)
        require(
            self.norm_type > 0, "clip.norm_type", "be > 0", self.norm_type, "type clip.norm_type=2"
        )


PRESETS = {"norm": NormClip}
