"""Models as other people write them. None knows of this project."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import BackboneFinetuning, EarlyStopping, LearningRateMonitor
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score


class Net(pl.LightningModule):
    """Ten features to two classes, as in every tutorial."""

    def __init__(self, lr: float = 0.1, width: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.net = self.layers(width)

    def layers(self, width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(10, width), nn.Tanh(), nn.Linear(width, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch[0], batch[1]
        return F.cross_entropy(self(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=self.lr, momentum=0.9)


# what a model does with its state


class Detached(Net):
    """Returns copies, as wrappers do."""

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        found = super().state_dict(*args, **kwargs)
        return {name: value.detach().clone() for name, value in found.items()}


class Lora(Net):
    """Saves what it trains, and no more."""

    def __init__(self, lr: float = 0.1, width: int = 8) -> None:
        super().__init__(lr, width)
        self.strict_loading = False
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():  # stands for weights that were downloaded
            for parameter in self.net.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.net.requires_grad_(False)
        self.down, self.up = nn.Linear(10, 2, bias=False), nn.Linear(2, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + self.up(self.down(x))

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        found = super().state_dict(*args, **kwargs)
        return {name: value for name, value in found.items() if name in trained}

    def configure_optimizers(self) -> Any:
        return AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)


class Renamed(Net):
    """Saves under the names of an older release, and reads them back."""

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        found = super().state_dict(*args, **kwargs)
        return {name.replace("net.", "module.encoder."): value for name, value in found.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        found = {n.replace("module.encoder.", "net."): value for n, value in state_dict.items()}
        return super().load_state_dict(found, *args, **kwargs)


class Migrated(Net):
    """Halves a layer when it is saved, doubles it when it is loaded; keeps a count of its own."""

    def __init__(self, lr: float = 0.1, width: int = 8) -> None:
        super().__init__(lr, width)
        self.seen = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen += len(batch[0])
        return super().training_step(batch, batch_idx)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = dict(checkpoint["state_dict"])
        state["net.0.weight"] = state["net.0.weight"] / 2
        checkpoint["state_dict"] = state
        checkpoint["seen"] = self.seen

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"]["net.0.weight"] = checkpoint["state_dict"]["net.0.weight"] * 2
        self.seen = checkpoint["seen"]


class Threshold(Net):
    """Writes buffers while it is validated: a float, a whole number, one assigned anew."""

    def __init__(self, lr: float = 0.1, width: int = 8) -> None:
        super().__init__(lr, width)
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("validations", torch.zeros((), dtype=torch.long))
        self.register_buffer("last", torch.zeros(2))

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, batch_idx)
        self.threshold += 10
        self.validations += 1
        self.last = self.last + 1


class Queue(Net):
    """Keeps the last features in a ring, and where the ring stands, as MoCo does."""

    def __init__(self, lr: float = 0.1, width: int = 8) -> None:
        super().__init__(lr, width)
        self.register_buffer("queue", torch.zeros(16, 2))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self(batch[0])
        against = (logits @ self.queue.clone().T).mean()
        loss = F.cross_entropy(logits, batch[1]) + 0.1 * against
        with torch.no_grad():
            place = (self.pointer + torch.arange(len(logits))) % len(self.queue)
            self.queue[place] = logits.detach()
            self.pointer += len(logits)
        return loss


class Teacher(Net):
    """Follows itself with a slow copy, as BYOL and DINO do."""

    def __init__(self, lr: float = 0.1, width: int = 8) -> None:
        super().__init__(lr, width)
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        with torch.no_grad():
            target = self.teacher(batch[0])
        return self.loss(batch) + 0.1 * F.mse_loss(self(batch[0]), target)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            for slow, fast in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                slow.lerp_(fast, 0.1)


class Tied(Net):
    """Shares one matrix between its two ends, as language models do."""

    def layers(self, width: int) -> nn.Module:
        net = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Tanh(), nn.Linear(10, 10), nn.Tanh())
        net[2].weight = net[0].weight
        return nn.Sequential(net, nn.Linear(10, 2))


class Lazy(Net):
    """Knows its width when it has seen a batch."""

    def layers(self, width: int) -> nn.Module:
        return nn.Sequential(nn.LazyLinear(width), nn.ReLU(), nn.LazyLinear(2))

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=self.lr)


class Batchnorm(Net):
    """Has running statistics."""

    def layers(self, width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(10, width), nn.BatchNorm1d(width), nn.Linear(width, 2))


class Dropout(Net):
    """Draws random numbers in every step."""

    def layers(self, width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(10, width), nn.Dropout(0.3), nn.Linear(width, 2))


class Counts(Net):
    """Keeps a temperature, a generator and a running mean in attributes."""

    def __init__(self, lr: float = 0.1, width: int = 8) -> None:
        super().__init__(lr, width)
        self.temperature = 1.0
        self.drawing = torch.Generator().manual_seed(3)
        self.smooth = torch.tensor(0.0)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.temperature *= 0.95
        x, y = batch
        noise = torch.randn(x.shape, generator=self.drawing).to(x)
        loss = nn.functional.cross_entropy(self(x + 0.1 * noise) / self.temperature, y)
        self.smooth = 0.9 * self.smooth + 0.1 * loss.detach()
        return loss + self.smooth * self.net[0].weight.square().sum()


class TestsWithNoise(Dropout):
    """Draws random numbers also when it is tested."""

    __test__ = False

    def test_step(self, batch: Any, batch_idx: int) -> None:
        noise = torch.randn_like(batch[0])
        self.log("test_loss", self.loss((batch[0] + noise, batch[1])))


class FrozenBackbone(Net):
    """A backbone in evaluation mode below a head that is trained."""

    def __init__(self, lr: float = 0.1, width: int = 8) -> None:
        super().__init__(lr, width)
        self.backbone = nn.Sequential(nn.Linear(10, 10), nn.BatchNorm1d(10))
        self.backbone.requires_grad_(False)

    def on_train_epoch_start(self) -> None:
        self.backbone.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.backbone(x))


class Unfreezes(Net):
    """Trains its first layer from the second epoch on."""

    def __init__(self, lr: float = 0.1, width: int = 8) -> None:
        super().__init__(lr, width)
        self.net[0].requires_grad_(False)

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.net[0].requires_grad_(True)


class Finetuned(Net):
    """Lightning's own recipe: a callback of the model unfreezes the backbone."""

    def __init__(self, lr: float = 0.1, width: int = 8) -> None:
        super().__init__(lr, width)
        self.backbone = nn.Sequential(nn.Linear(10, 10), nn.BatchNorm1d(10), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.backbone(x))

    def configure_optimizers(self) -> Any:
        return Adam(filter(lambda p: p.requires_grad, self.parameters()), lr=0.01)

    def configure_callbacks(self) -> Any:
        return [BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=0.005)]


class Grows(Net):
    """Has one more layer from the second epoch on, also when it is loaded."""

    def __init__(self, lr: float = 0.1, width: int = 8) -> None:
        super().__init__(lr, width)
        self.more: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if self.more is None else self.more(self.net(x))

    def _grow(self) -> None:
        self.more = nn.Linear(2, 2, dtype=self.dtype)
        with torch.no_grad():
            self.more.weight.copy_(torch.eye(2))
            self.more.bias.zero_()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if any("more." in name for name in checkpoint["state_dict"]) and self.more is None:
            self._grow()

    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.net.parameters(), lr=self.lr)
        if self.more is not None:
            optimizer.add_param_group({"params": self.more.parameters(), "lr": self.lr})
        return optimizer

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1 and self.more is None:
            self._grow()
            self.optimizers().add_param_group({"params": self.more.parameters(), "lr": self.lr})


class Shrinks(Net):
    """Drops an auxiliary head after the first epoch, also when it is loaded."""

    def __init__(self, lr: float = 0.1, width: int = 8) -> None:
        super().__init__(lr, width)
        self.auxiliary: nn.Module | None = nn.Linear(10, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        if self.auxiliary is not None:
            loss = loss + 0.3 * F.cross_entropy(self.auxiliary(batch[0]), batch[1])
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.net.parameters(), lr=self.lr, momentum=0.9)
        if self.auxiliary is not None:
            optimizer.add_param_group({"params": self.auxiliary.parameters(), "lr": self.lr})
        return optimizer

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if not any("auxiliary." in name for name in checkpoint["state_dict"]):
            self.auxiliary = None

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1 and self.auxiliary is not None:
            optimizer = self.optimizers().optimizer
            for parameter in optimizer.param_groups.pop()["params"]:
                optimizer.state.pop(parameter)
            self.auxiliary = None


class ConfiguresModel(Net):
    """Makes its layers in configure_model."""

    def __init__(self, lr: float = 0.1, width: int = 8) -> None:
        super().__init__(lr, width)
        self.net = None

    def configure_model(self) -> None:
        if self.net is None:
            self.net = self.layers(8)


class WeightNormed(Net):
    """Reparametrizes a layer."""

    def layers(self, width: int) -> nn.Module:
        first = nn.utils.parametrizations.weight_norm(nn.Linear(10, width))
        return nn.Sequential(first, nn.Tanh(), nn.Linear(width, 2))


class Odd(Net):
    """A complex parameter, a scalar one, and a list of them."""

    def __init__(self, lr: float = 0.1, width: int = 8) -> None:
        super().__init__(lr, width)
        self.phase = nn.Parameter(torch.ones(10, dtype=torch.complex64))
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.shifts = nn.ParameterList([torch.zeros(10), torch.zeros(10)])

    def forward(self, x: Tensor) -> Tensor:
        x = (x * self.phase).abs() * self.scale
        return self.net(x + self.shifts[0] - self.shifts[1])

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=0.05)


# optimizers and steps


class Gan(Net):
    """Two optimizers, stepped by hand."""

    def __init__(self, lr: float = 0.05, width: int = 8) -> None:
        super().__init__(lr, width)
        self.automatic_optimization = False
        self.generator = nn.Linear(4, 10)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for_generator, for_net = self.optimizers()
        fake = self.generator(batch[0][:, :4])
        self.toggle_optimizer(for_generator)
        loss = F.cross_entropy(self(fake), batch[1])
        self.manual_backward(loss)
        for_generator.step()
        for_generator.zero_grad()
        self.untoggle_optimizer(for_generator)
        self.toggle_optimizer(for_net)
        loss = self.loss(batch) - 0.1 * F.cross_entropy(self(fake.detach()), batch[1])
        self.manual_backward(loss)
        for_net.step()
        for_net.zero_grad()
        self.untoggle_optimizer(for_net)
        self.log("train_loss", loss)
        for schedule in self.lr_schedulers():
            if self.trainer.is_last_batch:
                schedule.step()

    def configure_optimizers(self) -> Any:
        both = [
            SGD(self.generator.parameters(), lr=self.lr),
            SGD(self.net.parameters(), lr=self.lr),
        ]
        return both, [torch.optim.lr_scheduler.ExponentialLR(one, 0.9) for one in both]


class RawOptimizer(Net):
    """Steps the optimizer of torch, not the one that Lightning has wrapped."""

    def __init__(self, lr: float = 0.1, width: int = 8) -> None:
        super().__init__(lr, width)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        loss = self.loss(batch)
        loss.backward()
        optimizer.step()
        return loss


class AccumulatesItself(Net):
    """Steps by hand after every second micro-batch."""

    def __init__(self, lr: float = 0.1, width: int = 8) -> None:
        super().__init__(lr, width)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer = self.optimizers()
        loss = self.loss(batch) / 2
        self.manual_backward(loss)
        if (batch_idx + 1) % 2 == 0 or self.trainer.is_last_batch:
            self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
            optimizer.step()
            optimizer.zero_grad()
        return loss


class Lbfgs(Net):
    """Evaluates a batch several times a step."""

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


class WarmsUpByHand(Net):
    """Lightning's documented warm-up, in optimizer_step."""

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        optimizer.step(closure=optimizer_closure)
        if self.trainer.global_step < 6:
            for group in optimizer.param_groups:
                group["lr"] = self.lr * (self.trainer.global_step + 1) / 6


class Groups(Net):
    """Rates for each layer, no decay of biases."""

    def configure_optimizers(self) -> Any:
        decayed = [p for p in self.parameters() if p.ndim > 1]
        rest = [p for p in self.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "lr": self.lr / 10}]
        optimizer = AdamW(groups, lr=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=[0.02, 0.01], total_steps=self.trainer.estimated_stepping_batches
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


class ClipsItself(Net):
    """Clips in its own hook, and looks at its gradients before a step."""

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        norms = [p.grad.norm() for p in self.parameters() if p.grad is not None]
        self.log("grad_2.0_norm", torch.stack(norms).norm())

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")


class SkipsSteps(Net):
    """Returns no loss for every third batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx % 3 == 2 else super().training_step(batch, batch_idx)


class ReturnsDict(Net):
    """Returns the loss among other things, and uses them in a hook."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self(batch[0])
        return {"loss": F.cross_entropy(logits, batch[1]), "logits": logits.detach()}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.log("confidence", outputs["logits"].softmax(1).max(1).values.mean())


# what a model looks at, and logs


class LooksAround(Net):
    """Asks the trainer, counts classes in the data, keeps a bank of features."""

    def on_fit_start(self) -> None:
        self.counts = torch.zeros(2)
        for batch in self.trainer.datamodule.train_dataloader():
            self.counts += torch.bincount(batch[1], minlength=2)

    def on_train_epoch_start(self) -> None:
        first = next(iter(self.trainer.datamodule.train_dataloader()))
        with torch.no_grad():
            self.bank = self(first[0].to(self.dtype)).mean()

    def loss(self, batch: Any) -> Tensor:
        weights = (1 / self.counts).to(self.dtype) if hasattr(self, "counts") else None
        return F.cross_entropy(self(batch[0]), batch[1], weight=weights)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, batch_idx)
        assert self.trainer.datamodule is not None
        self.log("progress", float(self.current_epoch + self.global_step / 1000))


class Draws(Net):
    """Writes to its logger and to its folder, as with the logger of stock."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 0:
            self.logger.log_metrics({"own": float(loss)})
            self.logger.log_metrics({"own_step": 1.0}, step=self.global_step)
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("step", float(self.current_epoch))
        for name, parameter in self.named_parameters():
            self.logger.experiment.add_histogram(name, parameter, self.current_epoch)

    def on_validation_epoch_end(self) -> None:
        from matplotlib.figure import Figure

        figure = Figure()
        figure.add_subplot().plot([1, 2])
        self.logger.experiment.add_figure("curve", figure, self.global_step)
        assert self.trainer.log_dir


class Slashes(Net):
    """Names its metrics as templates do, and monitors one of them."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("train/loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val/loss", self.loss(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test/loss", self.loss(batch))


class Metrics(Net):
    """Objects and a collection of torchmetrics, per step and per epoch."""

    def __init__(self, lr: float = 0.1, width: int = 8) -> None:
        super().__init__(lr, width)
        both = MetricCollection([MulticlassAccuracy(2), MulticlassF1Score(2)])
        self.train_metrics, self.val_metrics = both.clone("train/"), both.clone("val/")
        self.mean = MeanMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self(batch[0])
        loss = F.cross_entropy(logits, batch[1])
        self.train_metrics.update(logits, batch[1])
        self.mean(loss)
        self.log("train_mean", self.mean, on_step=True, on_epoch=True)
        return loss

    def on_train_epoch_end(self) -> None:
        self.log_dict(self.train_metrics.compute())
        self.train_metrics.reset()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, batch_idx)
        self.val_metrics.update(self(batch[0]), batch[1])
        self.log_dict(self.val_metrics, on_epoch=True)


class Collects(Net):
    """Gathers outputs over an epoch, and clears them."""

    def __init__(self, lr: float = 0.1, width: int = 8) -> None:
        super().__init__(lr, width)
        self.outputs: list[Tensor] = []
        self.best = 0.0

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, batch_idx)
        self.outputs.append(self(batch[0]).argmax(1) == batch[1])

    def on_validation_epoch_end(self) -> None:
        accuracy = float(torch.cat(self.outputs).float().mean())
        self.outputs.clear()
        self.best = max(self.best, accuracy)
        self.log("val_acc", accuracy)
        self.log("val_acc_best", self.best)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["best"] = self.best

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.best = checkpoint["best"]


class StopsItself(Net):
    """Brings callbacks of its own: it stops early, and watches its rate."""

    def configure_callbacks(self) -> Any:
        stops = EarlyStopping("val_loss", mode="max", patience=1)
        return [stops, LearningRateMonitor(logging_interval="epoch")]


# batches of other shapes


class ForDicts(Net):
    """Takes what tokenizers make: a mapping, with texts and lists in it."""

    def loss(self, batch: Any) -> Tensor:
        assert isinstance(batch["text"][0], str)
        return F.cross_entropy(self(batch["x"]), batch["y"])


class ForDataclasses(Net):
    """Takes a dataclass, nested in a list."""

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch[0].x), batch[0].y)


class ForTokens(Net):
    """Sequences of many lengths, the loss a mean over their tokens."""

    def loss(self, batch: Any) -> Tensor:
        logits = self(batch["x"])  # batch, time, classes
        return F.cross_entropy(logits[batch["mask"]], batch["y"][batch["mask"]])


class ForNone(Net):
    """Meets batches that its collate function could not make."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch is None else super().training_step(batch, batch_idx)


class ForSeveral(Net):
    """Takes a batch of each of two loaders; of the other where it comes in turn."""

    def training_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        if isinstance(batch, Mapping):
            losses = [self.loss(part) for part in batch.values() if part is not None]
            loss = torch.stack(losses).mean()
        else:
            loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss


class HasLoaders(Net):
    """Makes its loaders itself, as Lightning's own examples do."""

    def __init__(self, lr: float = 0.1, width: int = 8, batch_size: int = 8) -> None:
        super().__init__(lr, width)
        self.batch_size = batch_size

    def _loader(self, name: str) -> Any:
        from zoo.loaders import Rows

        return getattr(Rows(batch_size=self.batch_size), name)()

    def train_dataloader(self) -> Any:
        return self._loader("train_dataloader")

    def val_dataloader(self) -> Any:
        return self._loader("val_dataloader")

    def test_dataloader(self) -> Any:
        return self._loader("test_dataloader")


# schedules: one model for every scheduler of torch

schedules = torch.optim.lr_scheduler
ALONE: dict[str, Any] = {
    "LambdaLR": lambda o: schedules.LambdaLR(o, lambda n: 0.9**n),
    "MultiplicativeLR": lambda o: schedules.MultiplicativeLR(o, lambda n: 0.9),
    "StepLR": lambda o: schedules.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: schedules.MultiStepLR(o, [1, 4], 0.5),
    "ConstantLR": lambda o: schedules.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: schedules.LinearLR(o, 0.1, 1.0, 6),
    "ExponentialLR": lambda o: schedules.ExponentialLR(o, 0.9),
    "CosineAnnealingLR": lambda o: schedules.CosineAnnealingLR(o, 6),
    "PolynomialLR": lambda o: schedules.PolynomialLR(o, 8),
    "CosineAnnealingWarmRestarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: schedules.CyclicLR(o, 0.01, 0.1, 3),
    "OneCycleLR": lambda o: schedules.OneCycleLR(o, 0.2, total_steps=30),
    "ReduceLROnPlateau": lambda o: schedules.ReduceLROnPlateau(o, "max", 0.5, 0),
    "SequentialLR": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.1, 1.0, 2), schedules.CosineAnnealingLR(o, 6)], [2]
    ),
    "ChainedScheduler": lambda o: schedules.ChainedScheduler(
        [schedules.ConstantLR(o, 0.5, 2), schedules.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.05, 3),
}
"""By the names of torch; `test_zoo` compares them with what torch has."""


class Scheduled(Net):
    """One of torch's schedulers, counted in steps or in epochs, every so often."""

    def __init__(
        self, name: str, interval: str = "epoch", frequency: int = 1, lr: float = 0.1
    ) -> None:
        super().__init__(lr)
        self.name, self.interval, self.frequency = name, interval, frequency

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        schedule = {
            "scheduler": ALONE[self.name](optimizer),
            "interval": self.interval,
            "frequency": self.frequency,
            "monitor": "val_loss",
        }
        return [optimizer], [schedule]


def trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that are trained."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)
