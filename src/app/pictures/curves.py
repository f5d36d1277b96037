"""Learning curves of one run: curves.png."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from app.monitored import mode_of
from app.pictures.look import COLORS, MUTED, make_logarithmic, styled
from app.record.loggers import read_metrics
from app.record.names import RAW, stage_of, stem

SPLITS = dict(zip(("train", "val", "test"), COLORS, strict=False))
ON = {"train": "train", "validation": "val", "test": "test"}
"""As result.json says it."""

MARKS = {"best checkpoint": ("--", "#3a4047"), "average begins": ("-.", COLORS[3]),
         "cut, and continued": (":", COLORS[4])}  # fmt: skip

LOST = "x"
"""Marks what is not finite."""

MOST_PANELS = 30

Curve = list[tuple[float, float]]


def draw_curves(metrics_csv: Path, png: Path, result: Mapping[str, Any]) -> None:
    """Draw every metric of a run over its optimizer steps; nothing where none was logged.

    A colour for each split, in all panels, which show the same steps; what was tested is a point,
    at the checkpoint tested, and what is not finite a cross below.

    Args:
        result: what result.json says of the run.
    """
    curves = _curves(metrics_csv)
    of: Mapping[str, Any] = result.get("metrics_of", {})
    tested = {name: where for name, where in of.items() if where["on"] == "test"}
    marks = _marks(result)
    panels: dict[str, list[str]] = {}
    # train_loss and val/loss share the panel "loss"
    for name in sorted({*curves, *tested} - {"averaged_models"}):
        panels.setdefault(_panel(name), []).append(name)
    if not panels:
        return
    splits = {name: stage_of(name) or ON.get(of.get(name, {}).get("on", "")) for name in curves}
    splits |= dict.fromkeys(tested, "test")
    titles = sorted(panels, key=lambda title: _rank(title, [splits[n] for n in panels[title]]))
    with styled():
        figure, places = _figure(min(len(titles), MOST_PANELS))
        steps = [step for curve in curves.values() for step, _ in curve]
        steps += [step for found in marks.values() for step in found]
        steps += [where["step"] for where in tested.values()]
        beside = 0.02 * (max(steps) - min(steps)) or 0.5
        for title, axes in zip(titles, places, strict=False):
            axes.set_xlim(min(steps) - beside, max(steps) + beside)
            for name in panels[title]:
                color = SPLITS.get(splits[name] or "", MUTED)
                if name in tested:
                    at = [(tested[name]["step"], result["metrics"][name])]
                    axes.plot(*zip(*at, strict=True), color=color, marker="D", ms=6, lw=0, zorder=4)
                else:
                    _draw(axes, name, curves[name], color)
            named = panels[title][0]
            axes.set_title(title if len(panels[title]) > 1 else named)
            if mode_of(title) == "min" or mode_of(named) == "min":
                drawn = [line for line in axes.lines if line.get_marker() != LOST]
                values = [value for line in drawn for value in line.get_ydata()]
                make_logarithmic(axes.yaxis, values)
            for mark, found in marks.items():
                style, color = MARKS[mark]
                for step in found:
                    axes.axvline(step, ls=style, color=color, lw=1.1, zorder=1)
        is_lost = any(math.isnan(value) for curve in curves.values() for _, value in curve)
        left_out = len(titles) - MOST_PANELS
        _legend(figure, {*splits.values()}, marks, is_lost=is_lost, left_out=left_out)
        figure.savefig(png, pil_kwargs={"compress_level": 1})


def _curves(metrics_csv: Path) -> dict[str, Curve]:
    """Of each metric the steps, counted from 1, and values; no number where it is not finite."""
    curves: dict[str, Curve] = {}
    for row in read_metrics(metrics_csv):
        for name in row.keys() - {"step", "logged_step", "epoch"}:
            value = row[name] if math.isfinite(row[name]) else math.nan
            curves.setdefault(name, []).append((row["step"] + 1, value))
    return curves


def _marks(result: Mapping[str, Any]) -> dict[str, list[float]]:
    """The steps at which something has happened to the run."""
    found: dict[str, list[float]] = {mark: [] for mark in MARKS}
    of = result.get("metrics_of", {}).values()
    found["best checkpoint"] = list({w["step"] for w in of if w["checkpoint"] == "best"})[:1]
    if "averaged_after" in result:
        found["average begins"] = [result["averaged_after"]]
    found["cut, and continued"] = list(result.get("continued_after", []))
    return {mark: steps for mark, steps in found.items() if steps}


def _panel(name: str) -> str:
    """Of `train_loss_step`, which Lightning makes of `train_loss`, the same."""
    what = stem(name)
    return re.sub("_(step|epoch)$", "", what) if stage_of(name) else what


def _rank(title: str, splits: Sequence[str | None]) -> tuple[bool, bool, str]:
    """Losses come first, then what else is measured on data."""
    is_measured = any(splits)
    return not is_measured, mode_of(title) != "min", title


def _figure(num: int) -> tuple[Any, list[Any]]:
    """A figure with so many panels; inches, by hand: a layout engine draws everything twice."""
    from matplotlib.figure import Figure

    columns = min(3, num)
    lines = -(-num // columns)
    width, height = max(5.0, 4.4 * columns), 2.9 * lines + 0.35
    figure = Figure(figsize=(width, height), dpi=100)
    figure.subplots_adjust(
        left=0.6 / width,
        right=1 - 0.2 / width,
        bottom=0.5 / height,
        top=1 - 0.75 / height,
        wspace=0.22,
        hspace=0.45,
    )
    places = [figure.add_subplot(lines, columns, place + 1) for place in range(num)]
    for axes in places[-columns:]:
        axes.set_xlabel("optimizer step")
    for axes in places:
        axes.locator_params(axis="x", integer=True, nbins=7)
    return figure, places


def _draw(axes: Any, name: str, curve: Curve, color: str) -> None:
    """A line; of single steps a faint one, of raw weights beside an average a dashed one."""
    few = "o" if len(curve) < 12 else ""
    faint = 0.35 if name.endswith("_step") and stage_of(name) else 1.0
    style = "--" if name.startswith(RAW) else "-"
    axes.plot(*zip(*curve, strict=True), color=color, marker=few, alpha=faint, ls=style)
    lost = [step for step, value in curve if math.isnan(value)]
    if lost:
        floor = {"transform": axes.get_xaxis_transform(), "zorder": 4}
        axes.plot(lost, [0.03] * len(lost), color=color, marker=LOST, ms=4, lw=0, **floor)


def _legend(
    figure: Any,
    splits: set[str | None],
    marks: Mapping[str, list[float]],
    *,
    is_lost: bool,
    left_out: int,
) -> None:
    from matplotlib.lines import Line2D

    handles = []
    for split, color in SPLITS.items():
        if split in splits:
            look: Any = {"marker": "D", "lw": 0, "ms": 6} if split == "test" else {}
            handles.append(Line2D([], [], color=color, label=split, **look))
    handles += [Line2D([], [], ls=MARKS[m][0], color=MARKS[m][1], lw=1.1, label=m) for m in marks]
    if is_lost:
        handles.append(Line2D([], [], marker=LOST, ms=4, lw=0, color=MUTED, label="not finite"))
    if left_out > 0:
        handles.append(Line2D([], [], lw=0, label=f"and {left_out} more in metrics.csv"))
    if handles:
        figure.legend(handles=handles, loc="upper left", ncols=len(handles))
