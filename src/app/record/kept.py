"""The checkpoints that a run keeps at every n-th optimizer step, to branch from. Needs no torch."""

import re
from pathlib import Path


def kept_name(step: int) -> str:
    """Of the file that holds the state after an optimizer step."""
    return f"step={step}.ckpt"


def kept_steps(directory: Path) -> dict[int, Path]:
    """What is kept in a folder of checkpoints, by optimizer steps, which rise."""
    found = {
        int(name[1]): path
        for path in directory.glob("step=*.ckpt")
        if (name := re.fullmatch(r"step=(\d+)\.ckpt", path.name))
    }
    return dict(sorted(found.items()))


def is_due(step: int, *, saved: int, every: int | None) -> bool:
    """Whether a multiple of `every` lies after the step that was saved last, up to this one."""
    return every is not None and step // every > saved // every
