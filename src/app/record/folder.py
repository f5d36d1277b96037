"""The folder of a run: what is in it, and whether a command may go on in it. Needs no torch.

config.yaml      every key as it was resolved; overrides.yaml: what was typed
metrics.csv      a line per logged optimizer step; tensorboard/ the same for TensorBoard
checkpoints/     best.ckpt, last.ckpt, previous.ckpt, and step=N.ckpt where such are kept
curves.png       the metrics over the optimizer steps
result.json      status, metrics, of which weights each is, batch sizes, checkpoints, seconds
"""

import errno
import fcntl
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from app.config import config_hash, movable, what_decides
from app.errors import Refused, Unreadable
from app.process.files import (
    is_locked,
    read_json,
    read_yaml,
    read_yaml_list,
    sync_folder,
    write_atomically,
    write_json,
)
from app.record.states import State

LOG = "job.log"
"""What a job printed that has no terminal."""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_number_by_name(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_number, value.values()))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_status(value: Any) -> bool:
    return any(value == state for state in State if not state.has_no_result)


def _is_slurm_job(value: Any) -> bool:
    return _is_text(value) and re.fullmatch(r"[0-9]+([_+][0-9]+)?", value) is not None


def _is_group(value: Any) -> bool:
    return value is None or isinstance(value, dict)


def _is_group_of_groups(value: Any) -> bool:
    return _is_group(value) and all(map(_is_group, (value or {}).values()))


CONFIG = {
    **dict.fromkeys(("model", "trainer"), lambda value: isinstance(value, dict)),
    "data": lambda value: value is None or isinstance(value, dict),
    **dict.fromkeys(("optimizer", "scheduler", "accumulate", "clip", "averaging", "sharing",
                     "strategy", "precision", "memory", "compile", "tuner", "launch",
                     "sweep"), _is_group),
    **dict.fromkeys(("callbacks", "logger"), _is_group_of_groups),
    "name": _is_text,
    "seed": _is_number,
}  # fmt: skip
"""What each key of a config.yaml must hold that has it."""

RESULT = {
    **dict.fromkeys(("name", "error", "where", "config_hash"), _is_text),
    **dict.fromkeys(("metrics", "last_metrics", "seconds"), _is_number_by_name),
    **dict.fromkeys(("optimizer_steps", "epochs", "rank", "submitted_at"), _is_number),
    **dict.fromkeys(("batch", "checkpoints", "metrics_of"), _is_group),
    "status": _is_status,
    "slurm_job": _is_slurm_job,
}
"""Likewise of a result.json."""

NEEDED = ("model", "seed", "callbacks", "tuner", "status")
"""Keys without which either is no run's, or only its beginning."""


def refuse_other_shape(
    path: Path, content: Mapping[str, Any], shape: Mapping[str, Callable[[Any], bool]]
) -> None:
    """Raise Unreadable where a key holds another kind of value than those that we write."""
    for key, holds in shape.items():
        if key not in content and key in NEEDED:
            raise Unreadable(path, f"it has no {key}, as those of runs have")
        if key in content and not holds(content[key]):
            raise Unreadable(path, f"{key} holds {content[key]!r:.60}")


_LOCKS: set[TextIO] = set()
"""Held by this process, and not by what it forks: where it is killed, they are free at once, though
a DataLoader's workers live on for some seconds."""


def _close_locks() -> None:
    for file in _LOCKS:
        file.close()


os.register_at_fork(after_in_child=_close_locks)


class RunFolder:
    """The folder of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_path = path / "config.yaml"
        self.result_path = path / "result.json"
        self.checkpoints = path / "checkpoints"
        self.lock_path = path.parent / f".{path.name}.lock"

    def within(self, path: str) -> str:
        """A path as files of the run hold it: relative to the folder where it is in it, so that it
        holds where the folder is moved. `folder.path / it` is the path again."""
        whole, top = Path(path).absolute(), self.path.absolute()
        return str(whole.relative_to(top) if whole.is_relative_to(top) else whole)

    def read_config(self) -> dict[str, Any] | None:
        """The configuration of the run that is in the folder; None where there is none.

        Raises Unreadable where it is torn, or no run's.
        """
        content = read_yaml(self.config_path)
        if content is None:
            return None
        refuse_other_shape(self.config_path, content, CONFIG)
        try:
            config = OmegaConf.create({**content, "run_dir": str(self.path)})
            found = OmegaConf.to_container(config, resolve=True)
        except OmegaConfBaseException as error:
            raise Unreadable(self.config_path, error) from None
        assert isinstance(found, dict)
        return {str(key): value for key, value in found.items()}

    def read_result(self) -> dict[str, Any] | None:
        """What the last command left; None where it left nothing.

        Raises Unreadable where it is torn, or no run's.
        """
        result = read_json(self.result_path)
        if result is not None:
            refuse_other_shape(self.result_path, result, RESULT)
            if State(result["status"]).is_done and "metrics" not in result:
                raise Unreadable(self.result_path, "it has no metrics, as those of ended runs have")
        return result

    def write_config(self, config: Mapping[str, Any], overrides: list[str]) -> None:
        """Keep the resolved configuration, which moves with the folder, and what was typed."""
        content = movable(config)
        del content["run_dir"]
        write_atomically(self.config_path, OmegaConf.to_yaml(OmegaConf.create(content)))
        write_atomically(self.path / "overrides.yaml", OmegaConf.to_yaml(overrides))

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Keep what the run came to."""
        write_json(self.result_path, result)

    def refuse_changes(self, config: Mapping[str, Any]) -> None:
        """Raise Refused, naming the keys, where the run in the folder has another configuration."""
        try:
            before = self.read_config()
        except Unreadable as torn:
            self._refuse_other_hash(config, torn)
            print(f"{torn}; it is made anew")
            return
        if before is None or self.has_not_begun():
            return
        old, new = what_decides(before), what_decides(config)
        changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
        if changed:
            lines = "\n".join(f"  {key}: {old.get(key)} -> {new.get(key)}" for key in changed)
            raise Refused(
                f"{self.path} holds a run with another configuration:\n{lines}\n"
                "give this run another name=, or type resume=never to move the old one aside"
            )

    def has_not_begun(self) -> bool:
        """Whether the run failed before its first step, and left nothing to go on with."""
        status = (self.read_result() or {}).get("status")
        left = ("metrics.csv", "tuned.yaml", "checkpoints/*")
        return status == State.failed and not any(next(self.path.glob(one), None) for one in left)

    def _refuse_other_hash(self, config: Mapping[str, Any], torn: Unreadable) -> None:
        said = (self.read_result() or {}).get("config_hash")
        if said is not None and said != config_hash(config):
            raise Refused(
                f"{torn}, and {self.result_path.name} is of another configuration; give this run "
                "another name=, or type resume=never to move the old one aside"
            )

    def refuse_shared(self) -> None:
        """Raise Refused where the folder would hold more than a run: the one that commands are
        typed in, or one above it."""
        typed_in = HydraConfig.get().runtime.cwd if HydraConfig.initialized() else os.getcwd()
        if Path(typed_in).resolve().is_relative_to(self.path.absolute().resolve()):
            raise Refused(
                f"hydra.run.dir must be a folder of its own, got {self.path}; leave it out, or "
                "type hydra.run.dir=runs/mine"
            )

    def forget_torn(self) -> None:
        """Take away what is torn of what a command makes anew; say so."""
        for read in (
            self.read_result,
            lambda: read_yaml(self.path / "tuned.yaml"),
            lambda: read_yaml_list(self.path / "overrides.yaml"),
        ):
            try:
                read()
            except Unreadable as torn:
                if not torn.path.is_file():
                    raise
                torn.path.unlink()
                print(f"{torn}; it is made anew")

    def remove_if_empty(self) -> None:
        """Take away the folder that Hydra made for a command that was then refused.

        Each rank that srun or torchrun started does: another one may have been faster.
        """
        try:
            self.path.rmdir()
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.ENOENT):
                raise

    def move_aside(self) -> None:
        """Rename a run that is in the folder, so that nothing of it is lost.

        Raises Refused where what is in the folder is no run, or holds others.
        """
        if not self.config_path.exists():
            return
        if any(self.path.glob("*/config.yaml")) or not self._holds_run():
            raise Refused(
                f"{self.path} holds more than a run, or none, and resume=never moves a run only; "
                "give this run another name="
            )
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.{number}")).exists():
            number += 1
        self.path.rename(aside)
        self.path.mkdir()
        print(f"the run that was in {self.path} is now in {aside}")

    def _holds_run(self) -> bool:
        """Whether one of the files says so that nobody else writes like this."""
        try:
            config = self.read_config() or {}
        except Unreadable:
            config = {}
        try:
            result = self.read_result() or {}
        except Unreadable:
            result = {}
        return {"model", "data", "trainer", "seed"} <= config.keys() or "config_hash" in result

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process; raise Refused where another one holds it."""
        self.path.mkdir(parents=True, exist_ok=True)
        sync_folder(self.path.parent)
        with self._lock() as file:
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            _LOCKS.add(file)
            try:
                yield
            finally:
                _LOCKS.remove(file)
                if self.result_path.exists():  # else the lock tells of a run that has begun
                    self.lock_path.unlink(missing_ok=True)

    def _lock(self) -> TextIO:
        """The lock, held: of the file that is there, not of one that its holder took away."""
        while True:
            try:
                file = self.lock_path.open("a+")
            except IsADirectoryError as error:
                raise Unreadable(self.lock_path, error.strerror) from None
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip()
                file.close()
                raise Refused(
                    f"{self.path} is being trained by process {holder}; wait for it, or give this "
                    "run another name="
                ) from None
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(self.lock_path)):
                    return file
            file.close()

    def is_held(self) -> bool:
        """Whether a process holds the folder now: trains in it."""
        return is_locked(self.lock_path)


def result_in(folder: Path) -> dict[str, Any]:
    """The content of a run's result.json, empty where there is none; why where it is unreadable."""
    try:
        return RunFolder(folder).read_result() or {}
    except Unreadable as error:
        return {"status": State.unreadable, "error": str(error)}


def refuse_unwritable(folders: Mapping[str, str]) -> None:
    """Raise Refused where a folder that a run writes into, by its key, cannot be made, or written
    to. Leaves none behind."""
    for key, path in folders.items():
        missing = [part for part in (Path(path), *Path(path).parents) if not part.exists()]
        try:
            Path(path).mkdir(parents=True, exist_ok=True)
            reason = None if os.access(path, os.W_OK | os.X_OK) else "permission denied"
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
        for made in missing:
            with suppress(OSError):  # it could not be made, or another process has it by now
                made.rmdir()
        if reason is not None:
            raise Refused(
                f"{key} must be a folder that can be written to, got {path}: {reason}; type "
                f"{key}=PATH"
            )
