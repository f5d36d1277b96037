"""GraphSAGE over sampled neighbourhoods."""

import torch
from torch import Tensor, nn

from app.models.classifier import Classifier


class MeanAggregation(nn.Module):
    """A linear layer over a node beside the mean of its neighbours.

    (..., 1 + fan-out, in_features), the node first, to (..., out_features).
    """

    def __init__(self, *, in_features: int, out_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * in_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        node, neighbours = x[..., 0, :], x[..., 1:, :]
        out: Tensor = self.linear(torch.cat([node, neighbours.mean(dim=-2)], dim=-1))
        return out


class GraphSage(Classifier):
    """Mean aggregations with ReLU between them, each of which takes in one more hop.

    Inputs have a dimension for each layer: (batch, 1 + f1, 1 + f2, in_features) for two. Source:
    arXiv 1706.02216, "mean" with concatenation; but embeddings are not normalised.
    """

    def __init__(self, *, in_features: int, num_classes: int, hidden_sizes: list[int]) -> None:
        layers: list[nn.Module] = []
        size = in_features
        for hidden_size in hidden_sizes:
            layers += [MeanAggregation(in_features=size, out_features=hidden_size), nn.ReLU()]
            size = hidden_size
        super().__init__(
            nn.Sequential(*layers, MeanAggregation(in_features=size, out_features=num_classes))
        )
