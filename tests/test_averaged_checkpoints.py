"""Checkpoints of an average: models as others write them, which change what is saved or loaded."""

import copy
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint
from test_averaging import PRESETS, Stateful, data, ema, read, weights
from test_averaging import pytestmark as warnings_of_lightning
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torchmetrics import MeanMetric

from app.averaging import Averaging, AveragingTrainer
from app.launch.local import run_local
from app.run.build import build
from app.run.checkpoint import CheckpointFiles, Checkpoints

pytestmark = [
    *warnings_of_lightning,
    pytest.mark.filterwarnings("ignore:`.fit.ckpt_path=None.` was called without a model"),
    pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available"),
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization"),
]


# -------------------------------------------------------------------------------------- the models


class Lit(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.mse_loss(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.01)


class StripsPrefix(Lit):
    """Weights that load into the bare network."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)
        return OrderedDict((key.removeprefix("net."), value) for key, value in state.items())

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        state = {f"net.{key}": value for key, value in state_dict.items()}
        return super().load_state_dict(state, strict, assign)


class RenamesInHooks(Lit):
    """Keys as another framework has them, in the file only."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {f"model.{key}": value for key, value in state.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        for key in list(state):
            state[key.removeprefix("model.")] = state.pop(key)


class Backbone(Lit):
    """A frozen backbone, made again from its pre-trained weights and left out of the file."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(3, 3).requires_grad_(False)
        self.strict_loading = False

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.backbone(x))

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)
        return {key: value for key, value in state.items() if not key.startswith("backbone.")}


class BackboneInHook(Backbone):
    """The same, deleted in place."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return Lit.state_dict(self, *args, **kwargs)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for key in [key for key in checkpoint["state_dict"] if key.startswith("backbone.")]:
            del checkpoint["state_dict"][key]


class Lora(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_a = nn.Parameter(torch.randn(2, base.in_features) * 0.1)
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.lora_a.T @ self.lora_b.T


class Adapters(Lit):
    """As with peft: adapters only, in an entry of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(Lora(nn.Linear(3, 4)), nn.Tanh(), Lora(nn.Linear(4, 1)))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        checkpoint["adapters"] = {key: state[key] for key in state if "lora_" in key}
        checkpoint["state_dict"] = {}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        own = {key: value.clone() for key, value in self.state_dict().items()}
        checkpoint["state_dict"] = own | checkpoint.pop("adapters")


class PostHook(Lit):
    """A loss network that a hook of torch keeps out of the file."""

    def __init__(self) -> None:
        super().__init__()
        self.lpips = nn.Linear(1, 2)
        self.lpips.requires_grad_(False)
        self.register_state_dict_post_hook(self._drop)
        self.register_load_state_dict_pre_hook(self._fill)

    @staticmethod
    def _drop(module: Any, state: Any, prefix: str, metadata: Any) -> None:
        for key in [key for key in state if key.startswith(f"{prefix}lpips.")]:
            del state[key]

    @staticmethod
    def _fill(module: Any, state: Any, prefix: str, *_: Any) -> None:
        state |= {f"{prefix}lpips.{key}": v for key, v in module.lpips.state_dict().items()}


class PreHook(Lit):
    """A scale of the weights, computed when they are saved."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.zeros(()))
        self.register_state_dict_pre_hook(self._note)

    @staticmethod
    def _note(module: Any, prefix: str, keep_vars: bool) -> None:
        module.scale = module.net[0].weight.detach().abs().max()


class Quantised(Lit):
    """A copy in 8 bits, for whoever deploys the file."""

    loaded = 0

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        weight = checkpoint["state_dict"]["net.0.weight"]
        scale = weight.abs().max() / 127
        checkpoint["int8"] = {"weight": (weight / scale).round().to(torch.int8), "scale": scale}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.loaded += checkpoint.pop("int8")["weight"].dtype is torch.int8


class ExtraState(Lit):
    """A layer that keeps a norm beside its weights."""

    class Cached(nn.Linear):
        norm = 0.0

        def get_extra_state(self) -> Any:
            return {"norm": float(self.weight.detach().norm())}

        def set_extra_state(self, state: Any) -> None:
            self.norm = state["norm"]

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 0.01 * self.norm

    def __init__(self) -> None:
        super().__init__()
        self.net[0] = self.Cached(3, 4)

    def on_train_batch_start(self, *_: Any) -> None:
        self.net[0].norm = float(self.net[0].weight.detach().norm())


class NestedEma(Lit):
    """An average of its own, frozen, beside ours."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        consistency = (self(batch[0]) - self.teacher(batch[0]).detach()).square().mean()
        return super().training_step(batch, batch_idx) + consistency

    def on_train_batch_end(self, *_: Any) -> None:  # as in BYOL
        with torch.no_grad():
            for mean, now in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                mean.lerp_(now, 0.1)


class Resizes(Lit):
    """A vocabulary as large as that of the file."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + self.embedding((x[:, 0] > 0).long()))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.embedding = nn.Embedding(*checkpoint["state_dict"]["embedding.weight"].shape)


class Lazy(Lit):
    """Layers of configure_model."""

    def __init__(self) -> None:
        super().__init__()
        self.net = None

    def configure_model(self) -> None:
        if self.net is None:
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))


class Tied(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Linear(3, 1))
        self.net[2].weight = self.net[0].weight


class Metrics(Lit):
    """A metric whose state is saved."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = MeanMetric()
        self.seen.persistent(True)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.seen.update(loss.detach())
        self.log("seen", self.seen, on_epoch=True, on_step=False)
        return loss


class Gan(Lit):
    """Two optimizers, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.critic = nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        generator, critic = self.optimizers()
        for optimizer, sign in ((critic, -1), (generator, 1)):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(sign * self.critic(self(batch[0])).sigmoid().mean())
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(part.parameters(), lr=0.01) for part in (self.net, self.critic)]


class Assigned(Lit):
    """A codebook that each forward pass in training assigns anew."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.codes = 0.9 * self.codes + 0.1 * x.detach().mean(0)
        return self.net(x - self.codes)


class Parametrized(Lit):
    """Weight and spectral norms."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            parametrizations.weight_norm(nn.Linear(3, 4)),
            parametrizations.spectral_norm(nn.Linear(4, 1)),
        )


class Thaws(Lit):
    """A layer that joins the training in its second epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.net[0].requires_grad_(False)

    def on_train_epoch_start(self) -> None:
        self.net[0].requires_grad_(self.current_epoch > 0)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Wrapped(Lit):
    """Hyper-parameters, and a network wrapped by the compiler."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters({"lr": 0.1})
        self.net = torch.compile(self.net, backend="eager")


MODELS = [StripsPrefix, RenamesInHooks, Backbone, BackboneInHook, Adapters, PostHook, PreHook,
          Quantised, ExtraState, NestedEma, Resizes, Lazy, Tied, Metrics, Gan, Assigned,
          Parametrized, Thaws, Wrapped]  # fmt: skip


INSIDE, END = "step=6.ckpt", "epoch=1.ckpt"
CUTS = {NestedEma: (END,), Thaws: (END,), Metrics: (INSIDE,), Gan: (END, "step=12.ckpt")}
"""Where a run of a model can be cut: at the others a plain run of Lightning is another one too, for
hooks of the model follow those of callbacks, a metric is reset after the last file of its epoch."""


# --------------------------------------------------------------------------------------- the tests


class Average(Callback):
    """The average of the floating parameters and buffers, by hand, decay 0.5."""

    def __init__(self) -> None:
        self.average: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        for name, tensor in averaged(pl_module):
            before = self.average.get(name, tensor.detach())
            self.average[name] = before.lerp(tensor.detach(), 0.5)


def averaged(model: Lit) -> list[tuple[str, Tensor]]:
    """What of a model is averaged, where nothing of it thaws."""
    parameters = [item for item in model.named_parameters() if item[1].requires_grad]
    buffers = [item for item in model.named_buffers() if item[1].is_floating_point()]
    return [*parameters, *buffers]


def fit(
    make: Callable[[], Lit], folder: Path, *, resume: Path | None = None, rule: Any = ema
) -> tuple[Lit, Average]:
    model, by_hand = make(), Average()
    ends = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, enable_version_counter=False)
    trainer = trainer_with(rule(), by_hand, saver(folder), ends, folder=folder)
    train = Stateful(data().dataset, batch_size=8)
    trainer.fit(model, train, data(), ckpt_path=resume)
    return model, by_hand


def saver(folder: Path, **changes: Any) -> ModelCheckpoint:
    every = {"every_n_train_steps": 1, "save_top_k": -1, "filename": "{step}"}
    return ModelCheckpoint(folder, **(every | changes))


def trainer_with(*callbacks: Callback, folder: Path, max_epochs: int = 3) -> AveragingTrainer:
    return AveragingTrainer(
        callbacks=list(callbacks), plugins=[CheckpointFiles()], max_epochs=max_epochs,
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, enable_checkpointing=any(
            isinstance(c, pl.callbacks.Checkpoint) for c in callbacks),
    )  # fmt: skip


def assert_equal(one: Any, other: Any, path: str = "") -> None:
    """Equal bit for bit, containers and all."""
    assert type(one) is type(other), path
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_equal(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, Tensor):
        assert torch.equal(one, other), path
    else:
        assert one == other, path


OF_THE_MODEL = ("state_dict", "raw", "averages", "adapters", "int8")


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_a_file_is_of_the_average_as_the_model_writes_it(tmp_path: Path, make: type[Lit]) -> None:
    model, by_hand = fit(make, tmp_path)
    for name, tensor in averaged(model):
        if name in by_hand.average:
            torch.testing.assert_close(tensor.detach(), by_hand.average[name])
    content = read(tmp_path / "epoch=2.ckpt")
    expected = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(expected)
    if make is Metrics:  # reset since
        expected["state_dict"] |= {k: v for k, v in content["state_dict"].items() if "seen." in k}
    for key in expected:
        assert_equal(dict(content[key]), dict(expected[key]), key)
    assert content["raw"]["state_dict"].keys() == content["state_dict"].keys()


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_a_continued_run_is_the_uninterrupted_one(tmp_path: Path, make: type[Lit]) -> None:
    model, _ = fit(make, tmp_path / "whole")
    whole = copy.deepcopy(model.state_dict())
    for name in CUTS.get(make, (INSIDE, END)):
        folder = tmp_path / name.removesuffix(".ckpt")
        cut, _ = fit(make, folder, resume=tmp_path / "whole" / name)
        assert_equal(whole, cut.state_dict())
        one, other = (read(place / "epoch=2.ckpt") for place in (tmp_path / "whole", folder))
        for key in OF_THE_MODEL:
            assert_equal(one.get(key), other.get(key), key)


def test_every_way_to_a_file_is_of_the_average(tmp_path: Path) -> None:
    class Saves(StripsPrefix):
        """Saves in hooks of its own, fails, and is saved by what watches for that."""

        def on_before_zero_grad(self, optimizer: Any) -> None:
            if self.global_step == 5:
                self.trainer.save_checkpoint(tmp_path / "hook.ckpt")
                self.trainer.save_checkpoint(tmp_path / "light.ckpt", weights_only=True)

        def on_validation_batch_start(self, *_: Any) -> None:
            if self.global_step == 8:
                self.trainer.save_checkpoint(tmp_path / "shown.ckpt")
                raise InterruptedError

    ours = Checkpoints(
        dirpath=str(tmp_path),
        monitor="val_loss",
        mode="min",
        top_k=1,
        filename=None,
        keep_every_n_steps=None,
        every_n_steps=1,
        every_min=None,
    )
    best = ModelCheckpoint(tmp_path, save_top_k=3, monitor="val_loss", filename="top")
    failed = OnExceptionCheckpoint(tmp_path, filename="failed")
    model, by_hand = Saves(), Average()
    trainer = trainer_with(ema(), by_hand, best, failed, ours, folder=tmp_path, max_epochs=3)
    averages = {}
    by_hand.on_train_batch_end = lambda trainer, module, *_: (  # type: ignore[method-assign]
        Average.on_train_batch_end(by_hand, trainer, module),
        averages.setdefault(trainer.global_step, dict(by_hand.average)),
    )
    with pytest.raises(InterruptedError):
        trainer.fit(model, data(), data())
    after = dict(model.named_parameters())
    for name, step in (("hook", 5), ("light", 5), ("shown", 8), ("failed", 8), ("last", 7),
                       ("previous", 6), ("best", 4), ("top", 4)):  # fmt: skip
        content = read(tmp_path / f"{name}.ckpt")
        for key, tensor in averages[step].items():
            torch.testing.assert_close(content["state_dict"][key.removeprefix("net.")], tensor)
        assert ("raw" in content) == (name != "light")
    for name, tensor in after.items():
        raw = read(tmp_path / "failed.ckpt")["raw"]["state_dict"][name.removeprefix("net.")]
        assert torch.equal(raw, tensor)


def test_a_file_after_the_fit_is_of_the_average(tmp_path: Path) -> None:
    model, by_hand = StripsPrefix(), Average()
    trainer = trainer_with(ema(), by_hand, folder=tmp_path)
    trainer.fit(model, data(), data())
    trainer.save_checkpoint(tmp_path / "late.ckpt")
    trainer.validate(model, data(), verbose=False)
    trainer.save_checkpoint(tmp_path / "later.ckpt")
    for name in ("late", "later"):
        content = read(tmp_path / f"{name}.ckpt")
        assert "raw" not in content
        for key, tensor in by_hand.average.items():
            torch.testing.assert_close(content["state_dict"][key.removeprefix("net.")], tensor)


def test_a_file_written_before_a_continued_run_trains_is_the_one_it_continues(
    tmp_path: Path,
) -> None:
    class Saves(Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            trainer.save_checkpoint(tmp_path / "again.ckpt")

    whole, _ = fit(StripsPrefix, tmp_path / "whole")
    path = tmp_path / "whole/step=6.ckpt"
    trainer = trainer_with(ema(), Saves(), saver(tmp_path), folder=tmp_path)
    model = StripsPrefix()
    trainer.fit(model, Stateful(data().dataset, batch_size=8), data(), ckpt_path=path)
    assert_equal(weights(whole), weights(model))
    one, other = read(path), read(tmp_path / "again.ckpt")
    for key in OF_THE_MODEL:
        assert_equal(one.get(key), other.get(key), key)


def test_an_average_costs_no_room_in_the_file_beside_the_raw_weights(tmp_path: Path) -> None:
    class Wide(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 100_000), nn.Linear(100_000, 1))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-9)

    fit(Wide, tmp_path)
    num_bytes = 4 * sum(parameter.numel() for parameter in Wide().parameters())
    assert (tmp_path / "epoch=2.ckpt").stat().st_size == pytest.approx(2 * num_bytes, rel=0.01)


def test_a_trainer_of_lightnings_own_writes_the_same_checkpoints(tmp_path: Path) -> None:
    files = {}
    for kind in (AveragingTrainer, pl.Trainer):
        keep = ModelCheckpoint(tmp_path / kind.__name__, save_last=True)
        trainer = kind(callbacks=[ema(), keep], accelerator="cpu", logger=False, max_epochs=2)
        trainer.fit(Lit(), data())
        files[kind] = torch.load(keep.last_model_path, weights_only=True)
    ours, theirs = files.values()
    for key in ("state_dict", "raw", "averages"):
        assert_equal(ours[key], theirs[key], key)


# ------------------------------------------------------------------------------ every preset, alike


class CutAt(Callback):
    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise InterruptedError


def interrupted_and_whole(configs: dict[str, Any]) -> dict[str, list[Any]]:
    """By name, what the last checkpoints hold of a whole run and of one cut in its last epoch."""
    torch.set_num_threads(1)
    found: dict[str, list[Any]] = {}
    for name, config in configs.items():
        for folder, cuts in (("whole", (None,)), ("cut", (5, None))):
            run_dir = Path(config.run_dir) / name / folder
            checkpoint = {**config.plain["callbacks"]["checkpoint"], "dirpath": str(run_dir)}
            here = config.but(run_dir=str(run_dir), callbacks={"checkpoint": checkpoint})
            for cut in cuts:
                run = build(here, [CutAt(cut)])
                last = run_dir / "last.ckpt"
                try:
                    run.trainer.fit(
                        run.model, datamodule=run.data, ckpt_path=last if last.exists() else None
                    )
                except InterruptedError:
                    assert cut is not None
            found.setdefault(name, []).append({key: read(last)[key] for key in OF_THE_MODEL[:3]})
    return found


@pytest.mark.parametrize("devices", [1, 2])
def test_every_average_of_shards_continues_bit_for_bit(
    checked: Callable[..., Any], devices: int
) -> None:
    configs = {
        preset: checked(
            f"averaging={preset}", "averaging.bn_batches=null", "model=transformer",
            "trainer.max_epochs=2", "trainer.limit_train_batches=4", "logger=none",
            "trainer.limit_val_batches=1", "callbacks.progress=null", "data.batch_size=8",
            "callbacks.checkpoint.every_n_steps=1", "trainer.accelerator=cpu",
            "strategy=fsdp", f"trainer.devices={devices}", "strategy.shard_min_parameters=4000",
            *(f"averaging.{key}={value}" for key, value in SHARDED.get(preset, {}).items()),
        )
        for preset in PRESETS
    }  # fmt: skip
    found = run_local(
        interrupted_and_whole, configs, num_processes=devices, start_method="forkserver",
        logging_config=None,
    )  # fmt: skip
    assert found.keys() == configs.keys()
    for name, (whole, cut) in found.items():
        if devices > 1:  # alone, two such runs of one process differ by rounding
            assert_equal(whole, cut, name)
        raw = whole["raw"]["state_dict"]
        for key, tensor in whole["averages"]["average"].items():
            assert torch.equal(tensor, whole["state_dict"][key]), key
            assert not torch.equal(tensor, raw[key]), key


SHARDED = {"ema": {"decay": 0.5}, "swa": {"anneal_epochs": 1, "lr": 0.01, "start": 0}}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_step_that_is_not_finite_is_in_no_average(
    checked: Callable[..., Any], preset: str
) -> None:
    class Poison(Callback):
        """A gradient without a number in every third step, which `clip` then leaves out."""

        def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
            if trainer.global_step % 3 == 2 or poisoned:
                next(pl_module.parameters()).grad.fill_(float("nan"))

    poisoned: list[int] = []
    config = checked(
        f"averaging={preset}", "clip=norm", "clip.nonfinite=skip", "trainer.max_epochs=2",
        "trainer.limit_train_batches=6", "trainer.limit_val_batches=1", "logger=none",
        "callbacks=none", "trainer.accelerator=cpu", "model.channels=4", "data.batch_size=16",
        *(["averaging.anneal_epochs=1"] if preset == "swa" else []),
    )  # fmt: skip
    run = build(config, [])
    average = next(c for c in run.trainer.callbacks if isinstance(c, Averaging))
    run.trainer.callbacks.insert(0, Poison())
    run.trainer.fit(run.model, datamodule=run.data)
    assert average._num_steps < 12
    assert all(torch.isfinite(tensor).all() for tensor in run.model.state_dict().values())
