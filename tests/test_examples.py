"""The examples without Hydra do what they say."""

import json
import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def printed(*command: str | Path, cwd: Path, text: str = "") -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, input=text, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_script_trains_in_both_ways(tmp_path: Path) -> None:
    said = printed(EXAMPLES / "without_hydra.py", "2", cwd=tmp_path)
    assert "batch       micro-batch 32 x accumulation 2 x world size 1 = 64" in said
    assert said.splitlines()[-1].endswith("the weights are in `model`")
    assert (tmp_path / "runs/without_hydra/result.json").exists()


def test_the_cells_of_the_notebook_run_in_order(tmp_path: Path) -> None:
    """In one process without a file, as in Jupyter, which itself is not needed."""
    cells = json.loads((EXAMPLES / "notebook.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    said = printed("-W", "ignore", "-", cwd=tmp_path, text="\n\n".join(code))
    assert "averaging=emaa is not a preset; choose one of custom, ema, none, swa, uniform" in said
    assert (tmp_path / "runs/notebook/checkpoints/best.ckpt").exists()
