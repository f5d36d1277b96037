"""What an average costs: an update, and the swap around a validation.

Update: against one bare `torch._foreach_lerp_` over lists that are kept; target: at most 1.1 times
that, by itself and as the training loop calls it (a hook of the optimizer, `on_train_batch_end`).
Swap: against Lightning's `WeightAveraging`, which clones and copies; target: at most 0.02 of it.
Setting the data pointers and nothing else is shown too: no swap of pointers can be below that.
Beside them Lightning's EMAWeightAveraging, torch's AveragedModel, timm's ModelEmaV3, ema-pytorch.

All happens inside a fit, after a real step. Run as `python benchmarks/averaging.py`.
"""

import importlib.util
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from presets import built
from side_by_side import cpu_seconds, in_turns, show, sized
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from app.averaging import AveragingTrainer, Ema
from app.averaging.shadow import AVERAGE

DECAY = 0.99
ROUNDS = 15
BARE, UPDATE, CALLED = "torch._foreach_lerp_, bare", "ours, the update", "ours, as called in a step"
SCAN, THEIRS = "ours, with an epoch's first scan", "Lightning EMAWeightAveraging"
SWAP, POINTERS = "ours, as called in a validation", "Tensor.data set twice, bare"
TARGETS = {UPDATE: 1.1, CALLED: 1.1, SWAP: 0.02}


# -------------------------------------------------------------------------------------- the models


def many_small() -> nn.Module:
    """600 tensors of 8 to 64 elements."""
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(300)))


def few_big() -> nn.Module:
    """4 tensors, 27.0 M elements."""
    return nn.Sequential(*(nn.Linear(2600, 2600, bias=False) for _ in range(4)))


def transformer() -> nn.Module:
    """147 tensors, 27.1 M elements: 12 layers of width 384, 15,000 tokens."""
    layer = nn.TransformerEncoderLayer(384, 6, 1536, batch_first=True)
    layers = nn.TransformerEncoder(layer, 12, norm=nn.LayerNorm(384), enable_nested_tensor=False)
    return nn.Sequential(nn.Embedding(15_000, 384), layers)


def resnet50() -> nn.Module:
    """ResNet-50's layers: 161 parameters, 25.6 M elements, and the buffers of 53 BatchNorms."""

    def convolution(num_in: int, num_out: int, size: int) -> list[nn.Module]:
        return [nn.Conv2d(num_in, num_out, size, bias=False), nn.BatchNorm2d(num_out)]

    layers = convolution(3, 64, 7)
    num_in = 64
    for width, num_blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(num_blocks):
            layers += convolution(num_in, width, 1) + convolution(width, width, 3)
            layers += convolution(width, 4 * width, 1)
            if block == 0:
                layers += convolution(num_in, 4 * width, 1)
            num_in = 4 * width
    return nn.Sequential(*layers, nn.Linear(2048, 1000))


MODELS = {
    "600 small tensors": many_small,
    **sized({"ResNet-50": resnet50, "a transformer": transformer, "4 big tensors": few_big}, {}),
}


class OneStep(pl.LightningModule):
    """Gives every parameter a gradient, without the work of a forward pass."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return torch.stack([parameter.sum() for parameter in self.parameters()]).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-9)


# --------------------------------------------------------------------------------- the contestants


class Inside(pl.Callback):
    """Measures at the end of the second batch, when both averages have begun."""

    def __init__(self, title: str, ours: Ema, theirs: EMAWeightAveraging) -> None:
        self.title = title
        self.ours = ours
        self.theirs = theirs

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        if trainer.global_step == 2:
            self._measure_updates(trainer, pl_module)
            self._measure_swaps(trainer, pl_module)

    def _measure_updates(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        optimizer = trainer.optimizers[0]
        shadow = self.ours._shadow
        assert shadow is not None
        # the very tensors of ours: others may lie in memory that is faster or slower
        now = shadow.live()
        averages, live = [shadow.sets[AVERAGE][name] for name in now], list(now.values())

        def as_called() -> None:
            for hook in optimizer._optimizer_step_post_hooks.values():
                hook(optimizer, (), {})
            self.ours.on_train_batch_end(trainer, pl_module, None, None, 0)

        def with_scan() -> None:
            self.ours.on_train_epoch_start(trainer, pl_module)
            as_called()

        def lightning() -> None:
            self.theirs._latest_update_step = 0  # it believes that a step was made
            self.theirs.on_train_batch_end(trainer, pl_module, None, None, 0)

        works: dict[str, Callable[[], object]] = {
            BARE: lambda: torch._foreach_lerp_(averages, live, 1 - DECAY),
            UPDATE: lambda: shadow.update(1 - DECAY),
            CALLED: as_called,
            SCAN: with_scan,
            THEIRS: lightning,
            **peers(pl_module),
        }
        contestants = {name: cpu_seconds(work, at_least=0.01) for name, work in works.items()}
        costs = in_turns(contestants, rounds=ROUNDS)
        size = f"{len(live)} tensors, {sum(t.numel() for t in live) / 1e6:.1f} M"
        show(f"update, {self.title} ({size})", costs, base=BARE, targets=TARGETS)

    def _measure_swaps(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        def ours() -> None:
            self.ours.on_validation_start(trainer, pl_module)
            self.ours.on_validation_end(trainer, pl_module)

        def theirs() -> None:
            self.theirs.on_validation_epoch_start(trainer, pl_module)
            self.theirs.on_validation_epoch_end(trainer, pl_module)

        buffers = [buffer for buffer in pl_module.buffers() if buffer.is_floating_point()]
        live = [*pl_module.parameters(), *buffers]
        one, other = [t.data for t in live], [t.data.clone() for t in live]

        def pointers() -> None:
            for tensors in (other, one):
                for tensor, data in zip(live, tensors, strict=True):
                    tensor.data = data

        works = {THEIRS: theirs, SWAP: ours, POINTERS: pointers}
        contestants = {name: cpu_seconds(work, at_least=0.01) for name, work in works.items()}
        costs = in_turns(contestants, rounds=ROUNDS)
        show(f"a validation's two swaps, {self.title}", costs, base=THEIRS, targets=TARGETS)


def peers(model: nn.Module) -> dict[str, Callable[[], object]]:
    """The updates of the other implementations; those that are not installed are left out."""
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=True)
    averaged.update_parameters(model)
    found = {"torch AveragedModel, multi_avg_fn": lambda: averaged.update_parameters(model)}
    if timm := timm_model_ema():
        timm_ema = timm.ModelEmaV3(model, decay=DECAY)
        found["timm ModelEmaV3"] = lambda: timm_ema.update(model)
    if importlib.util.find_spec("ema_pytorch"):
        from ema_pytorch import EMA

        ema = EMA(
            model,
            beta=DECAY,
            update_after_step=0,
            update_every=1,
            use_foreach=True,
            include_online_model=False,
        )
        for _ in range(3):  # the first ones copy
            ema.update()
        found["ema-pytorch, use_foreach"] = ema.update
    return found


def timm_model_ema() -> ModuleType | None:
    """timm's module of averages alone: timm itself needs torchvision, of torch's very version."""
    spec = importlib.util.find_spec("timm")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "utils" / "model_ema.py"
    spec = importlib.util.spec_from_file_location("timm_model_ema", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Measure each model."""
    warnings.filterwarnings("ignore")  # Lightning's, of loaders and loggers
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    for package in ("timm", "ema_pytorch"):
        if importlib.util.find_spec(package) is None:
            name = package.replace("_", "-")
            print(f"{name} is not installed and left out: pip install --no-deps {name}")
    for title, make in MODELS.items():
        ours = built("averaging", "averaging=ema", f"averaging.decay={DECAY}")
        theirs = EMAWeightAveraging(decay=DECAY)
        trainer = AveragingTrainer(
            accelerator="cpu",
            max_steps=3,
            callbacks=[ours, theirs, Inside(title, ours, theirs)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(OneStep(make()), [torch.zeros(1)] * 3)


if __name__ == "__main__":
    main()
