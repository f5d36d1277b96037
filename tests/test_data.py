import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import presets_of
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import OmegaConf
from torch.utils.data import DataLoader, TensorDataset

from app.config import refuse_values
from app.data.in_memory import InMemoryLoader, epoch_order
from app.data.mnist1d import FILE
from app.errors import Refused

CONF = Path(__file__).parents[1] / "conf"
PRESETS = presets_of("data")
PARTS = ("train", "val", "test")
NEEDED = {"graph": ["data.num_nodes=2000", "data.fanouts=[]"]}
"""What makes a preset small, and its samples rows of features."""

# Lightning 2.6 asks torch's pytree a question that torch 2.13 has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(preset: str, *overrides: str) -> Any:
    if preset == "digits":
        pytest.importorskip("sklearn")
    with initialize_config_module("app.conf", version_base="1.3"):
        cfg = compose(overrides=[f"+data={preset}", *NEEDED.get(preset, []), *overrides])
    refuse_values(cfg)
    OmegaConf.to_object(cfg)
    return instantiate(cfg.data)


def ready(preset: str, *overrides: str) -> Any:
    data = build(preset, *overrides)
    data.setup("fit")
    return data


def loader(num_samples: int = 10, **changes: Any) -> InMemoryLoader:
    """Ten samples in four batches, the last of one sample: features 2 i and 2 i + 1, label i."""
    x = torch.arange(2 * num_samples).reshape(num_samples, 2).float()
    settings = {"batch_size": 3, "shuffle": True, "drop_last": False, "seed": 1, **changes}
    return InMemoryLoader(tensors=(x, torch.arange(num_samples)), **settings)


def labels(batches: Any) -> list[list[int]]:
    return [y.tolist() for _, y in batches]


def global_rng() -> tuple[Any, ...]:
    name, keys, *rest = np.random.get_state()
    return random.getstate(), name, keys.tolist(), rest, torch.get_rng_state().tolist()


# The presets


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_serves_what_its_config_says(preset: str) -> None:
    data = ready(preset)
    for part in PARTS:
        served = list(getattr(data, f"{part}_dataloader")())
        size = data.batch_size if part == "train" else data.eval_batch_size
        x, y = served[0]
        assert x.shape == (min(size, sum(len(y) for _, y in served)), data.num_features)
        assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
        assert torch.isfinite(x).all()
        assert set(torch.cat([y for _, y in served]).tolist()) == set(range(data.num_classes))


@pytest.mark.parametrize("preset", PRESETS)
def test_no_sample_is_in_two_parts(preset: str) -> None:
    data = ready(preset)
    rows = [
        row.numpy().tobytes()
        for part in PARTS
        for row in getattr(data, f"{part}_dataloader")().dataset.tensors[0]
    ]
    assert len(set(rows)) == len(rows)


@pytest.mark.parametrize(
    ("preset", "sizes"), [("mnist1d", [4000, 1000, 10000]), ("digits", [1097, 300, 400])]
)
def test_parts_have_the_documented_sizes(preset: str, sizes: list[int]) -> None:
    data = ready(preset)
    assert [len(getattr(data, f"{part}_dataloader")().dataset) for part in PARTS] == sizes


@pytest.mark.parametrize("preset", PRESETS)
def test_loading_and_serving_leave_the_global_rng_alone(preset: str) -> None:
    data = build(preset)
    before = global_rng()
    data.setup("fit")
    for part in PARTS:
        list(getattr(data, f"{part}_dataloader")())
    assert global_rng() == before


@pytest.mark.parametrize("preset", PRESETS)
def test_only_training_is_shuffled(preset: str) -> None:
    data = ready(preset)
    for part in PARTS:
        batches = getattr(data, f"{part}_dataloader")()
        served = torch.cat([y for _, y in batches])
        assert torch.equal(served, batches.dataset.tensors[1]) is (part != "train")
    y = torch.cat([y for _, y in ready(preset, "data.shuffle=false").train_dataloader()])
    assert torch.equal(y, data.train_dataloader().dataset.tensors[1])


@pytest.mark.parametrize("key", ["num_features", "num_classes"])
def test_a_wrong_fact_about_the_data_is_refused(key: str) -> None:
    found = {"num_features": 40, "num_classes": 10}[key]
    with pytest.raises(ValueError, match="must be") as error:
        ready("mnist1d", f"data.{key}=7")
    assert str(error.value) == (
        f"data.{key} must be {found}, as in the data of Mnist1d, got 7; type data.{key}={found}"
    )


def test_the_split_of_digits_depends_on_its_own_seed_only() -> None:
    def test_part(*overrides: str) -> torch.Tensor:
        return ready("digits", *overrides).test_dataloader().dataset.tensors[0]

    first = test_part()
    torch.manual_seed(123)
    assert torch.equal(test_part(), first)
    assert not torch.equal(test_part("data.split_seed=1"), first)


def test_digits_without_training_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^data\.num_val \+ data\.num_test must be < 1797"):
        ready("digits", "data.num_test=1497")


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    data = build("digits")
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(Refused) as error:
        data.setup("fit")
    assert str(error.value) == "data=digits needs scikit-learn; type pip install -e '.[digits]'"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.batch_size=0", "data.batch_size must be >= 1, got 0; type data.batch_size=128"),
        ("data.split_seed=-1", "data.split_seed must be >= 0, got -1; type data.split_seed=0"),
    ],
)
def test_a_value_out_of_range_is_refused(override: str, message: str) -> None:
    with pytest.raises(ValueError, match="must be") as error:
        build("digits", override)
    assert str(error.value) == message


def test_custom_takes_any_datamodule() -> None:
    target = "data._target_=lightning.pytorch.demos.boring_classes.BoringDataModule"
    assert type(build("custom", target)).__name__ == "BoringDataModule"
    assert build("custom", "data._target_=builtins.dict", "+data.batch_size=32") == {
        "batch_size": 32
    }


def test_the_shipped_file_is_what_the_package_makes() -> None:
    pytest.importorskip("mnist1d")
    from app.data.make_mnist1d import make

    before = global_rng()
    made = make()
    assert global_rng() == before
    with np.load(FILE) as shipped:
        assert sorted(shipped.files) == sorted(made)
        for name, array in made.items():
            assert shipped[name].dtype == array.dtype, name
            assert np.array_equal(shipped[name], array), name


# The loader


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("num_samples", [9, 10])
def test_batches_are_those_of_a_per_sample_loader(num_samples: int, drop_last: bool) -> None:
    ours = loader(num_samples, shuffle=False, drop_last=drop_last)
    theirs = DataLoader(ours.dataset, batch_size=3, drop_last=drop_last)
    assert isinstance(ours.dataset, TensorDataset)
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


def test_a_shuffled_epoch_holds_every_sample_once() -> None:
    x, y = (torch.cat(parts) for parts in zip(*loader(), strict=True))
    assert sorted(y.tolist()) == list(range(10))
    assert torch.equal(x[:, 0], 2.0 * y)


def test_an_order_depends_on_seed_and_epoch_and_on_nothing_else() -> None:
    orders = {
        (seed, epoch): tuple(epoch_order(num_samples=50, seed=seed, epoch=epoch).tolist())
        for seed in (0, 1, 2**64 - 1)
        for epoch in (0, 1, 2)
    }
    assert len(set(orders.values())) == len(orders)
    one = loader()
    epochs = [labels(one) for _ in range(3)]
    torch.rand(1)
    assert [labels(two) for two in [loader()] for _ in range(3)] == epochs
    assert epochs[2] != epochs[1] != epochs[0] != epochs[2]


def test_without_a_seed_the_loader_takes_the_one_torch_was_given() -> None:
    torch.manual_seed(5)
    torch.rand(1)
    assert labels(loader(seed=None)) == labels(loader(seed=5))


def test_no_batch_shares_memory_with_the_data() -> None:
    batches = loader(shuffle=False)
    for x, _ in batches:
        x.zero_()
    assert batches.dataset.tensors[0].sum() == sum(range(20))


def test_nothing_happens_before_the_first_batch_is_asked_for() -> None:
    batches = loader()
    expected = labels(loader())
    iter(batches)
    before = batches.state_dict()
    unread = iter(batches)
    assert batches.state_dict() == before
    assert labels(unread) == expected


def test_an_abandoned_epoch_is_followed_by_the_next_one() -> None:
    whole, cut = loader(), loader()
    labels(whole)
    next(iter(cut))
    assert labels(cut) == labels(whole)


def test_an_epoch_can_be_told() -> None:
    told, counted = loader(), loader()
    epochs = [labels(counted) for _ in range(3)]
    for epoch in (1, 1, 0, 2):
        told.batch_sampler.sampler.set_epoch(epoch)
        assert labels(told) == epochs[epoch]


# Batches served before the state is taken: none, some, one epoch but its end unseen, later.
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("unread", [False, True])
@pytest.mark.parametrize("served", [0, 1, 3, 4, 5, 8, 10])
def test_a_loaded_position_continues_with_the_next_batch(
    served: int, unread: bool, times: int
) -> None:
    def forever(batches: InMemoryLoader) -> Iterator[list[int]]:
        while True:
            # As Lightning does: it knows the length and does not ask behind the last batch.
            left = len(batches) - batches.state_dict()["batches"] % len(batches)
            epoch = iter(batches)
            for _ in range(left):
                yield next(epoch)[1].tolist()

    def take(num: int, of: Iterator[list[int]]) -> list[list[int]]:
        return [next(of) for _ in range(num)]

    expected = take(24, forever(loader()))
    old, got = loader(), []
    stream = forever(old)
    got += take(served, stream)
    for _ in range(times):
        state = old.state_dict()
        assert state == old.state_dict()
        assert all(type(value) is int for value in state.values())
        new = loader(seed=99)
        new.load_state_dict(state)
        assert new.state_dict() == state
        if unread:
            iter(new)
        stream = forever(new)
        got += take(2, stream)
        old = new
    got += take(24 - len(got), stream)
    assert got == expected


@pytest.mark.parametrize("served", range(5))
def test_a_resumed_epoch_ends_where_the_whole_one_does(served: int) -> None:
    whole = loader()
    expected = labels(whole), labels(whole)
    old, new = loader(), loader(seed=99)
    batches = iter(old)
    for _ in range(served):
        next(batches)
    new.load_state_dict(old.state_dict())
    if served < 4:
        assert labels(new) == expected[0][served:]
    assert labels(new) == expected[1]


def test_a_state_taken_behind_the_end_of_an_epoch_begins_the_next() -> None:
    old, new = loader(), loader()
    labels(old)
    new.load_state_dict(old.state_dict())
    assert labels(new) == labels(old)


def test_a_position_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="resume") as error:
        loader(batch_size=5).load_state_dict({"seed": 1, "epoch": 0, "batches": 4})
    assert str(error.value) == (
        "the checkpoint stands 4 batches into an epoch, but an epoch has 2 batches of 5; resume "
        "with the data.batch_size it was written with"
    )


class Recorder(LightningModule):
    """Remembers the labels of every batch it trains on."""

    def train_dataloader(self) -> InMemoryLoader:
        return loader(seed=7)

    def val_dataloader(self) -> InMemoryLoader:
        return loader(shuffle=False)

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.seen: list[list[int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.seen.append(batch[1].tolist())
        return self.layer(batch[0]).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class SaveAt(Callback):
    """Writes one checkpoint per optimizer step, in the hook of that name."""

    def __init__(self, folder: Path, hook: str) -> None:
        self.folder = folder
        setattr(self, hook, self.save)

    def save(self, trainer: Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


def fit(callbacks: list[Callback], resume: Path | None = None, **changes: Any) -> list[list[int]]:
    model = Recorder()
    settings = {"accelerator": "cpu", "max_epochs": 3, "logger": False, **changes}
    Trainer(
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    ).fit(model, ckpt_path=resume, weights_only=True)
    return model.seen


@pytest.mark.parametrize("limit", [2, 4])
@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_end", "on_train_epoch_end"])
def test_lightning_resumes_with_the_next_batch(tmp_path: Path, hook: str, limit: int) -> None:
    whole = fit([SaveAt(tmp_path, hook)], limit_train_batches=limit)
    assert len(whole) == 3 * limit
    steps = sorted(int(path.stem) for path in tmp_path.iterdir())
    assert len(steps) >= 3
    for step in steps[:-1]:
        rest = fit([], resume=tmp_path / f"{step}.ckpt", limit_train_batches=limit)
        assert rest == whole[step:], step


def test_lightning_resumes_with_more_epochs(tmp_path: Path) -> None:
    whole = fit([])
    assert fit([SaveAt(tmp_path, "on_train_end")], max_epochs=2) == whole[:8]
    assert fit([], resume=tmp_path / "8.ckpt") == whole[8:]


def test_lightning_shuffles_anew_where_it_reloads_the_loaders() -> None:
    assert fit([], reload_dataloaders_every_n_epochs=1) == fit([])
