"""Composing the jobs of a sweep: in full once for those that differ in plain values only.

Hydra's sweepers compose each job to validate it, and its launchers once more to run it.
"""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import ConfigCompositionException
from omegaconf import Container, DictConfig, Node, OmegaConf

MOST = 64
"""How many configurations are kept that were composed in full: those of the jobs that run first."""


@dataclass
class _Base:
    """A job composed in full, of which others are made.

    Attributes:
        content: pickled, the fastest way to a copy.
        is_proven: whether a job made of it was equal to the same job composed in full; None before
            one was made.
    """

    content: bytes
    is_proven: bool | None = None


class Composer:
    """Composes jobs with Hydra's loader.

    Jobs with the same choices of presets, and other values for the same keys, are copies of the
    first with their own values set as Hydra sets them. The second of them is composed in full as
    well: where the two differ in any value, type or flag, all are composed in full from then on.
    """

    def __init__(self, loader: ConfigLoader) -> None:
        assert isinstance(loader, ConfigLoaderImpl)
        self._repository = loader.repository
        self._groups: dict[str, bool] = {}
        self._compose_in_full = loader.load_sweep_config
        self._bases: dict[tuple[str, ...], _Base] = {}
        self._kept: dict[tuple[str, ...], bytes] = {}
        loader.load_sweep_config = self._validate  # type: ignore[method-assign]

    def compose(self, config: DictConfig, overrides: Sequence[str]) -> DictConfig:
        """The configuration of a job of a sweep: the caller's own.

        Raises what Hydra raises where the job cannot be composed.
        """
        kept = self._kept.pop(tuple(overrides), None)
        if kept is not None:
            cfg: DictConfig = pickle.loads(kept)
            return cfg
        return self._composed(config, list(overrides))

    def _validate(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        """Stands in for the loader's method, whose result the sweepers throw away."""
        return self._composed(master_config, sweep_overrides)

    def _composed(self, config: DictConfig, overrides: list[str]) -> DictConfig:
        parsed = OverridesParser.create().parse_overrides(overrides)
        values = self._own_values(config, parsed)
        own = {id(override) for override in values}
        shared = [str(o.input_line) for o in parsed if id(o) not in own]
        key = (*shared, "", *(override.key_or_group for override in values))
        base = self._bases.get(key) if values else None
        if base is None:
            cfg = self._compose_in_full(config, overrides)
            if values:
                self._bases[key] = _Base(pickle.dumps(cfg))
        else:
            made = None if base.is_proven is False else _made(base, parsed, values)
            if made is not None and base.is_proven:
                return made
            cfg = self._compose_in_full(config, overrides)
            base.is_proven = made is not None and is_same(made, cfg)
        if len(self._kept) < MOST:
            self._kept[tuple(overrides)] = pickle.dumps(cfg)
        return cfg

    def _own_values(self, config: DictConfig, parsed: list[Override]) -> list[Override]:
        """The overrides that set a key to a plain value, as far as no other one may see them: those
        behind the last that adds or takes away. Presets are chosen before all of them."""
        if OmegaConf.select(config, "hydra.searchpath"):
            return []  # more presets than the loader knows of
        found: list[Override] = []
        for override in parsed:
            is_change = override.type is OverrideType.CHANGE and override.package is None
            if not is_change or override.is_hydra_override():
                found = []
            elif not self._is_group(override.key_or_group):
                if _is_plain(override.value()):
                    found.append(override)
                else:
                    found = []
        return found

    def _is_group(self, key: str) -> bool:
        if key not in self._groups:
            self._groups[key] = self._repository.group_exists(key)
        return self._groups[key]


def _made(base: _Base, parsed: list[Override], values: list[Override]) -> DictConfig | None:
    """A copy of a base with other values, as Hydra sets them; None where it refuses one."""
    cfg: DictConfig = pickle.loads(base.content)
    try:
        ConfigLoaderImpl._apply_overrides_to_config(values, cfg)
    except ConfigCompositionException:
        return None
    typed = [override.input_line for override in parsed]
    cfg.hydra.overrides.task = typed
    how = cfg.hydra.job.config.override_dirname
    cfg.hydra.job.override_dirname = get_overrides_dirname(
        overrides=parsed,
        exclude_keys=how.exclude_keys,
        item_sep=how.item_sep,
        kv_sep=how.kv_sep,
    )
    return cfg


def _is_plain(value: Any) -> bool:
    """A scalar, or a list of such: what was there before leaves no trace."""
    if isinstance(value, list):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def is_same(one: Node, other: Node) -> bool:
    """Whether two nodes have the same values, unresolved, and the same types and flags."""
    if one._metadata != other._metadata:
        return False
    if not isinstance(one, Container) or one._is_none() or one._is_missing():
        return bool(one._value() == other._value())
    if one._is_interpolation():
        return bool(one._value() == other._value())
    mine, theirs = one._content, other._content  # type: ignore[attr-defined]
    if isinstance(one, DictConfig):
        return list(mine) == list(theirs) and all(is_same(mine[k], theirs[k]) for k in mine)
    return len(mine) == len(theirs) and all(map(is_same, mine, theirs))
