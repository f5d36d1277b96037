"""Which presets run with which strategy: `python -m app.check --matrix`. Needs no torch."""

import copy
import re
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf

from app.cli.presets import groups
from app.config import check
from app.errors import Refused

GROUPS = ("accumulate", "clip", "averaging", "tuner", "sharing", "optimizer", "scheduler",
          "precision", "memory", "compile")  # fmt: skip
NEEDED = {
    "accumulate=schedule": ["accumulate.starts=[0,1]", "accumulate.factors=[1,3]"],
    "accumulate=effective": ["accumulate.batch_size=768"],
    "memory=checkpointing": ["memory.min_parameters=1000"],
    "scheduler=steps": ["scheduler.milestones=[1]"],
    "tuner=milestones": ["tuner.milestones=[1]"],
}
"""Keys without which a preset is not complete."""

ON_GPUS = ["trainer.accelerator=gpu"]
ON_CPU = ["trainer.accelerator=cpu"]


def strategies() -> list[str]:
    """The presets of the group, single first."""
    found = groups()["strategy"][0]
    return sorted(found, key=lambda name: name != "single")


def presets() -> list[str]:
    """`group=preset` of everything that is chosen beside a strategy."""
    known = groups()
    return [
        f"{group}={preset}"
        for group in GROUPS
        for preset in known[group][0]
        if preset not in ("none", "custom")
    ]


def composed(typed: list[str]) -> DictConfig:
    """The default run with changes, as the command line composes it."""
    with initialize_config_module("app.conf", version_base="1.3"):
        return compose("train", ["run_dir=.", "name=matrix", *typed])


def refusals(where: list[str]) -> Iterator[tuple[str, str, str | None]]:
    """Each preset with each strategy on two devices, and why it is refused; None where it is not.

    A package that is not installed is no reason.
    """
    nodes = _nodes()
    base = composed(where)
    for preset in presets():
        group = preset.partition("=")[0]
        cfg = copy.deepcopy(base)
        OmegaConf.update(cfg, group, nodes[preset], merge=False)
        for strategy in strategies():
            OmegaConf.update(cfg, "strategy", nodes[f"strategy={strategy}"], merge=False)
            OmegaConf.update(cfg, "trainer.devices", 1 if strategy == "single" else 2)
            yield preset, strategy, _refusal(cfg)


def _nodes() -> dict[str, DictConfig]:
    """What each preset puts into its slot: one of every group is composed at a time."""
    names = [*presets(), *(f"strategy={strategy}" for strategy in strategies())]
    by_group: dict[str, list[str]] = {}
    for name in names:
        by_group.setdefault(name.partition("=")[0], []).append(name)
    found: dict[str, DictConfig] = {}
    for together in zip_longest(*by_group.values()):
        chosen = [name for name in together if name is not None]
        cfg = composed([*chosen, *(key for name in chosen for key in NEEDED.get(name, []))])
        found |= {name: cfg[name.partition("=")[0]] for name in chosen}
    return found


def _refusal(cfg: Any) -> str | None:
    try:
        check(cfg)
    except Refused as error:
        return None if "is not installed" in str(error) else str(error)
    return None


def matrix() -> str:
    """The table in Markdown: yes, or the number of the reason below it."""
    columns = strategies()
    cells: dict[str, dict[str, str | None]] = {}
    for preset, strategy, reason in refusals(ON_GPUS):
        cells.setdefault(preset, {})[strategy] = reason
    reasons: dict[str, int] = {}
    same = _alike(columns, cells)
    heads = [", ".join(names) for names in same]
    lines = [f"| | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    for preset, row in cells.items():
        found = []
        for names in same:
            reason = row[names[0]]
            if reason is None:
                found.append("yes")
            else:
                why = re.sub(r" cannot run with strategy=\w+", "", reason)
                found.append(str(reasons.setdefault(why, len(reasons) + 1)))
        lines.append(f"| `{preset}` | {' | '.join(found)} |")
    lines.append("")
    lines += [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n".join(lines)


def _alike(columns: list[str], cells: dict[str, dict[str, str | None]]) -> list[list[str]]:
    """Strategies in groups that run the same presets."""
    found: dict[tuple[str | None, ...], list[str]] = {}
    for strategy in columns:
        found.setdefault(tuple(row[strategy] for row in cells.values()), []).append(strategy)
    return list(found.values())
