"""Another rate in mid-run reaches the optimizer and every schedule, or nothing is changed."""

import copy
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from scheduled import TORCH, Own
from torch import nn
from torch.optim import SGD, Adam, lr_scheduler
from torch.optim.swa_utils import SWALR

from app.throwaway.rates import scale_rates


def trainer_of(*schedules: Any, optimizer: Any, model: Any = None) -> Any:
    """What is read of a trainer."""
    configs = [
        SimpleNamespace(scheduler=s, reduce_on_plateau=False, monitor=None) for s in schedules
    ]
    return SimpleNamespace(
        optimizers=[optimizer],
        lr_scheduler_configs=configs,
        lightning_module=model or pl.LightningModule(),
    )


def weights() -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(2)) for _ in range(2)]


def made(name: str, *, milestone: int, scaled_by: float | None, nested: bool) -> list[float]:
    """The rates of a schedule; scaled before the step `milestone`."""
    first, second = weights()
    optimizer = SGD([{"params": [first], "lr": 0.02}, {"params": [second], "lr": 0.03}],
                    momentum=0.9)  # fmt: skip
    schedule = TORCH[name](optimizer)
    if nested:
        constant = lr_scheduler.ConstantLR(optimizer, 0.5, 2)
        schedule = lr_scheduler.SequentialLR(optimizer, [constant, schedule], [milestone + 2])
    is_plateau = name == "ReduceLROnPlateau"
    rates = []
    for step in range(12):
        if step == milestone and scaled_by is not None:
            assert scale_rates(trainer_of(schedule, optimizer=optimizer), scaled_by) is None
        rates += [group["lr"] for group in optimizer.param_groups]
        optimizer.step()
        schedule.step(*([-step] if is_plateau else []))
    return rates


@pytest.mark.parametrize("milestone", [1, 2, 5])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", TORCH)
def test_sc_milestone_every_schedule_goes_on_from_the_new_rate(
    name: str, nested: bool, milestone: int
) -> None:
    if nested and name in ("SequentialLR", "ChainedScheduler", "ReduceLROnPlateau"):
        pytest.skip("torch nests no such schedule")
    plain, scaled = (
        made(name, milestone=milestone, scaled_by=by, nested=nested) for by in (None, 3.0)
    )
    at = 2 * milestone
    assert scaled[:at] == plain[:at]
    assert scaled[at:] == pytest.approx([3.0 * rate for rate in plain[at:]])


class Absolute(lr_scheduler.LRScheduler):
    """Knows the rates by heart, as warm-ups from papers do."""

    def get_lr(self) -> list[float]:
        return [0.01 / (1 + self.last_epoch) for _ in self.optimizer.param_groups]


class Locked(lr_scheduler.StepLR):
    """Cannot be copied."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("cannot pickle '_thread.lock' object")


class Steps(pl.LightningModule):
    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.advance(metric)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (Absolute, "Absolute"),
        (lambda o: Locked(o, 2), "Locked"),
        (lambda o: SWALR(o, 0.05), "SWALR"),
    ],
)
def test_sc_milestone_what_would_not_go_on_is_left_alone(make: Any, name: str) -> None:
    optimizer = SGD(weights(), lr=0.02)
    schedule = make(optimizer)
    optimizer.step()
    schedule.step()
    before = copy.deepcopy(
        [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    )
    state = copy.deepcopy(schedule.state_dict())
    assert scale_rates(trainer_of(schedule, optimizer=optimizer), 3.0) == name
    assert [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] == before
    assert schedule.state_dict() == state


def test_sc_milestone_a_schedule_stepped_by_the_model() -> None:
    optimizer = SGD(weights(), lr=0.02)
    schedule = Own(optimizer)
    trainer = trainer_of(schedule, optimizer=optimizer, model=Steps())
    assert scale_rates(trainer, 2.0) is None
    assert optimizer.param_groups[0]["lr"] == 0.04
    assert schedule.seen == []


def test_sc_milestone_a_rate_in_a_tensor_stays_in_it() -> None:
    rate = torch.tensor(0.02)
    optimizer = Adam(weights(), lr=rate, capturable=False, foreach=False)
    assert scale_rates(trainer_of(optimizer=optimizer), 2.0) is None
    assert optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(0.04)
