"""A run that was cut goes on as if it had not been: weights, optimizer, data, metrics.csv."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import SMALL, presets_of

from app.matrix import NEEDED
from app.run.build import Run, build
from app.run.checkpoint import newest_intact

THEIRS = ("model=custom", "model._target_=theirs.LitModel", "data=custom",
          "data._target_=theirs.LitData", "optimizer=none", "trainer.max_epochs=3", "logger=csv",
          "callbacks.progress=null", "trainer.accelerator=cpu")  # fmt: skip
OFTEN = "callbacks.checkpoint.every_n_steps=1"
CASES = {
    "the default": SMALL,
    "epochs' ends only": (*SMALL, "callbacks.checkpoint.every_n_steps=null"),
    "accumulate=schedule by step": (*SMALL, "accumulate=schedule", "accumulate.by=step", OFTEN,
                                    "accumulate.starts=[0,3]", "accumulate.factors=[1,4]"),
    "averaging=ema in fp64": (*SMALL, "averaging=ema", OFTEN, "precision=fp64"),
    "precision=fp64": (*SMALL, OFTEN, "precision=fp64"),
    "averaging=swa, BatchNorm": (*SMALL, "averaging=swa", "averaging.anneal_epochs=1",
                                 "model=cnn1d_bn", OFTEN),
    "scheduler=plateau": (*SMALL, "scheduler=plateau", "scheduler.patience=0", OFTEN),
    "memory=checkpointing": (*SMALL, "memory=checkpointing", "memory.min_parameters=100", OFTEN),
    "optimizer/groups=layer_decay": (*SMALL, "optimizer=adamw", "optimizer/groups=layer_decay",
                                     "scheduler=onecycle", OFTEN),
    "theirs": (*THEIRS, OFTEN),
    "theirs, worker processes": (*THEIRS, "+data.workers=2", OFTEN),
    "theirs, kept workers": (*THEIRS, "+data.workers=2", "+data.persistent=true", OFTEN),
    "theirs, validation inside": (*THEIRS, "trainer.val_check_interval=0.5", OFTEN),
    **{
        f"theirs, zoo.models.{name}": (*THEIRS, f"model._target_=zoo.models.{name}", OFTEN,
                               "data._target_=zoo.loaders.Rows", *watched)
        for name, watched in {
            "Slashes": ("trainer.log_every_n_steps=2",),
            "Metrics": (),
            "Teacher": (),
        }.items()
    },
    "theirs, two optimizers": (*THEIRS, "model._target_=theirs.TwoOptimizers", OFTEN),
}  # fmt: skip
CHOSEN = tuple(CASES)
DISCOVERED = ("accumulate", "averaging", "clip", "memory", "optimizer", "scheduler")
for choice in (f"{group}={name}" for group in DISCOVERED for name in presets_of(group)):
    CASES.setdefault(choice, (*SMALL, choice, *NEEDED.get(choice, []), OFTEN))


class Cut(Exception):  # noqa: N818  # the end of the power, not an error of the program
    pass


class CutAt(pl.Callback):
    """Ends the process, as far as the run can tell, when a batch begins."""

    def __init__(self, batch: int | None) -> None:
        self.batch = batch

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.fit_loop.total_batch_idx == self.batch:
            raise Cut


def fit(config: dict[str, Any], *, cut_at: int | None) -> Run:
    run = build(config, [CutAt(cut_at)])
    checkpoint = newest_intact(Path(config.run_dir) / "checkpoints")
    try:
        run.trainer.fit(run.model, datamodule=run.data, ckpt_path=checkpoint)
    except Cut:
        assert cut_at is not None
    return run


@pytest.mark.parametrize("case", CASES)
def test_a_run_cut_twice_equals_the_uninterrupted_one(
    checked: Callable[..., Any], tmp_path: Path, case: str
) -> None:
    if case == "optimizer=adamw8bit":
        pytest.importorskip("bitsandbytes")
    whole = fit(checked(*CASES[case], f"run_dir={tmp_path}/whole"), cut_at=None)
    config = checked(*CASES[case], f"run_dir={tmp_path}/cut")
    batches = whole.trainer.fit_loop.total_batch_idx + 1
    for cut_at in (batches // 3, batches - 2):
        fit(config, cut_at=cut_at)
    cut = fit(config, cut_at=None)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, cut.model.state_dict()[name]), name
    metrics = [(tmp_path / name / "metrics.csv").read_text() for name in ("whole", "cut")]
    assert metrics[0] == metrics[1]


def test_a_damaged_last_checkpoint_is_reported_and_the_one_before_is_used(
    checked: Callable[..., Any], tmp_path: Path
) -> None:
    fit(checked(*SMALL), cut_at=None)
    checkpoints = tmp_path / "run/checkpoints"
    content = bytearray((checkpoints / "last.ckpt").read_bytes())
    content[len(content) // 2] ^= 0xFF
    (checkpoints / "last.ckpt").write_bytes(content)
    with pytest.warns(UserWarning, match="last.ckpt is damaged: .*; looking for the one before"):
        assert newest_intact(checkpoints) == checkpoints / "previous.ckpt"
    (checkpoints / "last.ckpt").write_bytes(bytes(content[:1000]))
    with pytest.warns(UserWarning, match="last.ckpt is damaged: .*; looking for the one before"):
        assert newest_intact(checkpoints) == checkpoints / "previous.ckpt"


@pytest.mark.slow
def test_kill_9_in_mid_run_and_the_same_command_again_equal_the_uninterrupted_run(
    tmp_path: Path,
) -> None:
    typed = [sys.executable, "-m", "app.train", "averaging=ema", "accumulate=constant",
             "trainer.max_epochs=8", "callbacks.checkpoint.every_n_steps=5"]  # fmt: skip
    subprocess.run([*typed, "name=whole"], cwd=tmp_path, check=True, capture_output=True)
    for kills in range(2):
        with subprocess.Popen(
            [*typed, "name=killed"], cwd=tmp_path, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith(f"epoch {3 + 2 * kills}/8"):
                    time.sleep(0.05)
                    os.kill(process.pid, signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
    last = subprocess.run(
        [*typed, "name=killed"], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert "continuing from" in last.stdout
    whole, killed = (
        torch.load(tmp_path / "runs" / name / "checkpoints/last.ckpt", weights_only=True)
        for name in ("whole", "killed")
    )
    for one, other in ((whole, killed), (whole["raw"], killed["raw"])):
        for name, tensor in one["state_dict"].items():
            assert torch.equal(tensor, other["state_dict"][name]), name
    results = [
        json.loads((tmp_path / "runs" / name / "result.json").read_text())["metrics"]
        for name in ("whole", "killed")
    ]
    assert results[0] == results[1]
