"""Errors of composing or checking, in terms of what was typed and what to type instead."""

import difflib
import errno
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import errors as of_hydra
from omegaconf import DictConfig, OmegaConf
from omegaconf import errors as of_omegaconf
from yaml import MarkedYAMLError

from app.cli.presets import groups
from app.errors import Refused

REFUSALS = (of_hydra.HydraException, of_omegaconf.OmegaConfBaseException, Refused)


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
        of_file = error.__context__ and _explained(
            error.__context__, words
        )  # Hydra keeps its text only
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
        reason = (error.strerror or str(error)).lower()
        return f"{place}{reason}; when that is mended, the same command goes on with its run"
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
    shape = OmegaConf.get_type(parent) if isinstance(parent, DictConfig) else None
    is_free = shape is dict and "_target_" in known
    takes_more = is_free or getattr(shape, "_takes_settings_", False)
    more = f"; what its class takes has a plus before it: +{key}=VALUE" if takes_more else ""
    return unknown_key(key, known) + more


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
