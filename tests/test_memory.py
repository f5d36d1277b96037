"""Activation checkpointing: the same numbers, fewer activations, names and copies as they were."""

import copy
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import refuse
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from app.memory import Checkpointing
from app.run.build import build

MESSAGES = {
    ("memory=checkpointing",): "memory.classes must name the blocks where memory.min_parameters "
    "is null, got []; type 'memory.classes=[TransformerEncoderLayer]' or "
    "memory.min_parameters=100000",
    ("memory=checkpointing", "memory.classes=[Linear]", "memory.min_parameters=9"): "memory."
    "min_parameters must be null where memory.classes names the blocks, got 9; type "
    "memory.min_parameters=null",
    ("memory=checkpointing", "memory.min_parameters=0"): "memory.min_parameters must be >= 1, "
    "got 0; type memory.min_parameters=100000",
}  # fmt: skip


class Block(nn.Module):
    """Draws from all three random generators, and keeps running statistics of two kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.instance = nn.InstanceNorm1d(2, track_running_stats=True)
        self.dropout = nn.Dropout(0.3)
        self.num_runs = 0

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        self.num_runs += 1
        h = self.norm(self.linear(x)).relu()
        h = self.instance(h.view(-1, 2, 4)).view(-1, 8)
        h = h * (random.random() + np.random.rand())
        return x + scale * self.dropout(h).tanh()


class Net(LightningModule):
    def __init__(self, block: Callable[[], nn.Module] = Block) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(2))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, scale=0.5) if isinstance(block, Block) else block(x)
        return self.head(x)


X = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))


def checkpointed(model: nn.Module, *classes: str) -> nn.Module:
    Checkpointing(classes=classes or ["Block"], min_parameters=None).apply(model)
    return model


def trained(model: nn.Module, num_steps: int = 3) -> dict[str, Tensor]:
    """Weights, statistics and gradients after a few steps, and what is drawn next."""
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(num_steps):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()
    gradients = {f"grad {name}": p.grad for name, p in model.named_parameters()}
    next_draws = torch.tensor([torch.rand(()), random.random(), np.random.rand()])
    return {**model.state_dict(), **gradients, "draws": next_draws}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_gradients_statistics_and_random_draws_are_equal_to_the_bit() -> None:
    model = Net()
    assert_equal(trained(copy.deepcopy(model)), trained(checkpointed(model)))


def test_gradients_are_equal_under_autocast() -> None:
    model = Net()
    with torch.autocast("cpu", torch.bfloat16):
        expected = trained(copy.deepcopy(model))
        assert_equal(expected, trained(checkpointed(model)))


def test_a_block_runs_twice_in_training_and_once_where_no_gradient_is_recorded() -> None:
    model = checkpointed(Net())
    model(X).sum().backward()
    assert [block.num_runs for block in model.blocks] == [2, 2]
    with torch.no_grad():
        model(X)
    assert [block.num_runs for block in model.blocks] == [3, 3]


def test_fewer_bytes_wait_for_the_backward_pass() -> None:
    def kept(model: nn.Module) -> int:
        tensors: list[Tensor] = []

        def keep(tensor: Tensor) -> Tensor:
            tensors.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(X).sum()
        return len(tensors)

    model = Net()
    assert kept(checkpointed(copy.deepcopy(model))) < kept(model) / 3


def test_names_class_and_pickling_stay_as_they_were() -> None:
    model = Net()
    names = [*model.state_dict()], [name for name, _ in model.named_modules()]
    checkpointed(model)
    checkpointed(model)  # a configure_model runs more than once
    assert names == ([*model.state_dict()], [name for name, _ in model.named_modules()])
    assert type(model.blocks[0]) is Block
    assert_equal(trained(pickle.loads(pickle.dumps(model))), trained(model))
    assert [block.num_runs for block in model.blocks] == [6, 6]


def test_a_copy_checkpoints_its_own_blocks() -> None:
    model = checkpointed(Net())
    twin = copy.deepcopy(model)
    twin(X).sum().backward()
    assert [block.num_runs for block in model.blocks] == [0, 0]
    assert [block.num_runs for block in twin.blocks] == [2, 2]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.grad is not None for parameter in twin.parameters())


def test_a_copy_of_a_transformer_runs_its_own_blocks(checked: Callable[..., Any]) -> None:
    run = build(checked("model=transformer", "trainer.accelerator=cpu", "callbacks=none"), [])
    checkpointed(run.model, "TransformerEncoderLayer")
    twin = copy.deepcopy(run.model)
    seen = []
    for part in twin.net[1].layers:
        part.register_forward_pre_hook(lambda module, _: seen.append(module))
        assert part.forward.__self__ is part
    twin(torch.randn(4, 40)).sum().backward()
    assert seen == list(twin.net[1].layers)
    assert all(parameter.grad is None for parameter in run.model.parameters())


def test_only_the_outermost_of_nested_blocks_is_checkpointed() -> None:
    model = Net(lambda: nn.Sequential(Block()))
    checkpointed(model, "Block", "Sequential")(X).sum().backward()
    assert [block[0].num_runs for block in model.blocks] == [2, 2]


def test_blocks_are_chosen_by_size() -> None:
    model = Net()
    Checkpointing(classes=[], min_parameters=80).apply(model)
    model(X).sum().backward()
    assert [block.num_runs for block in model.blocks] == [2, 2]


def test_a_block_whose_buffer_would_change_twice_is_refused() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            return x

    model = checkpointed(Net(Counting), "Counting")
    with torch.no_grad():
        model(X)
    with pytest.raises(ValueError, match="buffer") as refusal:
        model(X)
    assert str(refusal.value) == (
        "memory cannot checkpoint Counting: each run of it changes its buffer count, and "
        "checkpointing runs it twice; type other memory.classes, or use memory=none"
    )
    spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))
    model = checkpointed(Net(lambda: nn.Sequential(copy.deepcopy(spectral))), "Sequential")
    with pytest.raises(ValueError, match=r"changes its buffer 0\.parametrizations\.weight\.0\._u"):
        model(X)


@pytest.mark.parametrize("typed", MESSAGES, ids=" ".join)
def test_what_cannot_be_done_is_refused(typed: tuple[str, ...]) -> None:
    from app.conf.memory.schema import Checkpointing as Schema

    settings = {"classes": [], "min_parameters": None}
    for override in typed[1:]:
        key, _, value = override.removeprefix("memory.").partition("=")
        settings[key] = ["Linear"] if key == "classes" else int(value)
    with pytest.raises(ValueError, match="memory") as refusal:
        refuse("memory", Schema(**settings))
    assert str(refusal.value) == MESSAGES[typed]
