"""A generated graph whose nodes are classified: noisy features alone, better with neighbours."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from app.data.in_memory import InMemoryLoader, generator_of

Integers = npt.NDArray[np.int64]


class Csr(NamedTuple):
    """Node i is followed by `neighbours[offsets[i] : offsets[i + 1]]`, in order; never by none."""

    offsets: Tensor
    """int64 (num_nodes + 1,)"""
    neighbours: Tensor
    """int64 (offsets[-1],)"""


def csr(sources: Integers, targets: Integers, *, num_nodes: int) -> Csr:
    """Return the undirected graph of the edges (num_edges,), each of which counts once.

    Loops are left out; but a node without neighbours becomes its own.
    """
    proper = sources != targets
    sources, targets = sources[proper], targets[proper]
    ends = np.bincount(np.concatenate([sources, targets]), minlength=num_nodes)
    alone = np.flatnonzero(ends == 0)
    codes = np.concatenate(
        [sources * num_nodes + targets, targets * num_nodes + sources, alone * (num_nodes + 1)]
    )
    codes.sort()
    codes = codes[np.diff(codes, prepend=-1) > 0]  # np.unique takes eight times as long
    degrees = np.bincount(codes // num_nodes, minlength=num_nodes)
    offsets = np.concatenate([[0], np.cumsum(degrees)])
    return Csr(offsets=torch.from_numpy(offsets), neighbours=torch.from_numpy(codes % num_nodes))


def block_model(
    rng: np.random.RandomState,
    *,
    num_nodes: int,
    num_classes: int,
    degree_within: float,
    degree_between: float,
) -> Csr:
    """Return a stochastic block model in which node i is of class i % num_classes.

    Source: Holland, Laskey, Leinhardt 1983; but the number of edges is given, not drawn, and those
    drawn twice count once: about one in a hundred where a class has 50 times the degree.
    """

    def nodes_of(classes: Integers) -> Integers:
        members = rng.randint(num_nodes // num_classes, size=len(classes), dtype=np.int64)
        return members * num_classes + classes

    num_within, num_between = (
        round(num_nodes * degree / 2) for degree in (degree_within, degree_between)
    )
    classes = rng.randint(num_classes, size=num_within + num_between, dtype=np.int64)
    others = classes.copy()
    others[num_within:] += rng.randint(1, num_classes, size=num_between, dtype=np.int64)
    others %= num_classes
    return csr(nodes_of(classes), nodes_of(others), num_nodes=num_nodes)


def noisy_features(
    rng: np.random.RandomState, labels: Integers, *, num_features: int, noise: float
) -> Tensor:
    """Return the mean of each node's class plus `noise` times as much of its own.

    float32 (num_nodes, num_features), of variance about 1.
    """
    means = rng.standard_normal((int(labels.max()) + 1, num_features))
    own = rng.standard_normal((len(labels), num_features))
    features = (means[labels] + noise * own) / np.sqrt(1 + noise**2)
    return torch.from_numpy(features.astype(np.float32))


def sample_neighbourhoods(
    nodes: Tensor, graph: Csr, *, fanouts: list[int], generator: torch.Generator
) -> Tensor:
    """Return each node with its sampled neighbours, with theirs, ...: int64 (n, 1 + f1, 1 + f2).

    Every fan-out adds a dimension, in which a node comes first and then as many of its neighbours,
    drawn uniformly with replacement. So the mean over neighbours is `x[..., 1:].mean(-1)`.
    """
    for fanout in fanouts:
        flat = nodes.flatten()
        starts = graph.offsets.index_select(0, flat)
        degrees = graph.offsets.index_select(0, flat + 1) - starts
        drawn = torch.rand(len(flat), fanout, generator=generator)
        # Below 2**24, a degree times a float32 below 1 is never rounded up to the degree.
        places = starts[:, None] + (drawn * degrees[:, None]).long()
        sampled = graph.neighbours.index_select(0, places.flatten()).view_as(places)
        nodes = torch.cat([flat[:, None], sampled], dim=1).view(*nodes.shape, 1 + fanout)
    return nodes


class NeighbourLoader(InMemoryLoader):
    """Batches of features (batch, 1 + f1, 1 + f2, num_features) float32 and labels (batch,) int64.

    The tensors of its data set are node ids and labels, (n,) both. What is sampled is a function of
    the seed, the epoch and the batch: the global RNG is left alone, and a resumed run continues
    with the same samples.
    """

    def __init__(
        self,
        *,
        tensors: tuple[Tensor, Tensor],
        batch_size: int,
        shuffle: bool,
        drop_last: bool,
        seed: int | None,
        graph: Csr,
        features: Tensor,
        fanouts: list[int],
        resample: bool,
    ) -> None:
        """`resample=False` samples every epoch like the first."""
        super().__init__(
            tensors=tensors,
            batch_size=batch_size,
            shuffle=shuffle,
            drop_last=drop_last,
            seed=seed,
        )
        self.graph = graph
        self.features = features
        self.fanouts = fanouts
        self.resample = resample

    def batch(self, index: Tensor, *, epoch: int) -> tuple[Tensor, Tensor]:
        nodes, labels = super().batch(index, epoch=epoch)
        generator = generator_of(self._seed, epoch if self.resample else 0, *index[:1].tolist())
        sampled = sample_neighbourhoods(
            nodes, self.graph, fanouts=self.fanouts, generator=generator
        )
        features = self.features.index_select(0, sampled.flatten())
        return features.view(*sampled.shape, self.features.shape[1]), labels


class Graph(LightningDataModule):
    """A stochastic block model with noisy features; a random part of its nodes is trained on.

    Everything is a function of `graph_seed` and the other settings, on every machine; so are the
    samples that an evaluation sees. Training takes its samples from the run's seed.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        eval_batch_size: int,
        shuffle: bool,
        num_features: int,
        num_classes: int,
        num_nodes: int,
        degree_within: float,
        degree_between: float,
        noise: float,
        graph_seed: int,
        train_share: float,
        val_share: float,
        fanouts: list[int],
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.shuffle = shuffle
        self.num_features = num_features
        self.num_classes = num_classes
        self.num_nodes = num_nodes
        self.degree_within = degree_within
        self.degree_between = degree_between
        self.noise = noise
        self.graph_seed = graph_seed
        self.train_share = train_share
        self.val_share = val_share
        self.fanouts = fanouts
        self._graph: Csr | None = None

    def setup(self, stage: str) -> None:
        """Generate the graph, once."""
        if self._graph is not None:
            return
        # numpy promises the stream of RandomState, and that of no other generator, for ever.
        rng = np.random.RandomState(np.random.MT19937(self.graph_seed))
        self._graph = block_model(
            rng,
            num_nodes=self.num_nodes,
            num_classes=self.num_classes,
            degree_within=self.degree_within,
            degree_between=self.degree_between,
        )
        labels = np.arange(self.num_nodes) % self.num_classes
        self._features = noisy_features(
            rng, labels, num_features=self.num_features, noise=self.noise
        )
        self._labels = torch.from_numpy(labels)
        self._order = torch.from_numpy(rng.permutation(self.num_nodes))

    def train_dataloader(self) -> NeighbourLoader:
        nodes, _, _ = self._parts()
        return self._loader(
            nodes, batch_size=self.batch_size, shuffle=self.shuffle, seed=None, resample=True
        )

    def val_dataloader(self) -> NeighbourLoader:
        _, nodes, _ = self._parts()
        return self._in_order(nodes)

    def test_dataloader(self) -> NeighbourLoader:
        _, _, nodes = self._parts()
        return self._in_order(nodes)

    def predict_dataloader(self) -> NeighbourLoader:
        return self.test_dataloader()

    def _parts(self) -> tuple[Tensor, ...]:
        """Ids of the nodes of each part: train, val, test."""
        num_train, num_val = (
            int(share * self.num_nodes) for share in (self.train_share, self.val_share)
        )
        return self._order.tensor_split((num_train, num_train + num_val))

    def _in_order(self, nodes: Tensor) -> NeighbourLoader:
        return self._loader(
            nodes,
            batch_size=self.eval_batch_size,
            shuffle=False,
            seed=self.graph_seed,
            resample=False,
        )

    def _loader(
        self, nodes: Tensor, *, batch_size: int, shuffle: bool, seed: int | None, resample: bool
    ) -> NeighbourLoader:
        assert self._graph is not None
        return NeighbourLoader(
            tensors=(nodes, self._labels[nodes]),
            batch_size=batch_size,
            shuffle=shuffle,
            drop_last=False,
            seed=seed,
            graph=self._graph,
            features=self._features,
            fanouts=self.fanouts,
            resample=resample,
        )
