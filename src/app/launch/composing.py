"""Composing a job once where Hydra's sweepers compose it twice: to validate it, and to run it."""

from hydra.core.config_loader import ConfigLoader
from omegaconf import DictConfig

MOST = 64
"""How many configurations are kept: those of the jobs that run first."""


class Composer:
    """Composes jobs with Hydra's loader, and keeps what a sweeper lets it compose before."""

    def __init__(self, loader: ConfigLoader) -> None:
        self._compose = loader.load_sweep_config
        self._kept: dict[tuple[str, ...], DictConfig] = {}
        loader.load_sweep_config = self._validate  # type: ignore[method-assign]

    def compose(self, config: DictConfig, overrides: list[str]) -> DictConfig:
        """The configuration of a job of a sweep: the caller's own."""
        kept = self._kept.pop(tuple(overrides), None)
        return self._compose(config, overrides) if kept is None else kept

    def _validate(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        cfg = self._compose(master_config, sweep_overrides)
        if len(self._kept) < MOST:
            self._kept[tuple(sweep_overrides)] = cfg
        return cfg
