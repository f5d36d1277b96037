"""Memory of four processes over one data set of 1 GB, each way of holding it, in each way shared.

Printed are the PSS of the parent and its four processes, after each has read every page, above that
of the same processes with hardly any data, in GB; the private part of it; and the seconds until all
have read. PSS counts a page that n processes map as 1/n in each. Target: at most 1.1 GB with
sharing=shared and sharing=mmap, where every process on its own holds 4 (the parent has none).

First four bare processes, then whole commands of `app.train` with four ranks, all their processes
counted. Run as `python benchmarks/sharing.py`, or with a smaller size in GB: `... sharing.py 0.25`.
"""

import gc
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.multiprocessing as mp
from side_by_side import sized

from app.sharing import Mmap, Shared

KINDS = sized(("tensor", "numpy", "list"), ("tensor",))
MODES = sized(("none", "shared", "mmap"), ("shared",))
NUM_PROCESSES = sized(4, 2)
ITEM_BYTES = 4096
TARGET_GB = 1.1
SETTINGS = {"key": None, "min_bytes": 1024, "min_items": 1000}


class Data(pl.LightningDataModule):
    """Holds `num_bytes`, as one tensor, one array, or a list of arrays of 4 KB."""

    def __init__(self, *, kind: str, num_bytes: int) -> None:
        super().__init__()
        self.kind = kind
        self.num_bytes = num_bytes

    def setup(self, stage: str) -> None:
        shape = (self.num_bytes // ITEM_BYTES, ITEM_BYTES // 4)
        if self.kind == "tensor":
            self.train: Any = torch.ones(shape)
        elif self.kind == "numpy":
            self.train = np.ones(shape, np.float32)
        else:
            self.train = [np.full(shape[1], index % 7, np.float32) for index in range(shape[0])]

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.zeros(32, 4), batch_size=4)

    def read(self) -> float:
        """Read every page."""
        if self.kind == "list":
            return float(sum(item[0] for item in self.train))
        return float(self.train[:, 0].sum())


def memory(pid: int | str) -> dict[str, float]:
    """PSS and private bytes of a process."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    private = sizes["Private_Clean"] + sizes["Private_Dirty"]
    return {"pss": sizes["Pss"], "private": private}


def made(mode: str, about: Mapping[str, Any], cache: str) -> tuple[Data, Any, dict[str, Any]]:
    """The data module, how it is shared, and the configuration of both."""
    data = Data(**about)
    kinds: dict[str, Any] = {"shared": Shared, "mmap": Mmap}
    sharing = kinds[mode](cache=cache, **SETTINGS) if mode in kinds else None
    return data, sharing, {"data": about, "sharing": SETTINGS}


def work(rank: int, mode: str, about: dict[str, Any], cache: str, packs: Any, ready: Any) -> None:
    """One of the processes."""
    data, sharing, config = made(mode, about, cache)
    if packs is not None:
        Shared.give(packs)
    if sharing is not None:
        sharing.attach(data, config)
    data.setup("fit")
    data.read()
    gc.collect()
    ready.wait()  # all have read
    ready.wait()  # all are measured


def measure(mode: str, kind: str, num_bytes: int) -> dict[str, float]:
    """Start the processes, and measure them when all have read."""
    about = {"kind": kind, "num_bytes": num_bytes}
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["sharing", "app.sharing"])
    with tempfile.TemporaryDirectory(dir=".", prefix=".sharing-") as cache:
        start_server(context)
        start, packs = time.perf_counter(), None
        ready = context.Barrier(NUM_PROCESSES + 1)
        if mode == "shared":
            data, sharing, config = made(mode, about, cache)
            packs = sharing.collect(data, config, stages=["fit"], num_processes=NUM_PROCESSES)
            del data
        arguments = (mode, about, cache, packs, ready)
        processes = [context.Process(target=work, args=(n, *arguments)) for n in range(4)]
        for process in processes:
            process.start()
        ready.wait()
        seconds = time.perf_counter() - start
        sizes = [memory(pid) for pid in ("self", *(process.pid for process in processes))]
        ready.wait()
        for process in processes:
            process.join()
    total = {name: sum(size[name] for size in sizes) for name in sizes[0]}
    return {**total, "seconds": seconds}


def start_server(context: Any) -> None:
    """Let the server have its modules before the clock starts."""
    process = context.Process(target=time.sleep, args=(0,))
    process.start()
    process.join()


class Tiny(pl.LightningModule):
    """A model for whole runs over `Data`."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(4, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.net(batch).mean()


class Measure(pl.Callback):
    """Writes, when every rank has read all, the memory of all processes of the command."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.datamodule.read()  # type: ignore[attr-defined]
        gc.collect()
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            sizes = [memory(pid) for pid in processes_of(os.getsid(0))]
            total = {name: sum(size[name] for size in sizes) for name in sizes[0]}
            self.path.write_text(json.dumps({**total, "seconds": time.time()}))
        trainer.strategy.barrier()


def processes_of(session: int) -> list[int]:
    """The processes that one command has started, and it itself."""
    pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    return [pid for pid in pids if os.path.exists(f"/proc/{pid}") and os.getsid(pid) == session]


def whole_run(strategy: str, mode: str, kind: str, num_bytes: int) -> dict[str, float]:
    """The memory of a whole command of `app.train` with a rank for each process."""
    with tempfile.TemporaryDirectory(dir=".", prefix=".sharing-") as folder:
        found = Path(folder, "found.json").absolute()
        chosen = [f"sharing={mode}"]
        if mode != "none":
            chosen += [f"sharing.{key}={value}" for key, value in SETTINGS.items() if value]
        command = [
            sys.executable, "-m", "app.train", *chosen, f"strategy={strategy}",
            f"trainer.devices={NUM_PROCESSES}", "trainer.accelerator=cpu", "trainer.max_epochs=1",
            "trainer.limit_val_batches=0", "test=none", "logger=none", "callbacks.checkpoint=null",
            "model=custom", "model._target_=sharing.Tiny", "optimizer=sgd", "data=custom",
            "data._target_=sharing.Data", f"+data.kind={kind}", f"+data.num_bytes={num_bytes}",
            "+callbacks.measure._target_=sharing.Measure", f"+callbacks.measure.path={found}",
        ]  # fmt: skip
        path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        start = time.time()
        subprocess.run(
            command,
            check=True,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            start_new_session=True,
        )
        sizes: dict[str, float] = json.loads(found.read_text())
    return {**sizes, "seconds": sizes["seconds"] - start}


def in_a_process(mode: str, kind: str, num_bytes: int) -> dict[str, float]:
    """Measure in a process of its own: nothing is left of the case before."""
    command = [sys.executable, __file__, "--measure", mode, kind, str(num_bytes)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, float] = json.loads(output.splitlines()[-1])
    return found


def main() -> None:
    """Measure each kind and mode."""
    if sys.argv[1:2] == ["--measure"]:
        logging.disable()
        mode, kind, num_bytes = sys.argv[2:]
        print(json.dumps(measure(mode, kind, int(num_bytes))))
        return
    typed = [word for word in sys.argv[1:] if word[0] != "-"]
    num_gb = float(typed[0]) if typed else sized(1.0, 0.01)
    print(f"{num_gb:g} GB, {NUM_PROCESSES} processes     PSS GB  private GB  seconds  target")
    compare("", in_a_process, num_gb)
    for strategy in sized(("ddp", "ddp_spawn"), ("ddp",)):
        compare(strategy, partial(whole_run, strategy), num_gb)


def compare(title: str, measured: Callable[..., dict[str, float]], num_gb: float) -> None:
    """Print a line for each kind and mode."""
    for kind in KINDS:
        base = measured("none", kind, 1000 * ITEM_BYTES)
        for mode in MODES:
            found = measured(mode, kind, int(num_gb * 2**30))
            pss, private = ((found[name] - base[name]) / 2**30 for name in ("pss", "private"))
            line = f"{title:<10}{kind:<7}{mode:<7}{pss:>10.2f}{private:>12.2f}"
            line += f"{found['seconds']:>9.1f}"
            if mode != "none":
                target = TARGET_GB * num_gb
                line += f"  <= {target:.2f}  {'met' if pss <= target else 'MISSED'}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
