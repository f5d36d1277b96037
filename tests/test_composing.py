"""A job of a sweep that is made of a template is the job that Hydra composes: values, types, flags,
and errors."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.utils import setup_globals
from hydra.types import RunMode
from omegaconf import DictConfig, Node

from app.cli import VERSION_BASE
from app.cli.presets import groups
from app.sweep.composing import Composer

PRESETS = {group: presets for group, (presets, _) in groups().items()}
ROUNDS = max(map(len, PRESETS.values()))
VALUES = {
    "seed": ("1", "0", "word"),
    "name": ("a", "'b c'", "${seed}", "null", "1", "true"),
    "trainer.max_epochs": ("3", "null", "???"),
    "trainer.devices": ("2", "[0,1]", "auto", "${seed}"),
    "trainer.limit_train_batches": ("5", "0.5", "null"),
    "optimizer.lr": ("0.1", "1e-3", "nan"),
    "data.batch_size": ("16", "32", "${seed}"),
    "test": ("best", "last"),
    "callbacks.checkpoint": ("{monitor: val_acc}", "null"),
    "trainer": ("{max_epochs: 2}", "{devices: 1, seed: 2}"),
    "+new": ("a", "1", "{b: 1}", "[1,2]"),
    "++model.extra": ("2", "{a: {b: c}}"),
    "~seed": ("1", "null"),
}


class Loaders:
    """A composer over Hydra's loader, and another loader that nobody has touched."""

    def __init__(self, *typed: str) -> None:
        version.setbase(VERSION_BASE)
        setup_globals()
        path = create_config_search_path("pkg://app.conf")
        self.theirs, self.loader = ConfigLoaderImpl(path), ConfigLoaderImpl(path)
        self.sweep = self.loader.load_configuration(
            "train", ["launch=local", *typed], RunMode.MULTIRUN
        )
        self.in_full: list[Sequence[str]] = []
        """Jobs that ours has composed in full."""
        compose = self.loader.load_sweep_config

        def noted(config: DictConfig, overrides: list[str]) -> DictConfig:
            self.in_full.append(overrides)
            return compose(config, overrides)

        self.loader.load_sweep_config = noted  # type: ignore[method-assign]
        self.composer = Composer(self.loader)

    def ours(self, *typed: str) -> Any:
        """As a sweeper validates a job, and a launcher composes it: the configuration, or the error
        with its cause."""
        made = _outcome(self.composer.load_sweep_config, self.sweep, typed)
        if isinstance(made, DictConfig):
            made.name = "changed"  # the caller's own
        return _outcome(self.composer.load_sweep_config, self.sweep, typed)

    def assert_same(self, *typed: str) -> Any:
        """What both come to."""
        ours = self.ours(*typed)
        theirs = _outcome(self.theirs.load_sweep_config, self.sweep, typed)
        if isinstance(theirs, DictConfig) and isinstance(ours, DictConfig):
            assert is_same(ours, theirs), typed
        else:
            assert ours == theirs, typed
        return theirs


def is_same(one: Node, other: Node) -> bool:
    """Whether two nodes have the same values, unresolved, and the same types and flags."""
    if type(one) is not type(other) or one._metadata != other._metadata:
        return False
    mine, theirs = one._value(), other._value()
    if isinstance(mine, dict) and isinstance(theirs, dict):
        return list(mine) == list(theirs) and all(is_same(mine[k], theirs[k]) for k in mine)
    if isinstance(mine, list) and isinstance(theirs, list):
        return len(mine) == len(theirs) and all(map(is_same, mine, theirs))
    return repr(mine) == repr(theirs)  # equal numbers of another type are not the same


def _outcome(compose: Any, sweep: DictConfig, typed: Sequence[str]) -> Any:
    try:
        return compose(master_config=sweep, sweep_overrides=list(typed))
    except Exception as error:
        return type(error), str(error), type(error.__cause__), str(error.__cause__)


@pytest.fixture(scope="module")
def loaders() -> Loaders:
    """After two jobs that set the same keys."""
    loaders = Loaders()
    for seed in (1, 2):
        loaders.ours(f"seed={seed}", "clip.max_norm=2")
    return loaders


@pytest.mark.parametrize("number", range(ROUNDS))
def test_jobs_of_all_presets_with_random_values_are_those_that_hydra_composes(number: int) -> None:
    draw, loaders = random.Random(number), Loaders()
    presets = [f"{name}={found[number % len(found)]}" for name, found in PRESETS.items()]
    keys = draw.sample([*VALUES], 3)
    places = [draw.randrange(len(presets) + 1) for _ in keys]
    for _ in range(3):
        typed = list(presets)
        for key, place in zip(keys, places, strict=True):
            typed.insert(place, f"{key}={draw.choice(VALUES[key])}")
        loaders.assert_same(*typed)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("seed=word", "Value 'word' of type 'str' could not be converted to Integer"),
        ("sed=3", "Could not override 'sed'"),
        ("clip.max_norm=[1]", "Error merging override clip.max_norm=[1]"),
        ("test=never", "Invalid value 'never', expected one of [best, last"),
        ("averaging.decay=0.9", "Could not override 'averaging.decay'"),
        ("+seed=3", "Could not append to config. An item is already at 'seed'"),
        ("~nothing", "Could not delete from config. 'nothing' does not exist"),
        ("clip=nrom", "Could not find 'clip/nrom'"),
        ("++clip=norm", "force-add of config groups is not supported: '++clip=norm'"),
        ("clip=1", "Config group override must be a string or a list. Got int"),
        ("clip@here=norm", "Could not override 'clip@here'"),
        ("seed=1,2", "Ambiguous value for argument 'seed=1,2'"),
        ("seed=[1", "no viable alternative at input '[1'"),
    ],
)
def test_an_error_in_a_late_job_is_hydras_own_word_for_word(
    loaders: Loaders, bad: str, says: str
) -> None:
    key = bad.split("=")[0]
    good = [word for word in ("seed=4", "clip.max_norm=2") if word.split("=")[0] != key]
    assert says in " ".join(map(str, loaders.assert_same(*good, bad)))


def test_a_value_of_one_kind_leaves_no_trace_in_a_job_with_one_of_another(loaders: Loaders) -> None:
    for value in ("${tuned}", "[3,4]", "[${seed}]", "null", "[]", "5", "???", "{a: 1}", "[[1]]"):
        loaders.assert_same("model=mlp", f"model.hidden_sizes={value}")


def test_a_value_that_a_later_one_hides_stays_hidden(loaders: Loaders) -> None:
    for epochs, seed in ((2, 1), (2, 2), (3, 1)):
        typed = (f"trainer.max_epochs={epochs}", f"seed={seed}", "trainer={max_epochs: 2}")
        assert loaders.assert_same(*typed).trainer.max_epochs == 2


def test_jobs_that_change_the_settings_of_hydra_are_composed_in_full(loaders: Loaders) -> None:
    for typed in ("hydra.job.env_copy=[PATH]", "hydra={job: {name: a}}", "hydra/launcher=basic"):
        for seed in (1, 2):
            loaders.assert_same(typed, f"seed={seed}")
            assert loaders.in_full[-1] == [typed, f"seed={seed}"]


def test_what_comes_before_the_values_is_composed_in_full_once() -> None:
    loaders = Loaders()
    for averaging in ("ema", "swa"):
        for seed in range(5):
            loaders.ours("+model.extra=1", f"seed={seed}", f"averaging={averaging}")
    for clip in ("value", "none"):
        loaders.ours(f"clip={clip}")
    for seed in (1, 2):
        loaders.ours(f"seed={seed}", "++model.extra=1")
    assert loaders.in_full == [
        ["+model.extra=1", "averaging=ema"], ["+model.extra=1", "averaging=swa"],
        ["clip=value"], ["clip=none"],
        ["seed=1", "++model.extra=1"], ["seed=2", "++model.extra=1"],
    ]  # fmt: skip


# sweeps as they are typed in the documentation of Hydra, in templates and by users
@pytest.mark.parametrize(
    "jobs",
    [
        [("optimizer=adam", "optimizer.lr=0.001"), ("optimizer=sgd", "optimizer.lr=0.01")],
        [("+experiment=ema", "seed=1"), ("+experiment=ema", "seed=2")],
        [("experiment=ema", "averaging.decay=0.9"), ("experiment=swa", "averaging.start=0.5")],
        [("data.batch_size=16", "model.channels=8", "~callbacks.progress")] * 2,
        [("callbacks.early_stopping=null",), ("callbacks=early_stopping",), ("callbacks=none",)],
        [("model.kernel_sizes=[3,3]",), ("model.kernel_sizes='[5,3]'",), ("model={channels: 3}",)],
        [("name='run-${seed}'", "seed=3"), ("name=${model._target_}", "seed=4")],
        [("trainer.max_epochs=1", "trainer.max_epochs=2"), ("trainer.max_epochs=2",) * 2],
        [("logger=csv", "logger@logger.second=csv"), ("logger=csv", "+logger@here=tensorboard")],
        [("optimizer.lr=1e-3", "hydra.job.chdir=true"), ("optimizer.lr=1e-2", "hydra.verbose=1")],
        [("name=a=b", "seed=5"), ("name='a,b'", "seed=6"), ("name=''", "seed=7"), ("name=",)],
        [("launch.retries=1", "seed=1"), ("launch=none", "seed=1"), ("launch=slurm", "seed=2")],
    ],
)
def test_sweeps_as_others_type_them_are_those_that_hydra_composes(jobs: Any) -> None:
    loaders = Loaders()
    for typed in jobs:
        loaders.assert_same(*typed)


def test_a_loader_that_has_a_composer_in_its_place_answers_as_before() -> None:
    loaders = Loaders()
    for name in ("get_group_options", "list_groups"):
        assert getattr(loaders.composer, name)("clip") == getattr(loaders.theirs, name)("clip")
    assert loaders.composer.get_search_path() is loaders.loader.get_search_path()


def test_a_job_shares_what_the_sweep_has_resolved_before_it(loaders: Loaders) -> None:
    loaders.sweep._metadata.resolver_cache["now"]["%Y"] = "1999"
    for seed in (1, 5):
        cfg = loaders.assert_same(f"seed={seed}", "clip.max_norm=2")
        assert cfg._metadata.resolver_cache["now"]["%Y"] == "1999"


def test_presets_of_ones_own_are_told_from_values(tmp_path: Path) -> None:
    for group in ("clip", "mine"):
        (tmp_path / group).mkdir()
    (tmp_path / "clip/half.yaml").write_text(
        "defaults: [/schema/clip/norm@_here_]\nmax_norm: 0.5\nnorm_type: 2.0\n"
    )
    (tmp_path / "mine/one.yaml").write_text("# @package _global_\nseed: 7\n")
    loaders = Loaders(f"hydra.searchpath=[file://{tmp_path}]", "hydra.run.dir='${not_yet:known}'")
    for epochs in (1, 2, 3):
        typed = ("+mine=one", f"trainer.max_epochs={epochs}", "clip=half")
        cfg = loaders.assert_same(*typed)
        assert (cfg.seed, cfg.clip.max_norm, cfg.trainer.max_epochs) == (7, 0.5, epochs)
    assert len(loaders.in_full) == 1
