"""A report on the terminal, as Markdown and as CSV."""

import csv
import io
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence

from app.record.states import State
from app.report.numbers import MOST_OF_A_TEXT, NOTHING, Estimate, cut, duration
from app.report.reading import StoredRun
from app.report.rerun import command
from app.report.summary import Report, Row
from app.sweep.progress import plain

NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[-+]?[0-9]+)?", re.IGNORECASE)
SHOWN = 40
"""Rows, problems and notes on the terminal; the files have all of them."""
WIDEST = 600
"""Characters of an error or a note on the terminal."""


def cells(report: Report) -> list[list[str]]:
    """Heads and rows of the table, as text; empty where there is no row."""
    has_states = any(run.state != State.finished for row in report.rows for run in row.config.runs)
    rows = [[*_cells(report, row, has_states=has_states)] for row in report.rows]
    heads = [[head for head, _ in row] for row in rows[:1]]
    return [*heads, *([cell for _, cell in row] for row in rows)]


def _cells(report: Report, row: Row, *, has_states: bool) -> Iterator[tuple[str, str]]:
    yield from zip(report.columns, row.values, strict=True)
    yield "n", str(row.mean.n if row.mean else 0)
    yield report.metric_name, report.decimals.mean(row.mean)
    yield "95 % interval", report.decimals.interval(row.mean)
    yield "best", report.decimals.of(row.best)
    if report.tested_name is not None:
        yield report.tested_name, report.tested_decimals.mean(row.tested)
        yield "95 % interval  ", report.tested_decimals.interval(row.tested)
    yield "time a run", duration(row.seconds)
    if report.baseline is not None:
        interval = row.why_no_interval() or report.signed.interval(row.versus)
        yield "difference", "baseline" if row.is_baseline else report.signed.mean(row.versus)
        yield "95 % interval ", "" if row.is_baseline else interval
        yield "seeds", "" if row.is_baseline else str(row.common_seeds)
    if has_states:
        yield "runs", states(row.states)


def states(count: Counter[State]) -> str:
    """`3 finished, 1 failed`."""
    return ", ".join(f"{number} {state}" for state, number in count.most_common())


def counted(number: int, noun: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def headlines(report: Report) -> list[str]:
    """What the table is of, in sentences, without the notes."""
    metric, total = report.metric, states(Counter(run.state for run in report.runs))
    lines = [
        f"{report.top}: {counted(len(report.runs), 'run')} ({total}) of "
        f"{counted(len(report.rows), 'configuration')}"
    ]
    if metric is None:
        lines.append("metric: none, as no run has finished with one")
    else:
        way = "lower" if metric.lower_is_better else "higher"
        lines.append(f"metric {metric.name}: {metric.why}; {way} is better ({metric.why_mode})")
        if metric.tested:
            lines.append(f"{metric.tested} is shown beside it, and chooses nothing")
        if metric.others:
            lines.append(f"also measured, --metric NAME: {', '.join(metric.others)}")
    if report.baseline is not None:
        lines.append(f"differences from {report.baseline}, in pairs of one seed")
    elif len(report.rows) > 1:
        lines.append("differences from a row: --baseline KEY=VALUE")
    if report.repeats:
        lines.append(f"runs that repeat a seed of their row: {report.repeats}; their mean counts")
    return lines


def answer(report: Report) -> list[str]:
    """Which row is best, in a sentence; none where there is nothing to choose from."""
    known = [row for row in report.rows if row.mean is not None and math.isfinite(row.mean.mean)]
    if len(known) < 2 or report.metric is None:
        return []
    best = known[0]
    superlative = "lowest" if report.metric.lower_is_better else "highest"
    mean, interval = report.decimals.mean(best.mean), report.decimals.interval(best.mean)
    text = f"{superlative} mean {report.metric.name}: {report.label(best)}, {mean}"
    text += f" {interval}" if interval != NOTHING else ""
    text += ", the baseline" if best.is_baseline else ""
    if verdict := report.verdict(best):
        words = "no clear difference from" if verdict == "unclear" else f"{verdict} than"
        difference = f"{report.signed.mean(best.versus)} {report.signed.interval(best.versus)}"
        text += f"; {words} the baseline: {difference}"
    return [text]


def error_line(text: str) -> str:
    """The line of an error that says what happened: of a traceback the last, else the first."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [""]
    return lines[-1] if lines[0].startswith("Traceback") else lines[0]


def problem_words(run: StoredRun) -> str:
    """State and failing rank, attempt and device where they are known."""
    words = [str(run.state)]
    if "rank" in run.result and run.state == State.failed:
        words.append(f"rank {run.result['rank']}")
    if run.job is not None:
        words += [f"attempt {run.job.attempt}"] if run.job.attempt > 1 else []
        words += [f"device {run.job.device}"] if run.job.device else []
    return ", ".join(words)


def terminal(report: Report, *, limit: int = SHOWN) -> str:
    """The report in lines, without characters that a terminal would act on."""
    lines = [*headlines(report), *(shown(note, most=WIDEST) for note in report.notes[:limit])]
    lines += _left_out(report.notes, limit, " notes")
    lines += [*answer(report), ""]
    lines += _aligned(cells(report)[: limit + 1], is_left=len(report.columns))
    lines += _left_out(report.rows, limit, " rows")
    for run in report.problems[:limit]:
        lines += ["", f"{run.folder}  {problem_words(run)}"]
        if run.error:
            lines.append(f"  {shown(error_line(run.error), most=WIDEST)}")
        again = command(run)
        lines += [f"  {again}"] if again else []
    left = _left_out(report.problems, limit, "")
    return "\n".join(plain(line) for line in [*lines, *([""] if left else []), *left])


def _left_out(items: Sequence[object], limit: int, noun: str) -> list[str]:
    left = len(items) - limit
    return [f"... and {left} more{noun}, in the files"] if left > 0 else []


def shown(text: str, *, most: int) -> str:
    """One line of printable characters, cut where there are too many."""
    return plain(cut(text, most=most))


def _aligned(table: Sequence[Sequence[str]], *, is_left: int) -> list[str]:
    table = [[shown(cell, most=MOST_OF_A_TEXT) for cell in line] for line in table]
    columns = []
    for index, column in enumerate(zip(*table, strict=True)):
        width = max(map(len, column))
        to_left = index < is_left or column[0] == "runs"
        columns.append([cell.ljust(width) if to_left else cell.rjust(width) for cell in column])
    return ["  ".join(line).rstrip() for line in zip(*columns, strict=True)]


def markdown(report: Report, *, curves: Sequence[str]) -> str:
    """The report for a pull request; everything that is not ours is escaped.

    Args:
        curves: names of the pictures beside the file.
    """
    said = [*headlines(report), *report.notes, *answer(report)]
    lines = ["# Report", "", *(f"* {escaped(line)}" for line in said), ""]
    table = [[escaped(cell) for cell in line] for line in cells(report)]
    if table:
        num_right = len(table[0]) - len(report.columns)
        table.insert(1, ["---"] * len(report.columns) + ["---:"] * num_right)
    lines += [f"| {' | '.join(line)} |" for line in table]
    for name in curves:
        lines += ["", f"![{escaped(name)}](<{name}>)"]
    if report.problems:
        lines += ["", "## Runs without a result"]
    for run in report.problems:
        lines += ["", f"* {escaped(str(run.folder))}: {escaped(problem_words(run))}"]
        if run.error:
            lines += ["", f"  {escaped(error_line(run.error))}"]
        if again := command(run):
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", again)), default=0))
            lines += ["", f"  {fence}sh", f"  {plain(again)}", f"  {fence}"]
    return "\n".join(lines) + "\n"


def escaped(text: str) -> str:
    """Text that Markdown, and the HTML in it, shows as it is, in one line."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&$])", r"\\\1", plain(text.replace("\n", " ")))


def csv_text(report: Report) -> str:
    """A line per row, numbers in full; no text that a spreadsheet would calculate."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    metric = [f"{report.metric_name}_{what}" for what in ("mean", "low", "high", "best")]
    tested = report.tested_name
    metric += [f"{tested}_{what}" for what in ("mean", "low", "high") if tested]
    heads = ["n", *metric, "seconds", "difference", "difference_low", "difference_high",
             "common_seeds", "num_runs", "num_finished", "folders"]  # fmt: skip
    writer.writerow(map(defused, [*report.columns, *heads]))
    for row in report.rows:
        numbers = [row.mean.n if row.mean else 0, *_ends(row.mean), row.best,
                   *(_ends(row.tested) if tested else ()), row.seconds,
                   *_ends(row.versus), row.common_seeds, len(row.config.runs),
                   row.states[State.finished]]  # fmt: skip
        folders = " ".join(str(run.folder) for run in row.config.runs)
        writer.writerow(map(defused, [*row.values, *numbers, folders]))
    return file.getvalue()


def _ends(one: Estimate | None) -> list[float | None]:
    return [one.mean, one.low, one.high] if one else [None, None, None]


def defused(cell: object) -> object:
    """A cell as it is, with an apostrophe before a text that a spreadsheet would take for a formula
    or a command; numbers, also those in texts, and our dash for nothing are none."""
    if not isinstance(cell, str) or cell == NOTHING or NUMBER.fullmatch(cell):
        return cell
    return f"'{cell}" if cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else cell
