"""The model of a run: a LightningModule that knows its loss and its metrics, not its optimizer.

Every preset is a classifier of signals (batch, in_features), graphsage one of nodes with their
neighbours; the size of the signal and the number of classes are read from the data. Validation logs
`val_loss` and `val_acc`, test `test_loss` and `test_acc`.

| preset      | what it is                                                  | source           |
|-------------|-------------------------------------------------------------|------------------|
| cnn1d       | three convolutions of 25 channels, 5,210 parameters         | arXiv 2011.14439 |
| cnn1d_bn    | the same with batch norm, whose statistics techniques must keep right |        |
| mlp         | two hidden layers                                           | arXiv 2011.14439 |
| transformer | two layers over patches of four                             | arXiv 2010.11929 |
| graphsage   | two layers over means of neighbours, 5,450 parameters       | arXiv 1706.02216 |
| custom      | any LightningModule: model._target_=theirpkg.LitModel       |                  |
"""

from dataclasses import dataclass

from omegaconf import MISSING

from ..rules import count, number, require

WIDEST = 8192
DEEPEST = 1000


@dataclass(kw_only=True)
class Classifier:
    """What every model has."""

    in_features: int = count(at_most=1_000_000, instead="type {key}=40")
    """Features of a sample, such as the length of a signal, >= 1; the data's."""
    num_classes: int = count(at_most=1_000_000, instead="type {key}=10")
    """Classes, >= 1; the data's."""


@dataclass(kw_only=True)
class Cnn1d(Classifier):
    """Convolutions over the signal, then a linear head."""

    _target_: str = "app.models.cnn1d.Cnn1d"
    channels: int = count(at_most=4096, instead="type {key}=25")
    """Output channels of every layer, >= 1."""
    kernel_sizes: list[int] = number(
        at_least=1,
        at_most=1000,
        rule="be one or more numbers >= 1",
        instead="type '{key}=[5,3,3]'",
    )
    """Width of each layer's kernel, >= 1; as many layers as numbers, at least one."""
    stride: int = count(at_most=1000, instead="type {key}=2")
    """Step of every kernel, >= 1."""
    padding: int = count(at_least=0, at_most=1000, instead="type {key}=1")
    """Zeros at either end of every layer's input, >= 0."""
    batch_norm: bool = MISSING
    """Batch norm between each convolution and its ReLU."""

    def __post_init__(self) -> None:
        require(
            0 < len(self.kernel_sizes) <= DEEPEST,
            f"model.kernel_sizes must be one or more numbers >= 1, got {self.kernel_sizes}; type "
            "'model.kernel_sizes=[5,3,3]'",
        )
        length = self.in_features
        for kernel_size in self.kernel_sizes:
            length = (length + 2 * self.padding - kernel_size) // self.stride + 1
            require(
                length >= 1,
                f"model.kernel_sizes must fit into the {self.in_features} features of the data, "
                f"got {self.kernel_sizes}; use fewer layers or a smaller model.stride",
            )


@dataclass(kw_only=True)
class Mlp(Classifier):
    """Linear layers with ReLU between them."""

    _target_: str = "app.models.mlp.Mlp"
    hidden_sizes: list[int] = count(at_most=WIDEST, instead="type '{key}=[64]'")
    """Units of each hidden layer, >= 1; [] is a linear classifier."""


@dataclass(kw_only=True)
class GraphSage(Classifier):
    """Layers that join a node with the mean of its neighbours, with ReLU between them."""

    _target_: str = "app.models.graphsage.GraphSage"
    hidden_sizes: list[int] = count(at_most=WIDEST, instead="type '{key}=[64]'")
    """Units between the layers, >= 1; a layer more than numbers, and as many as data.fanouts."""


@dataclass(kw_only=True)
class Transformer(Classifier):
    """A transformer encoder over the patches of the signal."""

    _target_: str = "app.models.transformer.Transformer"
    patch_size: int = count(at_most=WIDEST, instead="type {key}=4")
    """Features in one patch, >= 1; divides in_features."""
    dim: int = count(at_most=WIDEST, instead="type {key}=4")
    """Width of an embedded patch, >= 1; a multiple of num_heads."""
    num_layers: int = count(at_most=DEEPEST, instead="type {key}=4")
    """Encoder layers, >= 1."""
    num_heads: int = count(at_most=WIDEST, instead="type {key}=4")
    """Attention heads of a layer, >= 1."""
    mlp_dim: int = count(at_most=4 * WIDEST, instead="type {key}=4")
    """Hidden units of a layer's feed-forward part, >= 1."""
    dropout: float = number(at_least=0, below=1, rule="be >= 0 and < 1", instead="type {key}=0")
    """Probability of dropping an activation while training, 0 <= dropout < 1."""

    def __post_init__(self) -> None:
        require(
            self.in_features % self.patch_size == 0,
            f"model.patch_size must divide the {self.in_features} features of the data, got "
            f"{self.patch_size}; type model.patch_size=4",
        )
        require(
            self.dim % self.num_heads == 0,
            f"model.num_heads must divide model.dim={self.dim}, got {self.num_heads}; type "
            "model.num_heads=1",
        )


PRESETS = {
    "cnn1d": Cnn1d,
    "cnn1d_bn": Cnn1d,
    "mlp": Mlp,
    "graphsage": GraphSage,
    "transformer": Transformer,
    "custom": dict,
}
