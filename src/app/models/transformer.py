"""A small transformer encoder over the patches of a signal."""

import torch
from torch import Tensor, nn

from app.models.classifier import Classifier


class Patches(nn.Module):
    """Cut a signal (batch, in_features) into embedded patches (batch, in_features / size, dim)."""

    def __init__(self, *, in_features: int, patch_size: int, dim: int) -> None:
        super().__init__()
        self.cut = nn.Unflatten(1, (in_features // patch_size, patch_size))
        self.embed = nn.Linear(patch_size, dim)
        self.position = nn.Parameter(torch.randn(in_features // patch_size, dim) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        embedded: Tensor = self.embed(self.cut(x)) + self.position
        return embedded


class MeanOverPatches(nn.Module):
    """(batch, patches, dim) -> (batch, dim)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=1)


class Transformer(Classifier):
    """Pre-norm encoder (GELU, learned positions), mean over the patches, linear head.

    `patch_size` divides `in_features`, `num_heads` divides `dim`. Source: arXiv 2010.11929, with
    the mean in place of the class token.
    """

    def __init__(
        self,
        *,
        in_features: int,
        num_classes: int,
        patch_size: int,
        dim: int,
        num_layers: int,
        num_heads: int,
        mlp_dim: int,
        dropout: float,
    ) -> None:
        layer = nn.TransformerEncoderLayer(
            dim,
            num_heads,
            dim_feedforward=mlp_dim,
            dropout=dropout,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        super().__init__(
            nn.Sequential(
                Patches(in_features=in_features, patch_size=patch_size, dim=dim),
                # Nested tensors do not work with norm_first, and asking for them warns.
                nn.TransformerEncoder(
                    layer, num_layers, norm=nn.LayerNorm(dim), enable_nested_tensor=False
                ),
                MeanOverPatches(),
                nn.Linear(dim, num_classes),
            )
        )
