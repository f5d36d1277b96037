"""Learning curves: a line per configuration, the mean over its seeds, in a band of all of them."""

import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from app.process.files import read_steps, skipped
from app.record.states import State
from app.report.metric import is_a_loss, stem
from app.report.reading import tried
from app.report.statistics import LARGEST
from app.report.summary import Report, Row
from app.report.tables import shown
from app.sweep.progress import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_LINES = 8
MOST_CHARACTERS = 80
LEAST_RATIO = 4.0
"""Of the highest to the lowest loss, from which on the axis is logarithmic."""
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#7f7f7f")
"""Of Okabe and Ito, told apart by everyone, and on light and dark ground."""
INK = {"light": "#1c2024", "dark": "#e6e8eb"}
MUTED = {"light": "#d5d9de", "dark": "#3a4047"}
GROUND = {"light": "#ffffff", "dark": "#16191d"}


@dataclass(frozen=True, kw_only=True)
class Line:
    """A configuration's curve.

    Attributes:
        low, high: of the seeds at each step.
        n: how many seeds.
    """

    label: str
    steps: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]
    n: int

    @property
    def words(self) -> str:
        """The label and the number of seeds."""
        return f"{self.label}  (n = {self.n})"


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


def panels(report: Report, told: list[str]) -> list[Panel]:
    """The training loss, and the metric where it is measured while training: on validation data.

    Of many rows the best are drawn, and the baseline.

    Args:
        told: gets a line for each file that cannot be read.
    """
    names = ["train_loss"]
    if report.metric is not None:
        names.append(f"val_{stem(report.metric.name)}")
    drawn = [row for row in report.rows if row.is_baseline]
    drawn += [row for row in report.rows if not row.is_baseline][: MOST_LINES - len(drawn)]
    drawn.sort(key=lambda row: row.number)
    curves = {row.number: _curves(row, names, told) for row in drawn}
    found = []
    for name in names:
        lines = [
            line
            for row in drawn
            if (line := averaged(report.label(row), curves[row.number][name])) is not None
        ]
        if lines:
            found.append(Panel(name=name, lines=lines, left_out=len(report.rows) - len(drawn)))
    return found


def _curves(row: Row, names: Sequence[str], told: list[str]) -> dict[str, list[dict[float, float]]]:
    finished = [run for run in row.config.runs if run.state == State.finished]
    by_seed = {run.folder if run.seed is None else run.seed: run for run in finished}
    read = [read_curves(run.folder / "metrics.csv", names, told) for run in by_seed.values()]
    return {name: [one[name] for one in read if one[name]] for name in names}


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
    if not seeds:
        return None
    steps = sorted(set.intersection(*(set(curve) for curve in seeds)))
    columns = [[curve[step] for curve in seeds] for step in steps]
    if not steps:
        return None
    return Line(
        label=label,
        steps=steps,
        mean=[sum(column) / len(column) for column in columns],
        low=[min(column) for column in columns],
        high=[max(column) for column in columns],
        n=len(seeds),
    )


def draw(panel: Panel, *, theme: str, has_legend: bool) -> bytes:
    """A PNG of a panel.

    Args:
        theme: light or dark.
        has_legend: whether the labels are in the picture, below the axes.
    """
    from matplotlib.figure import Figure

    legend_in = 0.1 + 0.175 * len(panel.lines) if has_legend else 0.0
    width, height = 5.5, 3.3 + legend_in
    figure = Figure(figsize=(width, height), dpi=144, facecolor=GROUND[theme])
    # inches, by hand: a layout engine draws everything twice
    figure.subplots_adjust(
        left=0.6 / width,
        right=1 - 0.15 / width,
        top=1 - 0.4 / height,
        bottom=(legend_in + 0.5) / height,
    )
    axes = figure.subplots()
    axes.set_facecolor(GROUND[theme])
    for line, color in zip(panel.lines, COLORS, strict=False):
        few = "o" if len(line.steps) < 12 else ""
        axes.plot(line.steps, line.mean, color=color, marker=few, markersize=3.5, linewidth=1.8)
        if line.n > 1:
            axes.fill_between(line.steps, line.low, line.high, color=color, alpha=0.16, linewidth=0)
    _spread(axes, panel)
    _style(axes, theme)
    axes.set_xlabel("optimizer step", color=INK[theme])
    axes.set_title(_short(panel.name), loc="left", color=INK[theme], fontsize=11, parse_math=False)
    if has_legend:
        legend = figure.legend(
            axes.lines,
            [_short(line.words) for line in panel.lines],
            loc="lower left",
            bbox_to_anchor=(0.45 / width, 0.02),
            frameon=False,
            labelcolor=INK[theme],
            fontsize=8.5,
            labelspacing=0.35,
            borderpad=0,
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
    return _png(figure)


def _style(axes: "Axes", theme: str) -> None:
    axes.grid(color=MUTED[theme], linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK[theme], labelsize=9, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(MUTED[theme])
    axes.margins(x=0.02)
    axes.locator_params(axis="x", integer=True, nbins=7)


def _spread(axes: "Axes", panel: Panel) -> None:
    """Give the end of a loss as much room as its beginning."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

    values = [value for line in panel.lines for value in (*line.low, *line.high)]
    if not is_a_loss(panel.name) or not all(map(math.isfinite, values)):
        return
    if min(values) <= 0 or max(values) < LEAST_RATIO * min(values):
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))


def _short(label: str) -> str:
    """In characters that matplotlib's own font has."""
    return shown(label, most=MOST_CHARACTERS).encode("latin-1", "replace").decode("latin-1")


def _png(figure: "Figure") -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", facecolor=figure.get_facecolor())
    return file.getvalue()
