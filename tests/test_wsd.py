"""A run of scheduler=wsd, and the shorter runs that branch from its stable phase."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL
from killing import is_same

from app.errors import Refused
from app.fit import run
from app.optim.schedules import warmup_stable_decay
from app.record.folder import RunFolder

WSD = (*SMALL, "scheduler=wsd", "scheduler.warmup=3", "trainer.max_epochs=null",
       "callbacks.checkpoint.keep_every_n_steps=8")  # fmt: skip


def rates(shape: str, *, warmup: int, decay: int, final: float, total: int) -> list[float]:
    steps = range(total)
    settings: Any = {"warmup": warmup, "decay": decay, "final": final, "total": total}
    return [warmup_stable_decay(step, shape=shape, **settings) for step in steps]


@pytest.mark.parametrize("shape", ["sqrt", "linear", "cosine"])
def test_the_decay_is_that_of_torchtitan_and_timm(shape: str) -> None:
    """Both written down anew: titan counts a virtual last step, timm ends one past its last."""
    warmup, decay, total, final = 5, 8, 40, 0.1
    fall = {"sqrt": lambda p: 1 - math.sqrt(p), "linear": lambda p: 1 - p,
            "cosine": lambda p: 0.5 * (1 + math.cos(math.pi * p))}[shape]  # fmt: skip
    titan, timm = [], []
    for step in range(warmup, total):
        stable_ends = total + 1 - decay
        done = max(0, step + 1 - stable_ends) / decay
        titan.append(final + (1 - final) * fall(done))
        since = step - warmup - (total - warmup - decay)
        timm.append(1.0 if since <= 0 else final + (1 - final) * fall(since / decay))
    ours = rates(shape, warmup=warmup, decay=decay, final=final, total=total)
    assert ours[warmup:] == pytest.approx(titan)
    assert ours[warmup:] == pytest.approx(timm)
    assert ours[:warmup] == pytest.approx([(step + 1) / 6 for step in range(5)])


def test_the_rates_by_hand() -> None:
    ours = rates("sqrt", warmup=1, decay=4, final=0.0, total=8)
    assert ours == [0.5, 1.0, 1.0, 1.0, 1.0, 0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75)]


def ended(composed: Any, folder: Path, *typed: str) -> dict[str, Any]:
    result = run(composed(*typed, f"run_dir={folder}"), typed=[])
    assert result is not None
    return result


def found_in(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def last(folder: Path) -> Any:
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)


CASES: dict[str, tuple[str, ...]] = {
    "in an epoch": (),
    "an average": ("averaging=ema", "averaging.half_life_steps=4"),
    "accumulation": ("accumulate=constant", "accumulate.factor=2"),
    "a validation at the branch": ("trainer.val_check_interval=2",),
    "the end of an epoch": ("trainer.limit_train_batches=8",),
    "adamw": ("optimizer=adamw", "clip=percentile"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_branch_is_the_run_that_had_been_given_its_length(
    composed: Any, tmp_path: Path, name: str
) -> None:
    typed = (*WSD, *CASES[name])
    ended(composed, tmp_path / "mine", *typed, "trainer.max_steps=24")
    ended(composed, tmp_path / "whole", *typed, "trainer.max_steps=20", "scheduler.decay=4")
    before = found_in(tmp_path / "mine")
    words = (f"branch_of={tmp_path}/mine", "branch_at=16", "trainer.max_steps=24")
    result = ended(composed, tmp_path / "short", *typed, *words)
    one, other = last(tmp_path / "whole"), last(tmp_path / "short")
    assert {key for key in one if not is_same(one[key], other[key])} <= {"callbacks"}
    assert result["optimizer_steps"] == 20
    assert result["branch_of"] == {"run": f"{tmp_path}/mine", "step": 16}
    assert result["continued_after"] == []
    assert found_in(tmp_path / "mine") == before
    config = RunFolder(tmp_path / "short").read_config() or {}
    assert (config["scheduler"]["decay"], config["trainer"]["max_steps"]) == (4, 20)
    assert ended(composed, tmp_path / "short", *typed, *words) == result  # finished: left alone
