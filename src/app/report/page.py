"""A report as one HTML file that needs no network: its styles, script and pictures are in it."""

import hashlib
from base64 import b64encode
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from app.process.files import read_bytes
from app.report.configurations import text
from app.report.page_table import badge, rows_table
from app.report.reading import Run, tried
from app.report.rerun import command
from app.report.summary import Report
from app.report.tables import answer, error_line, headlines

MOST_PLOTS = 24
FINDERS = ("batch_size", "lr_find")


@dataclass(frozen=True)
class Picture:
    """A learning curve for both grounds.

    Attributes:
        legend: color and words of each line.
        caption: what the lines and the bands are.
    """

    name: str
    light: bytes
    dark: bytes
    legend: list[tuple[str, str]]
    caption: str


def page(report: Report, pictures: Sequence[Picture], plots: Mapping[bytes, Sequence[Run]]) -> str:
    """The whole file. Every text that is not ours is escaped, and no other script can run.

    Args:
        pictures: learning curves.
        plots: of `finder_plots`.
    """
    style, script = (_beside(name) for name in ("page.css", "page.js"))
    body = "\n".join(
        [_header(report), "<main>", rows_table(report), _curves(pictures), _problems(report),
         _under_way(report), _finders(plots), "</main>"]
    )  # fmt: skip
    allowed = (
        "default-src 'none'; img-src data:; "
        f"style-src '{_digest(style)}'; script-src '{_digest(script)}'"
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{allowed}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Report of {escape(str(report.top))}</title>
<style>{style}</style>
</head>
<body>
{body}
<script>{script}</script>
</body>
</html>
"""


def _beside(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _digest(source: str) -> str:
    return f"sha256-{b64encode(hashlib.sha256(source.encode()).digest()).decode()}"


def _header(report: Report) -> str:
    count = Counter(run.state for run in report.runs)
    chips = [f"<li><b>{len(report.runs)}</b> runs</li>",
             f"<li><b>{len(report.rows)}</b> configurations</li>"]  # fmt: skip
    chips += [
        f'<li class="{escape(state)}"><b>{number}</b> {escape(state)}</li>'
        for state, number in count.most_common()
    ]
    lines = "".join(f'<p class="answer">{escape(line)}</p>' for line in answer(report))
    lines += "".join(
        f'<p class="soft">{escape(line)}</p>' for line in [*headlines(report)[1:], *report.notes]
    )
    return (
        f"<header><h1>{escape(str(report.top))}</h1>"
        f'<ul class="chips">{"".join(chips)}</ul>{lines}</header>'
    )


def _curves(pictures: Sequence[Picture]) -> str:
    if not pictures:
        return ""
    figures = "\n".join(
        '<figure class="card"><picture><source media="(prefers-color-scheme: dark)" '
        f'srcset="{_data_uri(one.dark)}"><img src="{_data_uri(one.light)}" '
        f'alt="{escape(one.name)} over optimizer steps"></picture>{_legend(one)}'
        f"<figcaption>{escape(one.caption)}</figcaption></figure>"
        for one in pictures
    )
    return f'<h2>Learning curves</h2><div class="curves">{figures}</div>'


def _legend(picture: Picture) -> str:
    items = "".join(
        '<li><svg width="18" height="10" aria-hidden="true">'
        f'<rect y="3" width="18" height="4" rx="2" fill="{color}"/></svg>{escape(words)}</li>'
        for color, words in picture.legend
    )
    return f'<ul class="legend">{items}</ul>'


def _problems(report: Report) -> str:
    if not report.problems:
        return ""
    return "<h2>Runs without a result</h2>" + "\n".join(map(_problem, report.problems))


def _problem(run: Run) -> str:
    parts = [_head(run)]
    if run.error:
        line = error_line(run.error)
        parts.append(f'<p class="error">{escape(line)}</p>')
        whole = "\n".join(filter(None, [run.error, str(run.result.get("where") or "")]))
        if whole.strip() != line:
            parts.append(
                f"<details><summary>Whole error</summary><pre>{escape(whole)}</pre></details>"
            )
    again = command(run)
    if again is not None:
        parts.append(
            f'<div class="command"><pre>{escape(again)}</pre>'
            '<button type="button" class="copy">Copy</button></div>'
        )
    return f'<article class="card problem">{"".join(parts)}</article>'


def _head(run: Run) -> str:
    return f'<div class="head">{badge(run)}<code>{escape(str(run.folder))}</code></div>'


def _under_way(report: Report) -> str:
    runs = [run for run in report.runs if run.state.is_under_way]
    if not runs:
        return ""
    lines = [_head(run) + (f"<p>{escape(run.error)}</p>" if run.error else "") for run in runs]
    return f'<h2>Under way</h2><article class="card problem">{"".join(lines)}</article>'


def finder_plots(runs: Sequence[Run], told: list[str]) -> dict[bytes, list[Run]]:
    """Pictures of what finders saw, each with the runs that have it.

    Args:
        told: gets a line for each file that cannot be read.
    """
    plots: dict[bytes, list[Run]] = {}
    for run in runs:
        for name in FINDERS:
            png = tried(told, read_bytes, run.folder / f"{name}.png")
            if png:
                plots.setdefault(png, []).append(run)
    return plots


def _finders(plots: Mapping[bytes, Sequence[Run]]) -> str:
    if not plots:
        return ""
    figures = []
    for png, runs in list(plots.items())[:MOST_PLOTS]:
        folders = ", ".join(str(run.folder) for run in runs[:4])
        more = f" and {len(runs) - 4} more" if len(runs) > 4 else ""
        found = " ".join(f"{key}={text(item)}" for key, item in runs[0].tuned.items())
        caption = escape(f"{folders}{more}" + (f": {found}" if found else ""))
        figures.append(
            f'<figure class="card"><img src="{_data_uri(png)}" alt="What the finder of '
            f'{escape(str(runs[0].folder))} saw" loading="lazy">'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    left = len(plots) - len(figures)
    note = f'<p class="soft">{left} more are in the folders of their runs.</p>' if left else ""
    return f'<h2>Finders</h2><div class="curves">{"".join(figures)}</div>{note}'


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{b64encode(png).decode()}"
