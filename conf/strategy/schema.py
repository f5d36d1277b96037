"""How several processes train one model: one process a device, started from the composed config.

Processes of this machine are started by a launcher that listens on its loopback only, whatever the
preset; started by torchrun or srun already, nothing is launched. Every rank draws the same order of
samples and trains on its own share; each sample of an epoch is seen once.

| preset          | what it does                                               | source            |
|-----------------|------------------------------------------------------------|-------------------|
| single          | one process, one device                                    |                   |
| ddp             | a model in each process, gradients averaged                | arXiv 2006.15704  |
| ddp_spawn       | the same, each process started anew, none forked           |                   |
| ddp_find_unused | the same, where a step leaves parameters out               |                   |
| fsdp            | weights, gradients and optimizer state are sharded         | arXiv 2304.11277  |
| tp_fsdp         | linear layers split over devices; fsdp over their groups   | arXiv 1909.08053  |
| deepspeed_zero* | ZeRO, stage 1, 2, 3, each with _offload: GPUs,             | arXiv 1910.02054  |
|                 | pip install 'effective-training[deepspeed]'                |                   |
"""

from dataclasses import dataclass
from enum import StrEnum

from omegaconf import MISSING

from ..rules import TEN_YEARS_MIN, count, number, require

StartMethod = StrEnum("StartMethod", "forkserver spawn")
"""How the processes of this machine begin."""


@dataclass(kw_only=True)
class Single:
    """One process on one device."""

    _target_: str = "app.strategy.single"


@dataclass(kw_only=True)
class Processes:
    """What every strategy of several processes has."""

    start_method: StartMethod = MISSING
    """forkserver starts in a fraction of a second where torch is imported; spawn begins anew."""
    timeout_min: float = number(above=0, at_most=TEN_YEARS_MIN, instead="type {key}=30")
    """Minutes that a rank waits for the others before the run fails, > 0."""


@dataclass(kw_only=True)
class Ddp(Processes):
    """A copy of the model in each process: torch's DistributedDataParallel."""

    _target_: str = "app.strategy.ddp"
    find_unused_parameters: bool = MISSING
    """Allow parameters without a gradient in a step; slower."""
    static_graph: bool = MISSING
    """Promise that every step uses the same parameters."""
    gradient_as_bucket_view: bool = MISSING
    """Keep the gradients in the buffers that are sent: one copy less."""

    def __post_init__(self) -> None:
        require(
            not (self.find_unused_parameters and self.static_graph),
            "strategy.static_graph must be false where unused parameters are looked for, got "
            f"{self.static_graph}; use strategy=ddp",
        )


@dataclass(kw_only=True)
class Sharded(Processes):
    """Fully sharded data parallel, parameter by parameter: torch's `fully_shard`.

    The blocks of a model are gathered each while it runs, the rest of the model as one more. A
    model with a `configure_model` shards itself there, over `self.device_mesh`.
    """

    _target_: str = "app.parallel.sharded.Sharded"
    shard_classes: list[str] = MISSING
    """Class names of the blocks, such as TransformerEncoderLayer; [] = by size."""
    shard_min_parameters: int | None = count(instead="for one block type {key}=null")
    """Without class names: parameters that make a block, >= 1; null = the model is one block."""
    offload: bool = MISSING
    """Keep the shards in the memory of the CPU."""
    reshard_after_forward: bool = MISSING
    """Gather a block again for its backward pass: less memory, more traffic."""
    num_replicas: int = count(at_most=4096, instead="type {key}=1")
    """Groups of processes that each hold all shards, >= 1: less traffic between them, more memory.

    Divides the number of data parallel processes; as a rule, the number of machines.
    """
    tensor_parallel_size: int = count(at_most=4096, instead="type {key}=2")
    """Devices that split a layer, >= 1; divides the number of processes."""
    colwise: list[str] = MISSING
    """Patterns of names of linear layers split by their outputs: the first of a pair."""
    rowwise: list[str] = MISSING
    """Patterns of names of linear layers split by their inputs: the second of a pair."""

    def __post_init__(self) -> None:
        require(
            self.tensor_parallel_size == 1 or (len(self.colwise) > 0 and len(self.rowwise) > 0),
            "strategy.colwise and strategy.rowwise must name layers, got "
            f"{[*self.colwise, *self.rowwise]}; type strategy.tensor_parallel_size=1 to split none",
        )


@dataclass(kw_only=True)
class DeepSpeed(Processes):
    """DeepSpeed's engine: Lightning's DeepSpeedStrategy."""

    _target_: str = "app.strategy.deepspeed"
    stage: int = number(at_least=1, at_most=3, rule="be 1, 2 or 3", instead="type {key}=2")
    """What is sharded: 1 optimizer state, 2 gradients too, 3 weights too."""
    offload_optimizer: bool = MISSING
    """Keep the optimizer state in the memory of the CPU."""
    offload_parameters: bool = MISSING
    """Keep the weights there too; stage 3."""

    def __post_init__(self) -> None:
        require(
            self.stage == 3 or not self.offload_parameters,
            "strategy.offload_parameters must be false below stage 3, got "
            f"{self.offload_parameters}; use strategy=deepspeed_zero3_offload",
        )


PRESETS = {
    "single": Single,
    **dict.fromkeys(("ddp", "ddp_spawn", "ddp_find_unused"), Ddp),
    **dict.fromkeys(("fsdp", "tp_fsdp"), Sharded),
    **{
        f"deepspeed_zero{stage}{offload}": DeepSpeed
        for stage in (1, 2, 3)
        for offload in ("", "_offload")
    },
}
