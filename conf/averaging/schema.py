"""Weight averaging: trains on, and keeps beside the weights an average of those passed through.

Acts after each optimizer step (micro-batches and skipped steps do not count), or at the end of each
epoch. The first update copies the weights; until then everything is of the raw weights. From then
on validation, checkpoints, test, prediction and the delivered model are of the average; the raw
weights, with which training goes on, lie beside it in the checkpoints. Use it at a constant,
high-ish learning rate and a short budget, where it beats decaying the rate; a long cosine catches
up. Lightning's own averages lose the start, the end, or the test.

| preset  | the average                                                | source                  |
|---------|------------------------------------------------------------|-------------------------|
| ema     | exponential: recent weights count most                     | Polyak, Juditsky; timm  |
| swa     | equal weights: the ends of the last epochs, at half the rate | arXiv 1803.05407      |
| uniform | equal weights: every step (or epoch) from a start on       | Polyak, Juditsky 1992   |
| custom  | what a class of yours says                                 |                         |

A buffer that a validation changes (a threshold, a best score) is no weight: it is averaged no
more. Write `averaging.NAME=null` to take a bound away. A rule of your own: a class derived from
`app.averaging.Averaging` with `weight` or `update`, and `should_update` where it is not to follow
`start_step` and `every_n_steps`, chosen by `averaging=custom averaging._target_=theirs.MyAverage`.
What all presets have in common stands in `parts/common.yaml`.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

from omegaconf import MISSING

from ..rules import LARGEST_RATE, MANY, count, number, require

NO_START = "for no bound type {key}=null"
OFF = "to switch averaging off use averaging=none"

Validate = StrEnum("Validate", "averaged raw both")
"""Whose metrics the validation measures."""

Anneal = StrEnum("Anneal", "cos linear")
"""The way from one learning rate to another."""


@dataclass(kw_only=True)
class Averaging:
    """What all averages have in common."""

    start_step: int | None = count(at_least=0, instead=NO_START)
    """Optimizer steps trained before the averaging may begin, >= 0; null: no bound."""
    every_n_steps: int | None = count(instead="type {key}=1")
    """Optimizer steps from one update to the next, >= 1; null: one at the end of each epoch."""
    validate: Validate = MISSING
    """averaged or raw weights; both validates twice, and logs `raw_<metric>` as well. Checkpoints
    are of the average."""
    bn_batches: int | None = count(instead="type {key}=1")
    """Training batches, >= 1, from which the average's BatchNorm statistics are computed, before
    it is evaluated, at the end of an epoch and of the run; null: running statistics are averaged
    like weights."""


@dataclass(kw_only=True)
class FromEpoch(Averaging):
    """What those have in common that may be given an epoch to begin at."""

    start_epoch: int | None = count(at_least=0, instead=NO_START)
    """Epochs trained before the averaging may begin, >= 0; null: no bound."""

    def __post_init__(self) -> None:
        _require_one_start("start_epoch", self.start_epoch, self.start_step)


@dataclass(kw_only=True)
class Uniform(FromEpoch):
    """The mean over all updates. Give it a start: the first weights of a run are poor."""

    _target_: str = "app.averaging.Uniform"


@dataclass(kw_only=True)
class Ema(FromEpoch):
    """Exponential moving average: each update keeps the share `decay` of the average.

    Without `decay` and `half_life_steps` the memory is a share of the run, so that runs of any
    length are averaged alike: 1 - decay = updates^-1 / horizon.
    """

    _target_: str = "app.averaging.Ema"
    every_n_steps: int = count(instead="type {key}=1")
    """Optimizer steps from one update to the next, >= 1."""
    decay: float | None = number(at_least=0, below=1, rule="be from 0 to below 1", instead=OFF)
    """Share of the average an update keeps, 0 to below 1; null: from the half-life or horizon."""
    half_life_steps: float | None = number(above=0, at_most=MANY, instead="type {key}=null")
    """Optimizer steps after which weights count half, > 0; instead of `decay`."""
    horizon: float = number(
        above=0, at_most=1, rule="be above 0, up to 1", instead="type {key}=0.05"
    )
    """Share of the run that the average remembers, above 0 to 1; 0.05 to 0.1 work well."""
    warmup: bool = MISSING
    """Whether the decay grows to its value: min(decay, 1 - (1 + updates / gamma)^-power)."""
    warmup_gamma: float = number(above=0, at_most=MANY, instead="type {key}=1.0")
    """Updates that the warm-up is counted in, > 0."""
    warmup_power: float = number(above=0, at_most=100, instead="type {key}=0.75")
    """Exponent of the warm-up, > 0; 2/3 for long runs, 3/4 for shorter ones."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.decay is None or self.half_life_steps is None,
            "averaging.decay must be null where averaging.half_life_steps is given, got "
            f"{self.decay}; type one of averaging.decay=null and averaging.half_life_steps=null",
        )


@dataclass(kw_only=True)
class Swa(Averaging):
    """The mean over the ends of the epochs from the start to the last, at a rate of its own.

    A run that stops inside an epoch counts its last weights as that epoch's.
    """

    _target_: str = "app.averaging.Swa"
    start: int | float | None = MISSING
    """Epochs trained before (int, >= 0), or the share of trainer.max_epochs (float, 0 to below 1);
    null where `start_step` is given."""
    lr: Any = number(
        above=0,
        at_most=LARGEST_RATE,
        rule="be > 0, or a list of such numbers",
        instead="for a share of the run's rate type {key}=null averaging.lr_factor=0.5",
    )
    """Learning rate, > 0, at most ten times the run's, that every parameter group is brought to
    from the start on, whatever the scheduler says: a number, or a list with one for each group of
    all optimizers; null: by `lr_factor`."""
    lr_factor: float | None = number(
        above=0, at_most=10, instead="to leave the schedule alone type {key}=null"
    )
    """The same as a share, above 0 to 10, of the rate that each group has at the start, where `lr`
    is null; null as well: the schedule goes on."""
    anneal_epochs: int | None = count(at_least=0, instead="type {key}=1")
    """Epochs from the rate at the start to that one, >= 0; null where `anneal_steps` is given."""
    anneal_steps: int | None = count(at_least=0, instead="type {key}=1")
    """The same in optimizer steps, >= 0, instead of `anneal_epochs`."""
    anneal_strategy: Anneal = MISSING
    """cos or linear."""

    def __post_init__(self) -> None:
        _require_one_start("start", self.start, self.start_step)
        end = 1 if isinstance(self.start, float) else MANY
        require(
            self.start is None or 0 <= self.start < end,
            "averaging.start must be epochs >= 0 (2) or a share from 0.0 to below 1.0 (0.5), got "
            f"{self.start}; {OFF}",
        )
        rates = self.lr if isinstance(self.lr, list) else [self.lr]
        require(
            all(rate is None or isinstance(rate, int | float) for rate in rates),
            f"averaging.lr must be > 0, or a list of such numbers, got {self.lr}; for a share of "
            "the run's rate type averaging.lr=null averaging.lr_factor=0.5",
        )
        require(
            (self.anneal_epochs is None) != (self.anneal_steps is None),
            "averaging.anneal_epochs must be null where averaging.anneal_steps is given, and given "
            f"where that is null, got {self.anneal_epochs}; to jump to averaging.lr type "
            "averaging.anneal_epochs=0 averaging.anneal_steps=null",
        )


@dataclass(kw_only=True)
class Custom(Averaging):
    """An average of your own, with what its class takes; of these, what it does not take is not
    given."""

    _takes_settings_: ClassVar[bool] = True

    _target_: str = MISSING


def _require_one_start(key: str, start: float | None, start_step: int | None) -> None:
    require(
        start is None or start_step is None,
        f"averaging.{key} must be null where averaging.start_step is given, got {start}; type one "
        f"of averaging.{key}=null and averaging.start_step=null",
    )


PRESETS = {"ema": Ema, "swa": Swa, "uniform": Uniform, "custom": Custom}
