"""Optimizers and schedules of any library, and what they need."""

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import SMALL
from test_sharded import on_ranks
from torch import nn

from app.errors import Refused
from app.optim import AdamW8bit, with_rate
from app.run.build import build

SETTINGS = {"lr": 0.01, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.1,
            "min_8bit_size": 16}  # fmt: skip


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_a_missing_package_is_said_with_what_to_install(checked: Callable[..., Any]) -> None:
    with pytest.raises(Refused) as refusal:
        checked("optimizer=adamw8bit")
    assert str(refusal.value) == (
        "optimizer=adamw8bit needs the package bitsandbytes, which is not installed; type pip "
        "install -e '.[bitsandbytes]', or use optimizer=adamw"
    )


def test_the_settings_reach_the_class_of_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def theirs(parameters: Any, **settings: Any) -> Any:
        seen.extend((list(parameters), settings))
        return torch.optim.AdamW(seen[0])

    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", SimpleNamespace(AdamW8bit=theirs))
    layer = nn.Linear(2, 2)
    AdamW8bit(**SETTINGS)(layer.parameters())
    assert [id(p) for p in seen[0]] == [id(p) for p in layer.parameters()]
    assert seen[1] == SETTINGS | {"betas": (0.9, 0.99)}


def test_moments_of_8_bits_train_and_resume() -> None:
    pytest.importorskip("bitsandbytes")
    x, y = torch.randn(64, 32), torch.randint(0, 4, (64,))

    def step(net: nn.Module, optimizer: torch.optim.Optimizer) -> float:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        return loss.item()

    net, twin = nn.Linear(32, 4), nn.Linear(32, 4)
    optimizer, other = (AdamW8bit(**SETTINGS)(n.parameters()) for n in (net, twin))
    first = step(net, optimizer)
    twin.load_state_dict(net.state_dict())
    other.load_state_dict(optimizer.state_dict())
    for _ in range(10):
        assert step(net, optimizer) == step(twin, other)
    assert step(net, optimizer) < first
    assert optimizer.state[net.weight]["state1"].dtype == torch.uint8


def test_a_fused_sgd_steps_as_the_plain_one_does_but_for_rounding(
    checked: Callable[..., Any],
) -> None:
    weights = []
    for fused in ("null", "true"):
        run = build(checked(*SMALL, f"optimizer.fused={fused}"), [])
        run.trainer.fit(run.model, datamodule=run.data)
        weights.append([p.detach() for p in run.model.parameters()])
    assert run.trainer.optimizers[0].defaults["fused"]
    torch.testing.assert_close(*weights)


# ------------------------------------------------------------------------------- of any library

CUSTOM = "optimizer=custom"
TORCH = "scheduler._target_=torch.optim.lr_scheduler"


def makes(parameters: Any, *, rate: float) -> torch.optim.Optimizer:
    """As timm's `create_optimizer_v2`: a function."""
    return torch.optim.Adam(parameters, lr=rate)


class Factory:
    """As `AdamW8bit` here: its objects make the optimizer."""

    def __init__(self, lr: float) -> None:
        self.lr = lr

    def __call__(self, parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=self.lr)


class Flat(torch.optim.SGD):
    """Knows of no groups."""

    def __init__(self, params: Any) -> None:
        super().__init__([p for group in params for p in group["params"]], lr=0.1)


class Rateless(torch.optim.SGD):
    """As Adafactor: makes its rate itself, where it is given none."""

    def __init__(self, params: Any, lr: float | None = None) -> None:
        super().__init__(params)
        for group in self.param_groups:
            group["lr"] = lr


def fitted(config: Any) -> Any:
    run = build(config, [])
    run.trainer.fit(run.model, datamodule=run.data)
    return run.trainer


OPTIMIZERS: dict[tuple[str, ...], tuple[type, dict[str, Any]]] = {
    ("optimizer._target_=torch.optim.RAdam",): (torch.optim.RAdam, {"lr": 0.001}),
    ("optimizer._target_=torch.optim.RAdam", "+optimizer.lr=0.02", "+optimizer._partial_=true",
     "+optimizer.betas=[0.8,0.9]"): (torch.optim.RAdam, {"lr": 0.02, "betas": [0.8, 0.9]}),
    ("optimizer._target_=torch.optim.LBFGS", "+optimizer.max_iter=2", "clip=none"): (
        torch.optim.LBFGS, {"lr": 1, "max_iter": 2}),
    ("optimizer._target_=test_optim.makes", "+optimizer.rate=0.02"): (
        torch.optim.Adam, {"lr": 0.02}),
    ("optimizer._target_=test_optim.Factory", "optimizer.lr=0.02"): (
        torch.optim.SGD, {"lr": 0.02}),
}  # fmt: skip


@pytest.mark.parametrize("typed", OPTIMIZERS, ids=lambda typed: typed[0].rpartition(".")[2])
def test_any_class_or_function_makes_the_optimizer(
    checked: Callable[..., Any], typed: tuple[str, ...]
) -> None:
    trainer = fitted(checked(*SMALL, CUSTOM, *typed))
    kind, settings = OPTIMIZERS[typed]
    assert type(trainer.optimizers[0]) is kind
    assert settings.items() <= trainer.optimizers[0].defaults.items()
    assert trainer.global_step == 12


def test_a_preset_of_the_users_own_needs_no_schema(
    checked: Callable[..., Any], tmp_path: Path
) -> None:
    for group, text in {
        "optimizer": "_target_: torch.optim.Adam\n_partial_: true\nlr: 0.02\nweight_decay: 0.1\n",
        "scheduler": "_target_: torch.optim.lr_scheduler.ReduceLROnPlateau\n_partial_: true\n"
        "mode: min\npatience: 10\nmonitor: val_loss\n",
    }.items():
        (tmp_path / group).mkdir()
        (tmp_path / group / "mine.yaml").write_text(text)
    path = f"hydra.searchpath=[file://{tmp_path}]"
    mine = ("optimizer=mine", "scheduler=mine", "optimizer/groups=no_decay")
    trainer = fitted(checked(*SMALL, path, *mine))
    assert [g["weight_decay"] for g in trainer.optimizers[0].param_groups] == [0.0, 0.1]
    assert trainer.lr_scheduler_configs[0].monitor == "val_loss"


SCHEDULES: dict[tuple[str, ...], float] = {
    (f"{TORCH}.ExponentialLR", "+scheduler.gamma=0.5"): 0.05,
    (f"{TORCH}.ExponentialLR", "+scheduler.gamma=0.5", "scheduler.interval=step",
     "scheduler.frequency=6"): 0.05,
    (f"{TORCH}.CosineAnnealingLR", "+scheduler.T_max=total_steps", "scheduler.interval=step"): 0.0,
    (f"{TORCH}.CosineAnnealingLR", "+scheduler.T_max=total_epochs"): 0.0,
    (f"{TORCH}.SequentialLR", "+scheduler.milestones=[1]",
     "+scheduler.schedulers=[{_target_: torch.optim.lr_scheduler.ConstantLR, _partial_: true}, "
     "{_target_: torch.optim.lr_scheduler.StepLR, _partial_: true, step_size: 1, gamma: 0.1}]"):
        0.02,
    ("scheduler._target_=test_optim.warmed", "+scheduler.num_warmup_steps=24",
     "+scheduler.num_training_steps=total_steps", "scheduler.interval=step"): 0.1,
    (f"{TORCH}.ReduceLROnPlateau", "scheduler.monitor=val_acc", "+scheduler.threshold=9",
     "+scheduler.patience=0"): 0.02,
}  # fmt: skip


def warmed(
    name_or_optimizer: Any, num_warmup_steps: int, num_training_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """As transformers' `get_linear_schedule_with_warmup`: a function that is told the length."""
    assert num_training_steps == 12
    return torch.optim.lr_scheduler.LambdaLR(name_or_optimizer, lambda s: s / num_warmup_steps)


@pytest.mark.parametrize("typed", SCHEDULES, ids=lambda typed: typed[0].rpartition(".")[2])
def test_any_class_or_function_makes_the_schedule(
    checked: Callable[..., Any], typed: tuple[str, ...]
) -> None:
    trainer = fitted(checked(*SMALL, "scheduler=custom", *typed))
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(SCHEDULES[typed], abs=1e-9)


REFUSED = {
    (CUSTOM, "optimizer._target_=torch.optim.RAdam", "+optimizer.params=3"): "optimizer.params is "
    "given by the run; leave it out",
    (CUSTOM, "optimizer._target_=torch.optim.RAdam", "+optimizer.momentm=3"): "optimizer.momentm "
    "is not an argument of torch.optim.RAdam; it takes params, lr, betas, eps, weight_decay, "
    "decoupled_weight_decay, foreach, maximize, capturable, differentiable",
    (CUSTOM, "optimizer._target_=torch.optim.RAdam", "optimizer.lr=-1"): "optimizer.lr must be > "
    "0, got -1; type for example optimizer.lr=0.01",
    (CUSTOM, "optimizer._target_=builtins.list"): "optimizer._target_ must make an Optimizer, and "
    "makes a list; type optimizer._target_=torch.optim.Adam",
    (CUSTOM, "optimizer._target_=test_optim.Flat", "optimizer.layer_decay=0.5"): "optimizer.groups "
    "cannot act: Flat does not keep the groups that it is given; type optimizer/groups=all",
    (CUSTOM, "optimizer._target_=torch.optim.Rprop", "optimizer/groups=no_decay"): "optimizer."
    "groups[0].weight_decay is not a setting of Rprop, which has lr, etas, step_sizes, foreach, "
    "maximize, differentiable, capturable; leave it out",
    ("scheduler=custom", f"{TORCH}.PolynomialLR", "+scheduler.total_iters=total_step"): "scheduler"
    ": total_step is no length of the run; did you mean total_steps?",
    (CUSTOM, "optimizer._target_=test_optim.Rateless", "scheduler=cosine"): "scheduler needs a "
    "rate to set, and Rateless makes its own; type optimizer.lr=0.001, or use scheduler=none",
    ("scheduler=custom", f"{TORCH}.ExponentialLR"): "scheduler.gamma is required by torch.optim."
    "lr_scheduler.ExponentialLR; type +scheduler.gamma=VALUE",
    ("scheduler=custom", f"{TORCH}.ReduceLROnPlateau"): "scheduler.monitor is required by "
    "ReduceLROnPlateau; type scheduler.monitor=val_loss",
    ("scheduler=custom", f"{TORCH}.ExponentialLR", "+scheduler.gamma=0.9",
     "scheduler.frequency=0"): "scheduler.frequency must be >= 1, got 0; type "
    "scheduler.frequency=1",
    ("scheduler=custom", f"{TORCH}.OneCycleLR", "+scheduler.max_lr=0.1",
     "optimizer.layer_decay=0.5", "+scheduler.total_steps=total_steps",
     "scheduler.interval=step"): "scheduler: OneCycleLR gives all groups the rate 0.004, so that "
    "their scales have no effect; give it one for each, as "
    "'+scheduler.max_lr=[0.1,0.05]', or use scheduler=onecycle",
    ("scheduler=custom", f"{TORCH}.CosineAnnealingLR", "+scheduler.T_max=total_epochs",
     "trainer.max_epochs=null", "trainer.max_steps=5"): "scheduler needs the number of epochs, "
    "which nothing bounds; type trainer.max_epochs=30, or total_steps with scheduler.interval=step",
}  # fmt: skip


@pytest.mark.parametrize("typed", REFUSED, ids=lambda typed: " ".join(typed[1:3]))
def test_what_makes_none_is_refused(checked: Callable[..., Any], typed: tuple[str, ...]) -> None:
    with pytest.raises(Refused) as refusal:
        fitted(checked(*SMALL, *typed))
    assert str(refusal.value) == REFUSED[typed]


def test_a_finder_begins_at_the_rate_that_the_class_has_by_default(
    checked: Callable[..., Any],
) -> None:
    config = checked(*SMALL, CUSTOM, "optimizer._target_=torch.optim.NAdam")
    assert with_rate(config).plain["optimizer"]["lr"] == 0.002
    chosen = checked(*SMALL, CUSTOM, "optimizer._target_=torch.optim.NAdam", "optimizer.lr=0.1")
    assert with_rate(chosen) is chosen
    assert with_rate(checked("optimizer=none")).plain["optimizer"] is None


# ------------------------------------------------------------------------------------ on shards


class Normed(torch.optim.SGD):
    """Sums over its weights as Prodigy does, by numbers: those are of a rank's shards."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            local = [getattr(p, "_local_tensor", p) for p in group["params"]]
            group["lr"] = 0.01 / float(sum(tensor.detach().abs().sum() for tensor in local))
        return super().step(closure)


class Sets(torch.optim.SGD):
    """Sets the memory of its weights, as SAM does to go back."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p.data = p.data * 0.9
        return loss


class Fails(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        for p in self.param_groups[0]["params"]:
            torch.ones(p.shape).mul_(p)
        return super().step(closure)


def outcomes(configs: dict[str, Any]) -> dict[str, str]:
    torch.set_num_threads(1)
    found = {}
    for name, config in configs.items():
        try:
            fitted(config)
            found[name] = "trains"
        except Refused as refusal:
            found[name] = str(refusal)
    return found


@pytest.mark.slow
def test_an_optimizer_that_steps_shards_otherwise_than_whole_tensors_is_refused(
    checked: Callable[..., Any],
) -> None:
    kinds = ["torch.optim.RAdam", *(f"test_optim.{name}" for name in ("Normed", "Sets", "Fails"))]
    configs = {
        kind: checked(*SMALL, CUSTOM, f"optimizer._target_={kind}", "optimizer.lr=0.01",
                      "strategy=fsdp", "trainer.devices=2")
        for kind in kinds
    }  # fmt: skip
    trains, normed, sets, fails = on_ranks(outcomes, 2, configs).values()
    assert trains == "trains"
    assert normed == (
        "optimizer: Normed cannot step the shards of strategy=fsdp: it moves them otherwise than "
        "whole ones; type strategy=ddp, or another optimizer"
    )
    assert sets == normed.replace("Normed", "Sets")
    assert fails.startswith("optimizer: Fails cannot step the shards of strategy=fsdp: it raises ")
