"""The table of a report's page: sorted, filtered and opened by page.js."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import add, sub

from app.record.states import State
from app.report.configurations import text
from app.report.markup import Markup, element, joined
from app.report.numbers import Estimate, duration, shortened
from app.report.reading import StoredRun
from app.report.summary import Report, Row
from app.report.tables import counted, problem_words

Cell = tuple[str, str | None, str | None, Markup]
"""Name, key and class of the column's head, and what is below it."""
WIDTH, HEIGHT, MARGIN = 110, 18, 6
"""Of a drawn interval, in pixels."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The values at the left and right end of every cell, and the baseline's mean between them."""

    left: float = 0.0
    right: float = 1.0
    baseline: float | None = None

    @classmethod
    def of(cls, report: Report) -> "Scale":
        """So wide that the intervals fit, but at most three times the range of the means."""
        known = [row.mean for row in report.rows if row.mean and math.isfinite(row.mean.mean)]
        if not known:
            return cls()
        means, halves = [one.mean for one in known], [one.half_width or 0.0 for one in known]
        low, high = min(means), max(means)
        reach = high - low or max(halves) or 1.0
        bases = [row.mean.mean for row in report.rows if row.is_baseline and row.mean in known]
        return cls(
            left=max(min(map(sub, means, halves)), low - reach),
            right=min(max(map(add, means, halves)), high + reach),
            baseline=bases[0] if bases else None,
        )

    def drawn(self, one: Estimate | None) -> Markup:
        """An SVG of the interval, cut where the cell ends; empty where there is no number."""
        if one is None or not math.isfinite(one.mean):
            return Markup()
        x, middle = self._x(one.mean), HEIGHT / 2
        parts = [element("line", class_="axis", x1=0, x2=WIDTH, y1=middle, y2=middle)]
        if self.baseline is not None:
            base = self._x(self.baseline)
            parts.append(element("line", class_="base", x1=base, x2=base, y1=1, y2=HEIGHT - 1))
        if one.low is not None and one.high is not None:
            x1, x2 = self._x(one.low), self._x(one.high)
            parts.append(element("line", class_="span", x1=x1, x2=x2, y1=middle, y2=middle))
        parts.append(element("circle", cx=x, cy=middle, r=4))
        return element(
            "svg", *parts, class_="range", width=WIDTH, height=HEIGHT, aria_hidden="true"
        )

    def _x(self, value: float) -> float:
        if self.right == self.left:
            return WIDTH / 2
        share = (value - self.left) / (self.right - self.left)
        return round(MARGIN + (WIDTH - 2 * MARGIN) * min(1.0, max(0.0, share)), 1)


def rows_table(report: Report) -> Markup:
    """The table of configurations, each with its keys and runs to open; empty where none is."""
    if not report.rows:
        return Markup()
    scale = Scale.of(report)
    rows = [[*_cells(report, row, scale)] for row in report.rows]
    best_first = "ascending" if report.metric and report.metric.lower_is_better else "descending"
    heads, bodies = [], []
    for name, key, css, _ in rows[0]:
        order = best_first if key == "mean" else "none"
        button = element("button", name, type="button")
        head = element("th", button, scope="col", aria_sort=order, data_key=key, class_=css)
        heads.append(head if key is not None else element("th", scope="col", class_=css))
    for row, cells in zip(report.rows, rows, strict=True):
        visible = element("tr", *(cell for *_, cell in cells), class_="row")
        hidden = element("tr", _detail(report, row, width=len(cells)), hidden="")
        bodies.append(element("tbody", visible, hidden))
    dotted = " The dotted line is the baseline's mean." if scale.baseline is not None else ""
    return Markup(f"""<h2>Configurations</h2>
<div class="tools"><input id="filter" type="search" placeholder="Filter, e.g. ema 0.98"
aria-label="Filter the configurations">
<span id="shown" class="soft" aria-live="polite"></span></div>
<div class="card scroll" tabindex="0" role="region" aria-label="Configurations">
<table id="rows"><thead><tr>{joined(*heads)}</tr></thead>
{joined(*bodies)}
</table></div>
<p class="soft">n: seeds. Mean over seeds and its 95 % interval by Student's t, each row for itself:
among many rows some intervals miss by chance.{dotted} Open a row for its keys and runs.</p>""")


def _cells(report: Report, row: Row, scale: Scale) -> Iterator[Cell]:
    mean, decimals = row.mean, report.decimals
    words = {"aria_label": f"Row {row.number}: keys and runs", "aria_expanded": "false"}
    opener = element("button", row.number, type="button", class_="more", **words)
    yield "#", "number", "plain", element("td", opener, data_v=row.number)
    for name, value in zip(report.columns, row.values, strict=True):
        cell = element("td", shortened(value), data_v=value, data_head=name, title=value)
        yield name, name, None, cell
    n = mean.n if mean else 0
    yield _number("n", "n", n, n, "small")
    yield _number(report.metric_name, "mean", mean and mean.mean, decimals.mean(mean), "mean")
    yield _number("95 % interval", "low", mean and mean.low, decimals.interval(mean), "interval")
    yield "", None, "plain", element("td", scale.drawn(mean), class_="drawn")
    if report.baseline is not None:
        yield "difference", "difference", None, _difference(report, row)
    if report.tested_name is None:
        yield _number("best", "best", row.best, decimals.of(row.best), "small")
    else:  # a column more would not fit
        tested = row.tested and row.tested.mean
        value = report.tested_decimals.mean(row.tested)
        yield _number(report.tested_name, "tested", tested, value, "small")
    yield _number("time a run", "seconds", row.seconds, duration(row.seconds), "small")
    states = (_state(f"{number} {state}", state) for state, number in row.states.most_common())
    shown = Markup(" ".join(states))
    yield "runs", "runs", None, element("td", shown, class_="small", data_v=len(row.config.runs))


def _number(name: str, key: str, value: object, shown: object, css: str) -> Cell:
    head = "" if css == "interval" else name
    cell = element("td", shown, class_=f"number {css}", data_v=_known(value), data_head=head)
    return name, key, "number", cell


def _known(value: object) -> object:
    """A number to sort by; empty where there is none, or NaN."""
    return "" if value is None or value != value else value


def _difference(report: Report, row: Row) -> Markup:
    if row.is_baseline:
        tag = element("span", "baseline", class_="tag base")
        return element("td", tag, class_="versus", data_v=0)
    if row.versus is None:
        return element("td", row.why_no_interval(), class_="versus", data_v="")
    verdict, why = report.verdict(row), f"{row.why_no_interval()}, no interval"
    parts: list[object] = [element("b", report.signed.mean(row.versus))]
    if verdict:
        why = f"{verdict}, {counted(row.common_seeds or 0, 'seed')}"
        interval = element("span", report.signed.interval(row.versus), class_="whole")
        parts += [" ", interval, " "]
    parts.append(element("span", why, class_=f"tag {verdict or 'unclear'}"))
    known = _known(row.versus.mean)
    return element("td", *parts, class_="versus", data_v=known, data_head="difference")


def _detail(report: Report, row: Row, *, width: int) -> Markup:
    words = "The configuration of the most runs: the others' keys are compared with its."
    keys = element("p", words, class_="soft")
    if row.config_diff:
        title = element("h3", f"Keys that differ from {report.common}")
        lines = []
        for *here, there in row.config_diff:
            cells = [element("td", element("code", one)) for one in here]
            lines.append([*cells, element("td", element("code", there), class_="soft")])
        table = _table(("key", "here", "there"), lines)
        keys = element("div", title, element("div", table, class_="inner"))
    name = report.metric.name if report.metric else ""
    lines = []
    for run in sorted(row.config.runs, key=lambda run: (run.seed is None, run.seed or 0)):
        value = run.metrics.get(name) if run.state == State.finished else None
        number, folder = report.decimals.of(value), element("code", run.folder)
        shown = (run.seed, badge(run), number, duration(run.seconds), folder, tuned(run))
        lines.append([element("td", cell) for cell in shown])
    runs = _table(("seed", "state", name, "time", "folder", ""), lines)
    runs = element("div", element("h3", "Runs"), runs, class_="inner")
    return element("td", element("div", keys, runs), class_="detail", colspan=width)


def _table(heads: Iterable[str], lines: Iterable[Iterable[Markup]]) -> Markup:
    head = element("thead", element("tr", *(element("th", head) for head in heads)))
    return element("table", head, element("tbody", *(element("tr", *line) for line in lines)))


def tuned(run: StoredRun) -> str:
    """What its finders found, as typed."""
    return " ".join(f"{key}={text(item)}" for key, item in run.tuned.items())


def badge(run: StoredRun) -> Markup:
    """The state of a run, coloured, with what else is known of its end where it did not finish."""
    return _state(run.state if run.state == State.finished else problem_words(run), run.state)


def _state(words: str, state: State) -> Markup:
    return element("span", words, class_=f"state {state}")
