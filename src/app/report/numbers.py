"""Numbers as text, with the same decimals in a column."""

import math
import re
from collections.abc import Iterable

from app.report.statistics import Estimate

MOST_CHARACTERS = 9
MOST_OF_A_TEXT = 60


class Digits:
    """The decimals that a column of estimates deserves.

    As many as show three digits of the largest mean and two of the middle interval, or four of the
    mean where there is no interval; at most six.
    """

    def __init__(self, estimates: Iterable[Estimate | None]) -> None:
        known = [one for one in estimates if one is not None and math.isfinite(one.mean)]
        largest = max((abs(one.mean) for one in known), default=0.0)
        halves = sorted(one.half_width for one in known if one.half_width)
        self._is_scientific = largest >= 1e6 or 0 < largest < 1e-4
        shown = 3 if halves else 4
        wanted = [shown - 1 - math.floor(math.log10(largest)) if largest else 3, 0]
        if halves:
            wanted.append(1 - math.floor(math.log10(halves[len(halves) // 2])))
        self._decimals = min(6, max(wanted))

    def of(self, value: float | None, *, sign: bool = False) -> str:
        """A number; a dash where there is none."""
        if value is None:
            return "-"
        kind = ".3e" if self._is_scientific else f".{self._decimals}f"
        return f"{value:{'+' if sign else ''}{kind}}"

    def interval(self, one: Estimate | None, *, sign: bool = False) -> str:
        """Both ends of an interval; a dash where there is none."""
        if one is None or one.low is None:
            return "-"
        return f"[{self.of(one.low, sign=sign)}, {self.of(one.high, sign=sign)}]"


def shortened(value: str) -> str:
    """A value as it is typed; of a fraction with many digits, as a search chooses it, four, and of
    a long text its beginning."""
    if len(value) > MOST_CHARACTERS and re.fullmatch(r"-?\d*\.\d+(e[-+]?\d+)?", value):
        return f"{float(value):.4g}"
    return value if len(value) <= MOST_OF_A_TEXT else f"{value[: MOST_OF_A_TEXT - 3]}..."


def duration(seconds: float | None) -> str:
    """Seconds with their unit, and minutes or hours where there are many."""
    if seconds is None:
        return "-"
    if seconds < 120:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
