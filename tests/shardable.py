"""Models as other people write them, to be sharded: plain Lightning, of ten numbers a sample."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


class Data(pl.LightningDataModule):
    """The same samples in the same order, wherever they are trained on."""

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size

    def loader(self) -> Any:
        x = torch.randn(24, 10, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=self.batch_size)

    def train_dataloader(self) -> Any:
        return self.loader()

    def val_dataloader(self) -> Any:
        return self.loader()


class Lit(pl.LightningModule):
    """Two classes, AdamW; a subclass says what makes them of a batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01, eps=0.01)


def tokens(x: Tensor) -> Tensor:
    return (x.abs() * 10).long().clamp(max=30)


class TiedLanguageModel(Lit):
    """GPT-2's tie: the head is the transposed embedding, and both are large."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(31, 16)
        self.h = nn.ModuleList([nn.TransformerEncoderLayer(16, 2, 32, 0.0) for _ in range(2)])
        self.ln_f = nn.LayerNorm(16)
        self.lm_head = nn.Linear(16, 31, bias=False)
        self.lm_head.weight = self.wte.weight

    def loss(self, batch: Any) -> Tensor:
        ids = tokens(batch[0])
        x = self.wte(ids[:, :-1])
        for block in self.h:
            x = block(x)
        return F.cross_entropy(self.lm_head(self.ln_f(x)).flatten(0, 1), ids[:, 1:].flatten())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))


class Encoder(Lit):
    """torch's own stack, which takes a fast path while evaluating."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
        self.embed = nn.Linear(1, 16)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.decoder = nn.TransformerDecoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x[..., None])
        return self.head(self.decoder(x, self.encoder(x)).mean(1))


class Block(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"norm": nn.LayerNorm(size), "up": nn.Linear(size, 3 * size)})
        self.down = nn.Linear(3 * size, size)
        self.gamma = nn.Parameter(torch.full((size,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.down(F.gelu(self.parts["up"](self.parts["norm"](x))))


class Residual(Lit):
    """Blocks in a ModuleList; sizes that no number of ranks divides."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(10, 13)
        self.blocks = nn.ModuleList([Block(13) for _ in range(3)])
        self.head = nn.Linear(13, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class ConvNet(Lit):
    """Channels last, BatchNorm, weight decay on matrices only: two groups in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 5, 3, padding=1),
            nn.BatchNorm2d(5),
        )
        self.classifier = nn.Linear(5, 2)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        image = (x[:, None, :, None] * x[:, None, None, :]).to(memory_format=torch.channels_last)
        return self.classifier(self.features(image).mean((2, 3)))

    def configure_optimizers(self) -> Any:
        vectors = [p for p in self.parameters() if p.ndim < 2]
        matrices = [p for p in self.parameters() if p.ndim >= 2]
        groups = [{"params": vectors, "weight_decay": 0.0}, {"params": matrices}]
        optimizer = torch.optim.AdamW(groups, lr=0.01, eps=0.01, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


class FineTuned(Lit):
    """A frozen backbone under no_grad, of which only the head is optimized."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(10, 24), nn.BatchNorm1d(24), nn.ReLU())
        self.backbone.requires_grad_(False)
        self.head = nn.Linear(24, 2)

    def on_train_epoch_start(self) -> None:
        self.backbone.eval()

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.backbone(x)
        return self.head(x)

    def configure_optimizers(self) -> Any:
        trained = filter(lambda p: p.requires_grad, self.parameters())
        return torch.optim.SGD(trained, lr=0.1, momentum=0.9, nesterov=True)


class Buffers(Lit):
    """Buffers of all kinds: bool, integer, not persistent, assigned to in each step."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.arange(10) % 3 > 0)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(10))
        self.register_buffer("scale", torch.full((10,), 2.0), persistent=False)
        self.net = nn.Linear(10, 17)
        self.head = nn.Linear(17, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.steps += 1
            self.mean = 0.9 * self.mean + 0.1
        return self.head(torch.tanh(self.net((x - self.mean) * self.mask * self.scale)))


class Siamese(Lit):
    """One encoder called twice, which two names of the model hold."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(5, 20), nn.ReLU(), nn.Linear(20, 8))
        self.other = self.encoder
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1)
        return self.head(torch.cat([self.encoder(left), self.other(right)], dim=1))


class OwnParameters(Lit):
    """CLIP's scalar and ViT's class token, on the LightningModule itself; one is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.class_token = nn.Parameter(torch.zeros(1, 7))
        self.unused = nn.Parameter(torch.ones(3))
        self.inner = nn.Linear(10, 7)
        self.prototypes = nn.Parameter(torch.linspace(-1, 1, 14).view(2, 7))

    def forward(self, x: Tensor) -> Tensor:
        features = F.normalize(self.inner(x) + self.class_token, dim=1)
        return self.logit_scale.exp() * features @ F.normalize(self.prototypes, dim=1).T


class InPlace(Lit):
    """Adds to the output of a block, which is a view, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(10, 2, batch_first=True)
        self.head = nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.attention(x[:, None], x[:, None], x[:, None])
        out += x[:, None]
        return self.head(out[:, 0])


class Recurrent(Lit):
    """An LSTM, which keeps a list of its weights, and a weight that is a product of others."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 9, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.utils.parametrizations.weight_norm(nn.Linear(18, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x.view(-1, 5, 2))[0][:, -1])


class OneLayer(Lit):
    """Nothing but parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 10))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(batch[0] @ self.weight.T, batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(batch[0] @ self.weight.T, batch[1]))


class DrawnAnew(Residual):
    """Begins with weights that each process draws differently."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator()
        generator.seed()
        nn.init.normal_(self.inner.weight, generator=generator)


class ShardsItself(Lit):
    """Shards in its own `configure_model`, as Lightning's manual shows."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(10, 12), nn.ReLU(), nn.Linear(12, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def configure_model(self) -> None:
        from torch.distributed.fsdp import FSDPModule, fully_shard

        if self.device_mesh is None or isinstance(self.net, FSDPModule):
            return
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


class Autoencoder(Lit):
    """Calls a method of a block that is not its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Vae()

    def forward(self, x: Tensor) -> Tensor:
        return self.net.encode(x)


class Vae(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(10, 40)
        self.mean = nn.Linear(40, 2)
        self.offset = nn.Parameter(torch.zeros(500))

    def encode(self, x: Tensor) -> Tensor:
        return self.mean(self.body(x)) + self.offset.mean()

    def forward(self, x: Tensor) -> Tensor:
        return self.encode(x)


class Stale(Residual):
    """Keeps lists of parameters from when it was built."""

    def __init__(self) -> None:
        super().__init__()
        self.trained = list(self.head.parameters())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.trained, lr=0.1)


class TwoOptimizers(Residual):
    """Steps its own optimizers."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
