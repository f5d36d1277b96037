"""Gradient accumulation: one optimizer step from several micro-batches.

Trains with a batch that does not fit in memory. The gradient of a step is the mean over the
micro-batches of its window, also of the shorter window at the end of an epoch; a step never spans
two epochs. Acts on every micro-batch and once per optimizer step. Lightning divides the short
window by the full factor and knows schedules by epoch only.

| preset    | the factor                                                        |
|-----------|-------------------------------------------------------------------|
| constant  | the same throughout                                               |
| schedule  | changes at given epochs or optimizer steps (arXiv 1711.00489)     |
| effective | solved from the batch size asked for, the micro-batch and the ranks |
| custom    | what a class of yours says                                        |

With `accumulate.weight_by` micro-batches are weighted by a count that the batch carries, such as
the number of tokens, so that the step equals the large batch's also where losses are means over a
varying count.

A factor of your own: a class derived from `app.accumulate.Accumulation` with one property,
`schedules`, chosen by `accumulate=custom accumulate._target_=theirs.MyAccumulation`.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from omegaconf import MISSING

from ..rules import count, require, text

OFF = "to switch accumulation off use accumulate=none"
SCHEDULE = "type for example 'accumulate.starts=[0,4]' 'accumulate.factors=[1,8]'"
MOST = 1_000_000
"""Micro-batches of a step."""

By = StrEnum("By", "epoch step")
"""What the starts of a schedule count."""


@dataclass(kw_only=True)
class ConstantAccumulation:
    """The same number of micro-batches in every optimizer step."""

    _target_: str = "app.accumulate.ConstantAccumulation"
    factor: int = count(at_most=MOST, instead=OFF)
    """Micro-batches per optimizer step, >= 1."""
    weight_by: str | None = text(instead="for plain means type {key}=null")
    """Key or attribute of the batch with its count (a number, or a tensor that is summed)."""


@dataclass(kw_only=True)
class ScheduledAccumulation:
    """A factor that changes at given epochs or optimizer steps."""

    _target_: str = "app.accumulate.ScheduledAccumulation"
    by: By = MISSING
    """epoch or step: what `starts` counts, from 0."""
    starts: list[int] = count(at_least=0, instead=SCHEDULE)
    """First epoch (or optimizer step) of each factor: rising from 0."""
    factors: list[int] = count(at_most=MOST, instead=OFF)
    """Micro-batches per optimizer step from each start on, >= 1."""
    weight_by: str | None = text(instead="for plain means type {key}=null")
    """Key or attribute of the batch with its count (a number, or a tensor that is summed)."""

    def __post_init__(self) -> None:
        require(
            self.starts[:1] == [0] and self.starts == sorted(set(self.starts)),
            f"accumulate.starts must rise from 0, got {self.starts}; {SCHEDULE}",
        )
        require(
            len(self.factors) == len(self.starts),
            f"accumulate.factors must hold one factor for each of the {len(self.starts)} starts, "
            f"got {self.factors}; {SCHEDULE}",
        )


@dataclass(kw_only=True)
class EffectiveBatch:
    """The factor that makes micro-batch x factor x world size the batch size asked for."""

    _target_: str = "app.accumulate.EffectiveBatch"
    batch_size: int = count(instead=OFF)
    """Samples per optimizer step over all ranks, >= 1."""
    micro_batch_size: int | None = count(instead=OFF)
    """Samples per micro-batch and rank; null where neither data.batch_size nor model.batch_size
    tells it."""
    weight_by: str | None = text(instead="for plain means type {key}=null")
    """Key or attribute of the batch with its count (a number, or a tensor that is summed)."""

    def __post_init__(self) -> None:
        require(
            self.micro_batch_size is not None,
            "accumulate.micro_batch_size must be given where neither data.batch_size nor "
            "model.batch_size tells it; type accumulate.micro_batch_size=32",
        )


@dataclass(kw_only=True)
class Custom:
    """A factor of your own, with what its class takes."""

    _takes_settings_: ClassVar[bool] = True

    _target_: str = MISSING
    weight_by: str | None = text(instead="for plain means type {key}=null")
    """Key or attribute of the batch with its count; not given to a class that does not take it."""


PRESETS = {
    "constant": ConstantAccumulation,
    "schedule": ScheduledAccumulation,
    "effective": EffectiveBatch,
    "custom": Custom,
}
