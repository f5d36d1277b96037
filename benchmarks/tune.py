"""What the searches of the tuner cost: the micro-batch in trials and time, the learning rate.

Batch size: `search_batch_size` of mode model against mode binsearch, mode power and Lightning's
finder, without its margin. Memory is simulated, in shapes as of real models: a probe reports its
peak or raises what CUDA raises. Its time is real: a `Trainer` of its own, and steps in proportion
to the size; one that fails has run a forward pass. Targets: mode model takes at most 6 trials in
the median, where bisection takes 13, and 0.05 of bisection's time. Time is told as the sum of the
sizes probed, failures in full, and by the clock, trainers and garbage collection included. Beside
them what no exact search can go below: the answer and the size after it, alone.

Learning rate: `range_test` over the default model against as many steps of a bare Lightning
`Trainer`; target: at most 1.15 times that, in CPU seconds from the configuration on. Beside it
`Tuner.lr_find`, which also validates at the end of each epoch.

Run as `python benchmarks/tune.py`.
"""

import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from io import StringIO
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from lightning.pytorch.tuner import Tuner
from side_by_side import Contestant, cpu_seconds, in_turns, show
from step import bare
from torch import Tensor, nn

from app.build import build_model_and_data
from app.check import check
from app.optim import configure_optimizers
from app.tuner.batch_size import Prober
from app.tuner.lr import range_test
from app.tuner.search import Mode, Trial, search_batch_size

MB, GB = 2**20, 2**30
LIMITS = (37, 300, 1337, 5000)
CAPACITY, FIXED = 16 * GB, 3 * GB
FIRST, MAX, STEPS_PER_TRIAL = 2, 8192, 2
FEATURES = 64
ROUNDS = 15
MODEL, BISECTION = "ours: model", "ours: binsearch"
FLOOR = "the answer and the next size alone"
MOST_TRIALS, TIME_TARGETS = 6, {MODEL: 0.05}
BARE, RANGE_TEST = "Lightning, bare", "ours: range_test"
LR_TARGETS = {RANGE_TEST: 1.15}

Memory = Callable[[int], int]
"""The peak, in bytes, of a size."""


# ---------------------------------------------------------------------------------- the batch size


def memory(share: Callable[[float], float], block: int, limit: int) -> Memory:
    """Of which `limit` samples are the most that fit; allocated in blocks."""
    room = CAPACITY - FIXED

    def peak(size: int) -> int:
        return math.ceil((FIXED + room * share(size / (limit + 0.5))) / block) * block

    return peak


SHAPES = {
    "in proportion": partial(memory, lambda x: x, 512),
    "in proportion, blocks of 2 MB": partial(memory, lambda x: x, 2 * MB),
    "flat up to a third of the room": partial(memory, lambda x: max(x, 1 / 3), 512),
    "half of it squared": partial(memory, lambda x: (x + x * x) / 2, 512),
}


class Batches:
    """As many batches of a size as a trial has steps; slices of what was made before."""

    rows = torch.randn(MAX, FEATURES)

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return STEPS_PER_TRIAL

    def __iter__(self) -> Iterator[Tensor]:
        for _ in range(len(self)):
            yield self.rows[: self.size]


class Simulated(pl.LightningModule):
    """Computes in proportion to the size, and runs out of a memory that it does not use."""

    def __init__(self, peak: Memory, batch_size: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(FEATURES, 512), nn.ReLU(), nn.Linear(512, 1))
        self.peak = peak
        self.batch_size = batch_size
        self.tried: list[int] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if batch_idx == 0:
            self.tried.append(len(batch))
        loss = self.net(batch).square().mean()
        if self.peak(len(batch)) > CAPACITY:
            raise RuntimeError("CUDA out of memory.")
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)

    def train_dataloader(self) -> Batches:
        return Batches(self.batch_size)


@dataclass(kw_only=True)
class Search:
    """What one search answered, the sizes it probed, and its seconds by the clock."""

    answer: int | None
    tried: list[int]
    seconds: float = 0.0


def probing(peak: Memory, folder: str) -> Callable[[int], Trial]:
    """Our probe, over a trainer that is like Lightning's; reports the simulated peak."""

    def attempt(size: int) -> None:
        bare(folder, max_steps=STEPS_PER_TRIAL).fit(Simulated(peak, size))

    prober = Prober(attempt=attempt, on_gpu=False, memory_fraction=1.0)

    def probe(size: int) -> Trial:
        trial = prober(size)
        return replace(trial, peak_bytes=peak(size) if trial.fits else None)

    return probe


def ours(mode: Mode, peak: Memory, limit: int, folder: str) -> Search:
    """A search of ours, with the defaults of `tuner=batch_size`."""
    answer = search_batch_size(
        probing(peak, folder),
        mode=mode,
        init_val=FIRST,
        max_val=MAX,
        num_samples=None,
        divisors_of=None,
        max_trials=25,
        margin=0.0,
        capacity_bytes=CAPACITY,
        goal="largest",
        provoke=True,
    )
    return Search(answer=answer.size, tried=[trial.size for trial in answer.trials])


def lightnings(mode: str, peak: Memory, limit: int, folder: str) -> Search:
    """Lightning's search, with its defaults but for the margin."""
    model = Simulated(peak, FIRST)
    found = Tuner(bare(folder)).scale_batch_size(
        model,
        mode=mode,
        steps_per_trial=STEPS_PER_TRIAL,
        init_val=FIRST,
        margin=0.0,
        max_val=MAX,
    )
    return Search(answer=found, tried=model.tried)


def proof(peak: Memory, limit: int, folder: str) -> Search:
    """The two trials that show that an answer is the largest, by one who knows it."""
    probe = probing(peak, folder)
    fits = [probe(size).fits for size in (limit, limit + 1)]
    assert fits == [True, False], f"the simulated limit is not {limit}"
    return Search(answer=limit, tried=[limit, limit + 1])


SEARCHES = {
    BISECTION: partial(ours, "binsearch"),
    MODEL: partial(ours, "model"),
    "ours: power": partial(ours, "power"),
    "Lightning's: binsearch": partial(lightnings, "binsearch"),
    "Lightning's: power": partial(lightnings, "power"),
    FLOOR: proof,
}


def timed(search: Callable[[Memory, int, str], Search], peak: Memory, limit: int) -> Search:
    """A search, and its seconds."""
    with TemporaryDirectory() as folder:
        start = time.perf_counter()
        found = search(peak, limit, folder)
        found.seconds = time.perf_counter() - start
    return found


def batch_size() -> None:
    """Each search on each memory, in turns."""
    for search in SEARCHES.values():
        timed(search, SHAPES["in proportion"](LIMITS[0]), LIMITS[0])  # warms up
    cases = [(limit, shape) for limit in LIMITS for shape in SHAPES]
    searches: dict[str, list[Search]] = {name: [] for name in SEARCHES}
    for number, (limit, shape) in enumerate(cases):
        for name in list(SEARCHES) if number % 2 == 0 else reversed(SEARCHES):
            searches[name].append(timed(SEARCHES[name], SHAPES[shape](limit), limit))

    truth = [limit for limit, _ in cases]
    show_answers(searches, truth)
    show_trials(searches, truth)
    sizes = {name: [float(sum(s.tried)) for s in found] for name, found in searches.items()}
    seconds = {name: [s.seconds for s in found] for name, found in searches.items()}
    show("batch size: sum of the sizes probed", sizes, base=BISECTION, targets=TIME_TARGETS)
    show("batch size: seconds by the clock", seconds, base=BISECTION, targets=TIME_TARGETS)
    largest = [position for position, limit in enumerate(truth) if limit == LIMITS[-1]]
    show(
        f"the same, of the {len(largest)} memories for {LIMITS[-1]}",
        {name: [found[position] for position in largest] for name, found in seconds.items()},
        base=BISECTION,
        targets={},
    )


def show_answers(searches: dict[str, list[Search]], truth: list[int]) -> None:
    """Print what each answered, by what is the largest that fits."""
    print(f"{'batch size: answers':<48}" + "".join(f"{limit:>12}" for limit in LIMITS))
    for name, found in searches.items():
        line = f"{name:<48}"
        for limit in LIMITS:
            answers = {s.answer for s, true in zip(found, truth, strict=True) if true == limit}
            line += f"{'/'.join(str(answer) for answer in sorted(answers, key=str)):>12}"
        print(line)


def show_trials(searches: dict[str, list[Search]], truth: list[int]) -> None:
    """Print how many trials each took, how often it was exact, and how often its answer ran."""
    print(f"\n{'batch size: trials':<48}  median     min     max   exact     ran  target")
    for name, found in searches.items():
        trials = [len(s.tried) for s in found]
        exact = sum(s.answer == true for s, true in zip(found, truth, strict=True))
        ran = sum(s.answer in s.tried and s.answer <= t for s, t in zip(found, truth, strict=True))
        line = f"{name:<48}  {median(trials):>6g}  {min(trials):>6}  {max(trials):>6}"
        line += "".join(f"  {f'{number}/{len(truth)}':>6}" for number in (exact, ran))
        if name == MODEL:
            verdict = "met" if median(trials) <= MOST_TRIALS else "MISSED"
            line += f"  <= {MOST_TRIALS}  {verdict}"
        print(line, flush=True)


# ------------------------------------------------------------------------------- the learning rate


def configuration(*overrides: str) -> dict[str, Any]:
    """The default run with the finder of the learning rate, composed and checked."""
    typed = ("run_dir=unused", "name=unused", "trainer.accelerator=cpu", "tuner=lr_find")
    with initialize_config_module("app.conf", version_base="1.3"):
        return check(compose("train", [*typed, *overrides]))


def settings_of(config: dict[str, Any]) -> dict[str, Any]:
    """Of a sweep that goes on to its last step."""
    settings: dict[str, Any] = config["tuner"]["lr"]
    return {**settings, "highest": 0.1, "divergence": math.inf}


def swept(config: dict[str, Any]) -> None:
    """Our range test."""
    settings = settings_of(config)
    base = config["optimizer"]["lr"]
    _, losses, _ = range_test(
        config, settings=settings, base=base, optimizer=None, from_now=False, callbacks=[]
    )
    assert len(losses) == settings["num_steps"], len(losses)


def model_and_data(config: dict[str, Any]) -> tuple[pl.LightningModule, pl.LightningDataModule]:
    """Those of a run, with its optimizer."""
    model, data = build_model_and_data(config)
    make = instantiate(config["optimizer"], _convert_="all")
    model.configure_optimizers = partial(configure_optimizers, model, make, None)
    return model, data


def trained(config: dict[str, Any], **arguments: Any) -> None:
    """As many steps of a bare trainer."""
    steps = settings_of(config)["num_steps"]
    model, data = model_and_data(config)
    with TemporaryDirectory() as folder:
        trainer = bare(folder, max_epochs=-1, max_steps=steps, limit_val_batches=0, **arguments)
        trainer.fit(model, datamodule=data)
    assert trainer.global_step == steps, trainer.global_step


def lightning_swept(config: dict[str, Any]) -> None:
    """Lightning's range test."""
    settings = settings_of(config)
    model, data = model_and_data(config)
    with TemporaryDirectory() as folder, redirect_stderr(StringIO()), redirect_stdout(StringIO()):
        found = Tuner(bare(folder, max_epochs=-1)).lr_find(
            model,
            datamodule=data,
            min_lr=settings["lowest"],
            max_lr=settings["highest"],
            num_training=settings["num_steps"],
            early_stop_threshold=None,
            update_attr=False,
        )
    assert found is not None
    assert len(found.results["lr"]) == settings["num_steps"], len(found.results["lr"])


def learning_rate() -> None:
    """The range tests and the bare steps, in turns."""
    config = configuration()
    unclipped = configuration("clip=none")
    works: dict[str, Callable[[], None]] = {
        BARE: partial(trained, config),
        RANGE_TEST: partial(swept, config),
        "ours: range_test, clip=none": partial(swept, unclipped),
        "Lightning, bare, gradient_clip_val": partial(trained, config, gradient_clip_val=1.0),
        "Lightning's: lr_find": partial(lightning_swept, config),
    }
    contestants: dict[str, Contestant] = {
        name: cpu_seconds(work, at_least=0.0) for name, work in works.items()
    }
    costs = in_turns(contestants, rounds=ROUNDS)
    steps = settings_of(config)["num_steps"]
    title = f"{steps} steps of a range test"
    show(title, costs, base=BARE, targets=LR_TARGETS)
    print(f"{BARE}: {median(costs[BARE]):.3f} CPU s")


def main() -> None:
    """Measure both searches."""
    warnings.filterwarnings("ignore")  # Lightning's, of loaders and validation
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    batch_size()
    learning_rate()


if __name__ == "__main__":
    main()
