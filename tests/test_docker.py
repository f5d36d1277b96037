"""The images and the cluster of docker/: linted anywhere, built and run where an engine answers."""

import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
TOOLS = Path(sysconfig.get_path("scripts"))
NO_ENGINE = 77
USER = "10001"

pytestmark = pytest.mark.docker


def stages() -> dict[str, tuple[str, list[str]]]:
    """By its name: what a stage is from, and its instructions, each on one line."""
    text = (DOCKER / "Dockerfile").read_text()
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", "")
    found: dict[str, tuple[str, list[str]]] = {}
    for line in filter(None, text.splitlines()):
        if stage := re.fullmatch(r"FROM (\S+) AS (\S+)", line):
            instructions: list[str] = []
            found[stage[2]] = (stage[1].replace("${DEVICE}", "cpu"), instructions)
        elif found:
            instructions.append(line)
    return found


def layers(name: str) -> list[str]:
    """All instructions that an image is made by."""
    above, instructions = stages()[name]
    return [*(layers(above) if above in stages() else []), *instructions]


def services() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    return found["services"]


def words_run(*typed: str, tmp_path: Path) -> str:
    """What the image's entry point hands to tini."""
    tini = tmp_path / "tini"
    tini.write_text('#!/bin/sh\necho "$@"\n')
    tini.chmod(0o755)
    env = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    entry = ["sh", str(DOCKER / "entry.sh"), *typed]
    return subprocess.run(entry, env=env, check=True, capture_output=True, text=True).stdout


def test_hadolint_finds_nothing() -> None:
    done = subprocess.run(
        [TOOLS / "hadolint", DOCKER / "Dockerfile"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_the_compose_file_follows_the_specification() -> None:
    check = [TOOLS / "check-jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*check, DOCKER / "compose.yaml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_builder_is_that_of_the_engine() -> None:
    assert "# syntax=" not in (DOCKER / "Dockerfile").read_text()


def test_without_a_target_the_program_is_built() -> None:
    assert list(stages())[-1] == "app"


@pytest.mark.parametrize("image", ["app", "slurm"])
def test_an_image_runs_as_a_user_who_is_not_root(image: str) -> None:
    assert layers(image)[-1] == f"USER {USER}"
    assert f"--uid {USER} " in " ".join(layers(image))


@pytest.mark.parametrize("image", ["app", "slurm"])
def test_a_change_of_the_source_builds_no_earlier_layer_again(image: str) -> None:
    last = "COPY --from=program /opt/app /opt/app"
    reused = list(takewhile(lambda line: line != last, layers(image)))
    assert len(reused) == len(layers(image)) - 2
    for line in [*reused, *stages()["pins"][1]]:
        if line.startswith(("COPY ", "ADD ")):
            assert not {"src", "conf", "."} & set(line.split()[1:-1])


def test_torch_is_a_layer_that_only_its_own_pin_renews() -> None:
    *above, torch = stages()["torch-cpu"][1]
    assert [line for line in above if line.startswith("COPY")] == [
        "COPY --from=pins /pins/torch.txt /pins/"
    ]
    assert "--requirement /pins/torch.txt" in torch


def test_the_requirements_are_those_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def printed(extras: str) -> list[str]:
        command = [sys.executable, str(DOCKER / "requirements.py"), extras]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        return done.stdout.splitlines()

    assert printed("") == project["dependencies"]
    extras = project["optional-dependencies"]
    both = [*project["dependencies"], *extras["optuna"], *extras["bitsandbytes"]]
    assert printed("optuna,bitsandbytes") == both


@pytest.mark.parametrize(
    ("typed", "run"),
    [
        (["averaging=ema"], "python -m app.train averaging=ema"),
        (["-m", "seed=1,2"], "python -m app.train -m seed=1,2"),
        (["python", "-m", "app.report", "runs/mine"], "python -m app.report runs/mine"),
        (["sh", "-c", "id"], "sh -c id"),
    ],
)
def test_overrides_are_those_of_a_training_and_anything_else_is_a_command(
    typed: list[str], run: str, tmp_path: Path
) -> None:
    assert words_run(*typed, tmp_path=tmp_path) == f"-s -- {run}\n"


def test_the_services_of_the_cluster_have_no_rights_and_no_ports() -> None:
    for service in services().values():
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert not {"privileged", "cap_add", "ports", "network_mode", "user"} & set(service)


def test_the_nodes_are_those_of_slurm_conf() -> None:
    conf = (DOCKER / "slurm/slurm.conf").read_text()
    names = [name for name, service in services().items() if "slurmd" in service["command"]]
    assert names == ["node1", "node2"]
    assert "NodeName=node[1-2] " in conf
    assert "SlurmctldHost=controller\n" in conf
    assert all(service["hostname"] == name for name, service in services().items())


@pytest.mark.slow
def test_the_images_train_and_the_cluster_runs_a_job() -> None:
    """Not the image for a GPU: torch for CUDA would be gigabytes in every run of the tests."""
    done = subprocess.run(
        [DOCKER / "check.sh", "cpu", "slurm"], capture_output=True, text=True, timeout=3000
    )
    if done.returncode == NO_ENGINE:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
