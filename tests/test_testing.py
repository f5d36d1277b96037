"""The test after a fit draws the same numbers, however often it was begun."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from drawing import Model
from test_schedules import BASE

from app.fit import train
from app.record.folder import RunFolder
from app.run.evaluation import evaluate

DRAWING = (*BASE, "model._target_=drawing.Model", "data._target_=drawing.Data", "optimizer=sgd",
           "optimizer.lr=0.001", "trainer.max_epochs=2", "callbacks=early_stopping",
           "callbacks.progress=null")  # fmt: skip


@pytest.mark.parametrize("weights", ["best", "last"])
@pytest.mark.parametrize("workers", [0, 2])
def test_da_test_a_test_that_was_cut_equals_one_that_was_not(
    checked: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
    weights: str,
) -> None:
    def metrics(name: str, ends: str | None = None) -> Any:
        config = checked(
            *DRAWING, f"+data.workers={workers}", f"test={weights}", f"run_dir={tmp_path}/{name}"
        )
        folder = RunFolder(Path(config.run_dir))
        folder.path.mkdir(exist_ok=True)
        monkeypatch.setattr(Model, "ends", ends)
        if ends is None:
            return train(config, folder)["metrics"]
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            train(config, folder)
        return None

    whole = metrics("whole")
    for ends in ("inside", "before", "after"):
        metrics("cut", ends)
    assert metrics("cut") == whole
    folder = RunFolder(tmp_path / "whole")
    config = checked(*DRAWING, f"+data.workers={workers}", f"run_dir={tmp_path}/whole")
    evaluate(config, folder, stage="test", checkpoint=folder.checkpoints / f"{weights}.ckpt")
    evaluated = json.loads((folder.path / "test.json").read_text())["metrics"]
    assert evaluated["test_loss"] == whole["test_loss"]
