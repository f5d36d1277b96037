"""What a run is trained, validated and tested on; prediction reads the test part.

The small sets stay in memory and are served by slicing whole batches, in an order that depends only
on the run's seed and the epoch: `shuffle` draws nothing from the global RNG, and a run continues in
mid-epoch with exactly the next batch. Batches hold features (batch, num_features) float32 and
labels (batch,) int64; those of graph hold a node and the neighbours sampled for it in one more
dimension for each of `data.fanouts`.

| preset  | what it is                                                | source                    |
|---------|-----------------------------------------------------------|---------------------------|
| mnist1d | 15,000 generated signals, shipped: techniques show here   | arXiv 2011.14439          |
| digits  | 1,797 images of 8x8: a smoke test; needs the extra digits | scikit-learn load_digits  |
| graph   | 50,000 generated nodes, 1 M edges: for model=graphsage    | stochastic block model    |
| custom  | any LightningDataModule: data._target_=theirpkg.TheirData |                           |
| none    | the loaders of the model itself, with model=custom        |                           |
"""

from dataclasses import dataclass
from math import prod

from omegaconf import MISSING

from ..rules import count, number, require

LARGEST_SEED = 2**32 - 1
MOST_NEIGHBOURS = 100_000


@dataclass(kw_only=True)
class InMemoryData:
    """What every data set in memory has."""

    batch_size: int = count(instead="type {key}=128")
    """Samples in one training batch of one process, >= 1; the last of an epoch may be smaller."""
    eval_batch_size: int = count(instead="type {key}=128")
    """Samples in one batch of validation, test and prediction, >= 1."""
    shuffle: bool = MISSING
    """A new order of the training samples every epoch; false: the order of the file."""
    num_features: int = count(at_most=4096, instead="type {key}=32")
    """Features of a sample, a fact of the data; models read it."""
    num_classes: int = count(at_least=2, at_most=10_000, instead="type {key}=10")
    """Classes, a fact of the data; models read it."""


@dataclass(kw_only=True)
class Mnist1d(InMemoryData):
    """MNIST-1D: 4,000 signals to train, 1,000 to validate, 10,000 to test."""

    _target_: str = "app.data.mnist1d.Mnist1d"


@dataclass(kw_only=True)
class Digits(InMemoryData):
    """scikit-learn's handwritten digits, split by a seed of their own."""

    _target_: str = "app.data.digits.Digits"
    num_val: int = count(instead="type {key}=300")
    """Images to validate on, >= 1."""
    num_test: int = count(instead="type {key}=400")
    """Images to test on, >= 1; the rest of the 1,797 is trained on."""
    split_seed: int = count(at_least=0, at_most=LARGEST_SEED, instead="type {key}=0")
    """Seed of the split, >= 0; apart from the run's seed, so that runs can be compared."""


@dataclass(kw_only=True)
class Graph(InMemoryData):
    """A stochastic block model: nodes of a class are neighbours more often than others.

    Everything is generated, so num_features and num_classes can be chosen: both >= 1, at least 2
    classes.
    """

    _target_: str = "app.data.graph.Graph"
    num_nodes: int = count(at_most=10_000_000, instead="type {key}=50000")
    """Nodes, a multiple of num_classes: classes are of equal size."""
    degree_within: float = number(at_least=0, at_most=1000, instead="type {key}=18")
    """Neighbours of a node in its own class, >= 0, in the mean."""
    degree_between: float = number(at_least=0, at_most=1000, instead="type {key}=22")
    """Neighbours of a node in all other classes, >= 0, in the mean."""
    noise: float = number(at_least=0, at_most=1_000_000, instead="type {key}=5")
    """Standard deviation of a node's features, >= 0, where that of the means of classes is 1."""
    graph_seed: int = count(at_least=0, at_most=LARGEST_SEED, instead="type {key}=0")
    """Seed of the graph, its features and the split, >= 0; apart from the run's seed."""
    train_share: float = number(above=0, below=1, instead="type {key}=0.3")
    """Share of the nodes to train on, > 0."""
    val_share: float = number(above=0, below=1, instead="type {key}=0.1")
    """Share of the nodes to validate on, > 0; the nodes that are left are tested on."""
    fanouts: list[int] = count(at_most=1000, instead="type '{key}=[10,10]'")
    """Neighbours sampled at each hop, >= 1, with replacement; [] leaves the nodes' own features, as
    any model takes them."""

    def __post_init__(self) -> None:
        require(
            self.num_nodes % self.num_classes == 0,
            f"data.num_nodes must be a multiple of data.num_classes={self.num_classes}, got "
            f"{self.num_nodes}; type data.num_nodes={5000 * self.num_classes}",
        )
        num_train = int(self.train_share * self.num_nodes)
        num_val = int(self.val_share * self.num_nodes)
        require(
            min(num_train, num_val, self.num_nodes - num_train - num_val) >= 1,
            "data.train_share and data.val_share must leave each part one of the "
            f"{self.num_nodes} nodes, got {self.train_share} and {self.val_share}; type "
            "data.train_share=0.3 data.val_share=0.1",
        )
        require(
            prod(self.fanouts) <= MOST_NEIGHBOURS,
            f"data.fanouts must multiply to at most {MOST_NEIGHBOURS} neighbours of a node, got "
            f"{self.fanouts}; type 'data.fanouts=[10,10]'",
        )


PRESETS = {"mnist1d": Mnist1d, "digits": Digits, "graph": Graph, "custom": dict}
