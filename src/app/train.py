"""Trains one run: `python -m app.train averaging=ema clip=value`."""

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from app import cli
from app.errors import Refused


def main(cfg: DictConfig) -> float | None:
    """Check the configuration, then train, test and leave the result in the run's folder.

    Returns the value of `objective`, which a sweeper of Hydra asks for; None where it is null.
    """
    from app.config import is_slurm
    from app.fit import objective, run  # here: what only shows a configuration needs none of it
    from app.record.folder import RunFolder

    hydra = HydraConfig.get()
    for group in ("launch", "sweep"):
        if hydra.runtime.choices.get(group) == "none":
            cfg[group] = None  # also where the file of a sweep has settings for it
    if cfg.sweep is not None and hydra.mode is RunMode.RUN:
        RunFolder(Path(cfg.run_dir)).remove_if_empty()
        raise Refused(
            "sweep=optuna chooses the jobs of a sweep, and this is one run; type -m as well, or "
            "sweep=none"
        )
    typed = list(hydra.overrides.task)
    if is_slurm(cfg.launch):
        from app.sweep.cluster import submit_run

        return submit_run(cfg, typed)
    result = run(cfg, typed=typed)
    return None if result is None else objective(cfg.objective, result["metrics"])


def completed(cfg: DictConfig) -> DictConfig:
    """A configuration as it is shown, with what classes of the user's say of their arguments."""
    from app.begin.defaults import completed as with_defaults

    return with_defaults(cfg)


if __name__ == "__main__":
    cli.main(main, "train", __doc__, completed)
