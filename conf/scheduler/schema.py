"""The learning rate over the run. Needs an `optimizer=`; steps with the optimizer or the epoch.

Lengths follow from the run: optimizer steps are counted exactly, accumulation schedules included.

| preset   | learning rate                                                   | source          |
|----------|-----------------------------------------------------------------|-----------------|
| cosine   | linear warm-up, then half a cosine to the final share           | arXiv 1608.03983 |
| linear   | linear warm-up, then a line to the final share                  |                 |
| warmup   | linear warm-up, then constant                                   | arXiv 1706.02677 |
| onecycle | up to the peak and down below the start, momentum opposed       | arXiv 1708.07120 |
| steps    | multiplied by gamma at given epochs                             |                 |
| plateau  | multiplied by a factor when the monitored metric stops improving |                 |
| custom   | any class or function that makes one of an optimizer            |                 |

`scheduler=custom scheduler._target_=torch.optim.lr_scheduler.CosineAnnealingLR
scheduler.interval=step +scheduler.T_max=total_steps`: the words total_steps and total_epochs stand
for the length of the run.
"""

from dataclasses import dataclass
from enum import StrEnum

from omegaconf import MISSING

from ..rules import MANY, count, number, require, text

SHARE = "be from 0 to 1"

Shape = StrEnum("Shape", "cosine linear constant")
"""The learning rate after the warm-up."""

Mode = StrEnum("Mode", "min max")
"""Whether a metric is better when smaller or larger."""


@dataclass(kw_only=True)
class WarmupDecay:
    """A linear warm-up from zero, then a decay to a share of the peak."""

    _target_: str = "app.optim.WarmupDecay"
    shape: Shape = MISSING
    """cosine, linear or constant after the warm-up."""
    warmup: int | float = MISSING
    """Optimizer steps (int) or share of the run (float, 0 to below 1)."""
    final: float = number(at_least=0, at_most=1, rule=SHARE, instead="type {key}=0.0")
    """Share of the peak at the end, 0 to 1."""

    def __post_init__(self) -> None:
        require(
            0 <= self.warmup < (MANY if isinstance(self.warmup, int) else 1),
            "scheduler.warmup must be steps >= 0 or a share from 0.0 to below 1.0, got "
            f"{self.warmup}; for no warm-up type scheduler.warmup=0",
        )


@dataclass(kw_only=True)
class OneCycle:
    """The 1cycle policy, its peak at the optimizer's learning rate."""

    _target_: str = "app.optim.OneCycle"
    peak: float = number(above=0, below=1, rule="be above 0 and below 1", instead="type {key}=0.3")
    """Share of the run at which the peak is reached, above 0 and below 1."""
    start_divisor: float = number(at_least=1, at_most=MANY, instead="type {key}=25")
    """The start is the peak over this, >= 1."""
    final_divisor: float = number(at_least=1, at_most=MANY, instead="type {key}=25")
    """The end is the start over this, >= 1."""


@dataclass(kw_only=True)
class Steps:
    """Multiply by `gamma` at given epochs."""

    _target_: str = "app.optim.Steps"
    milestones: list[int] = count(instead="type '{key}=[15,25]'")
    """Epochs, from 0, rising."""
    gamma: float = number(at_least=0, at_most=1, rule=SHARE, instead="type {key}=0.1")
    """Factor at each, 0 to 1."""

    def __post_init__(self) -> None:
        require(
            self.milestones == sorted(set(self.milestones)),
            f"scheduler.milestones must be rising epochs > 0, got {self.milestones}; type "
            "'scheduler.milestones=[15,25]'",
        )


@dataclass(kw_only=True)
class Plateau:
    """Multiply by `factor` after `patience` measurements without an improvement."""

    _target_: str = "app.optim.Plateau"
    monitor: str | None = text(instead="type {key}=val_loss")
    """Metric that the model logs; null = that of the checkpoints."""
    mode: Mode | None = None
    """min or max: which values of the metric are better; null = as the checkpoints, or by name."""
    factor: float = number(at_least=0, at_most=1, rule=SHARE, instead="type {key}=0.5")
    """0 to 1."""
    patience: int = count(at_least=0, instead="type {key}=3")
    """Epochs that have measured the metric, >= 0."""


Interval = StrEnum("Interval", "step epoch")
"""When a schedule steps."""


@dataclass(kw_only=True)
class Theirs:
    """What the run reads of any other schedule."""

    interval: Interval = MISSING
    """step or epoch: when it steps."""
    frequency: int = count(instead="type {key}=1")
    """Optimizer steps or epochs from one of its steps to the next, >= 1."""
    monitor: str | None = text(instead="type {key}=val_loss")
    """Metric that a ReduceLROnPlateau follows; null with any other."""


PRESETS = {
    "cosine": WarmupDecay,
    "linear": WarmupDecay,
    "warmup": WarmupDecay,
    "onecycle": OneCycle,
    "steps": Steps,
    "plateau": Plateau,
}
