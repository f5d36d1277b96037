"""The optimizer of all trainable parameters, in place of the model's own `configure_optimizers`.

`optimizer=none` leaves the model its own.
"""

from dataclasses import dataclass

from omegaconf import MISSING

from ..rules import LARGEST_RATE, count, number, require

OFF = "to switch it off type {key}=0"


@dataclass(kw_only=True)
class SGD:
    """Stochastic gradient descent with momentum: torch.optim.SGD."""

    _target_: str = "torch.optim.SGD"
    _partial_: bool = True
    lr: float = number(above=0, at_most=LARGEST_RATE, instead="type for example {key}=0.01")
    """Learning rate, > 0."""
    momentum: float = number(
        at_least=0, below=1, rule="be from 0 to below 1", instead="type {key}=0.9"
    )
    """0 to 1; 0 = none."""
    nesterov: bool = MISSING
    """Nesterov's variant of the momentum."""
    weight_decay: float = number(at_least=0, at_most=1_000_000, instead=OFF)
    """L2 penalty, >= 0."""
    fused: bool | None = MISSING
    """One kernel for all tensors: 2 to 3 times faster, other last bits; null = torch's choice."""

    def __post_init__(self) -> None:
        require(
            not self.nesterov or self.momentum > 0,
            f"optimizer.nesterov must be false without momentum, got {self.nesterov}; type "
            "optimizer.momentum=0.9 too",
        )


@dataclass(kw_only=True)
class Moments:
    """What the optimizers have in common that keep a first and a second moment of the gradient."""

    lr: float = number(above=0, at_most=LARGEST_RATE, instead="type for example {key}=0.01")
    """Learning rate, > 0."""
    betas: list[float] = number(
        at_least=0,
        below=1,
        rule="be two numbers from 0 to below 1",
        instead="type '{key}=[0.9,0.999]'",
    )
    """Decay of the first and second moment, each 0 to below 1."""
    eps: float = number(above=0, at_most=1_000_000, instead="type {key}=1e-8")
    """Added to the denominator, > 0."""
    weight_decay: float = number(at_least=0, at_most=1_000_000, instead=OFF)
    """>= 0; decoupled from the gradient but in adam."""

    def __post_init__(self) -> None:
        require(
            len(self.betas) == 2,
            f"optimizer.betas must be two numbers from 0 to below 1, got {self.betas}; type "
            "'optimizer.betas=[0.9,0.999]'",
        )


@dataclass(kw_only=True)
class Adam(Moments):
    """Adam (arXiv 1412.6980) or AdamW (arXiv 1711.05101), fused into one kernel where torch can."""

    _target_: str = MISSING
    _partial_: bool = True
    fused: bool = MISSING
    """One kernel for all tensors: 4 to 7 times faster on a CPU."""


@dataclass(kw_only=True)
class AdamW8bit(Moments):
    """AdamW with moments of 8 bits (arXiv 2110.02861): 2 bytes a parameter in place of 8."""

    _target_: str = "app.optim.AdamW8bit"
    min_8bit_size: int = count(at_least=0, instead="type {key}=4096")
    """Tensors of fewer numbers keep moments of 32 bits, >= 0."""


PRESETS = {"sgd": SGD, "adam": Adam, "adamw": Adam, "adamw8bit": AdamW8bit}
