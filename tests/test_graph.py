import pickle
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from omegaconf import OmegaConf

from app.config import refuse_values
from app.data.graph import Csr, Graph, NeighbourLoader, block_model, csr, sample_neighbourhoods
from app.data.in_memory import generator_of
from app.models.graphsage import GraphSage, MeanAggregation
from app.run.build import build

TINY = ("data.num_nodes=400", "data.batch_size=32", "data.fanouts=[3,2]")


def make(*overrides: str) -> Graph:
    with initialize_config_module("app.conf", version_base="1.3"):
        cfg = compose(overrides=["+data=graph", *TINY, *overrides])
    refuse_values(cfg)
    OmegaConf.to_object(cfg)
    return instantiate(cfg.data, _convert_="all")


def ready(*overrides: str) -> Graph:
    data = make(*overrides)
    data.setup("fit")
    return data


def tensors_of(data: Graph) -> list[torch.Tensor]:
    return [*data._graph, data._features, data._labels, data._order]


def equal(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def blocks(**changes: Any) -> Csr:
    settings = {"num_nodes": 1000, "num_classes": 5, "degree_within": 8.0, "degree_between": 4.0}
    return block_model(np.random.RandomState(0), **{**settings, **changes})


def edges(graph: Csr) -> torch.Tensor:
    """Both ends of every edge, int64 (2, num_edges)."""
    sources = torch.arange(len(graph.offsets) - 1).repeat_interleave(graph.offsets.diff())
    return torch.stack([sources, graph.neighbours])


# The graph


def test_an_edge_counts_once_loops_do_not_and_a_lonely_node_is_its_own_neighbour() -> None:
    graph = csr(np.array([0, 2, 0, 2, 3]), np.array([2, 0, 2, 4, 3]), num_nodes=6)
    assert graph.offsets.tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert graph.neighbours.tolist() == [2, 1, 0, 4, 3, 2, 5]


def test_every_edge_of_a_block_model_is_there_once_in_both_directions() -> None:
    sources, targets = edges(blocks())
    codes = sources * 1000 + targets
    assert (codes.diff() > 0).all()
    assert (sources != targets).all()
    assert torch.equal((targets * 1000 + sources).sort().values, codes)


@pytest.mark.parametrize(("within", "between"), [(8.0, 4.0), (6.0, 0.0), (0.0, 6.0)])
def test_nodes_have_as_many_neighbours_of_each_kind_as_asked_for(
    within: float, between: float
) -> None:
    graph = blocks(num_nodes=20_000, degree_within=within, degree_between=between)
    sources, targets = edges(graph)
    same = (sources % 5 == targets % 5) & (sources != targets)
    assert same.sum() / 20_000 == pytest.approx(within, abs=0.05)
    assert (sources % 5 != targets % 5).sum() / 20_000 == pytest.approx(between, abs=0.05)


def test_the_graph_is_the_same_on_every_machine() -> None:
    data = ready()
    assert zlib.crc32(data._graph.neighbours.numpy().tobytes()) == 60154119
    assert data._order[:4].tolist() == [355, 20, 112, 53]
    assert data._features[0, :3].tolist() == pytest.approx([-0.01044973, 1.86371791, -1.58112764])


def test_the_graph_depends_on_its_own_seed_only() -> None:
    first = ready()
    torch.manual_seed(123)
    np.random.seed(123)
    assert equal(tensors_of(ready()), tensors_of(first))
    other = tensors_of(ready("data.graph_seed=1"))
    assert not torch.equal(other[1], first._graph.neighbours)
    assert not torch.equal(other[2], first._features)
    assert not torch.equal(other[4], first._order)


def test_parts_are_the_shares_asked_for_of_all_nodes() -> None:
    data = ready("data.train_share=0.5", "data.val_share=0.2")
    loaders = data.train_dataloader(), data.val_dataloader(), data.test_dataloader()
    nodes = [loader.dataset.tensors[0] for loader in loaders]
    assert [len(part) for part in nodes] == [200, 80, 120]
    assert torch.cat(nodes).unique().tolist() == list(range(400))


def test_features_are_the_mean_of_the_class_where_there_is_no_noise() -> None:
    data = ready("data.noise=0")
    assert torch.equal(data._features[0], data._features[10])
    assert not torch.equal(data._features[0], data._features[1])
    assert ready("data.num_nodes=5000")._features.std() == pytest.approx(1, abs=0.1)


def test_it_is_generated_once_and_pickled_with_what_was_generated() -> None:
    data = ready()
    before = tensors_of(data)
    data.setup("test")
    assert all(a is b for a, b in zip(tensors_of(data), before, strict=True))
    copy = pickle.loads(pickle.dumps(data))
    assert equal(next(iter(copy.test_dataloader())), next(iter(data.test_dataloader())))


def test_loaders_share_the_graph_and_its_features() -> None:
    data = ready()
    train, val = data.train_dataloader(), data.val_dataloader()
    assert train.features is val.features is data._features
    assert train.graph is val.graph is data._graph


# The sampler


def test_a_node_comes_first_and_then_neighbours_of_it() -> None:
    graph = blocks()
    nodes = torch.tensor([7, 0, 7])
    sampled = sample_neighbourhoods(nodes, graph, fanouts=[4, 3], generator=generator_of(0))
    assert sampled.shape == (3, 5, 4)
    assert torch.equal(sampled[:, 0, 0], nodes)
    for hop in (sampled[:, :, 0], *sampled.unbind(1)):
        for node, *drawn in hop.tolist():
            first, last = graph.offsets[node : node + 2].tolist()
            assert set(drawn) <= set(graph.neighbours[first:last].tolist())


def test_neighbours_are_drawn_uniformly_with_replacement() -> None:
    graph = csr(np.array([0, 0, 0]), np.array([1, 2, 3]), num_nodes=4)
    sampled = sample_neighbourhoods(
        torch.tensor([0]), graph, fanouts=[30_000], generator=generator_of(0)
    )
    assert sampled[0, 1:].bincount().tolist() == pytest.approx([0, 1e4, 1e4, 1e4], rel=0.05)


def test_a_lonely_node_is_sampled_as_its_own_neighbour() -> None:
    graph = csr(np.array([0]), np.array([1]), num_nodes=3)
    sampled = sample_neighbourhoods(
        torch.tensor([2]), graph, fanouts=[2, 2], generator=generator_of(0)
    )
    assert (sampled == 2).all()


# The loader


def test_a_batch_holds_features_of_the_nodes_and_of_their_neighbours() -> None:
    data = ready()
    x, y = next(iter(data.test_dataloader()))
    nodes, labels = data.test_dataloader().dataset.tensors
    assert x.shape == (240, 4, 3, 32)
    assert torch.equal(y, labels)
    assert torch.equal(y, nodes % 10)
    assert torch.equal(x[:, 0, 0], data._features[nodes])


def test_without_fanouts_a_batch_holds_the_features_of_the_nodes() -> None:
    data = ready("data.fanouts=[]")
    x, _ = next(iter(data.test_dataloader()))
    assert torch.equal(x, data._features[data.test_dataloader().dataset.tensors[0]])


def test_samples_depend_on_the_seed_the_epoch_and_the_batch_and_on_nothing_else() -> None:
    data = ready("data.shuffle=false")

    def serve(seed: int) -> NeighbourLoader:
        torch.manual_seed(seed)
        return data.train_dataloader()

    loader, same, other = serve(1), serve(1), serve(2)
    first, second, others = ([x for x, _ in epoch] for epoch in (loader, loader, other))
    before = torch.get_rng_state()
    assert equal([x for x, _ in same], first)
    assert torch.equal(torch.get_rng_state(), before)
    assert equal([x[:, 0, 0] for x in second], [x[:, 0, 0] for x in first])
    for one, two in zip(first, second, strict=True):
        assert not torch.equal(one, two)
    assert not equal(others, first)
    index = torch.arange(8)
    assert equal(loader.batch(index, epoch=3), same.batch(index, epoch=3))
    assert loader.batch(index[:0], epoch=3)[0].shape == (0, 4, 3, 32)


def test_an_evaluation_sees_the_same_samples_every_time() -> None:
    data = ready()
    loader = data.val_dataloader()
    first = [x for x, _ in loader]
    torch.manual_seed(123)
    assert equal([x for x, _ in loader], first)
    assert equal([x for x, _ in data.val_dataloader()], first)


def test_a_resumed_epoch_goes_on_with_the_same_samples() -> None:
    data = ready()
    torch.manual_seed(1)
    old = data.train_dataloader()
    list(old)
    batches = iter(old)
    next(batches)
    torch.manual_seed(2)
    new = data.train_dataloader()
    new.load_state_dict(old.state_dict())
    for mine, other in zip(new, batches, strict=True):
        assert equal(mine, other)


# The model


def test_an_aggregation_is_a_linear_layer_over_the_node_and_the_mean_of_its_neighbours() -> None:
    layer = MeanAggregation(in_features=2, out_features=3)
    x = torch.randn(4, 6, 5, 2)
    own, neighbours = layer.linear.weight.split(2, dim=1)
    expected = x[:, :, 0] @ own.T + x[:, :, 1:].mean(2) @ neighbours.T + layer.linear.bias
    assert torch.allclose(layer(x), expected, atol=1e-6)


def test_it_has_the_documented_number_of_parameters() -> None:
    model = GraphSage(in_features=32, num_classes=10, hidden_sizes=[64])
    assert sum(parameter.numel() for parameter in model.parameters()) == 5450


def test_neighbours_tell_more_than_a_node_does_itself(
    checked: Callable[..., dict[str, Any]],
) -> None:
    def accuracy(*overrides: str) -> float:
        small = [key for key in SMALL if not key.startswith("model.")]
        quick = "trainer.limit_train_batches=null", "trainer.limit_test_batches=null"
        config = checked(*small, *quick, "data=graph", "data.num_nodes=5000", *overrides)
        run = build(config, [])
        run.trainer.fit(run.model, datamodule=run.data)
        return run.trainer.test(run.model, run.data, verbose=False)[0]["test_acc"]

    own = accuracy("model=mlp", "model.hidden_sizes=[]", "data.fanouts=[]")
    assert 0.2 < own < 0.4
    assert accuracy("model=graphsage") > own + 0.15


# What is refused


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "data.num_nodes=405",
            "data.num_nodes must be a multiple of data.num_classes=10, got 405; type "
            "data.num_nodes=50000",
        ),
        ("data.num_classes=1", "data.num_classes must be >= 2, got 1; type data.num_classes=10"),
        ("data.noise=-1", "data.noise must be >= 0, got -1.0; type data.noise=5"),
        ("data.graph_seed=-1", "data.graph_seed must be >= 0, got -1; type data.graph_seed=0"),
        (
            "data.val_share=0.7",
            "data.train_share and data.val_share must leave each part one of the 400 nodes, got "
            "0.3 and 0.7; type data.train_share=0.3 data.val_share=0.1",
        ),
        (
            "data.fanouts=[10,0]",
            "data.fanouts must be numbers >= 1, got [10, 0]; type 'data.fanouts=[10,10]'",
        ),
    ],
)
def test_a_value_out_of_range_is_refused(override: str, message: str) -> None:
    with pytest.raises(ValueError, match="must") as error:
        make(override)
    assert str(error.value) == message
