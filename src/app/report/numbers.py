"""Means over seeds, their 95 % intervals by Student's t, without scipy; and how they are shown."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean, median_high, stdev

LEVEL = 0.95
LARGEST = 1e150
"""From which on squares are not finite."""
NOTHING = "-"
"""Stands where there is no number, or no value."""
MOST_CHARACTERS = 9
MOST_OF_A_TEXT = 60


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean and its 95 % interval.

    Attributes:
        half_width: None where there are fewer than two values, or one that is not finite.
        n: how many values.
    """

    mean: float
    half_width: float | None = None
    n: int

    @property
    def low(self) -> float | None:
        """Where the interval begins; None where there is none."""
        return None if self.half_width is None else self.mean - self.half_width

    @property
    def high(self) -> float | None:
        """Where the interval ends; None where there is none."""
        return None if self.half_width is None else self.mean + self.half_width


def estimate(values: Sequence[float]) -> Estimate | None:
    """The mean of values and its interval; None of no values."""
    if not values:
        return None
    n, mean = len(values), mean_of(values)
    if n == 1 or math.isnan(mean):
        return Estimate(mean=mean, n=n)
    half = t_quantile(0.5 + LEVEL / 2, df=n - 1) * stdev(values) / math.sqrt(n)
    return Estimate(mean=mean, half_width=half, n=n)


def mean_of(values: Sequence[float]) -> float:
    """The mean; NaN where one of several values is, or is not finite, or has no finite square."""
    if len(values) == 1:
        return values[0]
    return fmean(values) if all(abs(value) < LARGEST for value in values) else math.nan


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
    angle, is_odd = math.atan2(t, math.sqrt(df)), df % 2
    term, total = math.cos(angle) if is_odd else 1.0, 0.0
    for k in range(2 + is_odd, df + 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (k - 1) / k
    within = math.sin(angle) * total
    return 0.5 + ((angle + within) / math.pi if is_odd else within / 2)


class Decimals:
    """The decimals that a column of estimates deserves.

    As many as show three digits of the largest mean and two of the middle interval, or four of the
    mean where there is no interval; at most six.

    Args:
        sign: `+` where positive numbers have it, else empty.
    """

    def __init__(self, estimates: Iterable[Estimate | None], *, sign: str = "") -> None:
        known = [one for one in estimates if one is not None and math.isfinite(one.mean)]
        largest = max((abs(one.mean) for one in known), default=0.0)
        halves = [one.half_width for one in known if one.half_width]
        wanted = [(2 if halves else 3) - math.floor(math.log10(largest)) if largest else 3, 0]
        if halves:
            wanted.append(1 - math.floor(math.log10(median_high(halves))))
        is_scientific = largest >= 1e6 or 0 < largest < 1e-4
        self._format = sign + (".3e" if is_scientific else f".{min(6, max(wanted))}f")

    def of(self, value: float | None) -> str:
        """A number; a dash where there is none."""
        return NOTHING if value is None else format(value, self._format)

    def mean(self, one: Estimate | None) -> str:
        """The mean of an estimate; a dash where there is none."""
        return self.of(None if one is None else one.mean)

    def interval(self, one: Estimate | None) -> str:
        """Both ends of an interval; a dash where there is none."""
        if one is None or one.half_width is None:
            return NOTHING
        return f"[{self.of(one.low)}, {self.of(one.high)}]"


def shortened(value: str) -> str:
    """A value as it is typed; of a fraction with many digits, as a search chooses it, four, and of
    a long text its beginning."""
    if len(value) > MOST_CHARACTERS and re.fullmatch(r"-?\d*\.\d+(e[-+]?\d+)?", value):
        return f"{float(value):.4g}"
    return cut(value, most=MOST_OF_A_TEXT)


def cut(text: str, *, most: int) -> str:
    """A text, or its beginning where it has too many characters."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def duration(seconds: float | None) -> str:
    """Seconds with their unit, and minutes or hours where there are many."""
    if seconds is None:
        return NOTHING
    if seconds < 120:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
