"""Weight averaging: the average is what is evaluated, saved, delivered and resumed."""

import math
from functools import cache, partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import refuse
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchmetrics import MeanSquaredError

from app import conf
from app.averaging import Averaging, AveragingTrainer, Uniform
from app.averaging.rules import annealed, decay_of, first_epoch
from app.averaging.shadow import Shadow
from app.conf.averaging.schema import Averaging as AveragingSchema

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in (
        ".*does not have many workers.*",
        "You defined a `validation_step` but have no `val_dataloader`.*",
        ".*You're resuming from a checkpoint that ended before the epoch ended.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        "The dirpath has changed from.*",
        "Be aware that when using `ckpt_path`, callbacks used to create.*",
        ".*smaller than the logging interval.*",
        ".*was configured without a length.*",
        ".*IterableDataset.*has `__len__` defined.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*`ModelCheckpoint.monitor='val_loss'`.*",
    )
]
NUM_BATCHES = 4


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def data(num_batches: int = NUM_BATCHES) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8 * num_batches, 3, generator=generator)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True) + 1), batch_size=8)


class Model(pl.LightningModule):
    """A linear regression with an integer buffer that counts, and a float one that follows."""

    def __init__(self, net: Any = lambda: nn.Linear(3, 1), lr: float = 0.1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = net()
        self.lr = lr
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("level", torch.zeros(()))
        self.register_buffer("mask", torch.tensor([0.0, -math.inf]))
        self.error = MeanSquaredError()

    def loss(self, batch: Any) -> Tensor:
        x, y = (part.to(self.dtype) for part in batch)
        return nn.functional.mse_loss(self.net(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        loss = self.loss(batch)
        self.count += 1
        self.level += 1
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any) -> None:
        x, y = (part.to(self.dtype) for part in batch)
        self.error(self.net(x), y)
        self.log("val_loss", self.error)

    def test_step(self, batch: Any) -> None:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: Any) -> Tensor:
        return self.net(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class Recorder(Callback):
    """The raw weights after each optimizer step, and what each validation saw."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []
        self.ends: list[dict[str, Tensor]] = []
        self.validated: list[dict[str, Tensor]] = []
        self.rates: list[list[float]] = []

    def on_train_batch_start(self, trainer, *_: Any) -> None:
        self.rates.append([g["lr"] for o in trainer.optimizers for g in o.param_groups])

    def on_train_batch_end(self, trainer, pl_module, *_: Any) -> None:
        self.steps.append(weights(pl_module))
        if trainer.is_last_batch:
            self.ends.append(weights(pl_module))

    def on_validation_batch_start(self, trainer, pl_module, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.validated.append(weights(pl_module))


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def composed(*overrides: str) -> Any:
    with initialize_config_module("app.conf", version_base="1.3"):
        return compose(overrides=[f"+{overrides[0]}", *overrides[1:]]).averaging


FOLDER = Path(conf.__file__).parent / "averaging"
PRESETS = sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem not in ("none", "custom"))
SHORT = {"ema": {"decay": 0.5}, "swa": {"lr_factor": None, "anneal_epochs": 1}}
"""What a preset takes to act in a run of sixteen steps, and to leave the raw weights alone."""


@cache
def settings_of(preset: str) -> dict[str, Any]:
    return OmegaConf.to_container(composed(f"averaging={preset}"))


def made(preset: str, **changes: Any) -> Averaging:
    """The average of a preset, as its YAML has it, but for what a short run needs."""
    settings = settings_of(preset) | {"bn_batches": None} | SHORT.get(preset, {}) | changes
    return instantiate(settings, _convert_="all")


def of_class(kind: type[Uniform], **changes: Any) -> Uniform:
    """An average by a rule of one's own, with the settings of `averaging=uniform`."""
    settings = settings_of("uniform") | {"bn_batches": None} | changes
    return kind(**{key: value for key, value in settings.items() if key != "_target_"})


ema, uniform, swa = (partial(made, preset) for preset in ("ema", "uniform", "swa"))


def trainer_for(tmp_path: Path, *callbacks: Callback, **changes: Any) -> pl.Trainer:
    arguments = {
        "max_epochs": 4,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "default_root_dir": tmp_path,
        "num_sanity_val_steps": 2,
        "inference_mode": True,
    }
    return AveragingTrainer(callbacks=list(callbacks), **(arguments | changes))


def mean(models: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([m[name] for m in models]).mean(0) for name in FLOATING}


def ema_of(models: list[dict[str, Tensor]], decay: float = 0.5) -> dict[str, Tensor]:
    average = {name: models[0][name].clone() for name in FLOATING}
    for model in models[1:]:
        for name in FLOATING:
            average[name] = average[name].lerp(model[name], 1 - decay)
    return average


FLOATING = ("net.weight", "net.bias", "level")


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], *, exact: bool = False) -> None:
    for name in one:
        if name in other:
            if exact:
                assert torch.equal(one[name], other[name]), name
            else:
                torch.testing.assert_close(one[name], other[name])


def differ(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return not torch.allclose(one["net.weight"], other["net.weight"])


def read(path: str | Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True, map_location="cpu")


# ------------------------------------------------------------------------------- the average itself


def test_ema_equals_a_loop_by_hand(tmp_path):
    model, recorder = Model(), Recorder()
    trainer_for(tmp_path, recorder, ema()).fit(model, data(), data())
    assert_same(ema_of(recorder.steps), weights(model))


def test_uniform_equals_the_mean_of_all_steps(tmp_path):
    model, recorder = Model(), Recorder()
    trainer_for(tmp_path, recorder, uniform(start_epoch=1)).fit(model, data(), data())
    assert_same(mean(recorder.steps[NUM_BATCHES:]), weights(model))


def test_every_n_steps_counts_from_the_start_step(tmp_path):
    model, recorder = Model(), Recorder()
    rule = uniform(start_step=3, every_n_steps=4)
    trainer_for(tmp_path, recorder, rule).fit(model, data(), data())
    assert_same(mean([recorder.steps[i] for i in (6, 10, 14)]), weights(model))
    assert rule.step_metrics() == {"averaged_models": 3.0}


def test_ema_warms_up_as_in_timm(tmp_path):
    model, recorder = Model(), Recorder()
    rule = ema(decay=0.9, warmup=True)
    trainer_for(tmp_path, recorder, rule, max_steps=5).fit(model, data(), data())
    average = recorder.steps[0]["net.weight"].clone()
    for t, step in enumerate(recorder.steps[1:], start=1):
        average = average.lerp(step["net.weight"], 1 - min(0.9, 1 - (1 + t) ** -0.75))
    torch.testing.assert_close(average, model.net.weight.data)
    assert rule.step_metrics() == {"ema_decay": pytest.approx(1 - 6**-0.75)}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"decay": 0.9}, 0.9),
        ({"half_life_steps": 10.0}, 0.5**0.1),
        ({"half_life_steps": 10.0, "every_n_steps": 5}, 0.5**0.5),
        ({"num_steps": 1000}, 0.98),
        ({"num_steps": 1000, "every_n_steps": 10}, 0.8),
        ({"num_steps": 4}, 0.0),
    ],
)
def test_the_decay_follows_from_what_is_given(given, expected):
    arguments = {
        "decay": None,
        "half_life_steps": None,
        "horizon": 0.05,
        "num_steps": math.inf,
        "every_n_steps": 1,
    }
    assert decay_of(**(arguments | given)) == pytest.approx(expected)


@pytest.mark.parametrize("num_steps", [math.inf, -1])
def test_a_decay_from_a_run_of_unknown_length_is_refused(num_steps):
    with pytest.raises(ValueError, match=r"^averaging\.decay must be given") as error:
        decay_of(
            decay=None, half_life_steps=None, horizon=0.1, num_steps=num_steps, every_n_steps=1
        )
    assert str(error.value) == (
        "averaging.decay must be given where the length of the run is not known, got null; type "
        "averaging.decay=0.999, or give the run a length with trainer.max_steps"
    )


def test_a_rule_of_ones_own_overrides_should_update(tmp_path):
    class FirstOfEach(Uniform):
        def should_update(self, *, step: int, epoch: int, epoch_end: bool) -> bool:
            return not epoch_end and step % NUM_BATCHES == 0

    model, recorder = Model(), Recorder()
    rule = of_class(FirstOfEach)
    trainer_for(tmp_path, recorder, rule).fit(model, data(), data())
    assert_same(mean(recorder.steps[::NUM_BATCHES]), weights(model))


def test_a_rule_may_keep_more_than_an_average(tmp_path):
    model, recorder = Model(), Recorder()
    trainer_for(tmp_path, recorder, RESUMED["last models"]()).fit(model, data(), data())
    assert_same(mean(recorder.steps[-3:]), weights(model))


def test_a_rule_may_choose_what_it_averages(tmp_path):
    class Weights(Uniform):
        def averages(self, name: str, tensor: Tensor) -> bool:
            return name.endswith("weight")

    model, recorder = Model(), Recorder()
    rule = of_class(Weights)
    trainer_for(tmp_path, recorder, rule).fit(model, data(), data())
    assert_same({"net.weight": mean(recorder.steps)["net.weight"]}, weights(model))
    assert torch.equal(model.net.bias, recorder.steps[-1]["net.bias"])


# ------------------------------------------------------------------------------------ the avg- rows


@pytest.mark.parametrize("which", ["in memory", "best", "last"])
def test_avg_test_tests_and_predicts_with_the_averaged_weights(tmp_path, which):
    model, recorder = Model(), Recorder()
    saver = ModelCheckpoint(tmp_path, monitor="val_loss", save_last=True)
    trainer = trainer_for(tmp_path, recorder, ema(), saver)
    trainer.fit(model, data(), data())
    best = read(saver.best_model_path)["state_dict"]
    last = ema_of(recorder.steps)
    if which == "in memory":
        path, expected = None, last
    else:
        path, expected = which, {"best": best, "last": last}[which]
    [metrics] = trainer.test(model, data(), ckpt_path=path, verbose=False)
    assert_same(expected, weights(model))
    if which == "best":
        assert metrics["test_loss"] == pytest.approx(float(saver.best_model_score), rel=1e-5)
    [*predictions] = trainer.predict(model, data(), ckpt_path=path)
    x = next(iter(data()))[0]
    torch.testing.assert_close(
        predictions[0], nn.functional.linear(x, expected["net.weight"], expected["net.bias"])
    )


@pytest.mark.parametrize("rule", [ema(start_step=99), uniform(start_epoch=9), swa(start=7)])
def test_avg_never_started_delivers_the_trained_weights_and_says_so(tmp_path, rule):
    model, recorder = Model(), Recorder()
    saver = ModelCheckpoint(tmp_path)
    with pytest.warns(UserWarning, match="averaging never started: averaging.start") as caught:
        trainer_for(tmp_path, recorder, rule, saver).fit(model, data(), data())
    assert_same(recorder.steps[-1], weights(model), exact=True)
    content = read(saver.best_model_path)
    assert_same(recorder.steps[-1], content["state_dict"], exact=True)
    assert "raw" not in content
    text = "in 16 optimizer steps and 4 epochs, so the run delivers its raw weights"
    assert any(text in str(warning.message) for warning in caught)


def test_avg_before_start_validates_and_saves_the_raw_weights(tmp_path):
    model, recorder = Model(), Recorder()
    saver = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    trainer_for(tmp_path, recorder, swa(start=2), saver).fit(model, data(), data())
    validated = recorder.validated[::NUM_BATCHES]
    for epoch in (0, 1):
        assert_same(recorder.ends[epoch], validated[epoch], exact=True)
        assert_same(recorder.ends[epoch], read(tmp_path / f"epoch={epoch}.ckpt")["state_dict"])
    assert_same(mean(recorder.ends[2:]), validated[3])
    assert_same(mean(recorder.ends[2:]), read(tmp_path / "epoch=3.ckpt")["state_dict"])


@pytest.mark.parametrize("preset", PRESETS)
def test_avg_reuse_begins_anew_with_every_fit(tmp_path, preset):
    rule = made(preset)
    delivered = []
    for _ in range(2):
        model, recorder = Model(), Recorder()
        trainer_for(tmp_path, recorder, rule).fit(model, data(), data())
        delivered.append(weights(model))
        assert differ(recorder.steps[-1], delivered[-1])
    assert_same(*delivered, exact=True)


class Gan(Model):
    """Two optimizers that both step in each batch, and a third that never does."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.other = nn.Linear(3, 1)
        self.idle = nn.Linear(3, 1)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer, net in zip(
            self.optimizers(), (self.net, self.other, self.idle), strict=True
        ):
            optimizer.zero_grad()
            if net is not self.idle:
                self.manual_backward(nn.functional.mse_loss(net(batch[0]), batch[1]))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        nets = (self.net, self.other, self.idle)
        return [torch.optim.SGD(net.parameters(), lr=0.1) for net in nets]


def test_avg_two_optimizers_that_step_in_one_batch_are_one_step(tmp_path):
    model, recorder = Gan(), Recorder()
    rule = uniform(every_n_steps=2)
    trainer_for(tmp_path, recorder, rule).fit(model, data())
    models = recorder.steps[1::2]
    assert rule.step_metrics() == {"averaged_models": len(models)}
    assert_same(mean(models), weights(model))
    expected = torch.stack([m["other.weight"] for m in models]).mean(0)
    torch.testing.assert_close(expected, model.other.weight.data)


def test_avg_two_optimizers_accumulated_and_skipped_batches_are_no_steps(tmp_path):
    class Skips(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            loss = super().training_step(batch, batch_idx)
            return None if self.current_epoch == 1 else loss

    model, rule = Skips(), uniform()
    with pytest.warns(UserWarning, match="returned `None`"):
        trainer_for(tmp_path, rule, accumulate_grad_batches=2, max_epochs=3).fit(model, data())
    assert rule.step_metrics() == {"averaged_models": 4.0}


@pytest.mark.parametrize("preset", PRESETS)
def test_avg_weights_only_files_hold_the_average(tmp_path, preset):
    model, recorder = Model(), Recorder()
    saver = ModelCheckpoint(tmp_path, save_weights_only=True)
    trainer_for(tmp_path, recorder, made(preset), saver).fit(model, data(), data())
    content = read(saver.best_model_path)
    assert_same(content["state_dict"], weights(model), exact=True)
    assert differ(content["state_dict"], recorder.steps[-1])
    assert "raw" not in content


def test_avg_start_epoch_has_an_effect(tmp_path):
    model, recorder = Model(), Recorder()
    trainer_for(tmp_path, recorder, ema(start_epoch=2)).fit(model, data(), data())
    assert_same(ema_of(recorder.steps[2 * NUM_BATCHES :]), weights(model))


def test_avg_int_buffers_and_frozen_parameters_are_shared(tmp_path):
    model, recorder = Model(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))), Recorder()
    model.net.append(nn.Linear(4, 1).requires_grad_(False))
    frozen = model.net[2].weight.clone()
    trainer_for(tmp_path, recorder, ema()).fit(model, data(), data())
    assert model.count == model.net[1].num_batches_tracked == 4 * NUM_BATCHES
    assert torch.equal(model.net[2].weight, frozen)
    assert torch.equal(model.mask, torch.tensor([0.0, -math.inf]))
    assert model.net[1].running_mean.ne(recorder.steps[-1]["net.1.running_mean"]).all()


@pytest.mark.parametrize("kind", ["ema", "swa", "uniform"])
def test_avg_low_precision_keeps_a_float32_average_and_rounds_nothing(tmp_path, kind):
    model, recorder = Model(lr=1e-2).to(torch.bfloat16), Recorder()
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    trainer = trainer_for(
        tmp_path, recorder, made(kind), saver, precision="bf16-true", val_check_interval=2
    )
    trainer.fit(model, data(), data())
    wide = [{name: tensor.float() for name, tensor in step.items()} for step in recorder.steps]
    if kind == "swa":
        expected = mean(wide[2 * NUM_BATCHES + 3 :: NUM_BATCHES])
    else:
        expected = (ema_of if kind == "ema" else mean)(wide)
    assert model.net.weight.dtype == torch.bfloat16
    rounded = {name: tensor.bfloat16() for name, tensor in expected.items()}
    torch.testing.assert_close(weights(model)["net.weight"], rounded["net.weight"])
    plain, plain_recorder = Model(lr=1e-2).to(torch.bfloat16), Recorder()
    trainer_for(tmp_path, plain_recorder, precision="bf16-true", val_check_interval=2).fit(
        plain, data(), data()
    )
    for one, other in zip(recorder.steps, plain_recorder.steps, strict=True):
        assert_same(one, other, exact=True)
    if kind != "swa":
        average = read(tmp_path / "step=3.ckpt")["averages"]["average"]["net.weight"]
        assert average.dtype == torch.float32
        torch.testing.assert_close(
            average, (ema_of if kind == "ema" else mean)(wide[:3])["net.weight"]
        )


def test_avg_slow_the_tensors_are_listed_once_and_updated_in_one_pass(monkeypatch):
    module = nn.Sequential(*(nn.Linear(3, 3) for _ in range(20)), nn.BatchNorm1d(3))
    shadow, calls = Shadow(module), []
    real = torch._foreach_lerp_
    monkeypatch.setattr(torch, "_foreach_lerp_", lambda *a: (calls.append(len(a[0])), real(*a)))
    shadow.update(0.1)
    assert calls == [44]


def test_avg_swap_exchanges_pointers_and_copies_nothing():
    module = nn.Linear(3, 3)
    raw = module.weight.data_ptr()
    shadow = Shadow(module)
    shadow.swap()
    shown = module.weight.data_ptr()
    assert shown != raw
    shadow.swap()
    assert module.weight.data_ptr() == raw
    shadow.swap()
    assert module.weight.data_ptr() == shown


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_avg_swap_is_undone_by_an_exception_in_validation(tmp_path, error):
    class Fails(Model):
        def validation_step(self, batch: Any) -> None:
            super().validation_step(batch)
            if self.trainer.global_step == 2 * NUM_BATCHES:
                raise error("stop")

    model, recorder = Fails(), Recorder()
    trainer = trainer_for(tmp_path, recorder, ema())
    with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
        trainer.fit(model, data(), data())
    assert_same(recorder.steps[-1], weights(model), exact=True)
    assert differ(recorder.validated[-1], weights(model))
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    content = read(tmp_path / "after.ckpt")
    assert_same(recorder.validated[-1], content["state_dict"], exact=True)
    assert_same(content["raw"]["state_dict"], weights(model), exact=True)
    fresh = Model()
    trainer_for(tmp_path, ema()).fit(fresh, data(), data(), ckpt_path=tmp_path / "after.ckpt")


class Stateful(DataLoader):
    """Knows its position; no shuffling."""

    served = skip = 0

    def __iter__(self) -> Any:
        skip, self.skip = self.skip % NUM_BATCHES, 0
        for index, batch in enumerate(super().__iter__()):
            if index >= skip:
                self.served = index + 1
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"served": self.served}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skip = state["served"]


class Last(Uniform):
    """The mean of the last three models, which no single step from the last mean leads to."""

    def update(self, shadow: Shadow, *, num_updates: int) -> None:
        shadow.keep(str(num_updates % 3))
        kept = [label for label in shadow.sets if label.isdigit()]
        shadow.combine(dict.fromkeys(kept, 1 / len(kept)))


class Drop(Model):
    """With BatchNorm and a tied weight, so that little is left that could not go wrong."""

    def __init__(self) -> None:
        super().__init__(
            lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)), lr=0.01
        )
        self.net[2].weight = self.net[0].weight
        self.net.append(nn.Linear(3, 1))


RESUMED = {
    **{preset: partial(made, preset) for preset in PRESETS},
    "last models": lambda: of_class(Last, start_step=1, bn_batches=2),
    "ema": lambda: ema(start_step=3),
    "uniform": lambda: uniform(start_step=2, every_n_steps=2, bn_batches=2),
    "swa": lambda: swa(start=1, lr=0.02, anneal_epochs=2, bn_batches=2),
    "swa by steps": lambda: swa(
        start=None, start_step=5, lr=[0.02], anneal_epochs=None, anneal_steps=7, every_n_steps=3
    ),
}


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "64-true"])
@pytest.mark.parametrize("kind", RESUMED)
@pytest.mark.parametrize("step", [2, 4, 7, 8, 10, 12])
def test_avg_resume_is_bit_exact_at_an_epochs_end_and_inside_it(tmp_path, kind, step, precision):
    def fit(resume: Path | None) -> tuple[dict[str, Tensor], dict[str, Tensor], Recorder]:
        model, recorder = Drop(), Recorder()
        if precision == "64-true":
            model.double()  # or Lightning rounds what it loads, where no ExactResume is
        saver = ModelCheckpoint(
            tmp_path / str(resume is None), every_n_train_steps=1, save_top_k=-1, filename="{step}"
        )
        trainer = trainer_for(
            tmp_path, recorder, RESUMED[kind](), saver, precision=precision, max_epochs=4
        )
        train = Stateful(data().dataset, batch_size=8)
        trainer.fit(model, train, data(), ckpt_path=resume)
        last = read(tmp_path / str(resume is None) / "step=16.ckpt")
        return weights(model), last["raw"]["state_dict"], recorder

    average, raw, recorder = fit(None)
    again, raw_again, resumed = fit(tmp_path / "True" / f"step={step}.ckpt")
    for one, other in zip(recorder.steps[step:], resumed.steps, strict=True):
        assert_same(one, other, exact=True)
    assert recorder.rates[step:] == resumed.rates
    assert_same(raw, raw_again, exact=True)
    assert_same(average, again, exact=True)
    assert_same(recorder.validated[-1], resumed.validated[-1], exact=True)


@pytest.mark.parametrize("kind", RESUMED)
def test_avg_resume_from_the_epochs_end_holds_the_average_made_there(tmp_path, kind):
    def fit(max_epochs: int, resume: Path | None) -> dict[str, Tensor]:
        model = Drop()
        saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        rule = RESUMED[kind]()
        trainer = trainer_for(tmp_path, rule, saver, max_epochs=max_epochs)
        trainer.fit(model, data(), data(), ckpt_path=resume)
        return weights(model)

    whole = fit(4, None)
    for epoch in range(3):
        assert_same(whole, fit(4, tmp_path / f"epoch={epoch}.ckpt"), exact=True)
    assert_same(whole, fit(4, tmp_path / "epoch=3.ckpt"), exact=True)  # nothing left to train


def test_avg_resume_of_a_run_without_an_average_just_starts(tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="plain")
    trainer_for(tmp_path, saver, max_epochs=2).fit(Model(), data(), data())
    model, recorder = Model(), Recorder()
    trainer_for(tmp_path, recorder, ema()).fit(
        model, data(), data(), ckpt_path=tmp_path / "plain.ckpt"
    )
    assert_same(ema_of(recorder.steps), weights(model))


def test_avg_resume_with_another_rule_goes_on_from_the_raw_weights(tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="ema")
    trainer_for(tmp_path, saver, ema(), max_epochs=2).fit(Model(), data(), data())
    first = Recorder()
    trainer_for(tmp_path, first, max_epochs=3).fit(Model(), data(), data())
    model, recorder = Model(), Recorder()
    trainer_for(tmp_path, recorder, uniform(), max_epochs=3).fit(
        model, data(), data(), ckpt_path=tmp_path / "ema.ckpt"
    )
    for one, other in zip(first.steps[2 * NUM_BATCHES :], recorder.steps, strict=True):
        assert_same(one, other, exact=True)
    assert_same(mean(recorder.steps), weights(model))


def test_avg_resume_of_a_file_written_after_the_fit_says_that_raw_weights_are_missing(tmp_path):
    trainer = trainer_for(tmp_path, ema(), max_epochs=2)
    trainer.fit(Model(), data(), data())
    trainer.save_checkpoint(tmp_path / "late.ckpt")
    with pytest.warns(UserWarning, match="holds an average but no raw weights"):
        trainer_for(tmp_path, ema()).fit(Model(), data(), data(), ckpt_path=tmp_path / "late.ckpt")


# ------------------------------------------------------------------------------------ the swa- rows


@pytest.mark.parametrize(("start", "first"), [(0.5, 3), (2, 2), (0, 0), (0.0, 0)])
def test_swa_window_is_from_the_start_to_the_last_epoch(tmp_path, start, first):
    model, recorder, rule = Model(), Recorder(), swa(start=start)
    trainer_for(tmp_path, recorder, rule, max_epochs=6).fit(model, data(), data())
    assert rule.step_metrics() == {"averaged_models": 6.0 - first}
    assert_same(mean(recorder.ends[first:]), weights(model))
    assert_same(mean(recorder.ends[first:]), recorder.validated[-1])


def test_swa_window_of_thirty_epochs_holds_fifteen_models():
    assert first_epoch(start=0.5, max_epochs=30) == 15
    assert first_epoch(start=0.29, max_epochs=100) == 29


def test_swa_window_as_a_share_of_no_number_of_epochs_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must be a number of epochs or null") as error:
        trainer_for(tmp_path, swa(), max_epochs=-1, max_steps=9).fit(Model(), data())
    assert str(error.value) == (
        "averaging.start must be a number of epochs or null where trainer.max_epochs sets no end, "
        "got 0.5; type averaging.start=10, or averaging.start=null averaging.start_step=1000"
    )


class Stop(Callback):
    """Asks for the end in a hook."""

    def __init__(self, hook: str) -> None:
        setattr(self, hook, self.stop)

    def stop(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step >= 10:
            trainer.should_stop = True


@pytest.mark.parametrize(
    ("callbacks", "changes"),
    [
        ([], {"max_steps": 10}),
        ([Stop("on_train_batch_end")], {}),
        ([Stop("on_train_batch_start")], {"max_epochs": 5}),
        ([Stop("on_validation_end")], {"val_check_interval": 2}),
        ([EarlyStopping("val_loss", divergence_threshold=-1.0)], {"min_steps": 10}),
    ],
)
def test_swa_early_end_delivers_the_average_with_the_last_weights(tmp_path, callbacks, changes):
    model, recorder = Model(), Recorder()
    saver = ModelCheckpoint(tmp_path, save_last=True)
    trainer = trainer_for(tmp_path, *callbacks, recorder, swa(start=1), saver, **changes)
    trainer.fit(model, data(), data())
    last = recorder.steps[-1]
    complete = len(recorder.steps) % NUM_BATCHES == 0
    ends = recorder.ends if complete else [*recorder.ends, last]
    assert_same(mean(ends[1:]), weights(model))
    content = read(tmp_path / "last.ckpt")
    assert_same(last, content["raw"]["state_dict"], exact=True)
    if "val_check_interval" not in changes:  # there Lightning's last file is of that validation
        assert_same(mean(ends[1:]), content["state_dict"])


def test_swa_checkpoint_holds_the_average_and_the_raw_weights_beside_it(tmp_path):
    model, recorder = Model(), Recorder()
    saver = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}", monitor="val_loss")
    trainer = trainer_for(tmp_path, recorder, swa(start=1), saver)
    trainer.fit(model, data(), data())
    for epoch in (1, 2, 3):
        content = read(tmp_path / f"epoch={epoch}.ckpt")
        average = mean(recorder.ends[1 : epoch + 1])
        assert_same(average, content["state_dict"])
        assert_same(recorder.ends[epoch], content["raw"]["state_dict"], exact=True)
        assert_same(average, recorder.validated[epoch * NUM_BATCHES])
    [metrics] = trainer.validate(model, data(), ckpt_path="best", verbose=False)
    assert metrics["val_loss"] == pytest.approx(float(saver.best_model_score))


class Stream(IterableDataset):
    """The batches of `data()`, without a length."""

    def __iter__(self) -> Any:
        yield from (sample for batch in data() for sample in zip(*batch, strict=True))


def normed() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_swa_iterable_data_gives_the_average_its_batchnorm_statistics(tmp_path, stream, precision):
    train = DataLoader(Stream(), batch_size=8) if stream else data()
    model, recorder = Model(normed), Recorder()
    rule = swa(start=1, bn_batches=3)
    saver = ModelCheckpoint(tmp_path, save_last=True)
    trainer = trainer_for(tmp_path, recorder, rule, saver, precision=precision)
    trainer.fit(model, train, data())
    dtype = model.dtype
    inputs = [model.net[0](x.to(dtype)).detach() for x, _ in list(data())[:3]]
    expected = torch.stack([x.mean(0) for x in inputs]).mean(0)
    torch.testing.assert_close(model.net[1].running_mean, expected, rtol=3e-2, atol=3e-2)
    if precision == "32-true":
        torch.testing.assert_close(model.net[1].running_mean, expected)
        variance = torch.stack([x.var(0) for x in inputs]).mean(0)
        torch.testing.assert_close(model.net[1].running_var, variance)
    assert model.net[1].num_batches_tracked == 4 * NUM_BATCHES
    assert model.net[1].momentum == 0.1
    content = read(tmp_path / "last.ckpt")
    assert_same(content["state_dict"], weights(model), exact=True)
    assert_same(content["raw"]["state_dict"], recorder.steps[-1], exact=True)
    assert_same(recorder.validated[-1], weights(model), exact=True)


@pytest.mark.parametrize("bn_batches", [None, 2])
@pytest.mark.parametrize("validate", ["averaged", "raw", "both"])
def test_swa_iterable_training_is_the_same_with_and_without_an_average(
    tmp_path, bn_batches, validate
):
    class Remembers(Model):
        def __init__(self) -> None:
            super().__init__(normed)
            self.losses: list[Tensor] = []
            self.train_error = MeanSquaredError()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.losses.append(self.loss(batch))  # with its graph, as models do
            self.train_error(self.net(batch[0]), batch[1])
            self.log("train_error", self.train_error)
            return self.losses[-1]

    runs = []
    for callbacks in ([], [uniform(bn_batches=bn_batches, validate=validate)]):
        model, recorder = Remembers(), Recorder()
        torch.manual_seed(5)
        train = DataLoader(data().dataset, batch_size=8, shuffle=True)
        trainer = trainer_for(tmp_path, recorder, *callbacks, max_epochs=2, val_check_interval=2)
        trainer.fit(model, train, data())
        runs.append((recorder, model, trainer.callback_metrics["train_error"], torch.rand(1)))
    (plain, one, error, draw), (averaged, other, error_too, draw_too) = runs
    assert len(one.losses) == len(other.losses) == 2 * NUM_BATCHES
    assert torch.equal(error, error_too)
    assert torch.equal(draw, draw_too)
    for before, after in zip(plain.steps, averaged.steps, strict=True):
        assert_same(before, after, exact=True)


def test_swa_iterable_data_that_is_gone_leaves_averaged_statistics_and_says_so(tmp_path):
    class Once(IterableDataset):
        def __init__(self) -> None:
            self.batches = iter(list(data()) * 9)

        def __iter__(self) -> Any:
            yield from self.batches

    model = Model(normed)
    with pytest.warns(UserWarning, match="averaging.bn_batches=2 found no training batch"):
        trainer_for(tmp_path, swa(start=0, bn_batches=2), max_epochs=1).fit(
            model, DataLoader(Once(), batch_size=None), data()
        )
    assert model.net[1].running_var.ne(1).all()


def test_bn_batches_of_a_model_that_steps_itself_is_refused(tmp_path):
    model = Gan()
    trainer_for(tmp_path, uniform(bn_batches=2), max_epochs=1).fit(model, data())
    model.norm = nn.BatchNorm1d(3)
    with pytest.raises(ValueError, match="bn_batches cannot act") as error:
        trainer_for(tmp_path, uniform(bn_batches=2)).fit(model, data())
    assert str(error.value) == (
        "averaging.bn_batches cannot act with Gan: it steps its own optimizers "
        "(automatic_optimization=False); type averaging.bn_batches=null to average the running "
        "statistics instead"
    )


@pytest.mark.parametrize("strategy", ["cos", "linear"])
@pytest.mark.parametrize("scheduler", [False, True])
def test_swa_scope_every_group_of_every_optimizer_is_annealed_whatever_a_scheduler_says(
    tmp_path, strategy, scheduler
):
    class Two(Gan):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            super().training_step(batch, batch_idx)
            if scheduler:
                for each in self.lr_schedulers():
                    each.step()

        def configure_optimizers(self) -> Any:
            first, second, third = super().configure_optimizers()
            second.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 0.5})
            if not scheduler:
                return [first, second, third]
            schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in (first, second)]
            return [first, second, third], schedules

    recorder = Recorder()
    rule = swa(start=2, lr=[0.01, 0.02, 0.03, 0.04], anneal_epochs=2, anneal_strategy=strategy)
    trainer_for(tmp_path, rule, recorder, max_epochs=6).fit(Two(), data())
    assert rule.step_metrics() == {"averaged_models": 4.0}
    begun = recorder.rates[2 * NUM_BATCHES]
    decayed = 0.9 ** (2 * NUM_BATCHES) if scheduler else 1.0
    assert begun == pytest.approx([0.1 * decayed, 0.1 * decayed, 0.5 * decayed, 0.1])
    middle = [(a + b) / 2 for a, b in zip(begun, rule.lr, strict=True)]
    assert recorder.rates[3 * NUM_BATCHES] == pytest.approx(middle)
    assert recorder.rates[4 * NUM_BATCHES :] == [pytest.approx(rule.lr)] * 2 * NUM_BATCHES


def test_swa_scope_anneals_by_steps(tmp_path):
    recorder = Recorder()
    rule = swa(
        start=None, start_step=3, lr=0.5, anneal_epochs=None, anneal_steps=4, every_n_steps=1
    )
    trainer_for(tmp_path, rule, recorder, max_epochs=3).fit(Model(), data())
    expected = [
        annealed(start=0.1, end=0.5, progress=max(0, step - 3) / 4, strategy="cos")
        for step in range(12)
    ]
    assert [rates[0] for rates in recorder.rates] == pytest.approx(expected)


def test_swa_scope_a_list_of_rates_has_one_for_each_group(tmp_path):
    with pytest.raises(ValueError, match=r"averaging\.lr must be") as error:
        trainer_for(tmp_path, swa(lr=[0.1, 0.2])).fit(Model(), data())
    assert str(error.value) == (
        "averaging.lr must be one number, or 1 for the parameter groups of Model, got [0.1, 0.2]; "
        "type averaging.lr=0.1"
    )


# ------------------------------------------------------------------------------------ what is shown


def test_validate_raw_measures_the_raw_weights_and_delivers_the_average(tmp_path):
    model, recorder = Model(), Recorder()
    saver = ModelCheckpoint(tmp_path)
    trainer_for(tmp_path, recorder, ema(validate="raw"), saver).fit(model, data(), data())
    assert_same(recorder.ends[-1], recorder.validated[-1], exact=True)
    assert_same(ema_of(recorder.steps), weights(model))
    assert_same(weights(model), read(saver.best_model_path)["state_dict"], exact=True)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("num_loaders", [1, 2])
def test_validate_both_also_logs_the_metrics_of_the_raw_weights(tmp_path, precision, num_loaders):
    class Two(Model):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("val_loss", self.loss(batch))

    model, recorder = Two(), Recorder()
    saver = ModelCheckpoint(tmp_path, monitor="raw_val_loss" if num_loaders == 1 else None)
    rule = ema(validate="both", decay=0.9)
    trainer = trainer_for(tmp_path, recorder, rule, saver, precision=precision)
    trainer.fit(model, data(), [data()] * num_loaders)
    metrics = dict(trainer.callback_metrics)
    raw = Two().to(model.dtype)
    raw.load_state_dict(recorder.steps[-1])
    again = trainer_for(tmp_path, precision=precision)
    [expected, *_] = again.validate(raw, [data()] * num_loaders, verbose=False)
    suffix = "" if num_loaders == 1 else "/dataloader_idx_0"
    found = metrics[f"raw_val_loss{'' if num_loaders == 1 else '_dataloader_0'}"]
    assert found == pytest.approx(expected[f"val_loss{suffix}"])
    assert metrics[f"val_loss{suffix}"] != found
    if num_loaders == 1:
        assert saver.best_model_score == min(metrics["raw_val_loss"], saver.best_model_score)


def test_buffers_that_are_assigned_and_layers_that_thaw_are_followed(tmp_path):
    class Assigns(Model):
        def __init__(self) -> None:
            super().__init__(lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1)))
            self.net[0].requires_grad_(False)

        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 2:
                self.net[0].requires_grad_(True)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            loss = super().training_step(batch, batch_idx)
            self.level = self.level + 1
            return loss

        def validation_step(self, batch: Any) -> None:
            super().validation_step(batch)
            self.level = self.level * 1

    model, recorder = Assigns(), Recorder()
    trainer_for(tmp_path, recorder, uniform()).fit(model, data(), data())
    levels = torch.stack([step["level"] for step in recorder.steps])
    torch.testing.assert_close(levels.mean(), model.level)
    assert levels.tolist() == list(range(2, 34, 2))
    assert model.net[0].weight.ne(recorder.steps[-1]["net.0.weight"]).all()
    assert model.net[0].weight.ne(Assigns().net[0].weight).all()


def test_a_tied_weight_stands_under_both_names(tmp_path):
    model, saver = Drop(), ModelCheckpoint(tmp_path)
    trainer_for(tmp_path, ema(), saver).fit(model, data(), data())
    state = read(saver.best_model_path)["state_dict"]
    assert torch.equal(state["net.0.weight"], state["net.2.weight"])
    assert model.net[0].weight is model.net[2].weight
    assert torch.equal(state["net.0.weight"], model.net[0].weight)


def test_the_run_leaves_nothing_behind_in_the_trainer(tmp_path):
    model, rule = Model(), ema()
    trainer = trainer_for(tmp_path, rule)
    files = trainer.strategy.checkpoint_io
    trainer.fit(model, data(), data())
    assert trainer.strategy.checkpoint_io is files
    assert not trainer.optimizers[0]._optimizer_step_post_hooks
    assert rule._shadow is None
    before = weights(model)
    trainer.validate(model, data(), verbose=False)
    assert_same(before, weights(model), exact=True)


def test_two_averages_in_one_run_are_refused(tmp_path):
    with pytest.raises(ValueError, match="averaging must be one average a run"):
        trainer_for(tmp_path, ema(), uniform()).fit(Model(), data())


# ------------------------------------------------------------------------------------ configuration


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_becomes_its_class(preset):
    config = composed(f"averaging={preset}")
    schema = type(OmegaConf.to_object(config))
    assert issubclass(schema, AveragingSchema)
    assert isinstance(made(preset), Averaging)
    assert type(made(preset)).__name__ == schema.__name__


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["averaging=ema", "averaging.decay=1.0"],
            "averaging.decay must be from 0 to below 1, got 1.0; to switch averaging off use "
            "averaging=none",
        ),
        (
            ["averaging=ema", "averaging.decay=0.9", "averaging.half_life_steps=3"],
            "averaging.decay must be null where averaging.half_life_steps is given, got 0.9; type "
            "one of averaging.decay=null and averaging.half_life_steps=null",
        ),
        (
            ["averaging=uniform", "averaging.start_epoch=0", "averaging.start_step=0"],
            "averaging.start_epoch must be null where averaging.start_step is given, got 0; type "
            "one of averaging.start_epoch=null and averaging.start_step=null",
        ),
        (
            ["averaging=uniform", "averaging.every_n_steps=0"],
            "averaging.every_n_steps must be >= 1, got 0; type averaging.every_n_steps=1",
        ),
        (
            ["averaging=swa", "averaging.start=1.0"],
            "averaging.start must be epochs >= 0 (2) or a share from 0.0 to below 1.0 (0.5), got "
            "1.0; to switch averaging off use averaging=none",
        ),
        (
            ["averaging=swa", "averaging.lr=[0.1,-1]"],
            "averaging.lr must be > 0, or a list of such numbers, got [0.1, -1]; for a share "
            "of the run's rate type averaging.lr=null averaging.lr_factor=0.5",
        ),
        (
            ["averaging=swa", "averaging.anneal_steps=5"],
            "averaging.anneal_epochs must be null where averaging.anneal_steps is given, and given "
            "where that is null, got 2; to jump to averaging.lr type averaging.anneal_epochs=0 "
            "averaging.anneal_steps=null",
        ),
    ],
)
def test_a_value_out_of_range_is_refused_with_what_to_type(overrides, message):
    with pytest.raises(ValueError, match="averaging") as error:
        refuse("averaging", composed(*overrides))
    assert str(error.value) == message
