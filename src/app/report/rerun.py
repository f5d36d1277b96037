"""The command that runs a run again, or goes on with it, in the folder that it has."""

import shlex
from pathlib import Path

from app.report.reading import StoredRun
from app.sweep.folder import of_one_run, quoted

OF_THE_FOLDER = ("run_dir", "hydra.run.dir")
"""Typed keys that would train elsewhere."""


def command(run: StoredRun) -> str | None:
    """To be typed in the folder that the report was made in; None where no override is known.

    A run goes on from its last checkpoint. `runs/NAME` is named by `name=`, any other folder by
    Hydra's `hydra.run.dir`, from which `run_dir` comes.
    """
    if run.typed is None or (run.config is None and run.job is None):
        return None
    typed = {item.partition("=")[0].lstrip("+~"): item for item in of_one_run(run.typed)}
    # app.tune is app.train with the tuner chosen, which its overrides do not say
    is_tune = run.has_tuner and not {"tuner", "experiment"} & typed.keys()
    for key in OF_THE_FOLDER:
        typed.pop(key, None)
    if run.folder.absolute().parent == Path("runs").absolute():
        typed.pop("name", None)
        where = f"name={quoted(run.folder.name)}"
    else:
        where = f"hydra.run.dir={quoted(str(run.folder))}"
    module = "app.tune" if is_tune else "app.train"
    return shlex.join(["python", "-m", module, *run.flags, *typed.values(), where])
