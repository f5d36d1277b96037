"""Each file of multirun_examples/ is a sweep whose jobs are allowed; searches with Optuna."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from statistics import fmean

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from omegaconf import DictConfig, OmegaConf

from app.config import check
from app.errors import Refused
from app.fit import objective
from app.record.folder import RunFolder
from app.record.trials import PRUNED, STORAGE, open_study, url
from app.report.reading import read_runs
from app.report.summary import summarize
from app.sweep.__main__ import main as status
from app.sweep.journal import Journal
from app.sweep.study import STUDY as STUDY_NAME

EXAMPLES = Path(__file__).parents[1] / "multirun_examples"
FILES = sorted(EXAMPLES.glob("*.yaml"))
SMALL = ("model.channels=4", "trainer.accelerator=cpu", "trainer.max_epochs=1",
         "trainer.limit_train_batches=2", "trainer.limit_test_batches=1")  # fmt: skip
MISSING = (
    "sweep=optuna needs the package optuna, which is not installed; type pip install -e "
    "'.[optuna]', or use sweep=none"
)
WITH_OPTUNA = pytest.mark.skipif(
    find_spec("optuna") is None, reason="needs pip install -e '.[optuna]'"
)


def train(*typed: str, cwd: Path, exit_code: int = 0, without: str | None = None) -> str:
    """What `python -m app.train` prints, both streams; `without` a package."""
    code = (
        "import runpy, sys\n"
        f"if {without!r}: sys.modules[{without!r}] = None\n"
        "runpy.run_module('app.train', run_name='__main__', alter_sys=True)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *typed],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == exit_code, done.stdout
    return done.stdout


def example(path: Path) -> list[str]:
    return ["--config-dir", str(EXAMPLES), "--config-name", path.stem]


def values(override: Override) -> list[str]:
    """The overrides that a swept one stands for; of an interval its ends."""
    key, value = override.get_key_element(), override.value()
    if isinstance(value, IntervalSweep):
        return [f"{key}={value.start}", f"{key}={value.end}"]
    return [f"{key}={each}" for each in override.sweep_string_iterator()]


def jobs(params: DictConfig) -> Iterator[tuple[str, ...]]:
    """The overrides of each job."""
    presets = ConfigLoaderImpl(create_config_search_path("pkg://app.conf"))  # for glob
    swept = OverridesParser.create(config_loader=presets).parse_overrides(
        [f"{key}={value}" for key, value in params.items()]
    )
    return product(*(values(override) for override in swept))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_job_of_every_example_is_allowed(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.conf.rules.find_spec", lambda name: name)  # optional packages
    here = [f"run_dir={tmp_path}", "name=job", "hydra.searchpath=[pkg://app.conf]"]
    with initialize_config_dir(str(EXAMPLES), version_base="1.3"):
        sweep = compose(path.stem, here, return_hydra_config=True)
        assert sweep.hydra.mode.name == "MULTIRUN"
        typed = list(jobs(sweep.hydra.sweeper.params))
        assert len(typed) > 1
        decided = [check(compose(path.stem, [*here, *job])).plain for job in typed]
    assert all(decided.count(config) == 1 for config in decided)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_example_says_its_command_and_what_came_of_it(path: Path) -> None:
    head, _, _ = path.read_text().partition("defaults:")
    assert f"python -m app.train --config-dir multirun_examples --config-name {path.stem}" in head
    assert head.count("# |") >= 3
    assert all(line.startswith("#") for line in head.splitlines())


@pytest.mark.slow
def test_an_example_runs_with_what_is_typed_over_it(tmp_path: Path) -> None:
    typed = [*example(EXAMPLES / "clip_thresholds.yaml"), "seed=1", "clip.max_norm=0.1,1"]
    printed = train(*typed, *SMALL, "hydra.sweep.dir=sweep", cwd=tmp_path)
    assert printed.count("finished") == 2
    configs = [yaml.safe_load((tmp_path / f"sweep/{n}/config.yaml").read_text()) for n in (0, 1)]
    assert [config["clip"]["max_norm"] for config in configs] == [0.1, 1.0]
    assert [config["optimizer"]["lr"] for config in configs] == [1.0, 1.0]


@pytest.mark.slow
def test_values_are_paired_by_experiments_of_the_user(tmp_path: Path) -> None:
    folder = tmp_path / "mine/experiment"
    folder.mkdir(parents=True)
    for name, rate, size in (("small", 0.05, 32), ("large", 0.2, 128)):
        text = f"# @package _global_\noptimizer:\n  lr: {rate}\ndata:\n  batch_size: {size}\n"
        (folder / f"{name}.yaml").write_text(text)
    train("-m", "--config-dir", "mine", "experiment=small,large", *SMALL, "hydra.sweep.dir=sweep",
          cwd=tmp_path)  # fmt: skip
    found = []
    for number in (0, 1):
        config = yaml.safe_load((tmp_path / f"sweep/{number}/config.yaml").read_text())
        found.append((config["optimizer"]["lr"], config["data"]["batch_size"]))
    assert found == [(0.05, 32), (0.2, 128)]


def test_optuna_without_its_package_says_what_to_install(
    composed: Callable[..., DictConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(Refused) as refused:
        check(composed("sweep=optuna"))
    assert str(refused.value) == MISSING
    search = ("-m", "sweep=optuna", "optimizer.lr=tag(log,interval(1e-3,1))")
    assert train(*search, cwd=tmp_path, exit_code=2, without="optuna") == f"train: {MISSING}\n"
    assert not list(tmp_path.iterdir())


REFUSED = {
    ("sweep.num_trials=0",): "sweep.num_trials must be >= 1, got 0; type sweep.num_trials=10",
    ("sweep.num_random=0",): "sweep.num_random must be >= 1, got 0; type sweep.num_random=10",
    ("sweep.max_failure_rate=2",): "sweep.max_failure_rate must be in [0, 1], got 2.0; type "
    "sweep.max_failure_rate=1",
    ("sweep.prune_after_trials=-1",): "sweep.prune_after_trials must be >= 0, got -1; type "
    "sweep.prune_after_trials=1",
    ("sweep.pruner=halving", "sweep.prune_after_epochs=0"): "sweep.prune_after_epochs must be > 0 "
    "with sweep.pruner=halving, got 0.0; type sweep.prune_after_epochs=1",
    ("fit=false", "tuner=lr_find"): "fit must be true with objective=val_loss, got False; type "
    "objective=null",
}


@pytest.mark.parametrize("typed", REFUSED)
def test_a_search_that_cannot_work_is_refused(
    composed: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch, typed: tuple[str, ...]
) -> None:
    monkeypatch.setattr("app.conf.rules.find_spec", lambda name: name)
    with pytest.raises(Refused) as refused:
        check(composed("sweep=optuna", *typed))
    assert str(refused.value) == REFUSED[typed]


def test_the_objective_is_a_metric_of_the_run() -> None:
    metrics = {"val_loss": 0.5, "val_acc": 0.75, "train_loss": 0.25}
    assert objective(None, metrics) is None
    assert objective("val_acc", metrics) == 0.75
    with pytest.raises(Refused) as refused:
        objective("val_los", metrics)
    assert str(refused.value) == (
        "objective must be one of train_loss, val_acc, val_loss, the metrics of the run, got "
        "val_los; type objective=val_loss"
    )


STUDY = ("-m", "sweep=optuna", "optimizer.lr=tag(log,interval(1e-3,1))", "sweep.num_random=2",
         "logger=csv", "callbacks.progress=null", "name=study", *SMALL)  # fmt: skip


def best_of(folder: Path) -> float:
    """What the sweeper says, which is the least of what the jobs say."""
    results = [json.loads(path.read_text()) for path in folder.glob("*/result.json")]
    best: float = yaml.safe_load((folder / "optimization_results.yaml").read_text())["best_value"]
    assert best == min(result["metrics"]["val_loss"] for result in results)
    return best


@WITH_OPTUNA
@pytest.mark.slow
def test_a_study_is_continued_to_its_number_of_trials(tmp_path: Path) -> None:
    folder = tmp_path / "multirun/study"
    train(*STUDY, "sweep.num_trials=2", cwd=tmp_path)
    before = best_of(folder)
    printed = train(*STUDY, "sweep.num_trials=4", cwd=tmp_path)
    assert "continuing multirun/study: 2 trials of 4" in printed
    assert best_of(folder) <= before
    rates = {OmegaConf.load(folder / f"{number}/config.yaml").optimizer.lr for number in range(4)}
    assert len(rates) == 4
    train(*STUDY, "sweep.num_trials=4", cwd=tmp_path)
    assert not (folder / "4").exists()


@WITH_OPTUNA
@pytest.mark.slow
def test_the_trials_of_a_study_run_in_a_queue(tmp_path: Path) -> None:
    typed = (*STUDY, "launch=local", "sweep.num_trials=3", "sweep.num_parallel=2")
    train(*typed, cwd=tmp_path)
    best_of(tmp_path / "multirun/study")
    assert "continuing multirun/study: 3 trials of 3" in train(*typed, cwd=tmp_path)


@WITH_OPTUNA
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Deprecated API features detected")  # Optuna's
@pytest.mark.parametrize(
    "launch",
    [(), ("launch=local", "sweep.num_parallel=2", "strategy=ddp", "trainer.devices=2")],
    ids=["in turn", "in a queue, two ranks each"],
)
def test_hopeless_trials_are_pruned_and_not_run_again(
    tmp_path: Path, launch: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    typed = (*STUDY, "sweep.sampler=random", "sweep.num_trials=6", "sweep.prune_after_trials=2",
             "trainer.max_epochs=6", "optimizer.lr=1e-9,0.3", "seed=1", *launch)  # fmt: skip
    train(*typed, cwd=tmp_path)
    study = open_study(tmp_path / "multirun/study" / STORAGE)
    runs = [RunFolder(tmp_path / f"multirun/study/{number}") for number in range(6)]
    results = [run.read_result() or {} for run in runs]
    pruned = [result for result in results if result["status"] == "pruned"]
    assert 0 < len(pruned) < 6
    assert len({result["optimizer_steps"] for result in results}) == 2
    for trial, run, result in zip(study.trials, runs, results, strict=True):
        assert trial.params["optimizer.lr"] == (run.read_config() or {})["optimizer"]["lr"]
        assert trial.state.name == {"finished": "COMPLETE"}.get(result["status"], "PRUNED")
        assert trial.value == pytest.approx(result["metrics"]["val_loss"])
        assert len(trial.intermediate_values) == result["epochs"]
        assert ("test_loss" in result["metrics"]) == (result["status"] == "finished")
        if result["status"] == "pruned":
            assert result["epochs"] < 6
            assert trial.params["optimizer.lr"] == 1e-9
    report = summarize(tmp_path, read_runs(tmp_path), metric="val_loss", mode="min", baseline=())
    assert [run.state for run in report.runs] == [result["status"] for result in results]
    assert report.problems == []
    for row in report.rows:  # pruned ones are not in its mean
        kept = [run.result["metrics"]["val_loss"] for run in row.config.runs
                if run.state == "finished"]  # fmt: skip
        assert (row.mean is None) == (kept == [])
        assert row.mean is None or row.mean.mean == pytest.approx(fmean(kept))
    before = [run.result_path.stat().st_mtime for run in runs]
    train(*typed, cwd=tmp_path)
    assert [run.result_path.stat().st_mtime for run in runs] == before
    if launch:
        sweep = Journal(tmp_path / "multirun/study").read()
        assert sweep is not None
        assert [job.state for job in sweep.jobs.values()] == [r["status"] for r in results]
        assert sweep.unfinished() == []
        status(["status", str(tmp_path / "multirun/study")])
        assert f"{len(pruned)} pruned" in capsys.readouterr().out


@WITH_OPTUNA
@pytest.mark.filterwarnings("ignore:Deprecated API features detected")  # Optuna's
def test_a_study_whose_command_was_killed_counts_what_it_had_decided(tmp_path: Path) -> None:
    import optuna

    folder = tmp_path / "multirun/study"
    folder.mkdir(parents=True)
    study = optuna.create_study(study_name=STUDY_NAME, storage=url(folder / STORAGE))
    trials = [study.ask() for _ in range(4)]
    for trial in trials:
        trial.report(0.5, 1000)
    for trial in trials[1:3]:
        trial.set_user_attr(PRUNED, True)
    study.tell(0, 0.5)
    study.tell(1, state=optuna.trial.TrialState.PRUNED)
    printed = train(*STUDY, "objective=test_loss", "sweep.num_trials=4", cwd=tmp_path)
    assert "continuing multirun/study: 4 trials of 4" in printed
    assert "objective=test_loss is measured after the fit: no trial is pruned" in printed
    states = [trial.state.name for trial in open_study(folder / STORAGE).trials]
    assert states == ["COMPLETE", "PRUNED", "PRUNED", "FAIL"]


@WITH_OPTUNA
@pytest.mark.slow
def test_a_study_tolerates_failed_trials_but_not_only_failed_ones(tmp_path: Path) -> None:
    printed = train(*STUDY, "objective=val_los", "direction=minimize", cwd=tmp_path, exit_code=2)
    assert "type objective=val_loss" in printed.splitlines()[-1]
    assert not (tmp_path / "multirun/study/1").exists()
    diverging = [*STUDY, "clip=none", "model=mlp", "name=some", "sweep.num_trials=3"]
    diverging.remove("model.channels=4")
    diverging[2] = "optimizer.lr=1e30,0.1"
    printed = train(*diverging, "sweep.sampler=random", cwd=tmp_path)
    assert "Failed experiment: val_loss is nan" in printed
    best = yaml.safe_load((tmp_path / "multirun/some/optimization_results.yaml").read_text())
    assert math.isfinite(best["best_value"])
    assert best["best_params"] == {"optimizer.lr": 0.1}
    diverging[2] = "optimizer.lr=1e30,1e31"
    printed = train(*diverging, "name=all", cwd=tmp_path, exit_code=1)
    assert printed.splitlines()[-1] == "train: none of 3 trials came to an objective"


@WITH_OPTUNA
@pytest.mark.slow
def test_a_study_is_a_sweep_and_keeps_its_direction(tmp_path: Path) -> None:
    printed = train("sweep=optuna", *SMALL, cwd=tmp_path, exit_code=2)
    assert printed == (
        "train: sweep=optuna chooses the jobs of a sweep, and this is one run; type -m as well, or "
        "sweep=none\n"
    )
    assert not any((tmp_path / "runs").glob("*"))
    train(*STUDY, "sweep.num_trials=1", cwd=tmp_path)
    printed = train(*STUDY, "direction=maximize", cwd=tmp_path, exit_code=2)
    assert printed == (
        "train: multirun/study holds a study with direction=minimize; give this one another name=\n"
    )
