"""Compiling a model with torch.compile, in place."""

import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torchmetrics import Metric

from app.blocks import Forward, wrap_forward
from app.errors import Refused

NO_FORWARD = (nn.Module.forward, pl.LightningModule.forward)


def compiled(forward: Forward, settings: Mapping[str, Any]) -> Forward:
    """A forward that is compiled when first called; in another compiled one, a part of its graph.

    Not `nn.Module.compile`: that compiles nothing of a Sequential (torch 2.13), and leaves copies
    without it.
    """
    graph = torch.compile(forward, **settings)

    def run(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return (forward if torch.compiler.is_compiling() else graph)(module, *args, **kwargs)

    return run


def worth_compiling(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """What a step may call below a module, by name: its children with parameters.

    In place of a child without a forward, as a ModuleList, its children. Neither metrics nor
    single layers of torch's own, in which there is nothing to fuse.
    """
    for key, child in module.named_children():
        is_layer = type(child).__module__.startswith("torch.nn.") and not any(child.children())
        if isinstance(child, Metric) or is_layer or next(child.parameters(), None) is None:
            continue
        if type(child).forward in NO_FORWARD:
            yield from worth_compiling(child, f"{path}{key}.")
        else:
            yield f"{path}{key}", child


def refuse_without_compiler(*, on_cpu: bool) -> None:
    """Raise ValueError where torch.compile would end in a hundred lines of traceback."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if on_cpu and sys.platform != "win32" and shutil.which(compiler) is None:
        raise Refused(
            f"compile needs a C++ compiler on the CPU, and there is no {compiler} here; install "
            "one (Debian: apt-get install g++), name one in the environment variable CXX, or use "
            "compile=none"
        )


class Compile:
    """torch.compile of a model, in place: names, classes and checkpoints stay as they are.

    Compiles the model's own forward, and the parts that a step may call beside it. What a step
    does around them (the loss, logging) runs as before.

    Args:
        mode: torch's, with underscores.
        dynamic: whether sizes are variables of the graph; None makes one of a size that changes.
        fullgraph: whether an operation that breaks the graph is an error.
    """

    def __init__(self, *, mode: str, dynamic: bool | None, fullgraph: bool) -> None:
        self.mode = mode
        self.dynamic = dynamic
        self.fullgraph = fullgraph

    def apply(self, model: nn.Module, *, accelerator: str) -> None:
        """Compile in place, at the first call of each part; a second `apply` changes nothing.

        Raises Refused where there is nothing to compile, or nothing to compile it with.
        """
        on_cpu = accelerator == "cpu" or (
            accelerator == "auto" and not torch.accelerator.is_available()
        )
        if on_cpu and self.mode == "reduce_overhead":
            raise Refused(
                "compile=reduce_overhead needs a GPU: CUDA graphs are all that it adds to "
                "compile=default; use that one"
            )
        refuse_without_compiler(on_cpu=on_cpu)
        parts = dict(worth_compiling(model))
        has_forward = type(model).forward not in NO_FORWARD
        if not parts and not has_forward:
            raise Refused(
                f"compile found nothing to compile in {type(model).__name__}: it has no forward, "
                "and no part of several layers; move the layers to its forward, or use "
                "compile=none"
            )
        # torch counts the graphs of all parts together, and at 8 goes on without compiling
        config = torch._dynamo.config
        config.cache_size_limit = max(config.cache_size_limit, 8 * (len(parts) + 1))
        settings = {
            "mode": self.mode.replace("_", "-"),
            "dynamic": self.dynamic,
            "fullgraph": self.fullgraph,
        }
        for part in [model, *parts.values()] if has_forward else parts.values():
            wrap_forward(part, "compile", partial(compiled, settings=settings))
