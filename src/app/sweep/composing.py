"""Composing the jobs of a sweep: their presets once, their values set on a copy.

Hydra's sweepers compose each job to validate it, and its launchers once more to run it.
"""

import itertools
import pickle
import zlib
from collections.abc import Sequence
from functools import cache
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.plugins.config_source import ConfigSource
from omegaconf import DictConfig, OmegaConf


class Composer:
    """Hydra's loader for a sweep: in its place, what it composes is what it would.

    Jobs that differ in values alone (`key=value` after the last override of another kind, such as
    `+key=value`) are copies of what is composed for the others, on which they are set as Hydra does
    it. All else is composed in full, also what is refused, so that the error is Hydra's own.
    """

    def __init__(self, loader: ConfigLoader) -> None:
        self._loader = loader
        self._composed: dict[tuple[str, ...], bytes] = {}
        self._parsed = cache(self._parse)
        self._is_group = cache(self._find_group)
        for source in loader.get_sources():
            _read_once(source)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def load_sweep_config(
        self, master_config: DictConfig, sweep_overrides: Sequence[str]
    ) -> DictConfig:
        """The configuration of a job of a sweep: the caller's own.

        Raises what Hydra raises where the job cannot be composed.
        """
        typed = list(sweep_overrides)
        try:
            made = self._made(master_config, typed)
        except Exception:  # what is refused is composed in full: the error is to be Hydra's own
            made = None
        return made or self._loader.load_sweep_config(master_config, typed)

    def _made(self, config: DictConfig, typed: list[str]) -> DictConfig | None:
        """A copy with its values; None where Hydra's own settings may depend on what was typed."""
        parsed = [self._parsed(word) for word in typed]
        if any(_is_hydras(override) or override.is_sweep_override() for override in parsed):
            return None
        before: Any = OmegaConf.to_container(config.hydra.overrides.hydra)
        before = (config.hydra.job.config_name, *before)
        is_value = [
            isinstance(one.value(), dict) or not self._is_group(one.key_or_group, *before)
            for one in parsed
        ]
        others = [n for n, one in enumerate(parsed) if is_value[n] and not _is_plain(one)]
        first = others[-1] + 1 if others else 0
        is_set = [is_one and n >= first for n, is_one in enumerate(is_value)]
        base = tuple(word for word, is_late in zip(typed, is_set, strict=True) if not is_late)
        cfg: DictConfig
        if base in self._composed:
            cfg = pickle.loads(zlib.decompress(self._composed[base]))
            OmegaConf.copy_cache(from_config=config, to_config=cfg)  # what is resolved: the time
        else:
            cfg = self._loader.load_sweep_config(config, list(base))
            self._composed[base] = zlib.compress(pickle.dumps(cfg), level=1)
        for override in itertools.compress(parsed, is_set):
            OmegaConf.update(cfg, override.key_or_group, override.value(), merge=True)
        cfg.hydra.overrides.task = typed
        how = cfg.hydra.job.config.override_dirname
        named = sorted(
            word
            for word, one in zip(typed, parsed, strict=True)
            if one.key_or_group not in how.exclude_keys
        )
        cfg.hydra.job.override_dirname = how.item_sep.join(named).replace("=", how.kv_sep)
        return cfg

    def _parse(self, word: str) -> Override:
        (override,) = OverridesParser.create().parse_overrides([word])
        return override

    def _find_group(self, key: str, name: str | None, *before: str) -> bool:
        return bool(self._loader.get_group_options(key, None, name, list(before)))


def _is_hydras(override: Override) -> bool:
    return override.is_hydra_override() or override.key_or_group == "hydra"


def _is_plain(override: Override) -> bool:
    return override.type is OverrideType.CHANGE and override.package is None


def _read_once(source: ConfigSource) -> None:
    """Let a source read each preset once, of which everyone gets a copy of his own.

    The loader copies its sources for each job: with all schemas, which nobody changes.
    """
    load = source.load_config

    @cache
    def packed(config_path: str) -> bytes:
        return pickle.dumps(load(config_path))

    vars(source).update(
        load_config=lambda config_path: pickle.loads(packed(config_path)),
        is_group=cache(source.is_group),
        is_config=cache(source.is_config),
        __deepcopy__=lambda memo: source,
    )
