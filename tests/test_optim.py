"""The optimizers that are not torch's own, and what they need."""

import sys
from collections.abc import Callable
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import SMALL
from torch import nn

from app.errors import Refused
from app.optim import AdamW8bit
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
