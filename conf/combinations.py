"""The rules between groups: what would fail after a while, or do nothing in silence."""

import math
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from app.config import DDP, LIGHTNINGS, OF_LIGHTNING, SINGLE
from app.parallel.sizes import accumulation_factor, data_parallel_size

from .optimizer.schema import Theirs as Optimizer
from .optimizer.schema import check_groups
from .rules import RULE, require_package
from .scheduler.schema import Theirs as Schedule

if TYPE_CHECKING:
    from .schema import Train


def check_combinations(run: "Train") -> None:
    """Raise ValueError at the first combination of choices that is refused."""
    seen = Seen(run)
    for key, shape in (("optimizer", Optimizer), ("scheduler", Schedule)):
        if isinstance(getattr(run, key), dict):
            _refuse_theirs(key, getattr(run, key), shape)
    if run.optimizer is not None:
        check_groups(run.optimizer)
    for text, is_broken in (RULES | WITH_STRATEGIES).items():
        if is_broken(seen):
            raise ValueError(text.format(run=seen))
    for package, (is_needed, choice, other) in PACKAGES.items():
        if is_needed(seen):
            require_package(package, choice, f"use {choice.partition('=')[0]}={other}")
    samples = seen.accumulate.batch_size, seen.accumulate.micro_batch_size
    if None not in (*samples, seen.data_parallel_size):
        accumulation_factor(
            batch_size=samples[0],
            micro_batch_size=samples[1],
            world_size=int(seen.data_parallel_size or 1),
        )


def _refuse_theirs(key: str, group: dict[str, Any], shape: type) -> None:
    """Refuse what the run reads of a group of any class, where its schema does not allow it."""
    node = OmegaConf.create({key: OmegaConf.structured(shape)})
    for field in (field for field in fields(shape) if field.name in group):
        node[key][field.name] = group[field.name]
        rule = field.metadata.get(RULE)
        refusal = rule and rule.refusal(f"{key}.{field.name}", group[field.name])
        if refusal:
            raise ValueError(refusal)


class Group:
    """A group of a run: true where it is on; a key that it does not have is None."""

    def __init__(self, group: Any) -> None:
        self._group = group

    def __bool__(self) -> bool:
        return self._group is not None

    def __getattr__(self, key: str) -> Any:
        group = self._group
        return group.get(key) if isinstance(group, dict) else getattr(group, key, None)


class Seen:
    """A run as the rules look at it: its groups by name, and what follows from them."""

    def __init__(self, run: "Train") -> None:
        self.run = run
        self.are_ours = all(
            is_dataclass(group) and str(getattr(group, "_target_", "")).startswith("app.")
            for group in (run.model, run.data)
        )
        self.is_debug = run.debug is not None  # whose end is no matter of what was chosen
        self.on_cpu = self.trainer.accelerator == "cpu"
        self.is_endless = self.trainer.max_epochs is None and self.trainer.max_steps is None
        self.is_unvalidated = self.trainer.limit_val_batches in (0, 0.0)
        self.is_fp8 = self.precision.mode == "transformer-engine"
        self.is_8bit = self.optimizer._target_ == "app.optim.AdamW8bit"
        self.is_single = self.strategy._target_ == SINGLE
        self.is_deepspeed = self.strategy._target_ == "app.strategy.deepspeed"
        self.is_fsdp = self.strategy._target_ == "app.parallel.sharded.Sharded"
        self.sharding = "fsdp" if self.is_fsdp else "deepspeed" if self.is_deepspeed else None

    def __getattr__(self, group: str) -> Group:
        return Group(getattr(self.run, group))

    @property
    def late_milestones(self) -> list[int]:
        """Epochs of a scheduler that the run does not reach."""
        end = math.inf if self.is_debug else self.trainer.max_epochs or math.inf
        is_ours = self.scheduler._target_ == "app.optim.Steps"
        return [epoch for epoch in self.scheduler.milestones if epoch >= end] if is_ours else []

    @property
    def decays_to_zero(self) -> bool:
        """Whether a schedule of ours ends at no rate at all, or as good as none."""
        scheduler, kind = self.scheduler, self.scheduler._target_
        is_falling = kind in BY_LENGTH and scheduler.shape != "constant"
        return is_falling and (scheduler.final is None or scheduler.final < ABOUT_ZERO)

    @property
    def has_other_rate(self) -> bool:
        """Whether a rate is searched in place of which the schedule has one of its own."""
        lr = Group(self.tuner.lr)
        is_searched = lr and not self.tuner.milestones and lr.key in (None, "optimizer.lr")
        return bool(is_searched) and self.scheduler._target_ in WITH_RATE

    @property
    def half_of_epochs(self) -> int:
        """A milestone that it reaches."""
        return int(self.trainer.max_epochs // 2)

    @property
    def end_of_starts(self) -> float:
        """The end of the run in the unit of an accumulation schedule."""
        end = self.trainer.max_epochs if self.accumulate.by == "epoch" else self.trainer.max_steps
        return math.inf if end is None or self.is_debug else end

    @property
    def late_starts(self) -> list[int]:
        """Starts of an accumulation schedule that the run never reaches."""
        starts = self.accumulate.starts if self.accumulate.by else ()
        return [start for start in starts if start >= self.end_of_starts]

    @property
    def late_average(self) -> dict[str, Any]:
        """Key, value and end of the run where averaging starts at it or later."""
        for key, end in (
            ("start_step", self.trainer.max_steps),
            ("start_epoch", self.trainer.max_epochs),
            ("start", self.trainer.max_epochs),
        ):
            start = getattr(self.averaging, key)
            is_late = isinstance(start, int) and end is not None and start >= end
            if is_late and not self.is_debug:
                return {"key": key, "start": start, "end": end, "half": end // 2}
        return {}

    @property
    def is_plain_norm(self) -> bool:
        """Whether gradients are clipped by their 2-norm."""
        return self.clip._target_ == "app.clip.NormClip" and self.clip.norm_type == 2

    @property
    def has_open_horizon(self) -> bool:
        """Whether an average's memory is a share of a run that has no length."""
        ema = self.averaging
        is_horizon = ema.horizon is not None and ema.decay is None and ema.half_life_steps is None
        return is_horizon and self.is_endless

    @property
    def hops_taken(self) -> int:
        """Hops to neighbours that a model of ours takes."""
        is_graphs = self.are_ours and self.model._target_ == "app.models.graphsage.GraphSage"
        return len(self.model.hidden_sizes) + 1 if is_graphs else 0

    @property
    def hops_served(self) -> int:
        """Hops to neighbours that data of ours serve to a model of ours."""
        return len(self.data.fanouts or ()) if self.are_ours else 0

    @property
    def fanouts(self) -> list[int]:
        """Those that would serve the model."""
        return [10] * self.hops_taken

    @property
    def unknown_metric(self) -> tuple[str, str] | None:
        """Key and value of a metric that a model of ours does not log, where no callback may."""
        callbacks = self.run.callbacks
        is_known = callbacks is None or (
            is_dataclass(callbacks)
            and vars(callbacks).keys() <= {f.name for f in fields(callbacks)}
        )
        for key, name in (
            ("objective", self.run.objective),
            ("callbacks.checkpoint.monitor", Group(self.callbacks.checkpoint).monitor),
            ("callbacks.early_stopping.monitor", Group(self.callbacks.early_stopping).monitor),
            ("scheduler.monitor", self.scheduler.monitor),
        ):
            if self.are_ours and is_known and name is not None and name not in METRICS.split(", "):
                return key, name
        return None

    @staticmethod
    def of_validation(monitor: str | None) -> bool:
        """Whether a metric that is watched is one of the validation, as far as its name says."""
        return monitor is not None and "train" not in monitor

    @property
    def untold(self) -> tuple[str, ...] | None:
        """Key, choices, key and value of a metric whose name tells no way, and what to type."""
        for key, group in (
            ("callbacks.checkpoint", Group(self.callbacks.checkpoint)),
            ("callbacks.early_stopping", Group(self.callbacks.early_stopping)),
            ("scheduler", self.scheduler if is_dataclass(self.run.scheduler) else Group(None)),
        ):
            if group.monitor is not None and group.mode is None:
                return f"{key}.mode", "min or max", f"{key}.monitor", group.monitor, "max"
        objective = self.run.objective
        if self.sweep and objective is not None and self.run.direction is None:
            return "direction", "minimize or maximize", "objective", objective, "maximize"
        return None

    @property
    def of_lightning(self) -> tuple[str, str, str] | None:
        """Key, class and what to use instead of a technique of Lightning among the callbacks."""
        callbacks = self.run.callbacks
        named = callbacks if isinstance(callbacks, dict) else vars(callbacks or object)
        for key, callback in named.items():
            package, _, name = str(Group(callback)._target_).partition(".")
            name = name.rpartition(".")[2]
            if package in LIGHTNINGS and name in OF_LIGHTNING:
                return key, name, OF_LIGHTNING[name]
        return None

    @property
    def num_processes(self) -> int:
        """1 where it is not known yet."""
        devices = 1 if self.trainer.devices == "auto" else int(self.trainer.devices)
        return devices * int(self.trainer.num_nodes)

    @property
    def data_parallel_size(self) -> int | None:
        """None where it is not known yet."""
        if self.is_single:
            return 1
        return data_parallel_size(
            devices=self.trainer.devices,
            num_nodes=self.trainer.num_nodes,
            tensor_parallel_size=self.strategy.tensor_parallel_size,
        )

    @property
    def splits_unevenly(self) -> bool:
        """Whether the devices that split a layer do not divide the processes."""
        split = self.strategy.tensor_parallel_size
        is_known = split is not None and self.trainer.devices != "auto"
        return is_known and self.num_processes % split != 0

    @property
    def even_replicas(self) -> int:
        """The most groups of processes, up to those asked for, of equal size."""
        replicas = self.strategy.num_replicas or 1
        size = self.data_parallel_size
        return replicas if size is None else math.gcd(replicas, size)


METRICS = "train_loss, val_loss, val_acc, test_loss, test_acc, raw_val_loss, raw_val_acc"
"""What is measured of a model of ours."""

BY_LENGTH = ("app.optim.WarmupDecay", "app.optim.WarmupStableDecay", "app.optim.OneCycle")
"""Schedules that are laid out over the whole run."""

ABOUT_ZERO = 0.02
"""A share of the peak that no longer moves the weights."""

WITH_RATE = ("torch.optim.lr_scheduler.OneCycleLR", "torch.optim.lr_scheduler.CyclicLR")
"""Schedules that set the rate whatever that of the optimizer is."""

PACKAGES: dict[str, tuple[Callable[[Seen], bool], str, str]] = {
    "bitsandbytes": (lambda run: run.is_8bit, "optimizer=adamw8bit", "adamw"),
    "deepspeed": (lambda run: run.is_deepspeed, "strategy=deepspeed", "fsdp"),
    "transformer_engine": (lambda run: run.is_fp8, "precision=fp8", "bf16"),
}
"""Optional packages: what needs one, and the preset that does not."""

Rules = dict[str, Callable[[Seen], Any]]
"""What is said of a combination that is refused, and where it is."""

WITH_STRATEGIES: Rules = {
    "trainer.accelerator=cpu cannot run with strategy=deepspeed: DeepSpeed needs GPUs; use "
    "strategy=fsdp": lambda run: run.is_deepspeed and run.on_cpu,
    "precision.mode={run.precision.mode} cannot run with strategy=fsdp: float8 layers are not "
    "sharded; use precision=bf16": lambda run: run.is_fsdp and run.is_fp8,
    "precision.mode={run.precision.mode} cannot run with strategy=fsdp: an overflow in one part of "
    "a split layer is not seen by the others; use precision=bf16, or type "
    "strategy.tensor_parallel_size=1": lambda run: (
        run.is_fsdp
        and run.precision.mode == "16-mixed"
        and (run.strategy.tensor_parallel_size or 1) > 1
    ),
    "precision.mode={run.precision.mode} cannot run with strategy=deepspeed: Lightning's strategy "
    "takes neither float64 nor float8; use precision=bf16": lambda run: (
        run.is_deepspeed and (run.is_fp8 or run.precision.mode == "64-true")
    ),
    "this clipping cannot run with strategy=deepspeed: DeepSpeed's engine keeps the gradients, and "
    "clips their 2-norm only; use clip=norm": lambda run: (
        run.is_deepspeed and run.clip and not run.is_plain_norm
    ),
    "callbacks.checkpoint.keep_every_n_steps cannot run with strategy=deepspeed: its checkpoints "
    "are folders; type callbacks.checkpoint.keep_every_n_steps=null": lambda run: (
        run.is_deepspeed and Group(run.callbacks.checkpoint).keep_every_n_steps
    ),
    "accumulation cannot run with strategy=deepspeed: DeepSpeed's engine counts the micro-batches "
    "itself; use accumulate=none, or strategy=fsdp": lambda run: (
        run.is_deepspeed and run.accumulate
    ),
    "averaging cannot run with strategy=deepspeed: DeepSpeed's engine keeps the weights that it "
    "steps; use averaging=none, or strategy=fsdp": lambda run: run.is_deepspeed and run.averaging,
    "tuner.milestones cannot run with strategy={run.sharding}: a second sharded model cannot be "
    "made inside a fit; type 'tuner.milestones=[]'": lambda run: (
        run.sharding and run.tuner.milestones
    ),
    "tuner.milestones with tuner.batch_size cannot run with strategy=ddp: a rank that runs out of "
    "memory inside a fit would leave the others waiting; type tuner.batch_size=null": lambda run: (
        run.strategy._target_ == DDP and run.tuner.milestones and run.tuner.batch_size is not None
    ),
    "compile.fullgraph=true cannot run with strategy=fsdp: each block is gathered between two "
    "graphs; type compile.fullgraph=false": lambda run: run.is_fsdp and run.compile.fullgraph,
    "optimizer=muon cannot run with strategy=deepspeed: DeepSpeed's engine steps flat parts of the "
    "parameters, of which no matrix is whole; use optimizer=adamw, or strategy=fsdp": lambda run: (
        run.is_deepspeed and run.optimizer._target_ == "app.optim.Muon"
    ),
    "optimizer=adamw8bit cannot run with strategy=fsdp: bitsandbytes cannot step shards; use "
    "optimizer=adamw, or strategy=ddp": lambda run: run.is_fsdp and run.is_8bit,
}

RULES: Rules = {
    "callbacks.{run.of_lightning[0]} must be no technique of Lightning, of which ours know "
    "nothing, got {run.of_lightning[1]}; leave it out, and use {run.of_lightning[2]}": lambda run: (
        run.of_lightning
    ),
    "scheduler needs an optimizer whose rate it sets, and optimizer=none leaves the model its own; "
    "choose an optimizer, or use scheduler=none": lambda run: run.scheduler and not run.optimizer,
    "scheduler needs the length of the run; type trainer.max_epochs=30 or trainer.max_steps=1000, "
    "or use scheduler=none": lambda run: run.is_endless and run.scheduler._target_ in BY_LENGTH,
    "tuner.lr searches optimizer.lr, in place of which {run.scheduler._target_} sets its max_lr; "
    "use scheduler=onecycle, or tuner=batch_size": lambda run: run.has_other_rate,
    "scheduler.milestones={run.scheduler.milestones} are not all before "
    "trainer.max_epochs={run.trainer.max_epochs}; type "
    "'scheduler.milestones=[{run.half_of_epochs}]'": lambda run: run.late_milestones,
    "scheduler=plateau watches the validation, which trainer.limit_val_batches=0 switches off; "
    "type trainer.limit_val_batches=null, or use another scheduler": lambda run: (
        run.is_unvalidated and run.of_validation(run.scheduler.monitor)
    ),
    "callbacks.early_stopping watches the validation, which trainer.limit_val_batches=0 switches "
    "off; type trainer.limit_val_batches=null, or use callbacks=default": lambda run: (
        run.is_unvalidated and run.of_validation(Group(run.callbacks.early_stopping).monitor)
    ),
    "callbacks.checkpoint.top_k keeps the best of a validation, which trainer.limit_val_batches=0 "
    "switches off; type trainer.limit_val_batches=null, or "
    "callbacks.checkpoint.monitor=train_loss": lambda run: (
        run.is_unvalidated
        and Group(run.callbacks.checkpoint).top_k not in (None, 1)
        and run.of_validation(Group(run.callbacks.checkpoint).monitor)
    ),
    "sharing shares what a LightningDataModule sets up, and data=none has none; use "
    "sharing=none": lambda run: run.sharing and not run.data,
    "accumulate.starts has {run.late_starts}, which the run never reaches "
    "(trainer.max_{run.accumulate.by}s={run.end_of_starts}); leave them out": lambda run: (
        run.late_starts
    ),
    "averaging.{run.late_average[key]}={run.late_average[start]} is not before the end of the run "
    "({run.late_average[end]}), so that nothing would be averaged; type "
    "averaging.{run.late_average[key]}={run.late_average[half]}, or use averaging=none": (
        lambda run: run.late_average
    ),
    "averaging.start={run.averaging.start} is a share of trainer.max_epochs, which is null; type "
    "averaging.start=null averaging.start_step=1000": lambda run: (
        isinstance(run.averaging.start, float) and run.trainer.max_epochs is None
    ),
    "averaging.horizon is a share of the run's optimizer steps, which neither trainer.max_epochs "
    "nor trainer.max_steps bounds; type averaging.decay=0.999": lambda run: run.has_open_horizon,
    "averaging.validate=both needs the validation, which trainer.limit_val_batches=0 switches off; "
    "type averaging.validate=averaged": lambda run: (
        run.is_unvalidated and run.averaging.validate == "both"
    ),
    "precision=fp16 needs a GPU: trainer.accelerator=cpu has no scaled float16; use "
    "precision=bf16": lambda run: run.on_cpu and run.precision.mode == "16-mixed",
    "model=graphsage has {run.hops_taken} layers, and the data serves {run.hops_served} hops to "
    "neighbours; type data=graph 'data.fanouts={run.fanouts}'": lambda run: (
        0 < run.hops_taken != run.hops_served
    ),
    "data.fanouts={run.data.fanouts} adds neighbours to each node, which only model=graphsage "
    "takes; choose it, or type 'data.fanouts=[]'": lambda run: (
        0 == run.hops_taken < run.hops_served
    ),
    "model.in_features must be the data's {run.data.num_features}, got {run.model.in_features}; "
    "leave it out": lambda run: run.are_ours and run.model.in_features != run.data.num_features,
    "model.num_classes must be at least the data's {run.data.num_classes}, got "
    "{run.model.num_classes}; leave it out": lambda run: (
        run.are_ours and run.model.num_classes < run.data.num_classes
    ),
    "{run.unknown_metric[0]} must be one of " + METRICS + ", which the model logs, got "
    "{run.unknown_metric[1]}; type {run.unknown_metric[0]}=val_loss": lambda run: (
        run.unknown_metric
    ),
    "{run.untold[0]} must be {run.untold[1]} where {run.untold[2]}={run.untold[3]}, a name that "
    "does not tell which values are better, got null; type {run.untold[0]}={run.untold[4]}": (
        lambda run: run.untold
    ),
    "precision=tf32 needs a GPU: trainer.accelerator=cpu has no TF32; use "
    "precision=fp32": lambda run: run.on_cpu and run.precision.matmul == "high",
    "precision=fp8 needs a GPU: trainer.accelerator=cpu has no float8; use "
    "precision=bf16": lambda run: run.on_cpu and run.is_fp8,
    "memory=checkpointing runs blocks a second time outside the float8 arithmetic of "
    "precision=fp8; use precision=bf16, or memory=none": lambda run: run.is_fp8 and run.memory,
    "compile=reduce_overhead needs a GPU: trainer.accelerator=cpu has no CUDA graphs; use "
    "compile=default": lambda run: run.on_cpu and run.compile.mode == "reduce_overhead",
    "trainer.sync_batchnorm needs GPUs: trainer.accelerator=cpu has no synchronized BatchNorm; "
    "type trainer.sync_batchnorm=false": lambda run: run.on_cpu and run.trainer.sync_batchnorm,
    "trainer.sync_batchnorm has no effect with strategy=single; type strategy=ddp, or "
    "trainer.sync_batchnorm=false": lambda run: run.is_single and run.trainer.sync_batchnorm,
    "trainer.devices={run.trainer.devices} and trainer.num_nodes={run.trainer.num_nodes} need a "
    "strategy of several processes; type strategy=ddp": lambda run: (
        run.is_single and run.num_processes > 1
    ),
    "strategy.tensor_parallel_size={run.strategy.tensor_parallel_size} must divide the "
    "{run.num_processes} processes; type "
    "trainer.devices={run.strategy.tensor_parallel_size}": lambda run: run.splits_unevenly,
    "strategy.num_replicas={run.strategy.num_replicas} must divide the number of data parallel "
    "processes, {run.data_parallel_size}; type strategy.num_replicas={run.even_replicas}": (
        lambda run: run.strategy.num_replicas not in (None, run.even_replicas)
    ),
}

NOTES: Rules = {
    "averaging adds nothing where the schedule decays to zero: 92.9 % with it and without, on "
    "mnist1d, 5 seeds, and 95.0 % at a constant rate; use scheduler=warmup, or "
    "averaging=none": lambda run: (
        run.averaging and run.decays_to_zero and not (run.averaging.lr or run.averaging.lr_factor)
    ),
    "scheduler.warmup={run.scheduler.warmup} is a share of {run.run.branch_of}, not of this run, "
    "whose warm-up was that one's; a number of steps says the same of both": lambda run: (
        run.run.branch_of is not None and isinstance(run.scheduler.warmup, float)
    ),
}
"""What is said of a combination that is allowed, and where it is."""


def notes_of(run: "Train") -> list[str]:
    """A line for each choice that is allowed, and seldom what is meant."""
    seen = Seen(run)
    return [f"note: {text.format(run=seen)}" for text, holds in NOTES.items() if holds(seen)]
