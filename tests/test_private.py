"""Every use of a name that is private to another package is known, and the name is there.

The uses are found in the source. A new one fails here until it stands in `HANGS_ON` with what hangs
on it; one that is gone fails until its entry is too.
"""

import ast
import re
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader

ROOT = Path(__file__).parents[1]
OURS = ("app", "conf", *(f"hydra_plugins.{p.stem}" for p in ROOT.glob("src/hydra_plugins/*.py")))
DOCUMENTED = ("_exit", "_asdict", "_replace", "_fields", "_make")
"""With an underscore, and public all the same."""
ASKING = ("getattr", "setattr", "hasattr", "delattr", "attrgetter", "methodcaller")


def _in(module: str, *names: str) -> bool:
    """Whether a module, or a class in it, has these names, one in the other."""
    found: Any = import_module(module)
    for name in names:
        if not hasattr(found, name):
            return False
        found = getattr(found, name)
    return True


def _of(make: Callable[[], object], name: str) -> bool:
    """Whether an instance has it."""
    return hasattr(make(), name)


QUIET: Any = {"logger": False, "barebones": True}

HANGS_ON: dict[str, tuple[str, str, Callable[[], bool]]] = {
    "._batches_that_stepped": (
        "resume/unfinished.py record/metrics.py",
        "that a line of the step metrics, and one that waits in a checkpoint, has Lightning's step",
        lambda: _of(lambda: pl.Trainer(**QUIET).fit_loop.epoch_loop, "_batches_that_stepped"),
    ),
    "._buffers": (
        "memory.py",
        "that a norm's statistics are kept in the second run of a checkpointed block",
        lambda: _of(lambda: torch.nn.BatchNorm1d(1), "_buffers"),
    ),
    "._computed": (
        "parallel/data_parallel.py resume/unfinished.py",
        "that a mean over a continued epoch is taken anew when its first part joins it",
        lambda: _of(torchmetrics.MeanMetric, "_computed"),
    ),
    "._device_mesh": (
        "parallel/sharded.py",
        "that a model finds the mesh of processes as `self.device_mesh` in configure_model",
        lambda: _of(pl.LightningModule, "_device_mesh"),
    ),
    "._is_view": (
        "parallel/sharded.py",
        "that what a sharded model returns may be changed in place, also where it is a view",
        lambda: _of(lambda: torch.zeros(1), "_is_view"),
    ),
    "._layer_sync": (
        "parallel/sharded.py",
        "that trainer.sync_batchnorm=true acts on a model before it is sharded",
        lambda: _of(ModelParallelStrategy, "_layer_sync"),
    ),
    "._data_fetcher": (
        "resume/exact.py",
        "that the batch which is asked for ahead is the one behind the checkpoint",
        lambda: _of(lambda: pl.Trainer(logger=False, accelerator="cpu").fit_loop, "_data_fetcher"),
    ),
    "._iterator": (
        "parallel/split.py",
        "that the second loader over the same data has workers of its own",
        lambda: DataLoader(torch.zeros(1))._iterator is None,
    ),
    "._combined_loader": (
        "averaging/validation.py",
        "that the raw weights are validated on the loaders of the fit, not on new ones",
        lambda: _of(lambda: pl.Trainer().validate_loop, "_combined_loader"),
    ),
    "._last_val_dl_reload_epoch": (
        "averaging/validation.py",
        "that the raw weights are validated on the loaders of the fit, not on new ones",
        lambda: _of(lambda: pl.Trainer().validate_loop, "_last_val_dl_reload_epoch"),
    ),
    "._max_batches": (
        "averaging/validation.py",
        "that the raw weights are validated on as many batches as the average",
        lambda: _of(lambda: pl.Trainer().validate_loop, "_max_batches"),
    ),
    "._module_mode": (
        "resume/modes.py",
        "that a checkpoint of a validation holds the modes of training",
        lambda: pl.Trainer().validate_loop._module_mode.mode == {},
    ),
    "._mode": (
        "throwaway/samples.py",
        "that of several training loaders the one which ends the epoch bounds the micro-batch",
        lambda: _of(lambda: CombinedLoader([]), "_mode"),
    ),
    "._non_persistent_buffers_set": (
        "averaging/shadow.py",
        "that buffers are averaged which a checkpoint holds, and no others",
        lambda: _of(lambda: torch.nn.Linear(1, 1), "_non_persistent_buffers_set"),
    ),
    "._results": (
        "parallel/data_parallel.py resume/unfinished.py",
        "that what is logged in an evaluation is weighted by the samples of the batch, and that a "
        "mean over a continued epoch is over all of it",
        lambda: (
            _in("lightning.pytorch", "Trainer", "_results")
            and _of(lambda: pl.Trainer(**QUIET).fit_loop.epoch_loop, "_results")
        ),
    ),
    "._schedulers": (
        "throwaway/rates.py",
        "that a rate found at a milestone reaches schedules that are in others",
        lambda: _of(
            lambda: torch.optim.lr_scheduler.ChainedScheduler(
                [
                    torch.optim.lr_scheduler.ConstantLR(
                        torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
                    )
                ]
            ),
            "_schedulers",
        ),
    ),
    "._step_supports_amp_scaling": (
        "clip.py",
        "that gradients are unscaled before they are clipped, also with a fused optimizer",
        lambda: _of(
            lambda: torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], fused=True),
            "_step_supports_amp_scaling",
        ),
    ),
    "._trainer": (
        "parallel/data_parallel.py",
        "that a model without a trainer can log",
        lambda: _of(pl.LightningModule, "_trainer"),
    ),
    "._update_count": (
        "parallel/data_parallel.py resume/unfinished.py",
        "that a metric of a continued epoch knows that it was updated",
        lambda: _of(torchmetrics.MeanMetric, "_update_count"),
    ),
    "._version": (
        "averaging/files.py memory.py resume/held.py",
        "that a model which edits what it loads, and a block which changes a buffer, are noticed",
        lambda: _of(lambda: torch.zeros(1), "_version"),
    ),
    "._wandb_init": (
        "logger/wandb.py",
        "that W&B does not warn of a setting that nobody has typed",
        lambda: find_spec("wandb") is None or _of(pl.loggers.WandbLogger, "_wandb_init"),
    ),
    "lightning.fabric.utilities.init._materialize_distributed_module": (
        "parallel/sharded.py",
        "that a model made on the meta device gets its first weights",
        lambda: _in("lightning.fabric.utilities.init", "_materialize_distributed_module"),
    ),
    "lightning.pytorch.loops.evaluation_loop._EvaluationLoop": (
        "averaging/validation.py",
        "that the raw weights are measured when, and as, a fit validates",
        lambda: _in("lightning.pytorch.loops.evaluation_loop", "_EvaluationLoop", "run"),
    ),
    "lightning.pytorch.utilities.rank_zero_only.rank =": (
        "launch/local.py",
        "that only rank 0 of processes that were forked prints and logs",
        lambda: _in("lightning.pytorch.utilities", "rank_zero_only", "rank"),
    ),
    "torch._dynamo": (
        "compile.py",
        "that a model of more than eight compiled parts compiles all of them",
        lambda: _in("torch", "_dynamo", "config", "cache_size_limit"),
    ),
    "torch._foreach_norm": (
        "clip.py",
        "that the norm of a small model costs no more than a step of it",
        lambda: _in("torch", "_foreach_norm"),
    ),
    "torch.nn.modules.batchnorm._NormBase": (
        "memory.py",
        "that norms of all kinds are known by their class",
        lambda: _in("torch.nn.modules.batchnorm", "_NormBase"),
    ),
    "torch.utils._pytree": (
        "averaging/norms.py parallel/data_parallel.py parallel/split.py resume/position.py "
        "screen/start.py throwaway/samples.py",
        "that what a batch, or a model, holds is found in any nest of containers",
        lambda: _in("torch.utils._pytree", "tree_map"),
    ),
}  # fmt: skip
"""By name: the files that use it, what hangs on it, and how to see that it is there."""


def is_private(name: str) -> bool:
    """Not `__init__`, nor what Hydra reads, as `_target_`."""
    return name[0] == "_" and name[-1] != "_" and name not in DOCUMENTED


def up_to_private(name: str) -> str | None:
    """A name in dots up to its first private part; None where it has none."""
    parts = name.split(".")
    first = next((n for n, part in enumerate(parts) if part and is_private(part)), None)
    return None if first is None else ".".join(parts[: first + 1])


def defined(tree: ast.AST) -> set[str]:
    """What a file defines: functions, classes, variables, fields, and attributes of self."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_own(node):
            found.add(node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "vars(self).update":
            found.update(keyword.arg or "" for keyword in node.keywords)
    return found


def is_own(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def in_dots(node: ast.expr, modules: dict[str, str]) -> str:
    """What an expression names: in full where it begins with what was imported, `.name` of another
    object's attribute, empty where it is neither."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if isinstance(node, ast.Name) and node.id in modules:
        return ".".join([modules[node.id], *reversed(parts)])
    return f".{parts[0]}" if parts else ""


def imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """What a file calls what it imports, and its full name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                yield (alias.asname, alias.name) if alias.asname else (top, top)
                yield "", alias.name
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def is_foreign(name: str) -> bool:
    return not any(name == one or name.startswith(f"{one}.") for one in OURS)


def private_names(source: str, all_defined: set[str]) -> Iterator[str]:
    """The private names of others that a file uses: imported, read, set, or asked for by a string.

    `module.name =` is what is set in a package, also where the name is public.

    Args:
        all_defined: what all our files define. Of self they are ours, of another object only where
            this file defines them.
    """
    tree = ast.parse(source)
    here, modules = defined(tree), dict(imports(tree))
    for _, name in imports(tree):
        if is_foreign(name) and (found := up_to_private(name)):
            yield found
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            name, known = in_dots(node, modules), all_defined if is_own(node) else here
            is_of_a_module = name[0] != "."
            if is_of_a_module and is_foreign(name):
                is_set = not isinstance(node.ctx, ast.Load)
                is_standard = name.partition(".")[0] in sys.stdlib_module_names
                if up_to_private(name) == name or (is_set and not is_standard):
                    yield f"{name} =" if is_set else name
            elif not is_of_a_module and is_private(node.attr) and node.attr not in known:
                yield name
        elif isinstance(node, ast.Call):
            called = in_dots(node.func, {}).strip(".") or getattr(node.func, "id", "")
            texts = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
            names = [text for text in texts if isinstance(text, str) and text.isidentifier()]
            if called in ASKING:
                yield from (f".{one}" for one in names if is_private(one) and one not in here)
        elif isinstance(node, ast.Subscript) and re.search(
            r"__dict__$|^vars\(", ast.unparse(node.value)
        ):
            text = getattr(node.slice, "value", None)
            if isinstance(text, str) and text and is_private(text) and text not in here:
                yield f".{text}"


def uses(root: Path) -> dict[str, set[str]]:
    """The files of a checkout by the private names of others that they use."""
    paths = [path for top in ("src", "conf") for path in sorted((root / top).rglob("*.py"))]
    sources = {path.relative_to(root).as_posix(): path.read_text() for path in paths}
    all_defined = set().union(*(defined(ast.parse(source)) for source in sources.values()))
    found: dict[str, set[str]] = {}
    for file, source in sources.items():
        for name in private_names(source, all_defined):
            found.setdefault(name, set()).add(file.removeprefix("src/app/"))
    return found


FOUND = uses(ROOT)


def test_every_private_name_that_is_used_is_known_with_its_files_and_no_other_is() -> None:
    known = {name: set(files.split()) for name, (files, _, _) in HANGS_ON.items()}
    assert known == FOUND


@pytest.mark.parametrize("name", HANGS_ON)
def test_the_installed_version_has_the_name(name: str) -> None:
    files, hangs_on_it, is_there = HANGS_ON[name]
    assert is_there(), f"{files}: {hangs_on_it}"


# as others write it
@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from torch._C import Generator", ["torch._C"]),
        ("import torch._dynamo as dynamo\ndynamo.reset()", ["torch._dynamo"] * 2),
        ("import torch._dynamo\ntorch._dynamo.reset()", ["torch._dynamo"] * 2),
        ("from torch.optim.lr_scheduler import _LRScheduler",
         ["torch.optim.lr_scheduler._LRScheduler"]),
        ("def f(trainer): trainer._results.clear()", ["._results"]),
        ("def f(trainer): trainer.strategy._lightning_module = None", ["._lightning_module"]),
        ("class A:\n def f(self): return self._own\n def g(self): self._own = 1", []),
        ("class A(B):\n def f(self): return self._theirs", ["._theirs"]),
        ("def f(x): return getattr(x, '_forward_hooks')", ["._forward_hooks"]),
        ("import operator\nf = operator.attrgetter('_value')", ["._value"]),
        ("def f(x): return x.__dict__['_modules']", ["._modules"]),
        ("def f(x): return vars(x)['_modules']", ["._modules"]),
        ("import torch\ntorch.load = None", ["torch.load ="]),
        ("import torch.nn as nn\nnn.Module.__call__ = None", ["torch.nn.Module.__call__ ="]),
        ("import sys\nsys.stdout = None", []),
        ("import os\nos._exit(0)", []),
        ("from app.sweep.study import _Trial\nfrom app.conf.rules import _x", []),
        ("from multiprocessing.context import _default_context",
         ["multiprocessing.context._default_context"]),
        ("x = {'_target_': 'a', '_partial_': True}", []),
        ("def f(t): return t._replace(a=1)._asdict()", []),
        ("from hydra_plugins.hydra_optuna_sweeper._impl import OptunaSweeperImpl",
         ["hydra_plugins.hydra_optuna_sweeper._impl"]),
        ("_x = 1\ndef f(m): return m._x", []),
        ("import m\nm._x = 1", ["m._x ="]),
    ],
)  # fmt: skip
def test_the_finder_finds(source: str, found: list[str]) -> None:
    ours = {"_own"}
    assert list(private_names(source, ours)) == found
