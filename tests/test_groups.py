"""Parameter groups: who is in which, and what each trains with, whatever else is chosen."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from conftest import SMALL, presets_of
from test_sharded import on_ranks
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from app import conf
from app.errors import Refused
from app.matrix import NEEDED
from app.optim import Grouping
from app.optim.layers import layers_above
from app.run.build import build

FOLDER = Path(conf.__file__).parent / "optimizer" / "groups"
NO_DECAY = yaml.safe_load((FOLDER / "no_decay.yaml").read_text())["groups"]


class RmsNorm(nn.Module):
    """As language models have it: of no class of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


class PreNorm(nn.Module):
    """A block whose class is named as a norm, and is none."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = RmsNorm()
        self.fn = nn.Linear(4, 4)


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(4))


class Decoder(nn.Module):
    """Tied, frozen, lazy and parametrized weights, attention, and norms of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.position = nn.Parameter(torch.zeros(1, 3, 4))
        self.blocks = nn.ModuleList(nn.Sequential(PreNorm(), Scale()) for _ in range(2))
        self.attention = nn.MultiheadAttention(4, 2)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.normed = weight_norm(nn.Linear(4, 4))
        self.lazy = nn.LazyLinear(3)
        self.lazy_norm = nn.LazyBatchNorm1d()
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight


def members(groups: list[dict[str, Any]]) -> dict[str, list[str]]:
    return {group["name"]: group["names"] for group in groups}


def test_norms_biases_embeddings_and_scales_decay_no_weights_by_the_class_that_holds_them() -> None:
    model = Decoder()
    groups = members(Grouping(rules=NO_DECAY).of(model))
    assert groups["rest"] == [
        "position", "blocks.0.0.fn.weight", "blocks.1.0.fn.weight", "attention.in_proj_weight",
        "attention.out_proj.weight", "frozen.weight", "normed.parametrizations.weight.original0",
        "normed.parametrizations.weight.original1", "lazy.weight",
    ]  # fmt: skip
    assert sorted(groups["rest"] + groups["no_decay"]) == sorted(
        name for name, _ in model.named_parameters()
    )


@pytest.mark.parametrize(
    ("match", "names"),
    [
        ("embed.weight", ["embed.weight"]),
        ("head.weight", ["embed.weight"]),  # by its other name: it is tied
        ("Embedding", ["embed.weight"]),
        ("torch.nn.Embedding", ["embed.weight"]),
        ("torch.nn.modules.sparse.Embedding", ["embed.weight"]),
        ("test_groups.Scale", ["blocks.0.1.gamma", "blocks.1.1.gamma"]),
        ("Scale", ["blocks.0.1.gamma", "blocks.1.1.gamma"]),
        ("_BatchNorm", ["lazy_norm.weight", "lazy_norm.bias"]),
        ("blocks.1.*", ["blocks.1.0.norm.weight", "blocks.1.0.fn.weight", "blocks.1.0.fn.bias",
                        "blocks.1.1.gamma"]),
        (["Embedding", "lazy.bias"], ["embed.weight", "lazy.bias"]),
        ("*parametrizations*", ["normed.parametrizations.weight.original0",
                                "normed.parametrizations.weight.original1"]),
    ],
)  # fmt: skip
def test_a_rule_matches_names_of_parameters_and_classes_of_modules(
    match: Any, names: list[str]
) -> None:
    (rule,) = [{"match": match, "name": "mine"}]
    assert members(Grouping(rules=[rule]).of(Decoder()))["mine"] == names


def test_the_first_rule_that_matches_has_a_parameter() -> None:
    rules = [{"match": "blocks.0.*"}, {"match": "blocks.*", "lr_scale": 0.5}, {"match": "*bias"}]
    groups = Grouping(rules=rules).of(Decoder())
    taken = [name for group in groups for name in group["names"]]
    assert len(taken) == len(set(taken)) == len(list(Decoder().parameters()))
    by_name = members(groups)
    assert all(name.startswith("blocks.0.") for name in by_name["blocks.0.*"])
    assert all(name.startswith("blocks.1.") for name in by_name["blocks.*"])
    assert not any(name.startswith("blocks") for name in by_name["*bias"])
    assert groups[-1]["name"] == "blocks.*"  # those at the optimizer's own rate come first


@pytest.mark.parametrize(
    ("rules", "text"),
    [
        (
            [{"match": "*.bais"}],
            "optimizer.groups[0].match=*.bais matches no parameter of Linear, by its name, or by "
            "the class of the module that holds it; it has weight, bias, in modules Linear",
        ),
        (
            [{"match": ["bias", "LayerNorm"]}],
            "optimizer.groups[0].match=LayerNorm matches no parameter of Linear, by its name, or "
            "by the class of the module that holds it; it has weight, bias, in modules Linear",
        ),
        (
            [{"match": "*"}, {"match": "bias"}],
            "optimizer.groups[1].match=bias matches only parameters that the rules before it "
            "have; put it before them",
        ),
    ],
)
def test_a_rule_without_a_parameter_is_refused(rules: Any, text: str) -> None:
    with pytest.raises(Refused) as refusal:
        Grouping(rules=rules).of(nn.Linear(2, 2))
    assert str(refusal.value) == text


# ------------------------------------------------------------------------------------------ layers


def block() -> nn.Module:
    return nn.TransformerEncoderLayer(4, 1, 4)


class Vit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(4))
        self.embed = nn.Linear(4, 4)
        self.encoder = nn.Sequential()
        self.encoder.add_module("layers", nn.ModuleList([block(), block()]))
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Linear(4, 4)
        self.shortcut = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))  # no stack


class Stages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.layer1 = nn.Sequential(Residual(), Residual())
        self.between = nn.Linear(4, 4)
        self.layer2 = nn.Sequential(Residual(), Residual())
        self.fc = nn.Linear(4, 2)


class Nested(nn.Module):
    """As torchvision's Swin has it: stacks in a stack."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)),
            nn.Sequential(block(), block()),
            nn.Linear(4, 4),
            nn.Sequential(block(), block()),
        )


LAYERS: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "vit": (Vit, {"token": 3, "embed.": 3, "encoder.layers.0.": 2, "encoder.layers.1.": 1,
                  "norm.": 0, "head.": 0}),
    "stages": (Stages, {"stem.": 5, "layer1.0.": 4, "layer1.1.": 3, "between.": 2, "layer2.0.": 2,
                        "layer2.1.": 1, "fc.": 0}),
    "nested": (Nested, {"features.0.": 5, "features.1.0.": 4, "features.1.1.": 3, "features.2.": 2,
                        "features.3.0.": 1, "features.3.1.": 0}),
    "mlp": (lambda: nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.ReLU(), nn.Linear(2, 2)),
            {"0.": 1, "1.": 0, "3.": 0}),
    "wrapped": (lambda: nn.ModuleDict({"net": nn.Sequential(Vit(), nn.Linear(2, 2))}),
                {"net.0.token": 3, "net.0.embed.": 3, "net.0.encoder.layers.0.": 2,
                 "net.0.encoder.layers.1.": 1, "net.0.norm.": 0, "net.0.head.": 0, "net.1.": 0}),
}  # fmt: skip
"""Models as people write them, and over how many layers each part of theirs is counted."""


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_the_blocks_of_the_stacks_counted_from_the_output(name: str) -> None:
    make, expected = LAYERS[name]
    for parameter, layer in layers_above(make()).items():
        (prefix,) = [begins for begins in expected if parameter.startswith(begins)]
        assert layer == expected[prefix], parameter


def test_a_model_of_timm_says_itself_what_its_layers_are(monkeypatch: pytest.MonkeyPatch) -> None:
    class Net(Vit):
        def group_matcher(self, coarse: bool) -> dict[str, str]:
            assert not coarse
            return {"stem": "embed"}

    def group_parameters(net: Any, matcher: Any, reverse: bool) -> dict[str, int]:
        assert (matcher, reverse) == ({"stem": "embed"}, True)
        return {name: 0 if "embed" in name else 7 for name, _ in net.named_parameters()}

    timm = SimpleNamespace(group_parameters=group_parameters)
    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "timm.models", timm)
    model = nn.ModuleDict({"net": Net(), "head": nn.Linear(2, 2)})
    assert {n: k for n, k in layers_above(model).items() if k} == {
        "net.embed.weight": 1,
        "net.embed.bias": 1,
    }


def test_layer_decay_multiplies_the_scales_of_the_rules() -> None:
    rules = [{"match": "head.*", "lr_scale": 10.0}, *NO_DECAY]
    groups = Grouping(rules=rules, layer_decay=0.5).of(Vit())
    times = {name: group["times"] for group in groups for name in group["names"]}
    assert (times["head.weight"], times["norm.weight"]) == (10.0, 1.0)
    assert times["encoder.layers.1.linear1.weight"] == 0.5
    assert times["embed.weight"] == times["embed.bias"] == 0.125
    assert len({group["name"] for group in groups}) == len(groups)


def test_layer_decay_without_layers_is_refused() -> None:
    with pytest.raises(Refused, match=r"^optimizer.layer_decay finds no layers in Residual, which"):
        Grouping(layer_decay=0.5).of(Residual())


# ----------------------------------------------------------------------------------------- in a fit

GROUPED = (*SMALL, "optimizer=adamw", "optimizer.weight_decay=0.1", "optimizer/groups=layer_decay")


class Ratios(pl.Callback):
    """What each group's rate is of the first one's, but for its scale, at every step."""

    def __init__(self) -> None:
        self.worst = 0.0
        self.rates: set[float] = set()

    def on_before_optimizer_step(self, trainer: Any, model: Any, optimizer: Any) -> None:
        rates = [group["lr"] / group["times"] for group in optimizer.param_groups]
        self.worst = max(self.worst, *(abs(rate / rates[0] - 1) for rate in rates))
        self.rates.add(rates[0])


SCHEDULED = {
    **{name: (f"scheduler={name}", *NEEDED.get(f"scheduler={name}", ()))
       for name in presets_of("scheduler")},
    "swa": ("averaging=swa", "averaging.start=1", "averaging.lr=0.0005"),
    "swa, half": ("averaging=swa", "averaging.start=1"),
    "sequential": ("scheduler=custom", "scheduler.interval=step", "+scheduler.milestones=[3]",
                   "scheduler._target_=torch.optim.lr_scheduler.SequentialLR",
                   "+scheduler.schedulers=[{_target_: torch.optim.lr_scheduler.LinearLR, _partial_:"
                   " true}, {_target_: torch.optim.lr_scheduler.CosineAnnealingLR, _partial_: true,"
                   " T_max: total_steps}]"),
    "milestones": ("tuner=milestones", "tuner.milestones=[1]", "tuner.lr.num_steps=10",
                   "tuner.lr.on_doubt=use"),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULED)
def test_whatever_moves_the_rate_keeps_the_ratios_of_the_groups(
    checked: Callable[..., Any], name: str
) -> None:
    from app.tuner.milestones import finders_of

    ratios = Ratios()
    config = checked(*GROUPED, "trainer.max_epochs=3", *SCHEDULED[name])
    run = build(config, [ratios], finders=finders_of(config))
    run.trainer.fit(run.model, datamodule=run.data)
    assert ratios.worst < 1e-6
    assert len(ratios.rates) > 1 or name == "plateau"


def test_a_grouped_run_is_the_one_of_groups_made_by_hand(checked: Callable[..., Any]) -> None:
    def by_hand(model: Any) -> Any:
        decayed = [p for n, p in model.named_parameters() if not n.endswith("bias")]
        others = [p for n, p in model.named_parameters() if n.endswith("bias")]
        return torch.optim.SGD(
            [{"params": decayed}, {"params": others, "weight_decay": 0, "lr": 0.1}],
            lr=0.2, momentum=0.9, weight_decay=0.1,
        )  # fmt: skip

    typed = ("optimizer.weight_decay=0.1",
             'optimizer.groups=[{match: "*.bias", weight_decay: 0, lr_scale: 0.5}]')  # fmt: skip
    ours = build(checked(*SMALL, *typed), [])
    ours.trainer.fit(ours.model, datamodule=ours.data)
    theirs = build(checked(*SMALL, "optimizer=none"), [])
    theirs.model.configure_optimizers = lambda: by_hand(theirs.model)  # type: ignore[method-assign]
    theirs.trainer.fit(theirs.model, datamodule=theirs.data)
    for one, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_table_at_the_start_says_each_group_and_the_log_the_optimizers_rate(
    checked: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from app.screen.start import StartTable

    typed = ('optimizer.groups=[{match: Linear, lr_scale: 0.5}, {match: "Conv1d", lr_scale: 0.1, '
             'weight_decay: 0.3}]', "trainer.log_every_n_steps=1")  # fmt: skip
    config = checked(*SMALL, *typed)
    run = build(config, [StartTable(config.plain)])
    run.trainer.fit(run.model, datamodule=run.data)
    said = capsys.readouterr().out
    assert "groups=Linear,Conv1d" in said
    assert "group       Linear: 2 tensors, 210 parameters  lr 0.1  weight decay 0\n" in said
    assert "group       Conv1d: 6 tensors, 128 parameters  lr 0.02  weight decay 0.3\n" in said
    lines = (tmp_path / "run/metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("lr")
    assert {float(line.split(",")[column]) for line in lines[1:] if line.split(",")[column]} == {
        0.2
    }


def test_a_checkpoint_of_other_groups_is_refused() -> None:
    def optimizer(first: type[nn.Module]) -> torch.optim.Optimizer:
        model = nn.Sequential(first(4, 4), nn.LayerNorm(4, bias=False))  # type: ignore[call-arg]
        grouping = Grouping(rules=[{"match": "Linear", "weight_decay": 0.1}])
        groups = grouping.of(model)
        made = torch.optim.Adam(groups)
        grouping.settle(made, groups)
        return made

    class Bare(nn.Module):
        def __init__(self, *sizes: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(sizes))
            self.sub = nn.Linear(4, 4)
            self.bias = self.sub.bias

    state = optimizer(nn.Linear).state_dict()
    optimizer(nn.Linear).load_state_dict(state)
    with pytest.raises(Refused) as refusal:
        optimizer(Bare).load_state_dict(state)
    assert str(refusal.value) == (
        "optimizer.groups must group the parameters as in the checkpoint: 0.weight was in Linear "
        "and is in rest; mend the model or the rules, or begin anew with resume=never"
    )


class LazyNet(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.LazyLinear(10))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0].flatten(1)), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))


def test_layers_that_the_first_batch_shapes_are_grouped_before_it(
    checked: Callable[..., Any],
) -> None:
    typed = ("model=custom", "model._target_=test_groups.LazyNet", *GROUPED[1:],
             "optimizer.fused=false")  # fmt: skip
    run = build(checked(*typed), [])
    run.trainer.fit(run.model, datamodule=run.data)
    by_name = members(run.trainer.optimizers[0].param_groups)
    assert by_name["rest/0"] == ["net.2.weight"]
    assert by_name["no_decay/1"] == ["net.1.weight", "net.1.bias"]


def fitted_with(configs: dict[str, Any]) -> dict[str, Any]:
    """The weights of each run, and its groups with the sizes of what they hold."""
    torch.set_num_threads(1)
    found = {}
    for name, config in configs.items():
        run = build(config, [])
        run.trainer.fit(run.model, datamodule=run.data)
        weights = [
            p.full_tensor() if hasattr(p, "full_tensor") else p for p in run.model.parameters()
        ]
        groups = [
            (g["name"], g["names"], g["lr"], g["weight_decay"], [p.numel() for p in g["params"]])
            for g in run.trainer.optimizers[0].param_groups
        ]
        found[name] = ([weight.detach().clone() for weight in weights], groups)
    return found


@pytest.mark.slow
def test_groups_of_shards_are_those_of_one_process(
    checked: Callable[..., Any],
) -> None:
    small = ("model=transformer", "model.dropout=0", *GROUPED[1:], "scheduler=onecycle",
             "optimizer.fused=false", "precision=fp64")  # fmt: skip
    whole = fitted_with({"one": checked(*small)})["one"]
    shared = (*small, "data.batch_size=8", "trainer.limit_train_batches=6", "trainer.devices=2")
    many = {
        "fsdp": checked(*shared, "strategy=fsdp", "strategy.shard_min_parameters=500"),
        "tp_fsdp": checked(*shared, "strategy=tp_fsdp", "data.batch_size=16"),
    }
    for name, (weights, groups) in on_ranks(fitted_with, 2, many).items():
        assert groups == whole[1], name
        torch.testing.assert_close(weights, whole[0], rtol=1e-5, atol=1e-7, msg=name)


# ------------------------------------------------------------------------------------ what is typed

TYPED = {
    ('optimizer.groups=[{match: "*", lr: 3}]',): "optimizer.groups[0].lr must be a share of "
    "optimizer.lr, which is tuned and scheduled, got 3; type lr_scale: 0.1 for a tenth of it",
    ('optimizer.groups=[{match: "*", momentm: 0}]',): "optimizer.groups[0].momentm is not a key "
    "of a rule; did you mean momentum?",
    ('optimizer.groups=[{match: "*", momentum: 3}]',): "optimizer.groups[0].momentum must be from "
    "0 to below 1, got 3; type momentum: 0.9",
    ('optimizer.groups=[{match: "*", momentum: x}]',): "optimizer.groups[0].momentum must be a "
    "number, got x",
    ('optimizer.groups=[{match: "*", nesterov: 1}]',): "optimizer.groups[0].nesterov must be true "
    "or false, got 1",
    ("optimizer.groups=[{match: a}, {mach: b}]",): "optimizer.groups[1] must have a match, a glob "
    "or several, got {'mach': 'b'}; type for example 'optimizer.groups=[{match: \"*.bias\", "
    "weight_decay: 0}]'",
    ('optimizer.groups=[{match: "*", lr_scale: 0}]',): "optimizer.groups[0].lr_scale must be > 0, "
    "got 0; type lr_scale: 0.1",
    ("optimizer/groups=no_decay",): "optimizer.groups have no effect: all their settings are those "
    "of the optimizer; type optimizer.weight_decay=0.05 too, or optimizer/groups=all",
    ("optimizer=none", "optimizer/groups=no_decay"): "optimizer.groups has no effect: optimizer is "
    "off; choose optimizer=adam|adamw|adamw8bit|custom|muon|sgd as well",
    ("optimizer=adamw", 'optimizer.groups=[{match: "*", betas: [0.5]}]'): "optimizer.groups[0]."
    "betas must be 2 numbers, got [0.5]",
    ("optimizer.layer_decay=2",): "optimizer.layer_decay must be above 0, up to 1, got 2.0; type "
    "optimizer.layer_decay=0.75",
}  # fmt: skip


@pytest.mark.parametrize("typed", TYPED, ids=lambda typed: typed[-1])
def test_a_rule_that_is_none_is_refused_before_torch_is_imported(
    checked: Callable[..., Any], typed: tuple[str, ...]
) -> None:
    with pytest.raises(Refused) as refusal:
        checked(*typed)
    assert str(refusal.value) == TYPED[typed]


@pytest.mark.parametrize("preset", sorted(path.stem for path in FOLDER.glob("*.yaml")))
def test_every_preset_trains(checked: Callable[..., Any], preset: str) -> None:
    run = build(checked(*SMALL, "optimizer=adamw", f"optimizer/groups={preset}"), [])
    run.trainer.fit(run.model, datamodule=run.data)
    groups = run.trainer.optimizers[0].param_groups
    assert len(groups) == {"all": 1, "no_decay": 2, "layer_decay": 8}[preset]
    assert all(p.isfinite().all() for group in groups for p in group["params"])
