"""The command line of every entry point: Hydra's, with messages that say what to type instead."""

import argparse
import gc
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import hydra
from omegaconf import DictConfig, OmegaConf

from app.cli.explained import explain, is_told_in_a_line
from app.cli.presets import help_text
from app.cli.typed import (
    NAN,
    SHOWS,
    as_a_check,
    named_after_job,
    over_ones_own,
    refuse_environment,
    shown_without_a_run,
    shows_classes,
    together,
    with_parent,
)
from app.errors import JobsFailed, RankFailed, Refused
from app.process.tracebacks import shorten

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
        if config_name != "evaluate":
            sys.argv[1:] = with_parent(sys.argv[1:])
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


def show(completed: Callable[[DictConfig], DictConfig], cfg: DictConfig, *, resolves: bool) -> None:
    """Print a configuration as Hydra does."""
    print(OmegaConf.to_yaml(completed(cfg), resolve=resolves), end="")


SHELLS = ("bash", "zsh", "fish")
"""For which TAB completes."""


NO_JOB = "the sweep has no job: what is swept has no value; type others, or leave -m out"


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
