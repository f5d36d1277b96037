"""Activation checkpointing: less memory for more time, with the same gradients to the bit."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

from app.blocks import Forward, find_blocks, outermost, wrap_forward
from app.errors import Refused


def recomputed(forward: Forward) -> Forward:
    """A forward that forgets its activations; the backward pass computes them again.

    Acts where gradients are recorded. Raises Refused where the block changes a buffer, which
    would change twice; running statistics are right, for the second run leaves them alone.
    """

    def first(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        draws: list[Any] = []  # the random states of the first run

        def run(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():  # the second run of a graph has no side effect
                return forward(block, *args, **kwargs)
            if draws:
                with _second_run(block, *draws):
                    return forward(block, *args, **kwargs)
            draws.extend((random.getstate(), np.random.get_state()))
            before = _versions(block)
            out = forward(block, *args, **kwargs)
            _refuse_changed_buffers(block, before)
            return out

        if not torch.is_grad_enabled():
            return forward(block, *args, **kwargs)
        return checkpoint(run, *args, use_reentrant=False, **kwargs)

    return first


@contextmanager
def _second_run(block: nn.Module, draws: Any, numpy_draws: Any) -> Iterator[None]:
    """Draw as the first run did, where torch does not see to it; keep norms' statistics."""
    norms = [part for part in block.modules() if isinstance(part, _NormBase)]
    statistics = [norm._buffers for norm in norms]
    now = random.getstate(), np.random.get_state()
    random.setstate(draws)
    np.random.set_state(numpy_draws)
    for norm in norms:
        norm._buffers = {
            key: None if value is None else value.clone() for key, value in norm._buffers.items()
        }
    try:
        yield
    finally:
        random.setstate(now[0])
        np.random.set_state(now[1])
        for norm, buffers in zip(norms, statistics, strict=True):
            norm._buffers = buffers


def _versions(block: nn.Module) -> dict[str, tuple[int, int]]:
    """What tells whether a buffer was assigned to or changed in place; not those of norms."""
    return {
        f"{path}.{key}".lstrip("."): (id(buffer), buffer._version)
        for path, part in block.named_modules()
        if part._buffers and not isinstance(part, _NormBase)
        for key, buffer in part._buffers.items()
        if buffer is not None and not buffer.is_inference()
    }


def _refuse_changed_buffers(block: nn.Module, before: dict[str, tuple[int, int]]) -> None:
    for name, version in _versions(block).items():
        if version != before.get(name):
            raise Refused(
                f"memory cannot checkpoint {type(block).__name__}: each run of it changes its "
                f"buffer {name}, and checkpointing runs it twice; type other memory.classes, or "
                "use memory=none"
            )


class Checkpointing:
    """Forget the activations inside blocks; the backward pass runs each block once more.

    Source: arXiv 1604.06174, torch's non-reentrant checkpoint.

    Args:
        classes: names of the blocks' classes.
        min_parameters: where no class is named, the size of a block.
    """

    def __init__(self, *, classes: Sequence[str], min_parameters: int | None) -> None:
        self.classes = list(classes)
        self.min_parameters = min_parameters

    def apply(self, model: nn.Module) -> None:
        """Checkpoint the outermost blocks, in place; a second call changes nothing.

        Raises Refused where the model has no such blocks.
        """
        found = find_blocks(
            model, classes=self.classes, min_parameters=self.min_parameters, prefix="memory."
        )
        for block in outermost(found).values():
            wrap_forward(block, "memory", recomputed)
