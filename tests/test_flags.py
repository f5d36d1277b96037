"""Hydra's flags, and its globs, do what its users know of them."""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from app import cli
from app.record.folder import RunFolder
from app.train import main as train


@pytest.fixture(autouse=True)
def _logs_as_before() -> Iterator[None]:
    """Hydra lets them write to streams that are a test's own."""
    logs = [logging.getLogger(name) for name in ("", "hydra")]
    before = [(one.handlers[:], one.level) for one in logs]
    yield
    for one, (handlers, level) in zip(logs, before, strict=True):
        one.handlers[:] = handlers
        one.setLevel(level)


def shown(*typed: str, name: str, monkeypatch: Any, capsys: Any) -> str:
    monkeypatch.setattr(sys, "argv", [name, *typed])
    cli.main(train, name, "")
    return str(capsys.readouterr().out)


FLAGS = {
    "--info all": "Defaults Tree",
    "--info defaults": "schema/clip/norm",
    "--info defaults-tree": "schema/clip/norm",
    "--info searchpath": "pkg://app.multirun_examples",
    "--info config": "max_epochs: ",
    "--info plugins": "Presets",
    "--cfg job": "run_dir: ${hydra:runtime.output_dir}",
    "--cfg job --resolve name=mine": "run_dir: runs/mine",
    "--cfg job --resolve run_dir=here": "run_dir: here",
    "--cfg all --resolve name=mine": "dir: runs/mine",
    "seed=3 --cfg job -p seed name=mine": "3",
    "seed=3 --cfg job --package optimizer optimizer.lr=7": "lr: 7",
    "--config-name techniques_over_seeds --cfg job -p trainer": "max_epochs: 15",
}


@pytest.mark.parametrize("typed", FLAGS)
def test_a_flag_shows_what_it_is_for(
    typed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    text = shown(*typed.split(), name="train", monkeypatch=monkeypatch, capsys=capsys)
    assert FLAGS[typed] in text
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", ["tune", "check", "evaluate"])
def test_every_command_shows_itself_resolved(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    typed = ("run=x",) if name == "evaluate" else ()
    text = shown(
        *typed, "--cfg", "job", "--resolve", name=name, monkeypatch=monkeypatch, capsys=capsys
    )
    assert OmegaConf.create(text)
    assert "${" not in text


def test_the_configuration_of_hydra_alone_is_not_resolved(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    with pytest.raises(SystemExit):
        shown("--cfg", "hydra", "--resolve", name="train", monkeypatch=monkeypatch, capsys=capsys)
    assert capsys.readouterr().err == (
        "train: --cfg hydra cannot be resolved by itself; type --cfg all --resolve\n"
    )


@pytest.mark.parametrize(
    ("word", "listed"),
    [
        ("experiment=glob(*)", "experiment=mine/a,mine/b,top"),
        ("experiment=glob(mine/*)", "experiment=mine/a,mine/b"),
        ("experiment=glob(to*)", "experiment=top"),
        ("experiment=glob(em*)", "experiment=glob(em*)"),  # shipped
        ("experiment=glob(*,exclude=top)", "experiment=glob(*,exclude=top)"),  # Hydra's own
        ("optimizer=glob(*)", "optimizer=glob(*)"),
    ],
)
@pytest.mark.parametrize("flag", [["--config-dir", "{}"], ["-cd", "{}"], ["--config-dir={}"], []])
def test_a_glob_of_experiments_is_over_ones_own(
    word: str, listed: str, flag: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("mine/a", "mine/b", "top"):
        path = tmp_path / f"experiment/{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    typed = [part.format(tmp_path) for part in flag]
    project = tmp_path / "pyproject.toml"
    project.write_text("" if flag else "[tool.effective-training]\nconf = '.'")
    assert cli.over_ones_own([*typed, "-m", word]) == [*typed, "-m", listed]
    project.write_text("[tool.effective-training]\nconf = 'nowhere'")
    assert cli.over_ones_own(["-m", word]) == ["-m", word]


def test_overrides_stand_together_wherever_they_were_typed() -> None:
    typed = ["a=1", "-m", "--config-dir", "x=y", "+b=2", "--cfg", "job", "~c", "-sc", "query=bash"]
    flags = ["-m", "--config-dir", "x=y", "--cfg", "job", "-sc"]
    assert cli.together(typed) == [*flags, "a=1", "+b=2", "~c", "query=bash"]


@pytest.mark.parametrize("has_ended", [True, False])
def test_a_run_that_has_ended_leaves_no_lock(has_ended: bool, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with folder.locked():
        assert folder.is_held()
        if has_ended:
            folder.write_result({"status": "finished"})
    assert not folder.is_held()
    assert folder.lock_path.exists() != has_ended
    with folder.locked():  # again
        assert folder.is_held()


def test_a_lock_that_its_holder_took_away_holds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path / "run")
    opened = []
    lock = Path.open

    def open_and_lose(path: Path, *args: Any, **settings: Any) -> Any:
        file = lock(path, *args, **settings)
        if path == folder.lock_path and not opened:
            path.unlink()  # between opening and locking
        opened.append(path)
        return file

    monkeypatch.setattr(Path, "open", open_and_lose)
    with folder.locked():
        assert folder.is_held()
    assert opened.count(folder.lock_path) >= 2
