"""Averages of models that others wrote: what they keep, edit, count and draw while they run."""

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from conftest import presets_of
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from test_averaging import (
    Recorder,
    composed,
    data,
    ema,
    read,
    swa,
    trainer_for,
    uniform,
    weights,
)  # fmt: skip
from test_averaging import pytestmark as warnings_of_lightning
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from app.screen.start import StartTable

pytestmark = [*warnings_of_lightning, pytest.mark.filterwarnings("ignore:Lazy modules"),
              pytest.mark.filterwarnings("ignore:.*sampler has shuffling enabled")]  # fmt: skip


class Net(pl.LightningModule):
    """A regression, as in a first tutorial."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.mse_loss(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Trace(Callback):
    """The state after each step, and after each validation."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []
        self.validated: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.steps.append(weights(pl_module))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.validated.append(weights(pl_module))


def run(tmp_path: Path, make: Callable[[], Any], *callbacks: Callback, **changes: Any) -> Any:
    model, trace = make(), Trace()
    trainer = trainer_for(tmp_path, *callbacks, trace, **changes)
    trainer.fit(model, changes.pop("train", None) or data(), changes.pop("val", None) or data())
    return model, trace, trainer


# ---------------------------------------------------------- st-detach, st-migrate: files and models


class Detaches(Net):
    """As filters of adapters and wrappers of state do."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)
        return {key: value.detach().clone() for key, value in state.items()}


class Halves(Net):
    """Small files."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {key: value.half() for key, value in super().state_dict(*args, **kwargs).items()}


class ToNumpyAndBack(Net):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {k: torch.from_numpy(v.numpy().copy()) for k, v in state.items()}


class HookClones(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_state_dict_post_hook(self._clone)

    @staticmethod
    def _clone(module: Any, state: Any, prefix: str, metadata: Any) -> None:
        for key in list(state):
            state[key] = state[key].clone()


class Complex(Detaches):
    """A complex weight, a scalar one, a list of them, a norm of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.body[0] = parametrizations.weight_norm(self.body[0])
        self.phase = nn.Parameter(torch.ones(4, dtype=torch.complex64))
        self.gain = nn.Parameter(torch.tensor(1.0))
        self.shifts = nn.ParameterList([nn.Parameter(torch.zeros(1)) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body[1](self.body[0](x)) * self.phase
        return self.gain * self.body[2](hidden.real) + sum(self.shifts)


@pytest.mark.parametrize(
    "make", [Detaches, Halves, ToNumpyAndBack, HookClones, Complex], ids=lambda m: m.__name__
)
def test_st_detach_every_file_is_of_the_average(tmp_path: Path, make: Any) -> None:
    saver = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{step}", every_n_train_steps=1)
    model, trace, _ = run(tmp_path, make, uniform(), saver, max_epochs=2)
    halves = make is Halves
    for step in (3, 8):
        content = read(tmp_path / f"step={step}.ckpt")
        for name in content["state_dict"]:
            mean = torch.stack([w[name] for w in trace.steps[:step]]).mean(0)
            tolerance = {"rtol": 2e-3, "atol": 2e-3} if halves else {}
            torch.testing.assert_close(content["state_dict"][name], mean, **tolerance)
            assert torch.equal(content["raw"]["state_dict"][name], trace.steps[step - 1][name])
    loaded = make.load_from_checkpoint(tmp_path / "step=8.ckpt", map_location="cpu")
    again, trace_again = make(), Trace()
    trainer_for(tmp_path, uniform(), trace_again, max_epochs=2).fit(
        again, data(), data(), ckpt_path=tmp_path / "step=4.ckpt"
    )
    for (name, one), other in zip(model.named_parameters(), loaded.parameters(), strict=True):
        if not halves:
            assert torch.equal(one, other), name
            assert torch.equal(one, again.get_parameter(name)), name


class MigratesInHook(Net):
    """Weights of an older version in another unit."""

    migrates = False

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.migrates:
            state = checkpoint["state_dict"]
            state["body.2.weight"] = state["body.2.weight"] * 2

    def edit(self, name: str, value: Tensor) -> Tensor:
        return value * 2 if name == "body.2.weight" else value


class MigratesInPlace(MigratesInHook):
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.migrates:
            checkpoint["state_dict"]["body.2.weight"].mul_(2)


class MigratesInPreHook(MigratesInHook):
    """In a hook of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(self._double)

    @staticmethod
    def _double(module: Any, state: Any, prefix: str, *_: Any) -> None:
        if module.migrates:
            state["body.2.weight"] = state["body.2.weight"] * 2

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        pass


class MigratesInLoad(MigratesInPreHook):
    """In a method of its own, and a new name for a layer."""

    _double = staticmethod(lambda *_: None)

    def __init__(self) -> None:
        super().__init__()
        self.fresh = None

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        if self.migrates and "body.2.weight" in state_dict:
            state_dict = {**state_dict, "body.2.weight": state_dict["body.2.weight"] * 2}
        return super().load_state_dict(state_dict, strict, assign)


class Renames(MigratesInHook):
    """A layer that has another name now."""

    def __init__(self) -> None:
        super().__init__()
        if self.migrates:
            self.head = self.body.pop(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)) if self.migrates else self.body(x)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        for key in [key for key in state if key.startswith("body.2.")]:
            if self.migrates:
                state[key.replace("body.2.", "head.")] = state.pop(key)

    def edit(self, name: str, value: Tensor) -> Tensor:
        return value


@pytest.mark.parametrize(
    "make", [MigratesInHook, MigratesInPlace, MigratesInPreHook, MigratesInLoad, Renames],
    ids=lambda make: make.__name__,
)  # fmt: skip
def test_st_migrate_reaches_the_average_and_the_raw_weights(tmp_path: Path, make: Any) -> None:
    saver = ModelCheckpoint(tmp_path, filename="old")
    run(tmp_path, make, ema(decay=0.9), saver, max_epochs=1)
    content = read(tmp_path / "old.ckpt")
    new = type("New", (make,), {"migrates": True})
    begun: dict[str, Any] = {}

    class Look(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            begun["raw"] = weights(pl_module)
            with rule.showing(pl_module):
                begun["average"] = weights(pl_module)

    rule = ema(decay=0.9)
    trainer_for(tmp_path, rule, Look(), max_epochs=2).fit(
        new(), data(), data(), ckpt_path=tmp_path / "old.ckpt"
    )
    for label, state in (("average", content["state_dict"]), ("raw", content["raw"]["state_dict"])):
        for name, value in state.items():
            now = name.replace("body.2.", "head.") if make is Renames else name
            assert torch.equal(begun[label][now], new().edit(name, value)), (label, name)
    assert not torch.equal(begun["raw"]["body.0.bias"], begun["average"]["body.0.bias"])


# -------------------------------------------------------------- st-buffer: what a validation writes


class Threshold(Net):
    """A float buffer written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("best", torch.zeros(()))

    def write(self) -> None:
        self.best += 10

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if batch_idx == 0 and not self.trainer.sanity_checking:
            self.write()


class AssignsBest(Threshold):
    def write(self) -> None:
        self.best = self.best + 10


class WritesData(Threshold):
    def write(self) -> None:
        self.best.data.copy_(self.best + 10)


class WritesNumpy(Threshold):
    def write(self) -> None:
        self.best.numpy()[...] += 10


class AtEpochEnd(Threshold):
    def write(self) -> None:
        pass

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.best.fill_(self.best + 10)


class AtStart(AtEpochEnd):
    def on_validation_epoch_end(self) -> None:
        pass

    def on_validation_start(self) -> None:
        if not self.trainer.sanity_checking:
            self.best.fill_(self.best + 10)


class InATrainedOne(Threshold):
    """Training counts on the same buffer: it is not a weight."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.best += 1
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        Net.validation_step(self, batch, batch_idx)
        self.best += 10


class Registers(Net):
    def on_validation_epoch_end(self) -> None:
        seen = getattr(self, "best", torch.zeros(()))
        self.register_buffer("best", seen + 10)


class Grows(Threshold):
    """A queue that is made longer."""

    def write(self) -> None:
        self.best = torch.cat([self.best.reshape(-1), self.best.new_ones(1)])


WRITERS = [Threshold, AssignsBest, WritesData, WritesNumpy, AtEpochEnd, AtStart, InATrainedOne,
           Registers, Grows]  # fmt: skip


@pytest.mark.parametrize("rule", [ema, uniform, swa], ids=["ema", "uniform", "swa"])
@pytest.mark.parametrize("validate", ["averaged", "raw", "both"])
@pytest.mark.parametrize("make", WRITERS, ids=lambda make: make.__name__)
def test_st_buffer_what_a_validation_changed_stays(
    tmp_path: Path, make: Any, validate: str, rule: Any
) -> None:
    plain, stock, _ = run(tmp_path, make)
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    model, trace, _ = run(tmp_path, make, rule(validate=validate), saver)
    for one, other in zip(stock.steps, trace.steps, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(plain.best, model.best)
    for epoch in range(4):
        content = read(tmp_path / f"epoch={epoch}.ckpt")
        assert torch.equal(content["state_dict"]["best"], stock.validated[-4 + epoch]["best"])
    assert not torch.equal(plain.body[0].weight, model.body[0].weight)


def test_st_buffer_a_continued_run_shares_what_a_validation_changed(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    model, _, _ = run(tmp_path, InATrainedOne, ema(), saver)
    again = InATrainedOne()
    trainer = trainer_for(tmp_path, ema(), num_sanity_val_steps=0)
    trainer.fit(again, data(), data(), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert torch.equal(model.best, again.best)
    assert torch.equal(model.body[0].weight, again.body[0].weight)


def test_st_buffer_a_batchnorm_in_training_mode_is_still_shown_as_an_average(
    tmp_path: Path,
) -> None:
    class Adapts(Net):
        """Follows the validation data, as a test-time adaptation does."""

        def __init__(self) -> None:
            super().__init__()
            self.body.insert(1, nn.BatchNorm1d(4))

        def on_validation_model_eval(self) -> None:
            pass

    model, trace, _ = run(tmp_path, Adapts, uniform())
    assert not torch.equal(model.body[1].running_mean, trace.steps[-1]["body.1.running_mean"])


# ------------------------------------------------------------------- st-both: the raw validation


class AverageMeter:
    """That of the ImageNet example."""

    def __init__(self) -> None:
        self.sum, self.count = 0.0, 0

    def update(self, value: float) -> None:
        self.sum += value
        self.count += 1


class Looks(Net):
    """Looks around in validation, keeps score in every way, and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("level", torch.zeros(()))
        self.outputs: list[Tensor] = []
        self.history: dict[str, list[float]] = {"loss": []}
        self.totals = {"loss": torch.zeros(())}
        self.labels: Counter[int] = Counter()
        self.meter = AverageMeter()
        self.counts = np.zeros(3)
        self.plain = torch.zeros(2)
        self.mean = MeanMetric()
        self.num = 0
        self.seen: list[Any] = []

    def on_validation_start(self) -> None:
        self.num += 1

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        trainer = self.trainer
        assert trainer.datamodule is not None
        assert trainer.checkpoint_callback is not None
        assert self.logger.log_dir
        self.logger.experiment.log_metrics({"mine": 1.0}, step=0)
        loss = nn.functional.mse_loss(self(batch[0]) + 0.1 * torch.rand(()), batch[1])
        self.calls += 1
        self.level = self.level + 1
        self.outputs.append(loss)
        self.history["loss"].append(float(loss))
        self.meter.update(float(loss))
        self.totals["loss"] += loss
        self.labels.update([batch_idx])
        self.counts += 1
        self.plain += 1
        self.mean.update(loss)
        self.log("mean", self.mean)
        self.log("val_loss", loss, on_step=True, on_epoch=True)
        self.log("epoch_seen", float(self.current_epoch))
        self.log("step_seen", float(self.global_step))

    def on_validation_epoch_end(self) -> None:
        self.log("outputs", float(len(self.outputs)))
        self.outputs.clear()
        if self.num > 9:
            self.trainer.should_stop = True

    def evidence(self) -> list[Any]:
        return [self.calls, self.level, self.history, vars(self.meter), self.counts.tolist(),
                self.plain, self.num, self.totals, self.labels, torch.rand(2)]  # fmt: skip


class Data(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        return DataLoader(data().dataset, batch_size=8, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(data().dataset, batch_size=8, shuffle=True)


class Counts(Callback):
    """What the hooks of a validation are called for."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def on_validation_start(self, *_: Any) -> None:
        self.calls.append("start")

    def on_validation_batch_end(self, *_: Any) -> None:
        self.calls.append("batch")

    def on_validation_end(self, *_: Any) -> None:
        self.calls.append("end")


def looked(folder: Path, validate: str, **changes: Any) -> dict[str, Any]:
    model, trace, counts = Looks(), Trace(), Counts()
    saver = ModelCheckpoint(folder, monitor="val_loss_epoch", save_top_k=-1, filename="{step}")
    stops = EarlyStopping("val_loss_epoch", patience=9)
    logger = CSVLogger(folder, name="", version="")
    trainer = trainer_for(
        folder, ema(validate=validate, decay=0.9), trace, counts, saver, stops,
        logger=logger, **changes,
    )  # fmt: skip
    torch.manual_seed(3)
    trainer.fit(model, datamodule=Data())
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    lines = (folder / "metrics.csv").read_text().splitlines()
    return {
        "evidence": model.evidence(), "steps": trace.steps, "calls": counts.calls,
        "scores": stops.best_score, "metrics": metrics, "lines": lines,
        "columns": lines[0].split(","), "files": sorted(p.name for p in folder.glob("*.ckpt")),
        "progress": trainer.fit_loop.state_dict(), "hooks": [*vars(counts)],
    }  # fmt: skip


@pytest.mark.parametrize(
    "changes", [{}, {"val_check_interval": 2}, {"check_val_every_n_epoch": 2},
                {"accumulate_grad_batches": 3, "val_check_interval": 0.5}],
    ids=["each epoch", "inside", "every other", "accumulating"],
)  # fmt: skip
def test_st_both_the_raw_validation_is_the_fits_own_and_leaves_no_trace(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    one = looked(tmp_path / "averaged", "averaged", **changes)
    other = looked(tmp_path / "both", "both", **changes)
    raw = {name: value for name, value in other["metrics"].items() if name.startswith("raw_")}
    assert {name.removeprefix("raw_") for name in raw} == {
        name for name in one["metrics"] if name != "val_loss"
    } | {"val_loss"}
    for name in ("epoch_seen", "step_seen", "outputs"):
        assert raw[f"raw_{name}"] == one["metrics"][name], name
    assert raw["raw_val_loss"] != one["metrics"]["val_loss"]
    assert {c for c in other["columns"] if not c.startswith("raw_")} == set(one["columns"])
    assert len(one["lines"]) == len(other["lines"])
    for key in ("calls", "files", "scores", "progress", "hooks"):
        assert str(one[key]) == str(other[key]), key
    assert all(other["metrics"][name] == value for name, value in one["metrics"].items())
    for a, b in zip(one["steps"], other["steps"], strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert str(one["evidence"]) == str(other["evidence"])


def test_st_both_measures_the_raw_weights(tmp_path: Path) -> None:
    _, trace, trainer = run(tmp_path, Net, ema(validate="both", decay=0.9))
    raw = Net()
    raw.load_state_dict(trace.steps[-1])
    [expected] = trainer_for(tmp_path).validate(raw, data(), verbose=False)
    assert float(trainer.callback_metrics["raw_val_loss"]) == pytest.approx(expected["val_loss"])


class Large(Net):
    """Holds data as arrays, cannot be copied, and draws in training."""

    def __init__(self) -> None:
        super().__init__()
        self.body.insert(1, nn.BatchNorm1d(4))
        self.body.append(nn.Linear(1, 1).requires_grad_(False))
        self.bank = np.zeros(4_000_000)
        self.more = [torch.zeros(1_000_000), torch.zeros(1_000_000)]
        self.teacher = copy.deepcopy(self.body).requires_grad_(False)
        self.meter = AverageMeter()
        self.num = 0

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("cannot be copied")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.num += 1
        self.meter.update(1.0)
        with torch.no_grad():
            for mean, now in zip(self.teacher.parameters(), self.body.parameters(), strict=True):
                mean.lerp_(now, 0.1)
        self.log("train_loss", 1.0, on_epoch=True)
        return super().training_step((batch[0] + 0.1 * torch.rand(3), batch[1]), batch_idx)


@pytest.mark.parametrize("validate", ["averaged", "both"])
def test_st_both_and_bn_batches_copy_no_model(tmp_path: Path, validate: str) -> None:
    import tracemalloc

    def fit(*callbacks: Callback) -> Any:
        torch.manual_seed(2)
        return run(tmp_path, Large, *callbacks, max_epochs=2)

    plain, stock, _ = fit()
    tracemalloc.start()
    model, trace, _ = fit(uniform(bn_batches=2, validate=validate))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.5 * plain.bank.nbytes
    for one, other in zip(stock.steps, trace.steps, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert (plain.num, vars(plain.meter)) == (model.num, vars(model.meter))
    assert all(map(torch.equal, plain.teacher.parameters(), model.teacher.parameters()))
    assert model.body[1].training
    assert model.body[1].momentum == 0.1


# ------------------------------------------------------------------------ st-lazy, st-group, sc-swa


class LazyNet(Net):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.Tanh(), nn.Unflatten(1, (1, 4)),
            nn.LazyConv1d(2, 2), nn.Flatten(), nn.LazyLinear(1),
        )  # fmt: skip


@pytest.mark.parametrize("sanity", [0, 2])
@pytest.mark.parametrize("kind", ["ema", "uniform", "swa"])
def test_st_lazy_layers_are_averaged_and_continued(tmp_path: Path, kind: str, sanity: int) -> None:
    rule = {"ema": ema, "uniform": uniform, "swa": swa}[kind]

    def fit(*callbacks: Callback, path: Path | None = None) -> Any:
        torch.manual_seed(1)
        model, trace = LazyNet(), Trace()
        trainer = trainer_for(tmp_path, *callbacks, trace, num_sanity_val_steps=sanity)
        torch.manual_seed(1)
        trainer.fit(model, data(), data(), ckpt_path=path)
        return model, trace

    _, stock = fit()
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    model, trace = fit(rule(bn_batches=2, validate="both"), saver)
    for one, other in zip(stock.steps, trace.steps, strict=True):
        for name in one:
            assert torch.equal(one[name], other[name]), (name, one[name], other[name])
    again, _ = fit(rule(bn_batches=2, validate="both"), path=tmp_path / "epoch=2.ckpt")
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))
    if kind == "uniform":
        mean = torch.stack([step["body.0.weight"] for step in trace.steps]).mean(0)
        torch.testing.assert_close(model.body[0].weight.data, mean)


def clip_of(preset: str) -> Callback:
    with initialize_config_module("app.conf", version_base="1.3"):
        return instantiate(compose(overrides=[f"+clip={preset}"]).clip, _convert_="all")


@pytest.mark.parametrize("sanity", [0, 2])
@pytest.mark.parametrize("preset", presets_of("clip"))
def test_st_lazy_layers_are_clipped_as_others(tmp_path: Path, preset: str, sanity: int) -> None:
    """The head, which `adaptive` leaves alone, is the last lazy layer."""

    class Ready(LazyNet):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(7)
            self(torch.zeros(8, 3))
            self.body[1].reset_running_stats()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=2.0)

    class NotReady(Ready):
        def __init__(self) -> None:
            LazyNet.__init__(self)

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if self.global_step == 0:  # the same first weights
                self(batch[0])
                self.load_state_dict(Ready().state_dict())

    steps = []
    for make in (Ready, NotReady):
        _, trace, _ = run(tmp_path, make, clip_of(preset), num_sanity_val_steps=sanity)
        steps.append(trace.steps)
    assert len(steps[0]) == len(steps[1]) == 16
    for one, other in zip(*steps, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_st_lazy_layers_stand_in_the_table_as_such(
    tmp_path: Path, checked: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    lazy, known = LazyNet(), Net()
    table = StartTable(checked().plain)
    for model in (lazy, known):
        run(tmp_path, lambda model=model: model, table, max_epochs=1, num_sanity_val_steps=0)
    first, second = (
        line for line in capsys.readouterr().out.splitlines() if line.startswith("length")
    )
    assert first.endswith("4 optimizer steps of 0 parameters, and 8 that the first batch shapes")
    assert second.endswith("4 optimizer steps of 21 parameters")


class GrowsGroup(Net):
    """A head that joins the optimizer in the third epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(3, 1)

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 2:
            self.optimizers().add_param_group({"params": [*self.extra.parameters()], "lr": 0.01})

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.body.parameters(), lr=0.05)


def test_st_group_added_later_than_a_list_of_rates_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"averaging\.lr") as error:
        run(tmp_path, GrowsGroup, swa(start=1, lr=[0.1]))
    assert str(error.value) == (
        "averaging.lr must have a rate for each of the 2 parameter groups of GrowsGroup, of which "
        "some were added in epoch 2, got [0.1]; type one rate for all, averaging.lr=0.1, or "
        "averaging.lr=null for averaging.lr_factor"
    )


def test_st_group_added_later_follows_the_factor_and_one_rate(tmp_path: Path) -> None:
    for changes, expected in (({"lr": 0.02}, [0.02, 0.02]), ({"lr_factor": 0.5}, [0.025, 0.005])):
        _, _, trainer = run(tmp_path, GrowsGroup, swa(start=1, anneal_epochs=0, **changes))
        rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
        assert rates == pytest.approx(expected)


class AdamNet(Net):
    def __init__(self, lr: float = 1e-3) -> None:
        super().__init__()
        self.lr = lr

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(
            [{"params": self.body[0].parameters(), "lr": self.lr / 100},
             {"params": self.body[2].parameters()}], lr=self.lr,
        )  # fmt: skip


def test_sc_swa_lr_of_the_preset_is_relative_to_the_runs(tmp_path: Path) -> None:
    settings = composed("averaging=swa")
    assert (settings.lr, settings.lr_factor) == (None, 0.5)
    rule = swa(start=1, anneal_epochs=1, lr=settings.lr, lr_factor=settings.lr_factor)
    _, _, trainer = run(tmp_path, AdamNet, rule)
    rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
    assert rates == pytest.approx([0.5e-5, 0.5e-3])


@pytest.mark.parametrize("lr", [0.1, [1e-4, 0.1], [1e-5, 0.1]])
def test_sc_swa_lr_ten_times_the_runs_is_refused(tmp_path: Path, lr: Any) -> None:
    with pytest.raises(ValueError, match=r"averaging\.lr must be at most") as error:
        run(tmp_path, AdamNet, swa(lr=lr))
    too_high, group, rate = (0.1, 0, 1e-5) if lr == 0.1 else (0.1, 1, 1e-3)
    assert str(error.value) == (
        f"averaging.lr must be at most ten times the rate of the run, which is {rate:g} in "
        f"parameter group {group} of AdamNet, got {too_high:g}; for half of the run's rate type "
        "averaging.lr=null averaging.lr_factor=0.5"
    )


def test_sc_swa_lr_up_to_ten_times_the_peak_of_a_schedule_is_accepted(tmp_path: Path) -> None:
    class OneCycle(Net):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=16)
            return [optimizer], [{"scheduler": cycle, "interval": "step"}]

    recorder = Recorder()
    run(tmp_path, OneCycle, swa(start=1, lr=0.09, anneal_epochs=0), recorder)
    assert recorder.rates[-1] == pytest.approx([0.09])


# ----------------------------------------------------------------------------- models that change


class GrowsLayer(Net):
    """A layer that comes in the third epoch, a list that grows, a scale that goes."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(1))])
        self.goes = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x) * torch.stack([*self.scales]).prod()
        return out + self.goes(x) if hasattr(self, "goes") else out

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 2:
            del self.goes
            self.scales.append(nn.Parameter(torch.tensor([1.5])))
            self.optimizers().add_param_group({"params": [self.scales[1]]})


class Codes(Net):
    """Codes in integers, a spectral norm, and a table that is never trained."""

    def __init__(self) -> None:
        super().__init__()
        self.body[2] = parametrizations.spectral_norm(self.body[2])
        self.register_buffer("codes", torch.zeros(3, dtype=torch.int8))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("narrow", torch.zeros(2, dtype=torch.float16))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.codes += 1
        self.narrow += 0.25
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("validate", ["averaged", "both"])
@pytest.mark.parametrize("make", [GrowsLayer, Codes], ids=lambda make: make.__name__)
def test_an_average_by_hand_of_a_model_that_changes(
    tmp_path: Path, make: Any, validate: str
) -> None:
    saver = ModelCheckpoint(tmp_path, filename="last")
    model, trace, _ = run(tmp_path, make, ema(decay=0.75, validate=validate), saver)
    _, stock, _ = run(tmp_path, make)
    for one, other in zip(stock.steps, trace.steps, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    average: dict[str, Tensor] = {}
    for step in trace.steps:
        for name, value in step.items():
            before = average.get(name, value.float())
            average[name] = before.lerp(value.float(), 0.25)
    content = read(tmp_path / "last.ckpt")
    assert content["state_dict"].keys() == trace.steps[-1].keys()
    for name, value in trace.steps[-1].items():
        now, saved = model.state_dict()[name], content["state_dict"][name]
        assert torch.equal(now, saved)
        assert torch.equal(content["raw"]["state_dict"][name], value)
        expected = average[name].to(value.dtype) if value.is_floating_point() else value
        torch.testing.assert_close(now, expected, msg=name)
