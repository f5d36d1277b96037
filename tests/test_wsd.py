"""A run of scheduler=wsd, and the shorter runs that branch from its stable phase."""

import json
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import SMALL
from killing import is_same
from omegaconf import OmegaConf
from test_train import command

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


RANKS = ("trainer.devices=2", "trainer.threads=1", "averaging=ema", "averaging.decay=0.9")


@pytest.mark.parametrize(
    "name",
    [*CASES, *(pytest.param(way, marks=pytest.mark.slow) for way in ("ddp_spawn", "fsdp"))],
)
def test_a_branch_is_the_run_that_had_been_given_its_length(
    composed: Any, tmp_path: Path, name: str
) -> None:
    typed = (*WSD, *CASES.get(name, (f"strategy={name}", *RANKS)))
    ended(composed, tmp_path / "mine", *typed, "trainer.max_steps=24")
    ended(composed, tmp_path / "whole", *typed, "trainer.max_steps=20", "scheduler.decay=4")
    before = found_in(tmp_path / "mine")
    words = (f"branch_of={tmp_path}/mine", "branch_at=16", "trainer.max_steps=24")
    result = ended(composed, tmp_path / "short", *typed, *words)
    one, other = last(tmp_path / "whole"), last(tmp_path / "short")
    for content in (one, other):
        del content["callbacks"]["Checkpoints"], content["callbacks"]["Measured"]  # the best one
    assert {key for key in one if not is_same(one[key], other[key])} == set()
    assert result["optimizer_steps"] == 20
    assert result["branch_of"] == {"run": f"{tmp_path}/mine", "step": 16}
    assert result["continued_after"] == []
    assert found_in(tmp_path / "mine") == before
    config = RunFolder(tmp_path / "short").read_config() or {}
    assert (config["scheduler"]["decay"], config["trainer"]["max_steps"]) == (4, 20)
    assert ended(composed, tmp_path / "short", *typed, *words) == result  # finished: left alone


class Cut(pl.Callback):
    """The end of the power, after a number of optimizer steps of a fit."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def on_train_batch_start(self, *args: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise InterruptedError


@pytest.fixture
def mine(composed: Any, tmp_path: Path) -> Path:
    """A run to branch from, stable from step 3 to 19."""
    ended(composed, tmp_path / "mine", *WSD, "trainer.max_steps=24")
    return tmp_path / "mine"


def test_a_cut_branch_goes_on_from_its_own_checkpoint(
    composed: Any, tmp_path: Path, mine: Path
) -> None:
    words = (*WSD, f"branch_of={mine}", "branch_at=8", "scheduler.decay=8",
             "callbacks.checkpoint.every_n_steps=1")  # fmt: skip
    ended(composed, tmp_path / "whole", *words)
    cut = ("+callbacks.cut._target_=test_wsd.Cut", "+callbacks.cut.steps=5")
    with pytest.raises(InterruptedError):
        ended(composed, tmp_path / "short", *words, *cut)
    config = RunFolder(tmp_path / "short").read_config() or {}
    del config["callbacks"]["cut"], config["run_dir"]
    (tmp_path / "short/config.yaml").write_text(OmegaConf.to_yaml(config))
    mine.rename(tmp_path / "gone")
    result = ended(composed, tmp_path / "short", *words)
    one, other = last(tmp_path / "whole"), last(tmp_path / "short")
    assert {key for key in one if not is_same(one[key], other[key])} <= {"callbacks"}
    assert result["branch_of"] == {"run": str(mine), "step": 8}
    assert result["continued_after"] == [13]


REFUSED = {
    ("branch_at=9",): "branch_at must be an optimizer step after which {mine} keeps a checkpoint, "
    "got 9: there are those after 8, 16, 24; type branch_at=8",
    ("branch_at=24",): "branch_at=24 is not in the stable phase of {mine}: its rate is 0 there, "
    "not 0.2; type another one of 8, 16, 24",
    ("branch_at=8", "optimizer.lr=0.1"): "optimizer.lr must be 0.2, as in {mine}, of which this "
    "run is a branch, got 0.1; leave it out",
    ("branch_at=8", "averaging=ema"): "averaging must be None, as in {mine}, of which this run is "
    "a branch, got app.averaging.Ema; leave it out",
    ("branch_at=8", "scheduler=cosine"): "branch_of needs a run with scheduler=wsd, and that of "
    "{mine} has another; type branch_of=runs/NAME of one that has it",
    ("branch_at=8", "extend=true"): "extend must be false in a branch, whose length follows from "
    "it, got True; type another branch_at",
    (): "branch_of needs branch_at, got null; type branch_at=N as well",
    ("branch_at=8", "branch_of=nowhere"): "branch_of must be the folder of a run, got nowhere: "
    "there is none; type branch_of=runs/NAME",
    ("branch_of=null", "branch_at=8"): "branch_at needs branch_of, got null; type "
    "branch_of=runs/NAME as well",
    ("branch_at=8", "scheduler.decay=0"): "scheduler.decay must be steps >= 1 or a share above 0.0 "
    "and below 1.0, got 0; type scheduler.decay=0.2, or for none scheduler=warmup",
}


def test_what_cannot_be_a_branch_is_refused_and_leaves_nothing(
    composed: Any, tmp_path: Path, mine: Path
) -> None:
    for typed, said in REFUSED.items():
        words = (f"branch_of={mine}", "trainer.max_steps=24", *typed)
        with pytest.raises(Refused) as refusal:
            ended(composed, tmp_path / "short", *WSD, *words)
        assert str(refusal.value) == said.format(mine=mine)
        assert not (tmp_path / "short").exists()
    words = (*WSD, f"branch_of={mine}", "branch_at=8")
    ended(composed, tmp_path / "short", *words)
    with pytest.raises(Refused, match=r"got .*/short, a branch, which decays from its first step"):
        ended(composed, tmp_path / "third", *WSD, f"branch_of={tmp_path}/short", "branch_at=8")


def test_an_average_whose_memory_is_a_share_of_the_run_is_refused(
    composed: Any, tmp_path: Path
) -> None:
    typed = (*WSD, "averaging=ema")
    ended(composed, tmp_path / "mine", *typed, "trainer.max_steps=10")
    with pytest.raises(Refused) as refusal:
        ended(composed, tmp_path / "short", *typed, f"branch_of={tmp_path}/mine", "branch_at=8")
    assert str(refusal.value) == (
        f"branch_of: averaging.horizon of {tmp_path}/mine is laid out over its whole length, which "
        "a branch has not; train a run to branch from with averaging.half_life_steps=N, or "
        "averaging.start_step=N"
    )


NOTED = {
    ("scheduler=wsd", "averaging=ema"): "note: averaging adds nothing where the schedule decays",
    ("scheduler=linear", "averaging=uniform"): "note: averaging adds nothing where the schedule",
    ("scheduler=onecycle", "averaging=ema"): "note: averaging adds nothing where the schedule",
    ("scheduler=wsd", "branch_of=runs/mine", "branch_at=8"): "note: scheduler.warmup=0.05 is a "
    "share of runs/mine, not of this run",
    ("scheduler=wsd", "averaging=swa"): "",
    ("scheduler=wsd", "averaging=ema", "scheduler.final=0.5"): "",
    ("scheduler=warmup", "averaging=ema"): "",
    ("averaging=ema",): "",
    ("scheduler=wsd",): "",
}


@pytest.mark.parametrize("typed", NOTED, ids=" ".join)
def test_what_is_allowed_and_seldom_meant_is_said(checked: Any, typed: tuple[str, ...]) -> None:
    notes = checked(*typed).notes
    assert [note[: len(NOTED[typed])] for note in notes] == [NOTED[typed]] * bool(NOTED[typed])


def test_a_branch_is_typed_without_what_was_typed_for_its_run(tmp_path: Path) -> None:
    small = (*SMALL, "scheduler=wsd", "scheduler.warmup=3", "scheduler.shape=linear",
             "trainer.max_epochs=4", "callbacks.checkpoint.keep_every_n_steps=8")  # fmt: skip
    command("app.train", *small, "name=mine", cwd=tmp_path)
    result = json.loads((tmp_path / "runs/mine/result.json").read_text())
    assert result["kept_checkpoints"] == [f"checkpoints/step={n}.ckpt" for n in (8, 16, 24)]
    words = ("branch_of=runs/mine", "scheduler.decay=0.5", "branch_at=8")
    assert command("app.check", *words, cwd=tmp_path).endswith("ok\n")
    said = command("app.train", *words, "name=short", cwd=tmp_path)
    assert "branch      of runs/mine after step 8: 8 of decay\n" in said
    assert "WarmupStableDecay shape=linear warmup=3 decay=8" in said
    assert "finished" in command("app.train", *words, "name=short", cwd=tmp_path)
    assert "trainer.max_steps has no effect in a branch, which is branch_at and its decay" in (
        command("app.train", *words, "trainer.max_steps=9", cwd=tmp_path, exit_code=2)
    )
