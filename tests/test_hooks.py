"""The user's model and data, whose methods a run stands in for: in which order, and given back."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import SMALL
from lightning.pytorch.trainer import call
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from app.fit import built, train
from app.record.folder import RunFolder
from app.resume.exact import ExactResume
from app.resume.hooks import HOOKS, DataHooks
from app.run.build import build


@pytest.fixture(autouse=True)
def _no_process_group_is_left() -> Iterator[None]:
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def rows(num: int = 8) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.arange(num * 2.0).view(num, 2), torch.arange(num) % 2), 4)


class Plain(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(2, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class OwnLoaders(Plain):
    """Has its loaders itself, as in Lightning's first examples."""

    def train_dataloader(self) -> Any:
        return rows()

    def val_dataloader(self) -> Any:
        return [rows(), rows()]

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, batch_idx)


class OwnLog(Plain):
    """Logs by a method that it set on itself."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = MeanMetric()
        self.log = self.log_twice  # type: ignore[method-assign]

    def log_twice(self, name: str, value: Any, **settings: Any) -> None:
        pl.LightningModule.log(self, name, value, **settings)


class OwnConfigure(Plain):
    """Makes its layers late."""

    def configure_model(self) -> None:
        self.net = self.net or torch.nn.Linear(2, 2)


class Data(pl.LightningDataModule):
    def setup(self, stage: str | None = None) -> None:
        self.loader = rows()

    def train_dataloader(self) -> Any:
        return self.loader

    def val_dataloader(self) -> Any:
        return self.loader

    test_dataloader = val_dataloader


class Mapped(Data):
    """Serves several loaders by name."""

    def train_dataloader(self) -> Any:
        return {"one": rows(), "other": rows(12)}


class Assigned(pl.LightningDataModule):
    """Sets its loaders on itself, as `from_datasets` does."""

    def __init__(self) -> None:
        super().__init__()
        self.train_dataloader = rows  # type: ignore[method-assign]
        self.val_dataloader = rows  # type: ignore[method-assign]
        self.test_dataloader = rows  # type: ignore[method-assign]


class Slow(Data):
    """Keeps what it made from one setup to the next."""

    def prepare_data(self) -> None:
        self.prepared = True


def from_datasets() -> pl.LightningDataModule:
    """Makes a data module in Lightning's own way."""
    data = TensorDataset(torch.arange(16.0).view(8, 2), torch.arange(8) % 2)
    return pl.LightningDataModule.from_datasets(data, data, data, batch_size=4)


class MappedModel(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch["one"], batch_idx)


PAIRS = [("Plain", "Data"), ("OwnLoaders", "Data"), ("OwnLog", "Data"), ("OwnConfigure", "Data"),
         ("MappedModel", "Mapped"), ("Plain", "Assigned"), ("Plain", "Slow"),
         ("Plain", "from_datasets"), ("OwnLoaders", "Slow"), ("OwnLog", "Assigned")]  # fmt: skip


MORE = (["sharing=mmap"], ["strategy=ddp", "trainer.devices=1"], ["optimizer=adamw"])
CASES = [*((*pair, []) for pair in PAIRS), *((*pair, more) for pair in PAIRS[1:3] for more in MORE)]


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")
@pytest.mark.filterwarnings("ignore:It is recommended to use")
@pytest.mark.parametrize(
    ("model", "data", "more"), CASES, ids=[" ".join([m, d, *more]) for m, d, more in CASES]
)
def test_the_users_objects_are_as_they_were_after_a_run(
    checked: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    model: str, data: str, more: list[str],
) -> None:  # fmt: skip
    typed = [*SMALL[1:-2], "trainer.accelerator=cpu", "optimizer=none", *more]
    config = checked("model=custom", f"model._target_=test_hooks.{model}", "data=custom",
                     f"data._target_=test_hooks.{data}", *typed, f"sharing.cache={tmp_path}/c"
                     if "sharing=mmap" in more else "seed=1")  # fmt: skip
    seen = []

    def kept(*args: Any) -> Any:
        run = built(*args)
        seen.append(run)
        return run

    monkeypatch.setattr("app.fit.built", kept)
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir(exist_ok=True)
    train(config, folder)
    (run,) = seen
    made = from_datasets() if data == "from_datasets" else globals()[data]()
    for owner, fresh in ((run.model, globals()[model]()), (run.data, made)):
        assert vars(owner).keys() & {*HOOKS} == vars(fresh).keys() & {*HOOKS}
        assert all(type(vars(owner)[n]) is type(vars(fresh)[n]) for n in vars(fresh) if n in HOOKS)


def asked(name: str, data: pl.LightningDataModule) -> Any:
    """What Lightning gets of a data module."""
    trainer = pl.Trainer(logger=False, accelerator="cpu")
    trainer.datamodule = data  # type: ignore[attr-defined]
    return call._call_lightning_datamodule_hook(trainer, name)


def test_layers_lie_around_the_loaders_in_a_stated_order() -> None:
    told: list[Any] = []
    model, data = Plain(), Data()
    data.setup()
    hooks = DataHooks(model, data)
    hooks.around_loaders(lambda name, made: told.append(name) or made)
    hooks.around_training(lambda made: told.append("training") or made)
    assert asked("train_dataloader", data) is data.loader
    assert asked("val_dataloader", data) is data.loader
    assert data.train_dataloader() is data.loader  # whoever else asks
    assert told == ["train_dataloader", "training", "val_dataloader"]
    hooks.release()
    assert not vars(data).keys() & {*HOOKS}


class Reused(Data):
    """Validates on what it trains on, by calling its own method."""

    def val_dataloader(self) -> Any:
        return self.train_dataloader()


def test_a_loader_that_calls_another_gets_the_users_own(checked: Callable[..., Any]) -> None:
    config = checked("model=custom", "model._target_=test_hooks.Plain", "data=custom",
                     "data._target_=test_hooks.Reused", "optimizer=none", *SMALL[1:-2],
                     "trainer.accelerator=cpu")  # fmt: skip
    run = build(config, [])
    run.trainer.fit(run.model, datamodule=run.data)
    resume = next(c for c in run.trainer.callbacks if isinstance(c, ExactResume))
    assert run.trainer.train_dataloader in resume._loaders
    assert run.trainer.val_dataloaders is run.data.loader


def test_a_run_splits_then_orders_then_makes_resumable(checked: Callable[..., Any]) -> None:
    """What a probe serves is this rank's share, and what finds its place is what is served."""
    served: list[Any] = []
    config = checked(*SMALL)
    run = build(config, [], served=lambda loaders: served.append(loaders) or loaders)
    run.data.prepare_data()
    run.data.setup("fit")
    loader = asked("train_dataloader", run.data)
    assert loader.loader is served[0]
