"""A project that is made runs as it is, and its presets are found where it is worked in."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf

from app import cli, new
from app.cli.explained import explain
from app.cli.presets import help_text, project_conf
from app.config import check
from app.errors import Refused


@pytest.fixture
def shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project made in this folder, to work in."""
    folder = tmp_path / "shapes"
    new.make(folder, "shapes")
    monkeypatch.chdir(folder)
    return folder


def test_its_files_have_its_name_and_nothing_of_ours(shapes: Path) -> None:
    texts = {str(path.relative_to(shapes)): path.read_text() for path in shapes.rglob("*.*")
             if path.is_file()}  # fmt: skip
    assert {"shapes/model.py", "conf/model/shapes.yaml", "pyproject.toml", ".gitignore"} <= {*texts}
    assert [name for name, text in texts.items() if new.PLACEHOLDER in name + text] == []
    model_and_data = texts["shapes/model.py"] + texts["shapes/data.py"]
    assert "import app" not in model_and_data
    assert "from app" not in model_and_data
    assert len((shapes / "README.md").read_text().splitlines()) <= 40


@pytest.mark.slow
def test_its_tests_pass_and_what_its_readme_types_composes(
    shapes: Path, monkeypatch: pytest.MonkeyPatch, checked: Callable[..., object]
) -> None:
    monkeypatch.syspath_prepend(shapes)
    assert pytest.main(["-q", "-p", "no:cacheprovider", "--rootdir", ".", "tests"]) == 0
    lines = (shapes / "README.md").read_text().split("\n    ")
    typed = [line.split("#")[0].split()[3:] for line in lines if "experiment=first" in line]
    assert len(typed) > 5
    for words in typed:
        checked(
            *(word for word in words if word != "-m" and "," not in word and "fit=" not in word)
        )


def test_its_presets_are_found_where_it_is_worked_in(
    shapes: Path, composed: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = composed("experiment=first")
    assert cfg.model._target_ == "shapes.model.Classifier"
    assert cfg.clip._target_ == "app.clip.NormClip"
    text = help_text("train", "")
    assert "clip=adaptive|custom|gentle|none" in text
    assert "model=cnn1d|cnn1d_bn|custom|graphsage|mlp|shapes|" in text
    monkeypatch.chdir(shapes.parent)
    assert "gentle" not in help_text("train", "")
    with pytest.raises(Exception, match="experiment/first"):
        composed("experiment=first")


def test_of_two_presets_with_one_name_the_projects_is_taken(
    shapes: Path, composed: Callable[..., DictConfig]
) -> None:
    (shapes / "conf/clip/gentle.yaml").rename(shapes / "conf/clip/norm.yaml")
    assert composed("clip=norm").clip.max_norm == 5


def test_a_wrong_key_in_a_preset_is_told_as_one_that_is_typed(
    shapes: Path, composed: Callable[..., DictConfig]
) -> None:
    (shapes / "conf/experiment/bad.yaml").write_text(
        "# @package _global_\ntrainer: {max_epoch: 3}\n"
    )
    with pytest.raises(ConfigCompositionException) as raised:
        composed("experiment=bad")
    said = explain(raised.value)
    what = "trainer.max_epoch is not a key; did you mean trainer.max_epochs?"
    assert said == f"In 'experiment/bad': {what}"
    (shapes / "conf/experiment/bad.yaml").write_text(
        "# @package _global_\ntrainr: {max_epochs: 3}\n"
    )
    with pytest.raises(Refused, match="trainr is not a key; did you mean trainer"):
        check(composed("experiment=bad"))


PYPROJECTS = {
    "other tools": ("[tool.ruff]\nline-length = 100\n", None),
    "another folder": (
        '[tool.effective-training]\nconf = "cnf"\n',
        "[tool.effective-training] conf must be a folder beside {path}, got 'cnf'; write "
        'conf = "conf"',
    ),
    "a number": (
        "[tool.effective-training]\nconf = 3\n",
        '[tool.effective-training] conf must be a folder beside {path}, got 3; write conf = "conf"',
    ),
    "no toml": ("x = = 3\n", "{path} cannot be read: Invalid value (at line 1, column 5)"),
}


@pytest.mark.parametrize("case", PYPROJECTS)
def test_what_the_projects_file_says_is_read_or_refused(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text, said = PYPROJECTS[case]
    path = tmp_path / "pyproject.toml"
    path.write_text(text)
    if said is None:
        assert project_conf() is None
        return
    with pytest.raises(Refused) as refused:
        project_conf()
    assert str(refused.value) == said.format(path=path)


def test_a_configuration_that_is_not_built_on_ours_is_refused() -> None:
    task = cli.TaskOfCommand(lambda cfg: pytest.fail("it was called"))
    task(OmegaConf.create({"data": {}, "trainer": {}}))
    assert [str(error) for error in task.refused] == [cli.NOT_OURS]


IMPORTS = "the package must have a name that Python imports"
ALONE = "the package must have a name that no other has"
NAMES = {
    "my-shapes": f"{IMPORTS}, got my-shapes; type python -m app.new P --package my_shapes",
    "3d": f"{IMPORTS}, got 3d; type python -m app.new P --package my_3d",
    "class": f"{IMPORTS}, got class; type python -m app.new P --package my_class",
    "shapes_": f"{IMPORTS}, got shapes_; type python -m app.new P --package shapes",
    "": f"{IMPORTS}, got ; type python -m app.new P --package my_project",
    "json": f"{ALONE}, got json; type python -m app.new P --package my_json",
    "torch": f"{ALONE}, got torch; type python -m app.new P --package my_torch",
    "app": f"{ALONE}, got app; type python -m app.new P --package my_app",
    "conf": f"{ALONE}, got conf; type python -m app.new P --package my_conf",
    "runs": f"{ALONE}, got runs; type python -m app.new P --package my_runs",
}


@pytest.mark.parametrize("package", NAMES)
def test_a_name_that_cannot_be_that_of_a_package_is_refused_and_another_offered(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refused) as refused:
        new.make(Path("P"), package)
    assert str(refused.value) == NAMES[package]
    assert not Path("P").exists()


def test_a_folder_that_is_not_empty_or_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Refused, match=r"must be new or empty, got .*, which holds file$"):
        new.make(tmp_path, "shapes")
    with pytest.raises(Refused, match=f"got {tmp_path}/file/x: not a directory$"):
        new.make(tmp_path / "file/x", "shapes")
    (tmp_path / "cloned/.git").mkdir(parents=True)
    assert len(new.make(tmp_path / "cloned", "shapes")) == len(new.files())


def test_a_refusal_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        new.main([str(tmp_path / "shapes"), "--package", "torch"])
    said = f"type python -m app.new {tmp_path}/shapes --package my_torch"
    assert capsys.readouterr().err == f"new: {ALONE}, got torch; {said}\n"
