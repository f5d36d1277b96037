"""The wheel: installed elsewhere, run from an unrelated folder, it is the whole program."""

import os
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import app
from app import DISTRIBUTION, new, pip_install

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(*command: str | Path, cwd: Path, exit_code: int = 0, **env: str) -> str:
    """What a command prints, both streams."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == exit_code, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = ("-m", "build", "--wheel", "--no-isolation", "--outdir", ".")
    run(sys.executable, *build, ROOT, cwd=folder)
    (found,) = folder.glob("effective_training-*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """The Python of an environment with the wheel, and our dependencies."""
    run(sys.executable, "-m", "venv", "env", cwd=wheel.parent)
    python = wheel.parent / "env/bin/python"
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel, cwd=wheel.parent)
    # the dependencies of these tests serve the new environment too; the source does not
    said = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=ROOT)
    (Path(said.strip()) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_the_names_of_the_project_are_one() -> None:
    assert PROJECT["name"] == DISTRIBUTION
    assert version(DISTRIBUTION) == PROJECT["version"]
    (of_tests,) = (name for name in PROJECT["optional-dependencies"]["dev"] if "[" in name)
    assert of_tests.startswith(f"{DISTRIBUTION}[")


def test_what_is_promised_of_python_is_what_the_tests_run_with() -> None:
    running = f"{sys.version_info.major}.{sys.version_info.minor}"
    tested = [name for name in PROJECT["classifiers"] if "Python ::" in name]
    assert f"Programming Language :: Python :: {running}" in tested
    assert PROJECT["requires-python"] == f">={tested[0].rpartition(' ')[2]}"


def test_every_extra_is_typed_as_this_package_is_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert pip_install("optuna") == "pip install -e '.[optuna]'"
    monkeypatch.setattr(app, "IN_CHECKOUT", False)
    assert pip_install("optuna") == "pip install 'effective-training[optuna]'"


def test_no_text_installs_another_package_of_the_name_app() -> None:
    texts = [ROOT / "README.md", *ROOT.glob("src/**/*.py"), *ROOT.glob("conf/**/*.py"),
             *ROOT.glob("multirun_examples/*"), *ROOT.glob("docker/*")]  # fmt: skip
    assert [path for path in texts if path.is_file() and "app[" in path.read_text()] == []


@pytest.mark.slow
def test_the_wheel_holds_the_program_and_its_configuration(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = [*(ROOT / "conf").rglob("*.yaml"), *(ROOT / "multirun_examples").glob("*.yaml")]
    conf = {f"app/{path.relative_to(ROOT)}" for path in shipped}
    source = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src").rglob("*.py")}
    project = {f"app/project/{name}" for name in new.files()}
    assert conf | source | project <= names
    assert {"app/data/mnist1d.npz", "effective_training.pth"} <= names


@pytest.mark.slow
def test_the_wheel_works_from_an_unrelated_folder(installed: Path, tmp_path: Path) -> None:
    assert str(installed.parents[1]) in run(
        installed, "-c", "import app; print(app.__file__)", cwd=tmp_path
    )
    train = (installed, "-m", "app.train", "trainer.max_epochs=1", "averaging=ema", "name=wheel")
    assert "finished" in run(*train, cwd=tmp_path)
    assert (tmp_path / "runs/wheel/result.json").exists()


@pytest.mark.slow
def test_a_project_that_the_wheel_makes_passes_its_own_tests(
    installed: Path, tmp_path: Path
) -> None:
    said = run(installed, "-m", "app.new", "shapes", cwd=tmp_path)
    *_, enter, train, make = said.splitlines()
    assert (enter, train) == ("cd shapes", f"{installed} -m app.train experiment=first")
    assert "1 passed" in run(*make.split(), cwd=tmp_path / "shapes")
    assert "finished" in run(*train.split(), "trainer.max_epochs=1", cwd=tmp_path / "shapes")


FILES: Mapping[str, tuple[str, ...]] = {
    "an empty package": ("app/__init__.py",),
    "a module": ("app.py",),
    "a web service": ("app/__init__.py", "app/main.py", "app/routers/__init__.py"),
    "a package and its entry point": ("app/__init__.py", "app/__main__.py", "manage.py"),
}


@pytest.mark.slow
@pytest.mark.parametrize("theirs", FILES)
def test_what_hides_the_package_is_named(theirs: str, installed: Path, tmp_path: Path) -> None:
    for name in FILES[theirs]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    path = tmp_path / FILES[theirs][0].removesuffix("/__init__.py")
    said = run(installed, "-u", "-m", "app.train", "--cfg", "job", cwd=tmp_path, exit_code=2)
    assert said == (
        f"{path} hides the package app, of which app.train is a module; rename it, or type "
        "python -P -m app.train\n"
    )
    assert "ok" in run(installed, "-P", "-m", "app.check", cwd=tmp_path)
    assert "ok" in run(installed, "-m", "app.check", cwd=tmp_path, PYTHONSAFEPATH="1")


@pytest.mark.slow
def test_a_module_of_the_users_is_theirs(installed: Path, tmp_path: Path) -> None:
    for name in ("__init__", "train"):
        path = tmp_path / f"app/{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"print('their {name}')")
    assert run(installed, "-m", "app.train", cwd=tmp_path) == "their __init__\ntheir train\n"


@pytest.mark.slow
def test_a_folder_that_is_no_package_hides_nothing_and_is_named_where_it_is_meant(
    installed: Path, tmp_path: Path
) -> None:
    (tmp_path / "app").mkdir()
    (tmp_path / "app/model.py").write_text("")
    assert "ok" in run(installed, "-m", "app.check", cwd=tmp_path)
    typed = ("model=custom", "model._target_=app.model.Lit")
    said = run(installed, "-m", "app.check", *typed, cwd=tmp_path, exit_code=2)
    assert said == (
        "check: model._target_ must be package.module.Class, got app.model.Lit: "
        "AttributeError: module 'app' has no attribute 'model'; "
        f"{tmp_path}/app is hidden by this package, app too: rename it\n"
    )
