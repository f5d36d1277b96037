"""Composing the jobs of a sweep: their presets once, their values as Hydra sets them.

Hydra's sweepers compose each job to validate it, and its launchers once more to run it.
"""

import copy
import pickle
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.defaults_list import Overrides
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.override_parser.types import Override
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, Node, OmegaConf


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What was typed for a job.

    Attributes:
        typed: all of it.
        presets: what chooses presets.
        values: what is done to the configuration once they are merged.
    """

    typed: list[Override]
    presets: list[Override]
    values: list[Override]

    @property
    def kind(self) -> tuple[str, ...]:
        """The presets, and the keys that are set."""
        keys = [override.get_key_element() for override in self.values]
        return (*[str(override.input_line) for override in self.presets], "", *keys)


@dataclass
class _Base:
    """Of jobs with the same presets that set the same keys.

    Attributes:
        first: the first of them.
        content: that one, composed in full, and packed.
        template: the presets without a value, packed; None before there is a second job, and where
            the first one could not be made of it.
    """

    first: _Job
    content: bytes
    template: bytes | None = None
    is_tried: bool = False


class Composer:
    """Composes jobs with Hydra's loader, which does so for the sweepers as well from then on.

    Jobs with the same presets are copies of one template, changed by Hydra's own function. Before
    the second of them is, the first is made so too: where that one differs from what was composed
    in full in any value, type or flag, all are composed in full.
    """

    def __init__(self, loader: ConfigLoader) -> None:
        assert isinstance(loader, ConfigLoaderImpl)
        loader.repository = _Repository(loader.config_search_path)
        self._loader = loader
        self._compose_in_full = loader.load_sweep_config
        self._bases: dict[tuple[str, ...], _Base] = {}
        loader.load_sweep_config = self.compose  # type: ignore[method-assign]

    def compose(self, master_config: DictConfig, sweep_overrides: Sequence[str]) -> DictConfig:
        """The configuration of a job of a sweep: the caller's own.

        Raises what Hydra raises where the job cannot be composed.
        """
        typed = list(sweep_overrides)
        job = self._read(master_config, typed)
        if job is None:
            return self._compose_in_full(master_config, typed)
        base = self._bases.get(job.kind)
        if base is None:
            cfg = self._compose_in_full(master_config, typed)
            self._bases[job.kind] = _Base(first=job, content=_packed(cfg))
            return cfg
        if base.first.typed == job.typed:
            return _unpacked(base.content, master_config)
        if not base.is_tried:
            self._try(base, master_config)
        made = None if base.template is None else _made(base.template, job, master_config)
        # in full also what was refused: the error is to be Hydra's own
        return self._compose_in_full(master_config, typed) if made is None else made

    def _try(self, base: _Base, config: DictConfig) -> None:
        """Give a base its template, where the first job is the same when it is made of it."""
        presets = [str(override.input_line) for override in base.first.presets]
        template = _packed(self._compose_in_full(config, presets))
        made = _made(template, base.first, config)
        if made is not None and is_same(made, _unpacked(base.content, config)):
            base.template = template
        base.is_tried = True

    def _read(self, config: DictConfig, typed: list[str]) -> _Job | None:
        """What was typed for a job; None where Hydra's own settings may depend on it."""
        before: Any = OmegaConf.to_container(config.hydra.overrides.hydra)
        parsed, repository = self._loader._parse_overrides_and_create_caching_repo(
            config.hydra.job.config_name, [*before, *typed]
        )
        parsed = parsed[len(before) :]
        for override in parsed:
            is_hydras = override.is_hydra_override() or override.key_or_group == "hydra"
            if is_hydras or override.is_sweep_override():
                return None
        values = Overrides(repo=repository, overrides_list=parsed).config_overrides
        presets = [override for override in parsed if override not in values]
        return _Job(typed=parsed, presets=presets, values=values)


class _Repository(ConfigRepository):
    """Hydra's repository of presets, of which each is read once; its copies share them."""

    def initialize_sources(self, config_search_path: ConfigSearchPath) -> None:
        super().initialize_sources(config_search_path)
        self._loaded: dict[str, bytes] = {}
        self._groups: dict[str, bool] = {}

    def __deepcopy__(self, memo: Any) -> "_Repository":
        return copy.copy(self)

    def load_config(self, config_path: str) -> ConfigResult | None:
        if config_path not in self._loaded:
            self._loaded[config_path] = pickle.dumps(super().load_config(config_path))
        loaded: ConfigResult | None = pickle.loads(self._loaded[config_path])
        return loaded

    def group_exists(self, config_path: str) -> bool:
        if config_path not in self._groups:
            self._groups[config_path] = super().group_exists(config_path)
        return self._groups[config_path]


def _packed(cfg: DictConfig) -> bytes:
    return zlib.compress(pickle.dumps(cfg), level=1)


def _unpacked(content: bytes, config: DictConfig) -> DictConfig:
    """A copy that shares with the sweep what it has resolved by now, such as the time."""
    cfg: DictConfig = pickle.loads(zlib.decompress(content))
    OmegaConf.copy_cache(from_config=config, to_config=cfg)
    return cfg


def _made(template: bytes, job: _Job, config: DictConfig) -> DictConfig | None:
    """A job made of a template, as Hydra makes it; None where Hydra refuses a value."""
    cfg = _unpacked(template, config)
    try:
        ConfigLoaderImpl._apply_overrides_to_config(job.values, cfg)
    except Exception:
        return None
    cfg.hydra.overrides.task = [override.input_line for override in job.typed]
    how = cfg.hydra.job.config.override_dirname
    cfg.hydra.job.override_dirname = get_overrides_dirname(
        overrides=job.typed,
        exclude_keys=how.exclude_keys,
        item_sep=how.item_sep,
        kv_sep=how.kv_sep,
    )
    return cfg


def is_same(one: Node, other: Node) -> bool:
    """Whether two nodes have the same values, unresolved, and the same types and flags."""
    if type(one) is not type(other) or one._metadata != other._metadata:
        return False
    mine, theirs = one._value(), other._value()
    if isinstance(mine, dict) and isinstance(theirs, dict):
        return list(mine) == list(theirs) and all(is_same(mine[k], theirs[k]) for k in mine)
    if isinstance(mine, list) and isinstance(theirs, list):
        return len(mine) == len(theirs) and all(map(is_same, mine, theirs))
    return repr(mine) == repr(theirs)  # equal numbers of another type are not the same
