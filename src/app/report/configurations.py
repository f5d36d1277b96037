"""Which runs are one configuration, and what tells configurations apart."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any

from app.cli import groups
from app.config import what_decides
from app.errors import Refused
from app.report.reading import Run

FACTS = ("seed", "logger", "callbacks.progress", "sharing.cache", "tuner.cache")
"""Keys and groups, beside those of the command, in which runs of one configuration may differ."""
FOUND = "found"
"""Stands for a value that the run's own finder answered: what was asked for is one configuration,
also where the answers differ."""
ABSENT: Any = Enum("Absent", ["ABSENT"]).ABSENT  # type: ignore[attr-defined]
"""Stands for the value of a key that a configuration does not have."""
NOTHING = "-"
"""How that is shown."""


@dataclass
class Configuration:
    """Runs that differ in nothing but seed and facts.

    Attributes:
        flat: dotted keys and values.
        presets: group and preset, where they were typed.
    """

    flat: dict[str, Any]
    runs: list[Run]
    presets: dict[str, str]

    @cached_property
    def tree(self) -> dict[str, Any]:
        """`flat` as nested mappings."""
        tree: dict[str, Any] = {}
        for key, value in self.flat.items():
            *parents, name = key.split(".")
            node = tree
            for parent in parents:
                if not isinstance(node.get(parent), dict):  # or a key of the run's has a dot in it
                    node[parent] = {}
                node = node[parent]
            node[name] = value
        return tree

    def node(self, path: str) -> Any:
        """The value, or the mapping, at a dotted path; ABSENT where there is none."""
        node: Any = self.tree
        for name in path.split("."):
            if not isinstance(node, Mapping) or name not in node:
                return ABSENT
            node = node[name]
        return node


def configurations(runs: Sequence[Run]) -> list[Configuration]:
    """The configurations of runs, in the order of their first runs."""
    found: dict[str, Configuration] = {}
    for run in runs:
        if run.config is None:
            continue
        flat = what_decides({**run.config, "run_dir": "${run_dir}"})
        flat |= {key: FOUND for key in run.tuned if key in flat}
        flat = {key: value for key, value in flat.items() if not _is_fact(key)}
        same = repr(sorted(flat.items()))
        one = found.setdefault(same, Configuration(flat, [], {}))
        one.runs.append(run)
        one.presets |= _typed_presets(run)
    return list(found.values())


def _is_fact(key: str) -> bool:
    return any(key == fact or key.startswith(f"{fact}.") for fact in FACTS)


def _typed_presets(run: Run) -> dict[str, str]:
    assert run.config is not None
    pairs = [item.partition("=")[::2] for item in run.typed or ()]
    return {
        key: value
        for key, value in pairs
        if isinstance(run.config.get(key, ABSENT), Mapping)
        or (value == "none" and run.config.get(key, ABSENT) is None)
    }


def columns(configs: Sequence[Configuration]) -> list[str]:
    """The dotted keys in which configurations differ, as few as tell them apart.

    A group of which another preset is chosen is one column; its keys are others only where they
    differ between configurations of the same preset. A key that nobody typed, and that has another
    one's values everywhere, follows from it.
    """
    tops = dict.fromkeys(name for config in configs for name in config.tree)
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
    kinds = [_kind(node) for node in nodes]
    own = [path] if len(set(kinds)) > 1 else []
    inside = []
    for kind in dict.fromkeys(kinds):
        same = [config for config, its in zip(configs, kinds, strict=True) if its == kind]
        names = dict.fromkeys(
            key
            for node, its in zip(nodes, kinds, strict=True)
            if its == kind and isinstance(node, Mapping)
            for key in node
        )
        inside += [key for name in names for key in _differing(f"{path}.{name}", same)]
    return [*own, *dict.fromkeys(inside)]


def _kind(node: Any) -> str:
    """Equal where two values differ at most in the keys of one class."""
    if isinstance(node, Mapping):
        return f"class {node.get('_target_')}"
    return repr(node)


class Labels:
    """Values as they are typed: `averaging=ema`, not the class and its settings."""

    def __init__(self, configs: Sequence[Configuration]) -> None:
        self._presets = {name: presets for name, (presets, _) in groups().items()}
        self._typed: dict[tuple[str, str], Counter[str]] = {}
        self._slots = {path for config in configs for key in config.flat for path in _above(key)}
        for config in configs:
            for group, preset in config.presets.items():
                kind = _kind(config.node(group))
                self._typed.setdefault((group, kind), Counter())[preset] += 1

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
        typed = self._typed.get((path, _kind(node)), Counter())
        if len(typed) == 1:
            return next(iter(typed))
        name = str(node.get("_target_", "on")).rpartition(".")[2]
        short = name.lower()
        for preset in (short, short.replace(path, "")):
            if preset in self._presets.get(path, ()):
                return preset
        return name


def _above(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def text(value: Any) -> str:
    """A value as it is typed on the command line."""
    if value is ABSENT:
        return NOTHING
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(text, value))}]"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{key}:{text(item)}' for key, item in value.items())}}}"
    return str(value)


def matching(
    configs: Sequence[Configuration], labels: Labels, wanted: Sequence[str], *, names: Sequence[str]
) -> Configuration:
    """The one configuration that has every `key=value` of `wanted`.

    Args:
        names: the keys in which the configurations differ.

    Raises:
        Refused: where there is none, or several.
    """
    typed = " ".join(f"--baseline {item}" for item in wanted)
    left = list(configs)
    for item in wanted:
        key, sign, value = item.partition("=")
        if not sign:
            choices = _choices(left, labels, names)
            raise Refused(f"--baseline must be KEY=VALUE, got {item}; type {choices}")
        if all(config.node(key) is ABSENT for config in configs):
            raise Refused(
                f"--baseline {item}: {key} is not a key of these runs; "
                f"they differ in {', '.join(names) or 'nothing'}"
            )
        values = dict.fromkeys(labels.of(config, key) for config in left)
        left = [config for config in left if labels.of(config, key) == value]
        if not left:
            raise Refused(f"{typed} matches no row; {key} is one of {', '.join(values)}")
    if len(left) > 1:
        choices = _choices(left, labels, columns(left))
        raise Refused(f"{typed} matches {len(left)} rows; add one of {choices}")
    return left[0]


def _choices(configs: Sequence[Configuration], labels: Labels, names: Sequence[str]) -> str:
    pairs = dict.fromkeys((name, labels.of(config, name)) for name in names for config in configs)
    typed = [f"--baseline {name}={value}" for name, value in pairs if value != NOTHING]
    return ", ".join(typed[:8]) or "none: there is one row"


def common(configs: Sequence[Configuration], first: Configuration | None) -> Configuration:
    """The configuration of the most runs; among equals `first`, else the first."""
    most = max(len(config.runs) for config in configs)
    among = [config for config in configs if len(config.runs) == most]
    return first if first in among and first is not None else among[0]


def difference(config: Configuration, base: Configuration) -> list[tuple[str, str, str]]:
    """Keys in which a configuration differs from another: key, its value, the other's value."""
    pairs = {
        key: (config.flat.get(key, ABSENT), base.flat.get(key, ABSENT))
        for key in dict.fromkeys([*base.flat, *config.flat])
    }
    differ = {key: both for key, both in pairs.items() if both[0] != both[1]}
    # that a group is off on one side, its keys say already
    groups_off = {path for key in differ for path in _above(key)}
    return [
        (key, text(its), text(other))
        for key, (its, other) in differ.items()
        if key not in groups_off
    ]
