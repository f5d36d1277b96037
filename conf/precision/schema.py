"""The number format of weights and arithmetic.

| preset    | weights  | arithmetic | where                                             |
|-----------|----------|------------|---------------------------------------------------|
| fp32      | float32  | float32    | everywhere                                        |
| tf32      | float32  | tf32       | matrix products on GPUs since Ampere              |
| bf16      | float32  | bfloat16   | recent GPUs and CPUs: the usual choice            |
| fp16      | float32  | float16    | older GPUs; the loss is scaled (arXiv 1710.03740) |
| bf16_true | bfloat16 | bfloat16   | half the memory, less exact                       |
| fp8       | bfloat16 | float8     | linear layers on GPUs since Ada (arXiv 2209.05433) |
| fp64      | float64  | float64    | checking numerics                                 |

tf32 is about matrix products: convolutions on a GPU are in TF32 anyhow, which is cuDNN's default.
fp8 takes `pip install 'effective-training[fp8]'`, and acts on linear layers whose sizes are
multiples of 8 (in) and 16 (out); others are left in bfloat16.
"""

from dataclasses import dataclass
from enum import StrEnum

from omegaconf import MISSING

from ..rules import require

Matmul = StrEnum("Matmul", "highest high medium")
"""How exact a product of float32 matrices is: those of torch.set_float32_matmul_precision."""


@dataclass(kw_only=True)
class Precision:
    """Lightning's name of the format, and what is left of float32."""

    mode: str = MISSING
    """32-true, bf16-mixed, 16-mixed, bf16-true, transformer-engine or 64-true."""
    matmul: Matmul = MISSING
    """highest = float32, high = TF32, medium = bfloat16 inside products of float32 matrices."""

    def __post_init__(self) -> None:
        known = "32-true, bf16-mixed, 16-mixed, bf16-true, transformer-engine, 64-true"
        require(
            self.mode in known.split(", "),
            f"precision.mode must be one of {known}, got {self.mode}; use "
            f"precision={', '.join(PRESETS)}",
        )


PRESETS = dict.fromkeys(("fp32", "tf32", "bf16", "fp16", "bf16_true", "fp8", "fp64"), Precision)
