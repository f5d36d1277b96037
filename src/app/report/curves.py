"""Learning curves: a line per configuration, the mean over its seeds, in a band of all of them."""

import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from app.pictures.look import COLORS, STYLE, make_logarithmic
from app.process.files import read_steps, skipped
from app.record.names import counterpart, stage_of
from app.report.metric import is_a_loss
from app.report.numbers import LARGEST
from app.report.reading import tried
from app.report.summary import Report
from app.report.tables import shown
from app.sweep.progress import plain

MOST_LINES = 8
MOST_CHARACTERS = 80
LEAST_RATIO = 4.0
"""Of the highest to the lowest loss, from which on the axis is logarithmic."""
THEMES = {"light": ("#1c2024", "#d5d9de", "#ffffff"), "dark": ("#e6e8eb", "#3a4047", "#16191d")}
"""Ink, muted ink and ground."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """A configuration's curve.

    Attributes:
        label: with the number of seeds.
        low, high: of the seeds at each step.
        n: how many seeds.
    """

    label: str
    steps: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]
    n: int


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One picture.

    Attributes:
        left_out: how many rows have no line, because there would be too many.
    """

    name: str
    lines: list[Line]
    left_out: int

    @property
    def file_name(self) -> str:
        """Of the picture; the metric's name may hold anything, and much of it."""
        return f"report-{re.sub(r'[^A-Za-z0-9_.-]', '-', self.name[:MOST_CHARACTERS])}.png"

    @property
    def caption(self) -> str:
        """What the lines and the bands are."""
        words = f"{self.name}, the mean over seeds; the band is from the lowest to the highest seed"
        num = len(self.lines)
        best = f" The best {num} of {num + self.left_out} rows." if self.left_out else ""
        return f"{words}.{best}"


def panels(report: Report) -> list[Panel]:
    """The training loss, and the metric where it is measured while training: on validation data.

    Of many rows the best are drawn, and the baseline. What cannot be read is noted in the report.
    """
    lines: dict[str, list[Line]] = {"train_loss": []}
    if report.metric is not None:
        name, others = report.metric.name, report.metric.others
        of_training = stage_of(name) == "test" and counterpart(name, "val", others)
        lines[of_training or name] = []
    drawn = sorted(report.rows, key=lambda row: not row.is_baseline)[:MOST_LINES]
    for row in sorted(drawn, key=lambda row: row.number):
        paths = [runs[-1].folder / "metrics.csv" for runs in row.config.finished.values()]
        read = [read_curves(path, lines, report.notes) for path in paths]
        for name, found in lines.items():
            line = averaged(report.label(row), [one[name] for one in read if one[name]])
            found += [line] if line is not None else []
    left_out = len(report.rows) - len(drawn)
    return [
        Panel(name=name, lines=found, left_out=left_out) for name, found in lines.items() if found
    ]


def read_curves(path: Path, names: Iterable[str], told: list[str]) -> dict[str, dict[float, float]]:
    """Step and value of some columns of a `metrics.csv`; empty where there is none.

    Args:
        told: gets a line where it, or a part of it, cannot be read.
    """
    curves: dict[str, dict[float, float]] = {name: {} for name in names}
    torn: list[int] = []

    def read() -> None:
        for number, line in read_steps(path):
            if line is None:
                torn.append(number)
                continue
            for name in curves.keys() & line.keys():
                value = float(line[name])
                # counted from 0
                curves[name][float(line["step"]) + 1] = value if abs(value) < LARGEST else math.nan

    tried(told, read)
    if torn:
        told.append(plain(f"{path}: {skipped(torn)}"))
    return curves


def averaged(label: str, seeds: Sequence[dict[float, float]]) -> Line | None:
    """The mean of several seeds' curves, at the steps that all of them have; None where none is."""
    steps = sorted(set.intersection(*map(set, seeds))) if seeds else []
    columns = [[curve[step] for curve in seeds] for step in steps]
    if not steps:
        return None
    mean, low, high = [*map(fmean, columns)], [*map(min, columns)], [*map(max, columns)]
    label = f"{label}  (n = {len(seeds)})"
    return Line(label=label, steps=steps, mean=mean, low=low, high=high, n=len(seeds))


def draw(panel: Panel, *, theme: str, has_legend: bool) -> bytes:
    """A PNG of a panel.

    Args:
        theme: light or dark.
        has_legend: whether the labels are in the picture, below the axes.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    ink, muted, ground = THEMES[theme]
    look: dict[Any, str] = dict.fromkeys(
        ("axes.labelcolor", "text.color", "xtick.color", "ytick.color"), ink
    )
    look |= dict.fromkeys(("axes.edgecolor", "grid.color"), muted)
    look |= dict.fromkeys(("axes.facecolor", "figure.facecolor"), ground)
    legend_in = 0.1 + 0.175 * len(panel.lines) if has_legend else 0.0
    width, height = 5.5, 3.3 + legend_in
    # inches, by hand: a layout engine draws everything twice
    bottom = (legend_in + 0.5) / height
    place = (0.6 / width, bottom, 1 - 0.75 / width, 1 - 0.4 / height - bottom)
    with rc_context(look, fname=STYLE):
        figure, file = Figure(figsize=(width, height)), io.BytesIO()
        axes = figure.add_axes(place, title=_short(panel.name), xlabel="optimizer step")
        for line, color in zip(panel.lines, COLORS, strict=False):
            few = "o" if len(line.steps) < 12 else ""
            axes.plot(line.steps, line.mean, color=color, marker=few, label=_short(line.label))
            if line.n > 1:
                axes.fill_between(line.steps, line.low, line.high, color=color, alpha=0.16, lw=0)
        axes.locator_params(axis="x", integer=True, nbins=7)
        if _is_steep(panel):
            make_logarithmic(axes.yaxis, (y for line in panel.lines for y in line.low))
        if has_legend:
            figure.legend(handles=axes.lines, loc="lower left", bbox_to_anchor=(0.45 / width, 0.02))
        figure.savefig(file, format="png")
    return file.getvalue()


def _is_steep(panel: Panel) -> bool:
    """Whether the end of a loss needs a logarithmic axis to have as much room as its beginning."""
    values = [value for line in panel.lines for value in (*line.low, *line.high)]
    is_known = is_a_loss(panel.name) and all(map(math.isfinite, values)) and min(values) > 0
    return is_known and max(values) >= LEAST_RATIO * min(values)


def _short(label: str) -> str:
    """In characters that matplotlib's own font has."""
    return shown(label, most=MOST_CHARACTERS).encode("latin-1", "replace").decode("latin-1")
