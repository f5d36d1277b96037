"""From the curve of a learning-rate range test to a suggestion, or to a doubt.

The test (arXiv 1506.01186, 1803.09820) raises the learning rate step by step and records the loss.
Everything here is pure: `sweep` says which learning rates, `diverged` when to stop, `suggest` what
the curve says. A rule takes the learning rates, ascending and above 0, and the smoothed losses at
them, and returns a learning rate, or None where the curve has no answer for it.

The constants and the default are those that measure best: benchmarks/lr_rules.py.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

BELOW_MINIMUM = 3.0
"""`slope` stays this factor below the learning rate of the smallest loss."""
FEWEST = 10
"""Points below which nothing is concluded."""
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
    low = _lowest(smoothed)
    first_half = losses[: len(losses) // 2]
    seen = max(max(first_half) - min(first_half), max(smoothed[: low + 1]) - smoothed[low])
    return smoothed[-1] - smoothed[low] > factor * seen


# --------------------------------------------------------------------------------------- the rules


def slope(lrs: Sequence[float], smoothed: Sequence[float]) -> float | None:
    """Where the loss falls fastest in log10(lr), before its minimum, at most a third of its lr.

    The first tenth, where the smoothed loss is still mostly noise, is left out. Without these
    bounds the steepest fall may be one that follows a divergence.
    """
    first, low = len(smoothed) // 10, _lowest(smoothed)
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
    low = _lowest(smoothed)
    return lrs[low] / 10 if low > 0 else None


def steepest(lrs: Sequence[float], smoothed: Sequence[float]) -> float | None:
    """Where the loss falls fastest in log10(lr), anywhere; fastai's `steep`."""
    if len(smoothed) < 2:
        return None
    slopes = _slopes(lrs, smoothed)
    fastest = int(np.argmin(slopes))
    return lrs[fastest] if slopes[fastest] < 0 else None


Rule = Callable[[Sequence[float], Sequence[float]], float | None]
RULES: dict[str, Rule] = {
    "slope": slope,
    "valley": valley,
    "minimum": minimum,
    "steepest": steepest,
}
"""By the name that a config gives; the best first."""


def _lowest(smoothed: Sequence[float]) -> int:
    return int(np.argmin(np.asarray(smoothed)))


def _slopes(
    lrs: Sequence[float], smoothed: Sequence[float]
) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    slopes: np.ndarray[tuple[int], np.dtype[np.float64]] = np.gradient(
        np.asarray(smoothed, dtype=np.float64), np.log10(lrs)
    )
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


def suggest(lrs: Sequence[float], losses: Sequence[float], *, rule: str, beta: float) -> Suggestion:
    """Judge the curve of a range test.

    Args:
        lrs: the whole sweep, or as much of it as there are losses.
        losses: as recorded, not smoothed; fewer than `lrs` where the test was stopped. All from the
            first NaN or infinite one on are left out.
        rule: a name in RULES.
        beta: of `smooth`.
    """
    finite = next((n for n, loss in enumerate(losses) if not math.isfinite(loss)), len(losses))
    visited, kept = lrs[:finite], losses[:finite]
    smoothed = smooth(kept, beta=beta)
    by_rule = {name: f(visited, smoothed) if kept else None for name, f in RULES.items()}
    lr = by_rule[rule]
    doubt = _doubt(lrs, kept, smoothed, by_rule, rule, beta)
    if doubt is not None and lr is not None:
        doubt += f", or tuner.lr.on_doubt=use to train with {lr:.2g} all the same"
    return Suggestion(lr=lr, by_rule=by_rule, doubt=doubt)


def _doubt(
    lrs: Sequence[float],
    losses: Sequence[float],
    smoothed: Sequence[float],
    by_rule: dict[str, float | None],
    rule: str,
    beta: float,
) -> str | None:
    if len(losses) < FEWEST:
        return (
            f"the loss is not finite from step {len(losses)} on, at a learning rate of "
            f"{lrs[min(len(losses), len(lrs) - 1)]:.2g}; type tuner.lr.lowest={lrs[0] / 1000:.2g}"
        )
    low, first = _lowest(smoothed), len(losses) // 10
    start = float(np.mean(losses[:first]))
    noise = _noise(losses[: max(low + 1, FEWEST)])
    error = noise * math.sqrt(1 / first + (1 - beta) / (1 + beta))
    fall = start - smoothed[low]
    rise = smoothed[-1] - start
    if (low <= first or fall <= CLEAR * error) and rise > max(CLEAR * error, 0.0):
        return (
            f"the loss only rises from a learning rate of {lrs[0]:.2g} on; "
            f"type tuner.lr.lowest={lrs[0] / 1000:.2g}"
        )
    if low <= first or fall <= CLEAR * error:
        return (
            f"the loss falls by {max(fall, 0.0):.2g} only, and varies by {noise:.2g} from step to "
            f"step; type tuner.lr.num_steps={4 * len(lrs)} or tuner.lr.highest={lrs[-1] * 10:.2g}"
        )
    if low == len(lrs) - 1:
        return (
            f"the loss still falls at the highest learning rate, {lrs[-1]:.2g}; "
            f"type tuner.lr.highest={lrs[-1] * 100:.2g}"
        )
    lr = by_rule[rule]
    if lr is None:
        return f"the rule {rule} has no answer; type tuner.lr.rule=slope"
    if lr <= lrs[first]:
        return (
            f"the loss falls fastest at the lowest learning rates, at {lr:.2g}; "
            f"type tuner.lr.lowest={lrs[0] / 1000:.2g} or tuner.lr.num_steps={4 * len(lrs)}"
        )
    usual = 10 ** median(math.log10(found) for found in by_rule.values() if found is not None)
    if abs(math.log10(lr / usual)) > AGREE_DECADES:
        named = ", ".join(f"{name} {found:.2g}" for name, found in by_rule.items() if found)
        return f"the rules disagree ({named}); type tuner.lr.num_steps={4 * len(lrs)}"
    return None


def _noise(losses: Sequence[float]) -> float:
    """Standard deviation of what is not trend, from the second differences, whose median is
    0.6745 * sqrt(6) times as much for a normal one."""
    return float(np.median(np.abs(np.diff(losses, 2)))) / (0.6745 * math.sqrt(6))
