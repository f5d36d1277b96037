"""Every step of an accumulated run against the large batch's, in real fits of a linear model."""

import copy
import itertools
import math
import pickle
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import SMALL, refuse
from lightning.fabric.utilities.rank_zero import WarningCache
from lightning.pytorch.loops.optimization.automatic import Closure
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from app.accumulate import (
    Accumulation,
    ConstantAccumulation,
    EffectiveBatch,
    ScheduledAccumulation,
    Window,
    count_steps,
)
from app.conf.accumulate.schema import By
from app.conf.accumulate.schema import ConstantAccumulation as ConstantSchema
from app.conf.accumulate.schema import EffectiveBatch as EffectiveSchema
from app.conf.accumulate.schema import ScheduledAccumulation as ScheduledSchema
from app.errors import Refused
from app.parallel.sizes import accumulation_factor
from app.record.loggers import MetricsCsv, read_metrics
from app.record.metrics import StepMetrics
from app.resume.exact import ExactResume
from app.resume.hooks import DataHooks
from app.run.build import build
from app.run.checkpoint import CheckpointFiles
from app.run.trainer import Trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*(LeafSpec|treespec).*:FutureWarning"),
]


class Net(pl.LightningModule):
    """Linear regression in float64; a micro-batch is a dict of `num_samples` rows."""

    def __init__(self, num_samples: int = 20, micro_batch: int = 2, lr: float = 0.1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        self.num_samples = num_samples
        self.micro_batch = micro_batch
        self.lr = lr
        self.losses: list[float] = []
        self.factors: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.factors.append(int(self.trainer.accumulate_grad_batches))
        loss = (self.net(batch["x"]) - batch["y"]).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)

    def train_dataloader(self) -> Any:
        return DataLoader(rows(self.num_samples), batch_size=self.micro_batch)


def rows(num_samples: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num_samples, 3, generator=generator, dtype=torch.float64)
    return [{"x": row, "y": row.sum(0, keepdim=True).sin(), "weight": row[0].abs()} for row in x]


class Watch(pl.Callback):
    """What the callbacks after accumulation find: losses, and the gradient of each step."""

    def __init__(self) -> None:
        self.losses: list[float | None] = []
        self.stepped: list[int] = []
        self.rates: list[float] = []
        self.gradients: list[list[Tensor]] = []
        self.after_batch: list[list[Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.stepped.append(trainer.fit_loop.batch_idx)
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.gradients.append([p.grad.clone() for p in pl_module.parameters()])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
        self.losses.append(outputs["loss"].item() if outputs else None)
        grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
        self.after_batch.append([g.clone() for g in grads])


QUIET: dict[str, Any] = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


def fit(model: pl.LightningModule, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    fit_options = {key: options.pop(key) for key in ("ckpt_path",) if key in options}
    options = {"max_epochs": 1, **QUIET, **options}
    trainer = pl.Trainer(accelerator="cpu", callbacks=list(callbacks), **options)
    trainer.fit(model, **fit_options)
    return trainer


def constant(factor: int, weight_by: str | None = None) -> ConstantAccumulation:
    return ConstantAccumulation(factor=factor, weight_by=weight_by)


def schedule(by: str, factors: dict[int, int]) -> ScheduledAccumulation:
    return ScheduledAccumulation(
        by=by, starts=list(factors), factors=list(factors.values()), weight_by=None
    )


def same_weights(one: nn.Module, other: nn.Module) -> None:
    close(one.parameters(), other.parameters())


def close(one: Iterable[Tensor], other: Iterable[Tensor]) -> None:
    torch.testing.assert_close(list(one), list(other), rtol=0, atol=1e-12)


def equal(one: Iterable[Tensor], other: Iterable[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# Each step is the mean over its real window


@pytest.mark.parametrize("num_samples", [16, 18, 20, 22, 19])
def test_acc_last_window_every_step_is_the_large_batchs(num_samples: int) -> None:
    accumulated, large, watch = Net(num_samples), Net(num_samples, 8), Watch()
    if num_samples == 19:  # the last micro-batch is smaller itself: weight it
        loader = [{**b, "count": len(b["x"])} for b in accumulated.train_dataloader()]
        accumulated.train_dataloader = lambda: DataLoader(loader, batch_size=None)
        fit(accumulated, constant(4, "count"), watch, max_epochs=3)
    else:
        fit(accumulated, constant(4), watch, max_epochs=3)
    reference = Watch()
    fit(large, reference, max_epochs=3)
    assert len(watch.gradients) == 3 * math.ceil(num_samples / 8)
    for mine, theirs in zip(watch.gradients, reference.gradients, strict=True):
        close(mine, theirs)
    same_weights(accumulated, large)


def test_acc_short_epoch_is_one_step_of_its_mean() -> None:
    accumulated, large = Net(6), Net(6, 6)
    trainer = fit(accumulated, constant(8), max_epochs=4)
    fit(large, max_epochs=4)
    assert trainer.global_step == 4
    same_weights(accumulated, large)


def test_a_loader_of_unknown_length_ends_with_its_real_window() -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            return iter(rows(20))

    accumulated, large, watch = Net(), Net(20, 8), Watch()
    accumulated.train_dataloader = lambda: DataLoader(Stream(), batch_size=2)
    fit(accumulated, constant(4), watch, max_epochs=2)
    fit(large, max_epochs=2)
    assert watch.stepped == [3, 7, 9, 3, 7, 9]
    same_weights(accumulated, large)


def test_a_factor_of_one_changes_no_bit() -> None:
    accumulated, plain = Net(), Net()
    fit(accumulated, constant(1))
    fit(plain)
    assert equal(accumulated.parameters(), plain.parameters())


# The number of steps is exact


def brute_force(
    num_batches: int, num_epochs: int, by_epoch: dict[int, int], by_step: dict[int, int]
) -> int:
    step = 0
    for epoch in range(num_epochs):
        waiting = 0
        for batch in range(num_batches):
            if waiting == 0:
                factor = [f for start, f in sorted(by_epoch.items()) if start <= epoch][-1]
                factor *= [f for start, f in sorted(by_step.items()) if start <= step][-1]
            waiting += 1
            if waiting == factor or batch == num_batches - 1:
                step += 1
                waiting = 0
    return step


def some_schedule(rng: random.Random) -> dict[int, int]:
    starts = [0, *sorted(rng.sample(range(1, 20), rng.randrange(4)))]
    return {start: rng.randint(1, 7) for start in starts}


@pytest.mark.parametrize("seed", range(10))
def test_count_steps_is_what_counting_gives(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(50):
        case = (rng.randrange(30), rng.randrange(8), some_schedule(rng), some_schedule(rng))
        counted = count_steps(
            num_batches=case[0], num_epochs=case[1], by_epoch=case[2], by_step=case[3]
        )
        assert counted == brute_force(*case), case


class OneCycle(Net):
    """A user's model that asks its trainer how long the schedule must be."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        self.total_steps = self.trainer.estimated_stepping_batches
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=0.1, total_steps=self.total_steps
        )
        return [optimizer], [{"scheduler": self.schedule, "interval": "step"}]


def our_trainer(run_dir: Path, *callbacks: pl.Callback, **changes: Any) -> Trainer:
    arguments: dict[str, Any] = {
        **dict.fromkeys(("max_epochs", "max_steps", "max_minutes", "min_epochs", "min_steps")),
        **dict.fromkeys(("benchmark", "limit_predict_batches", "overfit_batches", "profiler")),
        **dict.fromkeys((f"limit_{part}_batches" for part in ("train", "val", "test")), 1.0),
        "accelerator": "cpu",
        "devices": 1,
        "threads": None,
        "deterministic": False,
        "val_check_interval": 1.0,
        "check_val_every_n_epoch": 1,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "detect_anomaly": False,
        "inference_mode": True,
        "reload_dataloaders_every_n_epochs": 0,
        "plugins": {},
        "enable_autolog_hparams": True,
        "num_nodes": 1,
        "sync_batchnorm": False,
        "strategy": "auto",
        "precision": "64-true",
        "matmul": "highest",
        "run_dir": run_dir,
        "callbacks": callbacks,
        "loggers": [],
        "checkpoint_io": CheckpointFiles(),
        "enable_progress_bar": False,
    }
    return Trainer(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("accumulation", "limits", "steps"),
    [
        (constant(4), {"max_epochs": 3}, 9),
        (constant(16), {"max_epochs": 3}, 3),
        (schedule("epoch", {0: 1, 1: 2, 2: 4}), {"max_epochs": 4}, 10 + 5 + 3 + 3),
        (schedule("step", {0: 1, 5: 4, 8: 2}), {"max_epochs": 3}, 7 + 4 + 5),
        (schedule("epoch", {0: 1, 1: 2, 2: 4}), {"max_epochs": 4, "max_steps": 13}, 13),
        (schedule("step", {0: 1, 5: 4}), {"max_steps": 9}, 9),
        (constant(4), {"max_epochs": 3, "limit_train_batches": 5}, 6),
        (EffectiveBatch(batch_size=6, micro_batch_size=2, weight_by=None), {"max_epochs": 2}, 8),
    ],
)
def test_acc_total_steps_one_cycle_ends_with_the_run(
    tmp_path: Path, accumulation: Accumulation, limits: dict[str, Any], steps: int
) -> None:
    model, watch = OneCycle(), Watch()
    trainer = our_trainer(tmp_path, accumulation, watch, **limits)
    trainer.fit(model)
    assert model.total_steps == trainer.global_step == model.schedule.last_epoch == steps
    assert trainer.estimated_stepping_batches == steps
    assert len(watch.rates) == steps
    assert watch.rates[-1] == min(watch.rates) == pytest.approx(0.1 / 25 / 1e4)


# By epoch or by step


def test_acc_steps_a_schedule_by_step_changes_inside_an_epoch() -> None:
    watch, model = Watch(), Net()
    fit(model, schedule("step", {0: 1, 2: 3, 5: 2}), watch, max_epochs=2)
    assert model.factors == [1, 1, 3, 3, 3, 3, 3, 3, 3, 3] + [2] * 10
    assert watch.stepped == [0, 1, 4, 7, 9, 1, 3, 5, 7, 9]

    windows = [[0], [1], [2, 3, 4], [5, 6, 7], [8, 9], *([i, i + 1] for i in range(0, 10, 2))]
    same_weights(model, trained_on(windows))


def test_a_schedule_by_epoch_changes_with_the_epoch() -> None:
    watch, model = Watch(), Net()
    fit(model, schedule("epoch", {0: 4, 1: 1, 2: 12}), watch, max_epochs=3)
    assert model.factors == [4] * 10 + [1] * 10 + [12] * 10
    assert watch.stepped == [3, 7, 9, *range(10), 9]
    windows = [range(4), range(4, 8), range(8, 10), *([i] for i in range(10)), range(10)]
    same_weights(model, trained_on(windows))


def trained_on(windows: Iterable[Iterable[int]]) -> Net:
    """By a loop in plain torch: one step per window of micro-batches, put together."""
    model = Net()
    batches, optimizer = list(model.train_dataloader()), model.configure_optimizers()
    for window in windows:
        x, y = (torch.cat([batches[i][key] for i in window]) for key in "xy")
        optimizer.zero_grad()
        (model.net(x) - y).square().mean().backward()
        optimizer.step()
    return model


# A window


def test_a_window_answers_only_its_own_edges() -> None:
    window = Window(4, 6)
    assert [n for n in range(30) if n % window == 0] == [6, 10]
    assert (window, window.start, window.end) == (4, 6, 10)
    assert f"{window}" == "4"
    assert math.ceil(10 / window) == 3


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda w: pickle.loads(pickle.dumps(w))])
def test_a_copied_window_is_the_same_window(copied: Callable[[Window], Window]) -> None:
    window = copied(Window(4, 6))
    assert (type(window), window, window.start, window.end) == (Window, 4, 6, 10)


def test_the_model_sees_the_factor_in_force_and_the_trainer_gets_its_own_back() -> None:
    class Asks(Net):
        def configure_optimizers(self) -> Any:
            self.at_setup = self.trainer.accumulate_grad_batches
            return super().configure_optimizers()

    model = Asks()
    trainer = fit(model, schedule("epoch", {0: 4, 1: 2}), max_epochs=2)
    assert model.at_setup == 4
    assert model.factors == [4] * 10 + [2] * 10
    assert type(trainer.accumulate_grad_batches) is int
    assert trainer.accumulate_grad_batches == 1


# Batches that are left out


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("left_out", [{1}, {0}, {3}, {0, 1, 2}, {4, 5, 6, 7}, {8}, {9}, {8, 9}])
def test_a_step_is_the_mean_over_the_losses_that_there_were(
    monkeypatch: pytest.MonkeyPatch, left_out: set[int]
) -> None:
    monkeypatch.setattr(Closure, "warning_cache", WarningCache())  # warns once in a process

    class Leaves(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx in left_out else super().training_step(batch, batch_idx)

    model = Leaves()
    trainer = fit(model, constant(4))
    windows = [[i for i in w if i not in left_out] for w in (range(4), range(4, 8), range(8, 10))]
    assert trainer.global_step == 3
    same_weights(model, trained_on(filter(None, windows)))


@pytest.mark.filterwarnings("ignore:train_dataloader yielded None")
def test_a_window_opens_with_the_first_batch_that_the_loader_yields() -> None:
    class Gaps(Net):
        def train_dataloader(self) -> Any:
            batches = list(super().train_dataloader())
            batches[4] = None
            return DataLoader(batches, batch_size=None)

    model, watch = Gaps(), Watch()
    fit(model, constant(4), watch)
    assert watch.stepped == [3, 8, 9]
    batches = list(Net().train_dataloader())
    assert len(batches) == 10
    same_weights(model, trained_on([range(4), range(5, 9), [9]]))


@pytest.mark.parametrize("k", [2, 4])
def test_a_step_without_any_gradient_changes_nothing(k: int) -> None:
    class Unused(Net):
        def __init__(self) -> None:
            super().__init__(6)
            self.unused = nn.Linear(2, 2)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.unused.parameters(), lr=0.1)

    model = Unused()
    assert fit(model, constant(k)).global_step == math.ceil(3 / k)
    assert equal(model.parameters(), Unused().parameters())


# Continuing a run


class Saves(pl.Callback):
    """Writes a checkpoint after every micro-batch (or validation)."""

    def __init__(self, folder: Path, hook: str) -> None:
        self.paths: list[Path] = []
        setattr(self, hook, lambda trainer, *args: self.save(folder, trainer))

    def save(self, folder: Path, trainer: pl.Trainer) -> None:
        self.paths.append(folder / f"{trainer.fit_loop.epoch_loop.total_batch_idx}.ckpt")
        trainer.save_checkpoint(self.paths[-1])


class Validated(Net):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", (self.net(batch["x"]) - batch["y"]).square().mean())

    def val_dataloader(self) -> Any:
        return DataLoader(rows(2), batch_size=2)


def attach(resume: ExactResume, model: pl.LightningModule) -> None:
    hooks = DataHooks(model, pl.LightningDataModule())
    hooks.around_training(resume.resumable)


def continued(
    accumulation: Accumulation, *callbacks: pl.Callback, **options: Any
) -> tuple[Net, Watch]:
    model, watch, resume = Validated(16), Watch(), ExactResume()
    attach(resume, model)
    fit(model, accumulation, resume, watch, *callbacks, max_epochs=3, **options)
    return model, watch


SCHEDULES = {
    "constant": lambda: constant(3),
    "weighted": lambda: constant(3, "weight"),
    "epoch": lambda: schedule("epoch", {0: 1, 1: 4}),
    "step": lambda: schedule("step", {0: 1, 3: 4, 6: 2}),
}


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_end"])
@pytest.mark.parametrize("kind", list(SCHEDULES))
def test_acc_resume_from_any_batch_is_bit_exact(tmp_path: Path, kind: str, hook: str) -> None:
    make, options = SCHEDULES[kind], {"val_check_interval": 3}
    saves = Saves(tmp_path, hook)
    straight, watch = continued(make(), saves, **options)
    assert len(saves.paths) == (24 if hook == "on_train_batch_end" else 6)
    for path in saves.paths[2 :: 2 if hook == "on_train_batch_end" else 1]:
        num_done = int(path.stem) + 1
        resumed, rest = continued(make(), ckpt_path=path, **options)
        assert resumed.factors == straight.factors[num_done:], path
        assert rest.losses == watch.losses[num_done:], path
        for mine, theirs in zip(rest.after_batch, watch.after_batch[num_done:], strict=True):
            assert equal(mine, theirs), path
        assert equal(resumed.parameters(), straight.parameters()), path


def test_acc_resume_keeps_the_scheduled_factor_in_mid_epoch(tmp_path: Path) -> None:
    saves = Saves(tmp_path, "on_train_batch_end")
    continued(SCHEDULES["epoch"](), saves)
    resumed, watch = continued(SCHEDULES["epoch"](), ckpt_path=saves.paths[10])
    assert resumed.factors == [4] * (24 - 11)
    assert watch.stepped == [3, 7, 3, 7]


def test_a_checkpoint_holds_gradients_only_inside_a_window(tmp_path: Path) -> None:
    saves = Saves(tmp_path, "on_train_batch_end")
    fit(Net(), constant(4), saves)
    held = [bool(torch.load(p)["accumulation"]["gradients"]) for p in saves.paths]
    assert held == [True, True, True, False] * 2 + [True, False]


def test_a_run_saved_without_accumulation_goes_on_with_it(tmp_path: Path) -> None:
    def train(*callbacks: pl.Callback, **options: Any) -> tuple[Net, Watch]:
        model, watch, resume = Net(), Watch(), ExactResume()
        attach(resume, model)
        fit(model, *callbacks, resume, watch, **options)
        return model, watch

    saves = Saves(tmp_path, "on_train_batch_end")
    train(saves)
    model, watch = train(constant(2), ckpt_path=saves.paths[4])
    assert watch.stepped == [6, 8, 9]
    same_weights(model, trained_on([*([i] for i in range(5)), [5, 6], [7, 8], [9]]))


def test_a_second_fit_begins_anew_and_a_checkpoint_may_be_written_without_one(
    tmp_path: Path,
) -> None:
    rule = constant(4)
    evaluated = pl.Trainer(accelerator="cpu", callbacks=[rule], **QUIET)
    evaluated.validate(Validated(), verbose=False)
    evaluated.save_checkpoint(tmp_path / "evaluated.ckpt")

    class Stops(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 6:
                raise KeyError("stop")
            return super().training_step(batch, batch_idx)

    with pytest.raises(KeyError, match="stop"):
        fit(Stops(), rule)
    model, large = Net(), Net(20, 8)
    fit(model, rule)
    fit(large)
    same_weights(model, large)


# What is seen of the loss


@pytest.mark.parametrize("k", [3, 4])
def test_acc_loss_callbacks_see_the_loss(k: int) -> None:
    model, watch = Net(), Watch()
    fit(model, constant(k), watch)
    assert watch.losses == pytest.approx(model.losses, rel=1e-15)


def test_acc_loss_the_step_metrics_hold_the_loss_and_the_factor(tmp_path: Path) -> None:
    model = Net()
    callbacks = [schedule("step", {0: 4, 1: 2}), StepMetrics()]
    trainer = our_trainer(
        tmp_path, *callbacks, max_epochs=1, loggers=[MetricsCsv(save_dir=str(tmp_path))]
    )
    trainer.fit(model)
    lines = [line for line in read_metrics(tmp_path / "metrics.csv") if "lr" in line]
    windows = [range(4), range(4, 6), range(6, 8), range(8, 10)]
    means = [sum(model.losses[i] for i in window) / len(window) for window in windows]
    logged = [line["train_loss"] for line in lines]
    assert logged[:-1] == pytest.approx(means[:-1], rel=1e-12)  # the last is the epoch's, below
    assert [line["accumulation_factor"] for line in lines] == [4, 2, 2, 2]
    assert float(trainer.callback_metrics["train_loss"]) == pytest.approx(
        sum(model.losses) / 10, rel=1e-6
    )


def test_what_else_a_training_step_returns_stays() -> None:
    class Returns(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return {"loss": super().training_step(batch, batch_idx), "idx": batch_idx}

    class Keeps(pl.Callback):
        def on_train_batch_end(self, trainer: Any, model: Any, outputs: Any, *args: Any) -> None:
            seen.append((outputs["loss"].item(), outputs["idx"]))

    seen: list[Any] = []
    model = Returns()
    fit(model, constant(4), Keeps())
    assert seen == list(zip(model.losses, range(10), strict=True))


# Weights


TOKENS = [5, 1, 40, 2, 7, 7, 0, 3, 11, 4]


@dataclass
class Tokens:
    """A batch that is an object."""

    x: Tensor
    y: Tensor
    count: Any

    def __getitem__(self, key: str) -> Any:
        return getattr(self, key)


COUNTS: dict[str, Callable[[int], Any]] = {
    "int": lambda n: n,
    "float": lambda n: n / 3,
    "tensor": lambda n: torch.tensor(n),
    "mask": lambda n: torch.arange(50).reshape(2, 25) < n,
}


class Packed(Net):
    """Micro-batches of a varying number of tokens, put together in windows of `k`."""

    def __init__(self, k: int, made: Callable[..., Any] = dict, count: str = "int") -> None:
        super().__init__()
        self.k, self.made, self.count = k, made, COUNTS[count]

    def train_dataloader(self) -> Any:
        samples = iter(rows(sum(TOKENS)))
        packs = [list(itertools.islice(samples, n)) for n in TOKENS]
        joined = [
            list(itertools.chain(*packs[i : i + self.k])) for i in range(0, len(packs), self.k)
        ]
        return DataLoader(list(map(self.batch, joined)), batch_size=None)

    def batch(self, tokens: list[dict[str, Tensor]]) -> Any:
        x, y = (torch.stack([t[key] for t in tokens] or [torch.ones(w)]).double()
                for key, w in (("x", 3), ("y", 1)))  # fmt: skip
        return self.made(x=x, y=y, count=self.count(len(tokens)))


@pytest.mark.parametrize("made", [dict, Tokens])
@pytest.mark.parametrize("count", list(COUNTS))
def test_acc_weights_by_tokens_a_step_is_the_large_batchs(made: Any, count: str) -> None:
    micro, large, watch = Packed(1, made, count), Packed(4), Watch()
    fit(micro, constant(4, "count"), watch, max_epochs=2)
    fit(large, max_epochs=2)
    same_weights(micro, large)
    assert watch.losses == pytest.approx(micro.losses, rel=1e-15)  # the loss stays the loss

    unweighted = Packed(1)
    fit(unweighted, constant(4), max_epochs=2)
    assert not torch.allclose(unweighted.net[0].weight, large.net[0].weight)


def test_acc_weights_a_window_of_no_tokens_moves_nothing() -> None:
    model = Packed(1)
    model.count = lambda n: 0
    fit(model, constant(4, "count"))
    assert equal(model.parameters(), Packed(1).parameters())


@pytest.mark.parametrize(
    ("made", "key", "text"),
    [
        (dict, "tokens", "got tokens; the batch holds x, y, count"),
        (dict, "items", "got items; the batch holds x, y, count"),
        (lambda **batch: list(batch.values()), "count", "got count; the batch is a list"),
        (Tokens, "tokens", "got tokens; the batch is a Tokens"),
    ],
)
def test_acc_weights_a_batch_without_the_count_is_refused(made: Any, key: str, text: str) -> None:
    with pytest.raises(ValueError, match="weight_by") as caught:
        fit(Packed(1, made), constant(4, key))
    assert str(caught.value) == (
        f"accumulate.weight_by must name a key or attribute of the batch, {text}"
    )


# Over several processes


class Ranks(Packed):
    """Each of two ranks reads every other micro-batch."""

    def train_dataloader(self) -> Any:
        trainer = self.trainer
        batches = super().train_dataloader().dataset[trainer.global_rank :: trainer.world_size]
        return DataLoader(batches, batch_size=None)


def fit_on_two_ranks(model: Net, *callbacks: pl.Callback, **options: Any) -> None:
    two = {"devices": 2, "strategy": "ddp_fork", "use_distributed_sampler": False}
    fit(model, *callbacks, **two, **options)


@pytest.fixture
def _two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_initialized():
        pytest.skip("a process with CUDA cannot be forked")
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


FORKED = pytest.mark.filterwarnings(r"ignore:.*multi-threaded, use of fork\(\):DeprecationWarning")


@FORKED
@pytest.mark.usefixtures("_two_ranks")
def test_acc_weights_add_up_over_the_ranks() -> None:
    micro, large = Ranks(1), Packed(4)
    fit_on_two_ranks(micro, constant(2, "count"), max_epochs=2)
    fit(large, max_epochs=2)
    same_weights(micro, large)


@FORKED
@pytest.mark.usefixtures("_two_ranks")
def test_acc_resume_inside_a_window_keeps_the_gradients_of_all_ranks(tmp_path: Path) -> None:
    def train(*callbacks: pl.Callback, **options: Any) -> Net:
        model, resume = Ranks(1), ExactResume()
        attach(resume, model)
        fit_on_two_ranks(model, constant(3, "count"), resume, *callbacks, **options)
        return model

    straight = train(Saves(tmp_path, "on_train_batch_end"))
    for path in sorted(tmp_path.glob("*.ckpt")):
        same_weights(train(ckpt_path=path), straight)


# Under a gradient scaler


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("weight_by", [None, "count"])
def test_under_a_gradient_scaler_a_step_is_the_large_batchs(
    fused: bool, weight_by: str | None
) -> None:
    class Half(Packed):
        def __init__(self, k: int) -> None:
            super().__init__(k)
            self.net.float()

        def batch(self, tokens: list[dict[str, Tensor]]) -> Any:
            batch = super().batch(tokens)
            return {**batch, "x": batch["x"].float(), "y": batch["y"].float()}

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1, fused=fused)

    micro, large = Half(1), Half(4)
    if weight_by is None:  # then the large batch is the mean of the micro-batches' losses
        batches = list(Half(1).train_dataloader())
        large.train_dataloader = lambda: DataLoader(
            [batches[i : i + 4] for i in range(0, 10, 4)], batch_size=None
        )
        large.training_step = lambda batch, batch_idx: (
            sum(Net.training_step(large, part, batch_idx) for part in batch) / len(batch)
        )
    scaler = torch.amp.GradScaler(device="cpu", init_scale=1024.0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    fit(micro, constant(4, weight_by), plugins=[plugin])
    fit(large)
    assert scaler.get_scale() == 1024.0
    torch.testing.assert_close(
        list(micro.parameters()), list(large.parameters()), rtol=1e-2, atol=1e-3
    )


# What is refused


def test_manual_optimization_is_refused() -> None:
    class Manual(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(ValueError, match="accumulate") as caught:
        fit(Manual(), constant(4))
    assert str(caught.value) == (
        "accumulate cannot act with Manual: it steps its own optimizers "
        "(automatic_optimization=False); accumulate inside its training_step and use "
        "accumulate=none"
    )


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter`")
def test_da_kinds_a_step_that_takes_the_iterator_is_refused() -> None:
    class Fetches(Net):
        def training_step(self, dataloader_iter: Any) -> Any:
            return super().training_step(*next(dataloader_iter)[:2])

    with pytest.raises(ValueError, match="whose training_step takes dataloader_iter"):
        fit(Fetches(), constant(4))


class Sharp(torch.optim.SGD):
    """As SAM: evaluates the batch twice a step."""

    def step(self, closure: Any = None) -> Any:
        closure()
        return super().step(closure)


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, Sharp])
def test_an_optimizer_that_evaluates_a_batch_again_is_refused(kind: Any) -> None:
    class Quasi(Net):
        def configure_optimizers(self) -> Any:
            return kind(self.parameters(), lr=0.1)

    with pytest.raises(ValueError, match="evaluates a batch") as caught:
        fit(Quasi(), constant(4))
    assert str(caught.value) == (
        f"accumulate cannot act with {kind.__name__}, which evaluates a batch several times a "
        "step; use accumulate=none"
    )


def test_one_that_does_so_trains_where_a_step_is_of_one_batch() -> None:
    class Twice(Net):
        def configure_optimizers(self) -> Any:
            return Sharp(self.parameters(), lr=0.1)

    weights = []
    for callbacks in ((), (constant(1),)):
        model = Twice()
        fit(model, *callbacks)
        weights.append([p.detach() for p in model.parameters()])
    assert all(map(torch.equal, *weights))


OFF = "to switch accumulation off use accumulate=none"
TYPE = "type for example 'accumulate.starts=[0,4]' 'accumulate.factors=[1,8]'"


@pytest.mark.parametrize(
    ("schema", "values", "text"),
    [
        (ConstantSchema, {"factor": 0}, f"accumulate.factor must be >= 1, got 0; {OFF}"),
        (ConstantSchema, {"factor": -3}, f"accumulate.factor must be >= 1, got -3; {OFF}"),
        (
            ScheduledSchema,
            {"starts": [1, 4], "factors": [1, 8]},
            f"accumulate.starts must rise from 0, got [1, 4]; {TYPE}",
        ),
        (
            ScheduledSchema,
            {"starts": [0, 4, 4], "factors": [1, 2, 8]},
            f"accumulate.starts must rise from 0, got [0, 4, 4]; {TYPE}",
        ),
        (
            ScheduledSchema,
            {"starts": [], "factors": []},
            f"accumulate.starts must rise from 0, got []; {TYPE}",
        ),
        (
            ScheduledSchema,
            {"starts": [0, 4], "factors": [1]},
            f"accumulate.factors must hold one factor for each of the 2 starts, got [1]; {TYPE}",
        ),
        (
            ScheduledSchema,
            {"starts": [0, 4], "factors": [1, 0]},
            f"accumulate.factors must be numbers >= 1, got [1, 0]; {OFF}",
        ),
        (
            EffectiveSchema,
            {"batch_size": 0, "micro_batch_size": 32},
            f"accumulate.batch_size must be >= 1, got 0; {OFF}",
        ),
        (
            EffectiveSchema,
            {"batch_size": 32, "micro_batch_size": 0},
            f"accumulate.micro_batch_size must be >= 1, got 0; {OFF}",
        ),
        (
            EffectiveSchema,
            {"batch_size": 100, "micro_batch_size": None},
            "accumulate.micro_batch_size must be given where neither data.batch_size nor "
            "model.batch_size tells it; type accumulate.micro_batch_size=32",
        ),
    ],
)
def test_a_value_out_of_range_is_refused(schema: Any, values: dict[str, Any], text: str) -> None:
    extra = {"by": By.epoch} if schema is ScheduledSchema else {}
    with pytest.raises(ValueError, match="accumulate") as caught:
        refuse("accumulate", schema(**values, **extra, weight_by=None))
    assert str(caught.value) == text


def test_a_batch_size_that_no_factor_reaches_names_the_nearest_over_all_ranks() -> None:
    assert accumulation_factor(batch_size=96, micro_batch_size=8, world_size=3) == 4
    with pytest.raises(ValueError, match="batch_size") as caught:
        accumulation_factor(batch_size=64, micro_batch_size=8, world_size=3)
    assert str(caught.value) == (
        "accumulate.batch_size must be a multiple of 24 (micro-batch 8 x world size 3), got 64; "
        "the nearest that work: accumulate.batch_size=48 or accumulate.batch_size=72"
    )


def test_an_effective_batch_solves_its_factor() -> None:
    accumulated, large = Net(), Net(20, 8)
    fit(accumulated, EffectiveBatch(batch_size=8, micro_batch_size=2, weight_by=None))
    fit(large)
    assert accumulated.factors == [4] * 10
    same_weights(accumulated, large)


def test_an_effective_batch_refuses_a_loader_of_another_batch_size() -> None:
    with pytest.raises(ValueError, match="micro_batch_size") as caught:
        fit(Net(20, 2), EffectiveBatch(batch_size=8, micro_batch_size=4, weight_by=None))
    assert str(caught.value) == (
        "accumulate.micro_batch_size must be the loader's batch size 2, got 4; "
        "type accumulate.micro_batch_size=2"
    )


def test_an_effective_batch_that_no_factor_reaches_may_still_be_validated() -> None:
    rule = EffectiveBatch(batch_size=9, micro_batch_size=2, weight_by=None)
    trainer = pl.Trainer(accelerator="cpu", callbacks=[rule], max_epochs=1, **QUIET)
    trainer.validate(Validated(), verbose=False)
    with pytest.raises(ValueError, match=r"got 9; the nearest that work: .*=8 or .*=10"):
        trainer.fit(Net())


# As it is typed


def test_a_refusal_reaches_the_command_line_word_for_word(checked: Callable[..., Any]) -> None:
    with pytest.raises(Refused) as caught:
        checked("accumulate=constant", "accumulate.factor=0")
    assert str(caught.value) == f"accumulate.factor must be >= 1, got 0; {OFF}"
    with pytest.raises(Refused, match=r"must be given where neither data\.batch_size nor"):
        checked("accumulate=effective", "model=custom", "model._target_=theirs.LitModel",
                "data=custom", "data._target_=theirs.LitData")  # fmt: skip


def test_the_micro_batch_is_the_datas_by_itself(checked: Callable[..., Any]) -> None:
    chosen = checked("accumulate=effective", "accumulate.batch_size=96", "data.batch_size=24")
    assert chosen.accumulate.micro_batch_size == 24


@pytest.mark.parametrize(
    ("typed", "steps"),
    [
        (["accumulate=constant"], 2 * 2),
        (["accumulate=schedule", "accumulate.starts=[0,1]", "accumulate.factors=[1,4]"], 6 + 2),
        (["accumulate=schedule", "accumulate.by=step", "accumulate.starts=[0,4]",
          "accumulate.factors=[1,6]"], 4 + 1 + 1),
        (["accumulate=effective", "accumulate.batch_size=48"], 2 * 2),
        (["accumulate=none"], 2 * 6),
    ],
)  # fmt: skip
def test_a_preset_takes_as_many_steps_as_it_says(
    checked: Callable[..., Any], typed: list[str], steps: int
) -> None:
    run = build(checked(*SMALL, *typed), [])
    run.trainer.fit(run.model, datamodule=run.data)
    assert run.trainer.global_step == steps
    assert run.trainer.estimated_stepping_batches == steps
