"""The table of a report's page: sorted, filtered and opened by page.js."""

from html import escape

from app.record.states import State
from app.report.configurations import text
from app.report.numbers import Digits, duration, shortened
from app.report.ranges import Scale
from app.report.reading import Run
from app.report.summary import Report, Row
from app.report.tables import digits_of, problem_words


def rows_table(report: Report) -> str:
    """The table of configurations, each with its keys and runs to open; empty where none is."""
    if not report.rows:
        return ""
    metric = report.metric.name if report.metric else "metric"
    heads = [("#", "number", "plain"), *((name, name, "") for name in report.columns)]
    heads += [("n", "n", "number"), (metric, "mean", "number"), ("95 % interval", "low", "number")]
    heads += [("", "", "plain")]
    if report.baseline is not None:
        heads += [("difference", "difference", "")]
    heads += [("best", "best", "number"), ("time a run", "seconds", "number"), ("runs", "runs", "")]
    is_ascending = report.metric is not None and report.metric.lower_is_better
    sorted_by = {"mean": "ascending" if is_ascending else "descending"}
    head = "".join(
        _head(name, key, kind, order=sorted_by.get(key, "none")) for name, key, kind in heads
    )
    digits, scale = digits_of(report), Scale.of(report)
    dotted = " The dotted line is the baseline's mean." if scale.baseline is not None else ""
    rows = "\n".join(_row(report, row, digits, scale, width=len(heads)) for row in report.rows)
    return f"""<h2>Configurations</h2>
<div class="tools"><input id="filter" type="search" placeholder="Filter, e.g. ema 0.98"
aria-label="Filter the configurations">
<span id="shown" class="soft" aria-live="polite"></span></div>
<div class="card scroll" tabindex="0" role="region" aria-label="Configurations">
<table id="rows"><thead><tr>{head}</tr></thead>
{rows}
</table></div>
<p class="soft">n: seeds. Mean over seeds and its 95 % interval by Student's t, each row for itself:
among many rows some intervals miss by chance.{dotted} Open a row for its keys and runs.</p>"""


def _head(name: str, key: str, kind: str, *, order: str) -> str:
    if not name:
        return '<th scope="col" class="plain"></th>'
    css = f' class="{kind}"' if kind in ("number", "plain") else ""
    return (
        f'<th scope="col" aria-sort="{order}" data-key="{escape(key)}"{css}>'
        f'<button type="button">{escape(name)}</button></th>'
    )


def _row(
    report: Report, row: Row, digits: tuple[Digits, Digits], scale: Scale, *, width: int
) -> str:
    mean = row.mean
    cells = [
        f'<td data-v="{row.number}"><button type="button" class="more" aria-expanded="false" '
        f'aria-label="Row {row.number}: keys and runs">{row.number}</button></td>'
    ]
    cells += [
        f'<td data-v="{escape(value)}" data-head="{escape(name)}" title="{escape(value)}">'
        f"{escape(shortened(value))}</td>"
        for name, value in zip(report.columns, row.values, strict=True)
    ]
    metric = report.metric.name if report.metric else "metric"
    n, value = (mean.n, mean.mean) if mean else (0, None)
    cells += [
        _number(n, str(n), "small", head="n"),
        _number(value, digits[0].of(value), "mean", head=metric),
        _number(mean.low if mean else None, digits[0].interval(mean), "interval", head=""),
        f'<td class="drawn">{scale.drawn(mean)}</td>',
    ]
    if report.baseline is not None:
        cells.append(_difference(report, row, digits[1]))
    cells += [
        _number(row.best, digits[0].of(row.best), "small", head="best"),
        _number(row.seconds, duration(row.seconds), "small", head="time a run"),
    ]
    states = " ".join(
        f'<span class="state {escape(state)}">{number} {escape(state)}</span>'
        for state, number in row.states.most_common()
    )
    cells.append(f'<td class="small" data-v="{len(row.config.runs)}">{states}</td>')
    return (
        f'<tbody><tr class="row">{"".join(cells)}</tr>\n<tr hidden><td class="detail" '
        f'colspan="{width}"><div>{_diff(report, row)}{_runs(report, row, digits[0])}</div></td>'
        "</tr></tbody>"
    )


def _number(value: float | None, shown: str, css: str, *, head: str) -> str:
    known = "" if value is None or value != value else repr(value)
    attributes = f'class="number {css}" data-v="{known}" data-head="{escape(head)}"'
    return f"<td {attributes}>{escape(shown)}</td>"


def _difference(report: Report, row: Row, digits: Digits) -> str:
    if row.is_baseline:
        return '<td class="versus" data-v="0"><span class="tag base">baseline</span></td>'
    if row.versus is None or report.metric is None:
        return f'<td class="versus" data-v="">{escape(row.why_no_interval())}</td>'
    mean, verdict = row.versus.mean, report.verdict(row)
    shown = escape(digits.of(mean, sign=True))
    seeds = f"{row.common_seeds} seed{'' if row.common_seeds == 1 else 's'}"
    if not verdict:
        tail = f'<span class="tag unclear">{escape(row.why_no_interval())}, no interval</span>'
    else:
        tail = (
            f' <span class="whole">{escape(digits.interval(row.versus, sign=True))}</span> '
            f'<span class="tag {verdict}">{verdict}, {seeds}</span>'
        )
    known = "" if mean != mean else repr(mean)
    attributes = f'class="versus" data-v="{known}" data-head="difference"'
    return f"<td {attributes}><b>{shown}</b>{tail}</td>"


def _diff(report: Report, row: Row) -> str:
    if not row.config_diff:
        words = "The configuration of the most runs: the others' keys are compared with its."
        return f'<p class="soft">{words}</p>'
    lines = "".join(
        f"<tr><td><code>{escape(key)}</code></td><td><code>{escape(its)}</code></td>"
        f'<td class="soft"><code>{escape(other)}</code></td></tr>'
        for key, its, other in row.config_diff
    )
    return (
        f"<div><h3>Keys that differ from {escape(report.common)}</h3>"
        '<div class="inner"><table><thead><tr><th>key</th><th>here</th><th>there</th></tr></thead>'
        f"<tbody>{lines}</tbody></table></div></div>"
    )


def _runs(report: Report, row: Row, digits: Digits) -> str:
    name = report.metric.name if report.metric else ""
    lines = []
    for run in sorted(row.config.runs, key=lambda run: (run.seed is None, run.seed or 0)):
        value = (run.result.get("metrics") or {}).get(name) if run.state == State.finished else None
        found = " ".join(f"{key}={text(item)}" for key, item in run.tuned.items())
        lines.append(
            f"<tr><td>{escape(str(run.seed))}</td><td>{badge(run)}</td>"
            f"<td>{escape(digits.of(value))}</td><td>{duration(run.seconds)}</td>"
            f"<td><code>{escape(str(run.folder))}</code></td><td>{escape(found)}</td></tr>"
        )
    heads = "".join(
        f"<th>{escape(head)}</th>" for head in ("seed", "state", name, "time", "folder", "")
    )
    return (
        f'<div class="inner"><h3>Runs</h3><table><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def badge(run: Run) -> str:
    """The state of a run, coloured, with what else is known of its end where it did not finish."""
    words = run.state if run.state == State.finished else problem_words(run)
    return f'<span class="state {escape(run.state)}">{escape(words)}</span>'
