"""`app.report` on a thousand runs; by the clock.

The whole command, its table, pictures and files included, against only loading the files of the
runs that it reads, with libyaml, csv and json; target: at most 4 times that, and under 10 s.

Run as `python benchmarks/report.py`.
"""

import csv
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml
from side_by_side import in_turns, show, sized

NUM_RUNS = sized(1000, 10)
SEEDS = 5
ROUNDS = 5
RUN = (
    "hydra.run.dir=run", "seed=1", "optimizer.lr=0.2", "trainer.max_epochs=2", "logger=csv",
    "trainer.accelerator=cpu", "callbacks.progress=null",
)  # fmt: skip


def write_runs(folder: Path) -> None:
    """A real run, and copies of its folder of other seeds and learning rates."""
    subprocess.run(
        [sys.executable, "-m", "app.train", *RUN], cwd=folder, check=True, capture_output=True
    )
    config = (folder / "run/config.yaml").read_text()
    for number in range(NUM_RUNS):
        copy = folder / "runs" / str(number)
        copy.mkdir(parents=True)
        for name in ("overrides.yaml", "result.json", "metrics.csv"):
            shutil.copy(folder / "run" / name, copy)
        changed = config.replace("seed: 1\n", f"seed: {number % SEEDS}\n")
        changed = changed.replace("lr: 0.2\n", f"lr: {number // SEEDS}.5\n")
        (copy / "config.yaml").write_text(changed)


def load(folder: Path) -> float:
    """Seconds of loading each file of each run."""
    began = time.monotonic()
    for run in (folder / "runs").iterdir():
        if run.is_dir():
            for name in ("config.yaml", "overrides.yaml"):
                yaml.load((run / name).read_text(), yaml.CSafeLoader)
            json.loads((run / "result.json").read_text())
            with (run / "metrics.csv").open(newline="") as lines:
                list(csv.DictReader(lines))
    return time.monotonic() - began


def report(folder: Path) -> float:
    """Seconds of the command."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "app.report", "runs"],
        cwd=folder, check=True, capture_output=True, text=True,
    )  # fmt: skip
    took = time.monotonic() - began
    first = f"{NUM_RUNS} runs ({NUM_RUNS} finished) of {NUM_RUNS // SEEDS} configurations"
    assert first in done.stdout
    return took


def main() -> None:
    """Measure."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_runs(folder)
        costs = in_turns(
            {"loading their files": lambda: load(folder), "app.report": lambda: report(folder)},
            rounds=ROUNDS,
        )
    print(f"app.report: {', '.join(f'{second:.2f}' for second in costs['app.report'])} s")
    show(f"{NUM_RUNS} runs", costs, base="loading their files", targets={"app.report": 4})


if __name__ == "__main__":
    main()
