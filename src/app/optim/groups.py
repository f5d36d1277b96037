"""Parameter groups: parameters with a rate, or other settings of the optimizer, of their own."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from app.errors import Refused
from app.optim.layers import layers_above
from app.optim.matches import Matches
from app.optim.matrices import TIMES, Split

RULE_KEYS = ("match", "name", "lr_scale", "optional")
"""Keys of a rule that are not settings of the optimizer."""

NAMES = "names"
"""Entry of a group beside torch's: the names of its parameters."""

REST = "rest"


@dataclass(frozen=True, kw_only=True)
class Grouping:
    """How the parameters of a model are grouped.

    Attributes:
        rules: each with `match`, a glob of names of parameters or of classes of modules, or
            several; optionally `name`, `lr_scale`, `optional`, and settings of the optimizer. The
            first that matches a parameter, by any of its names, has it; what none has is a group
            of its own.
        layer_decay: factor of the rate from each layer to the one below, above 0 up to 1; or None.
        split: between two optimizers in one; or None.
    """

    rules: Sequence[Mapping[str, Any]] = ()
    layer_decay: float | None = None
    split: Split | None = None

    def __bool__(self) -> bool:
        return bool(self.rules) or self.layer_decay is not None or self.split is not None

    def of(self, model: nn.Module) -> list[dict[str, Any]]:
        """The groups of all parameters, tied and frozen ones too, each once.

        Groups at the optimizer's own rate come first: the first one's rate is what is logged.

        Raises Refused where a rule has no parameter, or the model no layers.
        """
        matches = Matches(model)
        members: dict[nn.Parameter, int] = {}
        for number, rule in enumerate(self.rules):
            globs = [rule["match"]] if isinstance(rule["match"], str) else rule["match"]
            key, is_optional = f"optimizer.groups[{number}].match", rule.get("optional", False)
            found = matches.found(globs, key, is_optional=is_optional)
            mine = [parameter for parameter in found if parameter not in members]
            if not mine and found:
                raise Refused(
                    f"optimizer.groups[{number}].match={_text(rule['match'])} matches only "
                    "parameters that the rules before it have; put it before them"
                )
            members |= dict.fromkeys(mine, number)
        layers = self._layers(model)
        matrices = self.split.matrices(model, matches) if self.split else None
        groups: dict[tuple[int, int, bool], dict[str, Any]] = {}
        for name, parameter in model.named_parameters():
            number, above = members.get(parameter, len(self.rules)), layers.get(name, 0)
            place = number, above, matrices is not None and parameter not in matrices
            if place not in groups:
                groups[place] = self._group(*place)
            groups[place]["params"].append(parameter)
            groups[place][NAMES].append(name)
        for number, rule in enumerate(self.rules):
            if self.split:
                kinds = {is_adamws for of, _, is_adamws in groups if of == number}
                self.split.refuse_idle(number, rule, kinds)
        ordered = [groups[key] for key in sorted(groups)]
        return sorted(ordered, key=lambda group: group[TIMES] != 1)

    def _layers(self, model: nn.Module) -> dict[str, int]:
        if self.layer_decay is None:
            return {}
        layers = layers_above(model)
        if len({*layers.values()}) < 2:
            raise Refused(
                f"optimizer.layer_decay finds no layers in {type(model).__name__}, which has no "
                "ModuleList or Sequential with several blocks of one class; name them, as in "
                "'optimizer.groups=[{match: \"stem.*\", lr_scale: 0.5}]'"
            )
        return layers

    def _group(self, number: int, above: int, is_adamws: bool) -> dict[str, Any]:
        rule = self.rules[number] if number < len(self.rules) else {}
        name = str(rule.get("name") or (_text(rule["match"]) if rule else REST))
        earlier = [str(r.get("name") or _text(r["match"])) for r in self.rules[:number]]
        name = f"{name}#{number}" if name in earlier else name  # LearningRateMonitor wants its own
        decay = 1.0 if self.layer_decay is None else self.layer_decay**above
        name = name if self.layer_decay is None else f"{name}/{above}"
        group = {
            "params": [],
            "name": name,
            NAMES: [],
            TIMES: float(rule.get("lr_scale", 1.0)) * decay,
            **{key: value for key, value in rule.items() if key not in RULE_KEYS},
        }
        return self.split.marked(group, is_adamws) if self.split else group

    def settle(self, optimizer: Optimizer, groups: Iterable[Mapping[str, Any]]) -> None:
        """Scale the rates of an optimizer made of these groups, once.

        Raises Refused where it has not taken them, or not all settings of a rule.
        """
        kind = type(optimizer).__name__
        kept = [group.get(NAMES) for group in optimizer.param_groups]
        if kept != [group[NAMES] for group in groups]:
            raise Refused(
                f"optimizer.groups cannot act: {kind} does not keep the groups that it is given; "
                "type optimizer/groups=all"
            )
        for number, rule in enumerate(self.rules):
            for key in (key for key in rule if key not in (*RULE_KEYS, *optimizer.defaults)):
                raise Refused(
                    f"optimizer.groups[{number}].{key} is not a setting of {kind}, which has "
                    f"{', '.join(optimizer.defaults)}; leave it out"
                )
        for group in optimizer.param_groups:
            if group[TIMES] != 1:
                if group.get("lr") is None:
                    raise Refused(
                        f"optimizer.groups cannot scale the rate of {kind}, which has none; type "
                        "optimizer.lr=0.001, or leave lr_scale and layer_decay out"
                    )
                group["lr"] = group["lr"] * group[TIMES]
        optimizer.register_load_state_dict_pre_hook(_refuse_regrouped)

    def refuse_levelled(self, optimizer: Optimizer, schedule: Any) -> None:
        """Raise Refused where a schedule has given groups of other scales one rate."""
        scales = {group[TIMES] for group in optimizer.param_groups}
        rates = {float(group["lr"]) for group in optimizer.param_groups if group["lr"] is not None}
        if len(scales) > 1 and len(rates) == 1 and rates != {0.0}:
            raise Refused(
                f"scheduler: {type(schedule['scheduler']).__name__} gives all groups the rate "
                f"{rates.pop():g}, so that their scales have no effect; give it one for each, as "
                "'+scheduler.max_lr=[0.1,0.05]', or use scheduler=onecycle"
            )


def _refuse_regrouped(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Raise Refused where a checkpoint has a parameter in another group, or at another place."""
    before, now = (
        [(name, group.get("name")) for group in groups for name in group.get(NAMES, ())]
        for groups in (state["param_groups"], optimizer.param_groups)
    )
    if before and before != now:
        was, is_ = dict(before), dict(now)
        moved = [name for name in {**was, **is_} if was.get(name) != is_.get(name)]
        example = (
            f"{moved[0]} was in {was.get(moved[0], 'none')} and is in {is_.get(moved[0], 'none')}"
            if moved
            else "the same ones in another order"
        )
        raise Refused(
            f"optimizer.groups must group the parameters as in the checkpoint: {example}; mend "
            "the model or the rules, or begin anew with resume=never"
        )


def rate_of(optimizer: Optimizer) -> float | None:
    """The rate that the first group has but for its scale; None where an optimizer, as Adafactor
    may, has none."""
    group = optimizer.param_groups[0]
    return None if group.get("lr") is None else float(group["lr"]) / float(group.get(TIMES, 1.0))


def described(optimizer: Optimizer) -> list[str]:
    """A line for each group that a rule has made: its parameters, rate and weight decay."""
    lines = []
    for group in optimizer.param_groups:
        if NAMES in group:
            sizes = [0 if is_lazy(p) else p.numel() for p in group["params"]]
            tensors = f"{len(sizes)} tensor{'s' if len(sizes) > 1 else ''}"
            decay = f"  weight decay {group['weight_decay']:g}" if "weight_decay" in group else ""
            rate = "none" if group["lr"] is None else f"{float(group['lr']):.4g}"
            lines.append(f"{group['name']}: {tensors}, {sum(sizes):,} parameters  lr {rate}{decay}")
    return lines


def _text(match: Any) -> str:
    """A glob, or the first of several and how many follow."""
    if isinstance(match, str):
        return match
    return str(match[0]) + (f"+{len(match) - 1}" if match[1:] else "")
