"""The table of the zoo: each row in each column holds, or is refused in words, or has a reason.

A sample that changes with the commit; all of it with APP_TEST_ZOO=all (`make zoo`).
"""

import os
import random
import subprocess
from pathlib import Path

import pytest
import torch

from zoo.columns import CHECKS
from zoo.models import ALONE
from zoo.table import ROWS, scheduled

SIZE = 6
"""Rows in a sample."""

ALL = {
    **ROWS,
    **{f"{name}, by epoch": scheduled(name, "epoch") for name in ALONE},
    **{f"{name}, by step": scheduled(name, "step") for name in ALONE},
    **{f"{name}, every 4 steps": scheduled(name, "step", 4) for name in ALONE},
}


def sample() -> list[str]:
    """Rows that the hash of the commit draws."""
    command = ["git", "rev-parse", "HEAD"]
    here = Path(__file__).parent
    commit = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False).stdout
    return random.Random(commit).sample(sorted(ALL), SIZE)


CHOSEN = [*ALL] if os.environ.get("APP_TEST_ZOO") == "all" else sample()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CHOSEN)
@pytest.mark.parametrize("column", CHECKS)
def test_cell(tmp_path: Path, name: str, column: str) -> None:
    row = ALL[name]
    if column in row.apart:
        pytest.skip(row.apart[column])
    draw = random.Random(f"{name} {column} {os.environ.get('APP_TEST_SEED', 0)}")
    if column in row.refused:
        with pytest.raises(ValueError) as refusal:  # noqa: PT011  # Refused, or Lightning's
            CHECKS[column](row, tmp_path, draw)
        assert row.refused[column] in str(refusal.value)
        return
    CHECKS[column](row, tmp_path, draw)


def test_every_scheduler_of_torch_has_a_row() -> None:
    schedules = torch.optim.lr_scheduler
    theirs = {
        name
        for name, kind in vars(schedules).items()
        if isinstance(kind, type) and issubclass(kind, schedules.LRScheduler)
    }
    assert theirs - {"LRScheduler", "_LRScheduler"} <= ALONE.keys()
