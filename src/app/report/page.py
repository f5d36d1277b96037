"""A report as one HTML file that needs no network: its styles, script and pictures are in it."""

import hashlib
from base64 import b64encode
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template

from app.pictures.look import COLORS
from app.process.files import read_bytes
from app.report.curves import Panel
from app.report.markup import Markup, element, joined
from app.report.page_table import badge, rows_table, tuned
from app.report.reading import StoredRun, tried
from app.report.rerun import command
from app.report.summary import Report
from app.report.tables import answer, error_line, headlines

MOST_PLOTS = 24
FINDERS = ("batch_size", "lr_find")


def page(report: Report, pictures: Sequence[tuple[Panel, Mapping[str, bytes]]]) -> str:
    """The whole file. Every text that is not ours is escaped, and no other script can run.

    What cannot be read of finders' plots is noted in the report.

    Args:
        pictures: learning curves, each by theme.
    """
    plots = finder_plots(report)
    style, script, frame = (
        Path(__file__).with_name(f"page.{kind}").read_text(encoding="utf-8")
        for kind in ("css", "js", "html")
    )
    parts = [
        rows_table(report),
        _section("Learning curves", _curves(pictures)),
        _section("Runs without a result", *map(_problem, report.problems)),
        _section("Under way", _under_way(report)),
        _section("Finders", _finders(plots)),
    ]
    return Template(frame).substitute(
        title=joined(report.top), style=style, style_digest=_digest(style), script=script,
        script_digest=_digest(script), header=_header(report), main="\n".join(filter(None, parts)),
    )  # fmt: skip


def _section(title: str, *content: Markup) -> Markup:
    return joined(element("h2", title), *content) if any(content) else Markup()


def _digest(source: str) -> str:
    return f"sha256-{b64encode(hashlib.sha256(source.encode()).digest()).decode()}"


def _header(report: Report) -> Markup:
    count = Counter(run.state for run in report.runs)
    chips = [
        element("li", element("b", len(report.runs)), " runs"),
        element("li", element("b", len(report.rows)), " configurations"),
        *(element("li", element("b", n), f" {s}", class_=s) for s, n in count.most_common()),
    ]
    return element(
        "header",
        element("h1", report.top),
        element("ul", *chips, class_="chips"),
        *(element("p", line, class_="answer") for line in answer(report)),
        *(element("p", line, class_="soft") for line in [*headlines(report)[1:], *report.notes]),
    )


def _curves(pictures: Sequence[tuple[Panel, Mapping[str, bytes]]]) -> Markup:
    figures = []
    for panel, themes in pictures:
        source = element(
            "source", media="(prefers-color-scheme: dark)", srcset=_data_uri(themes["dark"])
        )
        image = element(
            "img", src=_data_uri(themes["light"]), alt=f"{panel.name} over optimizer steps"
        )
        legend = []
        for color, line in zip(COLORS, panel.lines, strict=False):
            mark = element("rect", y=3, width=18, height=4, rx=2, fill=color)
            mark = element("svg", mark, width=18, height=10, aria_hidden="true")
            legend.append(element("li", mark, line.label))
        picture = element("picture", source, image)
        figures.append(_figure(picture, element("ul", *legend, class_="legend"), panel.caption))
    return _grid(figures)


def _figure(*content: object) -> Markup:
    """A picture with what belongs to it; the last is its caption."""
    return element("figure", *content[:-1], element("figcaption", content[-1]), class_="card")


def _grid(figures: Sequence[Markup]) -> Markup:
    return element("div", *figures, class_="curves") if figures else Markup()


def _problem(run: StoredRun) -> Markup:
    parts = [_head(run)]
    if run.error:
        line = error_line(run.error)
        parts.append(element("p", line, class_="error"))
        whole = "\n".join(filter(None, [run.error, str(run.result.get("where") or "")]))
        if whole.strip() != line:
            parts.append(
                element("details", element("summary", "Whole error"), element("pre", whole))
            )
    again = command(run)
    if again is not None:
        button = element("button", "Copy", type="button", class_="copy")
        parts.append(element("div", element("pre", again), button, class_="command"))
    return element("article", *parts, class_="card problem")


def _head(run: StoredRun) -> Markup:
    return element("div", badge(run), element("code", run.folder), class_="head")


def _under_way(report: Report) -> Markup:
    lines = []
    for run in report.runs:
        if run.state.is_under_way:
            lines += [_head(run), *([element("p", run.error)] if run.error else [])]
    return element("article", *lines, class_="card problem") if lines else Markup()


def finder_plots(report: Report) -> dict[bytes, list[StoredRun]]:
    """Pictures of what finders saw, each with the runs that have it.

    What cannot be read is noted in the report.
    """
    plots: dict[bytes, list[StoredRun]] = {}
    for run in report.runs:
        for name in FINDERS:
            png = tried(report.notes, read_bytes, run.folder / f"{name}.png")
            if png:
                plots.setdefault(png, []).append(run)
    return plots


def _finders(plots: Mapping[bytes, Sequence[StoredRun]]) -> Markup:
    figures = []
    for png, runs in list(plots.items())[:MOST_PLOTS]:
        caption = ", ".join(str(run.folder) for run in runs[:4])
        caption += f" and {len(runs) - 4} more" if len(runs) > 4 else ""
        caption += f": {tuned(runs[0])}" if runs[0].tuned else ""
        what = f"What the finder of {runs[0].folder} saw"
        image = element("img", src=_data_uri(png), alt=what, loading="lazy")
        figures.append(_figure(image, caption))
    left = len(plots) - len(figures)
    note = element("p", f"{left} more are in the folders of their runs.", class_="soft")
    return joined(_grid(figures), note if left else "")


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{b64encode(png).decode()}"
