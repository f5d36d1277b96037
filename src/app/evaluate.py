"""Evaluates a trained run: `python -m app.evaluate run=runs/mine stage=test`."""

from pathlib import Path

from omegaconf import DictConfig

from app import cli
from app.config import SINGLE, check, of_a_run, with_overrides
from app.errors import Refused
from app.process.imports import importing
from app.record.folder import RunFolder
from app.run.evaluation import checkpoint_path, evaluate, overridden


def main(cfg: DictConfig) -> None:
    """Restore a checkpoint of the run and test, validate or predict with it."""
    settings = check(cfg)
    folder = RunFolder(Path(cfg.run))
    config = folder.read_config()
    if config is None:
        raise Refused(f"run must be the folder of a run, got {cfg.run}: it has no config.yaml")
    changed = overridden(config, list(cfg.overrides))
    # one device sees every sample once, and any strategy's checkpoint is of whole tensors
    changed.strategy = {"_target_": SINGLE}
    checkpoint = checkpoint_path(folder, cfg.checkpoint)
    if settings.tuner is not None:
        with importing():
            from app.tuner.find import find_eval_batch_size
        overrides = find_eval_batch_size(
            of_a_run(changed), settings.tuner.batch_size, stage=cfg.stage.value
        )
        changed = with_overrides(changed, overrides)
    evaluate(of_a_run(changed), folder, stage=cfg.stage.value, checkpoint=checkpoint)


if __name__ == "__main__":
    cli.main(main, "evaluate", __doc__)
