"""Every benchmark runs all of itself at its smallest size, and prints a table."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
HELPERS = {"presets.py", "side_by_side.py"}
FILES = sorted(path for path in BENCHMARKS.glob("*.py") if path.name not in HELPERS)
SLOW = {"sharing", "signals", "startup", "sweep", "tune"}


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem in SLOW else [])
        for path in FILES
    ],
)
def test_a_benchmark_runs_at_its_smallest_size(path: Path, tmp_path: Path) -> None:
    assert re.search(r"from side_by_side import .*\bsized\b", path.read_text())
    done = subprocess.run(
        [sys.executable, path, "--smallest"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\S  +-?\d+\.\d", done.stdout), done.stdout


def test_the_readme_names_every_benchmark() -> None:
    named = (BENCHMARKS.parent / "README.md").read_text()
    assert [path.name for path in FILES if path.name not in named] == []
