"""What being ready for a signal adds to a training step of two ranks, which have to agree on it.

A rank that was asked to stop has to know that the others stop after the same step, so they ask
each other: for 1 % of the time, and at least every half second. Target: at most 1.03 times the
steps of a fit that heeds no signals. Beside it: asking at every step. (A process alone asks nobody:
Lightning passes over the hook until there is a signal.)

A cost is the seconds, by the clock, of a block of steps of one fit, in which the contestants take
turns: a small MLP, batch 64, on the CPU. Run as `python benchmarks/signals.py`.
"""

import logging
import math
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from side_by_side import show, sized
from step import BATCH, Model, bare

from app.launch.local import run_local
from app.stop import signals

ROUNDS = sized(90, 1)
BLOCK = sized(200, 2)
"""Steps before the next one's turn."""
TARGET = 1.03
WITHOUT, OURS, EVERY = "heeds no signal", "ours", "asks at every step"
SHARES = {WITHOUT: None, OURS: signals.SHARE_OF_TIME, EVERY: math.inf}
"""Of the time that may be spent on asking."""


class TakesTurns(pl.Callback):
    """Lets one contestant at a time heed signals."""

    def __init__(self) -> None:
        self.contestants = {
            name: None if share is None else signals.StopsOnSignal()
            for name, share in SHARES.items()
        }
        self.heeds: pl.Callback | None = None

    def on_train_start(self, *args: Any) -> None:
        for contestant in filter(None, self.contestants.values()):
            contestant.on_train_start(*args)

    def on_train_batch_end(self, *args: Any) -> None:
        if self.heeds is not None:
            self.heeds.on_train_batch_end(*args)

    def turn(self, name: str) -> None:
        """Of the contestant of this name, from here on."""
        self.heeds = self.contestants[name]
        signals.SHARE_OF_TIME = SHARES[name] or 0.0


class Batches:
    """Serves batches made before; notes the seconds of each contestant's blocks."""

    def __init__(self, turns: TakesTurns) -> None:
        self.turns = turns
        self.batches = [(torch.randn(BATCH, 40), torch.randint(10, (BATCH,))) for _ in range(50)]
        self.costs: Mapping[str, list[float]] = {name: [] for name in SHARES}

    def __iter__(self) -> Iterator[Any]:
        order = list(SHARES)
        for number in range(ROUNDS + 1):
            for name in order:
                self.turns.turn(name)
                start = time.perf_counter()
                for index in range(BLOCK):
                    yield self.batches[index % len(self.batches)]
                if number > 0:
                    self.costs[name].append(time.perf_counter() - start)
            order.reverse()


def measured() -> Mapping[str, list[float]]:
    """In each rank: the seconds of every block."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    turns = TakesTurns()
    batches = Batches(turns)
    trainer = bare(
        "",
        strategy=DDPStrategy(process_group_backend="gloo"),
        devices=2,
        plugins=[TorchElasticEnvironment()],
        callbacks=[turns],
    )
    trainer.fit(Model(logs=False), batches)
    return batches.costs


def main() -> None:
    """Measure, and show what rank 0 has noted."""
    costs = run_local(measured, num_processes=2, start_method="spawn", logging_config=None)
    show("steps of two ranks", costs, base=WITHOUT, targets={OURS: TARGET})
    print(f"a step takes {1000 * min(costs[WITHOUT]) / BLOCK:.2f} ms")


if __name__ == "__main__":
    main()
