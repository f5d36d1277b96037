"""An epoch of `InMemoryLoader` against a DataLoader that fetches and collates sample by sample.

Target: at most 0.3 of the time of `DataLoader(TensorDataset(...))`, shuffled, for each shape of a
sample. Run as `python benchmarks/loader.py`.
"""

import torch
from side_by_side import cpu_seconds, in_turns, show, sized
from torch.utils.data import DataLoader, TensorDataset

from app.data.in_memory import InMemoryLoader

SHAPES = ((64,), (3, 32, 32), (1, 28, 28))
NUM_SAMPLES = sized(8192, 256)
BATCH_SIZE = 128
ROUNDS = 25
OURS, PEER, LESS = "InMemoryLoader", "DataLoader, per sample", "DataLoader, a batch an index"


class WholeBatches(TensorDataset):
    """Answers DataLoader's question for many samples at once, a hook that few data sets have."""

    def __getitems__(self, indices: list[int]) -> tuple[torch.Tensor, ...]:
        return self[torch.tensor(indices)]


def main() -> None:
    """Measure each shape."""
    torch.set_num_threads(1)
    for shape in SHAPES:
        tensors = (torch.randn(NUM_SAMPLES, *shape), torch.randint(10, (NUM_SAMPLES,)))
        loaders = {
            PEER: DataLoader(TensorDataset(*tensors), BATCH_SIZE, shuffle=True),
            LESS: DataLoader(
                WholeBatches(*tensors), BATCH_SIZE, shuffle=True, collate_fn=lambda batch: batch
            ),
            OURS: InMemoryLoader(
                tensors=tensors, batch_size=BATCH_SIZE, shuffle=True, drop_last=False, seed=0
            ),
        }
        contestants = {
            name: cpu_seconds(lambda loader=loader: sum(1 for _ in loader), at_least=0.02)
            for name, loader in loaders.items()
        }
        costs = in_turns(contestants, rounds=ROUNDS)
        size = "x".join(map(str, shape))
        show(f"an epoch of samples of {size} floats", costs, base=PEER, targets={OURS: 0.3})


if __name__ == "__main__":
    main()
