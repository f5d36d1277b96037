"""What must hold for a row, a function a column. Each raises where it does not."""

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from conftest import presets_of
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from killing import is_same
from torch import Tensor
from torch.utils._pytree import tree_leaves

from app.config import Config, check
from app.fit import train
from app.launch.local import run_local
from app.record.folder import RunFolder
from app.run.build import build
from app.run.evaluation import evaluate
from app.tuner.find import find
from zoo import models
from zoo.table import Row

COMMON = ("model=custom", "optimizer=none", "clip=none", "callbacks.progress=null", "logger=csv",
          "trainer.accelerator=cpu", "trainer.devices=1", "trainer.max_epochs=3",
          "trainer.log_every_n_steps=2")  # fmt: skip
AS_ONE = ("precision=fp64", "callbacks.checkpoint=null")
"""What is compared to 1e-6 differs by no rounding."""

AVERAGES = {
    "ema": ("averaging.decay=0.8",),
    "swa": ("averaging.start=1", "averaging.lr=null"),
    "uniform": ("averaging.start_step=2",),
}
"""What is typed with each preset, so that it begins inside a short run."""


def config_of(row: Row, folder: Path, *typed: str) -> Config:
    """The checked configuration of a row, as typed by a user."""
    data = ["data=none"]
    if row.data != "none":
        data = ["data=custom", f"data._target_=zoo.loaders.{row.data}"]
    words = [f"run_dir={folder}", "name=zoo", f"model._target_=zoo.models.{row.model}", *data]
    with initialize_config_module("app.conf", version_base="1.3"):
        return check(compose("train", [*COMMON, *words, *row.typed, *typed]))


class Trace(pl.Callback):
    """What a fit trains on, and the weights that it passes through."""

    def __init__(self) -> None:
        self.samples: list[list[float]] = []
        self.weights: list[dict[str, Tensor]] = []
        self.ends: list[dict[str, Tensor]] = []
        self._stepped = False

    def on_train_start(self, trainer: Any, model: Any) -> None:
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(self._note)

    def _note(self, optimizer: Any, *args: Any) -> None:
        groups = optimizer.param_groups
        self._stepped |= any(p.grad is not None for group in groups for p in group["params"])

    def on_train_batch_start(self, trainer: Any, model: Any, batch: Any, batch_idx: int) -> None:
        wide = [x for x in tree_leaves(batch) if isinstance(x, Tensor) and x.is_floating_point()]
        self.samples.append([round(float(row.sum()), 5) for x in wide[:1] for row in x])

    def on_train_batch_end(self, trainer: Any, model: Any, *args: Any) -> None:
        if self._stepped:
            self._stepped = False
            self.weights.append({n: p.detach().clone() for n, p in models.trained(model)})

    def on_validation_start(self, trainer: Any, model: Any) -> None:
        self._end_epoch(trainer)

    def on_train_epoch_end(self, trainer: Any, model: Any) -> None:
        self._end_epoch(trainer)

    def _end_epoch(self, trainer: Any) -> None:
        if len(self.ends) == trainer.current_epoch and self.weights:
            self.ends.append(self.weights[-1])


def fitted(config: Config) -> tuple[Any, Trace]:
    """Fit, and what was traced."""
    trace = Trace()
    run = build(config, [trace])
    try:
        run.trainer.fit(run.model, datamodule=run.data)
    finally:
        run.hooks.release()
    return run, trace


def weights_of(config: Config) -> tuple[dict[str, Tensor], list[list[float]]]:
    run, trace = fitted(config)
    return {name: value.cpu() for name, value in run.model.named_parameters()}, trace.samples


def assert_near(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    far = {n: float((one[n] - other[n]).abs().max()) for n in one if one[n].numel()}
    assert all(far[n] < 1e-6 * max(1.0, float(one[n].abs().max())) for n in far), far


def plain_is_stock(row: Row, folder: Path, draw: random.Random) -> None:
    config = config_of(row, folder / "run")
    run, _ = fitted(config)
    pl.seed_everything(42, verbose=False)
    model = instantiate(config.plain["model"])
    data = instantiate(config.plain["data"]) if row.data != "none" else None
    trainer = pl.Trainer(
        max_epochs=3, accelerator="cpu", devices=1, default_root_dir=folder, logger=True,
        num_sanity_val_steps=0, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, datamodule=data)
    assert trainer.global_step > 0 or not model.automatic_optimization
    assert is_same(dict(model.state_dict()), dict(run.model.state_dict()))
    ours = run.trainer.callback_metrics
    for name, value in trainer.callback_metrics.items():
        assert torch.equal(value, ours[name].to(value.dtype)), (name, value, ours[name])
    states = [[o.state_dict() for o in t.optimizers] for t in (trainer, run.trainer)]
    assert is_same(*states)


class Cut(BaseException):
    """The end of the power."""


class Cutter(pl.Callback):
    """Ends a run when the n-th batch of a phase begins."""

    moment: ClassVar[tuple[str, int]] = ("none", 0)
    begun: ClassVar[Counter[str]] = Counter()

    def _begin(self, phase: str) -> None:
        self.begun[phase] += 1
        if (phase, self.begun[phase]) == self.moment:
            raise Cut

    def on_train_batch_start(self, *args: Any) -> None:
        self._begin("train")

    def on_validation_batch_start(self, *args: Any) -> None:
        self._begin("validation")

    def on_test_batch_start(self, *args: Any) -> None:
        self._begin("test")


def begin(config: Config, moment: tuple[str, int]) -> Counter[str]:
    """Train up to a moment; how many batches of each phase began."""
    Cutter.moment, Cutter.begun = moment, Counter()
    trained(config)
    return Cutter.begun


def trained(config: Config) -> None:
    """Train as the command does, when its folder is there."""
    folder = RunFolder(Path(config.run_dir))
    folder.path.mkdir(exist_ok=True)
    train(config, folder)


def left_in(folder: Path) -> dict[str, Any]:
    return {
        "checkpoint": torch.load(folder / "checkpoints/last.ckpt", weights_only=True),
        "metrics.csv": (folder / "metrics.csv").read_text(),
        "metrics": json.loads((folder / "result.json").read_text())["metrics"],
    }


def cut_is_whole(row: Row, folder: Path, draw: random.Random) -> None:
    often = ("+callbacks.cutter._target_=zoo.columns.Cutter",
             f"callbacks.checkpoint.every_n_steps={draw.randint(1, 4)}")  # fmt: skip
    begun = begin(config_of(row, folder / "whole", *often), ("none", 0))
    config = config_of(row, folder / "cut", *often)
    cuts = []
    for phase in ("train", "validation", "train", "test"):
        moment = (phase, draw.randint(1, max(1, begun[phase] * 2 // 3)))
        cuts.append(moment)
        with suppress(Cut):
            begin(config, moment)
            break
    else:
        begin(config, ("none", 0))
    whole, cut = left_in(folder / "whole"), left_in(folder / "cut")
    for key, value in whole.items():
        assert is_same(value, cut[key]), [cuts, *islice(differences(value, cut[key], key), 12)]


def differences(one: Any, other: Any, path: str) -> Iterator[str]:
    """Where two contents differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in {**one, **other}:
            if key not in one or key not in other:
                yield f"{path}.{key} is missing"
            else:
                yield from differences(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, list | tuple) and type(one) is type(other) and len(one) == len(other):
        for index, pair in enumerate(zip(one, other, strict=True)):
            yield from differences(*pair, f"{path}[{index}]")
    elif isinstance(one, str) and isinstance(other, str):
        lines = set(one.splitlines()) ^ set(other.splitlines())
        yield from (f"{path}: {line}" for line in [*sorted(lines)][:6] or ["in another order"])
    elif not is_same(one, other):
        yield f"{path}: {str(one)[:60]!r} {str(other)[:60]!r}"


def batch_size(size: int, row: Row) -> str:
    return f"+{'model' if row.data == 'none' else 'data'}.batch_size={size}"


def ranks_are_one(row: Row, folder: Path, draw: random.Random) -> None:
    weights, samples = weights_of(config_of(row, folder / "one", *AS_ONE, batch_size(8, row)))
    two = ("strategy=ddp", "trainer.devices=2", *row.on_ranks, *AS_ONE, batch_size(4, row))
    shared = run_local(
        _on_rank, config_of(row, folder / "two", *two), folder,
        num_processes=2, start_method="forkserver", logging_config=None,
    )  # fmt: skip
    del shared
    found = [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert len(found[0][1]) == len(found[1][1]) == len(samples)
    for step, served in enumerate(samples):
        assert {*served} == {*found[0][1][step], *found[1][1][step]}, step
    for theirs, _ in found:
        assert_near(weights, theirs)


def _on_rank(config: Config, folder: Path) -> None:
    torch.set_num_threads(1)
    found = weights_of(config)
    torch.save(found, folder / f"rank-{torch.distributed.get_rank()}.pt")


def by_hand(preset: str, trace: Trace) -> dict[str, Tensor]:
    """The average of the weights that a fit passed through."""
    points = {"ema": trace.weights, "uniform": trace.weights[2:], "swa": trace.ends[1:]}[preset]
    average: dict[str, Tensor] = {}
    for number, weights in enumerate(points):
        share = 0.2 if preset == "ema" and number else 1 / (number + 1)
        for name, tensor in weights.items():
            wide = tensor.to(torch.promote_types(tensor.dtype, torch.float64))
            before = average.get(name, wide)
            average[name] = before + share * (wide - before)
    return {name: average[name].to(tensor.dtype) for name, tensor in points[-1].items()}


def averages_are_by_hand(row: Row, folder: Path, draw: random.Random) -> None:
    for preset in presets_of("averaging"):
        path = folder / preset
        typed = (f"averaging={preset}", *AVERAGES[preset], "averaging.bn_batches=null")
        config = config_of(row, path, *typed)
        run, trace = fitted(config)
        expected = by_hand(preset, trace)

        def of(model: Any, expected: dict[str, Tensor] = expected) -> dict[str, Tensor]:
            return {n: p.detach() for n, p in model.named_parameters() if n in expected}

        assert_near(expected, of(run.model))
        file = path / "checkpoints/last.ckpt"
        loaded = type(run.model).load_from_checkpoint(file, map_location="cpu")
        assert_near(expected, of(loaded))
        if row.data == "NothingToValidate":
            continue
        evaluate(config, RunFolder(path), stage="validate", checkpoint=file)
        pl.seed_everything(42, verbose=False)
        data = None if row.data == "none" else instantiate(config.plain["data"])
        trainer = pl.Trainer(
            accelerator="cpu", default_root_dir=folder, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        found = trainer.validate(loaded, datamodule=data, verbose=False)
        said = json.loads((path / "validate.json").read_text())["metrics"]
        for name, value in (item for part in found for item in part.items()):
            assert abs(said[name] - value) < 1e-6, name


def accumulated_is_large(row: Row, folder: Path, draw: random.Random) -> None:
    small = ("accumulate=constant", "accumulate.factor=2", *row.accumulated, *AS_ONE,
             batch_size(4, row))  # fmt: skip
    few, _ = weights_of(config_of(row, folder / "small", *small))
    many, _ = weights_of(config_of(row, folder / "large", *AS_ONE, batch_size(8, row)))
    assert_near(many, few)


FINDERS = ("tuner=full", "tuner.cache=null", "tuner.batch_size.max_val=6", "tuner.lr.num_steps=20",
           "tuner.batch_size.min_batches=1", "tuner.lr.lowest=1e-4", "tuner.lr.highest=1",
           "tuner.lr.on_doubt=use", "tuner.lr.key=model.lr", "+model.lr=0.1")  # fmt: skip


def finders_leave_nothing(row: Row, folder: Path, draw: random.Random) -> None:
    config = config_of(row, folder / "found", *FINDERS, batch_size(4, row))
    (folder / "found").mkdir()
    answers = find(config, folder / "found")
    assert answers
    trained(config.changed(answers))
    typed = [f"{key}={value}" for key, value in answers.items()]
    again = config_of(row, folder / "typed", "+model.lr=0.1", batch_size(4, row), *typed)
    trained(again)
    one, other = left_in(folder / "found"), left_in(folder / "typed")
    assert is_same(one, other), [*islice(differences(one, other, ""), 12)]


CHECKS: dict[str, Callable[[Row, Path, random.Random], None]] = {
    "a": plain_is_stock,
    "b": cut_is_whole,
    "c": ranks_are_one,
    "d": averages_are_by_hand,
    "e": accumulated_is_large,
    "f": finders_leave_nothing,
}
