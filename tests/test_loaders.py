"""Whatever loaders a user brings: continued, split, combined, empty, and asked a second time."""

import json
import random
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from theirs import LitModel, Noisy
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    TensorDataset,
    get_worker_info,
)
from torchmetrics import MeanMetric

from app.accumulate import ConstantAccumulation
from app.errors import Refused
from app.fit import train
from app.launch.local import run_local
from app.parallel.split import Share, split
from app.process.ranks import ranks
from app.record.folder import RunFolder
from app.run.build import Run, build
from app.run.checkpoint import newest_intact
from app.run.evaluation import evaluate
from app.screen.start import StartTable

QUIET = ("model=custom", "model._target_=test_loaders.Recorder", "data=custom", "optimizer=none",
         "data._target_=test_loaders.Data", "trainer.max_epochs=3", "logger=none",
         "callbacks.progress=null", "trainer.accelerator=cpu")  # fmt: skip
OFTEN = "callbacks.checkpoint.every_n_steps=1"


class Recorder(LitModel):
    """Dropout, and a list of what it has trained on, by the labels of a batch's first tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.trained_on: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        leaves = torch.utils._pytree.tree_leaves(batch)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not leaf.is_sparse]
        x = next(leaf for leaf in tensors if leaf.ndim == 2)
        self.trained_on.append([leaf.tolist() for leaf in tensors])
        return self.net(x).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class Stream(IterableDataset):
    """Numbered samples in an order drawn each time, each with noise; its workers share them."""

    def __init__(self, num_samples: int = 22, shuffles: bool = False) -> None:
        self.num_samples = num_samples
        self.shuffles = shuffles

    def __iter__(self) -> Iterator[Any]:
        order = list(range(self.num_samples))
        if self.shuffles:
            random.shuffle(order)
        info = get_worker_info()
        for index in order if info is None else order[info.id :: info.num_workers]:
            yield torch.randn(10) / 10 + index, index


class CountsEpochs(Stream):
    """Shuffles by the epoch that it counts itself."""

    epoch = 0

    def __init__(self) -> None:
        super().__init__()
        self.epoch = 0

    def __iter__(self) -> Iterator[Any]:
        self.epoch += 1
        order = np.random.default_rng(self.epoch).permutation(self.num_samples)
        return ((torch.randn(10) / 10 + index, int(index)) for index in order)


class OwnGenerator(Stream):
    """Shuffles by a generator that goes on from epoch to epoch."""

    def __init__(self, rng: Any) -> None:
        super().__init__()
        self.rng = rng

    def __iter__(self) -> Iterator[Any]:
        order = list(range(self.num_samples))
        self.rng.shuffle(order)
        return ((torch.full((10,), float(index)), int(index)) for index in order)


class Sized(Stream):
    """Knows how many samples it has."""

    def __len__(self) -> int:
        return self.num_samples


class Stateful:
    """A loader of their own, without a length, that continues by itself."""

    def __init__(self, num_batches: int = 7) -> None:
        self.num_batches = num_batches
        self.batch = 0
        self.epoch = 0

    def __iter__(self) -> Iterator[Any]:
        while self.batch < self.num_batches:
            self.batch += 1
            rng = np.random.default_rng((self.epoch, self.batch))
            noise = torch.randn(4, 10) / 100
            yield torch.from_numpy(rng.normal(size=(4, 10))).float() + noise, self.batch
        self.batch = 0
        self.epoch += 1

    def state_dict(self) -> dict[str, int]:
        return {"batch": self.batch, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.batch, self.epoch = state["batch"], state["epoch"]


class Iterable:
    """Batches of a class that has no length and no state."""

    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(6).tolist()
        return ((torch.randn(4, 10) + index, torch.tensor(index)) for index in order)


class Drawn(Sampler):
    """Draws from a generator of Python's own, from epoch to epoch."""

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples
        self.rng = random.Random(5)

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        return iter(self.rng.sample(range(self.num_samples), self.num_samples))


class Unsized(Drawn):
    """A sampler that does not say how much it draws: its loader has no length either."""

    __len__ = None  # type: ignore[assignment]


def stateful_dataloader(dataset: Any, **settings: Any) -> Any:
    from torchdata.stateful_dataloader import StatefulDataLoader

    return StatefulDataLoader(dataset, batch_size=4, **settings)


LOADERS: dict[str, Callable[[], Any]] = {
    "stream": lambda: DataLoader(Stream(), batch_size=4),
    "stream shuffled": lambda: DataLoader(Stream(shuffles=True), batch_size=4),
    "stream with workers": lambda: DataLoader(Stream(shuffles=True), batch_size=4, num_workers=2),
    "stream with kept workers": lambda: DataLoader(
        Stream(), batch_size=4, num_workers=2, persistent_workers=True
    ),
    "stream with a length": lambda: DataLoader(Sized(), batch_size=4),
    "batches as they are": lambda: DataLoader(
        [(torch.randn(4, 10), i) for i in range(5)], batch_size=None, shuffle=True
    ),
    "stream that counts epochs": lambda: DataLoader(CountsEpochs(), batch_size=4),
    "stream of a python generator": lambda: DataLoader(
        OwnGenerator(random.Random(3)), batch_size=4
    ),
    "stream of a numpy generator": lambda: DataLoader(
        OwnGenerator(np.random.default_rng(3)), batch_size=4
    ),
    "stream of an old numpy generator": lambda: DataLoader(
        OwnGenerator(np.random.RandomState(3)), batch_size=4
    ),
    "their own state": Stateful,
    "their own class": Iterable,
    "their sampler": lambda: DataLoader(Noisy(20), batch_size=4, sampler=Drawn(20)),
    "a sampler without a length": lambda: DataLoader(Noisy(20), batch_size=4, sampler=Unsized(20)),
    "shuffled": lambda: DataLoader(Noisy(22), batch_size=4, shuffle=True),
    "shuffled by a generator": lambda: DataLoader(
        Noisy(22), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(7)
    ),
    "batches of a sampler": lambda: DataLoader(
        Noisy(22), batch_sampler=BatchSampler(RandomSampler(range(22)), 4, True)
    ),
    "streams, combined": lambda: {
        "one": DataLoader(Stream(), batch_size=4), "other": DataLoader(Noisy(24), batch_size=4),
    },
    "a short one beside": lambda: {
        "one": DataLoader(Noisy(24), batch_size=4), "other": DataLoader(Noisy(8), 2, shuffle=True),
    },
    "as many as the shortest": lambda: CombinedLoader(
        [DataLoader(Noisy(24), 4, shuffle=True), DataLoader(Stream(40), 4)], "min_size"
    ),
    "stateful stream": lambda: stateful_dataloader(Stream(shuffles=True)),
    "stateful stream, workers": lambda: stateful_dataloader(Stream(), num_workers=2),
    "stateful samples": lambda: stateful_dataloader(Noisy(22), shuffle=True),
    # its state does not hold what its workers draw
    "stateful samples, workers": lambda: stateful_dataloader(
        TensorDataset(torch.randn(22, 10), torch.arange(22)), shuffle=True, num_workers=2
    ),
}  # fmt: skip


class Data(pl.LightningDataModule):
    """Serves one of the loaders above."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def train_dataloader(self) -> Any:
        return LOADERS[self.kind]()

    def val_dataloader(self) -> Any:
        return DataLoader(Noisy(8), batch_size=4)


class Cut(Exception):  # noqa: N818  # the end of the power, not an error of the program
    pass


class CutAt(pl.Callback):
    """Ends the process, as far as the run can tell, when a batch begins."""

    def __init__(self, batch: int | None) -> None:
        self.batch = batch

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.fit_loop.total_batch_idx == self.batch:
            raise Cut


def fit(config: Any, *, cut_at: int | None = None) -> Run:
    run = build(config, [CutAt(cut_at)])
    checkpoint = newest_intact(Path(config.run_dir) / "checkpoints")
    try:
        run.trainer.fit(run.model, datamodule=run.data, ckpt_path=checkpoint)
    except Cut:
        assert cut_at is not None
    return run


@pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined")
@pytest.mark.parametrize("kind", LOADERS)
def test_da_state_a_run_goes_on_behind_the_last_batch_it_was_trained_on(
    checked: Callable[..., Any], tmp_path: Path, kind: str, recwarn: pytest.WarningsRecorder
) -> None:
    if kind.startswith("stateful"):
        pytest.importorskip("torchdata.stateful_dataloader")
    typed = (*QUIET, OFTEN, "clip=norm", f"+data.kind='{kind}'")
    whole = fit(checked(*typed, f"run_dir={tmp_path}/whole"))
    num_batches = len(whole.model.trained_on)
    epoch = num_batches // 3
    assert epoch > 2
    for cuts in ([epoch], [2, 2 * epoch + 1]):
        config = checked(*typed, f"run_dir={tmp_path}/{cuts[0]}")
        begun = 0
        for cut_at in (*cuts, None):
            cut = fit(config, cut_at=cut_at)
            served = cut.model.trained_on
            assert served == whole.model.trained_on[begun : begun + len(served)], cuts
            begun = cut_at if cut_at is not None else begun + len(served)
        assert begun == num_batches
        for name, tensor in whole.model.state_dict().items():
            assert torch.equal(tensor, cut.model.state_dict()[name]), (name, cuts)
    assert not [str(one.message) for one in recwarn if "served again" in str(one.message)]


# ------------------------------------------------------------------------------- batches left out


def mean_step(model: Any, samples: list[Any], lr: float = 0.1) -> None:
    """One step of plain gradient descent on the mean over batches."""
    loss = torch.stack([model(batch).square().mean() for batch in samples]).mean()
    for parameter, gradient in zip(
        model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True
    ):
        with torch.no_grad():
            parameter -= lr * gradient


class Lines(pl.LightningModule):
    """A linear model whose loader and step leave out what they are told to."""

    def __init__(self, gaps: list[int], skips: list[int], sized: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Linear(3, 1).double()
        self.gaps, self.skips, self.sized = gaps, skips, sized
        self.batches = torch.randn(10, 4, 3, generator=torch.Generator().manual_seed(1)).double()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx in self.skips else self.net(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.0)

    def train_dataloader(self) -> Any:
        served = [None if i in self.gaps else one for i, one in enumerate(self.batches)]
        return DataLoader(served, batch_size=None) if self.sized else Forgetful(served)


class Forgetful:
    """Batches of which it does not say how many there are."""

    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        return iter(self.batches)


GAPS: dict[str, tuple[list[int], list[int], list[list[int]]]] = {
    "the last of a window": ([3], [], [[0, 1, 2], [4, 5, 6, 7], [8, 9]]),
    "several, the last too": ([1, 2, 3], [], [[0], [4, 5, 6, 7], [8, 9]]),
    "the last of the epoch": ([9], [], [[0, 1, 2, 3], [4, 5, 6, 7], [8]]),
    "the last two of the epoch": ([8, 9], [], [[0, 1, 2, 3], [4, 5, 6, 7]]),
    "the first of the epoch": ([0], [], [[1, 2, 3, 4], [5, 6, 7, 8], [9]]),
    "a whole window": ([4, 5, 6, 7], [], [[0, 1, 2, 3], [8, 9]]),
    "the step of the last": ([], [3], [[0, 1, 2], [4, 5, 6, 7], [8, 9]]),
    "the step of the first": ([], [4], [[0, 1, 2, 3], [5, 6, 7], [8, 9]]),
    "steps of a whole window": ([], [4, 5, 6, 7], [[0, 1, 2, 3], [8, 9]]),
    "both": ([1, 7], [3, 6], [[0, 2], [4, 5], [8, 9]]),
}


@pytest.mark.filterwarnings("ignore:train_dataloader yielded None", "ignore:.*treespec")
@pytest.mark.filterwarnings("ignore:.*returned `None`", "ignore:.*does not have many workers")
@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize("case", GAPS)
def test_da_none_a_step_is_the_mean_of_what_came(case: str, sized: bool) -> None:
    gaps, skips, windows = GAPS[case]
    model = Lines(gaps, skips, sized)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[ConstantAccumulation(factor=4, weight_by=None)],
    )  # fmt: skip
    trainer.fit(model)
    expected = Lines([], []).net
    for window in windows * 2:
        mean_step(expected, [model.batches[index] for index in window])
    for mine, theirs in zip(model.net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


# --------------------------------------------------------------------------- loaders of the model


class Buffer(IterableDataset):
    """What a model has seen of its world: grows while it is trained, and has no length."""

    def __init__(self) -> None:
        self.seen = [torch.randn(10) for _ in range(4)]

    def __iter__(self) -> Iterator[Any]:
        for _ in range(24):
            yield random.choice(self.seen), 0


class Plays(Recorder):
    """Has its loaders itself, and no data module; trains on a buffer that it fills."""

    def __init__(self) -> None:
        super().__init__()
        self.buffer = Buffer()
        self.tested = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.buffer.seen.append(batch[0][0] * 0.9)
        return super().training_step(batch, batch_idx)

    def train_dataloader(self) -> Any:
        return DataLoader(self.buffer, batch_size=4)

    def val_dataloader(self) -> Any:
        return DataLoader(Noisy(8), batch_size=4)

    def test_dataloader(self) -> Any:
        return DataLoader(Noisy(8), batch_size=4)


class TrainOnly(pl.LightningDataModule):
    """Has nothing to test on."""

    num_classes = 2

    def train_dataloader(self) -> Any:
        return DataLoader(Noisy(8), batch_size=4)


class OwnTest(LitModel):
    """Brings its own test data, and asks the data module what it holds."""

    def test_dataloader(self) -> Any:
        assert self.trainer.datamodule.num_classes == 2
        return DataLoader(Noisy(8), batch_size=4)


OWN = ("optimizer=none", "trainer.max_epochs=2", "logger=csv", "callbacks.progress=null",
       "trainer.accelerator=cpu", "model=custom")  # fmt: skip
SOURCES = {
    "none": ("model._target_=test_loaders.Plays", "data=none"),
    "test only": ("model._target_=test_loaders.OwnTest", "data=custom",
                  "data._target_=test_loaders.TrainOnly"),
}  # fmt: skip


@pytest.mark.parametrize("source", SOURCES)
def test_da_model_a_model_is_trained_tested_and_evaluated_on_its_own_loaders(
    checked: Callable[..., Any], tmp_path: Path, source: str
) -> None:
    config = checked(*OWN, *SOURCES[source])
    folder = RunFolder(Path(config.run_dir))
    folder.path.mkdir(exist_ok=True)
    result = train(config, folder)
    assert result["optimizer_steps"] == (12 if source == "none" else 4)
    assert "test_loss" in result["metrics"]
    evaluate(config, folder, stage="test", checkpoint=folder.checkpoints / "last.ckpt")
    assert "test_loss" in json.loads((folder.path / "test.json").read_text())["metrics"]


def test_da_model_a_model_without_data_continues(checked: Callable[..., Any]) -> None:
    config = checked(*OWN, *SOURCES["none"], OFTEN)
    fit(config, cut_at=8)
    with pytest.warns(UserWarning, match="Buffer has no state_dict and serves other batches"):
        run = fit(config)
    assert run.trainer.global_step == 12
    assert len(run.model.trained_on) == 4


def test_da_model_without_data_or_loaders_is_refused(checked: Callable[..., Any]) -> None:
    config = checked(*OWN, "model._target_=theirs.LitModel", "data=none")
    with pytest.raises(Refused, match="data=none needs a model with loaders of its own, and LitMo"):
        build(config, [])
    with pytest.raises(Refused, match="sharing shares what a LightningDataModule sets up"):
        checked(*OWN, *SOURCES["none"], "sharing=mmap")


# ------------------------------------------------------------------------------ nothing to train on

EMPTY: dict[str, tuple[Callable[[], Any], str]] = {
    "drop_last": (
        lambda: DataLoader(Noisy(20), batch_size=32, drop_last=True),
        "20 samples are fewer than a batch of 32, and drop_last leaves them out; type "
        "data.batch_size=20",
    ),
    "no samples": (lambda: DataLoader([], batch_size=4), "list is empty; give it samples"),
    "a sampler": (
        lambda: DataLoader(Noisy(20), sampler=[], batch_size=4), "draws none of the 20 samples",
    ),
    "a stream": (lambda: DataLoader(Stream(0), batch_size=4), "got none of Stream"),
    "their own": (lambda: Forgetful([]), "got none of Forgetful"),
    "one of several": (
        lambda: {"one": DataLoader(Noisy(20), 4), "other": DataLoader([], 4)}, "list is empty",
    ),
    "a generator, once": (lambda: (torch.randn(4, 10) for _ in range(3)), "got none of generator"),
}  # fmt: skip


class EmptyData(Data):
    """Serves nothing, or soon nothing."""

    def train_dataloader(self) -> Any:
        return EMPTY[self.kind][0]()


@pytest.mark.parametrize("kind", EMPTY)
def test_da_empty_nothing_to_train_on_is_refused(checked: Callable[..., Any], kind: str) -> None:
    config = checked(*QUIET, "data._target_=test_loaders.EmptyData", f"+data.kind='{kind}'")
    run = build(config, [])
    with pytest.raises(Refused) as refusal:
        run.trainer.fit(run.model, datamodule=run.data)
    assert EMPTY[kind][1] in str(refusal.value)


def test_da_empty_a_share_of_no_batch_is_refused(checked: Callable[..., Any]) -> None:
    config = checked(*QUIET, "+data.kind=shuffled", "trainer.limit_train_batches=0.1")
    run = build(config, [])
    with pytest.raises(Refused, match=r"must leave one of the 6 batches of an epoch, got 0[.]1;"):
        run.trainer.fit(run.model, datamodule=run.data)


@pytest.mark.filterwarnings("ignore:train_dataloader yielded None")
def test_da_empty_a_fit_on_no_batch_is_not_finished(checked: Callable[..., Any]) -> None:
    LOADERS["only None"] = lambda: DataLoader([None, None], batch_size=None)
    config = checked(*QUIET, "+data.kind='only None'")
    folder = RunFolder(Path(config.run_dir))
    folder.path.mkdir(exist_ok=True)
    with pytest.raises(Refused, match="Recorder was trained on no batch: each one that"):
        train(config, folder)
    del LOADERS["only None"]


# ---------------------------------------------------------------------------- asked a second time


class Asks(Recorder):
    """Looks at its training data whenever it can, as for a bank of neighbours or class weights."""

    def look(self) -> int:
        mine = self.trainer.datamodule.train_dataloader()
        assert mine is not self.trainer.train_dataloader
        return sum(1 for _ in mine)

    def setup(self, stage: str) -> None:
        self.num_batches = self.look()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.look()
        return super().training_step(batch, batch_idx)

    def on_validation_start(self) -> None:
        self.look()
        if self.trainer.train_dataloader is not None:
            loaders = torch.utils._pytree.tree_leaves(self.trainer.train_dataloader)
            assert all(len(list(loader)) for loader in loaders)


@pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined")
@pytest.mark.parametrize(
    "kind", ["stream", "shuffled", "shuffled by a generator", "their own state", "their sampler"]
)
def test_da_again_a_second_loader_leaves_the_first_alone(
    checked: Callable[..., Any], tmp_path: Path, kind: str
) -> None:
    typed = (*QUIET, OFTEN, f"+data.kind='{kind}'", "model._target_=test_loaders.Asks")
    whole = fit(checked(*typed, f"run_dir={tmp_path}/whole"))
    config = checked(*typed, f"run_dir={tmp_path}/cut")
    num_batches = len(whole.model.trained_on)
    assert num_batches == 3 * whole.model.num_batches
    begun = 0
    for cut_at in (num_batches // 3 + 1, None):
        cut = fit(config, cut_at=cut_at)
        assert cut.model.trained_on == whole.model.trained_on[begun : cut_at or num_batches]
        begun = cut_at or num_batches


# -------------------------------------------------------------------------------- several processes


def filtered(items: list[Any]) -> Any:
    """A batch of the samples that could be read, and how many; None where there is none."""
    items = [item for item in items if item is not None]
    return {"x": torch.stack(items), "count": len(items)} if items else None


class Unreadable(Dataset):
    """Some of its samples cannot be read."""

    def __init__(self, num_samples: int, gaps: list[int]) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(num_samples, 3, generator=generator).double()
        self.gaps = gaps

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        return None if index in self.gaps else self.x[index]


class Line(pl.LightningModule):
    """Linear, in float64; notes which samples it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(3, 1).double()
        self.trained_on: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.trained_on.append(batch["x"][:, 0].tolist())
        return self.net(batch["x"]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class Lossy(pl.LightningDataModule):
    """Serves what can be read, in an order that it draws."""

    def __init__(self, num_samples: int, gaps: list[int], batch_size: int, shuffle: bool) -> None:
        super().__init__()
        self.set, self.batch_size = Unreadable(num_samples, gaps), batch_size
        self.shuffle = shuffle

    def train_dataloader(self) -> Any:
        assert self.trainer.world_size in (1, 2)
        return DataLoader(self.set, self.batch_size, shuffle=self.shuffle, collate_fn=filtered)


class Streams(pl.LightningDataModule):
    """An iterable set, of which each rank serves all."""

    def train_dataloader(self) -> Any:
        stream = [{"x": row[None].double()} for row in torch.eye(3)]
        return DataLoader(Wrapped(stream), batch_size=None)


class Wrapped(IterableDataset):
    """Any list, as a stream."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


LINE = ("model=custom", "model._target_=test_loaders.Line", "optimizer=none", "clip=none",
        "logger=none", "callbacks.progress=null", "callbacks.checkpoint=null",
        "trainer.accelerator=cpu", "trainer.max_epochs=2", "data=custom")  # fmt: skip
LOSSY = "data._target_=test_loaders.Lossy"
COUNTED = ("accumulate=constant", "accumulate.factor=3", "accumulate.weight_by=count")
TOGETHER: dict[str, tuple[str, ...]] = {
    "da-weights": (*COUNTED, LOSSY, "+data.num_samples=17", "+data.gaps=[]"),
    "da-none": (*COUNTED, LOSSY, "+data.num_samples=24", "+data.gaps=[9,11,13,15]"),
    "da-none, the first": (*COUNTED, LOSSY, "+data.num_samples=24", "+data.gaps=[1,3,5,7]"),
    "da-none, no window": (LOSSY, "+data.num_samples=24", "+data.gaps=[1,3,5,7]"),
    "da-order": (LOSSY, "+data.num_samples=24", "+data.gaps=[]"),
    "da-iterable": ("data._target_=test_loaders.Streams",),
}


def come_to(configs: dict[str, Any]) -> dict[str, Any]:
    """The weights of each, and which samples each step had, over all ranks."""
    torch.set_num_threads(1)
    found = {}
    for name, config in configs.items():
        run = build(config, [])
        run.trainer.fit(run.model, datamodule=run.data)
        every_rank = ranks().gathered(run.model.trained_on)
        steps = [
            sorted({x for batch in step for x in batch}) for step in zip(*every_rank, strict=True)
        ]
        found[name] = [run.model.net.weight.tolist(), steps]
    return found


def test_da_weights_da_none_da_order_da_iterable_two_ranks_are_one_process(
    checked: Callable[..., Any],
) -> None:
    def configs(num: int) -> dict[str, Any]:
        ways = {name: (*LINE, *typed) for name, typed in TOGETHER.items()}
        more = (f"trainer.devices={num}", *(["strategy=ddp"] if num > 1 else []))
        for name, typed in ways.items():
            if LOSSY in typed:
                shuffle = str(name == "da-order").lower()
                typed = (*typed, f"+data.batch_size={8 // num}", f"+data.shuffle={shuffle}")
            ways[name] = (*typed, *more)
        return {name: checked(*typed) for name, typed in ways.items()}

    alone = come_to(configs(1))
    together = run_local(
        come_to, configs(2), num_processes=2, start_method="forkserver", logging_config=None
    )
    for name, (weights, steps) in alone.items():
        assert together[name][0][0] == pytest.approx(weights[0], abs=1e-9), name
        if "none" not in name:
            assert together[name][1] == steps, name


class Measured(Line):
    """Validates batch by batch, and takes steps over two sets at once."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = MeanMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return sum(self.net(part["x"]).square().mean() for part in batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss, num = self.net(batch["x"]).square().mean(), len(batch["x"])
        self.mean.update(loss, num)
        self.log("val_loss", loss, batch_size=num)
        self.log("val_mean", self.mean, batch_size=num)


class Uneven(pl.LightningDataModule):
    """Pairs of batches, of 11 samples, and batches to validate that are one less than twice two."""

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> Any:
        some = {"batch_size": self.batch_size, "shuffle": True, "collate_fn": filtered}
        return [DataLoader(Unreadable(11, []), **some) for _ in range(2)]

    def val_dataloader(self) -> Any:
        batches = [[0], [1, 2], [3, 4]]
        return DataLoader(Unreadable(5, []), batch_sampler=batches, collate_fn=filtered)


def measured(config: Any) -> dict[str, float]:
    torch.set_num_threads(1)
    run = build(config, [])
    run.trainer.fit(run.model, datamodule=run.data)
    metrics = run.trainer.callback_metrics.items()
    found = {name: float(value) for name, value in metrics if name.startswith("val")}
    return found | {"weight": float(run.model.net.weight.detach().sum())}


def test_da_weights_a_batch_that_a_rank_repeats_counts_once_and_pairs_are_weighted(
    checked: Callable[..., Any],
) -> None:
    typed = [*LINE, "data._target_=test_loaders.Uneven"]
    typed[typed.index("model._target_=test_loaders.Line")] = "model._target_=test_loaders.Measured"
    alone = measured(checked(*typed, "+data.batch_size=8"))
    together = run_local(
        measured, checked(*typed, "+data.batch_size=4", "strategy=ddp", "trainer.devices=2"),
        num_processes=2, start_method="forkserver", logging_config=None,
    )  # fmt: skip
    assert together == pytest.approx(alone, abs=1e-6)


# ----------------------------------------------------------- what is in a batch, and how much of it

Named = namedtuple("Named", "x names")


@dataclass
class Sample:
    """A batch of their own, beside what no tensor is."""

    x: Any
    name: str = "somebody"


class Geometric(DataLoader):
    """Takes other arguments than a DataLoader, and adds to each batch."""

    def __init__(self, dataset: Any, batch_size: int = 1, follow: str = "x") -> None:
        self.follow = follow
        super().__init__(dataset, batch_size, collate_fn=lambda items: [i[0] for i in items])

    def __iter__(self) -> Any:
        return ({"x": torch.stack(one), "followed": self.follow} for one in super().__iter__())


def sized(num: int, batch_size: int, **settings: Any) -> Any:
    return DataLoader(Noisy(num), batch_size, **settings)


BATCHES: dict[str, tuple[Callable[[], Any], int | None, str]] = {
    "more than there are": (lambda: sized(20, 100000), 20, "micro-batch 20 x"),
    "a last smaller one": (lambda: sized(22, 4), 4, "= 4, the last of an epoch 2"),
    "dropped": (lambda: sized(22, 4, drop_last=True), 4, "world size 1 = 4\n"),
    "several": (lambda: {"a": sized(20, 4), "b": sized(20, 2)}, 6, "micro-batch 4 + 2 x"),
    "the shortest": (lambda: CombinedLoader([sized(20, 4), sized(9, 3)], "min_size"), 7, "4 + 3"),
    "of all lengths": (
        lambda: DataLoader(Noisy(20), batch_sampler=[[0, 1], [2, 3, 4]]), None, "unknown",
    ),
    "of one length": (lambda: DataLoader(Noisy(20), batch_sampler=[[0, 1], [2, 3]]), 2, "= 2"),
    "a class of their own": (lambda: Geometric(Noisy(20), 4), 4, "= 4"),
    "strings and sparse": (
        lambda: sized(20, 4, collate_fn=lambda items: {
            "names": ["a", None], "x": torch.stack([item[0] for item in items]),
            "nest": [{"edges": torch.eye(3).to_sparse()}, ("b", None)],
        }), 4, "= 4",
    ),
    "named": (
        lambda: sized(20, 4, collate_fn=lambda i: Named(torch.stack([x for x, _ in i]), ["a"])),
        4, "= 4",
    ),
}  # fmt: skip


class Batches(Data):
    """Serves one of the batches above, and asks its trainer."""

    def train_dataloader(self) -> Any:
        assert self.trainer.world_size == 1
        return BATCHES[self.kind][0]()


@pytest.mark.parametrize("kind", BATCHES)
def test_da_size_da_kinds_what_is_said_of_a_batch_is_what_a_step_takes(
    checked: Callable[..., Any], kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = checked(*QUIET, "data._target_=test_loaders.Batches", f"+data.kind='{kind}'")
    table = StartTable(config.plain)
    run = build(config, [table])
    run.trainer.fit(run.model, datamodule=run.data)
    assert run.trainer.global_step == 3 * run.trainer.num_training_batches > 0
    assert table.batch["effective_batch"] == BATCHES[kind][1]
    assert BATCHES[kind][2] in capsys.readouterr().out


def test_da_size_an_effective_batch_of_more_than_an_epoch_is_refused(
    checked: Callable[..., Any],
) -> None:
    config = checked(
        *QUIET, "data._target_=test_loaders.Batches", "+data.kind='a last smaller one'",
        "accumulate=effective", "accumulate.batch_size=32", "accumulate.micro_batch_size=4",
    )  # fmt: skip
    run = build(config, [])
    with pytest.raises(Refused, match="at most the 22 samples of an epoch, got 32; type a micro-b"):
        run.trainer.fit(run.model, datamodule=run.data)


def test_da_kinds_a_split_loader_is_of_the_class_it_was() -> None:
    mine, is_split = split(Geometric(Noisy(20), 4), share=Share(1, 2), evaluates=False)
    assert is_split
    assert type(mine) is Geometric
    assert [batch["followed"] for batch in mine] == ["x"] * 3
