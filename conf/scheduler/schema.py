"""The learning rate over the run. Needs an `optimizer=`; steps with the optimizer or the epoch.

Lengths follow from the run: optimizer steps are counted exactly, accumulation schedules included.

| preset   | learning rate                                                   | source          |
|----------|-----------------------------------------------------------------|-----------------|
| cosine   | linear warm-up, then half a cosine to the final share           | arXiv 1608.03983 |
| linear   | linear warm-up, then a line to the final share                  |                 |
| warmup   | linear warm-up, then constant                                   | arXiv 1706.02677 |
| wsd      | linear warm-up, constant, and a decay that ends with the run    | arXiv 2405.18392 |
| onecycle | up to the peak and down below the start, momentum opposed       | arXiv 1708.07120 |
| steps    | multiplied by gamma at given epochs                             |                 |
| plateau  | multiplied by a factor when the monitored metric stops improving |                 |
| custom   | any class or function that makes one of an optimizer            |                 |

`scheduler=custom scheduler._target_=torch.optim.lr_scheduler.CosineAnnealingLR
scheduler.interval=step +scheduler.T_max=total_steps`: the words total_steps and total_epochs stand
for the length of the run.

Until its decay begins a run of wsd knows nothing of its length. Where it keeps checkpoints,
`callbacks.checkpoint.keep_every_n_steps=1000`, each is the beginning of a shorter run:
`branch_of=runs/mine branch_at=3000 name=short` decays from there, and is, bit for bit, the run that
had been given that length. Its warm-up stays that of runs/mine: name it in steps.
"""

from dataclasses import dataclass
from enum import StrEnum

from omegaconf import MISSING

from ..rules import MANY, count, number, require, text

SHARE = "be from 0 to 1"

Shape = StrEnum("Shape", "cosine linear constant")
"""The learning rate after the warm-up."""

Decay = StrEnum("Decay", "sqrt linear cosine")
"""How the learning rate falls at the end: 1 - sqrt(p), 1 - p, or half a cosine."""

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
        _check_warmup(self.warmup)


@dataclass(kw_only=True)
class WarmupStableDecay:
    """A linear warm-up from zero, the peak, and a decay to a share of it that ends with the run."""

    _target_: str = "app.optim.WarmupStableDecay"
    shape: Decay = MISSING
    """sqrt, linear or cosine: how the rate falls; sqrt is 1 - sqrt(p)."""
    warmup: int | float = MISSING
    """Optimizer steps (int) or share of the run (float, 0 to below 1)."""
    decay: int | float = MISSING
    """Optimizer steps (int, >= 1) or share of the run (float, above 0 to below 1), at its end."""
    final: float = number(at_least=0, at_most=1, rule=SHARE, instead="type {key}=0.0")
    """Share of the peak at the end, 0 to 1."""

    def __post_init__(self) -> None:
        _check_warmup(self.warmup)
        require(
            0 < self.decay < (MANY if isinstance(self.decay, int) else 1),
            "scheduler.decay must be steps >= 1 or a share above 0.0 and below 1.0, got "
            f"{self.decay}; type scheduler.decay=0.2, or for none scheduler=warmup",
        )


def _check_warmup(warmup: int | float) -> None:
    require(
        0 <= warmup < (MANY if isinstance(warmup, int) else 1),
        "scheduler.warmup must be steps >= 0 or a share from 0.0 to below 1.0, got "
        f"{warmup}; for no warm-up type scheduler.warmup=0",
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
    "wsd": WarmupStableDecay,
    "onecycle": OneCycle,
    "steps": Steps,
    "plateau": Plateau,
}
