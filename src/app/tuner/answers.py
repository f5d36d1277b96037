"""Answers that are kept: `tuned.yaml` in a run's folder, and a cache by what decides them."""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from glob import escape, glob
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from app.config import Config, movable, what_decides
from app.errors import Refused, Unreadable
from app.process.files import read_yaml, write_atomically
from app.process.targets import located, named_in
from app.record.folder import RunFolder
from app.tuner.keys import tunable

NAME = "tuned.yaml"
DECIDING = ("model", "data", "optimizer", "accumulate", "clip", "averaging", "strategy",
            "precision", "memory", "compile", "callbacks", "tuner", "init_")  # fmt: skip
"""How the keys begin whose settings decide what a finder answers. Not the schedule, which is built
from the answer, and not the seed, so that a sweep over seeds searches once."""

TRAINER = ("threads", "devices", "num_nodes", "limit_train_batches", "overfit_batches", "plugins")
OF_CALLBACKS = ("checkpoint", "early_stopping", "progress")
"""Callbacks that are not in a search."""


def read_tuned(path: Path) -> dict[str, Any]:
    """The overrides in a `tuned.yaml`, or in the one of a folder; the suffix may be left out.

    Raises Refused where there is none.
    """
    candidates = (path, path.with_name(f"{path.name}.yaml"), path / NAME)
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    if found is None:
        raise Refused(
            f"tuned must be a {NAME} that a tuner wrote, got {path}; type "
            "tuned=runs/NAME/tuned.yaml"
        )
    overrides = (read_yaml(found) or {}).get("overrides")
    if not isinstance(overrides, dict):
        raise Unreadable(found, "it has no overrides")
    for key, value in overrides.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise Unreadable(found, f"{key} holds {value!r:.60}, and a finder answers numbers")
    return {str(key): value for key, value in overrides.items()}


def recalled(config: Config, folder: RunFolder) -> dict[str, Any] | None:
    """Overrides found before: of `tuned`, or of an earlier command of the run in the folder.

    Where their file is lost, they are what the run's configuration has and the command has not.
    """
    if config.tuned is not None:
        return read_tuned(Path(config.tuned))
    if config.tuner is None:
        return None
    if (folder.path / NAME).exists():
        return read_tuned(folder.path / NAME)
    try:
        before = folder.read_config()
    except Unreadable:
        return None
    if before is None:
        return None
    old, new = what_decides(before), what_decides(config.plain)
    lost = {key: old.get(key) for key in sorted({*old, *new}) if old.get(key) != new.get(key)}
    if not lost.keys() <= tunable(config):
        return None  # another run, which is refused
    write_tuned(folder.path / NAME, lost, {"from": folder.config_path.name})
    return lost


def write_tuned(path: Path, overrides: Mapping[str, Any], provenance: Mapping[str, Any]) -> None:
    """Keep the overrides and where they are from."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = OmegaConf.create({"overrides": dict(overrides), "provenance": dict(provenance)})
    head = "# Found by a tuner. Use it again with tuned=PATH_OF_THIS_FILE.\n"
    write_atomically(path, head + OmegaConf.to_yaml(content))


def cache_key(config: Mapping[str, Any], *, device: str) -> str:
    """Of everything that decides the answers: settings, the user's source, versions, device.

    The source is that of the modules whose classes the settings name, and of those they import;
    of what is installed, the version; of a file that a setting names, size and time. What is
    imported inside of a function is not followed, nor are files that only the source names.
    """
    from app.sharing.key import sources  # which imports torch

    chosen = {k: one for k, one in config.items() if one is not None and k.startswith(DECIDING)}
    if "callbacks" in chosen:
        named = chosen["callbacks"].items()
        chosen["callbacks"] = {name: one for name, one in named if name not in OF_CALLBACKS}
    found = (located("", name) for name in named_in(chosen))
    modules = {str(getattr(one, "__module__", None)) for one in found}
    decides = {
        **movable({**chosen, "run_dir": config["run_dir"]}),
        **{key: config["trainer"][key] for key in TRAINER},
        "source": sources(modules),
        "files": [[path, os.stat(path).st_size, os.stat(path).st_mtime_ns]
                  for path in sorted(_files(chosen))],
        "device": device,
    }  # fmt: skip
    text = json.dumps(decides, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _files(value: Any) -> Iterator[str]:
    """The files that settings name, and the checkpoints of a run whose folder they name."""
    if isinstance(value, Mapping | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _files(item)
    elif isinstance(value, str):
        yield from filter(os.path.isfile, (value, *glob(f"{escape(value)}/checkpoints/*.ckpt")))


@contextmanager
def searching(path: Path) -> Iterator[None]:
    """Hold the answer for this process: others that want it wait, and then find it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
