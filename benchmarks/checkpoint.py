"""What it costs that a checkpoint is whole or refused: a CRC of the file, and its way to the disk.

`torch.save` and `torch.load` of the same content beside ours, in CPU seconds, for a small model and
a large one. Run as `python benchmarks/checkpoint.py`.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import torch
from side_by_side import cpu_seconds, in_turns, show, sized

from app.process.intact import _damage
from app.run.checkpoint import CheckpointFiles

SIZES = {
    "60 tensors of 10 kB": (60, 2_500),
    **sized({"60 tensors of 4 MB": (60, 1_000_000)}, {}),
}
ROUNDS = 15
OURS, PLAIN = "CheckpointFiles", "torch"
FILES = CheckpointFiles()


def measure(size: str, content: dict[str, Any], folder: Path) -> None:
    """Write and read the content both ways."""
    ours, plain = folder / "ours", folder / "plain"

    def load() -> None:
        _damage.cache_clear()  # or it is checked once
        FILES.load_checkpoint(ours)

    writes = {
        PLAIN: lambda: torch.save(content, plain),
        OURS: lambda: FILES.save_checkpoint(content, ours),
    }
    reads = {PLAIN: lambda: torch.load(plain, weights_only=True), OURS: load}
    for what, sides in (("written", writes), ("read", reads)):
        timed = {name: cpu_seconds(side, at_least=0.02) for name, side in sides.items()}
        show(f"{size}, {what}", in_turns(timed, rounds=ROUNDS), base=PLAIN, targets={})


def main() -> None:
    """Measure each size."""
    torch.set_num_threads(1)
    for size, (number, length) in SIZES.items():
        with TemporaryDirectory() as folder:
            weights = {str(i): torch.randn(length) for i in range(number)}
            content = {"state_dict": weights, "pytorch-lightning_version": pl.__version__}
            measure(size, content, Path(folder))


if __name__ == "__main__":
    main()
