"""What a precision asks of the device."""

import torch

from app.errors import Refused

AMPERE = (8, 0)
ADA = (8, 9)


def use_matmul(matmul: str, *, mode: str, accelerator: str) -> None:
    """Set how exact products of float32 matrices are, for the whole process.

    Acts when the trainer is built. Raises Refused where the device has no arithmetic for
    `matmul` (high or medium; highest is everywhere) or `mode` (transformer-engine).
    """
    if matmul == "high":
        _require_gpu("tf32", "Ampere", AMPERE, "fp32", accelerator)
    if mode == "transformer-engine":
        _require_gpu("fp8", "Ada", ADA, "bf16", accelerator)
    torch.set_float32_matmul_precision(matmul)


def _require_gpu(
    preset: str, family: str, capability: tuple[int, int], instead: str, accelerator: str
) -> None:
    """Raise ValueError where there is no NVIDIA GPU of this compute capability, or none is used."""
    if accelerator == "cpu" or not torch.cuda.is_available():
        found = "there is none here" if accelerator != "cpu" else "trainer.accelerator is cpu"
    elif torch.version.hip is None and torch.cuda.get_device_capability() < capability:
        found = f"this is a {torch.cuda.get_device_name()}"
    else:
        return
    raise Refused(
        f"precision={preset} needs a GPU since {family}, and {found}; use precision={instead}"
    )
