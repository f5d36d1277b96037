"""The rules between groups: what would fail after a while, or do nothing in silence."""

import math
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from app.config import DDP, SINGLE
from app.parallel.sizes import accumulation_factor, data_parallel_size

from .rules import require_package

if TYPE_CHECKING:
    from .schema import Train


def check_combinations(run: "Train") -> None:
    """Raise ValueError at the first combination of choices that is refused."""
    for rule in RULES:
        if rule.is_broken(run):
            raise ValueError(rule.message(run))
    for pair in WITH_STRATEGIES:
        if _is(run.strategy, *pair.strategies) and pair.is_broken(run):
            raise ValueError(pair.message(run))
    for package, (needs, choice, other) in PACKAGES.items():
        if needs(run):
            group = choice.partition("=")[0]
            require_package(package, choice, f"use {group}={other}")
    world_size = _data_parallel_size(run)
    if world_size is not None and _get(run.accumulate, "micro_batch_size") is not None:
        accumulation_factor(
            batch_size=run.accumulate.batch_size,
            micro_batch_size=run.accumulate.micro_batch_size,
            world_size=world_size,
        )


class Rule(NamedTuple):
    """A combination that is refused: it would fail after a while, or do nothing in silence."""

    is_broken: Callable[["Train"], bool]
    message: Callable[["Train"], str]


def _late_starts(run: "Train") -> list[int]:
    """Starts of an accumulation schedule that the run never reaches."""
    by = _get(run.accumulate, "by")
    end = run.trainer.max_epochs if by == "epoch" else run.trainer.max_steps
    return [] if by is None or end is None else [s for s in run.accumulate.starts if s >= end]


def _average_start(run: "Train") -> tuple[str, float, int] | None:
    """Key and value of an averaging start, and the end of the run in the same unit."""
    for key, end in (
        ("start_step", run.trainer.max_steps),
        ("start_epoch", run.trainer.max_epochs),
        ("start", run.trainer.max_epochs),
    ):
        start = _get(run.averaging, key)
        if start is not None and end is not None and not isinstance(start, float):
            return key, start, end
    return None


def _never_averages(run: "Train") -> bool:
    found = _average_start(run)
    return found is not None and found[1] >= found[2]


def _never_averages_message(run: "Train") -> str:
    found = _average_start(run)
    assert found is not None
    key, start, end = found
    return (
        f"averaging.{key}={start} is not before the end of the run ({end}), so that nothing would "
        f"be averaged; type averaging.{key}={end // 2}, or use averaging=none"
    )


def _has_no_length(run: "Train") -> bool:
    return run.trainer.max_epochs is None and run.trainer.max_steps is None


def _has_no_validation(run: "Train") -> bool:
    return run.trainer.limit_val_batches in (0, 0.0)


def _get(slot: Any, key: str) -> Any:
    """A key of a group that is off, a schema, or free-form."""
    return slot.get(key) if isinstance(slot, dict) else getattr(slot, key, None)


def _data_parallel_size(run: "Train") -> int | None:
    if _is(run.strategy, SINGLE):
        return 1
    return data_parallel_size(
        devices=run.trainer.devices,
        num_nodes=run.trainer.num_nodes,
        tensor_parallel_size=_get(run.strategy, "tensor_parallel_size"),
    )


def _num_processes(run: "Train") -> int:
    """1 where it is not known yet."""
    devices = 1 if run.trainer.devices == "auto" else int(run.trainer.devices)
    return devices * int(run.trainer.num_nodes)


def _splits_unevenly(run: "Train") -> bool:
    split = _get(run.strategy, "tensor_parallel_size")
    return split is not None and run.trainer.devices != "auto" and _num_processes(run) % split != 0


def _replicates_unevenly(run: "Train") -> bool:
    size, replicas = _data_parallel_size(run), _get(run.strategy, "num_replicas")
    return size is not None and replicas is not None and size % replicas != 0


FSDP = ("app.parallel.sharded.Sharded",)
DEEPSPEED = ("app.strategy.deepspeed",)


def _is(slot: Any, *targets: str) -> bool:
    return _get(slot, "_target_") in targets


def _name(strategy: Any) -> str:
    """A strategy as typed, but for what its schema sets: the stage, the split layers."""
    name = _get(strategy, "_target_").rpartition(".")[2]
    return f"strategy={'fsdp' if _is(strategy, *FSDP) else name}"


GRAPH_MODEL = "app.models.graphsage.GraphSage"


def _are_ours(run: "Train") -> bool:
    targets = [_get(slot, "_target_") for slot in (run.model, run.data) if is_dataclass(slot)]
    return len(targets) == 2 and all(str(target).startswith("app.") for target in targets)


METRICS = ("train_loss", "val_loss", "val_acc", "test_loss", "test_acc", "raw_val_loss",
           "raw_val_acc")  # fmt: skip
"""What is measured of a model of ours."""


def _unknown_metric(run: "Train") -> tuple[str, str, str, str] | None:
    """Key, known names, name and key again of a metric that a model of ours does not log."""
    callbacks = run.callbacks
    if not (callbacks is None or is_dataclass(callbacks)):
        return None
    names = {f.name for f in fields(callbacks)} if is_dataclass(callbacks) else set()
    if not _are_ours(run) or not vars(callbacks or run).keys() <= names | vars(run).keys():
        return None  # a callback of somebody's may log others
    for key, name in (
        ("objective", run.objective),
        ("callbacks.checkpoint.monitor", _get(_get(callbacks, "checkpoint"), "monitor")),
        ("callbacks.early_stopping.monitor", _get(_get(callbacks, "early_stopping"), "monitor")),
        ("scheduler.monitor", _get(run.scheduler, "monitor")),
    ):
        if name is not None and name not in METRICS:
            return key, ", ".join(METRICS), name, key
    return None


def _num_hops(run: "Train") -> tuple[int, int]:
    """Hops to neighbours that the model takes and the data serves; equal where one is not ours."""
    if not _are_ours(run):
        return 0, 0
    takes = len(run.model.hidden_sizes) + 1 if _is(run.model, GRAPH_MODEL) else 0
    return takes, len(_get(run.data, "fanouts") or ())


FP8 = "transformer-engine"

PACKAGES = {
    "bitsandbytes": (lambda run: _is(run.optimizer, EIGHT_BIT), "optimizer=adamw8bit", "adamw"),
    "deepspeed": (lambda run: _is(run.strategy, *DEEPSPEED), "strategy=deepspeed", "fsdp"),
    "transformer_engine": (lambda run: run.precision.mode == FP8, "precision=fp8", "bf16"),
}
"""Optional packages: what needs one, and the preset that does not."""

EIGHT_BIT = "app.optim.AdamW8bit"

BY_LENGTH = ("app.optim.WarmupDecay", "app.optim.OneCycle")
"""Schedules that are laid out over the whole run."""


class Pair(NamedTuple):
    """What a strategy cannot run, why, and what to type instead."""

    strategies: tuple[str, ...]
    is_broken: Callable[["Train"], bool]
    what: str
    why: str
    instead: str

    def message(self, run: "Train") -> str:
        """`what` cannot run with the strategy, because; what to type."""
        what = self.what.format(run=run)
        return f"{what} cannot run with {_name(run.strategy)}: {self.why}; {self.instead}"


WITH_STRATEGIES = (
    Pair(
        DEEPSPEED,
        lambda run: run.trainer.accelerator == "cpu",
        "trainer.accelerator=cpu",
        "DeepSpeed needs GPUs",
        "use strategy=fsdp",
    ),
    Pair(
        FSDP,
        lambda run: run.precision.mode == FP8,
        "precision.mode={run.precision.mode}",
        "float8 layers are not sharded",
        "use precision=bf16",
    ),
    Pair(
        FSDP,
        lambda run: run.precision.mode == "16-mixed" and run.strategy.tensor_parallel_size > 1,
        "precision.mode={run.precision.mode}",
        "an overflow in one part of a split layer is not seen by the others",
        "use precision=bf16, or type strategy.tensor_parallel_size=1",
    ),
    Pair(
        DEEPSPEED,
        lambda run: run.precision.mode in ("64-true", FP8),
        "precision.mode={run.precision.mode}",
        "Lightning's strategy takes neither float64 nor float8",
        "use precision=bf16",
    ),
    Pair(
        DEEPSPEED,
        lambda run: run.clip is not None and not _is_plain_norm(run.clip),
        "this clipping",
        "DeepSpeed's engine keeps the gradients, and clips their 2-norm only",
        "use clip=norm",
    ),
    Pair(
        DEEPSPEED,
        lambda run: run.accumulate is not None,
        "accumulation",
        "DeepSpeed's engine counts the micro-batches itself",
        "use accumulate=none, or strategy=fsdp",
    ),
    Pair(
        DEEPSPEED,
        lambda run: run.averaging is not None,
        "averaging",
        "DeepSpeed's engine keeps the weights that it steps",
        "use averaging=none, or strategy=fsdp",
    ),
    Pair(
        FSDP,
        lambda run: _get(run.averaging, "validate") == "both",
        "averaging.validate=both",
        "it runs a copy of the model, which cannot be made of shards",
        "type averaging.validate=averaged",
    ),
    Pair(
        FSDP + DEEPSPEED,
        lambda run: bool(_get(run.tuner, "milestones")),
        "tuner.milestones",
        "a second sharded model cannot be made inside a fit",
        "type 'tuner.milestones=[]'",
    ),
    Pair(
        (DDP,),
        lambda run: (
            bool(_get(run.tuner, "milestones")) and _get(run.tuner, "batch_size") is not None
        ),
        "tuner.milestones with tuner.batch_size",
        "a rank that runs out of memory inside a fit would leave the others waiting",
        "type tuner.batch_size=null",
    ),
    Pair(
        FSDP,
        lambda run: bool(_get(run.compile, "fullgraph")),
        "compile.fullgraph=true",
        "each block is gathered between two graphs",
        "type compile.fullgraph=false",
    ),
    Pair(
        FSDP,
        lambda run: _is(run.optimizer, EIGHT_BIT),
        "optimizer=adamw8bit",
        "bitsandbytes cannot step shards",
        "use optimizer=adamw, or strategy=ddp",
    ),
)


def _is_plain_norm(clip: Any) -> bool:
    return _is(clip, "app.clip.NormClip") and clip.norm_type == 2


RULES = (
    Rule(
        lambda run: run.scheduler is not None and run.optimizer is None,
        lambda run: (
            "scheduler needs an optimizer whose rate it sets, and optimizer=none leaves the model "
            "its own; choose an optimizer, or use scheduler=none"
        ),
    ),
    Rule(
        lambda run: _get(run.scheduler, "_target_") in BY_LENGTH and _has_no_length(run),
        lambda run: (
            "scheduler needs the length of the run; type trainer.max_epochs=30 or "
            "trainer.max_steps=1000, or use scheduler=none"
        ),
    ),
    Rule(
        lambda run: any(e >= (run.trainer.max_epochs or e + 1) for e in _milestones(run)),
        lambda run: (
            f"scheduler.milestones={_milestones(run)} are not all before "
            f"trainer.max_epochs={run.trainer.max_epochs}; type "
            f"'scheduler.milestones=[{run.trainer.max_epochs // 2}]'"
        ),
    ),
    Rule(
        lambda run: _get(run.scheduler, "monitor") is not None and _has_no_validation(run),
        lambda run: (
            "scheduler=plateau watches the validation, which trainer.limit_val_batches=0 switches "
            "off; type trainer.limit_val_batches=null, or use another scheduler"
        ),
    ),
    Rule(
        lambda run: _get(run.callbacks, "early_stopping") is not None and _has_no_validation(run),
        lambda run: (
            "callbacks.early_stopping watches the validation, which trainer.limit_val_batches=0 "
            "switches off; type trainer.limit_val_batches=null, or use callbacks=default"
        ),
    ),
    Rule(
        lambda run: bool(_late_starts(run)),
        lambda run: (
            f"accumulate.starts has {_late_starts(run)}, which the run never reaches "
            f"(trainer.max_{run.accumulate.by.value}s="
            f"{_get(run.trainer, f'max_{run.accumulate.by.value}s')}); leave them out"
        ),
    ),
    Rule(_never_averages, _never_averages_message),
    Rule(
        lambda run: (
            isinstance(_get(run.averaging, "start"), float) and run.trainer.max_epochs is None
        ),
        lambda run: (
            f"averaging.start={run.averaging.start} is a share of trainer.max_epochs, which is "
            "null; type averaging.start=null averaging.start_step=1000"
        ),
    ),
    Rule(
        lambda run: (
            _get(run.averaging, "horizon") is not None
            and run.averaging.decay is None
            and run.averaging.half_life_steps is None
            and _has_no_length(run)
        ),
        lambda run: (
            "averaging.horizon is a share of the run's optimizer steps, which neither "
            "trainer.max_epochs nor trainer.max_steps bounds; type averaging.decay=0.999"
        ),
    ),
    Rule(
        lambda run: _get(run.averaging, "validate") == "both" and _has_no_validation(run),
        lambda run: (
            "averaging.validate=both needs the validation, which trainer.limit_val_batches=0 "
            "switches off; type averaging.validate=averaged"
        ),
    ),
    Rule(
        lambda run: run.precision.mode == "16-mixed" and run.trainer.accelerator == "cpu",
        lambda run: (
            "precision=fp16 needs a GPU: trainer.accelerator=cpu has no scaled float16; "
            "use precision=bf16"
        ),
    ),
    Rule(
        lambda run: 0 < _num_hops(run)[0] != _num_hops(run)[1],
        lambda run: (
            f"model=graphsage has {_num_hops(run)[0]} layers, and the data serves "
            f"{_num_hops(run)[1]} hops to neighbours; type data=graph "
            f"'data.fanouts={[10] * _num_hops(run)[0]}'"
        ),
    ),
    Rule(
        lambda run: 0 == _num_hops(run)[0] < _num_hops(run)[1],
        lambda run: (
            f"data.fanouts={run.data.fanouts} adds neighbours to each node, which only "
            "model=graphsage takes; choose it, or type 'data.fanouts=[]'"
        ),
    ),
    Rule(
        lambda run: _are_ours(run) and run.model.in_features != _get(run.data, "num_features"),
        lambda run: (
            f"model.in_features must be the data's {_get(run.data, 'num_features')}, got "
            f"{run.model.in_features}; leave it out"
        ),
    ),
    Rule(
        lambda run: _are_ours(run) and run.model.num_classes < _get(run.data, "num_classes"),
        lambda run: (
            f"model.num_classes must be at least the data's {_get(run.data, 'num_classes')}, got "
            f"{run.model.num_classes}; leave it out"
        ),
    ),
    Rule(
        lambda run: _unknown_metric(run) is not None,
        lambda run: "{} must be one of {}, which the model logs, got {}; type {}=val_loss".format(
            *_unknown_metric(run) or ()
        ),
    ),
    Rule(
        lambda run: run.precision.matmul == "high" and run.trainer.accelerator == "cpu",
        lambda run: (
            "precision=tf32 needs a GPU: trainer.accelerator=cpu has no TF32; use precision=fp32"
        ),
    ),
    Rule(
        lambda run: run.precision.mode == FP8 and run.trainer.accelerator == "cpu",
        lambda run: (
            "precision=fp8 needs a GPU: trainer.accelerator=cpu has no float8; use precision=bf16"
        ),
    ),
    Rule(
        lambda run: run.precision.mode == FP8 and run.memory is not None,
        lambda run: (
            "memory=checkpointing runs blocks a second time outside the float8 arithmetic of "
            "precision=fp8; use precision=bf16, or memory=none"
        ),
    ),
    Rule(
        lambda run: (
            _get(run.compile, "mode") == "reduce_overhead" and run.trainer.accelerator == "cpu"
        ),
        lambda run: (
            "compile=reduce_overhead needs a GPU: trainer.accelerator=cpu has no CUDA graphs; use "
            "compile=default"
        ),
    ),
    Rule(
        lambda run: run.trainer.sync_batchnorm and run.trainer.accelerator == "cpu",
        lambda run: (
            "trainer.sync_batchnorm needs GPUs: trainer.accelerator=cpu has no synchronized "
            "BatchNorm; type trainer.sync_batchnorm=false"
        ),
    ),
    Rule(
        lambda run: run.trainer.sync_batchnorm and _is(run.strategy, SINGLE),
        lambda run: (
            "trainer.sync_batchnorm has no effect with strategy=single; type strategy=ddp, or "
            "trainer.sync_batchnorm=false"
        ),
    ),
    Rule(
        lambda run: _is(run.strategy, SINGLE) and _num_processes(run) > 1,
        lambda run: (
            f"trainer.devices={run.trainer.devices} and trainer.num_nodes={run.trainer.num_nodes} "
            "need a strategy of several processes; type strategy=ddp"
        ),
    ),
    Rule(
        _splits_unevenly,
        lambda run: (
            f"strategy.tensor_parallel_size={run.strategy.tensor_parallel_size} must divide the "
            f"{_num_processes(run)} processes; type trainer.devices="
            f"{run.strategy.tensor_parallel_size}"
        ),
    ),
    Rule(
        _replicates_unevenly,
        lambda run: (
            f"strategy.num_replicas={run.strategy.num_replicas} must divide the number of data "
            f"parallel processes, {_data_parallel_size(run)}; type strategy.num_replicas="
            f"{math.gcd(run.strategy.num_replicas, _data_parallel_size(run) or 1)}"
        ),
    ),
)


def _milestones(run: "Train") -> list[int]:
    return list(_get(run.scheduler, "milestones") or [])
