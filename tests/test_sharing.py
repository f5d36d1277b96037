"""One copy of the data for all processes, and the same run as with each its own."""

import gzip
import io
import multiprocessing
import os
import pickle
import random
import signal
import time
import warnings
from array import array
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from conftest import refuse
from theirs import LitModel
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    random_split,
)

from app.conf.sharing.schema import Mmap as MmapSchema
from app.errors import Refused
from app.process.random_state import random_state
from app.run.build import build_model_and_data
from app.sharing import Mmap, PackedList, Shared, memory, modes, store
from app.sharing.key import digest, own_sources
from app.sharing.packing import Limits, Packed, Plan, unpack

SETTINGS: dict[str, Any] = {"key": None, "min_bytes": 1024, "min_items": 1000}
LIMITS = Limits(1024, 1000)
KINDS: list[Any] = [Shared, Mmap]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["app.sharing"])
OWN = "each process keeps its own copy of the data"


def pack(value: Any) -> Packed:
    """Pack into memory of this process."""
    plan = Plan(value, LIMITS, {})
    chunks = [np.zeros(size, np.uint8) for size in plan.sizes]
    for number, chunk in enumerate(chunks):
        plan.write(number, chunk)
    return Packed(plan.skeleton, chunks)


def again(value: Any) -> Any:
    """The value, over memory that was packed."""
    return unpack(pack(value), {})


class Plus:
    """A transform, as users write them."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(self, x: Any) -> Any:
        return x + self.number


class Samples(Dataset):
    """Arrays of several shapes, texts, labels, and a transform."""

    def __init__(self, num_samples: int) -> None:
        self.features = torch.arange(num_samples * 10).view(num_samples, 10) / num_samples
        self.signals = [np.full(256 * (1 + i % 3), i, np.float32) for i in range(num_samples)]
        self.rows = [(f"file {i}", i % 2) for i in range(num_samples)]
        self.transform = Plus(len(self.rows))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        x = self.transform(self.features[index]) + float(self.signals[index][-1])
        return x + torch.rand(10), self.rows[index][1]


class Theirs(pl.LightningDataModule):
    """As users write them; sets up once for each stage, and counts."""

    def __init__(
        self,
        batch_size: int = 50,
        num_samples: int = 1500,
        draws: str = "nothing",
        log: str | None = None,
        workers: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.batch_size = batch_size
        self.offset = random.random() if draws == "in init" else 0.0

    def prepare_data(self) -> None:
        self._count("prepare")

    def setup(self, stage: str) -> None:
        self._count(stage)
        if self.trainer is not None:
            self.batch_size = self.hparams["batch_size"] // self.trainer.world_size
        samples = Samples(self.hparams["num_samples"])
        if stage == "fit":
            draws = self.hparams["draws"] == "in setup"
            generator = None if draws else torch.Generator().manual_seed(0)
            sizes = [len(samples) - 100, 100]
            self.train, self.val = random_split(samples, sizes, generator=generator)
        else:
            self.test = TensorDataset(samples.features + self.offset, samples.features[:, 0])

    def train_dataloader(self) -> DataLoader:
        workers = self.hparams["workers"]
        return DataLoader(self.train, self.batch_size, shuffle=True, num_workers=workers)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, 100)

    def _count(self, what: str) -> None:
        if self.hparams["log"] is not None:
            with open(self.hparams["log"] + ".txt", "a") as file:
                file.write(f"{what}\n")


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    yield
    modes._given.clear()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def calls(tmp_path: Path) -> SimpleNamespace:
    """The log of a data module's setups, and how many there were."""
    path = tmp_path / "calls.txt"
    return SimpleNamespace(
        path=str(path.with_suffix("")),
        read=lambda: path.read_text().split() if path.exists() else [],
    )


def made(
    kind: Any, cache: Path, *, seed: int = 0, world_size: int | None = None, **about: Any
) -> Theirs:
    """A data module as a run builds it."""
    pl.seed_everything(seed, verbose=False)
    data = Theirs(**about)
    if world_size is not None:
        data.trainer = SimpleNamespace(world_size=world_size, global_rank=0)  # type: ignore[assignment]
    if kind is not None:
        sharing = kind(cache=str(cache), **SETTINGS)
        sharing.attach(data, {"data": about})
    return data


def state(data: Theirs) -> list[Any]:
    """What a run would see: every sample, and the numbers drawn after it."""
    batches = [*data.train_dataloader(), *data.val_dataloader()]
    tests = [tensor.clone() for tensor in data.test.tensors] if hasattr(data, "test") else []
    return [data.batch_size, digest(batches), digest(tests), digest(random_state())]


def private_mb(pid: int) -> float:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    sizes = [line.split() for line in text.splitlines() if line.startswith("Private_")]
    return sum(int(size[1]) for size in sizes) / 1024


# ---- packing


X = torch.arange(5000.0).view(50, 100)
N = np.arange(6000).reshape(60, 100)
PLAIN = {
    "float32": X,
    "transposed": X.t(),
    "strided": X[10:20, ::2],
    "expanded": X[:1].expand(7, 100),
    "bool": X > 3,
    "float16": X.half(),
    "bfloat16": X.bfloat16(),
    "scalar": torch.tensor(3),
    "empty": torch.empty(0, 3),
    "array": N,
    "array in Fortran's order": np.asfortranarray(N),
    "array backwards": N[::-1, ::-3],
    "array of bytes swapped": N.astype(">i2"),
    "array of structures": np.ones(500, [("a", "i4"), ("b", "f8")]),
    "array of dates": N.astype("M8[s]"),
    "array of objects": np.array([["a", None]] * 1000, object),
}


@pytest.mark.parametrize("kind", PLAIN)
def test_what_is_unpacked_is_what_was_packed(kind: str) -> None:
    packed = pack({"value": PLAIN[kind]})
    expected, found = PLAIN[kind], unpack(packed, {})["value"]
    assert type(found) is type(expected)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert (np.asarray(found == expected)).all()
    if isinstance(expected, torch.Tensor):
        assert found.stride() == expected.stride()
        found.clone()
    elif expected.size:
        assert found.strides == expected.strides


LISTS = {
    "arrays": [np.full(4, i) for i in range(2000)],
    "arrays of several shapes": [np.full(i % 3, i) for i in range(2000)],
    "transposed arrays": [np.arange(12).reshape(3, 4).T + i for i in range(2000)],
    "tensors": [torch.full((3,), i) for i in range(2000)],
    "bfloat16": [torch.full((3,), i).bfloat16() for i in range(2000)],
    "scalar tensors": list(torch.arange(2000)),
    "texts": [f"é{i}\udcff" for i in range(2000)],
    "bytes": [b"%d" % i for i in range(2000)],
    "numbers": list(range(2000)),
    "floats": [i / 3 for i in range(2000)],
    "numpy's numbers": list(np.arange(2000, dtype=np.float32)),
    "rows": [(f"{i}", i, np.full(2, i)) for i in range(2000)],
}


@pytest.mark.parametrize("kind", LISTS)
def test_a_long_list_comes_back_with_equal_items(kind: str) -> None:
    items = LISTS[kind]
    packed = pack(items)
    found = unpack(packed, {})
    assert isinstance(found, PackedList)
    assert len(packed.skeleton) < 2000
    assert len(found) == len(items)
    for mine, theirs in zip(found, items, strict=True):
        assert type(mine) is type(theirs)
        assert digest(mine) == digest(theirs)
    assert digest(found[-3]) == digest(items[-3])
    assert digest(list(found[10:1900:7])) == digest(items[10:1900:7])
    assert digest(list(pickle.loads(pickle.dumps(found)))) == digest(list(found))
    with pytest.raises(IndexError, match="list index out of range"):
        found[2000]


@pytest.mark.parametrize(
    "items",
    [
        [1, "a"] * 1000,
        [np.array(["a", None], object)] * 1000,
        [2**70] * 1000,
        [np.zeros(2), np.zeros((2, 2))] * 1000,
        [torch.nn.Parameter(torch.ones(2)) for _ in range(1000)],
        [[1]] * 1000,
        ["the same"] * 1000,
        list(range(999)),
    ],
)
def test_a_list_of_other_things_stays_a_list(items: list[Any]) -> None:
    found = again(items)
    assert type(found) is list
    assert digest(found) == digest(items)


def test_a_packed_list_does_what_a_list_does() -> None:
    items = list(range(3000))
    found = again(items)
    assert found == items
    assert found != items[1:]
    assert isinstance(found[:2500], PackedList)
    assert found[5:8] == [5, 6, 7]
    assert type(found[5:8]) is list
    assert found + items == items + found == items + items
    assert 7 in found
    assert (np.asarray(found) == items).all()
    assert (torch.tensor(found) == torch.arange(3000)).all()
    generator = random.Random(0)
    generator.shuffle(found)
    random.Random(0).shuffle(items)
    found.append(5)
    found[0] = -1
    found.sort()
    assert found == sorted([-1, *items[1:], 5])


def test_what_is_one_object_stays_one_and_is_stored_once() -> None:
    long = [np.full(100, i) for i in range(1000)]
    value = {"x": X, "again": X, "view": X[5:], "n": N, "m": N[:, 3:], "long": long, "l": long}
    plan = Plan(value, LIMITS, {})
    rows = [*range(len(long))]
    assert (
        sum(plan.sizes) < X.nbytes + N.nbytes + 1000 * (long[0].nbytes + 64) + 8 * len(rows) + 256
    )
    found = again(value)
    assert found["again"] is found["x"]
    assert found["l"] is found["long"]
    found["x"][5, 0] = -7
    assert found["view"][0, 0] == -7
    found["n"][0, 3] = -8
    assert found["m"][0, 0] == -8
    assert (X[5, 0], N[0, 3]) == (500, 3)


def test_a_list_of_views_of_one_array_stays_as_small_as_it_is() -> None:
    signal_ = np.arange(100_000)
    windows = [signal_[start : start + 1000] for start in range(90_000)]
    plan = Plan(windows, LIMITS, {})
    assert sum(plan.sizes) < signal_.nbytes + 8 * len(windows) + 256


def test_a_saved_tensor_is_not_all_that_was_packed_with_it(tmp_path: Path) -> None:
    found = again([torch.ones(1_000_000), torch.ones(1000)])
    torch.save(found[1], tmp_path / "one.pt")
    assert (tmp_path / "one.pt").stat().st_size < 10_000
    assert found[1].clone().untyped_storage().nbytes() == 4000


def test_small_memory_and_objects_are_copied_for_each_process_and_written_elements_are() -> None:
    weight = torch.nn.Parameter(torch.ones(3000))
    value = {"small": torch.ones(3), "weight": weight, "object": {1, 2}, "x": torch.ones(3000)}
    packed = pack(value)
    first, second = unpack(packed, {}), unpack(packed, {})
    first["small"][0] = 5
    assert second["small"][0] == 1
    assert isinstance(first["weight"], torch.nn.Parameter)
    assert first["object"] == {1, 2}


def test_a_tensor_in_shared_memory_gets_its_own_again() -> None:
    found = again({"counter": torch.zeros(2000).share_memory_()})
    assert found["counter"].is_shared()


def test_a_file_that_the_user_maps_is_mapped_again(tmp_path: Path) -> None:
    np.arange(5000).tofile(tmp_path / "theirs")
    whole = np.memmap(tmp_path / "theirs", np.int64, "r")
    packed = pack({"whole": whole, "part": whole[100:200:2], "plain": np.asarray(whole)[5:]})
    assert sum(chunk.size for chunk in packed.chunks) == 64
    found = unpack(packed, {})
    assert type(found["part"]) is np.memmap
    assert (found["whole"] == np.arange(5000)).all()
    assert (found["part"] == np.arange(100, 200, 2)).all()
    assert (found["plain"] == np.arange(5, 5000)).all()


def test_a_buffer_of_any_library_goes_beside_the_pickle() -> None:
    class_ = Buffered(np.arange(1000.0))
    packed = pack(class_)
    assert len(packed.skeleton) < 2000
    assert (unpack(packed, {}).values == np.arange(1000.0)).all()


class Buffered:
    """Hands out its memory as protocol 5 has it; a library's own type."""

    def __init__(self, values: Any) -> None:
        self.values = np.frombuffer(values, np.float64)

    def __reduce_ex__(self, protocol: Any) -> Any:
        assert protocol == 5
        return Buffered, (pickle.PickleBuffer(self.values),)


# ---- the same run


@pytest.mark.parametrize("draws", ["nothing", "in setup", "in init"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_data_and_the_random_numbers_are_those_of_a_run_without(
    kind: Any, draws: str, cache: Path, calls: SimpleNamespace
) -> None:
    for seed in (0, 1):
        own = made(None, cache, draws=draws, seed=seed)
        own.setup("fit")
        first = state(own)
        own.setup("test")
        second = state(own)
        for _ in range(2):
            data = made(kind, cache, draws=draws, seed=seed, log=calls.path)
            data.setup("fit")
            assert isinstance(data.train.dataset.signals, PackedList)
            assert state(data) == first
            data.setup("test")
            assert state(data) == second
    expected = {Shared: 4, Mmap: 1 if draws == "nothing" else 2}[kind]
    assert calls.read().count("fit") == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_a_fit_ends_with_the_same_weights(cache: Path, tmp_path: Path, workers: int) -> None:
    weights = []
    for kind in (None, Shared, Mmap, Mmap):
        data = made(kind, cache, draws="in setup", workers=workers)
        model = LitModel()
        trainer = pl.Trainer(
            max_steps=5,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="cpu",
            default_root_dir=tmp_path,
        )
        trainer.fit(model, datamodule=data)
        weights.append(digest(dict(model.state_dict())))
    assert len(set(weights)) == 1


@pytest.mark.parametrize("name", ["mnist1d", "digits", "graph"])
def test_our_own_data_are_the_same_bit_for_bit(
    name: str, checked: Callable[..., dict[str, Any]], cache: Path
) -> None:
    if name == "digits":
        pytest.importorskip("sklearn")
    found = []
    for sharing in ("none", "shared", "mmap", "mmap"):
        chosen = [] if sharing == "none" else [f"sharing.cache={cache}"]
        chosen += ["model=graphsage", "data.num_nodes=5000"] if name == "graph" else []
        _, data = build_model_and_data(checked(f"data={name}", f"sharing={sharing}", *chosen))
        for stage in ("fit", "test"):
            data.setup(stage)
            loader = data.train_dataloader() if stage == "fit" else data.test_dataloader()
            found.append([digest([*islice(loader, 20)]), digest(random_state())])
    assert found == found[:2] * 4


def test_a_second_stage_does_not_store_the_memory_of_the_first_again(cache: Path) -> None:
    data = made(Mmap, cache, num_samples=12_000)
    data.setup("fit")
    before = {path.name: path.stat().st_size for path in cache.glob("*.bin")}
    data.setup("test")
    new = [path.stat().st_size for path in cache.glob("*.bin") if path.name not in before]
    assert sum(new) < sum(before.values()) / 10
    parent = made(None, cache, num_samples=12_000)
    sharing = Shared(cache=str(cache), **SETTINGS)
    config = {"data": {"num_samples": 12_000}}
    packs = sharing.collect(parent, config, stages=["fit", "test"], num_processes=1)
    first, second = packs.values()
    shared = {(region, start) for region, start, _ in first.chunks}
    new = [end - start for region, start, end in second.chunks if (region, start) not in shared]
    assert sum(new) < sum(before.values()) / 10


class Twice(pl.LightningDataModule):
    """Holds two equal arrays, one made in __init__."""

    def __init__(self) -> None:
        super().__init__()
        self.first = np.ones(2**20)

    def setup(self, stage: str) -> None:
        self.second = np.ones(2**20)


@pytest.mark.parametrize("kind", KINDS)
def test_what_init_made_is_shared_too_and_equal_memory_is_one_file(kind: Any, cache: Path) -> None:
    for _ in range(2):
        data = Twice()
        kind(cache=str(cache), **SETTINGS).attach(data, {"data": {}})
        data.setup("fit")
        assert not data.first.flags.owndata
        data.first[0] = 5
        assert data.second[0] == 1
    assert len([*cache.glob("*.bin")]) == (2 if kind is Mmap else 0)  # one is of small arrays


def test_runs_of_other_batch_sizes_map_the_same_memory(cache: Path, calls: SimpleNamespace) -> None:
    for batch_size in (10, 20):
        data = made(Mmap, cache, batch_size=batch_size, log=calls.path)
        data.setup("fit")
        assert data.batch_size == batch_size
    assert calls.read() == ["fit", "fit"]
    assert len(list(cache.glob("*.bin"))) == 1


class Reads(pl.LightningDataModule):
    """Reads a file; counts."""

    def __init__(self, path: Path, version: str = "1") -> None:
        super().__init__()
        self.path = path

    def setup(self, stage: str) -> None:
        files = sorted(self.path.glob("*.txt")) if self.path.is_dir() else [self.path]
        self.train = np.concatenate([np.loadtxt(file) for file in files])


@pytest.mark.parametrize("named", ["theirs.txt", "folder", "folder/inner"])
def test_data_are_set_up_anew_where_a_file_that_is_named_has_changed(
    cache: Path, tmp_path: Path, named: str
) -> None:
    path = tmp_path / named
    file = path if path.suffix else path / "theirs.txt"
    file.parent.mkdir(parents=True, exist_ok=True)
    found = []
    for content in (1.0, 2.0):
        np.savetxt(file, np.full(1000, content))
        for _ in range(2):
            data = Reads(path)
            Mmap(cache=str(cache), **SETTINGS).attach(data, {"data": {}})
            data.setup("fit")
            found.append(float(data.train[0]))
    assert found == [1, 1, 2, 2]
    assert len(list(cache.glob("*.pack"))) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_the_users_key_tells_data_apart_and_answers_for_what_is_not_seen(
    kind: Any, cache: Path, tmp_path: Path
) -> None:
    """The folder that a data module names holds the cache: its files come and go."""
    np.savetxt(tmp_path / "theirs.txt", np.ones(1000))
    message = (
        f"sharing: {tmp_path} of Reads cannot be compared with that of other processes \\(it holds "
        f"sharing.cache, or more than 100,000 files\\); {OWN}; type sharing.key=1, and another one "
        "whenever it changes"
    )
    kept = []
    for key in (None, "1", "1", "2"):
        data = Reads(tmp_path)
        data.trainer = SimpleNamespace(world_size=2, global_rank=0)  # type: ignore[assignment]
        sharing = kind(cache=str(cache), **{**SETTINGS, "key": key})
        modes._given[:] = [{}]
        sharing.attach(data, {"data": {}})
        if key is None:
            with pytest.warns(UserWarning, match=message):
                data.setup("fit")
        else:
            data.setup("fit")
        assert data.train[0] == 1
        assert data.train.flags.owndata == (key is None)
        kept.append(len(list(cache.glob("*.pack"))))
    assert kept == [0, 1, 1, 2]


class Chooses(Theirs):
    """Holds a lambda, from the beginning."""

    def __init__(self, **about: Any) -> None:
        super().__init__(**about)
        self.choose = lambda x: x + 1

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.chosen = [self.choose]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key", [None, "1"])
def test_a_lambda_keeps_data_private_until_the_users_key_answers_for_it(
    kind: Any, key: str | None, cache: Path, calls: SimpleNamespace
) -> None:
    about = {"log": calls.path}
    config = {"data": about}
    sharing = kind(cache=str(cache), **{**SETTINGS, "key": key})
    packs: Any = {}
    if sharing.collects_before_start:
        packs = sharing.collect(Chooses(**about), config, stages=["fit"], num_processes=2)
        assert bool(packs) == (key is not None)
    Shared.give(packs)
    before = len(calls.read())
    for _ in range(2):
        data = Chooses(**about)
        data.trainer = SimpleNamespace(world_size=2, global_rank=0)  # type: ignore[assignment]
        sharing.attach(data, config)
        if key is None:
            with pytest.warns(UserWarning, match=f"choose of Chooses cannot be compared .*; {OWN}"):
                data.setup("fit")
        else:
            data.setup("fit")
            assert isinstance(data.train.dataset.signals, PackedList)
        assert data.chosen == [data.choose]
    expected = 2 if key is None else 0 if kind is Shared else 1
    assert len(calls.read()) - before == expected


def test_what_the_trainer_says_decides_too(cache: Path, calls: SimpleNamespace) -> None:
    sizes = []
    for world_size in (1, 2, 2):
        data = made(Mmap, cache, world_size=world_size, log=calls.path)
        data.setup("fit")
        sizes.append(data.batch_size)
        assert type(data.trainer) is SimpleNamespace
    assert sizes == [50, 25, 25]
    assert calls.read() == ["fit", "fit"]


# ---- data as other people write them


class ImageFolder(Dataset):
    """Paths with classes and transforms, as torchvision has them."""

    def __init__(self, transform: Callable[[Any], Any] | None) -> None:
        self.samples = [(f"root/class{i % 3}/{i}.png", i % 3) for i in range(2000)]
        self.targets = [target for _, target in self.samples]
        self.classes = ["class0", "class1", "class2"]
        self.class_to_idx = {name: index for index, name in enumerate(self.classes)}
        self.transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        path, target = self.samples[index]
        image = torch.tensor([*path.encode()])
        return image if self.transform is None else self.transform(image), target


class Columns:
    """A dict of columns, as Hugging Face's datasets have them."""

    def __init__(self) -> None:
        self.columns: dict[str, Any] = {
            "text": [f"sentence {i}" for i in range(2000)],
            "label": [i % 2 for i in range(2000)],
            "score": np.arange(2000, dtype=np.float32),
        }

    def __len__(self) -> int:
        return 2000

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: column[index] for name, column in self.columns.items()}


@dataclass
class Box:
    """A part of a sample."""

    corners: Any
    name: str


@dataclass
class Scene:
    """A sample that holds others."""

    boxes: list[Box]
    camera: dict[str, Any] = field(default_factory=dict)


class Slotted:
    """Has no __dict__."""

    __slots__ = ("x", "y")

    def __init__(self, x: Any, y: Any) -> None:
        self.x = x
        self.y = y


class Stream(IterableDataset):
    """Draws as it goes, from a generator of its own."""

    def __init__(self) -> None:
        self.table = np.arange(4000.0).reshape(1000, 4)
        self.rng = np.random.default_rng(3)

    def __iter__(self) -> Iterator[Any]:
        return (self.table[i] for i in self.rng.integers(0, 1000, 50))


class Marked(torch.Tensor):
    """A subclass of torch's tensor."""


class Colour(Enum):
    """A user's own."""

    red = 1


Pair = namedtuple("Pair", ["x", "y"])


def tokens() -> list[list[int]]:
    return [list(range(i % 17)) for i in range(2000)]


def frame() -> Any:
    columns = {"a": np.arange(2000.0), "b": [f"{i}" for i in range(2000)], "c": np.arange(2000)}
    if find_spec("pandas") is None:
        return columns
    import pandas

    return pandas.DataFrame(columns)


def matrix() -> Any:
    if find_spec("scipy") is None:
        return X.to_sparse()
    from scipy.sparse import csr_matrix

    return csr_matrix(np.eye(300))


def tied() -> Any:
    whole = torch.arange(4000.0)
    whole.numpy()[::2] += 1
    return {
        "whole": whole,
        "part": whole[100:],
        "rows": list(whole.view(40, 100)),
        "n": whole.numpy(),
    }


def computed() -> Any:
    return torch.ones(3000, requires_grad=True) * 2


def ragged() -> Any:
    rows = np.empty(1500, object)
    rows[:] = [np.arange(i % 5) for i in range(1500)]
    return rows


FOREIGN: dict[str, Callable[[], Any]] = {
    "torchvision": lambda: ImageFolder(Plus(1)),
    "columns": Columns,
    "frame": frame,
    "dataclasses": lambda: [Scene([Box(X[i], f"{i}")], {"n": N[i]}) for i in range(50)],
    "structures": lambda: np.array([(i, i / 3, b"x") for i in range(2000)], "i4,f8,S3"),
    "records": lambda: np.rec.array([(i, i / 3) for i in range(2000)], dtype="i4,f8"),
    "masked": lambda: np.ma.masked_less(N, 7),
    "iterable": Stream,
    "tensors": lambda: TensorDataset(X, X[:, 0].long()),
    "concatenated": lambda: ConcatDataset(
        [Subset(TensorDataset(X), range(5)), *random_split(TensorDataset(X), [30, 20])]
    ),
    "tokens": tokens,
    "sparse": lambda: [X.to_sparse(), X.to_sparse_csr(), matrix()],
    "slots": lambda: [Slotted(X, N), Slotted(X, None)],
    "tied": tied,
    "dtypes": lambda: {
        str(dtype): torch.arange(3000).to(dtype)
        for dtype in (torch.bool, torch.bfloat16, torch.float16, torch.complex64, torch.int8)
    },
    "conjugate": lambda: torch.complex(X, X).conj(),
    "empty": lambda: [torch.empty(0, 3), np.empty((0, 3)), [torch.empty(0)] * 1000, [], ""],
    "not contiguous": lambda: [X.t(), X[::3, 1::2], X[:1].expand(7, 100), N.T, N[::-1, ::-3]],
    "gradients": lambda: [torch.ones(3000, requires_grad=True), torch.nn.Parameter(X)],
    "modules": lambda: torch.nn.Embedding.from_pretrained(X),
    "ragged": ragged,
    "generators of numbers": lambda: [random.Random(3), np.random.default_rng(3)],
    "collections": lambda: [deque([1]), Counter("ab"), defaultdict(list, a=[N]), OrderedDict(b=X)],
    "named tuples": lambda: [Pair(i, str(i)) for i in range(2000)],
    "plain": lambda: [Colour.red, Path("a"), datetime(2020, 1, 1), {1, 2}, 1j, ..., b"x" * 2000],
    "encoded images": lambda: [bytes([i % 256] * (i % 50)) for i in range(2000)],
    "buffers": lambda: [array("d", [1.5] * 2000), bytearray(b"y" * 2000)],
    "subclass": lambda: X.as_subclass(Marked),
    "itself": lambda: {"rows": [X] * 1000, "long": list(range(5000))},
}
ONLY_HERE: dict[str, Callable[[], Any]] = {
    "lambda": lambda: ImageFolder(lambda image: image * 2),
    "generator": lambda: (i for i in range(3000)),
    "open file": lambda: gzip.GzipFile(fileobj=io.BytesIO()),
    "computed": computed,
    "iterator": lambda: iter(list(range(3000))),
    "local class": lambda: type("Local", (), {"x": 3})(),
    "view of memory": lambda: memoryview(b"x" * 2000),
}


class Foreign(pl.LightningDataModule):
    """Holds one of these."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def setup(self, stage: str) -> None:
        self.train = {**FOREIGN, **ONLY_HERE}[self.kind]()


def told(value: Any) -> Any:
    """All that a run could tell of a value."""
    if isinstance(value, torch.Tensor):
        plain = value.detach()
        plain = plain.as_subclass(torch.Tensor) if type(plain) is Marked else plain
        about: Any = [str(value.layout), value.requires_grad, str(value.dtype)]
        if value.layout is torch.strided:
            about += [value.stride(), value.is_conj()]
        return [type(value), *about, digest(plain.to_dense().resolve_conj().clone())]
    if isinstance(value, np.ndarray) and value.dtype != object:
        return [
            type(value),
            str(value.dtype),
            value.size and value.strides,
            digest(np.array(value)),
        ]
    if isinstance(value, PackedList | list | tuple | deque | np.ndarray):
        return [told(item) for item in value]
    if isinstance(value, dict):
        return [type(value), *((name, told(item)) for name, item in value.items())]
    if isinstance(value, Dataset) and hasattr(value, "__len__"):
        return [type(value), *(told(value[index]) for index in range(len(value)))]
    if isinstance(value, IterableDataset):
        return [type(value), *map(told, value), told(vars(value))]
    if isinstance(value, Slotted):
        return [type(value), told(value.x), told(value.y)]
    if hasattr(value, "__dict__") and not isinstance(value, type | Enum):
        return [type(value), told(vars(value))]
    return [type(value), digest(value)]


def ways(cache: Path, kind: str) -> Iterator[tuple[str, Foreign]]:
    """The data, by each way of sharing them, not yet set up; behind each its random state."""
    config = {"data": {"kind": kind}}
    for way in ("none", "alone", "collected", "made", "taken"):
        if way == "collected":
            pl.seed_everything(0, verbose=False)
            shared = Shared(cache=str(cache), **SETTINGS)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                packs = shared.collect(Foreign(kind), config, stages=["fit"], num_processes=2)
            Shared.give(packs)
        pl.seed_everything(0, verbose=False)
        data = Foreign(kind)
        if way != "none":
            data.trainer = SimpleNamespace(world_size=2, global_rank=0)  # type: ignore[assignment]
            if way == "alone":
                data.trainer.world_size = 1
            sharing = Mmap if way in ("made", "taken") else Shared
            sharing(cache=str(cache), **SETTINGS).attach(data, config)
        yield way, data
        modes._given.clear()


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize("kind", FOREIGN)
def test_data_of_other_people_are_the_same_bit_for_bit(kind: str, cache: Path) -> None:
    expected: Any = None
    for way, data in ways(cache, kind):
        data.setup("fit")
        found = [told(data.train), digest(random_state())]
        if kind == "tied":
            data.train["whole"][100] = data.train["n"][7] = -5
            found += [float(data.train["part"][0]), float(data.train["whole"][7])]
            found += [float(data.train["rows"][1][0]), float(data.train["rows"][0][7])]
        expected = found if way == "none" else expected
        assert found == expected, way
    assert len(list(cache.glob("*.pack"))) == 1


@pytest.mark.parametrize("kind", ONLY_HERE)
def test_data_that_make_sense_in_one_process_only_stay_private(kind: str, cache: Path) -> None:
    for way, data in ways(cache, kind):
        if way == "none":
            data.setup("fit")
            continue
        with pytest.warns(UserWarning, match=f"of Foreign cannot be shared .*{OWN}"):
            data.setup("fit")
        assert type(data.train) is type(ONLY_HERE[kind]()) or kind == "local class"
        if kind == "lambda":
            assert told(data.train) == told(ONLY_HERE[kind]())
    assert not list(cache.glob("*.pack"))


# ---- several processes


def _about_values() -> list[str]:
    values = [
        {"a", "b", "c", 1},
        Samples,
        Plus(3),
        torch.nn.Parameter(X),
        torch.empty(0, 2),
        X.to_sparse(),
        X.t(),
        np.array(["a", None]),
        random.Random(0),
        ["ab", "a" + "b"],
    ]
    return [digest(value) for value in values]


def _tell_about_values(results: Any) -> None:
    results.put(_about_values())


def test_a_hash_is_the_same_in_another_process() -> None:
    results = SERVER.Queue()
    process = SERVER.Process(target=_tell_about_values, args=(results,))
    process.start()
    found = results.get(timeout=120)
    process.join()
    assert found == _about_values()


def _set_up(cache: Path, log: str, results: Any) -> None:
    data = made(Mmap, cache, log=log, draws="in setup")
    data.setup("fit")
    results.put(state(data))


def test_processes_that_start_together_set_up_once(cache: Path, calls: SimpleNamespace) -> None:
    results = SERVER.Queue()
    arguments = (cache, calls.path, results)
    processes = [SERVER.Process(target=_set_up, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    states = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    own = made(None, cache, draws="in setup")
    own.setup("fit")
    assert states == [state(own)] * 4
    assert calls.read() == ["fit"]


def _stop_while_writing(cache: Path, is_writing: Any) -> None:
    write = Plan.write

    def write_half(plan: Plan, chunk: int, content: Any) -> None:
        write(plan, chunk, content)
        is_writing.set()
        time.sleep(60)

    Plan.write = write_half  # type: ignore[method-assign]
    made(Mmap, cache).setup("fit")


def test_what_a_killed_process_was_writing_is_removed_and_written_again(cache: Path) -> None:
    is_writing = SERVER.Event()
    process = SERVER.Process(target=_stop_while_writing, args=(cache, is_writing))
    process.start()
    assert is_writing.wait(60)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert list(cache.glob("*.part"))
    assert not list(cache.glob("*.pack"))
    data = made(Mmap, cache)
    data.setup("fit")
    assert not list(cache.glob("*.part"))
    assert list(cache.glob("*.pack"))
    assert len(data.train) == 1400


def _read(packs: Any, cache: Path, log: str, results: Any, may_end: Any) -> None:
    before = private_mb(os.getpid())
    Shared.give(packs)
    data = made(Shared, cache, world_size=2, num_samples=12_000, log=log)
    data.prepare_data()
    data.setup("fit")
    samples = data.train.dataset
    float(samples.features.sum()) + sum(float(signal.sum()) for signal in samples.signals)
    results.put((state(data), private_mb(os.getpid()) - before))
    may_end.wait(60)


def test_spawn_memory_spawned_processes_read_the_memory_of_the_one_that_started_them(
    cache: Path, calls: SimpleNamespace
) -> None:
    about = {"num_samples": 12_000, "log": calls.path}
    parent, sharing = made(None, cache, **about), Shared(cache=str(cache), **SETTINGS)
    config = {"data": about}
    packs = sharing.collect(parent, config, stages=["fit"], num_processes=2)
    (given,) = packs.values()
    size_mb = sum(end - start for _, start, end in given.chunks) / 2**20
    assert size_mb > 20
    results, may_end = SERVER.Queue(), SERVER.Event()
    arguments = (packs, cache, calls.path, results, may_end)
    processes = [SERVER.Process(target=_read, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    found = [results.get(timeout=120) for _ in processes]
    may_end.set()
    for process in processes:
        process.join()
    own = made(None, cache, world_size=2, **about)
    own.setup("fit")
    expected = state(own)
    for their_state, private in found:
        assert their_state == expected
        assert private < size_mb / 2
    assert calls.read() == ["prepare", "fit", "fit"]  # the last one is ours
    assert not cache.exists()


def test_packs_of_another_random_state_are_not_used(cache: Path, calls: SimpleNamespace) -> None:
    about = {"draws": "in setup", "log": calls.path}
    parent, sharing = made(None, cache, **about), Shared(cache=str(cache), **SETTINGS)
    config = {"data": about}
    Shared.give(sharing.collect(parent, config, stages=["fit"], num_processes=1))
    for seed, num_calls in ((0, 2), (1, 3)):
        data = made(Shared, cache, seed=seed, world_size=1, **about)
        data.setup("fit")
        found = state(data)
        assert len(calls.read()) == num_calls
        own = made(None, cache, seed=seed, draws="in setup")
        own.setup("fit")
        assert found == state(own)


# ---- what goes wrong


def _cut_pack(cache: Path) -> str:
    (path,) = cache.glob("*.pack")
    path.write_bytes(path.read_bytes()[:-1])
    return f"{path} is not used: it is damaged: its checksum is wrong"


def _empty_pack(cache: Path) -> str:
    (path,) = cache.glob("*.pack")
    path.write_bytes(b"")
    return f"{path} is not used: it is damaged: its checksum is wrong"


def _cut_memory(cache: Path) -> str:
    path = max(cache.glob("*.bin"), key=os.path.getsize)
    (pack_,) = cache.glob("*.pack")
    os.truncate(path, path.stat().st_size - 4096)
    return f"{pack_} is not used: {path.name} is not as it was written"


def _changed_memory(cache: Path) -> str:
    path = max(cache.glob("*.bin"), key=os.path.getsize)
    (pack_,) = cache.glob("*.pack")
    with path.open("rb+") as file:
        file.write(b"x" * 100)
    return f"{pack_} is not used: {path.name} is not as it was written"


def _no_memory(cache: Path) -> str:
    path = max(cache.glob("*.bin"), key=os.path.getsize)
    (pack_,) = cache.glob("*.pack")
    path.unlink()
    return f"{pack_} is not used: {path.name} is not as it was written"


@pytest.mark.parametrize(
    "damage", [_cut_pack, _empty_pack, _cut_memory, _changed_memory, _no_memory]
)
def test_damaged_files_are_made_anew(
    damage: Callable[[Path], str],
    cache: Path,
    calls: SimpleNamespace,
    caplog: pytest.LogCaptureFixture,
) -> None:
    own = made(None, cache)
    own.setup("fit")
    expected = state(own)
    made(Mmap, cache, log=calls.path).setup("fit")
    text = damage(cache)
    for num_calls in (2, 2):
        data = made(Mmap, cache, log=calls.path)
        data.setup("fit")
        assert state(data) == expected
        assert calls.read() == ["fit"] * num_calls
    assert f"sharing: {text}; the data are set up anew" in caplog.messages


def test_files_are_the_users_own_and_those_of_others_are_not_read(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made(Mmap, cache).setup("fit")
    (path,) = cache.glob("*.pack")
    assert cache.stat().st_mode & 0o777 == 0o700
    for file in (path, *cache.glob("*.bin")):
        assert file.stat().st_mode & 0o777 == 0o600
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    assert not store.Store(cache).take(path.stem, lambda packed: pytest.fail("it was read"))
    text = f"sharing: {path} is not used: it belongs to another user; the data are set up anew"
    assert [line.getMessage() for line in caplog.records if line.levelname == "WARNING"] == [text]


def test_memory_that_is_too_small_is_told_and_files_are_used(
    cache: Path, monkeypatch: pytest.MonkeyPatch, calls: SimpleNamespace
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 2**18)
    lack = "sharing=shared needs 3 MB of memory, and 256 kB are free"
    about = {"log": calls.path}
    parent, sharing = made(None, cache, **about), Shared(cache=str(cache), **SETTINGS)
    with pytest.warns(UserWarning, match=f"{lack}; using sharing=mmap instead"):
        packs = sharing.collect(parent, {"data": about}, stages=["fit"], num_processes=2)
    Shared.give(packs)
    for _ in range(2):
        made(Shared, cache, world_size=2, **about).setup("fit")
    assert calls.read() == ["prepare", "fit", "fit"]
    modes._given.clear()
    with pytest.warns(UserWarning, match=f"sharing: {lack}; {OWN}; type sharing=mmap"):
        made(Shared, cache).setup("fit")


def test_a_disk_that_is_too_small_is_told_and_the_data_stay_as_they_are(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    data = made(Mmap, cache)
    message = (
        f"sharing: 3 MB are needed in {cache}, and its disk has 1 MB free; {OWN}; type "
        "sharing.cache=PATH for another disk"
    )
    with pytest.warns(UserWarning, match=message):
        data.setup("fit")
    assert type(data.train.dataset.signals) is list
    assert {path.suffix for path in cache.iterdir()} == {".lock"}


def test_a_cache_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = (
        f"sharing.cache must be a folder that you may write to, got {tmp_path}/file; type "
        "sharing.cache=PATH, or use sharing=none"
    )
    with pytest.raises(ValueError, match=message):
        made(Mmap, tmp_path / "file").setup("fit")


def test_ranks_that_another_program_started_share_by_files(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD" + "_SIZE", "2")  # as one word it would be read by our source
    message = (
        "sharing=shared hands memory to the processes that this program starts, and another one "
        "has started these; using sharing=mmap instead"
    )
    with pytest.warns(UserWarning, match=message):
        made(Shared, cache).setup("fit")
    assert list(cache.glob("*.pack"))


class Opens(Theirs):
    """Holds an open file, from the beginning or from setup on."""

    def __init__(self, in_setup: bool) -> None:
        super().__init__()
        self.in_setup = in_setup
        if not in_setup:
            self.file = open(__file__)  # noqa: SIM115

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.in_setup:
            self.file = open(__file__)  # noqa: SIM115

    def teardown(self, stage: str) -> None:
        self.file.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("in_setup", [False, True])
def test_what_cannot_be_pickled_is_named(kind: Any, in_setup: bool, cache: Path) -> None:
    data = Opens(in_setup)
    kind(cache=str(cache), **SETTINGS).attach(data, {"data": {}})
    why = r"\(cannot pickle '_io.TextIOWrapper' (object|instances)\)"
    text = f"sharing: file of Opens cannot be compared with that of other processes {why}; {OWN}"
    if in_setup:
        text = (
            f"sharing: file of Opens cannot be shared {why}; {OWN}; make it of what a module "
            "defines, or type sharing=none to be told no more"
        )
    if kind is Mmap or in_setup:
        with pytest.warns(UserWarning, match=text):
            data.setup("fit")
    else:
        data.setup("fit")  # a process alone compares nothing
    is_shared = kind is Shared and not in_setup
    assert isinstance(data.train.dataset.signals, PackedList if is_shared else list)
    assert not data.file.closed
    data.teardown("fit")


class Asks(Theirs):
    """Reads something of the trainer."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.found = getattr(self.trainer, self.what)


def test_data_that_read_more_of_the_trainer_are_set_up_by_each_process(cache: Path) -> None:
    sharing = Shared(cache=str(cache), **SETTINGS)
    message = "sharing=shared sets up .* and they ask for trainer.global_rank; using sharing=mmap"
    with pytest.warns(UserWarning, match=message):
        packs = sharing.collect(Asks("global_rank"), {"data": {}}, stages=["fit"], num_processes=2)
    assert packs == {}
    Shared.give(packs)
    message = (
        "sharing: Asks.setup reads trainer.global_rank, which others lack; "
        f"{OWN}; type sharing=none to be told no more"
    )
    for rank in (0, 1, 0):
        data = Asks("global_rank")
        data.trainer = SimpleNamespace(world_size=2, global_rank=rank)  # type: ignore[assignment]
        sharing.attach(data, {"data": {}})
        with pytest.warns(UserWarning, match=message):
            data.setup("fit")
        assert data.found == rank
        assert type(data.trainer) is SimpleNamespace
    assert not list(cache.glob("*.pack"))


class Prepares(Theirs):
    """Does something in prepare_data that each process would have to do."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def prepare_data(self) -> None:
        if self.what == "draws":
            torch.rand(1)
        elif self.what == "sets":
            self.prepared = True
        else:
            assert self.trainer is not None
            self.trainer.print("prepared")


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("draws", "Prepares.prepare_data draws random numbers, or sets attributes"),
        ("sets", "Prepares.prepare_data draws random numbers, or sets attributes"),
        ("prints", "they ask for trainer.print"),
    ],
)
def test_what_only_the_ranks_can_prepare_is_told(what: str, why: str, cache: Path) -> None:
    sharing = Shared(cache=str(cache), **SETTINGS)
    message = (
        f"sharing=shared sets up the data before there are ranks, and {why}; using sharing=mmap "
        "instead"
    )
    with pytest.warns(UserWarning, match=message):
        packs = sharing.collect(Prepares(what), {"data": {}}, stages=["fit"], num_processes=2)
    assert packs == {}


def test_only_what_is_asked_collects_before_the_start() -> None:
    class Mine(Shared):
        """A user's own."""

    assert [kind.collects_before_start for kind in (Mmap, Shared, Mine)] == [False, True, True]


def test_the_key_follows_the_sources_that_a_data_module_imports() -> None:
    found, versions = own_sources(Theirs())
    assert "class LitModel" in found["theirs"]
    assert "class Theirs" in found[__name__]
    assert versions["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_bytes": 0}, "sharing.min_bytes must be >= 1, got 0; type sharing.min_bytes=1024"),
        (
            {"min_items": 10},
            "sharing.min_items must be >= 1000, got 10; type sharing.min_items=1000, or null for "
            "no list",
        ),
        (
            {"key": ""},
            "sharing.key must not be empty, got ''; type sharing.key=1, or null for nothing",
        ),
        ({"cache": ""}, "sharing.cache must not be empty, got ''; type sharing.cache=PATH"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(Refused, match=message):
        refuse("sharing", MmapSchema(**{"cache": "runs/.data", **SETTINGS, **settings}))
