"""The number format of weights and arithmetic.

| preset    | weights  | arithmetic | where                                            |
|-----------|----------|------------|--------------------------------------------------|
| fp32      | float32  | float32    | everywhere                                       |
| bf16      | float32  | bfloat16   | recent GPUs and CPUs: the usual choice           |
| fp16      | float32  | float16    | older GPUs; the loss is scaled (arXiv 1710.03740) |
| bf16_true | bfloat16 | bfloat16   | half the memory, less exact                      |
| fp64      | float64  | float64    | checking numerics                                |
"""

from dataclasses import dataclass

from omegaconf import MISSING


@dataclass(kw_only=True)
class Precision:
    """Lightning's name of the format."""

    mode: str = MISSING
    """32-true, bf16-mixed, 16-mixed, bf16-true or 64-true."""

    def __post_init__(self) -> None:
        known = ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true")
        if self.mode not in known:
            raise ValueError(
                f"precision.mode must be one of {', '.join(known)}, got {self.mode}; "
                "use precision=fp32, bf16, fp16, bf16_true or fp64"
            )


PRESETS = dict.fromkeys(("fp32", "bf16", "fp16", "bf16_true", "fp64"), Precision)
