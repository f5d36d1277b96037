"""Blocks of any model, by class or size; a forward of its own for one module."""

import copy
import pickle
from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn
from torchmetrics import MeanSquaredError

from app.blocks import find_blocks, outermost, wrap_forward
from app.models.transformer import Transformer


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(x)


class Net(nn.Module):
    """Two stages of two layers in a ModuleList, a shared layer, a metric, attention and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Sequential(Layer(), Layer()) for _ in range(2))
        self.again = self.stages[0][0]
        self.metric = MeanSquaredError()
        self.attention = nn.MultiheadAttention(4, 2)
        self.head = nn.Linear(4, 100)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.stages[1](self.stages[0](x)))


def transformer() -> Transformer:
    return Transformer(
        in_features=8,
        num_classes=3,
        patch_size=4,
        dim=8,
        num_layers=2,
        num_heads=2,
        mlp_dim=16,
        dropout=0.1,
    )


def by_class(model: nn.Module, *classes: str) -> dict[str, nn.Module]:
    return find_blocks(model, classes=classes, min_parameters=None, prefix="memory.")


def by_size(model: nn.Module, min_parameters: int) -> list[str]:
    return list(
        find_blocks(model, classes=[], min_parameters=min_parameters, prefix="strategy.shard_")
    )


def test_blocks_are_found_by_the_names_of_their_classes() -> None:
    blocks = by_class(transformer(), "TransformerEncoderLayer")
    assert list(blocks) == ["net.1.layers.0", "net.1.layers.1"]


def test_inner_blocks_come_before_the_outer_ones_that_hold_them() -> None:
    blocks = by_class(Net(), "Sequential", "Layer")
    assert list(blocks) == [
        "stages.0.0", "stages.0.1", "stages.0", "stages.1.0", "stages.1.1", "stages.1",
    ]  # fmt: skip
    assert list(outermost(blocks)) == ["stages.0", "stages.1"]


@pytest.mark.parametrize(
    ("min_parameters", "names"),
    [
        (500, ["head"]),
        (100, ["head"]),
        (80, ["attention", "head"]),
        (40, ["stages.0", "stages.1", "attention", "head"]),
        (20, ["stages.0.0.linear", "stages.0.1.linear", "stages.1.0.linear", "stages.1.1.linear",
              "attention", "head"]),
    ],
)  # fmt: skip
def test_by_size_a_block_is_large_enough_without_the_blocks_inside_it(
    min_parameters: int, names: list[str]
) -> None:
    assert by_size(Net(), min_parameters) == names


def test_neither_the_root_nor_a_list_nor_the_inside_of_attention_is_a_block() -> None:
    with pytest.raises(ValueError, match="got Net"):
        by_class(Net(), "Net")
    with pytest.raises(ValueError, match="got ModuleList"):
        by_class(Net(), "ModuleList")
    with pytest.raises(ValueError, match="got NonDynamicallyQuantizableLinear"):
        by_class(Net(), "NonDynamicallyQuantizableLinear")
    with pytest.raises(ValueError, match="got MeanSquaredError"):
        by_class(Net(), "MeanSquaredError")


def test_an_unknown_class_is_refused_with_those_that_repeat() -> None:
    with pytest.raises(ValueError, match="classes") as refusal:
        by_class(transformer(), "Block")
    assert str(refusal.value) == (
        "memory.classes must name classes of modules in Transformer, got Block; it has 6 Linear, "
        "6 Dropout, 5 LayerNorm, 2 MultiheadAttention, 2 TransformerEncoderLayer: type for example "
        "'memory.classes=[TransformerEncoderLayer]'"
    )


def test_a_size_that_no_module_has_is_refused() -> None:
    with pytest.raises(ValueError, match="min_parameters") as refusal:
        by_size(Net(), 501)
    assert str(refusal.value) == (
        "strategy.shard_min_parameters must be at most 500, which the largest module in Net has, "
        "got 501; type strategy.shard_min_parameters=250"
    )


def test_a_model_without_modules_is_refused_too() -> None:
    with pytest.raises(ValueError, match="it has no module"):
        by_class(nn.Identity(), "Block")


def doubled(forward: Any) -> Any:
    return lambda module, x: 2 * forward(module, x)


def test_a_wrapped_forward_is_of_one_module_and_once_for_each_key() -> None:
    one, other = Layer(), Layer()
    other.load_state_dict(one.state_dict())
    keys = list(one.state_dict())
    x = torch.randn(3, 4)
    wrap_forward(one, "memory", doubled)
    wrap_forward(one, "compile", doubled)
    wrap_forward(one, "memory", doubled)
    assert torch.equal(one(x), 4 * other(x))
    assert type(one) is Layer
    assert list(one.state_dict()) == keys


def test_a_deep_copy_calls_the_forward_of_the_copy_and_pickling_gives_that_of_the_class() -> None:
    layer = Layer()
    wrap_forward(layer, "memory", doubled)
    twin = copy.deepcopy(layer)
    nn.init.zeros_(layer.linear.weight)
    nn.init.zeros_(layer.linear.bias)
    x = torch.randn(3, 4)
    assert torch.equal(layer(x), 2 * x)
    assert not torch.equal(twin(x), layer(x))
    assert torch.equal(twin(x), 2 * (x + twin.linear(x)))
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), x)


def test_a_forward_that_is_no_method_is_refused() -> None:
    layer = Layer()
    layer.forward = lambda x: x
    with pytest.raises(ValueError, match="needs a forward") as refusal:
        wrap_forward(layer, "compile", doubled)
    assert str(refusal.value) == (
        "compile needs a forward that is a method, and that of Layer is not one; use compile=none"
    )


def test_a_forward_that_was_replaced_by_another_method_is_the_one_wrapped() -> None:
    layer = Layer()
    layer.forward = MethodType(lambda module, x: x - 1, layer)
    wrap_forward(layer, "memory", doubled)
    assert torch.equal(layer(torch.ones(2)), torch.zeros(2))
