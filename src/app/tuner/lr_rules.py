"""From the curve of a learning-rate range test to a suggestion, or to a doubt.

The test (arXiv 1506.01186, 1803.09820) raises the learning rate step by step and records the loss.
Everything here is pure: `sweep` says which learning rates, `diverged` when to stop, `suggest` what
the curve says. A rule takes the learning rates, ascending and above 0, and the smoothed losses at
them, and returns a learning rate, or None where the curve has no answer for it.

The default and its constants are those that measure best in benchmarks/lr_rules.py, which also
says how they do on problems that they were not chosen on.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from numpy.typing import NDArray

BELOW_MINIMUM = 3.0
"""`slope` stays this factor below the learning rate of the smallest loss."""
FEWEST = 10
"""Points below which nothing is concluded; a sweep has at least as many."""
CLEAR = 3.0
"""Standard errors by which the loss must have fallen."""
AGREE_DECADES = 1.0
"""How far, in log10, a rule may be from the median of all."""


def sweep(*, num_steps: int, lowest: float, highest: float, mode: str) -> list[float]:
    """The learning rate, or its multiplier, of each step, both ends included.

    Args:
        num_steps: optimizer steps, >= 2.
        lowest: > 0.
        highest: > lowest.
        mode: exponential (equal factors from step to step) or linear (equal differences).
    """
    assert num_steps >= 2, num_steps
    assert 0 < lowest < highest, (lowest, highest)
    assert mode in ("exponential", "linear"), mode
    space = np.geomspace if mode == "exponential" else np.linspace
    return [float(lr) for lr in space(lowest, highest, num_steps)]


def smooth(losses: Sequence[float], *, beta: float) -> list[float]:
    """Exponential moving mean, debiased: the first value is the first loss, a constant is itself.

    `beta`, in [0, 1), is the weight of the past: about 1 / (1 - beta) losses count. Lightning's
    divides by 1 - beta^(n+1) at the n-th loss, and records a constant of 1 as .505, .673, ...
    """
    smoothed = []
    mean = weight = 0.0
    for loss in losses:
        weight = beta * weight + 1 - beta
        mean += (loss - mean) * (1 - beta) / weight
        smoothed.append(mean)
    return smoothed


def beta_for(num_steps: int) -> float:
    """The `beta` at which about a fifth of the losses of the sweep count: 0.95 for 100 steps.

    So twice the steps are twice the precision, and do not move the suggestion by the lag.
    """
    assert num_steps >= FEWEST, num_steps
    return 1 - 5 / num_steps


def diverged(losses: Sequence[float], *, beta: float, factor: float) -> bool:
    """Whether to stop after these losses, as recorded, not smoothed: once after each step.

    True where the last loss is NaN or infinite, or where the smoothed loss stands above its minimum
    by more than `factor`, > 0, times the range seen so far: that of the losses of the first half,
    or what the smoothed loss has fallen by. So the sign of the loss and its zero do not matter, as
    they do where a multiple of the smallest loss is the bound (Lightning, fastai).
    """
    if not math.isfinite(losses[-1]):
        return True
    if len(losses) < FEWEST:
        return False
    smoothed = smooth(losses, beta=beta)
    _, low = _first_and_lowest(smoothed)
    first_half = losses[: len(losses) // 2]
    seen = max(max(first_half) - min(first_half), max(smoothed[: low + 1]) - smoothed[low])
    return smoothed[-1] - smoothed[low] > factor * seen


# --------------------------------------------------------------------------------------- the rules


def slope(lrs: Sequence[float], smoothed: Sequence[float]) -> float | None:
    """Where the loss falls fastest in log10(lr), before its minimum, at most a third of its lr.

    Without these bounds the steepest fall may be one that follows a divergence. The constant was
    chosen by the study; the search in log10(lr) is that of arXiv 1803.09820's plots.
    """
    first, low = _first_and_lowest(smoothed)
    if low <= first:
        return None
    steepest_at = first + int(np.argmin(_slopes(lrs, smoothed)[first : low + 1]))
    return min(lrs[steepest_at], lrs[low] / BELOW_MINIMUM)


def valley(lrs: Sequence[float], smoothed: Sequence[float]) -> float | None:
    """Halfway through the longest valley, the longest run of falling losses with gaps allowed.

    Source: fastai's `valley`, its places (a third and a sixth of the length after the start) too.
    """
    tails: list[float] = []  # of the falling runs of each length, the end that leaves most room
    end = 0
    for place, loss in enumerate(smoothed):
        length = bisect_left(tails, -loss)
        if length == len(tails):
            tails.append(-loss)
            end = place
        else:
            tails[length] = -loss
    longest = len(tails)
    return lrs[end - longest + longest // 3 + longest // 6] if longest >= 3 else None


def minimum(lrs: Sequence[float], smoothed: Sequence[float]) -> float | None:
    """A tenth of the learning rate at the smallest loss; fastai's `minimum`."""
    first, low = _first_and_lowest(smoothed)
    return lrs[low] / 10 if low > first else None


def steepest(lrs: Sequence[float], smoothed: Sequence[float]) -> float | None:
    """Where the loss falls fastest in log10(lr), also behind its minimum; fastai's `steep`."""
    if len(smoothed) < 2:
        return None
    first, _ = _first_and_lowest(smoothed)
    slopes = _slopes(lrs, smoothed)
    fastest = first + int(np.argmin(slopes[first:]))
    return lrs[fastest] if slopes[fastest] < 0 else None


Rule = Callable[[Sequence[float], Sequence[float]], float | None]
RULES: dict[str, Rule] = {
    "slope": slope,
    "valley": valley,
    "minimum": minimum,
    "steepest": steepest,
}
"""By the name that a config gives; the best first."""


def _first_and_lowest(smoothed: Sequence[float]) -> tuple[int, int]:
    """Where to begin to look, and the smallest loss from there on.

    In the first tenth the mean is over few losses: its smallest value there is a lucky batch.
    """
    first = len(smoothed) // 10
    return first, first + int(np.argmin(smoothed[first:]))


def _slopes(lrs: Sequence[float], smoothed: Sequence[float]) -> NDArray[np.float64]:
    moved = np.asarray(smoothed) - smoothed[0]  # a constant has a slope of exactly 0
    slopes: NDArray[np.float64] = np.gradient(moved, np.log10(lrs))
    return slopes


# ----------------------------------------------------------------------------------- the suggestion


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """What a curve says.

    Attributes:
        lr: by the rule asked for, in the unit of the sweep; None where it has no answer.
        by_rule: what each of the rules says.
        doubt: why not to trust `lr`, and what to type; None where there is no reason.
    """

    lr: float | None
    by_rule: dict[str, float | None]
    doubt: str | None


def suggest(lrs: Sequence[float], losses: Sequence[float], *, rule: str) -> Suggestion:
    """Judge the curve of a range test.

    Args:
        lrs: the whole sweep, of at least 10 steps.
        losses: as recorded, not smoothed; fewer than `lrs` where the test was stopped. All from the
            first NaN or infinite one on are left out.
        rule: a name in RULES.
    """
    beta = beta_for(len(lrs))
    finite = next((n for n, loss in enumerate(losses) if not math.isfinite(loss)), len(losses))
    visited, kept = lrs[:finite], losses[:finite]
    smoothed = smooth(kept, beta=beta)
    enough = finite >= FEWEST
    by_rule = {name: f(visited, smoothed) if enough else None for name, f in RULES.items()}
    doubt = _doubt(lrs, kept, smoothed, by_rule, rule)
    lr = by_rule[rule]
    if doubt is not None and lr is not None:
        doubt += f"; to train with {lr:.2g} all the same, type tuner.lr.on_doubt=use"
    return Suggestion(lr=lr, by_rule=by_rule, doubt=doubt)


def _doubt(
    lrs: Sequence[float],
    losses: Sequence[float],
    smoothed: Sequence[float],
    by_rule: dict[str, float | None],
    rule: str,
) -> str | None:
    lower = f"type tuner.lr.lowest={lrs[0] / 1000:.2g}"
    higher = f"type tuner.lr.highest={lrs[-1] * 100:.2g}"
    more = f"type tuner.lr.num_steps={4 * len(lrs)}"
    if len(losses) < FEWEST:
        return (
            f"the loss is NaN or infinite at step {len(losses)} already, at a learning rate of "
            f"{lrs[len(losses)]:.2g}; {lower}"
        )

    first, low = _first_and_lowest(smoothed)
    start = float(np.mean(losses[:first]))
    beta = beta_for(len(lrs))
    noise = _noise(losses[: max(low + 1, len(losses) // 2)])
    error = CLEAR * noise * math.sqrt(1 / first + (1 - beta) / (1 + beta))  # of two means
    fall = start - smoothed[low]
    if low == first or fall <= error:
        if float(np.mean(losses[first : 2 * first])) - start > error:
            return f"the loss only rises, from a learning rate of {lrs[0]:.2g} on; {lower}"
        if len(losses) < len(lrs) or smoothed[-1] - start > error:
            return (
                f"the loss does not fall clearly before it rises: by {max(fall, 0.0):.2g}, and it "
                f"varies by {noise:.2g} from step to step; {more} or train with larger batches"
            )
        return (
            f"the loss hardly changes up to a learning rate of {lrs[len(losses) - 1]:.2g}; {higher}"
        )
    if low == len(lrs) - 1:
        return f"the loss still falls at the highest learning rate, {lrs[-1]:.2g}; {higher}"

    lr = by_rule[rule]
    if lr is None:
        return f"the rule {rule} has no answer on this curve; type tuner.lr.rule=slope"
    if lr <= lrs[first]:
        return f"the loss falls fastest at the lowest learning rates, at {lr:.2g}; {lower}"
    usual = 10 ** median(math.log10(found) for found in by_rule.values() if found is not None)
    if abs(math.log10(lr / usual)) > AGREE_DECADES:
        said = ", ".join(f"{name} {found:.2g}" for name, found in by_rule.items() if found)
        return f"the rules disagree by more than a decade ({said}); {more}"
    return None


def _noise(losses: Sequence[float]) -> float:
    """Standard deviation of the losses about their trend, from the second differences.

    Those of a normal one have a median, without sign, of 0.6745 * sqrt(6) times it.
    """
    return float(np.median(np.abs(np.diff(losses, 2)))) / (0.6745 * math.sqrt(6))
