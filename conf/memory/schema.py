"""Less memory for more time: which activations to forget in the forward pass.

`memory=checkpointing` keeps only what enters each block and runs the block once more in the
backward pass (arXiv 1604.06174): the memory of one block instead of all, for the time of one more
forward pass. Gradients are the same to the bit, with dropout and BatchNorm too. Use it where a
model or its batch does not fit.
"""

from dataclasses import dataclass

from omegaconf import MISSING

from ..rules import count, require


@dataclass(kw_only=True)
class Checkpointing:
    """Which modules are blocks: by the names of their classes, or by size."""

    _target_: str = "app.memory.Checkpointing"
    classes: list[str] = MISSING
    """Names of the blocks' classes, as TransformerEncoderLayer; [] = by size."""
    min_parameters: int | None = count(instead="type {key}=100000")
    """By size: the modules with this many parameters beside those of blocks in them, >= 1."""

    def __post_init__(self) -> None:
        require(
            bool(self.classes) or self.min_parameters is not None,
            "memory.classes must name the blocks where memory.min_parameters is null, got "
            f"{self.classes}; type 'memory.classes=[TransformerEncoderLayer]' or "
            "memory.min_parameters=100000",
        )
        require(
            not self.classes or self.min_parameters is None,
            "memory.min_parameters must be null where memory.classes names the blocks, got "
            f"{self.min_parameters}; type memory.min_parameters=null",
        )


PRESETS = {"checkpointing": Checkpointing}
