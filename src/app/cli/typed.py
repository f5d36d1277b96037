"""What was typed, and the environment that it was typed in."""

import atexit
import fnmatch
import hashlib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from app.cli.presets import project_conf
from app.errors import Refused

NAN = re.compile(r"(?<=[=,])nan(?=,|$)")
"""A preset of `debug`, which Hydra takes for a number."""


def shows_classes(arguments: Sequence[str]) -> bool:
    """Whether a run's configuration is to be shown in which a class of the user's is named."""
    others = {"-p", "--package", "-m", "--multirun"}
    is_shown = {"--cfg", "-c"} & {*arguments} and "job" in arguments and not others & {*arguments}
    return bool(is_shown) and any("_target_=" in word for word in arguments)


SHOWS = ("--cfg", "-c", "--info", "-i", "--shell-completion", "-sc", "--hydra-help", "--version")
"""Flags with which Hydra shows something, and calls nothing."""


def as_a_check(arguments: list[str]) -> list[str]:
    """The words of a sweep whose jobs are looked at here, one after the other, and leave nothing.

    Raises Refused where they are chosen by what earlier ones come to.
    """
    if any(word.startswith("sweep=") and word != "sweep=none" for word in arguments):
        raise Refused("a search chooses its jobs as they end; type one of them, without -m")
    import shutil
    import tempfile

    folder = tempfile.mkdtemp(prefix="app-check-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return [*arguments, "hydra/launcher=basic", "hydra/sweeper=basic", f"hydra.sweep.dir={folder}"]


MOST_RANKS = 1_000_000


OF_A_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


LAUNCH = "start the ranks with torchrun, or type unset WORLD_SIZE RANK"


def refuse_environment(environment: Mapping[str, str]) -> None:
    """Raise Refused where the variables of torchrun are not as it sets them."""
    numbers = {}
    for name in OF_A_LAUNCHER:
        text = environment.get(name, "0")
        if not (text.isascii() and text.isdecimal()):
            raise Refused(
                f"the environment's {name} must be a whole number, as torchrun sets it, got "
                f"{text or 'nothing'}; type unset {name}"
            )
        numbers[name] = int(text)
        if numbers[name] > MOST_RANKS:
            raise Refused(f"the environment's {name} must be <= {MOST_RANKS}, got {text}")
    rank, ranks = numbers["RANK"], numbers["WORLD_SIZE"]
    if ranks <= 1 or "RANK" not in environment:
        return
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not environment.get(name):
            raise Refused(f"the environment says WORLD_SIZE={ranks}, and no {name}; {LAUNCH}")
    port = environment["MASTER_PORT"]
    if not (port.isascii() and port.isdecimal() and 0 < int(port) < 1 << 16):
        raise Refused(f"the environment's MASTER_PORT must be a port, got {port}; {LAUNCH}")
    if rank >= ranks:
        rule = f"must be below WORLD_SIZE={ranks}, got {rank}"
        raise Refused(f"the environment's RANK {rule}; {LAUNCH}")


WITH_A_VALUE = ("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn",
                "--config-dir", "-cd", "--info", "-i", "--experimental-rerun")  # fmt: skip
"""Hydra's flags that the next word belongs to."""


def together(arguments: list[str]) -> list[str]:
    """What was typed, flags first: Hydra takes overrides only where they stand together."""
    flags: list[str] = []
    overrides: list[str] = []
    for before, word in zip(["", *arguments], arguments, strict=False):
        is_override = ("=" in word or word[:1] == "~") and word[0] != "-"
        is_override = is_override and before not in WITH_A_VALUE
        (overrides if is_override else flags).append(word)
    return [*flags, *overrides]


def over_ones_own(arguments: list[str]) -> list[str]:
    """What was typed, `experiment=glob(*)` as a list of the experiments in a `--config-dir`, or of
    the project, also in folders of it, where it has such: those that are shipped are not meant."""
    if not any(word.startswith("experiment=glob(") for word in arguments):
        return arguments
    try:
        project = project_conf()
    except Refused:  # said when it is composed
        return arguments
    folders = [word for flag, word in pairwise(arguments) if flag in ("--config-dir", "-cd")]
    folders += [word[13:] for word in arguments if word.startswith("--config-dir=")]
    roots = [Path(folder) / "experiment" for folder in [*folders, project] if folder]
    names = [str(path.relative_to(r).with_suffix("")) for r in roots for path in r.rglob("*.yaml")]
    typed = []
    for word in arguments:
        pattern = re.fullmatch(r"experiment=glob\(([^(),\[\]]+)\)", word)
        found = fnmatch.filter(sorted(names), pattern[1]) if pattern else []
        typed.append(f"experiment={','.join(found)}" if found else word)
    return typed


def shown_without_a_run(config_name: str) -> list[str]:
    """What only a run would tell Hydra, for a configuration that is shown resolved."""
    of_ours = [] if config_name == "evaluate" else ["run_dir=${hydra:run.dir}"]
    return [*of_ours, "hydra.job.num=0", "hydra.job.id=0"]


OF_THE_COMMAND = ("name", "resume", "run_dir", "tuned", "fit", "launch", "objective", "direction",
                  "sweep", "extend")  # fmt: skip
"""Keys and groups that may differ between two commands of the same run."""

LENGTHS = ("trainer.max_epochs", "trainer.max_steps")


def with_parent(arguments: list[str]) -> list[str]:
    """What was typed, over what was typed for the run that it branches from."""
    typed = {word.partition("=")[0].lstrip("+~"): word.partition("=")[2] for word in arguments}
    parent = typed.get("branch_of", "null")
    if parent in ("null", ""):
        return arguments
    for key in typed.keys() & {*LENGTHS}:
        raise Refused(
            f"{key} has no effect in a branch, which is branch_at and its decay long; type "
            "scheduler.decay=N"
        )
    from app.process.files import read_yaml_list  # here: no other command needs it so early

    words = read_yaml_list(Path(parent) / "overrides.yaml")
    if words is None:
        raise Refused(
            f"branch_of must be the folder of a run, got {parent}: there is none; type "
            "branch_of=runs/NAME"
        )
    theirs = []
    for word in words:
        key = word.partition("=")[0].lstrip("+~")
        if key not in {*typed, *LENGTHS} and key.partition(".")[0] not in OF_THE_COMMAND:
            theirs.append(word)
    tuned = Path(parent) / "tuned.yaml"
    if tuned.is_file() and "tuned" not in typed:
        theirs.append(f"tuned={tuned}")
    return together([*theirs, *arguments])


def named_after_job(arguments: list[str]) -> list[str]:
    """What was typed, with a name where a batch job of SLURM runs it and none was typed.

    A job that is requeued types the same again, and finds its run by the name: not by the time.
    """
    job = os.environ.get("SLURM_JOB_ID")
    typed = [word.partition("=")[0] for word in arguments]
    has_place = {"name", "hydra.run.dir", "-m", "--multirun", "--cfg", "-c"} & {*typed}
    if job is None or has_place or sys.stdin.isatty():
        return arguments
    digest = hashlib.sha256("\0".join(arguments).encode()).hexdigest()[:6]
    return [*arguments, f"name=slurm-{job}-{digest}"]
