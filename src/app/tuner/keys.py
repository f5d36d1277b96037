"""Which keys are tuned, and how an answer becomes part of a configuration. Needs no torch."""

from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from app.config import FACTOR, Config, with_overrides
from app.errors import Refused
from app.parallel.sizes import data_parallel_size

BATCH_SIZE_KEYS = ("data.batch_size", "model.batch_size")
EVAL_BATCH_SIZE_KEYS = ("data.eval_batch_size", *BATCH_SIZE_KEYS)
LR_KEYS = ("optimizer.lr", "model.lr", "model.learning_rate")


def value_at(config: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key; None where there is none."""
    found: Any = config
    for name in key.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def tuned_key(
    config: Mapping[str, Any], *, chosen: str | None, candidates: Sequence[str], setting: str
) -> str:
    """The key that a finder tunes: the one chosen, else the first candidate that holds a number.

    Raises Refused where there is none.
    """
    for key in [chosen] if chosen else candidates:
        value = value_at(config, key)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return key
    if chosen:
        raise Refused(
            f"{setting} must name a key that holds a number, got {chosen}, which holds "
            f"{value_at(config, chosen)}; type {setting}={candidates[0]}"
        )
    raise Refused(
        f"{setting} finds nothing to tune: none of {', '.join(candidates)} holds a number; type "
        f"{setting}=KEY, such as {candidates[-1]} with +{candidates[-1]}=0.1"
    )


def tunable(config: Config) -> set[str]:
    """The keys that the finders of a configuration may tune."""
    assert config.tuner is not None
    found: set[str] = set()
    for finder, candidates in (
        (config.tuner.batch_size, BATCH_SIZE_KEYS),
        (config.tuner.lr, LR_KEYS),
    ):
        if finder is not None:
            found |= {FACTOR, *LR_KEYS}  # by which the batch is made up for
            chosen = finder.key
            found |= set(
                candidates if chosen is None else [chosen] if isinstance(chosen, str) else chosen
            )
    return found


def startable(cfg: DictConfig) -> DictConfig:
    """The configuration with a micro-batch that its effective batch allows, where one is searched.

    The largest divisor of `accumulate.batch_size` up to the configured one.
    """
    if cfg.tuner is None or cfg.tuner.batch_size is None or cfg.accumulate is None:
        return cfg
    if "micro_batch_size" not in cfg.accumulate:
        return cfg  # a class of the user's
    target = cfg.accumulate.get("batch_size")
    key = cfg.tuner.batch_size.key or BATCH_SIZE_KEYS[0]
    size = OmegaConf.select(cfg, key)
    if target is None or not isinstance(size, int):
        return cfg
    world_size = shares(cfg) or 1
    if target % world_size != 0:
        return cfg  # which check refuses
    target //= world_size
    divisor = next(n for n in range(min(size, target), 0, -1) if target % n == 0)
    return with_overrides(cfg, {key: divisor})


def shares(config: Any) -> int | None:
    """Ranks of a configuration that serve different samples; None while trainer.devices=auto."""
    return data_parallel_size(
        devices=config["trainer"]["devices"],
        num_nodes=config["trainer"]["num_nodes"],
        tensor_parallel_size=config["strategy"].get("tensor_parallel_size"),
    )


def typed(overrides: Mapping[str, Any]) -> str:
    """The overrides as one types them."""
    on = {FACTOR: "accumulate=constant "}
    return " ".join(f"{on.get(key, '')}{key}={value}" for key, value in overrides.items())
