"""Intervals drawn in a table's cells."""

import math
from dataclasses import dataclass

from app.report.statistics import Estimate
from app.report.summary import Report

WIDTH, HEIGHT, MARGIN = 110, 18, 6


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The values at the left and right end of every cell, and the baseline's mean between them."""

    left: float
    right: float
    baseline: float | None

    @classmethod
    def of(cls, report: Report) -> "Scale":
        """So wide that the intervals fit, but at most three times the range of the means."""
        known = [row for row in report.rows if row.mean and math.isfinite(row.mean.mean)]
        estimates = [row.mean for row in known if row.mean]
        if not estimates:
            return cls(left=0.0, right=1.0, baseline=None)
        means = [one.mean for one in estimates]
        low, high = min(means), max(means)
        reach = high - low or max((one.half_width or 0.0 for one in estimates), default=0.0) or 1.0
        lows = [one.mean if one.low is None else one.low for one in estimates]
        highs = [one.mean if one.high is None else one.high for one in estimates]
        bases = [row.mean.mean for row in known if row.is_baseline and row.mean]
        return cls(
            left=max(min(lows), low - reach),
            right=min(max(highs), high + reach),
            baseline=bases[0] if bases else None,
        )

    def drawn(self, one: Estimate | None) -> str:
        """An SVG of the interval, cut where the cell ends; empty where there is no number."""
        if one is None or not math.isfinite(one.mean):
            return ""
        middle = HEIGHT / 2
        parts = [f'<line class="axis" x1="0" x2="{WIDTH}" y1="{middle}" y2="{middle}"/>']
        if self.baseline is not None:
            x = self._x(self.baseline)
            parts.append(f'<line class="base" x1="{x}" x2="{x}" y1="1" y2="{HEIGHT - 1}"/>')
        if one.low is not None and one.high is not None:
            x1, x2 = self._x(one.low), self._x(one.high)
            parts.append(f'<line class="span" x1="{x1}" x2="{x2}" y1="{middle}" y2="{middle}"/>')
        parts.append(f'<circle cx="{self._x(one.mean)}" cy="{middle}" r="4"/>')
        return (
            f'<svg class="range" width="{WIDTH}" height="{HEIGHT}" aria-hidden="true">'
            f"{''.join(parts)}</svg>"
        )

    def _x(self, value: float) -> float:
        if self.right == self.left:
            return WIDTH / 2
        share = (value - self.left) / (self.right - self.left)
        return round(MARGIN + (WIDTH - 2 * MARGIN) * min(1.0, max(0.0, share)), 1)
