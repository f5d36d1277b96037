"""A sweep of short jobs over two slots, and how long a job takes to begin; by the clock.

* Sixteen jobs of one epoch with `launch=local launch.slots=2` against Hydra's own launcher, which
  runs them one after another in its process; target on two idle cores: at most 0.6 of the time.
* Until a job's process has torch, Lightning and all of ours at hand: forked from a server that has
  imported them against a process started anew; target: at most 0.05 of the time.
* Composing the jobs of a sweep, to validate and to run them, against Hydra's own, in CPU seconds:
  sixteen values for each of three sets of presets; target: at most 0.35; and a set of its own for
  each job, which saves but the second time and the reading of files; target: at most 0.4.

Run as `python benchmarks/sweep.py`.
"""

import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import BaseContext
from pathlib import Path
from tempfile import TemporaryDirectory

from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.utils import setup_globals
from hydra.types import RunMode
from side_by_side import in_turns, show, sized

from app.cli import VERSION_BASE
from app.launch.local import PRELOADED
from app.sweep.composing import Composer

NUM_JOBS = sized(16, 2)
ROUNDS = 3
STARTS = 5
SWEEP = (
    "-m", f"seed=range({NUM_JOBS})", "trainer.max_epochs=1", "trainer.accelerator=cpu",
    "callbacks.progress=null", "logger=csv",
)  # fmt: skip
VALUES = [
    [f"averaging={averaging}", f"seed={seed}", "optimizer.lr=0.1"]
    for averaging in ("none", "ema", "swa")
    for seed in range(NUM_JOBS)
]
GRID = [
    [f"averaging={averaging}", f"clip={clip}", f"scheduler={scheduler}", "seed=1"]
    for averaging in sized(("none", "ema", "swa", "uniform"), ("none",))
    for clip in ("none", "norm", "value")
    for scheduler in ("none", "cosine", "linear")
]


def sweep(*typed: str) -> Callable[[], float]:
    """A contestant: seconds of a whole command."""

    def contestant() -> float:
        with TemporaryDirectory() as cwd:
            began = time.monotonic()
            command = [sys.executable, "-m", "app.train", *SWEEP, *typed]
            subprocess.run(command, cwd=cwd, check=True, capture_output=True)
            took = time.monotonic() - began
            assert len(list(Path(cwd).glob("multirun/*/*/*/result.json"))) == NUM_JOBS
        return took

    return contestant


def start(context: BaseContext) -> Callable[[], float]:
    """A contestant: seconds until a process has imported what a run needs."""

    def contestant() -> float:
        receiver, sender = context.Pipe(duplex=False)
        began = time.monotonic()
        process = context.Process(target=_import_all, args=(sender,))
        process.start()
        receiver.recv()
        took = time.monotonic() - began
        process.join()
        return took

    return contestant


def composing(jobs: Sequence[list[str]], *, ours: bool) -> Callable[[], float]:
    """A contestant: CPU seconds a job of composing all, and then all again."""

    def contestant() -> float:
        loader = ConfigLoaderImpl(create_config_search_path("pkg://app.conf"))
        config = loader.load_configuration("train", [], RunMode.MULTIRUN)
        made = Composer(loader) if ours else loader
        began = time.process_time()
        for job in jobs:
            made.load_sweep_config(config, job)
        for job in jobs:
            made.load_sweep_config(config, job)
        return (time.process_time() - began) / len(jobs)

    return contestant


def _import_all(sender: multiprocessing.connection.Connection) -> None:
    import app.run.build  # noqa: F401

    sender.send(True)


def main() -> None:
    """Measure all."""
    version.setbase(VERSION_BASE)
    setup_globals()
    for title, jobs, target in (("a job", VALUES, 0.35), ("a job of a grid of presets", GRID, 0.4)):
        composed = in_turns(
            {
                "Hydra composes": composing(jobs, ours=False),
                "ours": composing(jobs, ours=True),
            },
            rounds=ROUNDS,
        )
        for name, seconds in composed.items():
            print(f"{name}: {', '.join(f'{1000 * second:.1f}' for second in seconds)} ms a job")
        targets = {"ours": target}
        show(f"composing {title}", composed, base="Hydra composes", targets=targets)
    multiprocessing.set_forkserver_preload(PRELOADED)
    starts = in_turns(
        {
            "a process started anew": start(multiprocessing.get_context("spawn")),
            "forked from the server": start(multiprocessing.get_context("forkserver")),
        },
        rounds=STARTS,
    )
    targets = {"forked from the server": 0.05}
    show("a job begins", starts, base="a process started anew", targets=targets)
    sweeps = in_turns(
        {
            "Hydra's launcher": sweep(),
            "launch=local, two slots": sweep("launch=local", "launch.slots=2"),
        },
        rounds=ROUNDS,
    )
    for name, seconds in sweeps.items():
        print(f"{name}: {', '.join(f'{second:.1f}' for second in seconds)} s")
    targets = {"launch=local, two slots": 0.6}
    show(f"{NUM_JOBS} short jobs", sweeps, base="Hydra's launcher", targets=targets)


if __name__ == "__main__":
    main()
