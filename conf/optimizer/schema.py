"""The optimizer of all trainable parameters, in place of the model's own `configure_optimizers`.

`optimizer=none` leaves the model its own; `optimizer=custom optimizer._target_=torch.optim.RAdam`
takes any class, or function, that makes one of parameters.

`optimizer.groups` are rules, of which the first that matches a parameter has it:
`'optimizer.groups=[{match: "*.bias", weight_decay: 0}, {match: "head.*", lr_scale: 10}]'`. A match
is a glob of the parameters' names, or of the class (LayerNorm, torch.nn.LayerNorm, *Norm; a base
class counts) of the module that holds them, or several. What matches nothing is an error; what no
rule matches keeps the optimizer's own settings. Tied weights are in one group, by any of their
names.

| optimizer/groups= | groups                                                 | source           |
|-------------------|--------------------------------------------------------|------------------|
| all               | one                                                    |                  |
| no_decay          | norms, biases, embeddings, scales decay no weights     | timm             |
| layer_decay       | likewise; a layer's rate is a share of the one's above | arXiv 2106.08254 |
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from difflib import get_close_matches
from enum import StrEnum
from typing import Any, get_type_hints

from omegaconf import MISSING

from ..rules import LARGEST_RATE, MANY, RULE, count, number, require, text

Adjust = StrEnum("Adjust", "original match_rms_adamw")
"""By what Muon multiplies the rate of a matrix: sqrt(max(1, rows / columns)), which has rates about
0.02, or 0.2 sqrt(max(rows, columns)), with which AdamW's rate and weight decay fit."""

NsDtype = StrEnum("NsDtype", "bfloat16 float32")
"""In which Muon makes matrices orthogonal; float32 where runs are to be compared to rounding."""

OFF = "to switch it off type {key}=0"


@dataclass(kw_only=True)
class Grouped:
    """What the run reads of every optimizer: how the parameters are grouped."""

    groups: list[Any] = MISSING
    """Rules, the first that matches a parameter has it; [] = one group."""
    layer_decay: float | None = number(
        above=0, at_most=1, rule="be above 0, up to 1", instead="type {key}=0.75"
    )
    """Factor of the rate from each layer to the one below, above 0 to 1; null = none."""


@dataclass(kw_only=True)
class Theirs(Grouped):
    """What the run reads of any other optimizer."""

    lr: float | None = number(above=0, at_most=LARGEST_RATE, instead="type for example {key}=0.01")
    """Learning rate, > 0; null = that of the class."""


@dataclass(kw_only=True)
class Rule:
    """One rule of `groups`; its other keys are settings of the optimizer, such as weight_decay."""

    match: Any = MISSING
    """A glob of names of parameters, or of classes of the modules that hold them, or several."""
    name: str | None = text(instead="type {key}=mine")
    """Of the group, in tables and logs; null = the glob."""
    lr_scale: float = number(above=0, at_most=MANY, instead="type lr_scale: 0.1")
    """Times optimizer.lr, > 0."""
    optional: bool = MISSING
    """Whether it may match nothing, as a rule for many models does."""


@dataclass(kw_only=True)
class SGD(Grouped):
    """Stochastic gradient descent with momentum: torch.optim.SGD."""

    _target_: str = "torch.optim.SGD"
    _partial_: bool = True
    lr: float = number(above=0, at_most=LARGEST_RATE, instead="type for example {key}=0.01")
    """Learning rate, > 0."""
    momentum: float = number(
        at_least=0, below=1, rule="be from 0 to below 1", instead="type {key}=0.9"
    )
    """0 to 1; 0 = none."""
    nesterov: bool = MISSING
    """Nesterov's variant of the momentum."""
    weight_decay: float = number(at_least=0, at_most=1_000_000, instead=OFF)
    """L2 penalty, >= 0."""
    fused: bool | None = MISSING
    """One kernel for all tensors: 2 to 3 times faster, other last bits; null = torch's choice."""

    def __post_init__(self) -> None:
        require(
            not self.nesterov or self.momentum > 0,
            f"optimizer.nesterov must be false without momentum, got {self.nesterov}; type "
            "optimizer.momentum=0.9 too",
        )


@dataclass(kw_only=True)
class Moments(Grouped):
    """What the optimizers have in common that keep a first and a second moment of the gradient."""

    lr: float = number(above=0, at_most=LARGEST_RATE, instead="type for example {key}=0.01")
    """Learning rate, > 0."""
    betas: list[float] = number(
        at_least=0,
        below=1,
        rule="be two numbers from 0 to below 1",
        instead="type '{key}=[0.9,0.999]'",
    )
    """Decay of the first and second moment, each 0 to below 1."""
    eps: float = number(above=0, at_most=1_000_000, instead="type {key}=1e-8")
    """Added to the denominator, > 0."""
    weight_decay: float = number(at_least=0, at_most=1_000_000, instead=OFF)
    """>= 0; decoupled from the gradient but in adam."""

    def __post_init__(self) -> None:
        require(
            len(self.betas) == 2,
            f"optimizer.betas must be two numbers from 0 to below 1, got {self.betas}; type "
            "'optimizer.betas=[0.9,0.999]'",
        )


@dataclass(kw_only=True)
class Adam(Moments):
    """Adam (arXiv 1412.6980) or AdamW (arXiv 1711.05101), fused into one kernel where torch can."""

    _target_: str = MISSING
    _partial_: bool = True
    fused: bool = MISSING
    """One kernel for all tensors: 4 to 7 times faster on a CPU."""


@dataclass(kw_only=True)
class AdamW8bit(Moments):
    """AdamW with moments of 8 bits (arXiv 2110.02861): 2 bytes a parameter in place of 8."""

    _target_: str = "app.optim.AdamW8bit"
    min_8bit_size: int = count(at_least=0, instead="type {key}=4096")
    """Tensors of fewer numbers keep moments of 32 bits, >= 0."""


@dataclass(kw_only=True)
class Muon(Moments):
    """Muon (kellerjordan.github.io/posts/muon, arXiv 2502.16982) for hidden matrices, else AdamW.

    Hidden matrices are the weights of Linear, Conv1d, Conv2d and Conv3d (flattened to (out, rest))
    and MultiheadAttention, and of classes derived from these, but for embeddings, what is tied to
    one, and `adamw_for`. A fused projection, as in_proj_weight is for query, key and value, is one
    matrix.
    """

    _target_: str = "app.optim.Muon"
    momentum: float = number(
        at_least=0, below=1, rule="be from 0 to below 1", instead="type {key}=0.95"
    )
    """Muon's, from 0 to below 1; scheduler=onecycle cycles the first of `betas` in its place."""
    nesterov: bool = MISSING
    """Nesterov's variant of Muon's momentum."""
    ns_steps: int = count(at_most=99, instead="type {key}=5")
    """Newton-Schulz iterations that make a matrix orthogonal, 1 to 99."""
    ns_dtype: NsDtype = MISSING
    """In which they are computed."""
    adjust: Adjust = MISSING
    """By what the rate of a matrix is multiplied."""
    adamw_for: list[str] | None = MISSING
    """Globs, as of a rule, of weights that AdamW steps; null = the head: the last trainable linear
    or convolutional layer, in the order of registration."""
    adamw_lr_scale: float = number(above=0, at_most=MANY, instead="type {key}=1.0")
    """Times `lr` for AdamW, > 0."""


PRESETS = {"sgd": SGD, "adam": Adam, "adamw": Adam, "adamw8bit": AdamW8bit, "muon": Muon}


def check_groups(optimizer: Any) -> None:
    """Raise ValueError at the first rule of `groups` that is refused.

    Args:
        optimizer: a schema, or a mapping of any class's settings.
    """
    settings = dict(optimizer) if isinstance(optimizer, Mapping) else vars(optimizer)
    rules = settings.get("groups") or []
    for index, rule in enumerate(rules):
        key = f"optimizer.groups[{index}]"
        globs = rule.get("match") if isinstance(rule, dict) else None
        globs = [globs] if isinstance(globs, str) else globs
        require(
            isinstance(globs, list) and globs != [] and all(isinstance(g, str) for g in globs),
            f"{key} must have a match, a glob or several, got {rule}; type for example "
            "'optimizer.groups=[{match: \"*.bias\", weight_decay: 0}]'",
        )
        for name, value in rule.items():
            _check_setting(key, str(name), value, optimizer)
    is_idle = all(
        rule.get("lr_scale", 1) == 1
        and all(settings.get(k) == v for k, v in rule.items() if k not in OF_RULES)
        for rule in rules
    )
    require(
        not rules or not is_idle or settings.get("layer_decay") is not None,
        "optimizer.groups have no effect: all their settings are those of the optimizer; type "
        + (
            "optimizer.weight_decay=0.05 too, or optimizer/groups=all"
            if settings.get("weight_decay") == 0
            else "another value in one of them, or optimizer/groups=all"
        ),
    )


OF_ALL_GROUPS = ("lr", "groups", "layer_decay", "min_8bit_size", "adamw_for", "adamw_lr_scale",
                 "ns_dtype", "adjust")  # fmt: skip
"""What a rule cannot set."""

OF_RULES = [field.name for field in fields(Rule)]


def _check_setting(key: str, name: str, value: Any, optimizer: Any) -> None:
    """Raise ValueError at a key of a rule that is none, or whose value its field does not allow."""
    require(
        name != "lr",
        f"{key}.lr must be a share of optimizer.lr, which is tuned and scheduled, got {value}; "
        "type lr_scale: 0.1 for a tenth of it",
    )
    known = {field.name: field for field in fields(Rule)}
    if is_dataclass(optimizer):
        own = [f for f in fields(optimizer) if f.name[0] != "_" and f.name not in OF_ALL_GROUPS]
        others = {f.name: f for f in own}
        known |= others
        near = get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}"
        require(name in known, f"{key}.{name} is not a key of a rule; {hint}")
    elif name not in known:
        return  # known when the optimizer is made
    hint = (get_type_hints(Rule) | get_type_hints(type(optimizer))).get(name)
    if hint in (bool, bool | None):
        require(isinstance(value, bool), f"{key}.{name} must be true or false, got {value}")
    if hint in (float, float | None):
        require(type(value) in (int, float), f"{key}.{name} must be a number, got {value}")
    if hint == list[float]:
        size = len(getattr(optimizer, name))
        is_whole = isinstance(value, list) and len(value) == size
        require(is_whole, f"{key}.{name} must be {size} numbers, got {value}")
    rule = known[name].metadata.get(RULE)
    refusal = rule and rule.refusal(f"{key}.{name}", value)
    require(not refusal, str(refusal).replace(f"type {key}.{name}=", f"type {name}: "))
