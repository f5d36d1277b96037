"""Muon and AdamW in one optimizer: which parameter each has, and what each makes of it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import SMALL
from torch import nn

from app.errors import Refused
from app.optim import Grouping, Muon
from app.optim.matrices import IS_MUONS, Split
from app.optim.muon import orthogonalized
from app.run.build import build

SETTINGS: dict[str, Any] = {
    "lr": 0.02, "weight_decay": 0.1, "momentum": 0.95, "nesterov": True, "ns_steps": 5,
    "ns_dtype": "bfloat16", "adjust": "original", "betas": [0.9, 0.95], "eps": 1e-8,
}  # fmt: skip
PLAIN = Split(adamw_for=None, adamw_lr_scale=1.0)


class Net(nn.Module):
    """One of each kind; the head is registered last."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.position = nn.Parameter(torch.randn(3, 8))
        self.conv = nn.Conv2d(1, 6, 3)
        self.narrow = nn.Linear(8, 1)
        self.attention = nn.MultiheadAttention(8, 2)
        self.norm = nn.LayerNorm(8)
        self.first = nn.Linear(8, 12, bias=False)
        self.second = nn.Linear(8, 12)
        self.up = nn.ConvTranspose1d(4, 4, 3)
        self.tied = nn.Linear(8, 11, bias=False)
        self.tied.weight = self.embed.weight
        self.head = nn.Linear(12, 5)
        self.frozen = nn.Linear(5, 5).requires_grad_(False)


def muons(model: nn.Module, **settings: Any) -> set[str]:
    split = Split(**{"adamw_for": None, "adamw_lr_scale": 1.0} | settings)
    groups = Grouping(split=split).of(model)
    return {name for group in groups if group[IS_MUONS] for name in group["names"]}


HIDDEN = {"conv.weight", "attention.in_proj_weight", "attention.out_proj.weight", "first.weight",
          "second.weight", "frozen.weight"}  # fmt: skip


def test_hidden_matrices_are_muons_and_embeddings_heads_norms_and_biases_adamws() -> None:
    assert muons(Net()) == HIDDEN
    assert muons(Net(), adamw_for=["second.*"]) == HIDDEN - {"second.weight"} | {"head.weight"}
    assert muons(Net(), adamw_for=["Conv2d"]) == HIDDEN - {"conv.weight"} | {"head.weight"}
    assert muons(Net(), adamw_for=[]) == HIDDEN | {"head.weight"}


def test_lazy_and_parametrized_layers_are_told_by_their_names_and_owners() -> None:
    net = nn.Sequential(nn.LazyConv1d(4, 3), nn.LazyLinear(6), nn.Linear(6, 6), nn.Linear(6, 2))
    nn.utils.parametrizations.weight_norm(net[2])
    assert muons(net) == {"0.weight", "1.weight", "2.parametrizations.weight.original1"}


def test_what_has_no_hidden_matrix_or_no_such_parameter_is_refused() -> None:
    with pytest.raises(Refused) as refusal:
        muons(nn.Linear(3, 3))
    assert str(refusal.value) == (
        "optimizer=muon finds no hidden matrix in Linear, which has 1 weights of Linear, Conv1d, "
        "Conv2d, Conv3d, MultiheadAttention with the head and embeddings; use optimizer=adamw"
    )
    with pytest.raises(Refused, match=r"^optimizer.adamw_for=hed matches no parameter of Net, by"):
        muons(Net(), adamw_for=["hed"])
    with pytest.raises(Refused, match=r"^optimizer\._target_=app\.optim\.Muon needs the keys"):
        Muon(**SETTINGS)(Net().parameters())


def test_groups_of_rules_are_divided_and_each_has_its_rate(checked: Callable[..., Any]) -> None:
    rules = '[{match: "*.bias", weight_decay: 0}, {match: Conv1d, lr_scale: 0.5, momentum: 0.5}]'
    run = build(
        checked(*SMALL, "optimizer=muon", f"optimizer.groups={rules}", "optimizer.lr=0.1",
                "optimizer.adamw_lr_scale=0.1"), []
    )  # fmt: skip
    run.trainer.fit(run.model, datamodule=run.data)
    groups = {group["name"]: group for group in run.trainer.optimizers[0].param_groups}
    assert {name: round(group["lr"], 9) for name, group in groups.items()} == {
        "Conv1d/muon": 0.05, "*.bias/adamw": 0.01, "rest/adamw": 0.01,
    }  # fmt: skip
    assert [groups[name]["weight_decay"] for name in groups] == [0, 0.1, 0.1]
    assert groups["Conv1d/muon"]["momentum"] == 0.5


@pytest.mark.parametrize(
    ("match", "key", "whose"),
    [("*.bias", "momentum", "Muon's, and all that the rule matches is stepped by AdamW"),
     ("first.*", "eps", "AdamW's, and all that the rule matches is stepped by Muon")],
)  # fmt: skip
def test_a_setting_that_what_steps_the_parameters_does_not_read_is_refused(
    match: str, key: str, whose: str
) -> None:
    rules = [{"match": "*.weight", key: 0.5}, {"match": match, key: 0.5}]
    Grouping(rules=rules[:1], split=PLAIN).of(Net())
    with pytest.raises(Refused) as refusal:
        Grouping(rules=rules[1:], split=PLAIN).of(Net())
    assert str(refusal.value) == (
        f"optimizer.groups[0].{key} has no effect: it is {whose}; leave it out"
    )


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_it_is_torchs_muon_on_matrices_and_torchs_adamw_on_the_rest(
    adjust: str, nesterov: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.optim.muon.TOGETHER", 200)  # two of 96 numbers at a time
    torch.manual_seed(0)
    mine = nn.Sequential(*(nn.Linear(8, 12) if i % 2 else nn.Linear(12, 8) for i in range(7)))
    theirs = nn.Sequential(*(nn.Linear(8, 12) if i % 2 else nn.Linear(12, 8) for i in range(7)))
    theirs.load_state_dict(mine.state_dict())
    settings = SETTINGS | {"adjust": adjust, "nesterov": nesterov}
    grouping = Grouping(split=PLAIN)
    optimizer = Muon(**settings)(grouping.of(mine))
    of_muon = [layer.weight for layer in theirs[:-1]]
    of_adamw = [layer.bias for layer in theirs] + [theirs[-1].weight]
    others = (
        torch.optim.Muon(of_muon, lr=0.02, weight_decay=0.1, nesterov=nesterov,
                         adjust_lr_fn=adjust),
        torch.optim.AdamW(of_adamw, lr=0.02, weight_decay=0.1, betas=(0.9, 0.95)),
    )  # fmt: skip
    for _ in range(20):  # of gradients that are alike to the last bit, which bfloat16 makes much of
        for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for stepper in (optimizer, *others):
            stepper.step()
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_a_kernel_is_stepped_as_the_matrix_that_it_is_flattened_to() -> None:
    kernel, grad = torch.randn(6, 2, 3, 3), torch.randn(6, 2, 3, 3)
    found = []
    for shape in ((6, 2, 3, 3), (6, 18)):
        parameter = nn.Parameter(kernel.reshape(shape).clone())
        parameter.grad = grad.reshape(shape).clone()
        Muon(**SETTINGS)([{"params": [parameter], IS_MUONS: True}]).step()
        found.append(parameter.detach().reshape(6, 18))
    assert torch.equal(*found)
    assert not torch.equal(found[0], kernel.reshape(6, 18))


def test_what_is_orthogonalized_has_singular_values_near_one() -> None:
    for shape in ((3, 8, 12), (3, 12, 8)):
        values = torch.linalg.svdvals(
            orthogonalized(torch.randn(shape), num_steps=5, dtype=torch.float32)
        )
        assert 0.6 < values.min() < values.max() < 1.3


def test_sparse_gradients_are_refused_and_a_parameter_without_one_stays() -> None:
    net = nn.ModuleDict({"embed": nn.Embedding(4, 3, sparse=True), "hidden": nn.Linear(3, 3),
                         "head": nn.Linear(3, 2)})  # fmt: skip
    optimizer = Muon(**SETTINGS)(Grouping(split=PLAIN).of(net))
    before = net["head"].weight.clone()
    net["hidden"](torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert torch.equal(before, net["head"].weight)
    net["embed"](torch.tensor([0])).sum().backward()
    with pytest.raises(Refused, match=r"^optimizer=muon takes no sparse gradients, and "):
        optimizer.step()


def test_onecycle_cycles_adamws_beta_and_leaves_muons_momentum(
    checked: Callable[..., Any],
) -> None:
    run = build(checked(*SMALL, "optimizer=muon", "scheduler=onecycle"), [])
    run.trainer.fit(run.model, datamodule=run.data)
    for group in run.trainer.optimizers[0].param_groups:
        assert group["betas"][0] != 0.9
        assert group["momentum"] == 0.95


@pytest.mark.parametrize(("clip", "is_said"), [("norm", True), ("percentile", True),
                                               ("value", False), ("none", False)])  # fmt: skip
def test_that_clipping_by_the_norm_does_little_is_said_at_the_start(
    checked: Callable[..., Any], capsys: pytest.CaptureFixture[str], clip: str, is_said: bool
) -> None:
    from app.screen.start import StartTable

    config = checked(*SMALL, "optimizer=muon", f"clip={clip}")
    run = build(config, [StartTable(config.plain)])
    run.trainer.fit(run.model, datamodule=run.data)
    assert ("clipping by the norm does little to Muon" in capsys.readouterr().out) is is_said
