"""Which parameters are hidden matrices: for optimizers that step those in another way."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from app.errors import Refused
from app.optim.matches import Matches

TIMES, IS_MUONS = "times", "is_muons"
"""Entries of a group beside torch's: what its rate is of that of the optimizer, and which of two
optimizers steps it. (`lr_scale` would be applied again by the schedules of timm.)"""

HOLDERS = ("Linear", "Conv1d", "Conv2d", "Conv3d", "MultiheadAttention")
EMBEDDINGS = ("Embedding", "EmbeddingBag")
OF_ADAMW = {"momentum": False, "nesterov": False, "ns_steps": False, "betas": True, "eps": True}
"""Settings that only one of the two reads, and whether that is AdamW."""

HEADS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, kw_only=True)
class Split:
    """Hidden matrices for Muon, the other parameters for AdamW.

    Attributes:
        adamw_for: globs of parameters that are none; None = the head, which is the last trainable
            linear or convolutional layer in the order of registration. An embedding is never one.
        adamw_lr_scale: times the rate, for AdamW.
    """

    adamw_for: Sequence[str] | None
    adamw_lr_scale: float

    def matrices(self, model: nn.Module, matches: Matches) -> set[nn.Parameter]:
        """Weights of linear and convolutional layers and of attention, of two dimensions above 1
        where the kernels are flattened to (out, rest). Raises Refused where there is none."""
        others = {*matches.found(EMBEDDINGS, "", is_optional=True)}
        if self.adamw_for is None:
            layers = [part for part in model.modules() if isinstance(part, HEADS)]
            trained = [part for part in layers if any(p.requires_grad for p in part.parameters())]
            others.update(p for part in trained[-1:] for p in part.parameters())
        else:
            others.update(matches.found(self.adamw_for, "optimizer.adamw_for", is_optional=False))
        found = {p for p in matches.found(HOLDERS, "", is_optional=True) if _is_matrix(p, matches)}
        if not found - others:
            raise Refused(
                f"optimizer=muon finds no hidden matrix in {type(model).__name__}, which has "
                f"{len(found)} weights of {', '.join(HOLDERS)} with the head and embeddings; use "
                "optimizer=adamw"
            )
        return found - others

    def marked(self, group: dict[str, Any], is_adamws: bool) -> dict[str, Any]:
        """A group of one of the two, at its rate."""
        times = group[TIMES] * (self.adamw_lr_scale if is_adamws else 1)
        name = f"{group['name']}/{'adamw' if is_adamws else 'muon'}"
        return group | {"name": name, TIMES: times, IS_MUONS: not is_adamws}

    def refuse_idle(
        self, number: int, rule: Mapping[str, Any], are_adamws: Collection[bool]
    ) -> None:
        """Raise Refused where no parameter of a rule is stepped by what reads its settings."""
        for key in (key for key in rule if key in OF_ADAMW):
            if are_adamws and OF_ADAMW[key] not in are_adamws:
                one, other = ("AdamW", "Muon") if OF_ADAMW[key] else ("Muon", "AdamW")
                raise Refused(
                    f"optimizer.groups[{number}].{key} has no effect: it is {one}'s, and all that "
                    f"the rule matches is stepped by {other}; leave it out"
                )


def _is_matrix(parameter: nn.Parameter, matches: Matches) -> bool:
    if is_lazy(parameter):
        return matches.name(parameter).endswith("weight")
    rows = len(parameter) if parameter.ndim > 1 else 1
    return 1 < rows < parameter.numel() and not parameter.is_complex()
