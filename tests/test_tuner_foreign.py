"""The finders with models and loaders of other people's."""

import os
import random
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import foreign
import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader

from app import evaluate
from app.config import Config, check, with_overrides
from app.errors import Refused
from app.record.folder import RunFolder
from app.run.build import build
from app.throwaway.samples import (
    longest_first_of_all,
    look,
    num_elements,
    samples_of,
    shapes_of,
)
from app.tuner.answers import cache_key
from app.tuner.find import batch_size_of, find, find_batch_size, find_lr
from app.tuner.keys import startable, typed
from app.tuner.lr import range_test
from app.tuner.probe import Served, Untrained
from app.tuner.search import NoEffect

ANY = ("model=custom", "data=custom", "optimizer=none", "trainer.max_epochs=2", "logger=csv",
       "callbacks.progress=null", "trainer.accelerator=cpu", "+data.batch_size=4")  # fmt: skip
LR = ("tuner=lr_find", "tuner.cache=null", "tuner.lr.num_steps=20")
BATCH = ("tuner=batch_size", "tuner.cache=null", "tuner.batch_size.min_batches=2",
         "tuner.batch_size.init_val=2")  # fmt: skip


def of(model: str, data: str = "Points") -> tuple[str, ...]:
    return (*ANY, f"model._target_=foreign.{model}", f"data._target_=foreign.{data}",
            "+model.lr=0.01")  # fmt: skip


@pytest.fixture(autouse=True)
def _forgotten() -> None:
    foreign.Watches.moved.clear()
    foreign.Schedules.seen.clear()


@pytest.fixture
def made(composed: Callable[..., DictConfig], tmp_path: Path) -> Callable[..., Config]:
    """Compose, with groups in place of others, and check."""

    def make(*overrides: str, **groups: Any) -> Config:
        (tmp_path / "run").mkdir(exist_ok=True)
        cfg = composed(*overrides)
        for group, chosen in groups.items():
            cfg[group] = chosen
        return check(startable(cfg))

    return make


def swept(config: Config, **settings: Any) -> list[float]:
    """The losses of a sweep of `model.lr`."""
    rest: Any = {"base": 0.01, "optimizer": None, "from_now": False, "callbacks": [],
                 "key": "model.lr"}  # fmt: skip
    _, losses, complete = range_test(config, settings=config.tuner.lr, **(rest | settings))
    assert complete
    return losses


def size_of(config: Config) -> int:
    return batch_size_of(config, key="data.batch_size")[0].size


PAIRS = {
    "text": ("Language", "Text"),
    "gan": ("Gan", "Points"),
    "graphs": ("GraphNet", "Graphs"),
    "combined": ("OfTwo", "Combined"),
    "sampler": ("Regressor", "BySampler"),
    "stream": ("Regressor", "Streams"),
    "stateful": ("Regressor", "StatefulPoints"),
    "validations": ("Validated", "SeveralVals"),
    "groups": ("Groups", "Points"),
    "warm-up": ("WarmsUp", "Points"),
    "lbfgs": ("Lbfgs", "Points"),
    "raw": ("RawOptimizer", "Points"),
    "schedules": ("Schedules", "Points"),
    "writes": ("Writes", "Points"),
}


@pytest.mark.parametrize("name", PAIRS)
def test_both_finders_run_with(made: Callable[..., Config], name: str) -> None:
    assert len(swept(made(*of(*PAIRS[name]), *LR, "tuner.lr.highest=1e-3"))) == 20
    size = size_of(made(*of(*PAIRS[name]), *BATCH, "tuner.batch_size.max_val=6"))
    assert size == 6


def test_da_iterable_a_set_that_has_no_length_and_plays_with_the_model(
    made: Callable[..., Config],
) -> None:
    assert len(swept(made(*of("Dqn", "Replayed"), *LR))) > 10
    assert size_of(made(*of("Dqn", "Replayed"), *BATCH, "tuner.batch_size.max_val=8")) == 8


# ---------------------------------------------------------------------------------- what is the fit


def test_fi_callbacks_that_freeze_act_in_a_search(made: Callable[..., Config]) -> None:
    callbacks = {"mine": {"_target_": "foreign.Freezes"}, "watch": {"_target_": "foreign.Watches"},
                 "stop": {"_target_": "lightning.pytorch.callbacks.EarlyStopping",
                          "monitor": "never"},
                 "rates": {"_target_": "lightning.pytorch.callbacks.LearningRateMonitor"},
                 "keeps": {"_target_": "lightning.pytorch.callbacks.ModelCheckpoint"}}  # fmt: skip
    losses = swept(made(*of("Regressor"), *LR, callbacks=callbacks))
    # Watches asks for the end after each micro-batch, and only the sweep ends
    assert len(losses) == len(foreign.Watches.moved) > 10
    assert not any(foreign.Watches.moved)
    foreign.Watches.moved.clear()
    config = made(*of("Regressor"), *BATCH, "tuner.batch_size.max_val=4", callbacks=callbacks)
    assert size_of(config) == 4
    assert foreign.Watches.moved
    assert not any(foreign.Watches.moved)


def test_fi_callbacks_groups_that_are_unfrozen_in_a_search_join_it(
    made: Callable[..., Config],
) -> None:
    callbacks = {"mine": {"_target_": "foreign.Freezes", "until": 1}}
    config = made(*of("OnlyTrainable"), *LR, "trainer.limit_train_batches=5", callbacks=callbacks)
    assert len(swept(config)) > 10


def test_sc_search_the_models_schedules_stand_still_and_see_the_limits_of_the_fit(
    made: Callable[..., Config],
) -> None:
    config = made(*of("Schedules"), *LR, "trainer.max_epochs=3", "trainer.max_steps=50")
    assert len(swept(config)) > 10
    assert set(foreign.Schedules.seen) == {(3, 50, 50)}
    foreign.Schedules.seen.clear()
    size_of(made(*of("Schedules"), *BATCH, "trainer.max_epochs=3", "tuner.batch_size.max_val=8"))
    assert (3, -1, 3 * 12) in foreign.Schedules.seen  # 96 samples by 8


@pytest.mark.parametrize("model", ["Language", "Gan"])
def test_sc_search_a_schedule_shorter_than_the_sweep(
    made: Callable[..., Config], model: str
) -> None:
    data = "Text" if model == "Language" else "Points"
    config = made(*of(model, data), *LR, "tuner.lr.num_steps=40", "tuner.lr.highest=1e-3")
    assert len(swept(config)) == 40  # both total_steps are fewer


def test_fi_logger_files_that_a_model_writes_go_with_the_search(
    made: Callable[..., Config], tmp_path: Path
) -> None:
    config = made(*of("Writes"), *LR)
    swept(config)
    size_of(made(*of("Writes"), *BATCH, "tuner.batch_size.max_val=2"))
    assert list((tmp_path / "run").iterdir()) == []


# --------------------------------------------------------------------------------- losses and steps


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_fi_none_a_point_is_the_mean_of_what_came(made: Callable[..., Config]) -> None:
    plain = swept(made(*of("Regressor"), *LR, "accumulate=constant", "accumulate.factor=2"))
    some = swept(made(*of("Sometimes"), *LR, "accumulate=constant", "accumulate.factor=2"))
    assert len(some) == len(plain)
    assert all(np.isfinite(some[:5]))


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_fi_none_never_a_loss_is_refused_in_words(made: Callable[..., Config]) -> None:
    with pytest.raises(Refused, match="needs the loss of Never: return it"):
        swept(made(*of("Never"), *LR))


def test_a_first_loss_that_is_not_finite_is_refused_in_words(made: Callable[..., Config]) -> None:
    with pytest.raises(Refused, match="needs a finite loss to begin with"):
        swept(made(*of("NanFirst"), *LR))


def test_fi_raw_steps_are_counted_at_the_optimizer(made: Callable[..., Config]) -> None:
    assert len(swept(made(*of("Gan"), "+model.raw=true", *LR))) > 10
    assert len(swept(made(*of("RawOptimizer"), "+model.closure=true", "clip=none", *LR))) > 10
    assert size_of(made(*of("RawOptimizer"), *BATCH, "tuner.batch_size.max_val=8")) == 8


@pytest.mark.parametrize("finder", [LR, BATCH])
def test_fi_raw_a_model_that_never_steps_is_refused_not_waited_for(
    made: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, finder: tuple[str, ...]
) -> None:
    monkeypatch.setattr("app.throwaway.run.MOST_BATCHES", 30)
    config = made(*of("RawOptimizer"), "+model.steps=false", *finder)
    with pytest.raises(Refused, match="needs the steps of RawOptimizer, which made none in 31"):
        swept(config) if finder is LR else size_of(config)


def test_a_search_takes_no_longer_than_the_fit_may(made: Callable[..., Config]) -> None:
    with pytest.raises(Refused, match=r"losses of 10 optimizer steps .* trainer.max_minutes"):
        swept(made(*of("Regressor"), *LR, "trainer.max_minutes=1e-7"))


def test_an_optimizer_that_steps_rarely_is_waited_for(made: Callable[..., Config]) -> None:
    config = made(*of("Gan"), "+model.every=4", *BATCH, "tuner.batch_size.max_val=3")
    assert size_of(config) == 3


@pytest.mark.parametrize("rule", ["norm", "percentile", "adaptive", "value"])
def test_fi_raw_clipping_acts_on_torchs_own_optimizer_as_on_lightnings(
    made: Callable[..., Config], rule: str
) -> None:
    found = []
    for raw in (True, False):
        config = made(*of("Quiet"), f"+model.raw={raw}", f"clip={rule}", "trainer.max_epochs=1",
                      *(["clip.max_norm=0.01"] if rule == "norm" else []))  # fmt: skip
        run = build(config, [])
        run.trainer.fit(run.model, datamodule=run.data)
        weights = torch.cat([parameter.flatten() for parameter in run.model.parameters()])
        # a percentile keeps each norm that it has seen
        seen = run.trainer.callbacks[0].state_dict().get("norms", {})
        found.append((weights.detach(), seen))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_fi_raw_clipping_bounds_the_gradient_and_refuses_a_closure(
    made: Callable[..., Config],
) -> None:
    config = made(*of("RawOptimizer"), "clip=norm", "clip.max_norm=0.5", "trainer.max_epochs=1")
    run = build(config, [])
    run.trainer.fit(run.model, datamodule=run.data)
    assert 0.4 < max(run.model.norms) <= 0.5001
    closed = build(made(*of("RawOptimizer"), "+model.closure=true", "clip=norm"), [])
    with pytest.raises(Refused, match="clip cannot act where RawOptimizer gives"):
        closed.trainer.fit(closed.model, datamodule=closed.data)


# ------------------------------------------------------------------------- samplers, sizes, lengths


@pytest.mark.parametrize(
    ("data", "samples"),
    [("Subset", 20), ("BySampler", 24), ("Combined", 32), ("Longest", 96), ("Streams", None),
     ("StatefulPoints", None), ("Own", 18), ("Deaf", 96)],
)  # fmt: skip
def test_da_sampler_what_is_served_bounds_the_size(
    made: Callable[..., Config], data: str, samples: int | None
) -> None:
    config = made(*of("AnyBatch", data), *BATCH)
    assert look(config, 1)[1] == samples


def test_da_sampler_a_subset_with_drop_last(made: Callable[..., Config]) -> None:
    assert size_of(made(*of("Regressor", "Subset"), *BATCH)) == 10
    assert size_of(made(*of("Regressor", "Subset"), *BATCH, "tuner.batch_size.min_batches=1")) == 20


def test_da_sampler_a_size_that_trains_nothing_has_not_fitted(
    made: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    config = made(*of("Regressor", "Drops"), *BATCH)
    answer, _, _ = batch_size_of(config, key="data.batch_size")
    assert answer.size == 10
    assert "data.batch_size=11 does not fit: no batch is served" in capsys.readouterr().out


def test_da_iterable_a_stream_that_ends_bounds_the_size(
    made: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    answer, _, _ = batch_size_of(made(*of("Regressor", "Short"), *BATCH), key="data.batch_size")
    assert answer.size == 32  # the first that is served all 30
    assert "does not fit: no more is served than at 32" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:Total length of")
def test_no_training_data_are_refused(made: Callable[..., Config]) -> None:
    with pytest.raises(Refused, match="must serve a batch, got none"):
        size_of(made(*of("Regressor", "NoPoints"), *BATCH))


def test_strings_and_odd_objects_in_a_sample_are_measured() -> None:
    class Picture:
        size = (3, 4)

    assert num_elements({"a": "four", "b": [torch.zeros(2, 3), b"xy"]}) == 12
    assert num_elements(Picture()) == 1
    assert shapes_of([torch.zeros(2, 3), "a", None, {"b": np.zeros(4)}]) == [[2, 3], [], [], [4]]
    assert shapes_of([Picture()]) is None
    samples = [{"text": "a" * n, "ids": [0] * n} for n in (1, 5, 3, 5, 2)]
    loader = torch.utils.data.DataLoader(samples, 2, collate_fn=lambda items: items)  # type: ignore
    batches = list(longest_first_of_all([loader])[0])
    assert {len(item["ids"]) for batch in batches for item in batch} == {5}


# ------------------------------------------------------------------------------- what has no effect


def test_fi_ignored_a_loader_that_ignores_its_batch_size(
    made: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = made(*of("Regressor", "Deaf"), *BATCH)
    with pytest.raises(
        NoEffect, match=r"data.batch_size has no effect: the first batch is the same"
    ):
        size_of(config)
    assert find_batch_size(config, tmp_path)[0] == {}
    assert "data.batch_size has no effect" in capsys.readouterr().out


def test_fi_ignored_a_rate_that_no_optimizer_follows(
    made: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = made(*of("DeafToLr"), *LR)
    with pytest.raises(NoEffect, match=r"model.lr has no effect: .* \[\[0.05\]\] at 0.01 and at"):
        swept(config)
    assert find_lr(config, tmp_path)[0] == {}
    assert "model.lr has no effect" in capsys.readouterr().out


class Moved(foreign.Callback):
    def __init__(self) -> None:
        self.rates: list[list[float]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.rates.append([group["lr"] for group in optimizer.param_groups])


def test_fi_ignored_groups_that_do_not_follow_the_key_keep_their_rate(
    made: Callable[..., Config],
) -> None:
    moved = Moved()
    swept(made(*of("Groups"), *LR), callbacks=[moved])
    first, second = zip(*moved.rates, strict=True)
    assert set(first) == {1e-4}
    assert len(set(second)) == len(second)


def test_fi_ignored_a_model_that_sets_its_rate_itself(made: Callable[..., Config]) -> None:
    with pytest.raises(Refused, match="cannot act where training_step sets the learning rate"):
        swept(made(*of("SetsItself"), *LR))


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_rate_that_is_not_above_zero_is_refused(
    made: Callable[..., Config], tmp_path: Path, value: float
) -> None:
    with pytest.raises(Refused, match=r"model.lr must be above 0 to be searched, got"):
        find_lr(made(*of("Regressor")[:-1], f"+model.lr={value}", *LR), tmp_path)


# ------------------------------------------------------------------------------- what it amounts to


FULL = ("tuner=full", "tuner.cache=null", "tuner.batch_size.min_batches=2")


@pytest.mark.parametrize(
    ("choices", "overrides", "said"),
    [
        # keep: no more than the batch typed, and accumulation makes up for less
        ((*FULL,), {"data.batch_size": 4}, ""),
        ((*FULL, "tuner.batch_size.max_val=2"), {"data.batch_size": 2, "accumulate.factor": 2},
         "batch 4 -> 2: 48 -> 48 optimizer steps, effective batch 4 as before"),
        ((*FULL, "accumulate=constant", "accumulate.factor=3"),
         {"data.batch_size": 12, "accumulate.factor": 1},
         "batch 4 -> 12: 16 -> 16 optimizer steps, effective batch 12 as before"),
        # root
        (BATCH, {"data.batch_size": 48, "model.lr": 0.0346},
         "batch 4 -> 48: 48 -> 4 optimizer steps, effective batch 4 -> 48, model.lr 0.01 -> "
         "0.0346 with its root"),
        # ignore
        ((*BATCH, "tuner.batch_size.effective=ignore"), {"data.batch_size": 48},
         "batch 4 -> 48: 48 -> 4 optimizer steps, effective batch 4 -> 48"),
        ((*BATCH, "accumulate=effective", "accumulate.batch_size=16"), {"data.batch_size": 16},
         ""),
    ],
    ids=["keep", "keep-less", "keep-factor", "root", "ignore", "effective"],
)  # fmt: skip
def test_fi_quiet_what_a_batch_changes_is_said_and_made_up_for(
    made: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    choices: tuple[str, ...], overrides: dict[str, Any], said: str,
) -> None:  # fmt: skip
    config = made(*of("Regressor"), *choices)
    assert find_batch_size(config, tmp_path)[0] == overrides
    printed = capsys.readouterr().out
    assert said in printed
    assert said or "optimizer steps" not in printed
    assert config.changed(overrides).data["batch_size"] == overrides["data.batch_size"]


def test_fi_quiet_a_model_that_cannot_accumulate_gets_no_larger_batch(
    made: Callable[..., Config], tmp_path: Path
) -> None:
    found, *_ = find_batch_size(made(*of("Gan"), *FULL), tmp_path)
    assert found == {"data.batch_size": 4}


def test_fi_quiet_what_is_answered_can_be_typed(composed: Callable[..., DictConfig]) -> None:
    answer = {"data.batch_size": 2, "accumulate.factor": 2}
    words = typed(answer)
    assert words == "data.batch_size=2 accumulate=constant accumulate.factor=2"
    one = check(with_overrides(composed(*of("Regressor")), answer))
    other = check(composed(*of("Regressor")[:-1], "+model.lr=0.01", *words.split()))
    assert one.plain == other.plain


# ---------------------------------------------------------------------- accumulations of the user's

THEIRS = {
    "derived": {"_target_": "foreign.EveryThree"},
    "named alike": {"_target_": "foreign.EveryThree", "batch_size": 7},
    "not derived": {"_target_": "foreign.NoAccumulation", "batch_size": 7},
}


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("effective", ["keep", "root"])
def test_fi_own_the_object_answers_not_the_names_of_keys(
    made: Callable[..., Config], tmp_path: Path, name: str, effective: str
) -> None:
    accumulate = OmegaConf.create(THEIRS[name])
    config = made(*of("Regressor"), *BATCH, f"tuner.batch_size.effective={effective}",
                  "tuner.batch_size.max_val=6", accumulate=accumulate)  # fmt: skip
    assert find_batch_size(config, tmp_path)[0]["data.batch_size"] == 6
    assert len(swept(made(*of("Regressor"), *LR, accumulate=accumulate))) > 10


# ---------------------------------------------------------------------------------- nothing is left


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("model", ["ClassState", "Quiet", "Sometimes", "Lbfgs", "Thaws"])
def test_the_run_after_the_finders_is_that_of_the_answers_typed(
    composed: Callable[..., DictConfig], tmp_path: Path, model: str
) -> None:
    choices = (*of(model), *FULL, "tuner.lr.num_steps=20", "tuner.lr.on_doubt=use",
               "tuner.batch_size.max_val=2")  # fmt: skip
    (tmp_path / "run").mkdir()
    foreign.ClassState.count, before = 0, (dict(os.environ), threading.active_count())
    foreign.ClassState.cache.clear()

    def weights(config: Config) -> list[torch.Tensor]:
        foreign.ClassState.count = 0
        foreign.ClassState.cache.clear()
        run = build(config.but(tuner=None), [])
        run.trainer.fit(run.model, datamodule=run.data)
        return [value.clone() for value in run.model.state_dict().values()]

    overrides = find(check(composed(*choices)), tmp_path / "run")
    assert (foreign.ClassState.count, foreign.ClassState.cache) == (0, {})
    assert (dict(os.environ), threading.active_count()) == before
    after = weights(check(with_overrides(composed(*choices), overrides)))
    torch.rand(3), random.random()
    expected = weights(check(composed(*choices, *typed(overrides).split())))
    for one, other in zip(after, expected, strict=True):
        assert torch.equal(one, other)


# ---------------------------------------------------------------------------------------- the cache


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of the user's, which is forgotten after each look at it."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    (folder / "__init__.py").touch()
    (folder / "widths.py").write_text("WIDTH = 8\n")
    (folder / "base.py").write_text(
        "import foreign\nfrom theirs.widths import WIDTH\n"
        "class Base(foreign.Regressor):\n    width = WIDTH\n"
    )
    (folder / "model.py").write_text("from .base import Base\nclass Net(Base):\n    pass\n")
    (folder / "data.py").write_text(
        "import foreign\nfrom theirs import loading as reading\n"
        "class Data(foreign.Points):\n    pass\n"
    )
    (folder / "loading.py").write_text("import json\n")
    (folder / "calls.py").write_text("from foreign import Freezes\n")
    (folder / "table.csv").write_text("1\n")
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "theirs"]:
        del sys.modules[name]


@pytest.mark.parametrize(
    "file", ["widths.py", "base.py", "model.py", "data.py", "loading.py", "calls.py", "table.csv"]
)
def test_fi_stale_the_key_follows_what_is_imported(
    made: Callable[..., Config], user: Path, file: str
) -> None:
    def key() -> str:
        for name in [name for name in sys.modules if name.partition(".")[0] == "theirs"]:
            del sys.modules[name]
        config = made(*ANY, "model._target_=theirs.model.Net", "data._target_=theirs.data.Data",
                      f"+data.table={user}/table.csv", "+model.lr=0.01", *LR,
                      "+callbacks.mine._target_=theirs.calls.Freezes")  # fmt: skip
        return cache_key(config.plain, device="cpu")

    before = key()
    assert key() == before
    with (user / file).open("a") as changed:
        changed.write("2" if file.endswith("csv") else "# other\n")
    assert key() != before


def test_fi_stale_another_folder_of_the_run_is_no_other_question(
    composed: Callable[..., DictConfig],
) -> None:
    keys = {
        cache_key(
            check(composed(*of("Regressor"), *LR, f"run_dir=runs/{name}")).plain, device="cpu"
        )
        for name in "ab"
    }
    assert len(keys) == 1


# ------------------------------------------------------------------------------------- app.evaluate


def test_fi_eval_a_run_of_several_ranks_is_searched_by_one_process(
    composed: Callable[..., DictConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = ("strategy=ddp", "trainer.devices=2", "sharing=shared", "trainer.max_epochs=1",
              "trainer.limit_train_batches=2", "trainer.accelerator=cpu", "logger=none",
              "callbacks.progress=null")  # fmt: skip
    config = check(composed(*chosen))
    alone = check(composed(*chosen[3:]))
    run = build(alone, [])
    run.trainer.fit(run.model, datamodule=run.data)
    RunFolder(Path(config.run_dir)).write_config(config.plain, [])
    typed_ = (f"run={config.run_dir}", "tuner=batch_size", "tuner.batch_size.max_val=8",
              "checkpoint=last")  # fmt: skip
    with initialize_config_module("app.conf", version_base="1.3"):
        evaluate.main(compose("evaluate", [*typed_]))
    assert "data.eval_batch_size=8: " in capsys.readouterr().out


class AfterAFit(foreign.Callback):
    """Counts on an epoch and a fit, and saves as it likes."""

    def __init__(self, path: str) -> None:
        self.path, self.losses = path, []

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        trainer.save_checkpoint(self.path)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.losses.append(trainer.callback_metrics["v/dataloader_idx_0"])

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        assert trainer.callback_metrics["v/dataloader_idx_0"] > 0

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        min(self.losses)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        assert trainer.current_epoch > 0


@pytest.mark.filterwarnings("ignore:tuner. AfterAFit")
def test_fi_callbacks_what_follows_a_fit_does_not_end_a_search(
    made: Callable[..., Config], tmp_path: Path
) -> None:
    path = tmp_path / "theirs.ckpt"
    of_user = ("+callbacks.mine._target_=test_tuner_foreign.AfterAFit",
               f"+callbacks.mine.path={path}")  # fmt: skip
    model = of("Validated", "SeveralVals")
    assert size_of(made(*model, *BATCH, *of_user, "tuner.batch_size.max_val=4")) == 4
    assert len(swept(made(*model, *LR, *of_user))) >= 10
    assert not path.exists()


def test_fi_ignored_an_evaluation_is_searched_as_far_as_more_is_served() -> None:
    served = Served("data.batch_size", 8)
    served.compare(2, [[2]])
    served.compare(4, [[3]])
    with pytest.raises(Untrained, match="no more is served than at 4"):
        served.compare(8, [[3]])
    deaf = Served("data.batch_size", 8)
    for size in (2, 4):  # below what is given: of tokens these may be too few for a sample
        deaf.compare(size, [[4]])
    with pytest.raises(NoEffect, match=r"data\.batch_size has no effect"):
        deaf.compare(8, [[4]])


def test_da_sampler_what_counts_no_samples_is_not_bound_by_them() -> None:
    batches = [[0, 1, 2], [3, 4], [5]]
    loader = DataLoader(foreign.points(6), batch_sampler=batches)
    assert samples_of(loader, 3) == 6
    assert samples_of(loader, 400) is None
