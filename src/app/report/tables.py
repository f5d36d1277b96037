"""A report on the terminal, as Markdown and as CSV."""

import csv
import io
import math
import re
from collections import Counter
from collections.abc import Sequence

from app.record.states import State
from app.report.configurations import NOTHING
from app.report.numbers import MOST_OF_A_TEXT, Digits, duration
from app.report.reading import Run
from app.report.rerun import command
from app.report.summary import Report, Row
from app.sweep.progress import plain

NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[-+]?[0-9]+)?", re.IGNORECASE)
SHOWN = 40
"""Rows, problems and notes on the terminal; the files have all of them."""
WIDEST = 600
"""Characters of an error or a note on the terminal."""


def cells(report: Report) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of the table, as text."""
    metric = report.metric.name if report.metric else "metric"
    heads = [*report.columns, "n", metric, "95 % interval", "best", "time a run"]
    if report.baseline is not None:
        heads += ["difference", "95 % interval ", "seeds"]
    if any(set(row.states) != {State.finished} for row in report.rows):
        heads += ["runs"]
    digits, signed = digits_of(report)
    lines = []
    for row in report.rows:
        line = [
            *row.values,
            str(row.mean.n if row.mean else 0),
            digits.of(row.mean.mean if row.mean else None),
            digits.interval(row.mean),
            digits.of(row.best),
            duration(row.seconds),
        ]
        if report.baseline is not None:
            difference = signed.of(row.versus.mean if row.versus else None, sign=True)
            interval = signed.interval(row.versus, sign=True)
            line += (
                ["baseline", "", ""]
                if row.is_baseline
                else [difference, row.why_no_interval() or interval, str(row.common_seeds)]
            )
        if heads[-1] == "runs":
            line += [states(row.states)]
        lines.append(line)
    return heads, lines


def digits_of(report: Report) -> tuple[Digits, Digits]:
    """Of the metric, and of the differences from the baseline."""
    return Digits(row.mean for row in report.rows), Digits(row.versus for row in report.rows)


def states(count: Counter[State]) -> str:
    """`3 finished, 1 failed`."""
    return ", ".join(f"{number} {state}" for state, number in count.most_common())


def headlines(report: Report) -> list[str]:
    """What the table is of, in sentences, without the notes."""
    total = Counter(run.state for run in report.runs)
    plural = "" if len(report.rows) == 1 else "s"
    lines = [
        f"{report.top}: {len(report.runs)} run{'' if len(report.runs) == 1 else 's'} "
        f"({states(total)}) of {len(report.rows)} configuration{plural}"
    ]
    if report.metric is None:
        lines.append("metric: none, as no run has finished with one")
    else:
        way = "lower" if report.metric.lower_is_better else "higher"
        lines.append(
            f"metric {report.metric.name}: {report.metric.why}; "
            f"{way} is better ({report.metric.why_mode})"
        )
        if report.metric.others:
            lines.append(f"also measured, --metric NAME: {', '.join(report.metric.others)}")
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
    best, (digits, signed) = known[0], digits_of(report)
    assert best.mean is not None
    superlative = "lowest" if report.metric.lower_is_better else "highest"
    text = f"{superlative} mean {report.metric.name}: {report.label(best)}"
    text += f", {digits.of(best.mean.mean)}"
    if best.mean.low is not None:
        text += f" {digits.interval(best.mean)}"
    if best.is_baseline:
        text += ", the baseline"
    verdict = report.verdict(best)
    if verdict:
        assert best.versus is not None
        difference = signed.of(best.versus.mean, sign=True)
        words = "no clear difference from" if verdict == "unclear" else f"{verdict} than"
        text += f"; {words} the baseline: {difference} {signed.interval(best.versus, sign=True)}"
    return [text]


def error_line(text: str) -> str:
    """The line of an error that says what happened: of a traceback the last, else the first."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [""]
    return lines[-1] if lines[0].startswith("Traceback") else lines[0]


def problem_words(run: Run) -> str:
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
    if len(report.notes) > limit:
        lines.append(f"... and {len(report.notes) - limit} more notes, in the files")
    lines += [*answer(report), ""]
    if report.rows:
        heads, rows = cells(report)
        lines += _aligned([heads, *rows[:limit]], is_left=len(report.columns))
        if len(rows) > limit:
            lines.append(f"... and {len(rows) - limit} more rows, in the files")
    for run in report.problems[:limit]:
        lines += ["", f"{run.folder}  {problem_words(run)}"]
        if run.error:
            lines.append(f"  {shown(error_line(run.error), most=WIDEST)}")
        again = command(run)
        lines += [f"  {again}"] if again else []
    if len(report.problems) > limit:
        lines += ["", f"... and {len(report.problems) - limit} more, in the files"]
    return "\n".join(plain(line) for line in lines)


def shown(text: str, *, most: int) -> str:
    """One line of printable characters, cut where there are too many."""
    return plain(text if len(text) <= most else f"{text[: most - 3]}...")


def _aligned(table: Sequence[Sequence[str]], *, is_left: int) -> list[str]:
    table = [[shown(cell, most=MOST_OF_A_TEXT) for cell in line] for line in table]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if index < is_left or table[0][index] == "runs" else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    ]


def markdown(report: Report, *, curves: Sequence[str]) -> str:
    """The report for a pull request; everything that is not ours is escaped.

    Args:
        curves: names of the pictures beside the file.
    """
    heads, rows = cells(report)
    said = [*headlines(report), *report.notes, *answer(report)]
    lines = ["# Report", "", *(f"* {escaped(line)}" for line in said), ""]
    if rows:
        aligned = ["---" if i < len(report.columns) else "---:" for i in range(len(heads))]
        lines += [_table_line([escaped(cell) for cell in line]) for line in [heads]]
        lines += [_table_line(aligned)]
        lines += [_table_line([escaped(cell) for cell in line]) for line in rows]
    for name in curves:
        lines += ["", f"![{escaped(name)}](<{name}>)"]
    if report.problems:
        lines += ["", "## Runs without a result"]
    for run in report.problems:
        lines += ["", f"* {escaped(str(run.folder))}: {escaped(problem_words(run))}"]
        if run.error:
            lines += ["", f"  {escaped(error_line(run.error))}"]
        again = command(run)
        if again:
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", again)), default=0))
            lines += ["", f"  {fence}sh", f"  {plain(again)}", f"  {fence}"]
    return "\n".join(lines) + "\n"


def _table_line(line: Sequence[str]) -> str:
    return f"| {' | '.join(line)} |"


def escaped(text: str) -> str:
    """Text that Markdown, and the HTML in it, shows as it is, in one line."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&$])", r"\\\1", plain(text.replace("\n", " ")))


def csv_text(report: Report) -> str:
    """A line per row, numbers in full; no text that a spreadsheet would calculate."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    metric = report.metric.name if report.metric else "metric"
    heads = ["n", f"{metric}_mean", f"{metric}_low", f"{metric}_high", f"{metric}_best", "seconds"]
    differences = ["difference", "difference_low", "difference_high", "common_seeds"]
    last = ["num_runs", "num_finished", "folders"]
    writer.writerow(map(defused, [*report.columns, *heads, *differences, *last]))
    for row in report.rows:
        writer.writerow(map(defused, [*row.values, *_numbers(row)]))
    return file.getvalue()


def defused(cell: object) -> object:
    """A cell as it is, with an apostrophe before a text that a spreadsheet would take for a formula
    or a command; numbers, also those in texts, and our dash for nothing are none."""
    if not isinstance(cell, str) or cell == NOTHING or NUMBER.fullmatch(cell):
        return cell
    return f"'{cell}" if cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else cell


def _numbers(row: Row) -> list[object]:
    mean, versus = row.mean, row.versus
    return [
        mean.n if mean else 0,
        *([mean.mean, mean.low, mean.high] if mean else [None] * 3),
        row.best,
        row.seconds,
        *([versus.mean, versus.low, versus.high] if versus else [None] * 3),
        row.common_seeds,
        len(row.config.runs),
        row.states[State.finished],
        " ".join(str(run.folder) for run in row.config.runs),
    ]
