"""A job of a sweep that is made of another is the job that Hydra composes: values, types, flags."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.utils import setup_globals
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig

from app.cli import VERSION_BASE, groups
from app.launch.composing import Composer, is_same

ROOT = Path(__file__).parents[1]
VALUES = {
    "seed": ("1", "2", "3"),
    "name": ("a", "'b c'", "${seed}"),
    "trainer.max_epochs": ("3", "null"),
    "optimizer.lr": ("0.1", "1e-3"),
    "data.batch_size": ("16", "32", "${eval:1}"),
    "model.hidden_sizes": ("[3,4]", "[]"),
    "trainer.limit_train_batches": ("5", "0.5", "null"),
    "test": ("best", "last"),
    "callbacks.checkpoint.monitor": ("val_acc", "null"),
}
CHANGES = ("+model.extra=1", "++model.extra=2", "~seed", "trainer={max_epochs: 2}", "+new=a")


class Loaders:
    """A composer over Hydra's loader, and another loader that nobody has touched."""

    def __init__(self) -> None:
        version.setbase(VERSION_BASE)
        setup_globals()
        path = create_config_search_path("pkg://app.conf")
        self.theirs, loader = ConfigLoaderImpl(path), ConfigLoaderImpl(path)
        self.sweep = loader.load_configuration("train", ["launch=local"], RunMode.MULTIRUN)
        self.loader = loader
        self.composer = Composer(loader)

    def both(self, *overrides: str) -> Iterator[DictConfig | str]:
        """The job as it is made here, after a sweeper's validation, and as Hydra composes it."""
        for compose in (self._ours, self.theirs.load_sweep_config):
            try:
                yield compose(self.sweep, list(overrides))
            except HydraException as error:
                yield f"{error} {error.__cause__}"

    def _ours(self, sweep: DictConfig, overrides: list[str]) -> DictConfig:
        self.loader.load_sweep_config(sweep, overrides)
        return self.composer.compose(sweep, overrides)


@pytest.mark.parametrize("seed", range(4))
def test_jobs_of_random_presets_and_values_are_those_that_hydra_composes(seed: int) -> None:
    draw = random.Random(seed)
    loaders = Loaders()
    presets = {name: found for name, (found, _) in groups().items() if name != "hydra"}
    num_composed = 0
    for _ in range(6):
        shape = [f"{name}={draw.choice(presets[name])}" for name in draw.sample([*presets], 2)]
        shape += draw.sample(CHANGES, draw.choice((0, 0, 1)))
        keys = draw.sample([*VALUES], 3)
        for _ in range(3):
            typed = [*shape, *(f"{key}={draw.choice(VALUES[key])}" for key in keys)]
            ours, theirs = loaders.both(*typed)
            if isinstance(ours, str) or isinstance(theirs, str):
                assert ours == theirs, typed
            else:
                num_composed += 1
                assert is_same(ours, theirs), typed
    assert num_composed


@pytest.mark.parametrize(
    "bad", ["seed=word", "sed=3", "clip.max_norm=[1]", "averaging.decay=0.9", "clip=nrom", "seed="]
)
def test_an_error_in_a_late_job_is_hydras_own(bad: str) -> None:
    loaders = Loaders()
    for seed in (1, 2, 3):
        ours, theirs = loaders.both(f"seed={seed}", "clip.max_norm=2")
        assert is_same(ours, theirs)
    good = [word for word in ("seed=4", "clip.max_norm=2") if word.split("=")[0] not in bad]
    ours, theirs = loaders.both(*good, bad)
    assert ours == theirs
    assert isinstance(ours, str) or bad == "seed="


def test_jobs_with_other_values_are_composed_in_full_twice_and_no_more() -> None:
    loaders = Loaders()
    composed = []
    in_full = loaders.composer._compose_in_full
    loaders.composer._compose_in_full = lambda *a: composed.append(a[1]) or in_full(*a)
    for averaging in ("ema", "swa"):
        for seed in range(5):
            list(loaders.both(f"averaging={averaging}", f"seed={seed}"))
    assert composed == [[f"averaging={a}", f"seed={s}"] for a in ("ema", "swa") for s in (0, 1)]
