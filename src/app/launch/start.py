"""Which processes a run needs, and starting those that nobody has started yet. Needs no torch."""

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from app.config import Config, check, is_single, with_overrides
from app.errors import RankFailed, Refused
from app.process.imports import importing
from app.process.ranks import num_slurm_tasks, ranks, started_elsewhere
from app.record.folder import RunFolder
from app.record.states import State
from app.tuner.keys import startable


def placed(config: Config) -> Config:
    """The configuration with what only the place of its run tells: its devices, and its folder.

    Where torchrun or srun started the ranks, the folder is that of rank 0: a name made from the
    time differs between them. Nothing of Hydra is needed to resolve what is returned.

    Raises Refused where those are not as many processes as the configuration asks for.
    """
    _refuse_without_gpu(config)
    known = {"trainer.devices": _devices(config), **of_hydra(config.composed)}
    found = check(startable(with_overrides(config.composed, known))).holding(config.objects)
    if not started_elsewhere():
        if config.trainer.num_nodes > 1:
            raise Refused(
                f"trainer.num_nodes={config.trainer.num_nodes} needs torchrun or srun to start the "
                "processes on every machine; type trainer.num_nodes=1"
            )
        return found
    given = RunFolder(Path(found.run_dir))
    shared = ranks().first(lambda: {"name": found.name, "run_dir": found.run_dir})
    if shared["run_dir"] != str(given.path) and given.path.exists():
        given.remove_if_empty()
    return found.changed(shared)


def run_ranks(work: Callable[..., Any], config: Config, *arguments: Any) -> Any:
    """Call `work(config, *arguments)` in a process for each device; returns rank 0's value.

    A failure is in result.json, also that of a rank that was killed.
    """
    with importing():
        from app.launch.local import run_local
        from app.run.build import collect_shared_data
    packs = collect_shared_data(config, num_processes=int(config.trainer.devices))
    folder = RunFolder(Path(config.run_dir))
    try:
        return run_local(
            _with_packs,
            packs,
            work,
            config,
            *arguments,
            num_processes=int(config.trainer.devices),
            start_method=config.strategy.start_method.value,
            logging_config=_logging_config(),
        )
    except RankFailed as failure:
        result = folder.read_result() or {}
        result |= {"status": State.failed, "error": failure.error, "rank": failure.rank}
        result.pop("where", None)  # of rank 0, which may only have lost its peer
        folder.write_result(result)
        raise


def _with_packs(packs: Any, work: Callable[..., Any], *arguments: Any) -> Any:
    """In a rank: know the data that the process which started it has set up."""
    if packs is not None:
        from app.sharing import Shared

        Shared.give(packs)
    return work(*arguments)


def _devices(config: Config) -> int:
    """Processes of this machine."""
    asked = config.trainer.devices
    if started_elsewhere():
        started = int(os.environ.get("LOCAL_WORLD_SIZE", 0))
        started = started or num_slurm_tasks() // config.trainer.num_nodes
        if asked not in ("auto", started):
            raise Refused(
                f"trainer.devices must be {started}, the processes that were started on this "
                f"machine, got {asked}; type trainer.devices={started}"
            )
        machines = ranks().size // started
        if config.trainer.num_nodes != machines:
            raise Refused(
                f"trainer.num_nodes must be {machines}, the machines on which processes were "
                f"started, got {config.trainer.num_nodes}; type trainer.num_nodes={machines}"
            )
        return started
    if asked != "auto":
        return int(asked)
    if is_single(config.strategy) or config.trainer.accelerator == "cpu":
        return 1
    with importing():
        import torch
    return max(1, torch.cuda.device_count())


def _refuse_without_gpu(config: Config) -> None:
    """Raise Refused where something needs a GPU and trainer.accelerator=auto finds none."""
    if config.trainer.accelerator != "auto":
        return
    try:
        config.changed({"trainer.accelerator": "cpu"})
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
