"""From a configuration to the objects of a run: the only module that calls `instantiate`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.model_helpers import is_overridden

from app.accumulate import Accumulation
from app.config import SINGLE
from app.errors import Refused
from app.optim import configure_optimizers
from app.parallel.data_parallel import DataParallel
from app.process.targets import refuse_targets
from app.run.checkpoint import CheckpointFiles, Checkpoints
from app.run.metrics import AwaitedMetrics, StepMetrics, awaited_metrics
from app.run.resume import ExactResume
from app.run.trainer import Trainer

if TYPE_CHECKING:
    from app.sharing import Packs

TECHNIQUES = ("accumulate", "clip", "averaging")  # in the order in which they act on a step


@dataclass(kw_only=True)
class Run:
    """The objects of one run."""

    model: pl.LightningModule
    data: pl.LightningDataModule
    trainer: Trainer

    def metrics(self) -> dict[str, float]:
        """What the fit has measured last, also before it was continued."""
        resumes = [c for c in self.trainer.callbacks if isinstance(c, ExactResume)]
        before = resumes[0].metrics if resumes else {}
        now = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        return {**before, **now}

    def checkpoints(self) -> dict[str, str | None]:
        """Paths of the best and the last checkpoint; None where there is none."""
        keeper = self.trainer.checkpoint_callback
        if not isinstance(keeper, Checkpoints):
            return {"best": None, "last": None}
        last = str(keeper.last) if keeper.last.exists() else None
        return {"best": keeper.best_model_path or last, "last": last}

    def has_test(self) -> bool:
        """Whether the model has a test step, and it or the data a loader for it."""
        return _has_test(self.model, self.data)


def build(
    config: Mapping[str, Any],
    extra_callbacks: Sequence[pl.Callback],
    finders: Sequence[pl.Callback] = (),
) -> Run:
    """Build model, data, callbacks and trainer from a checked, resolved configuration.

    Args:
        extra_callbacks: act after the techniques, before the callbacks of the configuration.
        finders: act inside the fit, right after the techniques.

    Raises:
        Refused: where `model` or `data` is not a LightningModule or LightningDataModule.
        ValueError: where an `optimizer=` is chosen for a model that steps its own optimizers.
    """
    refuse_targets(config)
    model, data = build_model_and_data(config)
    if config["optimizer"] is not None:
        _replace_optimizers(model, config)
    _rewrite_forwards(model, config)
    parallel: list[DataParallel] = []
    if config["strategy"]["_target_"] != SINGLE:
        weighted = (config["accumulate"] or {}).get("weight_by") is None
        parallel.append(DataParallel(weighted=weighted))
        parallel[0].attach(data, model)
    resume = ExactResume()
    resume.attach(
        data if is_overridden("train_dataloader", data, pl.LightningDataModule) else model
    )
    techniques = [_make(config[group]) for group in TECHNIQUES if config[group] is not None]
    for technique in techniques:
        if isinstance(technique, Accumulation):
            technique.refuse_manual_optimization(model)
    loggers = [_make(logger) for logger in (config["logger"] or {}).values() if logger]
    callbacks = [
        *techniques,
        *finders,
        *parallel,
        StepMetrics(),
        AwaitedMetrics(awaited_metrics(config)),
        resume,
        *extra_callbacks,
        *build_callbacks(config),
    ]
    trainer = build_trainer(config, callbacks=callbacks, loggers=loggers)
    return Run(model=model, data=data, trainer=trainer)


def build_model_and_data(
    config: Mapping[str, Any],
) -> tuple[pl.LightningModule, pl.LightningDataModule]:
    """Seed all generators, then build what is trained; its data are shared, where that is chosen.

    Raises TypeError where one is not a LightningModule or LightningDataModule.
    """
    refuse_targets({group: config[group] for group in ("model", "data", "sharing")})
    seed_all(config)
    model, data = _make(config["model"]), _make(config["data"])
    for key, value, kind in (
        ("model", model, pl.LightningModule),
        ("data", data, pl.LightningDataModule),
    ):
        if not isinstance(value, kind):  # a function has made it
            raise Refused(
                f"{key}._target_ must make a {kind.__name__}, got {config[key]['_target_']}; type "
                f"{key}._target_=package.Class"
            )
    if config["sharing"] is not None:
        _make(config["sharing"]).attach(data, config)
    return model, data


def seed_all(config: Mapping[str, Any]) -> None:
    """Seed all generators: before anything is built, and before a test, which then draws the same
    numbers in a run that was cut, and in `app.evaluate`."""
    pl.seed_everything(config["seed"], workers=True, verbose=False)


def collect_shared_data(config: Mapping[str, Any], *, num_processes: int) -> "Packs | None":
    """The data as every rank will set them up, in shared memory; None where that is not chosen."""
    if config["sharing"] is None or config["sharing"]["_target_"] != "app.sharing.Shared":
        return None
    shared = _make(config["sharing"])
    model, data = build_model_and_data({**config, "sharing": None})
    stages = ["fit"]
    if config["test"] != "none" and _has_test(model, data):
        stages.append("test")
    packs: Packs = shared.collect(data, config, stages=stages, num_processes=num_processes)
    return packs


def build_callbacks(config: Mapping[str, Any]) -> list[pl.Callback]:
    """Build the group `callbacks`."""
    return [_make(callback) for callback in (config["callbacks"] or {}).values() if callback]


def build_trainer(
    config: Mapping[str, Any], *, callbacks: Sequence[pl.Callback], loggers: Sequence[Logger]
) -> Trainer:
    """Build the trainer around its callbacks and loggers."""
    has_bar = any(isinstance(callback, pl.callbacks.ProgressBar) for callback in callbacks)
    trainer: Trainer = instantiate(
        config["trainer"],
        strategy=_make(config["strategy"]),
        precision=config["precision"]["mode"],
        matmul=config["precision"]["matmul"],
        run_dir=Path(config["run_dir"]),
        callbacks=callbacks,
        loggers=loggers,
        checkpoint_io=CheckpointFiles(),
        enable_progress_bar=has_bar,
        _convert_="object",
    )
    return trainer


def _has_test(model: pl.LightningModule, data: pl.LightningDataModule) -> bool:
    loader = "test_dataloader"
    return is_overridden("test_step", model) and (
        is_overridden(loader, model) or is_overridden(loader, data, pl.LightningDataModule)
    )


def _make(config: Any) -> Any:
    return instantiate(config, _convert_="all")


def _replace_optimizers(model: pl.LightningModule, config: Mapping[str, Any]) -> None:
    if not model.automatic_optimization:
        raise Refused(
            f"optimizer cannot replace those of {type(model).__name__}, which steps its own "
            "(automatic_optimization=False); type optimizer=none"
        )
    schedule = None if config["scheduler"] is None else _make(config["scheduler"])
    model.configure_optimizers = partial(  # type: ignore[method-assign, assignment]
        configure_optimizers, model, _make(config["optimizer"]), schedule
    )


def _rewrite_forwards(model: pl.LightningModule, config: Mapping[str, Any]) -> None:
    """Checkpoint blocks, then compile: now, or when the model has made its layers."""
    steps = [_make(config["memory"]).apply] if config["memory"] is not None else []
    if config["compile"] is not None:
        accelerator = config["trainer"]["accelerator"]
        steps.append(partial(_make(config["compile"]).apply, accelerator=accelerator))
    if steps and is_overridden("configure_model", model):
        model.configure_model = partial(  # type: ignore[method-assign]
            _configure_model, model, model.configure_model, steps
        )
        return
    for step in steps:
        step(model)


def _configure_model(
    model: pl.LightningModule,
    configure: Callable[[], None],
    steps: Sequence[Callable[[pl.LightningModule], None]],
) -> None:
    configure()
    for step in steps:
        step(model)
