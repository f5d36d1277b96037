"""The strategies of `conf/strategy` that are Lightning's, as a configuration asks for them."""

from datetime import timedelta

from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy

from app import pip_install
from app.errors import Refused
from app.parallel.split import KeepsRandomState


class DDP(KeepsRandomState, DDPStrategy):
    """Lightning's, in which a run draws on as it does in one process."""


class DeepSpeed(KeepsRandomState, DeepSpeedStrategy):
    """Lightning's, in which a run draws on as it does in one process."""


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
    return DDP(
        timeout=timedelta(minutes=timeout_min),
        find_unused_parameters=find_unused_parameters,
        static_graph=static_graph,
        gradient_as_bucket_view=gradient_as_bucket_view,
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
        return DeepSpeed(
            timeout=timedelta(minutes=timeout_min),
            stage=stage,
            offload_optimizer=offload_optimizer,
            offload_parameters=offload_parameters,
        )
    except ModuleNotFoundError as error:
        install = pip_install("deepspeed")
        raise Refused(f"strategy=deepspeed needs DeepSpeed; type {install}") from error
