"""What the searches of the tuner cost: the micro-batch in trials and time, the learning rate.

Batch size: `search_batch_size` of mode model against mode binsearch, mode power and Lightning's
finder, without its margin. Memory is simulated: a probe reports its peak, or raises what CUDA
raises. Targets: mode model takes at most 6 trials in the median, where bisection takes 13, and 0.05
of bisection's time.

* Trials, and as a model of time the sum of the sizes tried, failures in full: over random memories,
  with limits of 1 to 8192, that are only computed.
* The same, the answers and the seconds by the clock: over memories of four limits, with real steps
  in proportion to the size, each trial with a `Trainer` or loop as in the tuner. A trial that fails
  has run a forward pass. Garbage collections, one for each trial of either, skip what was imported.
* Beside them what no exact search can go below: the answer and the size after it, alone.

Learning rate: `range_test` over the default model against as many steps of a bare Lightning
`Trainer`; target: at most 1.15 times that, in CPU seconds from the configuration on. Beside it
`Tuner.lr_find`, which also validates at the end of each epoch, and our garbage collection alone.

Run as `python benchmarks/tune.py`.
"""

import copy
import gc
import logging
import math
import random
import time
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from io import StringIO
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import torch
from hydra.utils import instantiate
from lightning.pytorch.tuner import Tuner
from presets import checked
from side_by_side import Contestant, cpu_seconds, in_turns, show, sized
from step import bare
from torch import Tensor, nn

from app.config import Config
from app.optim import configure_optimizers, optimizer_of
from app.run.build import build_model_and_data
from app.tuner.lr import range_test
from app.tuner.probe import Prober, release_memory
from app.tuner.search import Mode, Trial, search_batch_size

MB, GB = 2**20, 2**30
LIMITS = sized((37, 300, 1337, 5000), (37,))
CAPACITY = 16 * GB
NUM_RANDOM = sized(1000, 3)
FIRST, MAX, STEPS_PER_TRIAL = 2, sized(8192, 64), 2
FEATURES = 64
ROUNDS = 9
MODEL, BISECTION = "ours: model", "ours: binsearch"
FLOOR = "the answer and the next size alone"
MOST_TRIALS, TIME_TARGETS = 6, {MODEL: 0.05}
BARE, RANGE_TEST = "Lightning, bare", "ours: range_test"
LR_TARGETS = {RANGE_TEST: 1.15}

Memory = Callable[[int], int]
"""The peak, in bytes, of a size."""


# ---------------------------------------------------------------------------------- the batch size


def memory(
    share: Callable[[float], float], *, limit: int, block: int = 512, fixed: float = 0.2
) -> Memory:
    """Of which `limit` samples are the most that fit; a part is fixed, all comes in blocks.

    `share` of the rest is taken at a share of the limit: it rises to 1 at 1.
    """
    base, room = fixed * CAPACITY, (1 - fixed) * CAPACITY

    def peak(size: int) -> int:
        return math.ceil((base + room * share(size / (limit + 0.5))) / block) * block

    return peak


SHAPES = {
    "in proportion, in blocks of 2 MB": partial(memory, lambda x: x, block=2 * MB),
    "flat up to a third of the room": partial(memory, lambda x: max(x, 1 / 3)),
}


def random_memory(rng: random.Random) -> Memory:
    """Of a limit that is log-uniform; fixed part, blocks, kink and bend at random."""
    limit = int(2 ** rng.uniform(0, 13))
    kink = limit ** rng.uniform(0, 0.98) / limit
    bent, power = rng.uniform(0.05, 0.6), rng.uniform(1.2, 2.0)
    shapes: list[tuple[Callable[[float], float], int]] = [
        (lambda x: x, 512),
        (lambda x: x, 2 * MB),
        (lambda x: max(x, kink), 512),
        (lambda x: (1 - bent) * x + bent * x**power, 512),
    ]
    share, block = rng.choice(shapes)
    return memory(share, limit=limit, block=block, fixed=rng.uniform(0.02, 0.7))


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


def searched(probe: Callable[[int], Trial], mode: Mode) -> Search:
    """A search of ours, with the defaults of `tuner=batch_size`."""
    answer = search_batch_size(
        probe,
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


def ours(mode: Mode, peak: Memory, limit: int, folder: str) -> Search:
    """A search of ours with real steps."""
    return searched(probing(peak, folder), mode)


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


def computed() -> None:
    """Our searches over random memories, without a step."""
    rng = random.Random(0)
    searches: dict[str, list[Search]] = {BISECTION: [], MODEL: [], "ours: power": [], FLOOR: []}
    truth = []
    while len(truth) < NUM_RANDOM:
        peak = random_memory(rng)
        limit = bisect_right(range(1, MAX + 1), CAPACITY, key=peak)
        if limit in (0, MAX):
            continue

        def probe(size: int, peak: Memory = peak) -> Trial:
            fits = peak(size) <= CAPACITY
            peak_bytes = peak(size) if fits else None
            return Trial(size=size, fits=fits, peak_bytes=peak_bytes, samples_per_s=None)

        truth.append(limit)
        searches[BISECTION].append(searched(probe, "binsearch"))
        searches[MODEL].append(searched(probe, "model"))
        searches["ours: power"].append(searched(probe, "power"))
        searches[FLOOR].append(Search(answer=limit, tried=[limit, limit + 1]))
    show_trials(f"{NUM_RANDOM} random memories: trials", searches, truth)
    show_sizes(f"{NUM_RANDOM} random memories: sum of the sizes", searches)


def stepped() -> None:
    """Each search with real steps on each memory, in turns."""
    cases = [(limit, shape(limit=limit)) for limit in LIMITS for shape in SHAPES.values()]
    for search in SEARCHES.values():
        timed(search, cases[0][1], cases[0][0])  # warms up
    gc.freeze()  # as the program does once all is imported
    searches: dict[str, list[Search]] = {name: [] for name in SEARCHES}
    for number, (limit, peak) in enumerate(cases):
        for name in list(SEARCHES) if number % 2 == 0 else reversed(SEARCHES):
            searches[name].append(timed(SEARCHES[name], peak, limit))

    truth = [limit for limit, _ in cases]
    show_answers(searches, truth)
    title = f"{len(SHAPES)} memories of each limit"
    show_trials(f"{title}: trials", searches, truth)
    show_sizes(f"{title}: sum of the sizes", searches)
    seconds = {name: [s.seconds for s in found] for name, found in searches.items()}
    show(f"{title}: seconds", seconds, base=BISECTION, targets=TIME_TARGETS)


def show_sizes(title: str, searches: dict[str, list[Search]]) -> None:
    """Print the ratios of the sums of the sizes tried."""
    sums = {name: [float(sum(s.tried)) for s in found] for name, found in searches.items()}
    show(title, sums, base=BISECTION, targets=TIME_TARGETS)


def show_answers(searches: dict[str, list[Search]], truth: list[int]) -> None:
    """Print what each answered, under what is right."""
    print(f"\n{'largest that fits':<48}" + "".join(f"{limit:>12}" for limit in LIMITS))
    for name, found in searches.items():
        line = f"{name:<48}"
        for limit in LIMITS:
            answers = {s.answer for s, true in zip(found, truth, strict=True) if true == limit}
            line += f"{'/'.join(str(answer) for answer in sorted(answers, key=str)):>12}"
        print(line)


def show_trials(title: str, searches: dict[str, list[Search]], truth: Sequence[int]) -> None:
    """Print how many trials each took, how often it was exact, and how often its answer ran."""
    print(f"\n{title:<48}  median     min     max   exact     ran  target")
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


def settings_of(config: Config) -> Any:
    """Of a sweep that goes on to its last step."""
    settings = copy.copy(config.tuner.lr)
    settings.highest, settings.divergence = 0.1, math.inf
    return settings


def swept(config: Config) -> None:
    """Our range test."""
    settings = settings_of(config)
    base = config.optimizer.lr
    _, losses, _ = range_test(
        config, settings=settings, base=base, optimizer=None, from_now=False, callbacks=[]
    )
    assert len(losses) == settings.num_steps, len(losses)


def model_and_data(config: Config) -> tuple[pl.LightningModule, pl.LightningDataModule]:
    """Those of a run, with its optimizer."""
    model, data = build_model_and_data(config)
    make, _ = optimizer_of(config.plain["optimizer"], partial(instantiate, _convert_="all"))
    model.configure_optimizers = partial(configure_optimizers, model, make, None)
    return model, data


def trained(config: Config, **arguments: Any) -> None:
    """As many steps of a bare trainer."""
    steps = settings_of(config).num_steps
    model, data = model_and_data(config)
    with TemporaryDirectory() as folder:
        trainer = bare(folder, max_epochs=-1, max_steps=steps, limit_val_batches=0, **arguments)
        trainer.fit(model, datamodule=data)
    assert trainer.global_step == steps, trainer.global_step


def lightning_swept(config: Config) -> None:
    """Lightning's range test."""
    settings = settings_of(config)
    model, data = model_and_data(config)
    with TemporaryDirectory() as folder, redirect_stderr(StringIO()), redirect_stdout(StringIO()):
        found = Tuner(bare(folder, max_epochs=-1)).lr_find(
            model,
            datamodule=data,
            min_lr=settings.lowest,
            max_lr=settings.highest,
            num_training=settings.num_steps,
            early_stop_threshold=None,
            update_attr=False,
        )
    assert found is not None
    assert len(found.results["lr"]) == settings.num_steps, len(found.results["lr"])


def learning_rate() -> None:
    """The range tests and the bare steps, in turns."""
    chosen = ("tuner=lr_find", f"tuner.lr.num_steps={sized(150, 10)}")
    config, unclipped = checked(*chosen), checked(*chosen, "clip=none")
    works: dict[str, Callable[[], None]] = {
        BARE: partial(trained, config),
        RANGE_TEST: partial(swept, config),
        "ours: range_test, clip=none": partial(swept, unclipped),
        "Lightning, bare, gradient_clip_val": partial(trained, config, gradient_clip_val=1.0),
        "Lightning's: lr_find": partial(lightning_swept, config),
        "ours: garbage collection, alone": release_memory,
    }
    contestants: dict[str, Contestant] = {
        name: cpu_seconds(work, at_least=0.0) for name, work in works.items()
    }
    costs = in_turns(contestants, rounds=ROUNDS)
    steps = settings_of(config).num_steps
    title = f"{steps} steps of a range test"
    show(title, costs, base=BARE, targets=LR_TARGETS)
    print(f"{BARE}: {median(costs[BARE]):.3f} CPU s")


def main() -> None:
    """Measure both searches."""
    warnings.filterwarnings("ignore")  # Lightning's, of loaders and validation
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    computed()
    stepped()
    learning_rate()


if __name__ == "__main__":
    main()
