"""A multi-layer perceptron."""

from torch import nn

from app.models.classifier import Classifier


class Mlp(Classifier):
    """Linear layers with ReLU between them; `hidden_sizes=[]` is a linear classifier."""

    def __init__(self, *, in_features: int, num_classes: int, hidden_sizes: list[int]) -> None:
        layers: list[nn.Module] = []
        size = in_features
        for hidden_size in hidden_sizes:
            layers += [nn.Linear(size, hidden_size), nn.ReLU()]
            size = hidden_size
        super().__init__(nn.Sequential(*layers, nn.Linear(size, num_classes)))
