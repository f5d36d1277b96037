"""The table of the zoo, printed when its cells have run."""

from collections import defaultdict
from typing import Any

SIGNS = {"passed": "+", "skipped": ".", "failed": "F"}


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """A line a row: + holds, or is refused in the words of the table; . cannot be; F fails."""
    table: dict[str, dict[str, str]] = defaultdict(dict)
    for outcome, sign in SIGNS.items():
        for report in terminalreporter.stats.get(outcome, ()):
            cell = report.nodeid.partition("test_cell[")[2].removesuffix("]")
            column, _, row = cell.partition("-")
            if cell and report.when in ("call", "setup"):
                table[row][column] = sign
    for row, cells in sorted(table.items()):
        terminalreporter.write_line(
            f"{row:40}{'  '.join(f'{c}{s}' for c, s in sorted(cells.items()))}"
        )
    counts = [sum(sign == s for cells in table.values() for s in cells.values()) for sign in "+.F"]
    if table:
        terminalreporter.write_line(
            "hold or are refused: {}, cannot be: {}, fail: {}".format(*counts)
        )
