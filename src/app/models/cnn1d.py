"""A small convolutional network over a signal."""

from torch import nn

from app.models.classifier import Classifier


class Cnn1d(Classifier):
    """Convolutions over the signal, each followed by ReLU, then a linear head over what is left.

    Source: `ConvBase` of mnist1d (arXiv 2011.14439).
    """

    def __init__(
        self,
        *,
        in_features: int,
        num_classes: int,
        channels: int,
        kernel_sizes: list[int],
        stride: int,
        padding: int,
        batch_norm: bool,
    ) -> None:
        layers: list[nn.Module] = [nn.Unflatten(1, (1, in_features))]
        num_in, length = 1, in_features
        for kernel_size in kernel_sizes:
            length = (length + 2 * padding - kernel_size) // stride + 1
            layers.append(nn.Conv1d(num_in, channels, kernel_size, stride=stride, padding=padding))
            if batch_norm:
                layers.append(nn.BatchNorm1d(channels))
            layers.append(nn.ReLU())
            num_in = channels
        super().__init__(
            nn.Sequential(*layers, nn.Flatten(), nn.Linear(num_in * length, num_classes))
        )
