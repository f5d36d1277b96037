"""The techniques as callbacks of anybody's Trainer, and runs from Python with objects."""

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
import lightning.pytorch as pl
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import app
from app.averaging import Averaging, AveragingTrainer
from app.clip import Clip, Measured
from app.errors import Refused
from app.record.folder import RunFolder


class Lit(pl.LightningModule):
    """A network without randomness, that knows its optimizer and keeps a number of its weights."""

    def __init__(self, lr: float = 0.1, batch_norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        norm = nn.BatchNorm1d(8) if batch_norm else nn.Identity()
        self.net = nn.Sequential(nn.Linear(4, 8), norm, nn.Tanh(), nn.Linear(8, 1))
        self.lr = lr
        self.norms: list[float] = []

    def loss(self, batch: Any) -> Any:
        return ((self.net(batch[0]) - batch[1]) ** 2).mean()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch), on_step=False, on_epoch=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        grads = [p.grad for p in self.parameters() if p.grad is not None]
        self.norms.append(float(nn.utils.get_total_norm(grads)))

    def on_save_checkpoint(self, checkpoint: Any) -> None:
        checkpoint["sum"] = self.net[0].weight.sum().item()


class Data(pl.LightningDataModule):
    def __init__(self, batch_size: int = 8, num_samples: int = 48) -> None:
        super().__init__()
        self.batch_size = batch_size
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(num_samples, 4, generator=generator)
        self.samples = TensorDataset(x, 3 * x.sum(1, keepdim=True))

    def train_dataloader(self) -> Any:
        return DataLoader(self.samples, batch_size=self.batch_size)

    def val_dataloader(self) -> Any:
        return DataLoader(self.samples, batch_size=16)

    test_dataloader = val_dataloader


QUIET: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False,
                         "enable_model_summary": False}  # fmt: skip
EMA = ("averaging=ema", "averaging.decay=0.9", "averaging.bn_batches=null")
SMALL = ("trainer.accelerator=cpu", "trainer.max_epochs=2", "callbacks.progress=null", "logger=csv")


def fitted(
    *callbacks: Any, data: Any = None, kind: Any = pl.Trainer, **changes: Any
) -> tuple[Lit, pl.Trainer]:
    settings: Any = {"max_epochs": 3, "enable_checkpointing": False, **QUIET, **changes}
    trainer = kind(callbacks=list(callbacks), **settings)
    trainer.fit(model := Lit(), datamodule=data or Data())
    return model, trainer


def same(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


# ----------------------------------------------------------------- callbacks in Lightning's Trainer


def test_an_average_in_any_trainer_is_the_one_by_hand(tmp_path: Path) -> None:
    class Recorder(pl.Callback):
        steps: list[Any] = []  # noqa: RUF012

        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            self.steps.append({n: p.detach().clone() for n, p in module.named_parameters()})

    kept = ModelCheckpoint(dirpath=tmp_path, monitor="val_loss", save_last=True)
    model, trainer = fitted(
        *app.callbacks(*EMA), Recorder(), kept, enable_checkpointing=True, num_sanity_val_steps=0
    )
    average = Recorder.steps[0]
    for step in Recorder.steps[1:]:
        average = {n: torch.lerp(average[n], step[n], 1 - 0.9) for n in average}
    assert same(average, dict(model.named_parameters()))
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert same(average, saved["state_dict"])
    assert same(Recorder.steps[-1], saved["raw"]["state_dict"])
    assert saved["sum"] == average["net.0.weight"].sum().item()
    assert saved["raw"]["sum"] == Recorder.steps[-1]["net.0.weight"].sum().item()
    (found,) = trainer.test(Lit(), Data(), ckpt_path="best", verbose=False)
    assert found["test_loss"] == pytest.approx(float(kept.best_model_score))


def test_accumulation_in_any_trainer_is_the_large_batch() -> None:
    typed = ("accumulate=constant", "accumulate.factor=4")
    small, trainer = fitted(*app.callbacks(*typed), data=Data(8, 48))
    large, other = fitted(data=Data(32, 48))
    assert trainer.global_step == other.global_step == 6  # 4 and 2 of 6, in each epoch
    for one, two in zip(small.parameters(), large.parameters(), strict=True):
        torch.testing.assert_close(one, two)


def test_clipping_in_any_trainer_is_torchs(tmp_path: Path) -> None:
    logger = pl.loggers.CSVLogger(tmp_path)
    ours, _ = fitted(*app.callbacks("clip=norm", "clip.max_norm=0.5"), logger=logger,
                     log_every_n_steps=2)  # fmt: skip
    theirs, _ = fitted(gradient_clip_val=0.5)
    assert max(ours.norms) <= 0.5
    for one, two in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, two)
    lines = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    assert {"grad_norm", "clipped_share"} <= set(lines[0].split(","))


EVERY = {
    f"{group}={preset}": ("averaging.bn_batches=null", f"{group}={preset}", *more)
    if group == "averaging"
    else (f"{group}={preset}", *more)
    for group, preset, more in (
        ("averaging", "ema", ("averaging.decay=0.8",)),
        ("averaging", "swa", ()),
        ("averaging", "uniform", ()),
        ("clip", "adaptive", ()),
        ("clip", "norm", ()),
        ("clip", "percentile", ()),
        ("clip", "value", ()),
        ("accumulate", "constant", ()),
        ("accumulate", "schedule", ("accumulate.starts=[0,1]", "accumulate.factors=[1,2]")),
        ("accumulate", "effective", ("accumulate.micro_batch_size=8",
                                     "accumulate.batch_size=16")),
    )
}  # fmt: skip


def test_every_preset_is_tried() -> None:
    from conftest import presets_of

    groups = ("averaging", "clip", "accumulate")
    assert set(EVERY) == {f"{group}={one}" for group in groups for one in presets_of(group)}


@pytest.mark.parametrize("preset", EVERY)
def test_a_preset_trains_as_app_run_does_and_goes_on_from_a_checkpoint(
    preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    typed = EVERY[preset]
    own = () if preset.startswith("clip") else ("clip=none",)
    ours = Lit()
    app.run(*SMALL, *own, *typed, "trainer.max_epochs=4", "test=last", model=ours, data=Data())
    callbacks = app.callbacks(*typed)
    whole, _ = fitted(*callbacks, max_epochs=4)
    assert same(whole.state_dict(), ours.state_dict())

    class Cut(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            if trainer.current_epoch == 2:
                raise RuntimeError("cut")

    def kept() -> ModelCheckpoint:
        return ModelCheckpoint(dirpath="kept", save_last=True, save_on_train_epoch_end=True)

    with pytest.raises(RuntimeError, match="cut"):
        fitted(*callbacks, Cut(), kept(), max_epochs=4, enable_checkpointing=True)
    model = Lit()
    trainer = pl.Trainer(max_epochs=4, callbacks=[*app.callbacks(*typed), kept()], **QUIET)
    trainer.fit(model, Data(), ckpt_path="kept/last.ckpt")
    assert same(whole.state_dict(), model.state_dict())
    again, _ = fitted(*callbacks, max_epochs=4)  # the same callbacks, also after one that was cut
    assert same(whole.state_dict(), again.state_dict())


def test_callbacks_come_in_the_order_in_which_they_act() -> None:
    typed = ("averaging=ema", "clip=adaptive", "accumulate=constant", "accumulate.factor=4",
             "callbacks=early_stopping", "callbacks.early_stopping.patience=2")  # fmt: skip
    names = [type(one).__name__ for one in app.callbacks(*typed)]
    assert names == ["ConstantAccumulation", "AdaptiveClip", "Ema", "ClipsRaw", "Guest",
                     "EarlyStopping"]  # fmt: skip
    assert [type(one).__name__ for one in app.callbacks()] == ["Guest"]  # nothing that is not typed


def test_an_exponential_average_knows_the_steps_of_a_schedule() -> None:
    typed = ("accumulate=schedule", "accumulate.starts=[0,1]", "accumulate.factors=[1,3]",
             "averaging=ema", "averaging.bn_batches=null", "averaging.horizon=0.5")  # fmt: skip
    callbacks: Any = app.callbacks(*typed)
    _, trainer = fitted(*callbacks)
    assert trainer.global_step == 6 + 2 + 2
    (ema,) = (one for one in callbacks if isinstance(one, Averaging))
    assert ema.step_metrics() == {"ema_decay": pytest.approx(1 - 1 / (0.5 * 10))}


REFUSED: dict[tuple[Any, ...], str] = {
    ("averaging=emaa",): "averaging=emaa is not a preset; choose one of custom, ema, none, swa, "
    "uniform; did you mean averaging=ema?",
    ("averaging=ema", "averaging.decay=2"): "averaging.decay must be from 0 to below 1, got 2.0; "
    "to switch averaging off use averaging=none",
    ("averaging.decay=0.9",): "averaging.decay has no effect: averaging is off; choose "
    "averaging=custom|ema|swa|uniform as well",
    ("clip=null",): "clip=null is not a preset; choose one of adaptive, custom, none, norm, "
    "percentile, value; to switch it off type clip=none",
    ("clip=custom",): "clip._target_ is required; type clip._target_=VALUE",
    ("clip=custom", "clip._target_=math.sin"): "clip._target_ must be a Callback, got math.sin; "
    "type clip._target_=package.Class",
    ("optimizer=adam",): "app.callbacks takes accumulate, clip, averaging, callbacks, which act in "
    "any Trainer, got optimizer=adam; give it to your own Trainer or module, or type "
    "app.run('optimizer=adam', model=..., data=...)",
    ("callbacks.checkpoint.monitor=acc",): "app.callbacks takes accumulate, clip, averaging, "
    "callbacks, which act in any Trainer, got callbacks.checkpoint.monitor=acc; give it to your "
    "own Trainer or module, or type app.run('callbacks.checkpoint.monitor=acc', model=..., "
    "data=...)",
    ("accumulate=effective",): "accumulate.micro_batch_size must be given where neither "
    "data.batch_size nor model.batch_size tells it; type accumulate.micro_batch_size=32",
    (3,): "what is typed must be texts such as 'averaging=ema', got a int; objects are given by "
    "name: app.run(model=..., data=...)",
}


@pytest.mark.parametrize("typed", REFUSED, ids=str)
def test_what_cannot_be_is_refused_as_on_the_command_line(typed: tuple[str, ...]) -> None:
    with pytest.raises(Refused) as refusal:
        app.callbacks(*typed)
    assert str(refusal.value) == REFUSED[typed]


IN_A_TRAINER: dict[str, tuple[tuple[str, ...], dict[str, Any], list[Any], str]] = {
    "accumulates too": (
        ("accumulate=constant",), {"accumulate_grad_batches": 2}, [],
        "trainer.accumulate_grad_batches must be 1 beside an accumulation, got 2; leave it out"),
    "clips too": (
        ("clip=norm",), {"gradient_clip_val": 1.0}, [],
        "trainer.gradient_clip_val must be null beside a clip preset, got 1.0; to clip by "
        "Lightning alone use clip=none"),
    "two of a kind": (
        ("clip=norm",), {}, app.callbacks("clip=value"),
        "clip must be one a trainer, got NormClip and ValueClip; keep one of the callbacks"),
    "Lightning's too": (
        ("clip=norm",), {}, [pl.callbacks.GradientAccumulationScheduler({0: 2})],
        "the callbacks of the trainer must be no technique of Lightning, of which ours know "
        "nothing, got GradientAccumulationScheduler; leave it out, and use accumulate=schedule"),
    "weights only": (
        EMA, {"enable_checkpointing": True}, [ModelCheckpoint(save_weights_only=True)],
        "averaging cannot act with ModelCheckpoint(save_weights_only=True) in a Trainer, which "
        "would save the raw weights; leave it out, or make the trainer an "
        "app.averaging.AveragingTrainer"),
}  # fmt: skip


@pytest.mark.parametrize("case", IN_A_TRAINER)
def test_what_cannot_act_in_a_trainer_is_refused_as_its_fit_begins(case: str) -> None:
    typed, settings, beside, text = IN_A_TRAINER[case]
    with pytest.raises(Refused) as refusal:
        fitted(*app.callbacks(*typed), *beside, **settings)
    assert str(refusal.value) == text


def test_shards_of_others_are_refused() -> None:
    (guest,) = app.callbacks()
    trainer = pl.Trainer(strategy=pl.strategies.ModelParallelStrategy(), devices=1, **QUIET)
    with pytest.raises(Refused) as refusal:
        guest.setup(trainer, Lit(), "fit")
    assert str(refusal.value) == (
        "the strategy of the trainer must leave each process all weights, got "
        "ModelParallelStrategy; use ddp, or app.run('strategy=fsdp', ...)"
    )


def test_weights_only_are_averaged_in_the_trainer_that_the_refusal_names(tmp_path: Path) -> None:
    kept = ModelCheckpoint(dirpath=tmp_path, filename="kept", save_weights_only=True)
    model, _ = fitted(*app.callbacks(*EMA), kept, kind=AveragingTrainer, enable_checkpointing=True)
    saved = torch.load(tmp_path / "kept.ckpt", weights_only=True)
    assert same(saved["state_dict"], model.state_dict())
    assert "raw" not in saved


class Mean(Averaging):
    """The mean of all epochs' ends, as people write it: with numbers of its own."""

    def __init__(self, since: int = 1) -> None:
        super().__init__(start_step=None, every_n_steps=None, validate="averaged", bn_batches=None)
        self.since = since

    def should_update(self, *, step: int, epoch: int, epoch_end: bool) -> bool:
        return epoch_end and epoch >= self.since


class Signs(Clip):
    """One method and nothing else; the norm is a tensor."""

    def measure(self, position: int, params: Any, grads: Any) -> Measured:
        def clip() -> None:
            for grad in grads:
                grad.sign_()

        return self.total_norm(grads, 2.0), clip  # type: ignore[return-value]


def doubled(weight_by: str | None) -> Any:
    from app.accumulate import ConstantAccumulation

    return ConstantAccumulation(factor=2, weight_by=weight_by)


CUSTOM = {
    "an average": (("averaging=custom", "averaging._target_=test_library.Mean",
                    "+averaging.since=0"), 18),
    "a rule": (("clip=custom", "clip._target_=test_library.Signs"), 18),
    "a factory": (("accumulate=custom", "accumulate._target_=test_library.doubled",
                   "+accumulate._partial_=false"), 9),
    "a partial": (("accumulate=custom", "accumulate._target_=test_library.doubled",
                   "+accumulate._partial_=true"), 9),
    "a callback": (("callbacks=custom",
                    "callbacks.custom._target_=lightning.pytorch.callbacks.ModelSummary",
                    "+callbacks.custom.max_depth=2"), 18),
}  # fmt: skip


@pytest.mark.parametrize("case", CUSTOM)
def test_a_class_of_ones_own_is_chosen_by_custom(case: str) -> None:
    typed, num_steps = CUSTOM[case]
    _, trainer = fitted(*app.callbacks(*typed))
    assert trainer.global_step == num_steps


def test_a_class_of_ones_own_is_announced_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    typed, _ = CUSTOM["an average"]
    with caplog.at_level("INFO", "app"):
        app.run(*SMALL, *typed, model=Lit(), data=Data(), name="mine")
    assert "averaging   Mean since=0" in capsys.readouterr().out
    assert "averaging: Mean starts at optimizer step 6" in caplog.text


def test_a_setting_that_a_class_does_not_take_is_refused_where_it_is_typed() -> None:
    typed, _ = CUSTOM["an average"]
    with pytest.raises(Refused, match=r"bn_batches is not an argument of test_library\.M"):
        app.callbacks(*typed, "averaging.bn_batches=4")


def test_an_experiment_may_have_more_callbacks(tmp_path: Path) -> None:
    path = tmp_path / "experiment/mine.yaml"
    path.parent.mkdir()
    rate = "lightning.pytorch.callbacks.LearningRateMonitor"
    path.write_text(f"# @package _global_\ncallbacks: {{rate: {{_target_: {rate}}}}}\n")
    made = app.library.check(app.library._composed(["run_dir=x", "experiment=mine"], tmp_path))
    assert made.plain["callbacks"]["rate"] == {"_target_": rate}
    assert [*made.plain["callbacks"]] == ["checkpoint", "early_stopping", "progress", "rate"]


def test_an_experiment_may_have_groups_and_variables_of_ones_own(tmp_path: Path) -> None:
    for name, text in {
        "experiment/mine": "# @package _global_\ndefaults: [/paths: here]\nlimit: 48\n"
        "trainer: {limit_train_batches: '${limit}'}\nname: '${paths.name}'\n",
        "paths/here": "name: of_a_group\n",
        "experiment/typo": "# @package _global_\nlimit: 48\n",
    }.items():
        path = tmp_path / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    composed = app.library._composed(["run_dir=x", "experiment=mine"], tmp_path)
    made = app.library.check(composed)
    assert (made.trainer.limit_train_batches, made.name) == (48, "of_a_group")
    with pytest.raises(Refused, match="limit is not a key"):
        app.library.check(app.library._composed(["run_dir=x", "experiment=typo"], tmp_path))


def test_presets_of_ones_own_are_read_from_a_folder(tmp_path: Path) -> None:
    (tmp_path / "clip").mkdir()
    text = (
        "defaults: [/schema/clip/norm@_here_]\nmax_norm: 0.25\nnorm_type: 2.0\nnonfinite: error\n"
    )
    (tmp_path / "clip/mine.yaml").write_text(text)
    clip: Any = app.callbacks("clip=mine", config_dir=tmp_path)[0]
    assert clip.max_norm == 0.25
    with pytest.raises(Refused, match="config_dir must be a folder of presets, got nowhere"):
        app.callbacks("clip=mine", config_dir="nowhere")


@pytest.fixture
def _theirs() -> Iterator[None]:
    with hydra.initialize_config_dir("/", version_base="1.2"):
        yield


@pytest.mark.usefixtures("_theirs")
def test_the_callers_own_hydra_is_left_as_it_was() -> None:
    before = GlobalHydra.instance().hydra
    app.callbacks("clip=norm")
    with pytest.raises(Refused):
        app.callbacks("clip=nrm")
    assert GlobalHydra.instance().hydra is before
    assert str(hydra.version.getbase()) == "1.2"


# ------------------------------------------------------------------------------- runs with objects


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_an_object_is_trained_and_has_the_weights_of_its_run(here: Path) -> None:
    model, data = Lit(), Data()
    hooks = {"train_dataloader", "log", "on_train_epoch_start", "on_save_checkpoint", "setup"}
    result: Any = app.run(*SMALL, *EMA, model=model, data=data, name="mine")
    assert result["status"] == "finished"
    assert result["optimizer_steps"] == 12
    best = torch.load(here / "runs/mine/checkpoints/best.ckpt", weights_only=True)
    assert same(model.state_dict(), best["state_dict"])
    assert not hooks & (vars(model).keys() | vars(data).keys())  # of ours none is left
    config: Any = RunFolder(here / "runs/mine").read_config()
    assert config["model"] == {"_target_": "app.library.an_object", "of": "test_library.Lit"}
    assert config["optimizer"] is None
    typed = (here / "runs/mine/overrides.yaml").read_text().splitlines()
    assert typed == [f"- {word}" for word in (*SMALL, *EMA)]

    other = Lit()
    again = app.run(
        *SMALL, *EMA, model=other, data=data, name="mine"
    )  # is finished: trains nothing
    assert again == result
    assert same(model.state_dict(), other.state_dict())


def test_a_run_with_an_object_that_was_cut_goes_on_with_another_one(here: Path) -> None:
    class Cut(Lit):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == self.until:
                raise RuntimeError("cut")

        until = 1

    whole: Any = Cut()
    whole.until = 99
    app.run(*SMALL, *EMA, "test=last", model=whole, data=Data(), name="whole")
    with pytest.raises(RuntimeError, match="cut"):
        app.run(*SMALL, *EMA, "test=last", model=Cut(), data=Data(), name="cut")
    other: Any = Cut()
    other.until = 99
    result: Any = app.run(*SMALL, *EMA, "test=last", model=other, data=Data(), name="cut")
    assert result["optimizer_steps"] == 12
    assert same(whole.state_dict(), other.state_dict())


def test_the_same_object_goes_on_from_its_weights(here: Path) -> None:
    model = Lit()
    app.run(*SMALL, "test=last", model=model, data=Data(), name="first")
    first = copy.deepcopy(model.state_dict())
    app.run(*SMALL, "test=last", "trainer.max_epochs=1", model=model, data=Data(), name="second")
    fresh = Lit()
    app.run(*SMALL, "test=last", "trainer.max_epochs=3", model=fresh, data=Data(), name="whole")
    assert not same(first, model.state_dict())
    assert same(fresh.state_dict(), model.state_dict())  # SGD has no state


def test_a_class_is_made_by_the_run_with_what_is_typed(here: Path) -> None:
    typed = (*SMALL, "+model.lr=0.05", "+data.batch_size=16")
    result: Any = app.run(*typed, model=Lit, data=Data, name="mine")
    assert result["optimizer_steps"] == 6
    config: Any = RunFolder(here / "runs/mine").read_config()
    model = {"_target_": "test_library.Lit", "lr": 0.05, "batch_norm": False}
    assert config["model"] == model


def test_the_weights_of_several_processes_reach_the_object(here: Path) -> None:
    model, alone = Lit(), Lit()
    ranks = ("strategy=ddp_spawn", "trainer.devices=2", "test=last")
    app.run(*SMALL, *EMA, *ranks, model=model, data=Data(4), name="two")
    app.run(*SMALL, *EMA, "test=last", model=alone, data=Data(8), name="one")
    assert not any(parameter.is_shared() for parameter in model.parameters())
    for one, two in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(one, two)


def test_a_finder_of_the_rate_leaves_the_object_as_it_was(here: Path) -> None:
    typed = ("tuner=lr_find", "tuner.lr.num_steps=20", "fit=false", "optimizer=sgd")
    model = Lit()
    before = copy.deepcopy(model.state_dict())
    assert app.run(*SMALL, *typed, model=model, data=Data(), name="mine") is None
    assert same(before, model.state_dict())
    assert (here / "runs/mine/tuned.yaml").exists()
    assert not (here / "runs/.tuned").exists()


ANEW = (
    "makes {what} anew, with other values, and was given an object; give the class and what it "
    "takes: {give}"
)
BOTH = "model=Lit, 'model.KEY=VALUE', data=Data, 'data.KEY=VALUE'"
RUNS_REFUSED: dict[str, tuple[tuple[str, ...], dict[str, Any], str]] = {
    "typed and given": (("model=mlp",), {"model": Lit()}, "model is given, and model= typed as "
                        "well; leave one of them out"),
    "no module": ((), {"model": nn.Linear(2, 2)}, "model must be a "
                  "lightning.pytorch.LightningModule, got torch.nn.modules.linear.Linear"),
    "a loader": ((), {"data": DataLoader([1])}, "data must be a "
                 "lightning.pytorch.LightningDataModule, got "
                 "torch.utils.data.dataloader.DataLoader; type "
                 "data=LightningDataModule.from_datasets(...)"),
    "a cluster": (("launch=slurm",), {}, "app.run takes what is of one run, got launch=slurm; "
                  "leave it out, or type python -m app.train"),
    "shared": (("sharing=shared",), {"model": Lit(), "data": Data()},
               "sharing " + ANEW.format(what="model and data", give=BOTH)),
    "batch sizes": (("tuner=batch_size",), {"model": Lit(), "data": Data()},
                    "tuner.batch_size " + ANEW.format(what="model and data", give=BOTH)),
    "its own rate": (("tuner=lr_find",), {"model": Lit(), "data": Data()},
                     "tuner.lr " + ANEW.format(what="model and data", give=BOTH)),
    "a link": (("link={model.lr: x}",), {"model": Lit(), "data": Data()},
               "link " + ANEW.format(what="model and data", give=BOTH)),
    "an argument": (("model.lr=1",), {"model": Lit()}, "model.lr=1 is an argument of a class, and "
                    "model was given as an object; give the class: model=Lit"),
    "a name": ((), {"name": "../x"}, "name must be that of a folder, which no dot begins, got "
               "../x; type name=mine"),
}  # fmt: skip


@pytest.mark.parametrize("case", RUNS_REFUSED)
def test_a_run_that_cannot_be_is_refused(case: str, here: Path) -> None:
    typed, given, text = RUNS_REFUSED[case]
    with pytest.raises(Refused) as refusal:
        app.run(*SMALL, *typed, **given)
    assert str(refusal.value) == text
    assert list(here.iterdir()) == []


def test_an_object_that_other_processes_cannot_have_is_refused(here: Path) -> None:
    model: Any = Lit()
    model.act = lambda x: x
    ranks = ("strategy=ddp_spawn", "trainer.devices=2")
    with pytest.raises(Refused, match=r"got one that cannot be pickled \(.*put its class into a f"):
        app.run(*SMALL, *ranks, model=model, data=Data(), name="mine")


def test_a_run_that_was_given_an_object_is_evaluated_by_whom_has_it(here: Path) -> None:
    app.run(*SMALL, "trainer.max_epochs=1", model=Lit(), data=Data(), name="mine")
    done = subprocess.run(
        [sys.executable, "-m", "app.evaluate", "run=runs/mine"],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "evaluate: this run was given an object of test_library.Lit, which no command can make "
        "again; type app.run(name=..., model=..., data=...) with such an object, which then gets "
        "the weights of the run, or train with _target_=test_library.Lit"
    )


def test_public_names_can_be_called_whatever_was_imported_before() -> None:
    assert [name for name in app.__all__ if callable(getattr(app, name))] == ["callbacks", "run"]
