"""Compares the runs in a folder: `python -m app.report multirun --baseline averaging=none`."""

import argparse
import difflib
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from app.cli import Parser
from app.errors import Refused
from app.process.files import why, write_atomically
from app.report.curves import THEMES, draw, panels
from app.report.page import page
from app.report.reading import read_runs
from app.report.summary import Report, summarize
from app.report.tables import csv_text, markdown, terminal
from app.sweep.progress import plain


def main(arguments: Sequence[str]) -> int:
    """Print the table and write the files; returns the exit code: 2 where it is refused."""
    try:
        typed = parsed(arguments)
        top = Path(typed.folder)
        out = top if typed.out is None else Path(typed.out)
        report = summarize(
            top, read_runs(top), metric=typed.metric, mode=typed.mode, baseline=typed.baseline
        )
        try:
            out.mkdir(parents=True, exist_ok=True)
            written = write(report, out)
        except OSError as error:
            raise Refused(f"{out} cannot be written: {why(error)}; type --out FOLDER") from None
    except Refused as refusal:
        print(f"report: {refusal}", file=sys.stderr)
        return 2
    print(terminal(report), "", *(plain(str(path)) for path in written), sep="\n")
    return 0


def write(report: Report, out: Path) -> list[Path]:
    """Write report.html, report.md, report.csv and the curves into a folder."""
    drawn = panels(report)
    files = {panel.file_name: draw(panel, theme="light", has_legend=True) for panel in drawn}
    pictures = [
        (panel, {theme: draw(panel, theme=theme, has_legend=False) for theme in THEMES})
        for panel in drawn
    ]
    texts = {
        "report.html": page(report, pictures),
        "report.md": markdown(report, curves=list(files)),
        "report.csv": csv_text(report),
    }
    # without halves of characters, which the names of folders may have
    whole = {name: re.sub("[\ud800-\udfff]", "\ufffd", text) for name, text in texts.items()}
    contents: dict[str, str | bytes] = {**whole, **files}
    for name, content in contents.items():
        write_atomically(out / name, content)
    return [out / name for name in contents]


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """What was typed.

    Raises Refused where it is not an option.
    """
    typed, unknown = parser().parse_known_args(arguments)
    options = ["--metric", "--mode", "--baseline", "--out"]
    for word in unknown:
        name, _, value = word.lstrip("-").partition("=")
        if f"--{name}" in options:
            raise Refused(f"{word} is not an option; type --{name} {value}".rstrip())
        near = difflib.get_close_matches(f"--{name}", options, n=1, cutoff=0.5)
        if word[0] == "-":
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(options)}"
            raise Refused(f"--{name} is not an option; {hint}")
        raise Refused(f"one folder is reported at a time, got also {word}; type one that holds all")
    return typed


def parser() -> argparse.ArgumentParser:
    """The command line, of which `parsed` says in other words what is unknown."""
    found = Parser(
        prog="python -m app.report",
        description="Compares the runs in a folder: one row for all seeds of a configuration, the\n"
        "mean of a metric and its 95 % interval. Writes report.html, report.md, report.csv and\n"
        "report-*.png, and lists what failed with the command that goes on with it.",
        epilog="examples:\n"
        "  python -m app.report runs/mine\n"
        "  python -m app.report multirun/2026-01-01/12-00-00 --baseline averaging=none\n"
        "  python -m app.report multirun --metric test_acc --out reports/all",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    found.add_argument("folder", metavar="DIR", help="of a run, of a sweep, or of several of them")
    found.add_argument(
        "--metric", metavar="NAME",
        help="what to compare; unless typed, what callbacks.checkpoint.monitor names",
    )  # fmt: skip
    found.add_argument(
        "--mode", metavar="min|max",
        help="min where lower is better; unless typed, callbacks.checkpoint.mode, or by the name",
    )  # fmt: skip
    found.add_argument(
        "--baseline", metavar="KEY=VALUE", action="append", default=[],
        help="the row that others are compared with, seed by seed; type it again for more keys",
    )  # fmt: skip
    found.add_argument("--out", metavar="DIR", help="where the files go; unless typed, into DIR")
    return found


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` has read enough
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # where it is not UTF-8
    sys.exit(main(sys.argv[1:]))
