"""Trains one run: `python -m app.train averaging=ema clip=value`."""

import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from app import cli
from app.check import check
from app.folder import RunFolder
from app.imports import importing
from app.tuner.answers import recalled
from app.tuner.keys import startable, with_overrides


def main(cfg: DictConfig) -> None:
    """Check the configuration, then train, test and leave the result in the run's folder."""
    try:
        cfg = startable(cfg)
        config = check(cfg)
    except ValueError:
        RunFolder(Path(cfg.run_dir)).remove_if_empty()
        raise
    folder = RunFolder(Path(config["run_dir"]))
    with folder.locked():
        if config["resume"] == "never":
            folder.move_aside()
        tuned = recalled(config, folder.path)
        if tuned is not None:
            config = check(with_overrides(cfg, tuned))
        folder.refuse_changes(config)
        result = folder.read_result()
        if result is not None and result["status"] == "finished":
            print(f"{folder.path} is finished; see {folder.result_path}")
            return
        if tuned is None and config["tuner"] is not None:
            with importing():
                from app.tuner.find import find
            config = check(with_overrides(cfg, find(cfg, folder.path)))
        if config["fit"]:
            folder.write_config(config, list(HydraConfig.get().overrides.task))
            train(config, folder)


def train(config: Mapping[str, Any], folder: RunFolder) -> dict[str, Any]:
    """Fit and test; returns the content of result.json, which is written also on a failure."""
    with importing():
        from lightning.pytorch.utilities.exceptions import SIGTERMException

        from app.build import build
        from app.checkpoint import newest_intact
        from app.progress import StartTable
        from app.record import Record, draw_curves
    record = Record(config, folder)
    with record.kept():
        with record.phase("build"):
            start = StartTable(config)
            run = build(config, [start])
        checkpoint = newest_intact(folder.checkpoints)
        if checkpoint is not None:
            print(f"continuing from {checkpoint}", flush=True)
        with record.phase("fit"):
            try:
                run.trainer.fit(run.model, datamodule=run.data, ckpt_path=checkpoint)
            except (KeyboardInterrupt, SystemExit) as stop:
                print(f"\ninterrupted; to go on type the same with name={config['name']}")
                # Lightning says 1 and 0; a shell says 128 and the signal
                signum = signal.SIGTERM if isinstance(stop, SIGTERMException) else signal.SIGINT
                raise SystemExit(128 + signum) from stop
        record.content |= {
            "metrics": {name: float(v) for name, v in run.trainer.callback_metrics.items()},
            "optimizer_steps": run.trainer.global_step,
            "epochs": run.trainer.current_epoch,
            "batch": start.batch,
            "checkpoints": run.checkpoints(),
        }
        if config["test"] != "none" and run.has_test():
            path = record.content["checkpoints"][config["test"]]
            with record.phase("test"):
                metrics = run.trainer.test(
                    run.model, datamodule=run.data, ckpt_path=path, verbose=False
                )
            for name, value in (item for part in metrics for item in part.items()):
                record.content["metrics"][name] = value
        with record.phase("curves"):
            draw_curves(folder.path / "metrics.csv", folder.path / "curves.png")
    text = "  ".join(f"{k} {v:.4g}" for k, v in sorted(record.content["metrics"].items()))
    print(f"finished  {text}\n{folder.result_path}")
    return record.content


if __name__ == "__main__":
    cli.main(main, "train", __doc__)
