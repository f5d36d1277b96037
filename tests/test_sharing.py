"""One copy of the data for all processes, and the same run as with each its own."""

import multiprocessing
import os
import pickle
import random
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from conftest import refuse
from theirs import LitModel
from torch.utils.data import DataLoader, Dataset, TensorDataset, random_split

from app.conf.sharing.schema import Mmap as MmapSchema
from app.errors import Refused
from app.process.random_state import random_state
from app.sharing import Mmap, Packed, PackedList, Shared, modes, pack, store, unpack
from app.sharing.needs import digest
from app.sharing.packing import Plan
from app.sharing.regions import extent, place_of

SETTINGS = {"min_bytes": 1024, "min_items": 1000}
KINDS: list[Any] = [Shared, Mmap]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["app.sharing"])


class Samples(Dataset):
    """Arrays of several shapes, texts, labels, and a transform that is a lambda."""

    def __init__(self, num_samples: int) -> None:
        self.features = torch.arange(num_samples * 10).view(num_samples, 10) / num_samples
        self.signals = [np.full(256 * (1 + i % 3), i, np.float32) for i in range(num_samples)]
        self.rows = [(f"file {i}", i % 2) for i in range(num_samples)]
        self.transform = lambda x: x + len(self.rows)

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
            with open(self.hparams["log"], "a") as file:
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
    path = tmp_path / "calls"
    return SimpleNamespace(
        path=str(path), read=lambda: path.read_text().split() if path.exists() else []
    )


def made(
    kind: Any, cache: Path, *, seed: int = 0, world_size: int | None = None, **about: Any
) -> Theirs:
    """A data module as a run builds it."""
    pl.seed_everything(seed, verbose=False)
    data = Theirs(**about)
    if world_size is not None:
        data.trainer = SimpleNamespace(world_size=world_size)  # type: ignore[assignment]
    if kind is not None:
        sharing = kind(cache=str(cache), **SETTINGS)
        sharing.attach(data, {"data": about, "sharing": SETTINGS})
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
    packed = pack({"value": PLAIN[kind]}, **SETTINGS)
    expected, found = PLAIN[kind], unpack(packed)["value"]
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
    packed = pack(items, **SETTINGS)
    found = unpack(packed)
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
    found = unpack(pack(items, **SETTINGS))
    assert type(found) is list
    assert digest(found) == digest(items)


def test_a_packed_list_does_what_a_list_does() -> None:
    items = list(range(3000))
    found = unpack(pack(items, **SETTINGS))
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
    plan = Plan(value, **SETTINGS, outside={})
    rows = [*range(len(long))]
    assert plan.num_bytes < X.nbytes + N.nbytes + 1000 * (long[0].nbytes + 64) + 8 * len(rows) + 256
    found = unpack(pack(value, **SETTINGS))
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
    plan = Plan(windows, **SETTINGS, outside={})
    assert plan.num_bytes < signal_.nbytes + 8 * len(windows) + 256


def test_a_saved_tensor_is_not_all_that_was_packed_with_it(tmp_path: Path) -> None:
    found = unpack(pack([torch.ones(1_000_000), torch.ones(1000)], **SETTINGS))
    torch.save(found[1], tmp_path / "one.pt")
    assert (tmp_path / "one.pt").stat().st_size < 10_000
    assert found[1].clone().untyped_storage().nbytes() == 4000


def test_small_memory_parameters_and_objects_are_copied_for_each_process() -> None:
    weight = torch.nn.Parameter(torch.ones(3000))
    value = {"small": torch.ones(3), "weight": weight, "object": {1, 2}, "call": lambda x: x + N[1]}
    packed = pack(value, **SETTINGS)
    first, second = unpack(packed), unpack(packed)
    first["small"][0] = 5
    assert second["small"][0] == 1
    assert isinstance(first["weight"], torch.nn.Parameter)
    assert (first["call"](1) == 1 + N[1]).all()
    assert first["call"](1) is not None


def test_a_tensor_in_shared_memory_gets_its_own_again() -> None:
    found = unpack(pack({"counter": torch.zeros(2000).share_memory_()}, **SETTINGS))
    assert found["counter"].is_shared()


def test_a_file_that_the_user_maps_is_mapped_again(tmp_path: Path) -> None:
    np.arange(5000).tofile(tmp_path / "theirs")
    whole = np.memmap(tmp_path / "theirs", np.int64, "r")
    packed = pack(whole[100:200], **SETTINGS)
    assert not packed.chunks
    assert (unpack(packed) == np.arange(100, 200)).all()


def test_memory_of_a_region_goes_to_another_process_by_its_place(cache: Path) -> None:
    data = made(Mmap, cache)
    data.setup("fit")
    samples = data.train.dataset
    for value in (samples.features, samples.signals):
        sent = bytes(ForkingPickler.dumps(value))
        assert len(sent) < 2000
        assert digest(list(pickle.loads(sent))) == digest(list(value))
    samples.features[3, 3] = -1  # this process's own from here on
    sent = ForkingPickler.dumps(samples.features)
    assert (pickle.loads(sent) == samples.features).all()
    before = made(Mmap, cache)
    before.setup("fit")
    assert before.train.dataset.features[3, 3] != -1


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


def test_a_second_stage_refers_to_the_memory_of_the_first(cache: Path) -> None:
    data = made(Mmap, cache)
    data.setup("fit")
    before = {path.name for path in cache.glob("*.bin")}
    data.setup("test")
    new = [path.stat().st_size for path in cache.glob("*.bin") if path.name not in before]
    assert sum(new) < 200_000


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
        kind(cache=str(cache), **SETTINGS).attach(data, {"data": {}, "sharing": SETTINGS})
        data.setup("fit")
        for array in (data.first, data.second):
            assert place_of(*extent(array)) is not None
        data.first[0] = 5  # is no longer of the region
        assert data.second[0] == 1
    assert len(list(cache.glob("*.bin"))) == (1 if kind is Mmap else 0)


def test_runs_of_other_batch_sizes_map_the_same_memory(cache: Path, calls: SimpleNamespace) -> None:
    for batch_size in (10, 20):
        data = made(Mmap, cache, batch_size=batch_size, log=calls.path)
        data.setup("fit")
        assert data.batch_size == batch_size
    assert calls.read() == ["fit", "fit"]
    assert len(list(cache.glob("*.bin"))) == 1


def test_data_are_set_up_anew_where_a_file_that_they_read_has_changed(
    cache: Path, tmp_path: Path
) -> None:
    class Reads(Theirs):
        def setup(self, stage: str) -> None:
            self.train = np.loadtxt(tmp_path / "theirs.txt")

    found = []
    for content in (1.0, 2.0):
        np.savetxt(tmp_path / "theirs.txt", np.full(1000, content))
        for _ in range(2):
            data = Reads()
            Mmap(cache=str(cache), **SETTINGS).attach(data, {"data": {}, "sharing": SETTINGS})
            data.setup("fit")
            found.append(float(data.train[0]))
    assert found == [1, 1, 2, 2]
    assert len(list(cache.glob("*.pack"))) == 2


def test_what_the_trainer_says_decides_too(cache: Path, calls: SimpleNamespace) -> None:
    sizes = []
    for world_size in (1, 2, 2):
        data = made(Mmap, cache, world_size=world_size, log=calls.path)
        data.setup("fit")
        sizes.append(data.batch_size)
        assert type(data.trainer) is SimpleNamespace
    assert sizes == [50, 25, 25]
    assert calls.read() == ["fit", "fit"]


# ---- several processes


def _about_values() -> list[str]:
    values = [
        {"a", "b", "c", 1},
        lambda x: x + X,
        Samples,
        torch.nn.Parameter(X),
        torch.empty(0, 2),
        X.to_sparse(),
        np.array(["a", None]),
        random.Random(0),
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
    assert not any(text.startswith("unpicklable") for text in found)


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

    def write_no_file(plan: Plan, chunk: int, memory: Any) -> None:
        if chunk == -1:
            write(plan, chunk, memory)
        else:
            is_writing.set()
            time.sleep(60)

    Plan.write = write_no_file  # type: ignore[method-assign]
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
    config = {"data": about, "sharing": SETTINGS}
    packs = sharing.collect(parent, config, stages=["fit"], num_processes=2)
    (given,) = packs.values()
    assert given.region is not None
    size_mb = given.region.memory.nbytes / 2**20
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
    config = {"data": about, "sharing": SETTINGS}
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
    return f"{path} is not used: it is damaged: cut off"


def _cut_memory(cache: Path) -> str:
    (path,), (pack_,) = cache.glob("*.bin"), cache.glob("*.pack")
    os.truncate(path, path.stat().st_size - 4096)
    return f"{pack_} is not used: {path.name} has changed since it was written"


def _changed_memory(cache: Path) -> str:
    (path,), (pack_,) = cache.glob("*.bin"), cache.glob("*.pack")
    with path.open("rb+") as file:
        file.write(b"x" * 100)
    return f"{pack_} is not used: {path.name} has changed since it was written"


def _no_memory(cache: Path) -> str:
    (path,), (pack_,) = cache.glob("*.bin"), cache.glob("*.pack")
    path.unlink()
    return f"{pack_} is not used: {path.name} is missing"


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
    assert store.Store(cache).find(path.name.partition("-")[0], lambda needs: None) is None
    text = f"sharing: {path} is not used: it belongs to another user; the data are set up anew"
    assert caplog.messages == [text]


def test_shared_memory_that_is_too_small_is_told_and_files_are_used(
    cache: Path, monkeypatch: pytest.MonkeyPatch, calls: SimpleNamespace
) -> None:
    room, of = SimpleNamespace(f_bavail=64 * 256, f_frsize=16), os.statvfs
    monkeypatch.setattr(os, "statvfs", lambda path: room if path == "/dev/shm" else of(path))
    message = (
        r"sharing=shared needs 3 MB of shared memory, and /dev/shm has 256 kB free \(in a "
        r"container: --shm-size\); using sharing=mmap instead"
    )
    about = {"log": calls.path}
    parent, sharing = made(None, cache, **about), Shared(cache=str(cache), **SETTINGS)
    config = {"data": about, "sharing": SETTINGS}
    with pytest.warns(UserWarning, match=message):
        packs = sharing.collect(parent, config, stages=["fit"], num_processes=2)
    Shared.give(packs)
    made(Shared, cache, world_size=2, **about).setup("fit")
    assert calls.read() == ["prepare", "fit"]
    modes._given.clear()
    with pytest.warns(UserWarning, match=message):
        made(Shared, cache).setup("fit")


def test_a_disk_that_is_too_small_is_told_and_the_data_stay_as_they_are(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    data = made(Mmap, cache)
    message = (
        f"sharing=mmap needs 3 MB in {cache}, and its disk has 1 MB free; each process keeps its "
        r"own copy of the data \(sharing.cache=PATH is for another disk\)"
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
    kind(cache=str(cache), **SETTINGS).attach(data, {"data": {}, "sharing": SETTINGS})
    end = "it is not shared"
    if in_setup:
        end = "each process keeps its own copy of the data" if kind is Mmap else end
        end = f"and setup makes it; {end}"
    text = r"sharing: Opens.file cannot be pickled \(cannot pickle '_io.TextIOWrapper' object\)"
    with pytest.warns(UserWarning, match=text + f"[,;] {end}"):
        data.setup("fit")
    is_shared = kind is Shared or not in_setup
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


def test_data_of_one_process_are_not_shared(cache: Path) -> None:
    data = Asks("model")
    data.trainer = SimpleNamespace(world_size=1, model=object())
    Mmap(cache=str(cache), **SETTINGS).attach(data, {"data": {}, "sharing": SETTINGS})
    message = (
        "sharing: Asks.setup reads trainer.model, which is one process's; each process keeps its "
        "own copy of the data"
    )
    with pytest.warns(UserWarning, match=message):
        data.setup("fit")
    assert data.found is data.trainer.model


def test_data_that_ask_for_their_rank_are_set_up_by_each_rank(cache: Path) -> None:
    config = {"data": {}, "sharing": SETTINGS}
    sharing = Shared(cache=str(cache), **SETTINGS)
    message = (
        "sharing=shared sets up the data before there are ranks, and Asks asks for "
        "trainer.global_rank; using sharing=mmap instead"
    )
    with pytest.warns(UserWarning, match=message):
        packs = sharing.collect(Asks("global_rank"), config, stages=["fit"], num_processes=2)
    assert packs == {}
    Shared.give(packs)
    for rank in (0, 1, 0):
        data = Asks("global_rank")
        data.trainer = SimpleNamespace(world_size=2, global_rank=rank)
        sharing.attach(data, config)
        data.setup("fit")
        assert data.found == rank
    assert len(list(cache.glob("*.pack"))) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_bytes": 0}, "sharing.min_bytes must be >= 1, got 0; type sharing.min_bytes=1024"),
        (
            {"min_items": 10},
            "sharing.min_items must be >= 1000, got 10; type sharing.min_items=1000, or null for "
            "no list",
        ),
        ({"cache": ""}, "sharing.cache must not be empty, got ''; type sharing.cache=PATH"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(Refused, match=message):
        refuse("sharing", MmapSchema(**{"cache": "runs/.data", **SETTINGS, **settings}))


def test_an_empty_pack_has_no_memory() -> None:
    packed = pack({}, **SETTINGS)
    assert isinstance(packed, Packed)
    assert packed.chunks == []
    assert unpack(packed) == {}
