"""A run that decays from a checkpoint of another one's stable phase: `branch_of`. Needs no torch,
but to look into that checkpoint."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from app.begin.longer import of_length
from app.config import Config, what_decides, with_overrides
from app.errors import Refused
from app.process.imports import importing
from app.record.folder import RunFolder
from app.record.kept import kept_steps

WSD = "app.optim.WarmupStableDecay"

OF_THE_BRANCH = ("branch_of", "branch_at", "scheduler.shape", "scheduler.decay", "scheduler.final",
                 "trainer.max_epochs", "trainer.max_steps", "trainer.max_minutes", "callbacks.",
                 "logger", "test")  # fmt: skip
"""How the keys begin in which a branch may differ from its run: none decides a step before it."""


def branched(cfg: DictConfig) -> DictConfig:
    """A branch's configuration, as long as its decay asks; that of another run as it is.

    Raises Refused where its schedule has no stable phase.
    """
    step = cfg.branch_at
    if cfg.branch_of is None or not isinstance(step, int):
        return cfg  # which is refused where one of the keys is missing
    if cfg.scheduler is None or cfg.scheduler.get("_target_") != WSD:
        raise Refused(
            f"branch_of needs a run with scheduler=wsd, and that of {cfg.branch_of} has another; "
            "type branch_of=runs/NAME of one that has it"
        )
    decay = cfg.scheduler.decay
    if isinstance(decay, float):
        decay = round(step / (1 - decay)) - step if 0 < decay < 1 else 0
    if decay < 1:
        return cfg  # which is refused, or by the schedule
    lengths = {"trainer.max_steps": step + decay, "trainer.max_epochs": None}
    return with_overrides(cfg, {"scheduler.decay": decay, **lengths})


def source_of_branch(config: Config) -> Path:
    """The checkpoint that a branch begins from.

    Raises Refused where there is none, or the branch would not be the run that had been given its
    length.
    """
    path, step = config.branch_of, config.branch_at
    assert path is not None
    assert step is not None
    folder = RunFolder(Path(path))
    before = folder.read_config()
    if before is None:
        raise Refused(
            f"branch_of must be the folder of a run, got {path}: there is none; type "
            "branch_of=runs/NAME"
        )
    if before.get("branch_of") is not None:
        raise Refused(
            f"branch_of must be a run with a stable phase, got {path}, a branch, which decays from "
            f"its first step; type branch_of={before['branch_of']}"
        )
    _refuse_changes(before, config.plain, path)
    laid = [what for what in of_length(before) if what != "the schedule"]
    if laid:
        raise Refused(
            f"branch_of: {' and '.join(laid)} of {path} is laid out over its whole length, which a "
            "branch has not; train a run to branch from with averaging.half_life_steps=N, or "
            "averaging.start_step=N"
        )
    kept = kept_steps(folder.checkpoints)
    if step not in kept:
        there = "there is none; train it with callbacks.checkpoint.keep_every_n_steps=N"
        if kept:
            near = min(kept, key=lambda one: abs(one - step))
            there = f"there are those after {', '.join(map(str, kept))}; type branch_at={near}"
        raise Refused(
            f"branch_at must be an optimizer step after which {path} keeps a checkpoint, got "
            f"{step}: {there}"
        )
    return kept[step]


def _refuse_changes(before: Mapping[str, Any], config: Mapping[str, Any], path: str) -> None:
    """Raise Refused where the steps before the branch would have been others."""
    is_looked_at = config["run_dir"] == "."  # of no run, by app.check: a part of every path
    old = what_decides(before)
    new = what_decides({**config, "run_dir": "\0"} if is_looked_at else config)
    if is_looked_at and new["trainer.devices"] == "auto":
        new["trainer.devices"] = old["trainer.devices"]
    changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    for key in (key for key in changed if not key.startswith(OF_THE_BRANCH)):
        raise Refused(
            f"{key.removesuffix('._target_')} must be {old.get(key)}, as in {path}, of which this "
            f"run is a branch, got {new.get(key)}; leave it out"
        )


def refuse_unstable(path: Path, config: Config) -> None:
    """Raise Refused where the rate of a checkpoint is not the peak, or its fit was to end."""
    with importing():
        import torch

        from app.process.intact import refuse_damaged
    refuse_damaged(path)
    content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    where = f"branch_at={config.branch_at} is not in the stable phase of {config.branch_of}"
    instead = f"type another one of {', '.join(map(str, kept_steps(path.parent)))}"
    for state in content["lr_schedulers"]:
        for rate, peak in zip(state["_last_lr"], state["base_lrs"], strict=True):
            if not math.isclose(rate, peak, rel_tol=1e-9):
                raise Refused(f"{where}: its rate is {rate:.3g} there, not {peak:.3g}; {instead}")
    if content.get("has_ended"):
        raise Refused(f"{where}: it was to end there; {instead}")


def rows(config: Config) -> list[tuple[str, str]]:
    """What is said of a branch when it starts."""
    if config.branch_of is None:
        return []
    steps = config.plain["scheduler"]["decay"]
    return [("branch", f"of {config.branch_of} after step {config.branch_at}: {steps} of decay")]
