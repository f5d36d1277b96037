"""Kills runs with -9 at random moments of their phases, and lets the same commands go on.

`python tests/killing.py FOLDER NUMBER SEED` prints a line of JSON a kill: what it hit, and which of
weights, metrics.csv and result.json then equal those of the run that was not cut. Runs are forked
from this process, which has imported torch.
"""

import json
import os
import random
import runpy
import signal
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

import app.run.build
import app.train  # noqa: F401

KILL = "APP_TEST_KILL"
COMMON = ("+callbacks.killer._target_=killing.Killer", "trainer.accelerator=cpu", "logger=csv",
          "callbacks.progress=null", "trainer.log_every_n_steps=3")  # fmt: skip
THEIRS = ("model=custom", "model._target_=theirs.LitModel", "data=custom",
          "data._target_=theirs.LitData", "+data.num_samples=97")  # fmt: skip
CONFIGURATIONS = (
    (*THEIRS, "optimizer=none", "averaging=ema", "accumulate=constant", "accumulate.factor=3",
     "clip=percentile", "callbacks.checkpoint.every_n_steps=4", "trainer.max_epochs=3"),
    (*THEIRS, "optimizer=sgd", "optimizer.lr=0.05", "scheduler=cosine", "averaging=swa",
     "averaging.start=1", "+data.workers=2", "clip=norm", "trainer.max_epochs=4",
     "averaging.anneal_epochs=1", "averaging.lr=0.01"),
    ("tuner=lr_find", "tuner.lr.num_steps=20", "tuner.cache=null", "averaging=uniform",
     "averaging.start_epoch=1", "data.batch_size=400", "trainer.max_epochs=4",
     "callbacks.checkpoint.every_n_steps=3"),
)  # fmt: skip
PHASES = {"train": 30, "validation": 4, "test": 2, "save": 6}
"""Phases, and how many of their beginnings a run has at least."""


class Killer(pl.Callback):
    """Kills its process a moment after the n-th beginning of a phase."""

    def __init__(self) -> None:
        phase, at, delay_s = os.environ.get(KILL, "none:0:0").split(":")
        self._moment, self._delay_s = (phase, int(at)), float(delay_s)
        self._begun: Counter[str] = Counter()

    def _begin(self, phase: str) -> None:
        self._begun[phase] += 1
        if (phase, self._begun[phase]) == self._moment:
            kill = threading.Timer(self._delay_s, os.kill, (os.getpid(), signal.SIGKILL))
            kill.daemon = True
            kill.start()

    def on_train_batch_start(self, *args: Any) -> None:
        self._begin("train")

    def on_validation_batch_start(self, *args: Any) -> None:
        self._begin("validation")

    def on_test_batch_start(self, *args: Any) -> None:
        self._begin("test")

    def on_save_checkpoint(self, *args: Any) -> None:
        self._begin("save")


def run(words: tuple[str, ...], kill: str) -> int:
    """Train in a fork; returns its exit code, negative where a signal ended it."""
    child = os.fork()
    if child == 0:
        log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ[KILL] = kill
        sys.argv = ["train", *words]
        code: Any = 1
        try:
            runpy.run_module("app.train", run_name="__main__", alter_sys=True)
            code = 0
        except SystemExit as stop:
            code = stop.code
        finally:
            os._exit(code or 0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def left_by(name: str) -> dict[str, Any]:
    """What a run came to."""
    folder = Path("runs") / name
    result = json.loads((folder / "result.json").read_text())
    for key in ("seconds", "name", "checkpoints", "continued_after"):
        del result[key]
    return {
        "weights": torch.load(folder / "checkpoints/last.ckpt", weights_only=True),
        "metrics.csv": (folder / "metrics.csv").read_text(),
        "result.json": result,
    }


def is_same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(is_same, one, other))
    return bool(one == other)


def main(folder: str, number: int, seed: int) -> None:
    os.chdir(folder)
    torch.set_num_threads(1)
    draw = random.Random(seed)
    for index, words in enumerate(CONFIGURATIONS):
        assert run((*COMMON, *words, f"name=whole-{index}"), "none:0:0") == 0
        whole = left_by(f"whole-{index}")
        for count in range(number):
            name = f"cut-{index}-{count}"
            typed = (*COMMON, *words, f"name={name}")
            phase = list(PHASES)[count % len(PHASES)]
            moment = f"{phase}:{draw.randint(1, PHASES[phase])}:{draw.uniform(0, 0.01):.4f}"
            code = run(typed, moment)
            finishes = run(typed, "none:0:0")
            found = left_by(name)
            same = {key: is_same(whole[key], found[key]) for key in whole}
            told = {"configuration": index, "moment": moment, "killed": code == -signal.SIGKILL}
            print(json.dumps({**told, "finishes": finishes, **same}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
