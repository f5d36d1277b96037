"""What whole processes cost: short commands, the way to the first step, a short job.

* `--cfg job`, TAB and `--help` against `import hydra`; targets: at most 2, 1.3 and 4 times that.
* Up to the first optimizer step of the default run against the same model, data and batch in torch
  alone; target: at most 1.4 times that.
* A whole job of two epochs with its test against the same job as the lightning-hydra-template's
  users write it (`peers/eager_lightning.py`); target: at most 0.65 of it.

* The same job in two processes against Lightning's ddp, which starts the script once more for each.

Each is measured in CPU seconds of the process, which other programs leave alone, and by the clock;
several processes by the clock alone. The targets are for CPU seconds. One thread each. Run as
`python benchmarks/startup.py`.
"""

import os
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from side_by_side import SMALLEST, in_turns, show, sized

ROUNDS = 5
HERE = Path(__file__).parent
PEERS = HERE / "peers"
DATA = HERE.parent / "src" / "app" / "data" / "mnist1d.npz"
OURS = ("-m", "app.train")
CSV_ALONE = () if find_spec("tensorboard") else ("~logger.tensorboard",)
EAGER = (str(PEERS / "eager_lightning.py"), f"data.path={DATA}", *CSV_ALONE)
EPOCHS = "trainer.max_epochs=2"
FIRST = "+callbacks.first._target_=first_step.FirstStep"
TAB = ("-sc", "query=bash")

COMMANDS = {
    "import hydra": ("-c", "import hydra"),
    "ours: --cfg job": (*OURS, "--cfg", "job"),
    "ours: TAB": (*OURS, *TAB),
    "ours: --help": (*OURS, "--help"),
    "eager: --cfg job": (*EAGER, "--cfg", "job"),
    "eager: TAB": (*EAGER[:1], *TAB),
    "eager: --help": (*EAGER, "--help"),
}
FIRST_STEP = {
    "torch alone": (str(PEERS / "raw_torch.py"), str(DATA)),
    "ours": (*OURS, FIRST, "{run_dir}"),
    "ours, logger=none": (*OURS, FIRST, "{run_dir}", "logger=none"),
    "eager": (*EAGER, FIRST, "{run_dir}"),
}
JOB = {
    "eager": (*EAGER, EPOCHS, "{run_dir}"),
    "ours": (*OURS, EPOCHS, "{run_dir}"),
    "ours, logger=none": (*OURS, EPOCHS, "{run_dir}", "logger=none"),
}
RANKS = ("trainer.devices=2", "trainer.accelerator=cpu")
JOB_OF_TWO = {
    "eager, Lightning's ddp": (*EAGER, EPOCHS, "{run_dir}", *RANKS, "+trainer.strategy=ddp"),
    "ours, ddp": (*OURS, EPOCHS, "{run_dir}", *RANKS, "strategy=ddp"),
    "ours, ddp_spawn": (*OURS, EPOCHS, "{run_dir}", *RANKS, "strategy=ddp_spawn"),
}


class Process:
    """A command of a fresh interpreter: its CPU seconds, and `seconds` of each call by the clock.

    `{run_dir}` becomes an override with an empty folder.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        self.arguments = arguments
        self.seconds: list[float] = []

    def __call__(self) -> float:
        with TemporaryDirectory() as folder:
            run_dir = f"hydra.run.dir={folder}/run"
            command = [sys.executable, *(a.format(run_dir=run_dir) for a in self.arguments)]
            before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
            done = subprocess.run(
                command, env=environment(), cwd=HERE.parent, capture_output=True, text=True
            )
            self.seconds.append(time.monotonic() - started)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def environment() -> dict[str, str]:
    """What all run in: one thread, `first_step` within reach, a line to complete."""
    path = os.pathsep.join([str(PEERS), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    given = {"COMP_LINE": "app.train clip=", "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    # its sources are compiled once, as pip does it for those that it installs
    others = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return {**others, **given, "PYTHONPATH": path}


def compare(
    title: str, commands: Mapping[str, Sequence[str]], targets: Mapping[str, float]
) -> None:
    """Run the commands in turns; show their ratios to the first one."""
    some = list(commands.items())[: sized(None, 2)]
    processes = {name: Process(arguments) for name, arguments in some}
    costs = in_turns(processes, rounds=ROUNDS)
    base = next(iter(commands))
    if commands is not JOB_OF_TWO:  # of which some processes are not this one's children
        show(f"{title}, CPU seconds", costs, base=base, targets=targets)
    clock = {name: process.seconds[-len(costs[base]) :] for name, process in processes.items()}
    show(f"{title}, by the clock", clock, base=base, targets={})


def main() -> None:
    """Measure the three."""
    targets = {"ours: --cfg job": 2, "ours: TAB": 1.3, "ours: --help": 4}
    compare("short commands", COMMANDS, targets)
    compare("to the first optimizer step", FIRST_STEP, {"ours": 1.4})
    compare("a job of two epochs", JOB, {"ours": 0.65})
    if not SMALLEST:
        compare("a job of two epochs in two processes", JOB_OF_TWO, {})


if __name__ == "__main__":
    main()
