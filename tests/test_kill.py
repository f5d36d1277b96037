"""A run that is killed at any moment goes on as if it had not been."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NUMBER = os.environ.get("APP_TEST_KILLS", "4")
"""Kills of each of three configurations."""


@pytest.mark.slow
def test_a_run_that_is_killed_anywhere_equals_the_one_that_is_not(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("killing.py"), tmp_path, NUMBER, "0"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(told) == 3 * int(NUMBER)
    parts = ("weights", "metrics.csv", "result.json")
    assert [kill for kill in told if not all(kill[part] for part in parts)] == []
    assert sum(kill["killed"] for kill in told) > len(told) / 2
