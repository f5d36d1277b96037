"""From a configuration to the objects of a run: the only module that calls `instantiate`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden

from app.accumulate import Accumulation
from app.begin.weights import InitialWeights, initial_weights
from app.cli.presets import conf_folder
from app.clip import Clip
from app.config import Config, is_single
from app.errors import Refused
from app.optim import Schedules, configure_optimizers, optimizer_of, schedule_of
from app.parallel.data_parallel import DataParallel
from app.parallel.sharded import Sharded
from app.parallel.split import each, in_order
from app.process.files import read_yaml
from app.process.targets import refuse_targets, taken, with_members
from app.record.loggers import MetricsCsv, NoLogger
from app.record.metrics import AwaitedMetrics, StepMetrics, awaited_metrics
from app.resume.exact import ExactResume
from app.resume.hooks import DataHooks
from app.resume.position import refuse_empty
from app.run.beside import checked, refuse_beside, refuse_lightnings
from app.run.checkpoint import CheckpointFiles, Checkpoints
from app.run.measured import Measured, keeper, measured
from app.run.progress import with_one_bar
from app.run.raw import ClipsRaw
from app.run.trainer import Trainer

if TYPE_CHECKING:
    from app.sharing import Packs

TECHNIQUES = ("accumulate", "clip", "averaging")  # in the order in which they act on a step


LOADERS_OF = {"validate": "val"}
"""What the stages' loaders are called, where not as the stage."""


@dataclass(kw_only=True)
class Run:
    """The objects of one run."""

    model: pl.LightningModule
    data: pl.LightningDataModule | None
    trainer: Trainer
    hooks: DataHooks
    initial: InitialWeights | None

    def measured(self, checkpoint: str | None) -> dict[str, Any]:
        """What the fit has measured, also before it was continued; see `run.measured`."""
        resumes = [c for c in self.trainer.callbacks if isinstance(c, ExactResume)]
        return measured(self.trainer, resumes[0].metrics if resumes else {}, checkpoint)

    def checkpoints(self) -> dict[str, str | None]:
        """Paths of the best and the last checkpoint; None where there is none."""
        kept = keeper(self.trainer)
        if isinstance(kept, Checkpoints):
            last = str(kept.last) if kept.last.exists() else None
        else:
            last = getattr(kept, "last_model_path", None) or None
        return {"best": getattr(kept, "best_model_path", None) or last, "last": last}

    def top(self) -> dict[str, float]:
        """Paths and scores of the best checkpoints that are kept beside best.ckpt."""
        return dict(getattr(keeper(self.trainer), "best_k_models", {}))

    def refuse_untrained(self) -> None:
        """Raise Refused after a fit that has not trained on a single batch."""
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
        if progress.started == 0 and self.trainer.max_steps != 0 and self.trainer.max_epochs != 0:
            raise Refused(
                f"{type(self.model).__name__} was trained on no batch: each one that "
                "train_dataloader served was None; return at least one in an epoch"
            )

    def has_test(self) -> bool:
        """Whether the model has a test step, and it or the data a loader for it."""
        return _has_test(self.model, self.data)

    def test(self, checkpoint: str | None) -> dict[str, float]:
        """Test a checkpoint; the metrics."""
        source = data_with("test_dataloader", self.model, self.data)
        parts = self.trainer.test(
            self.model, datamodule=source, ckpt_path=checkpoint, verbose=False
        )
        return {name: value for part in parts for name, value in part.items()}


def build(
    config: Config,
    extra_callbacks: Sequence[pl.Callback],
    finders: Sequence[pl.Callback] = (),
    techniques: Sequence[pl.Callback] | None = None,
    served: Callable[[Any], Any] | None = None,
) -> Run:
    """Build model, data, callbacks and trainer from a checked, resolved configuration.

    Args:
        extra_callbacks: act after the techniques, before the callbacks of the configuration.
        finders: act inside the fit, right after the techniques.
        techniques: in place of those of the configuration, as `build_techniques` makes them.
        served: changes what `train_dataloader` returns, before it is made to find its place again.

    Raises:
        Refused: where `model` or `data` is not a LightningModule or LightningDataModule.
        ValueError: where an `optimizer=` is chosen for a model that steps its own optimizers.
    """
    refuse_targets(config.plain | technique_settings(config))
    model, data, hooks = _make_model_and_data(config)
    if config.optimizer is not None:
        _replace_optimizers(model, hooks, config.plain)
    initial = initial_weights(config)
    if initial is not None:
        make = partial(initial.before, model, model.configure_optimizers)
        hooks.in_place_of("configure_optimizers", make)
    _rewrite_forwards(model, hooks, config.plain)
    parallel: list[DataParallel] = []
    if techniques is None:
        techniques = build_techniques(config)
        for technique in techniques:
            refuse_lightnings("accumulate, clip and averaging", technique)
    if config.plain["trainer"]["overfit_batches"] is not None:
        fitted = ("train_dataloader", "val_dataloader")
        hooks.around_loaders(lambda name, of: each(in_order, of) if name in fitted else of)
    if not is_single(config.strategy):
        weighted = all(getattr(one, "weight_by", None) is None for one in techniques)
        accumulates = any(isinstance(one, Accumulation) for one in techniques)
        parallel.append(DataParallel(weighted=weighted, accumulates=accumulates))
        hooks.around_loaders(parallel[0].loaders)
        hooks.in_place_of("log", parallel[0].log(model, model.log))
    hooks.around_training(partial(refuse_empty, limit=config.train_limit))
    if served is not None:
        hooks.around_training(served)
    resume = ExactResume(parallel[0].fillers if parallel else None)
    hooks.while_training_is_made(resume.making)
    hooks.around_training(resume.resumable)
    begin = partial(resume.begin_epoch, model, model.on_train_epoch_start)
    hooks.in_place_of("on_train_epoch_start", begin)
    for technique in techniques:
        if isinstance(technique, Accumulation):
            technique.refuse_manual_optimization(model)
    made = [
        _made(f"logger.{name}", logger, Logger, NoneType, save_dir=config.run_dir)
        for name, logger in (config.plain["logger"] or {}).items()
        if logger
    ]
    loggers = [logger for logger in made if logger is not None]
    loggers.sort(key=lambda logger: isinstance(logger, MetricsCsv))  # the first is `self.logger`
    chosen = {
        f"callbacks.{name}": _made(f"callbacks.{name}", callback, pl.Callback)
        for name, callback in (config.plain["callbacks"] or {}).items()
        if callback
    }
    keepers = (one for one in chosen.values() if isinstance(one, Checkpoints))
    dirpath = next((str(keeper.directory) for keeper in keepers), None)
    refuse_beside(chosen, dirpath=dirpath)
    if is_overridden("configure_callbacks", model):
        make = partial(checked, model.configure_callbacks, model=model, dirpath=dirpath)
        hooks.in_place_of("configure_callbacks", make)
    callbacks = [
        *techniques,
        *(ClipsRaw(one) for one in techniques if isinstance(one, Clip)),
        *finders,
        *parallel,
        StepMetrics(),
        Measured(),
        AwaitedMetrics(awaited_metrics(config.plain)),
        resume,
        Schedules(),
        *extra_callbacks,
        *chosen.values(),
    ]
    trainer = build_trainer(config, callbacks=callbacks, loggers=loggers)
    return Run(model=model, data=data, trainer=trainer, hooks=hooks, initial=initial)


def build_techniques(config: Config) -> list[pl.Callback]:
    """The techniques that act on a step, in their order.

    Raises Refused where one is no callback.
    """
    found = []
    for group, chosen in technique_settings(config).items():
        refuse_targets({group: chosen})
        one = _make(chosen)
        one = one() if isinstance(one, partial) else one
        if not isinstance(one, pl.Callback):
            raise Refused(
                f"{group}._target_ must make a Callback, got {chosen['_target_']}, which makes a "
                f"{type(one).__name__}; type {group}._target_=package.Class"
            )
        found.append(one)
    return found


def technique_settings(config: Config) -> dict[str, Any]:
    """What the techniques are made of, by group; to a class of the user's is given, of what all
    presets of the group have in common, what it takes."""
    found = {}
    for group in TECHNIQUES:
        chosen = config.plain[group]
        if chosen is not None and not chosen["_target_"].startswith("app."):
            common = read_yaml(conf_folder() / group / "parts" / "common.yaml")
            chosen = taken(group, chosen, common or {})
        if chosen is not None:
            found[group] = chosen
    return found


def holds_whole_model(config: Config) -> bool:
    """Whether each rank has all weights, so that it can take its steps alone."""
    strategy = _make(config.plain["strategy"])
    shards = isinstance(strategy, DeepSpeedStrategy | Sharded)
    is_ddp = isinstance(strategy, DDPStrategy) and not shards
    return strategy == "auto" or is_ddp


def build_model_and_data(
    config: Config,
) -> tuple[pl.LightningModule, pl.LightningDataModule | None]:
    """Seed all generators, then build what is trained; its data are shared, where that is chosen.

    Raises Refused where one is not a LightningModule or LightningDataModule.
    """
    model, data, _ = _make_model_and_data(config)
    return model, data


def _make_model_and_data(
    config: Config,
) -> tuple[pl.LightningModule, pl.LightningDataModule | None, DataHooks]:
    refuse_targets({group: config.plain[group] for group in ("model", "data", "sharing")})
    seed_all(config.seed)
    model, data = (
        config.objects[group] if group in config.objects else _make(config.plain[group])
        for group in ("model", "data")
    )
    for key, value, kind in (
        ("model", model, pl.LightningModule),
        ("data", data, pl.LightningDataModule),
    ):
        if config.plain[key] is not None and not isinstance(value, kind):  # a function has made it
            made_by = config.plain[key]["_target_"]
            raise Refused(
                f"{key}._target_ must make a {kind.__name__}, got {made_by}; type "
                f"{key}._target_=package.Class"
            )
    if data is None and not is_overridden("train_dataloader", model):
        raise Refused(
            f"data=none needs a model with loaders of its own, and {type(model).__name__} has no "
            "train_dataloader; type data=custom data._target_=package.Class"
        )
    hooks = DataHooks(model, data)
    if config.sharing is not None and data is not None:
        _make(config.plain["sharing"]).attach(data, config.plain)
    return model, data, hooks


def set_up(data: Mapping[str, Any], *, seed: int) -> pl.LightningDataModule:
    """Data, made and set up as for a fit, of which a configuration is to learn."""
    refuse_targets({"data": data})
    seed_all(seed)
    made: pl.LightningDataModule = _made("data", data, pl.LightningDataModule)
    made.prepare_data()
    made.setup("fit")
    return made


def seed_all(seed: int) -> None:
    """Seed all generators: before anything is built, and before a test, which then draws the same
    numbers in a run that was cut, and in `app.evaluate`."""
    pl.seed_everything(seed, workers=True, verbose=False)


def collect_shared_data(config: Config, *, num_processes: int) -> "Packs | None":
    """The data as every rank will set them up, in shared memory; None where that is not chosen."""
    sharing = None if config.sharing is None else _make(config.plain["sharing"])
    if sharing is None or config.data is None or not sharing.collects_before_start:
        return None
    model, data = build_model_and_data(config.but(sharing=None))
    stages = ["fit"]
    if config.test != "none" and _has_test(model, data):
        stages.append("test")
    assert data is not None
    packs: Packs = sharing.collect(data, config.plain, stages=stages, num_processes=num_processes)
    return packs


def build_callbacks(chosen: Mapping[str, Any] | None) -> list[pl.Callback]:
    """Build the group `callbacks`."""
    return [
        _made(f"callbacks.{name}", callback, pl.Callback)
        for name, callback in (chosen or {}).items()
        if callback
    ]


def build_trainer(
    config: Config, *, callbacks: Sequence[pl.Callback], loggers: Sequence[Logger]
) -> Trainer:
    """Build the trainer around its callbacks and loggers; without one, a NoLogger stands there:
    models rely on `self.logger`."""
    callbacks = with_one_bar(callbacks)
    has_bar = any(isinstance(callback, pl.callbacks.ProgressBar) for callback in callbacks)
    make = instantiate(config.plain["trainer"], _convert_="object", _partial_=True)
    trainer: Trainer = make(  # given to `instantiate`, a callback that is a dataclass is copied
        strategy=_make(config.plain["strategy"]),
        precision=config.plain["precision"]["mode"],
        matmul=config.plain["precision"]["matmul"],
        run_dir=Path(config.run_dir),
        callbacks=callbacks,
        loggers=loggers or [NoLogger(save_dir=config.run_dir)],
        checkpoint_io=CheckpointFiles(),
        enable_progress_bar=has_bar,
    )
    return trainer


def _has_test(model: pl.LightningModule, data: pl.LightningDataModule | None) -> bool:
    loader = "test_dataloader"
    return is_overridden("test_step", model) and (
        is_overridden(loader, model) or is_overridden(loader, data, pl.LightningDataModule)
    )


def data_with(
    loader: str, model: pl.LightningModule, data: pl.LightningDataModule | None
) -> pl.LightningDataModule | None:
    """What Lightning is to ask for a loader: the data, or None where only the model has it."""
    if is_overridden(loader, data, pl.LightningDataModule) or not is_overridden(loader, model):
        return data
    return None


def _make(config: Any) -> Any:
    """What a class makes. Raises what its constructor raises, not Hydra's words for it."""
    try:
        return instantiate(with_members(config), _convert_=(config or {}).get("_convert_", "all"))
    except InstantiationException as error:
        cause: BaseException = error
        while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
            cause = cause.__cause__  # of a class that builds its parts the same way, too
        if cause is error:
            raise
    target, called = config["_target_"], cause.__traceback__
    if isinstance(cause, TypeError) and called is not None and called.tb_next is None:
        raise Refused(f"{target} cannot be built: {cause}; mend it, or name another class")
    is_of_dict = isinstance(cause, AttributeError) and type(cause.obj) is dict
    hint = "; it gets dicts: for configurations of OmegaConf add _convert_=none to its keys"
    cause.add_note(f"while {target} was built{hint if is_of_dict else ''}")
    raise cause


def _made(key: str, config: Mapping[str, Any], *kinds: type, **given: Any) -> Any:
    """What a key names; of a `_partial_`, with what is given, as far as it takes that.

    Raises Refused where a function has made something else of it.
    """
    one, name = _make(config), kinds[0].__name__
    if isinstance(one, partial):
        known = signature(one).parameters.keys() - one.keywords.keys()
        one = one(**{name: value for name, value in given.items() if name in known})
    if not isinstance(one, kinds):
        refuse_lightnings(key, one)
        what = f"{type(one).__module__}.{type(one).__qualname__}".removeprefix("builtins.")
        raise Refused(
            f"{key}._target_ must make a {name}, got {config['_target_']}, which makes a {what}; "
            f"type a key for each: +{key}._target_=package.Class"
        )
    return one


def _replace_optimizers(
    model: pl.LightningModule, hooks: DataHooks, config: Mapping[str, Any]
) -> None:
    if not model.automatic_optimization:
        raise Refused(
            f"optimizer cannot replace those of {type(model).__name__}, which steps its own "
            "(automatic_optimization=False); type optimizer=none"
        )
    optimizer, grouping = optimizer_of(config["optimizer"], _make)
    schedule = None if config["scheduler"] is None else schedule_of(config["scheduler"], _make)
    make = partial(configure_optimizers, model, optimizer, schedule, grouping)
    hooks.in_place_of("configure_optimizers", make)


def _rewrite_forwards(
    model: pl.LightningModule, hooks: DataHooks, config: Mapping[str, Any]
) -> None:
    """Checkpoint blocks, then compile: now, or when the model has made its layers."""
    steps = [_make(config["memory"]).apply] if config["memory"] is not None else []
    if config["compile"] is not None:
        accelerator = config["trainer"]["accelerator"]
        steps.append(partial(_make(config["compile"]).apply, accelerator=accelerator))
    if steps and is_overridden("configure_model", model):
        make = partial(_configure_model, model, model.configure_model, steps)
        hooks.in_place_of("configure_model", make)
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
