"""Which processes a run needs, and starting those that nobody has started yet. Needs no torch."""

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from app.config import SINGLE, check
from app.errors import RankFailed, Refused
from app.process.imports import importing
from app.process.ranks import num_slurm_tasks, ranks, started_elsewhere
from app.run.folder import RunFolder
from app.tuner.keys import startable, with_overrides


def placed(cfg: DictConfig) -> DictConfig:
    """The configuration with what only the place of its run tells: its devices, and its folder.

    Where torchrun or srun started the ranks, the folder is that of rank 0: a name made from the
    time differs between them. Nothing of Hydra is needed to resolve what is returned.

    Raises Refused where those are not as many processes as the configuration asks for.
    """
    _refuse_without_gpu(cfg)
    devices = _devices(cfg)
    found = with_overrides(cfg, {"trainer.devices": devices, **of_hydra(cfg)})
    if not started_elsewhere():
        if found.trainer.num_nodes > 1:
            raise Refused(
                f"trainer.num_nodes={found.trainer.num_nodes} needs torchrun or srun to start the "
                "processes on every machine; type trainer.num_nodes=1"
            )
        return found
    check(startable(found))  # each rank refuses for itself, before any waits for another
    given = RunFolder(Path(found.run_dir))
    shared = ranks().first(lambda: {"name": found.name, "run_dir": found.run_dir})
    if shared["run_dir"] != str(given.path) and given.path.exists():
        given.remove_if_empty()
    return with_overrides(found, shared)


def run_ranks(work: Callable[..., Any], cfg: DictConfig, *arguments: Any) -> Any:
    """Call `work(cfg, *arguments)` in a process for each device; returns rank 0's value.

    A failure is in result.json, also that of a rank that was killed.
    """
    with importing():
        from app.launch.local import run_local
        from app.run.build import collect_shared_data
    packs = collect_shared_data(check(cfg), num_processes=cfg.trainer.devices)
    folder = RunFolder(Path(cfg.run_dir))
    try:
        return run_local(
            _with_packs,
            packs,
            work,
            cfg,
            *arguments,
            num_processes=cfg.trainer.devices,
            start_method=cfg.strategy.start_method.value,
            logging_config=_logging_config(),
        )
    except RankFailed as failure:
        result = folder.read_result() or {}
        result |= {"status": "failed", "error": failure.error, "rank": failure.rank}
        result.pop("where", None)  # of rank 0, which may only have lost its peer
        folder.write_result(result)
        raise


def _with_packs(packs: Any, work: Callable[..., Any], *arguments: Any) -> Any:
    """In a rank: know the data that the process which started it has set up."""
    if packs is not None:
        from app.sharing import Shared

        Shared.give(packs)
    return work(*arguments)


def _devices(cfg: DictConfig) -> int:
    """Processes of this machine."""
    asked = cfg.trainer.devices
    if started_elsewhere():
        started = int(os.environ.get("LOCAL_WORLD_SIZE", 0))
        started = started or num_slurm_tasks() // cfg.trainer.num_nodes
        if asked not in ("auto", started):
            raise Refused(
                f"trainer.devices must be {started}, the processes that were started on this "
                f"machine, got {asked}; type trainer.devices={started}"
            )
        machines = ranks().size // started
        if cfg.trainer.num_nodes != machines:
            raise Refused(
                f"trainer.num_nodes must be {machines}, the machines on which processes were "
                f"started, got {cfg.trainer.num_nodes}; type trainer.num_nodes={machines}"
            )
        return started
    if asked != "auto":
        return int(asked)
    if cfg.strategy._target_ == SINGLE or cfg.trainer.accelerator.value == "cpu":
        return 1
    with importing():
        import torch
    return max(1, torch.cuda.device_count())


def _refuse_without_gpu(cfg: DictConfig) -> None:
    """Raise Refused where something needs a GPU and trainer.accelerator=auto finds none."""
    if cfg.trainer.accelerator.value != "auto":
        return
    try:
        check(with_overrides(cfg, {"trainer.accelerator": "cpu"}))
    except Refused as refusal:
        with importing():
            import torch
        if not torch.accelerator.is_available():
            raise Refused(f"there is no GPU here: {refusal}") from None


def of_hydra(cfg: DictConfig) -> dict[str, Any]:
    """What only Hydra can resolve, which is not there in other processes."""
    raw = OmegaConf.to_container(cfg)
    return {
        key: OmegaConf.select(cfg, key)
        for key, text in _texts(raw, "")
        if "${hydra:" in text or "${now:" in text
    }


def _texts(node: Any, key: str) -> Iterator[tuple[str, str]]:
    """The keys and values of all texts below a node."""
    if isinstance(node, str):
        yield key, node
    elif isinstance(node, dict | list):
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for name, item in items:
            yield from _texts(item, f"{key}.{name}" if key else str(name))


def _logging_config() -> Mapping[str, Any] | None:
    if not HydraConfig.initialized():
        return None
    config = OmegaConf.to_container(HydraConfig.get().job_logging, resolve=True)
    assert isinstance(config, dict)
    return {str(key): value for key, value in config.items()}
