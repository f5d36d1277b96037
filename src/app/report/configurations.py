"""Which runs are one configuration, and what tells configurations apart."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any

from app.cli.presets import groups
from app.config import what_decides
from app.errors import Refused
from app.record.states import State
from app.report.numbers import NOTHING
from app.report.reading import StoredRun

FACTS = ("seed", "logger", "callbacks.progress", "sharing.cache", "tuner.cache")
"""Keys and groups, beside those of the command, in which runs of one configuration may differ."""
FOUND = "found"
"""Stands for a value that the run's own finder answered: what was asked for is one configuration,
also where the answers differ."""
ABSENT: Any = Enum("Absent", ["ABSENT"]).ABSENT  # type: ignore[attr-defined]
"""Stands for the value of a key that a configuration does not have."""


@dataclass(eq=False)
class Configuration:
    """Runs that differ in nothing but seed and facts.

    Attributes:
        flat: dotted keys and values.
        presets: group and preset, where they were typed.
    """

    flat: dict[str, Any]
    runs: list[StoredRun]
    presets: dict[str, str]

    @property
    def finished(self) -> dict[object, list[StoredRun]]:
        """The finished runs by seed; one whose seed is not known stands alone."""
        found: dict[object, list[StoredRun]] = {}
        for run in self.runs:
            if run.state == State.finished:
                found.setdefault(run.folder if run.seed is None else run.seed, []).append(run)
        return found

    @cached_property
    def nodes(self) -> dict[str, Any]:
        """The value at each dotted path, or what is below it, by the rest of its key."""
        below: dict[str, dict[str, Any]] = {}
        for key, value in self.flat.items():
            for path in _above(key):
                below.setdefault(path, {})[key[len(path) + 1 :]] = value
        return self.flat | below

    def node(self, path: str) -> Any:
        """The value at a dotted path, or what is below it; ABSENT where there is none."""
        return self.nodes.get(path, ABSENT)

    def differences(self, other: "Configuration") -> list[tuple[str, str, str]]:
        """Keys that differ in another configuration: key, the value here, the value there."""
        keys, ours, theirs = other.flat | self.flat, self.flat, other.flat
        both = ((key, ours.get(key, ABSENT), theirs.get(key, ABSENT)) for key in keys)
        differing = [(key, here, there) for key, here, there in both if here != there]
        # that a group is off on one side, its keys say already
        groups_off = {path for key, _, _ in differing for path in _above(key)}
        return [(k, text(here), text(there)) for k, here, there in differing if k not in groups_off]


def configurations(runs: Sequence[StoredRun]) -> list[Configuration]:
    """The configurations of runs, in the order of their first runs."""
    found: dict[str, Configuration] = {}
    for run in runs:
        if run.config is None:
            continue
        flat = what_decides({**run.config, "run_dir": "${run_dir}"})
        flat |= dict.fromkeys(flat.keys() & run.tuned, FOUND)
        flat = {key: flat[key] for key in flat if {key, *_above(key)}.isdisjoint(FACTS)}
        one = found.setdefault(repr(sorted(flat.items())), Configuration(flat, [], {}))
        one.runs.append(run)
        for key, _, value in (item.partition("=") for item in run.typed or ()):
            chosen = run.config.get(key, ABSENT)
            if isinstance(chosen, Mapping) or (value == "none" and chosen is None):
                one.presets[key] = value
    return list(found.values())


def columns(configs: Sequence[Configuration]) -> list[str]:
    """The dotted keys in which configurations differ, as few as tell them apart.

    A group of which another preset is chosen is one column; its keys are others only where they
    differ between configurations of the same preset. A key that nobody typed, and that has another
    one's values everywhere, follows from it.
    """
    tops = dict.fromkeys(key.partition(".")[0] for config in configs for key in config.flat)
    differing = [column for top in tops for column in _differing(top, configs)]
    words = {word for config in configs for run in config.runs for word in run.typed or ()}
    typed = {word.lstrip("+~").partition("=")[0] for word in words}
    values = {column: [config.node(column) for config in configs] for column in differing}
    found: list[str] = []
    for column in sorted(differing, key=lambda column: column not in typed):
        if column in typed or all(values[column] != values[other] for other in found):
            found.append(column)
    return sorted(found, key=differing.index)


def _differing(path: str, configs: Sequence[Configuration]) -> list[str]:
    nodes = [config.node(path) for config in configs]
    if all(node == nodes[0] for node in nodes):
        return []
    same: dict[str, list[Configuration]] = {}
    for config, node in zip(configs, nodes, strict=True):
        same.setdefault(_kind(node), []).append(config)
    found = [path] if len(same) > 1 else []
    for alike in same.values():
        groups_here = [node for one in alike if isinstance(node := one.node(path), Mapping)]
        for name in dict.fromkeys(key.partition(".")[0] for node in groups_here for key in node):
            found += _differing(f"{path}.{name}", alike)
    return list(dict.fromkeys(found))


def _kind(node: Any) -> str:
    """Equal where two values differ at most in the keys of one class."""
    if isinstance(node, Mapping):
        return f"class {node.get('_target_')}"
    return repr(node)


class Labels:
    """Values as they are typed: `averaging=ema`, not the class and its settings.

    Attributes:
        columns: the keys in which the configurations differ.
    """

    def __init__(self, configs: Sequence[Configuration]) -> None:
        self.columns = columns(configs)
        self._configs = configs
        self._presets = groups()
        self._typed: dict[tuple[str, str], set[str]] = {}
        self._slots = {path for config in configs for key in config.flat for path in _above(key)}
        for config in configs:
            for group, preset in config.presets.items():
                self._typed.setdefault((group, _kind(config.node(group))), set()).add(preset)

    def of(self, config: Configuration, path: str) -> str:
        """The value at a path of a configuration, as it would be typed."""
        node = config.node(path)
        if path in config.presets and "." not in path:
            return config.presets[path]
        if isinstance(node, Mapping):
            return self._preset(path, node)
        if node is None and path in self._slots:
            return "none"
        return text(node)

    def _preset(self, path: str, node: Mapping[str, Any]) -> str:
        typed = self._typed.get((path, _kind(node)), set())
        if len(typed) == 1:
            return next(iter(typed))
        name = str(node.get("_target_", "on")).rpartition(".")[2]
        short, (presets, _) = name.lower(), self._presets.get(path, ([], ""))
        return next((one for one in (short, short.replace(path, "")) if one in presets), name)

    def matching(self, wanted: Sequence[str]) -> Configuration:
        """The one configuration that has every `key=value` of `wanted`.

        Raises Refused where there is none, or several.
        """
        typed = " ".join(f"--baseline {item}" for item in wanted)
        left = self._configs
        for item in wanted:
            key, sign, value = item.partition("=")
            if not sign:
                raise Refused(
                    f"--baseline must be KEY=VALUE, got {item}; type {self._choices(left)}"
                )
            if all(config.node(key) is ABSENT for config in self._configs):
                raise Refused(
                    f"--baseline {item}: {key} is not a key of these runs; "
                    f"they differ in {', '.join(self.columns) or 'nothing'}"
                )
            values = dict.fromkeys(self.of(config, key) for config in left)
            left = [config for config in left if self.of(config, key) == value]
            if not left:
                raise Refused(f"{typed} matches no row; {key} is one of {', '.join(values)}")
        if len(left) > 1:
            raise Refused(f"{typed} matches {len(left)} rows; add one of {self._choices(left)}")
        return left[0]

    def _choices(self, configs: Sequence[Configuration]) -> str:
        names = columns(configs)
        pairs = dict.fromkeys((name, self.of(config, name)) for name in names for config in configs)
        typed = [f"--baseline {name}={value}" for name, value in pairs if value != NOTHING]
        return ", ".join(typed[:8]) or "none: there is one row"


def _above(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def text(value: Any) -> str:
    """A value as it is typed on the command line."""
    if value is ABSENT:
        return NOTHING
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, list):
        return f"[{','.join(map(text, value))}]"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{key}:{text(item)}' for key, item in value.items())}}}"
    return str(value)


def common(configs: Sequence[Configuration], first: Configuration | None) -> Configuration | None:
    """The configuration of the most runs; among equals `first`, else the first; None of none."""
    return max(configs, key=lambda one: (len(one.runs), one is first), default=None)
