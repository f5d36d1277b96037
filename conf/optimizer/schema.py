"""The optimizer of all trainable parameters, in place of the model's own `configure_optimizers`.

`optimizer=none` leaves the model its own.
"""

from dataclasses import dataclass

from omegaconf import MISSING

from ..rules import require


@dataclass(kw_only=True)
class SGD:
    """Stochastic gradient descent with momentum: torch.optim.SGD."""

    _target_: str = "torch.optim.SGD"
    _partial_: bool = True
    lr: float = MISSING
    """Learning rate, > 0."""
    momentum: float = MISSING
    """0 to 1; 0 = none."""
    nesterov: bool = MISSING
    """Nesterov's variant of the momentum."""
    weight_decay: float = MISSING
    """L2 penalty, >= 0."""
    fused: bool | None = MISSING
    """One kernel for all tensors: 2 to 3 times faster, other last bits; null = torch's choice."""

    def __post_init__(self) -> None:
        _require_common(self.lr, self.weight_decay)
        require(
            0 <= self.momentum < 1,
            "optimizer.momentum",
            "be from 0 to below 1",
            self.momentum,
            "type optimizer.momentum=0.9",
        )
        require(
            not self.nesterov or self.momentum > 0,
            "optimizer.nesterov",
            "be false without momentum",
            self.nesterov,
            "type optimizer.momentum=0.9 too",
        )


@dataclass(kw_only=True)
class Adam:
    """Adam (arXiv 1412.6980) or AdamW (arXiv 1711.05101), fused into one kernel where torch can."""

    _target_: str = MISSING
    _partial_: bool = True
    lr: float = MISSING
    """Learning rate, > 0."""
    betas: list[float] = MISSING
    """Decay of the first and second moment, each 0 to below 1."""
    eps: float = MISSING
    """Added to the denominator, > 0."""
    weight_decay: float = MISSING
    """>= 0; AdamW's is decoupled from the gradient."""
    fused: bool = MISSING
    """One kernel for all tensors: 4 to 7 times faster on a CPU."""

    def __post_init__(self) -> None:
        _require_moments(self.lr, self.betas, self.eps, self.weight_decay)


@dataclass(kw_only=True)
class AdamW8bit:
    """AdamW with moments of 8 bits (arXiv 2110.02861): 2 bytes a parameter in place of 8."""

    _target_: str = "app.optim.AdamW8bit"
    lr: float = MISSING
    """Learning rate, > 0."""
    betas: list[float] = MISSING
    """Decay of the first and second moment, each 0 to below 1."""
    eps: float = MISSING
    """Added to the denominator, > 0."""
    weight_decay: float = MISSING
    """Decoupled from the gradient, >= 0."""
    min_8bit_size: int = MISSING
    """Tensors of fewer numbers keep moments of 32 bits, >= 0."""

    def __post_init__(self) -> None:
        _require_moments(self.lr, self.betas, self.eps, self.weight_decay)
        require(
            self.min_8bit_size >= 0,
            "optimizer.min_8bit_size",
            "be >= 0",
            self.min_8bit_size,
            "type optimizer.min_8bit_size=4096",
        )


def _require_moments(lr: float, betas: list[float], eps: float, weight_decay: float) -> None:
    _require_common(lr, weight_decay)
    require(
        len(betas) == 2 and all(0 <= beta < 1 for beta in betas),
        "optimizer.betas",
        "be two numbers from 0 to below 1",
        betas,
        "type 'optimizer.betas=[0.9,0.999]'",
    )
    require(eps > 0, "optimizer.eps", "be > 0", eps, "type optimizer.eps=1e-8")


def _require_common(lr: float, weight_decay: float) -> None:
    require(lr > 0, "optimizer.lr", "be > 0", lr, "type for example optimizer.lr=0.01")
    require(
        weight_decay >= 0,
        "optimizer.weight_decay",
        "be >= 0",
        weight_decay,
        "to switch it off type optimizer.weight_decay=0",
    )


PRESETS = {"sgd": SGD, "adam": Adam, "adamw": Adam, "adamw8bit": AdamW8bit}
