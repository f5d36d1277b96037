"""Learning curves: a line per configuration, the mean over its seeds, in a band of all of them."""

import csv
import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from app.report.metric import is_a_loss, stem
from app.report.summary import Report, Row
from app.report.tables import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_LINES = 8
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
        """Of the picture; the metric's name may hold anything."""
        return f"report-{re.sub(r'[^A-Za-z0-9_.-]', '-', self.name)}.png"


def panels(report: Report) -> list[Panel]:
    """The training loss, and the metric where it is measured while training: on validation data.

    Of many rows the best are drawn, and the baseline.
    """
    names = ["train_loss"]
    if report.metric is not None:
        names.append(f"val_{stem(report.metric.name)}")
    shown = [row for row in report.rows if row.is_baseline]
    shown += [row for row in report.rows if not row.is_baseline][: MOST_LINES - len(shown)]
    shown.sort(key=lambda row: row.number)
    curves = {row.number: _curves(row, names) for row in shown}
    found = []
    for name in names:
        lines = [
            line
            for row in shown
            if (line := averaged(report.label(row), curves[row.number][name])) is not None
        ]
        if lines:
            found.append(Panel(name=name, lines=lines, left_out=len(report.rows) - len(shown)))
    return found


def _curves(row: Row, names: Sequence[str]) -> dict[str, list[dict[float, float]]]:
    finished = [run for run in row.config.runs if run.state == "finished"]
    by_seed = {run.folder if run.seed is None else run.seed: run for run in finished}
    read = [read_curves(run.folder / "metrics.csv", names) for run in by_seed.values()]
    return {name: [one[name] for one in read if one[name]] for name in names}


def read_curves(path: Path, names: Iterable[str]) -> dict[str, dict[float, float]]:
    """Step and value of some columns of a `metrics.csv`; empty where there is none."""
    curves: dict[str, dict[float, float]] = {name: {} for name in names}
    if not path.exists():
        return curves
    with path.open(newline="") as file:
        lines = csv.reader(file)
        heads = next(lines, [])
        columns = [(curve, heads.index(name)) for name, curve in curves.items() if name in heads]
        if "step" not in heads:
            return curves
        step = heads.index("step")
        for line in lines:
            if len(line) != len(heads):
                continue  # the last one, of a run that was killed
            for curve, column in columns:
                if line[column]:
                    curve[float(line[step]) + 1] = float(line[column])  # counted from 0
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
    axes.set_title(plain(panel.name), loc="left", color=INK[theme], fontsize=11, parse_math=False)
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
    known = plain(label).encode("latin-1", "replace").decode("latin-1")
    return known if len(known) <= 80 else f"{known[:77]}..."


def _png(figure: "Figure") -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", facecolor=figure.get_facecolor())
    return file.getvalue()
