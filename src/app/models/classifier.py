"""How a classifier is trained and measured, whatever its network."""

import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


class Classifier(LightningModule):
    """Cross-entropy over `net`: features (batch, in_features) -> logits (batch, num_classes).

    A training step logs nothing (`self.log` costs two fifths of a small step): a callback does.
    Validation and test log `val_loss`, `val_acc`, `test_loss`, `test_acc`, each the mean over the
    samples of the epoch. The optimizer comes from its own group.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._measure(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._measure(batch, "test")

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the probabilities (batch, num_classes); the labels are not read."""
        probabilities: Tensor = self(batch[0]).softmax(dim=1)
        return probabilities

    def _measure(self, batch: Batch, part: str) -> None:
        x, y = batch
        logits = self(x)
        self.log_dict(
            {
                f"{part}_loss": F.cross_entropy(logits, y),
                f"{part}_acc": (logits.argmax(dim=1) == y).float().mean(),
            },
            on_step=False,
            on_epoch=True,
            sync_dist=True,
            batch_size=len(x),
        )
