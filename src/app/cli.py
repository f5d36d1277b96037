"""The command line of every entry point: Hydra's, with messages that say what to type instead."""

import argparse
import ast
import atexit
import difflib
import errno
import fnmatch
import gc
import hashlib
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra import errors as of_hydra
from omegaconf import DictConfig, OmegaConf
from omegaconf import errors as of_omegaconf
from yaml import MarkedYAMLError

from app import DISTRIBUTION
from app.errors import JobsFailed, RankFailed, Refused, Unreadable
from app.process.tracebacks import shorten

REFUSALS = (of_hydra.HydraException, of_omegaconf.OmegaConfBaseException, Refused)


NAN = re.compile(r"(?<=[=,])nan(?=,|$)")
"""A preset of `debug`, which Hydra takes for a number."""

VERSION_BASE = "1.3"
"""Of Hydra's behaviour."""


def main(
    task: Callable[[DictConfig], Any],
    config_name: str,
    description: str,
    completed: Callable[[DictConfig], DictConfig] | None = None,
) -> None:
    """Run `task` on the composed configuration; exit with 2 where what was typed is refused.

    Args:
        completed: adds to a configuration that `--cfg job` shows what classes of the user's say.
    """
    make_streams_safe()
    words = [NAN.sub('"nan"', w) if w[:6] == "debug=" else w for w in sys.argv[1:]]
    arguments = sys.argv[1:] = over_ones_own(together(words))
    if arguments in [["-sc", f"install={shell}"] for shell in SHELLS]:
        name = f"completion.{arguments[1].partition('=')[2]}"
        print(Path(__file__).with_name(name).read_text(), end="")
        return
    if config_name in ("train", "tune"):
        sys.argv[1:] = named_after_job(arguments)
    if completed is not None and shows_classes(arguments):
        task = partial(show, completed, resolves="--resolve" in arguments)
        arguments = [word for word in arguments if word not in ("--cfg", "-c", "job", "--resolve")]
        sys.argv[1:] = [*arguments, "hydra.run.dir=."]
    if {"--info", "-i"} & {*arguments}:
        import_module("app.conf")  # where Hydra asks for schemas before it opens what has them
    if "--resolve" in arguments:
        sys.argv[1:] = together([*shown_without_a_run(config_name), *sys.argv[1:]])
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # hand us the exception, not a printed text
    is_sweep = bool({"-m", "--multirun"} & {*arguments}) and not ({*SHOWS} & {*arguments})
    guarded = TaskOfCommand(task)
    told: list[str] = []
    exit_code = 0
    gc.disable()  # composing makes many objects and no garbage
    try:
        if "--help" in arguments or "-h" in arguments:
            print(help_text(config_name, description))
            return
        refuse_environment(os.environ)
        if {"--resolve", "hydra"} <= {*arguments}:
            raise Refused("--cfg hydra cannot be resolved by itself; type --cfg all --resolve")
        if config_name == "check" and is_sweep:
            sys.argv[1:] = as_a_check(arguments)
        hydra.main("pkg://app.conf", config_name, VERSION_BASE)(guarded)()
        if is_sweep and not guarded.has_begun:
            raise Refused(NO_JOB)
    except JobsFailed as error:
        guarded.failed.append(error)
    except KeyboardInterrupt:
        told, exit_code = ["interrupted"], 128 + signal.SIGINT
    except BrokenPipeError:
        guarded.is_unread = True
    except Exception as error:
        if guarded.has_begun and not is_told_in_a_line(error):
            shorten(error)
            raise
        guarded.refused.append(error)
    finally:
        gc.freeze()  # or the interpreter, at its end, looks through all that was composed
    if guarded.is_unread:
        told, exit_code = ["what read the output is gone"], 128 + signal.SIGPIPE
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or it is flushed, at exit
    told += [*map(explain, guarded.refused), *map(str, guarded.failed)]
    for line in told:
        print(f"{config_name}: {line}", file=sys.stderr)
    exit_code = exit_code or (1 if guarded.failed else 2 if guarded.refused else 0)
    if guarded.has_begun and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from app.process.ending import leave

        leave(exit_code)  # torch's threads can abort a rank that ends in the usual way
    if exit_code:
        sys.exit(exit_code)


def shows_classes(arguments: Sequence[str]) -> bool:
    """Whether a run's configuration is to be shown in which a class of the user's is named."""
    others = {"-p", "--package", "-m", "--multirun"}
    is_shown = {"--cfg", "-c"} & {*arguments} and "job" in arguments and not others & {*arguments}
    return bool(is_shown) and any("_target_=" in word for word in arguments)


def show(completed: Callable[[DictConfig], DictConfig], cfg: DictConfig, *, resolves: bool) -> None:
    """Print a configuration as Hydra does."""
    print(OmegaConf.to_yaml(completed(cfg), resolve=resolves), end="")


SHOWS = ("--cfg", "-c", "--info", "-i", "--shell-completion", "-sc", "--hydra-help", "--version")
"""Flags with which Hydra shows something, and calls nothing."""


SHELLS = ("bash", "zsh", "fish")
"""For which TAB completes."""


NO_JOB = "the sweep has no job: what is swept has no value; type others, or leave -m out"


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


class Parser(argparse.ArgumentParser):
    """A command line without Hydra, that is refused in a line too."""

    def error(self, message: str) -> NoReturn:
        """Raise Refused."""
        raise Refused(f"{message}; type {self.prog} --help")


def make_streams_safe() -> None:
    """Let printing never fail: where a stream is closed, or its encoding lacks a character."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # or the first file that is opened would get what is printed
            os.open(os.devnull, os.O_RDWR)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


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
    flags, overrides = [], []
    for before, word in zip(["", *arguments], arguments, strict=False):
        is_override = ("=" in word or word[:1] == "~") and word[0] != "-"
        is_override = is_override and before not in WITH_A_VALUE
        (overrides if is_override else flags).append(word)
    return [*flags, *overrides]


def over_ones_own(arguments: list[str]) -> list[str]:
    """What was typed, `experiment=glob(*)` as a list of the experiments in a `--config-dir`, also
    in folders of it, where it has such: those that are shipped are not what is meant."""
    folders = [word for flag, word in pairwise(arguments) if flag in ("--config-dir", "-cd")]
    folders += [word[13:] for word in arguments if word.startswith("--config-dir=")]
    roots = [Path(folder) / "experiment" for folder in folders]
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


NOT_OURS = (
    "what is composed has not the keys of a run: its file must begin with defaults: [train, "
    "_self_], and have another name than train.yaml; type --config-name NAME"
)
"""Where a file of the user's hides ours, or stands alone."""


class TaskOfCommand:
    """What Hydra calls with the configuration, once a job: keeps refusals and failures for the end.

    Attributes:
        task: what does the work, to be called in another process.
        has_begun: whether it was called: what is raised before is of what was typed.
        is_unread: whether what reads the output has left, as `| head` does.
    """

    def __init__(self, task: Callable[[DictConfig], Any]) -> None:
        self.task = task
        self.has_begun = False
        self.is_unread = False
        self.refused: list[Exception] = []
        self.failed: list[Exception] = []

    def __call__(self, cfg: DictConfig) -> Any:
        self.has_begun = True
        gc.enable()
        try:
            if OmegaConf.get_type(cfg) is dict:
                raise Refused(NOT_OURS)
            return self.task(cfg)
        except RankFailed as failure:
            self.failed.append(failure)  # its traceback is that of the rank: ours would hide it
        except BrokenPipeError:
            self.is_unread = True
        except Exception as error:
            if not is_told_in_a_line(error):
                raise
            self.refused.append(error)  # raised from here, Hydra would print a traceback's head


OF_THE_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE,
                  errno.EFBIG)  # fmt: skip
"""Errors that are nobody's mistake in code: no space, a read-only disk, too few descriptors."""


def is_told_in_a_line(error: BaseException) -> bool:
    """Whether an error is of what was typed or of the machine, and a traceback would not help."""
    if isinstance(error, of_hydra.InstantiationException):  # or a class of the user's raised it
        return error.__cause__ is not None and is_told_in_a_line(error.__cause__)
    if isinstance(error, OSError):
        return error.errno in OF_THE_MACHINE
    return isinstance(error, REFUSALS) or _is_refused_by_lightning(error)


def _is_refused_by_lightning(error: BaseException) -> bool:
    """Whether Lightning itself says in words what it does not take."""
    last = traceback.extract_tb(error.__traceback__)[-1:] if isinstance(error, Exception) else ()
    return any("/lightning/" in f.filename and (f.line or "").startswith("raise ") for f in last)


def explain(error: BaseException, typed: Sequence[str] | None = None) -> str:
    """The text of an error of composing or checking, in terms of what was typed, in one line.

    Args:
        typed: by a program that calls; None: what is on the command line.
    """
    words = sys.argv[1:] if typed is None else typed
    if isinstance(error, Refused):
        return str(error)  # which may list keys, a line each
    said = []
    cause: BaseException | None = error
    while cause is not None:
        text = _explained(cause, words)
        if text is not None:
            return " ".join(text.split())
        said.append(" ".join(str(cause).split()))
        cause = cause.__cause__
    texts = list(dict.fromkeys(filter(None, said)))
    return ": ".join(texts[:1] + texts[1:][-1:]) or type(error).__name__


def _explained(error: BaseException, words: Sequence[str]) -> str | None:
    """What is known of an error by its kind; None where its own words are all there is."""
    if isinstance(error, Refused):
        return str(error)
    if isinstance(error, of_hydra.InstantiationException) and error.__cause__ is not None:
        return explain(error.__cause__, words)
    if isinstance(error, of_omegaconf.ConfigKeyError | of_omegaconf.ConfigAttributeError):
        return _unknown_key(error)
    if isinstance(error, of_omegaconf.InterpolationResolutionError):
        if IN_RESOLVER in str(error):  # of which OmegaConf keeps the text only
            return str(error).partition(IN_RESOLVER)[2].splitlines()[0]
        return f"{error.full_key}: {_lower_first(error)}; type {error.full_key}=VALUE"
    if isinstance(error, of_omegaconf.MissingMandatoryValue):
        return f"{error.full_key} is required; type {error.full_key}=VALUE"
    if isinstance(error, of_omegaconf.ValidationError):
        return f"{error.full_key}: {_lower_first(error)}"
    if isinstance(error, of_hydra.MissingConfigException) and error.missing_cfg_file:
        return _unknown_preset(error)
    if isinstance(error, of_hydra.ConfigCompositionException) and error.__cause__ is None:
        of_file = error.__context__ and _explained(error.__context__)  # Hydra keeps its text only
        return f"{str(error).partition(':')[0]}: {of_file}" if of_file else None
    if isinstance(error, of_hydra.OverrideParseException):
        return (
            f"{error.override} cannot be read: {_lower_first(error)}; put what Hydra's grammar "
            "would read into quotes: 'key=\"value\"'"
        )
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{mark.name}:{mark.line + 1}: {error.problem}; this file is no YAML: mend it"
    if isinstance(error, UnicodeDecodeError):
        return f"{_undecodable(words)} is no text of UTF-8: {error.reason}; mend it"
    if str(error).startswith(NO_PRESET):
        return _no_preset(words)
    if str(error).startswith(OFF):
        deep = [word for word in words if word.partition("=")[0].count(".") > 1]
        return (
            f"{' or '.join(deep) or 'a key'} has no effect: what it belongs to is null; choose a "
            "preset that has it as well"
        )
    if isinstance(error, RecursionError):
        return "a preset includes itself, or two include each other; look at their defaults:"
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename is not None else ""
        words = (error.strerror or str(error)).lower()
        return f"{place}{words}; when that is mended, the same command goes on with its run"
    return None


IN_RESOLVER = "Refused raised while resolving interpolation: "

NO_PRESET = "Config group override must be a string"
"""How Hydra begins to say that a group was given something else, and does not say which."""


OFF = "Unexpected type for root: NoneType"
"""What OmegaConf says of a key of something that is null."""


def _no_preset(words: Sequence[str]) -> str:
    for word in words:
        group, _, value = word.partition("=")
        presets = groups().get(group, ([], ""))[0]
        if presets and value not in presets:
            off = f"; to switch it off type {group}=none" if "none" in presets else ""
            return f"{word} is not a preset; choose one of {', '.join(presets)}{off}"
    return f"{NO_PRESET}, which the name of a preset is"


def _undecodable(words: Sequence[str]) -> str:
    """The file of a `--config-dir` that is meant where Hydra does not say which."""
    folders = [Path(word) for word in words if Path(word).is_dir()]
    for path in (path for folder in folders for path in sorted(folder.rglob("*.yaml"))):
        try:
            path.read_bytes().decode()
        except UnicodeDecodeError:
            return str(path)
        except OSError:  # no file: not the one that was read
            continue
    return "a preset"


def _lower_first(error: BaseException) -> str:
    line = str(error).splitlines()[0]
    return line[0].lower() + line[1:]


def _unknown_key(error: of_omegaconf.OmegaConfBaseException) -> str:
    key, parent = str(error.full_key), error.parent_node
    prefix = key.rpartition(".")[0]
    known = [str(item) for item in parent or ()] if isinstance(parent, DictConfig) else []
    if told := replaced(key, OmegaConf.get_type(parent) if parent is not None else None):
        return told
    if not known and prefix in groups():
        return no_effect(key, prefix)
    return unknown_key(key, known)


def replaced(key: str, schema: Any) -> str | None:
    """What to say of a key that something else here replaces, as its schema says."""
    instead = getattr(schema, "_instead_", {}).get(key.rpartition(".")[2])
    return instead and f"{key} is replaced here by something else; {instead}"


def unknown_key(key: str, known: Sequence[str]) -> str:
    """What to say of a key that is none, where these are known beside it."""
    prefix, _, name = key.rpartition(".")
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    names = [f"{prefix}.{item}" if prefix else item for item in nearest or sorted(known)]
    known_here = f"known are {', '.join(names) or 'none here'}"
    return f"{key} is not a key; {f'did you mean {names[0]}?' if nearest else known_here}"


def no_effect(key: str, group: str) -> str:
    """What to say of a key of a group that is off."""
    presets = [preset for preset in groups()[group][0] if preset != "none"]
    return f"{key} has no effect: {group} is off; choose {group}={'|'.join(presets)} as well"


def _unknown_preset(error: of_hydra.MissingConfigException) -> str:
    group, _, preset = str(error.missing_cfg_file).rpartition("/")
    presets = sorted(error.options or [])
    if not group or not presets:
        return str(error).splitlines()[0]
    nearest = difflib.get_close_matches(preset, presets, n=1)
    hint = f"; did you mean {group}={nearest[0]}?" if nearest else ""
    return f"{group}={preset} is not a preset; choose one of {', '.join(presets)}{hint}"


def help_text(config_name: str, description: str) -> str:
    """What the command does, its groups with their presets, and where to look further."""
    command = f"python -m app.{config_name}"
    lines = [description or "", "", f"usage: {command} [group=preset ...] [key=value ...]"]
    if config_name in ("train", "tune", "check"):
        lines += ["", "groups (group=preset; what it is):"]
        for group, (presets, summary) in groups(project_conf()).items():
            lines += [f"  {group}={'|'.join(presets)}", f"      {summary}"]
    lines += [
        "",
        f"{command} --cfg job           shows every key with its value",
        f"{command} --hydra-help        Hydra's own flags; -m sweeps, --config-dir adds presets",
        f'eval "$({command} -sc install=bash)"   completes on TAB; in zsh install=zsh,',
        f"{command} -sc install=fish | source in fish",
    ]
    return "\n".join(lines)


def shipped_targets() -> set[str]:
    """The classes that presets and schemas name: their settings are known without an import."""
    files = (path for kind in ("yaml", "py") for path in conf_folder().glob(f"*/*.{kind}"))
    text = "".join(path.read_text() for path in files)
    return set(re.findall(r"_target_:(?: str =)? \"?([\w.]+)", text))


def conf_folder() -> Path:
    """Where the presets are."""
    spec = find_spec("app.conf")
    assert spec is not None
    return Path(str(spec.origin)).parent


def project_files() -> Path:
    """The folder of what `python -m app.new` makes."""
    return conf_folder().with_name("project")


def project_conf() -> Path | None:
    """The presets of the project in the working directory, that its pyproject.toml names.

    Raises Refused where what it names is no folder, or the file cannot be read.
    """
    path = Path("pyproject.toml")
    if not path.is_file():
        return None
    import tomllib

    try:
        tools = tomllib.loads(path.read_text()).get("tool", {})
        name = tools.get(DISTRIBUTION, {}).get("conf")
    except (OSError, ValueError, AttributeError) as error:
        raise Unreadable(path.absolute(), error) from None
    if name is not None and not (isinstance(name, str) and Path(name).is_dir()):
        raise Refused(
            f"[tool.{DISTRIBUTION}] conf must be a folder beside {path.absolute()}, got {name!r}; "
            'write conf = "conf"'
        )
    return None if name is None else Path(name).absolute()


def groups(theirs: Path | None = None) -> dict[str, tuple[list[str], str]]:
    """Each group of the configuration: its presets, and the first sentence of its method card.

    With the presets of a folder of the user's beside ours, where one is given.
    """
    found = {}
    for folder in sorted(conf_folder().iterdir()):
        places = [folder] if theirs is None else [folder, theirs / folder.name]
        presets = sorted({path.stem for place in places for path in place.glob("*.yaml")})
        if presets:
            card = folder / "schema.py"
            text = ast.get_docstring(ast.parse(card.read_text())) if card.exists() else None
            found[folder.name] = presets, (text or "Whole runs, kept as files.").splitlines()[0]
    return found
