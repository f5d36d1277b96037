"""What a command imports before it is asked for more: a new import shows in these listings."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SLOW = {
    "asyncio", "bitsandbytes", "concurrent", "deepspeed", "http", "lightning", "matplotlib",
    "multiprocessing", "numpy", "optuna", "pandas", "rich", "scipy", "sklearn", "sqlalchemy",
    "submitit", "sympy", "tensorboard", "torch", "torchmetrics", "torchvision", "transformers",
    "unittest",
}  # fmt: skip
"""Of others, what takes long to import."""

OF_LIGHTNING = {
    "asyncio", "concurrent", "http", "lightning", "matplotlib", "multiprocessing", "numpy", "rich",
    "scipy", "sympy", "torch", "torchmetrics", "torchvision", "transformers", "unittest",
}  # fmt: skip
"""Of these, what torch and Lightning import where it is installed."""

SHOWN = """
app app.cli app.cli.explained app.cli.presets app.cli.typed app.conf app.config app.errors
app.monitored app.multirun_examples app.parallel app.parallel.sizes app.process
app.process.tracebacks app.run
"""
"""Ours, of a command that only shows a configuration; without the schemas of its groups."""

MADE = """
app app.cli app.cli.explained app.cli.presets app.cli.typed app.errors app.process
app.process.tracebacks app.run
"""
"""Ours, of what makes a project."""

CHECKED = """
app.begin app.begin.branch app.begin.defaults app.begin.links app.begin.longer app.begin.source
app.fit app.launch app.launch.start app.process.asked app.process.files app.process.imports
app.process.ranks app.process.requeue app.process.targets app.record app.record.folder
app.record.kept app.record.states app.tuner app.tuner.answers app.tuner.keys
"""
"""Ours, of a command that checks one, beside those."""

TRAINED = """
app.accumulate app.averaging app.averaging.apart app.averaging.engine app.averaging.files
app.averaging.norms app.averaging.rules app.averaging.shadow app.averaging.validation
app.begin.relaid app.begin.weights app.blocks app.clip app.data app.data.in_memory app.data.mnist1d
app.logger app.logger.mlflow app.logger.tensorboard app.logger.tracker app.logger.tracking
app.logger.wandb app.models app.models.classifier app.models.cnn1d app.optim app.optim.due
app.optim.groups app.optim.layers app.optim.matches app.optim.matrices app.optim.muon
app.optim.on_shards app.optim.optimizers app.optim.schedules app.parallel.data_parallel
app.parallel.sharded app.parallel.split app.pictures app.pictures.curves app.pictures.look
app.precision app.process.intact app.process.random_state app.record.loggers app.record.metrics
app.record.names app.record.result app.record.top app.resume app.resume.exact app.resume.held
app.resume.hooks app.resume.modes app.resume.position app.resume.unfinished app.run.beside
app.run.build app.run.checkpoint app.run.measured app.run.progress app.run.raw app.run.trainer
app.screen app.screen.start app.stop app.stop.signals app.strategy
"""
"""Ours, of the default run, beside those."""


def imported(*command: str, cwd: Path) -> tuple[set[str], set[str]]:
    """What a command leaves imported: modules of ours, and packages of `SLOW`."""
    code = (
        "import atexit, runpy, sys\n"
        "atexit.register(lambda: print('\\nMODULES', *sys.modules))\n"
        "name, sys.argv = sys.argv[1], sys.argv[1:]\n"
        "runpy.run_module(name, run_name='__main__', alter_sys=True)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COMP_LINE": "app.train clip="},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("MODULES"))
    modules = line.split()[1:]
    ours = {name for name in modules if f"{name}.".startswith("app.") and "app.conf." not in name}
    return ours, {name.partition(".")[0] for name in modules} & SLOW


@pytest.mark.parametrize(
    ("command", "beside"),
    [("train --cfg job", ""), ("train -sc query=bash", ""), ("tune --cfg job", "app.train"),
     ("check --cfg job", CHECKED)],
)  # fmt: skip
def test_showing_a_configuration_imports_little(command: str, beside: str, tmp_path: Path) -> None:
    name, *typed = command.split()
    ours, others = imported(f"app.{name}", *typed, cwd=tmp_path)
    assert sorted(ours) == sorted((SHOWN + beside).split())
    assert others == set()


def test_checking_a_configuration_imports_no_torch(tmp_path: Path) -> None:
    ours, others = imported("app.check", "averaging=ema", "strategy=fsdp", cwd=tmp_path)
    assert sorted(ours) == sorted((SHOWN + CHECKED).split())
    assert others == set()


def test_a_project_is_made_without_a_configuration(tmp_path: Path) -> None:
    ours, others = imported("app.new", "shapes", cwd=tmp_path)
    assert sorted(ours) == sorted(MADE.split())
    assert others == set()


def test_a_run_imports_what_it_is_built_of(tmp_path: Path) -> None:
    small = ("trainer.max_epochs=1", "trainer.limit_train_batches=2", "trainer.accelerator=cpu")
    ours, others = imported("app.train", *small, "logger=csv", cwd=tmp_path)
    assert sorted(ours) == sorted((SHOWN + CHECKED + TRAINED).split())
    assert others <= OF_LIGHTNING
