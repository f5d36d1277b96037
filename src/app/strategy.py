"""The strategies of `conf/strategy`: Lightning's, as a configuration asks for them."""

from datetime import timedelta

from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy

from app.errors import Refused
from app.parallel.sharded import Blocks, Fsdp, Fsdp2

SHARDING = {"full": "FULL_SHARD", "gradients": "SHARD_GRAD_OP", "hybrid": "HYBRID_SHARD"}
"""What FSDP shards, in torch's words."""


def single() -> str:
    """One process on one device: Lightning's choice for what device there is."""
    return "auto"


def ddp(
    *,
    start_method: str,
    timeout_min: float,
    find_unused_parameters: bool,
    static_graph: bool,
    gradient_as_bucket_view: bool,
) -> DDPStrategy:
    """torch's DistributedDataParallel; `start_method` is the launcher's concern."""
    return DDPStrategy(
        timeout=timedelta(minutes=timeout_min),
        find_unused_parameters=find_unused_parameters,
        static_graph=static_graph,
        gradient_as_bucket_view=gradient_as_bucket_view,
    )


def fsdp(
    *,
    start_method: str,
    timeout_min: float,
    shard_classes: list[str],
    shard_min_parameters: int | None,
    offload: bool,
    sharding: str,
) -> Fsdp:
    """Fully sharded data parallel with flat parameters. Source: arXiv 2304.11277."""
    return Fsdp(
        timeout=timedelta(minutes=timeout_min),
        cpu_offload=offload,
        blocks=Blocks(shard_classes, shard_min_parameters),
        sharding_strategy=SHARDING[sharding],
        state_dict_type="full",
    )


def fsdp2(
    *,
    start_method: str,
    timeout_min: float,
    shard_classes: list[str],
    shard_min_parameters: int | None,
    offload: bool,
    reshard_after_forward: bool,
) -> Fsdp2:
    """Fully sharded data parallel parameter by parameter: torch's `fully_shard`."""
    return Fsdp2(
        blocks=Blocks(shard_classes, shard_min_parameters),
        offload=offload,
        reshard_after_forward=reshard_after_forward,
        tensor_parallel_size=1,
        colwise=[],
        rowwise=[],
        timeout_min=timeout_min,
    )


def tp_fsdp2(
    *,
    start_method: str,
    timeout_min: float,
    shard_classes: list[str],
    shard_min_parameters: int | None,
    offload: bool,
    reshard_after_forward: bool,
    tensor_parallel_size: int,
    colwise: list[str],
    rowwise: list[str],
) -> Fsdp2:
    """`fsdp2` over groups of devices that split linear layers between them."""
    return Fsdp2(
        blocks=Blocks(shard_classes, shard_min_parameters),
        offload=offload,
        reshard_after_forward=reshard_after_forward,
        tensor_parallel_size=tensor_parallel_size,
        colwise=colwise,
        rowwise=rowwise,
        timeout_min=timeout_min,
    )


def deepspeed(
    *,
    start_method: str,
    timeout_min: float,
    stage: int,
    offload_optimizer: bool,
    offload_parameters: bool,
) -> DeepSpeedStrategy:
    """DeepSpeed's ZeRO. Raises ImportError, saying what to install, where it is missing."""
    try:
        return DeepSpeedStrategy(
            timeout=timedelta(minutes=timeout_min),
            stage=stage,
            offload_optimizer=offload_optimizer,
            offload_parameters=offload_parameters,
        )
    except ModuleNotFoundError as error:
        raise Refused("strategy=deepspeed needs DeepSpeed: pip install 'app[deepspeed]'") from error
