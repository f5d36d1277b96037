"""What `python -m app.train experiment=first` runs makes a step."""

import math
from pathlib import Path

from app.fit import run
from hydra import compose, initialize_config_module

ONE_STEP = ["trainer.max_steps=1", "trainer.accelerator=cpu", "logger=none"]


def test_the_first_experiment_trains_one_step(tmp_path: Path) -> None:
    typed = ["experiment=first", *ONE_STEP, "name=test", f"run_dir={tmp_path}/run"]
    with initialize_config_module("app.conf", version_base="1.3"):
        result = run(compose("train", typed), typed=typed)
    assert result is not None
    assert result["status"] == "finished"
    assert math.isfinite(result["metrics"]["test_loss"])
