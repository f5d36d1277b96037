"""The strategies of `conf/strategy` that are Lightning's, as a configuration asks for them."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from torch import Tensor
from torch.nn.parameter import is_lazy

from app import pip_install
from app.errors import Refused
from app.parallel.split import KeepsRandomState

UNUSED = ("not used in producing the loss", "Expected to have finished reduction")
"""Of what Lightning and torch say where a step leaves parameters out."""


class DDP(KeepsRandomState, DDPStrategy):
    """Lightning's, in which a run draws on as it does in one process.

    Raises Refused where it cannot wrap the model, or a step leaves parameters out.
    """

    def configure_ddp(self) -> None:
        model = self.lightning_module
        assert model is not None
        lazy = next((name for name, p in model.named_parameters() if is_lazy(p)), None)
        if lazy is not None:
            raise Refused(
                f"strategy=ddp cannot wrap {type(model).__name__}, of which {lazy} has no shape "
                "before the first batch; run a batch through it in configure_model, or type "
                "strategy=single"
            )
        super().configure_ddp()

    def pre_backward(self, closure_loss: Tensor) -> None:
        with self._knows_unused():
            super().pre_backward(closure_loss)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with self._knows_unused():
            return super().training_step(*args, **kwargs)

    @contextmanager
    def _knows_unused(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if not any(text in str(error) for text in UNUSED):
                raise
            raise Refused(
                f"strategy=ddp must be told that a step of {type(self.lightning_module).__name__} "
                "leaves parameters out; type strategy=ddp_find_unused"
            ) from error


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
