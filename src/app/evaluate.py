"""Evaluates a trained run: `python -m app.evaluate run=runs/mine stage=test`."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from app import cli
from app.config import check
from app.errors import Refused
from app.process.imports import importing
from app.run.evaluation import checkpoint_path, evaluate, overridden
from app.run.folder import RunFolder
from app.tuner.keys import with_overrides


def main(cfg: DictConfig) -> None:
    """Restore a checkpoint of the run and test, validate or predict with it."""
    settings = check(cfg)
    folder = RunFolder(Path(cfg.run))
    config = folder.read_config()
    if config is None:
        raise Refused(f"run must be the folder of a run, got {cfg.run}: it has no config.yaml")
    changed = overridden(config, list(cfg.overrides))
    checkpoint = checkpoint_path(folder, cfg.checkpoint)
    if settings["tuner"] is not None:
        with importing():
            from app.tuner.find import find_eval_batch_size
        overrides = find_eval_batch_size(
            changed, settings["tuner"]["batch_size"], stage=settings["stage"]
        )
        changed = with_overrides(changed, overrides)
    evaluate(
        OmegaConf.to_container(changed), folder, stage=settings["stage"], checkpoint=checkpoint
    )


if __name__ == "__main__":
    cli.main(main, "evaluate", __doc__)
