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

from ..rules import require


@dataclass(kw_only=True)
class Cnn1d:
    """Convolutions over the signal, then a linear head."""

    _target_: str = "app.models.cnn1d.Cnn1d"
    in_features: int = MISSING
    """Length of the signal, >= 1; the data's."""
    num_classes: int = MISSING
    """Classes, >= 1; the data's."""
    channels: int = MISSING
    """Output channels of every layer, >= 1."""
    kernel_sizes: list[int] = MISSING
    """Width of each layer's kernel, >= 1; as many layers as numbers, at least one."""
    stride: int = MISSING
    """Step of every kernel, >= 1."""
    padding: int = MISSING
    """Zeros at either end of every layer's input, >= 0."""
    batch_norm: bool = MISSING
    """Batch norm between each convolution and its ReLU."""

    def __post_init__(self) -> None:
        require(
            self.channels >= 1, "model.channels", "be >= 1", self.channels, "type model.channels=25"
        )
        require(
            len(self.kernel_sizes) > 0 and min(self.kernel_sizes) >= 1,
            "model.kernel_sizes",
            "be one or more numbers >= 1",
            self.kernel_sizes,
            "type 'model.kernel_sizes=[5,3,3]'",
        )
        require(self.stride >= 1, "model.stride", "be >= 1", self.stride, "type model.stride=2")
        require(self.padding >= 0, "model.padding", "be >= 0", self.padding, "type model.padding=1")
        length = self.in_features
        for kernel_size in self.kernel_sizes:
            length = (length + 2 * self.padding - kernel_size) // self.stride + 1
            require(
                length >= 1,
                "model.kernel_sizes",
                f"fit into the {self.in_features} features of the data",
                self.kernel_sizes,
                "use fewer layers or a smaller model.stride",
            )


@dataclass(kw_only=True)
class Mlp:
    """Linear layers with ReLU between them."""

    _target_: str = "app.models.mlp.Mlp"
    in_features: int = MISSING
    """Features of a sample, >= 1; the data's."""
    num_classes: int = MISSING
    """Classes, >= 1; the data's."""
    hidden_sizes: list[int] = MISSING
    """Units of each hidden layer, >= 1; [] is a linear classifier."""

    def __post_init__(self) -> None:
        require(
            all(size >= 1 for size in self.hidden_sizes),
            "model.hidden_sizes",
            "be numbers >= 1",
            self.hidden_sizes,
            "type 'model.hidden_sizes=[100,100]'",
        )


@dataclass(kw_only=True)
class GraphSage:
    """Layers that join a node with the mean of its neighbours, with ReLU between them."""

    _target_: str = "app.models.graphsage.GraphSage"
    in_features: int = MISSING
    """Features of a node, >= 1; the data's."""
    num_classes: int = MISSING
    """Classes, >= 1; the data's."""
    hidden_sizes: list[int] = MISSING
    """Units between the layers, >= 1; a layer more than numbers, and as many as data.fanouts."""

    def __post_init__(self) -> None:
        require(
            all(size >= 1 for size in self.hidden_sizes),
            "model.hidden_sizes",
            "be numbers >= 1",
            self.hidden_sizes,
            "type 'model.hidden_sizes=[64]'",
        )


@dataclass(kw_only=True)
class Transformer:
    """A transformer encoder over the patches of the signal."""

    _target_: str = "app.models.transformer.Transformer"
    in_features: int = MISSING
    """Length of the signal, >= 1; the data's."""
    num_classes: int = MISSING
    """Classes, >= 1; the data's."""
    patch_size: int = MISSING
    """Features in one patch, >= 1; divides in_features."""
    dim: int = MISSING
    """Width of an embedded patch, >= 1; a multiple of num_heads."""
    num_layers: int = MISSING
    """Encoder layers, >= 1."""
    num_heads: int = MISSING
    """Attention heads of a layer, >= 1."""
    mlp_dim: int = MISSING
    """Hidden units of a layer's feed-forward part, >= 1."""
    dropout: float = MISSING
    """Probability of dropping an activation while training, 0 <= dropout < 1."""

    def __post_init__(self) -> None:
        for key in ("patch_size", "dim", "num_layers", "num_heads", "mlp_dim"):
            size = getattr(self, key)
            require(size >= 1, f"model.{key}", "be >= 1", size, f"type model.{key}=4")
        require(
            self.in_features % self.patch_size == 0,
            "model.patch_size",
            f"divide the {self.in_features} features of the data",
            self.patch_size,
            "type model.patch_size=4",
        )
        require(
            self.dim % self.num_heads == 0,
            "model.num_heads",
            f"divide model.dim={self.dim}",
            self.num_heads,
            "type model.num_heads=1",
        )
        require(
            0 <= self.dropout < 1,
            "model.dropout",
            "be >= 0 and < 1",
            self.dropout,
            "type model.dropout=0",
        )


PRESETS = {
    "cnn1d": Cnn1d,
    "cnn1d_bn": Cnn1d,
    "mlp": Mlp,
    "graphsage": GraphSage,
    "transformer": Transformer,
}
