"""The search for the largest micro-batch that fits into memory, given one that tries a size.

Imports no torch: what a trial is, is the caller's. Equal trials give equal sizes to try, so ranks
whose probe answers the same on all of them stay in step.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from app.errors import Refused

Mode = Literal["power", "binsearch", "model"]
Goal = Literal["largest", "fastest"]

KEY = "tuner.batch_size"
MAX_GROWTH = 16  # of one step of the model: below a kink its line may be flat
APART = 0.75  # the points of the secant; closer ones fall into one block of the allocator
BACK_OFF = 0.01  # below a prediction that failed
SAFE_SHARE = 0.95  # of the capacity, where running out of memory would hang
SAFE_GROWTH = 2
NEAR_BEST = 0.97  # of the best speed
NUM_HALVINGS = 3  # below the largest size, in search of a faster one


class NoEffect(Refused):
    """A key that a finder was to tune changes nothing."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What one size did.

    Attributes:
        fits: it ran, and stayed within the share of memory it may use.
        peak_bytes: of a size that fits; None where the device does not report it.
        samples_per_s: None where it was not measured.
    """

    size: int
    fits: bool
    peak_bytes: int | None
    samples_per_s: float | None


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The size found, every trial in the order made, and why the search ended.

    `complete` is False where it was interrupted: `size` is then the largest that ran so far.
    """

    size: int
    trials: list[Trial]
    reason: str
    complete: bool


@dataclass(kw_only=True)
class Bracket:
    """Allowed sizes, rising from 1; by index, the largest known to fit and the first that does not.

    `low` is -1 while nothing fits, `high` is `len(sizes)` while nothing fails. Trials lie between
    them, so each brings the two closer and none is made twice.
    """

    sizes: Sequence[int]
    probe: Callable[[int], Trial]
    max_trials: int | None
    low: int = -1
    high: int = field(init=False)
    trials: list[Trial] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.high = len(self.sizes)

    @property
    def width(self) -> int:
        return self.high - self.low

    @property
    def size(self) -> int:
        """The largest that ran and fitted."""
        return self.sizes[self.low]

    @property
    def middle(self) -> int:
        return (self.low + self.high) // 2

    @property
    def failed(self) -> bool:
        """Some size did not fit."""
        return self.high < len(self.sizes)

    @property
    def exhausted(self) -> bool:
        return self.max_trials is not None and len(self.trials) >= self.max_trials

    def fitting(self) -> list[Trial]:
        """The trials that fitted, by rising size."""
        return sorted((trial for trial in self.trials if trial.fits), key=lambda trial: trial.size)

    def at_most(self, size: float) -> int:
        """Index of the largest allowed size up to `size`; -1 where that is below all."""
        return bisect_right(self.sizes, size) - 1

    def within(self, index: int) -> int:
        """The nearest index still open."""
        return min(max(index, self.low + 1), self.high - 1)

    def run(self, size: int) -> Trial:
        trial = self.probe(size)
        assert trial.size == size, f"asked to try {size}, tried {trial.size}"
        self.trials.append(trial)
        return trial

    def narrow(self, index: int) -> None:
        """Try the size at `index`, which must be open."""
        assert self.low < index < self.high, (self.low, index, self.high)
        if self.run(self.sizes[index]).fits:
            self.low = index
        else:
            self.high = index


def divisors(number: int) -> list[int]:
    """All divisors of `number` >= 1, rising."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def allowed_sizes(*, up_to: int, divisors_of: int | None) -> Sequence[int]:
    """1 to `up_to`, or the divisors among them; rising from 1."""
    if divisors_of is None:
        return range(1, up_to + 1)
    return [size for size in divisors(divisors_of) if size <= up_to]


def power_ladder(*, sizes: Sequence[int], init_val: int) -> list[int]:
    """Of the allowed `sizes`: `init_val`, its doublings up to and with the last, and its halvings.

    Where a doubling is not allowed, the next smaller size is a rung, or else the next larger.
    """
    start = sizes[bisect_right(sizes, init_val) - 1]
    ladder = [start]
    while ladder[0] > 1:
        ladder.insert(0, sizes[bisect_right(sizes, ladder[0] // 2) - 1])
    while ladder[-1] < sizes[-1]:
        next_one = bisect_right(sizes, ladder[-1])
        ladder.append(sizes[max(next_one, bisect_right(sizes, 2 * ladder[-1]) - 1)])
    return ladder


def steps_of_power(bracket: Bracket, init_val: int) -> Iterator[int]:
    """Rung by rung, up from `init_val` or, where that does not fit, down; `sizes` is the ladder."""
    yield bracket.at_most(init_val)
    while True:
        yield bracket.low + 1 if bracket.low >= 0 else bracket.high - 1


def steps_of_binsearch(bracket: Bracket, init_val: int) -> Iterator[int]:
    """Doublings until one fails, then bisection."""
    yield bracket.at_most(init_val)
    while not bracket.failed:
        yield bracket.within(bracket.at_most(2 * bracket.size))
    while True:
        yield bracket.middle


def steps_of_model(bracket: Bracket, init_val: int, capacity_bytes: int) -> Iterator[int]:
    """To where a line through the peaks meets the capacity, then to the sizes around it.

    Peaks rise in blocks and have kinks, so a prediction is only ever the next size to try. One that
    narrows the bracket by less than half is followed by a bisection; one that stays below a size
    that ran, by steps growing fourfold.
    """
    yield bracket.at_most(init_val)
    while bracket.low < 0:
        yield bracket.middle

    step = 1
    while not bracket.failed:
        index = bracket.at_most(predicted_size(bracket.fitting(), capacity_bytes))
        if index > bracket.low:
            step = 1
        else:
            index = bracket.low + step
            step *= 4
        yield bracket.within(index)

    stalled = False
    while True:
        index = bracket.at_most(predicted_size(bracket.fitting(), capacity_bytes))
        if index >= bracket.high:
            index = bracket.at_most(bracket.sizes[bracket.high] - BACK_OFF * bracket.size)
        width = bracket.width
        yield bracket.middle if stalled else bracket.within(index)
        stalled = bracket.width > width / 2


def steps_below_capacity(bracket: Bracket, init_val: int, capacity_bytes: int) -> Iterator[int]:
    """Upward, each size predicted to fit from those that did; ends where the next is not.

    After the first that fits half of it is tried, for a slope.
    """
    yield bracket.at_most(init_val)
    while bracket.low < 0:
        yield bracket.middle
    if bracket.low > 0:
        bracket.run(bracket.sizes[bracket.at_most(bracket.size // 2)])
    while not bracket.exhausted:
        index = bracket.at_most(safe_size(bracket.fitting(), capacity_bytes))
        if index <= bracket.low:
            return
        yield index if index < bracket.high else bracket.middle


def predicted_size(fitting: list[Trial], capacity_bytes: int) -> float:
    """Where the line through the last two peaks meets the capacity; the sizes rise.

    From one peak alone: as if memory were proportional to the size. Up to MAX_GROWTH times the
    last size.
    """
    last, peak = fitting[-1].size, peak_of(fitting[-1])
    growth = MAX_GROWTH * last
    if len(fitting) == 1:
        return min(max(last * capacity_bytes / max(peak, 1), 2 * last), growth)
    slope = slope_below(fitting)
    return min(last + (capacity_bytes - peak) / slope, growth) if slope > 0 else growth


def safe_size(fitting: list[Trial], capacity_bytes: int) -> float:
    """Up to which size memory will be enough: SAFE_SHARE of it, and SAFE_GROWTH times the last.

    Not along the line alone: below a kink, where the optimizer step is the peak, it is flat. There
    the peak is taken for at most half fixed; that of a single trial, for not fixed at all.
    """
    last, peak = fitting[-1].size, peak_of(fitting[-1])
    slope = max(peak, 1) / last
    if len(fitting) > 1:
        slope = max(slope / 2, slope_below(fitting))
    return min(last + (SAFE_SHARE * capacity_bytes - peak) / slope, SAFE_GROWTH * last)


def slope_below(fitting: list[Trial]) -> float:
    """Bytes per sample between the last of two or more trials and the one before, but APART."""
    last = fitting[-1]
    apart = [trial for trial in fitting if trial.size <= APART * last.size]
    other = apart[-1] if apart else fitting[0]
    return (peak_of(last) - peak_of(other)) / (last.size - other.size)


def peak_of(trial: Trial) -> int:
    if trial.peak_bytes is None:
        raise Refused(_no_memory_reported())
    return trial.peak_bytes


def _no_memory_reported() -> str:
    return (
        f"{KEY}.mode=model must have a device that reports its memory, got none; "
        f"type {KEY}.mode=binsearch"
    )


def search_batch_size(
    probe: Callable[[int], Trial],
    *,
    mode: Mode,
    init_val: int,
    max_val: int,
    num_samples: int | None,
    divisors_of: int | None,
    max_trials: int | None,
    margin: float,
    capacity_bytes: int | None,
    goal: Goal,
    provoke: bool,
) -> Answer:
    """The largest micro-batch that fits: it ran, and the next allowed size did not or is none.

    Of mode power the allowed sizes are the doublings and halvings of `init_val`, and the bound.

    Args:
        probe: tries a size; one that fits must not be larger than one that does not.
        mode: power (doubles while it fits), binsearch (then bisects) or model (predicts from the
            peak memory, which the device must report; exact like binsearch in half the trials).
        init_val: first size tried, >= 1; where it does not fit, smaller ones are.
        max_val: largest size tried, >= 1.
        num_samples: of the data set of one rank, >= 1: no size is larger. None: no bound.
        divisors_of: the batch of one rank that micro-batches must add up to: only its divisors are
            sizes. None: all are.
        max_trials: most sizes tried, >= 1; None for no bound. The answer may then be too small.
        margin: share taken off the size found, in [0, 1). The size left need not have run itself.
        capacity_bytes: memory that a trial may use; None where it is not known.
        goal: largest, or fastest: the smallest size tried whose speed is within 3 % of the best,
            after some smaller ones were tried too.
        provoke: whether running out of memory is survived. False: only sizes predicted to fit are
            tried after the first, which may leave memory unused; needs mode model.

    Raises:
        Refused: not even 1 fits, or no size tried within `max_trials`; mode model without
            reported memory; another mode with `provoke=False`.
        KeyboardInterrupt: from the probe, where nothing has fitted yet.

    Source: Lightning's `BatchSizeFinder`, but the answer ran, and bounds are tried and kept.
    """
    assert min(init_val, max_val) >= 1, (init_val, max_val)
    assert 0 <= margin < 1, margin
    if mode == "model" and capacity_bytes is None:
        raise Refused(_no_memory_reported())
    if mode != "model" and not provoke:
        raise Refused(
            f"{KEY}.mode must be model where running out of memory would hang the other ranks, "
            f"got {mode}; type {KEY}.mode=model"
        )

    up_to = max_val if num_samples is None else min(max_val, num_samples)
    sizes = allowed_sizes(up_to=up_to, divisors_of=divisors_of)
    tried = power_ladder(sizes=sizes, init_val=init_val) if mode == "power" else sizes
    bracket = Bracket(sizes=tried, probe=probe, max_trials=max_trials)
    if mode == "power":
        steps = steps_of_power(bracket, init_val)
    elif mode == "binsearch":
        steps = steps_of_binsearch(bracket, init_val)
    else:
        assert capacity_bytes is not None
        by_model = steps_of_model if provoke else steps_below_capacity
        steps = by_model(bracket, init_val, capacity_bytes)

    try:
        for index in steps:
            bracket.narrow(index)
            if bracket.width == 1 or bracket.exhausted:
                break
        if bracket.low < 0:
            raise Refused(_nothing_fits(bracket))
        reason = _reason(bracket, max_val, num_samples, divisors_of)
        size = bracket.size
        if margin > 0:
            left = max(1, int(size * (1 - margin)))
            size = sizes[bisect_right(sizes, left) - 1]
        if goal == "fastest":
            size = fastest_size(bracket, sizes=sizes, largest=size)
    except KeyboardInterrupt:
        if bracket.low < 0:
            raise
        return Answer(
            size=bracket.size, trials=bracket.trials, reason="interrupted", complete=False
        )
    return Answer(size=size, trials=bracket.trials, reason=reason, complete=True)


def fastest_size(bracket: Bracket, *, sizes: Sequence[int], largest: int) -> int:
    """The smallest size tried, up to `largest`, whose speed is within 3 % of the best of them.

    Tries `largest` and some halvings of it, down to the first that is slower.
    """

    def candidates() -> dict[int, float]:
        speeds = {t.size: t.samples_per_s for t in bracket.fitting() if t.size <= largest}
        assert None not in speeds.values(), "a probe for goal=fastest must measure the speed"
        return {size: speed for size, speed in speeds.items() if speed is not None}

    for halvings in range(NUM_HALVINGS + 1):
        size = sizes[bisect_right(sizes, max(1, largest // 2**halvings)) - 1]
        if all(trial.size != size for trial in bracket.trials):
            if bracket.exhausted:
                break
            bracket.run(size)
        speeds = candidates()
        if size in speeds and speeds[size] < NEAR_BEST * max(speeds.values()):
            break
    speeds = candidates()
    best = max(speeds.values(), default=0.0)
    near_best = (size for size, speed in speeds.items() if speed >= NEAR_BEST * best)
    return min(near_best, default=largest)


def _nothing_fits(bracket: Bracket) -> str:
    if bracket.high > 0:
        return (
            f"{KEY}.max_trials must let the search reach a size that fits, got "
            f"{bracket.max_trials} and none did, down to {bracket.sizes[bracket.high]}; "
            f"lower {KEY}.init_val or raise {KEY}.max_trials"
        )
    return (
        "even a micro-batch of 1 does not fit into memory, which accumulation cannot change; "
        "type precision=bf16 or choose a smaller model"
    )


def _reason(
    bracket: Bracket, max_val: int, num_samples: int | None, divisors_of: int | None
) -> str:
    """Why the largest size that fits is the answer."""
    if bracket.width > 1:
        if bracket.exhausted:
            return f"{KEY}.max_trials={bracket.max_trials} reached"
        return f"size {bracket.sizes[bracket.low + 1]} is predicted not to fit"
    if bracket.failed:
        return f"size {bracket.sizes[bracket.high]} does not fit"
    if bracket.size == divisors_of:
        return f"the batch of {divisors_of} is one micro-batch"
    if num_samples is not None and num_samples <= max_val:
        bound = f"the data set has {num_samples} samples"
    else:
        bound = f"{KEY}.max_val={max_val} reached"
    return bound if divisors_of is None else f"{bound}: no larger divisor of {divisors_of}"
