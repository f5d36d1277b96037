"""The command line of every entry point: Hydra's, with messages that say what to type instead."""

import ast
import difflib
import gc
import hashlib
import os
import signal
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    InstantiationException,
    MissingConfigException,
)
from omegaconf import DictConfig
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)

from app.errors import JobsFailed, RankFailed, Refused

REFUSALS = (HydraException, OmegaConfBaseException, Refused)


VERSION_BASE = "1.3"
"""Of Hydra's behaviour."""

COMPLETION = """\
# Hydra's own function completes scripts, not `python -m app.train`.
_app_complete() {
    local words=($COMP_LINE) word=${COMP_WORDS[COMP_CWORD]}
    [[ ${words[1]} == -m && ${words[2]} == app.* ]] || return
    local line="${words[2]}${COMP_LINE#*"${words[2]}"}"
    local choices=$(COMP_LINE="$line" "${words[0]}" -m "${words[2]}" -sc query=bash 2>/dev/null)
    COMPREPLY=($(compgen -o nospace -o default -W "$choices" -- "$word"))
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -o nospace -o default -F _app_complete python python3"""


def main(task: Callable[[DictConfig], Any], config_name: str, description: str) -> None:
    """Run `task` on the composed configuration; exit with 2 where what was typed is refused."""
    arguments = sys.argv[1:]
    if "--help" in arguments or "-h" in arguments:
        print(help_text(config_name, description))
        return
    if arguments[:1] == ["-sc"] and arguments[1:] == ["install=bash"]:
        print(COMPLETION)
        return
    if config_name in ("train", "tune"):
        sys.argv[1:] = named_after_job(arguments)
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # hand us the exception, not a printed text
    guarded = TaskOfCommand(task)
    refused, failed = guarded.refused, guarded.failed
    gc.disable()  # composing makes many objects and no garbage
    try:
        hydra.main(
            version_base=VERSION_BASE, config_path="pkg://app.conf", config_name=config_name
        )(guarded)()
    except REFUSALS as error:
        if is_of_the_user(error):
            raise
        refused.append(error)
    except JobsFailed as error:
        failed.append(error)
    except KeyboardInterrupt:
        print(f"\n{config_name}: interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    finally:
        gc.freeze()  # or the interpreter, at its end, looks through all that was composed
    for refusal in refused:
        print(f"{config_name}: {explain(refusal)}", file=sys.stderr)
    for failure in failed:
        print(f"{config_name}: {failure}", file=sys.stderr)
    exit_code = 1 if failed else 2 if refused else 0
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from app.launch.local import leave

        leave(exit_code)  # torch's threads can abort a rank that ends in the usual way
    if exit_code:
        sys.exit(exit_code)


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
    first = next((i for i, word in enumerate(arguments) if "=" in word and word[0] != "-"), None)
    place = len(arguments) if first is None else first  # overrides stand together
    return [*arguments[:place], f"name=slurm-{job}-{digest}", *arguments[place:]]


class TaskOfCommand:
    """What Hydra calls with the configuration, once a job: keeps refusals and failures for the end.

    Attributes:
        task: what does the work, to be called in another process.
    """

    def __init__(self, task: Callable[[DictConfig], Any]) -> None:
        self.task = task
        self.refused: list[Exception] = []
        self.failed: list[Exception] = []

    def __call__(self, cfg: DictConfig) -> Any:
        gc.enable()
        try:
            return self.task(cfg)
        except REFUSALS as error:
            if is_of_the_user(error):
                raise
            self.refused.append(error)  # raised from here, Hydra would print a traceback's head
        except RankFailed as failure:
            self.failed.append(failure)  # its traceback is that of the rank: ours would hide it


def is_of_the_user(error: BaseException) -> bool:
    """Whether a class of the user's raised it while it was built: the traceback says where."""
    return isinstance(error, InstantiationException) and not _is_not_found(error)


def _is_not_found(error: BaseException) -> bool:
    return str(error).startswith("Error locating target")


def explain(error: BaseException) -> str:
    """The text of an error of composing or checking, in terms of what was typed."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ConfigKeyError | ConfigAttributeError):
            return _unknown_key(cause)
        if isinstance(cause, InterpolationResolutionError):
            return f"{cause.full_key}: {_lower_first(cause)}; type {cause.full_key}=VALUE"
        if isinstance(cause, MissingMandatoryValue):
            return f"{cause.full_key} is required; type {cause.full_key}=VALUE"
        if isinstance(cause, ValidationError):
            return f"{cause.full_key}: {_lower_first(cause)}"
        if isinstance(cause, MissingConfigException) and cause.missing_cfg_file:
            return _unknown_preset(cause)
        if isinstance(cause, InstantiationException):
            return f"{cause.__cause__ or cause}; type the target as package.module.Class"
        cause = cause.__cause__ if isinstance(cause, ConfigCompositionException) else None
    return str(error)


def _lower_first(error: BaseException) -> str:
    line = str(error).splitlines()[0]
    return line[0].lower() + line[1:]


def _unknown_key(error: OmegaConfBaseException) -> str:
    key = str(error.full_key)
    parent = error.parent_node
    prefix, _, name = key.rpartition(".")
    known = [str(item) for item in parent or ()] if isinstance(parent, DictConfig) else []
    if not known and prefix in groups():
        return no_effect(key, prefix)
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    names = [f"{prefix}.{item}" if prefix else item for item in nearest or sorted(known)]
    if nearest:
        return f"{key} is not a key; did you mean {names[0]}?"
    return f"{key} is not a key; known are {', '.join(names) or 'none here'}"


def no_effect(key: str, group: str) -> str:
    """What to say of a key of a group that is off."""
    presets = [preset for preset in groups()[group][0] if preset != "none"]
    return f"{key} has no effect: {group} is off; choose {group}={'|'.join(presets)} as well"


def _unknown_preset(error: MissingConfigException) -> str:
    group, _, preset = str(error.missing_cfg_file).rpartition("/")
    presets = sorted(error.options or [])
    if not group or not presets:
        return str(error)
    nearest = difflib.get_close_matches(preset, presets, n=1)
    hint = f"; did you mean {group}={nearest[0]}?" if nearest else ""
    return f"{group}={preset} is not a preset; choose one of {', '.join(presets)}{hint}"


def help_text(config_name: str, description: str) -> str:
    """What the command does, its groups with their presets, and where to look further."""
    command = f"python -m app.{config_name}"
    lines = [description, "", f"usage: {command} [group=preset ...] [key=value ...]"]
    if config_name in ("train", "tune", "check"):
        lines += ["", "groups (group=preset; what it is):"]
        for group, (presets, summary) in groups().items():
            lines += [f"  {group}={'|'.join(presets)}", f"      {summary}"]
    lines += [
        "",
        f"{command} --cfg job           shows every key with its value",
        f"{command} --hydra-help        Hydra's own flags; -m sweeps, --config-dir adds presets",
        f'eval "$({command} -sc install=bash)"   completes keys and presets on TAB',
    ]
    return "\n".join(lines)


def groups() -> dict[str, tuple[list[str], str]]:
    """Each group of the configuration: its presets and the first sentence of its method card."""
    spec = find_spec("app.conf")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    found = {}
    for folder in sorted(Path(spec.submodule_search_locations[0]).iterdir()):
        presets = sorted(path.stem for path in folder.glob("*.yaml"))
        if presets:
            card = folder / "schema.py"
            text = ast.get_docstring(ast.parse(card.read_text())) if card.exists() else None
            found[folder.name] = presets, (text or "Whole runs, kept as files.").splitlines()[0]
    return found
