"""Faster kernels for any model: torch.compile, in place.

The forward of the model, and the parts that a training step calls beside it, become compiled code
when they are first called, which takes seconds to minutes and a C++ compiler; names, classes and
checkpoints stay as they are. What is around them in a step runs as before. Use it on a GPU, or for
models of many small operations; the models here are no faster on a CPU.

| preset          | what it does                                                           |
|-----------------|------------------------------------------------------------------------|
| default         | fuses operations                                                       |
| reduce_overhead | and records CUDA graphs: for small models and batches; GPU only         |
| max_autotune    | and times variants of matrix products at the first call; CUDA graphs too |
"""

from dataclasses import dataclass
from enum import StrEnum

from omegaconf import MISSING

Mode = StrEnum("Mode", "default reduce_overhead max_autotune max_autotune_no_cudagraphs")
"""Those of torch.compile."""


@dataclass(kw_only=True)
class Compile:
    """How hard to try, and which graphs to accept."""

    _target_: str = "app.compile.Compile"
    mode: Mode = MISSING
    """default, reduce_overhead, max_autotune or max_autotune_no_cudagraphs."""
    dynamic: bool | None = MISSING
    """Sizes as variables of the graph; null = only one that changes, false = a graph for each."""
    fullgraph: bool = MISSING
    """Make an operation that cannot be compiled an error; false runs it between two graphs."""


PRESETS = dict.fromkeys(("default", "reduce_overhead", "max_autotune"), Compile)
