"""Means over seeds and their 95 % intervals by Student's t, without scipy."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

LEVEL = 0.95
LARGEST = 1e150
"""From which on squares are not finite."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean and its 95 % interval.

    Attributes:
        low, high: None where there are fewer than two values, or one that is not finite.
        n: how many values.
    """

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def half_width(self) -> float | None:
        """Of the interval; None where there is none."""
        return None if self.high is None else self.high - self.mean


def estimate(values: Sequence[float]) -> Estimate | None:
    """The mean of values and its interval; None of no values."""
    if not values:
        return None
    n, mean = len(values), mean_of(values)
    if n == 1 or math.isnan(mean):
        return Estimate(mean=mean, low=None, high=None, n=n)
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    half = t_quantile(0.5 + LEVEL / 2, df=n - 1) * math.sqrt(variance / n)
    return Estimate(mean=mean, low=mean - half, high=mean + half, n=n)


def mean_of(values: Sequence[float]) -> float:
    """The mean; NaN where one of several values is, or is not finite, or has no finite square."""
    if len(values) == 1:
        return values[0]
    is_known = all(abs(value) < LARGEST for value in values)
    return math.fsum(values) / len(values) if is_known else math.nan


@lru_cache(maxsize=1024)
def t_quantile(p: float, *, df: int) -> float:
    """The value below which a share `p` of Student's t lies, 0.5 <= p < 1; to 1e-9 of itself.

    Args:
        df: degrees of freedom, at least 1.
    """
    assert 0.5 <= p < 1
    assert df >= 1
    low, high = 0.0, 1.0
    while t_share(high, df=df) < p:
        low, high = high, 2 * high
    while high - low > 1e-10 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if t_share(middle, df=df) < p else (low, middle)
    return high


def t_share(t: float, *, df: int) -> float:
    """The share of Student's t below `t` >= 0, for whole degrees of freedom.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    angle = math.atan2(t, math.sqrt(df))
    cos, sin = math.cos(angle), math.sin(angle)
    if df % 2:
        term, total = cos, 0.0
        for k in range(1, (df - 1) // 2 + 1):
            total += term
            term *= cos * cos * 2 * k / (2 * k + 1)
        within = 2 / math.pi * (angle + sin * total)
    else:
        term, total = 1.0, 0.0
        for k in range(1, df // 2 + 1):
            total += term
            term *= cos * cos * (2 * k - 1) / (2 * k)
        within = sin * total
    return 0.5 + within / 2
