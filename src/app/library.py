"""Techniques and runs from Python, of the same presets: what `app.callbacks` and `app.run` do."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hydra import compose, initialize_config_module, version
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from app import cli, fit
from app.cli.explained import explain, is_told_in_a_line
from app.config import check
from app.errors import Refused
from app.process.intact import refuse_damaged

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule

AS_CALLBACKS = ("accumulate", "clip", "averaging", "callbacks")
"""Groups that act in any Trainer."""

OF_A_TRAINER = ("checkpoint", "progress")
"""Callbacks of ours that a Trainer has its own in place of."""

ANYBODYS = ("run_dir=.", "name=callbacks", "model=custom", "optimizer=none", "data=none",
            "model._target_=lightning.pytorch.LightningModule", "clip=none", "callbacks=none",
            "logger=none", "trainer.max_epochs=1000000")  # fmt: skip
"""A run of which nothing is known but what is typed."""


def callbacks(*overrides: str, config_dir: str | Path | None = None) -> "list[Callback]":
    """See `app.callbacks`."""
    for word in overrides:
        group, key = (*_key(word).split("."), "")[:2]
        if group not in AS_CALLBACKS or (group == "callbacks" and key in OF_A_TRAINER):
            raise Refused(
                f"app.callbacks takes {', '.join(AS_CALLBACKS)}, which act in any Trainer, got "
                f"{word}; give it to your own Trainer or module, or type app.run({word!r}, "
                "model=..., data=...)"
            )
    with _in_a_line():
        config = check(_composed([*ANYBODYS, *overrides], config_dir))
        from app.clip import Clip  # not `importing`: the program's own log stays as it is
        from app.run.build import build_callbacks, build_techniques
        from app.run.guest import Guest
        from app.run.raw import ClipsRaw

        chosen = {
            name: one
            for name, one in (config.plain["callbacks"] or {}).items()
            if name not in OF_A_TRAINER
        }
        techniques = build_techniques(config)
        raw = [ClipsRaw(one) for one in techniques if isinstance(one, Clip)]
        return [*techniques, *raw, Guest(), *build_callbacks(chosen)]


def run(
    *overrides: str,
    model: Any = None,
    data: Any = None,
    name: str | None = None,
    config_dir: str | Path | None = None,
) -> dict[str, Any] | None:
    """See `app.run`."""
    for word in overrides:
        if _key(word).partition(".")[0] in ("hydra", "launch", "sweep"):
            raise Refused(
                f"app.run takes what is of one run, got {word}; leave it out, or type python -m "
                "app.train"
            )
    words = ["run_dir='runs/${run_name:${name}}'"]
    objects = {}
    for group, given in {"model": model, "data": data}.items():
        if given is not None:
            words += _chosen(group, given, overrides)
            if not inspect.isclass(given):
                objects[group] = given
    if model is not None and data is None:
        words.append("data=none")
    with _in_a_line():
        cfg = _composed([*words, *overrides], config_dir)
        if name is not None:
            cfg.name = name
        if objects:
            _refuse_beside_objects(cfg, objects, overrides)
        result = fit.run(cfg, typed=overrides, objects=objects)
    if result is not None and "model" in objects:
        _deliver(model, Path(cfg.run_dir), result["checkpoints"], cfg.test)
    return result


def an_object(*, of: str) -> NoReturn:
    """What stands in config.yaml for an object: raises Refused, as it cannot be made again."""
    raise Refused(
        f"this run was given an object of {of}, which no command can make again; type "
        "app.run(name=..., model=..., data=...) with such an object, which then gets the weights "
        f"of the run, or train with _target_={of}"
    )


def _key(word: str) -> str:
    if not isinstance(word, str):
        raise Refused(
            f"what is typed must be texts such as 'averaging=ema', got a {type(word).__name__}; "
            "objects are given by name: app.run(model=..., data=...)"
        )
    return word.lstrip("+~").partition("=")[0].partition("@")[0]


def _composed(words: Sequence[str], config_dir: str | Path | None) -> DictConfig:
    """What the command line composes, also in a program that Hydra has started."""
    if config_dir is not None:
        words = [f"hydra.searchpath=['file://{Path(config_dir).absolute()}']", *words]
        if not Path(config_dir).is_dir():
            raise Refused(f"config_dir must be a folder of presets, got {config_dir}; leave it out")
    theirs, base = GlobalHydra.instance().hydra, version.getbase()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module("app.conf", version_base=cli.VERSION_BASE):
            cfg = compose("train", list(words))
    except Exception as error:  # all are of what was typed
        raise Refused(explain(error, [str(config_dir), *words])) from error
    finally:
        GlobalHydra.instance().hydra = theirs
        if isinstance(base, type(version.getbase())):
            version.setbase(str(base))
    return cfg


@contextmanager
def _in_a_line() -> Iterator[None]:
    """Raise Refused, with what the command line would print, where what was typed is wrong."""
    try:
        yield
    except Refused:
        raise
    except Exception as error:
        if is_told_in_a_line(error):
            raise Refused(explain(error)) from error
        raise


def _chosen(group: str, given: Any, overrides: Sequence[str]) -> list[str]:
    """What would be typed for a model or data that a program has, or has the class of."""
    import lightning.pytorch as pl

    base: Any = pl.LightningModule if group == "model" else pl.LightningDataModule
    kind = given if inspect.isclass(given) else type(given)
    named = f"{kind.__module__}.{kind.__qualname__}"
    if not issubclass(kind, base):
        more = "; type data=LightningDataModule.from_datasets(...)" if group == "data" else ""
        raise Refused(f"{group} must be a lightning.pytorch.{base.__name__}, got {named}{more}")
    if any(_key(word) == group for word in overrides):
        raise Refused(f"{group} is given, and {group}= typed as well; leave one of them out")
    words = [f"{group}=custom"]
    if inspect.isclass(given):
        words += [f"{group}._target_={named}"]
    else:
        words += [f"{group}._target_={__name__}.an_object", f"+{group}.of='{named}'"]
    if group == "model" and _has_own(kind, base, "configure_optimizers"):
        words.append("optimizer=none")
    return words


def _has_own(kind: Any, base: Any, name: str) -> bool:
    return getattr(kind, name) is not getattr(base, name)


def _refuse_beside_objects(
    cfg: DictConfig, objects: Mapping[str, Any], overrides: Sequence[str]
) -> None:
    """Raise Refused where something makes model or data anew, with other values."""
    tuner, classes = cfg.tuner, {group: type(one).__name__ for group, one in objects.items()}
    for word in overrides:
        group, _, name = _key(word).partition(".")
        if group in objects and name:
            raise Refused(
                f"{word} is an argument of a class, and {group} was given as an object; give the "
                f"class: {group}={classes[group]}"
            )
    for key, is_on in (
        ("link", cfg.link),
        ("sharing", cfg.sharing is not None and "data" in objects),
        ("tuner.batch_size", tuner is not None and tuner.batch_size is not None),
        ("tuner.lr", tuner is not None and tuner.lr is not None and cfg.optimizer is None),
        ("tuner.milestones", tuner is not None and tuner.milestones),
    ):
        if is_on:
            raise Refused(
                f"{key} makes {' and '.join(objects)} anew, with other values, and was given an "
                "object; give the class and what it takes: "
                + ", ".join(
                    f"{group}={name}, '{group}.KEY=VALUE'" for group, name in classes.items()
                )
            )
    if tuner is not None:
        tuner.cache = None  # nothing tells one object from another


def _deliver(
    model: "LightningModule", folder: Path, kept: Mapping[str, str | None], test: str
) -> None:
    """Give a model the weights that its run delivers, also where other processes trained."""
    import torch

    chosen = kept["last"] if test == "last" else kept["best"] or kept["last"]
    if chosen is None or (folder / chosen).is_dir():  # DeepSpeed's
        return
    refuse_damaged(folder / chosen)
    checkpoint = torch.load(folder / chosen, map_location="cpu", weights_only=True)
    model.configure_model()
    model.on_load_checkpoint(checkpoint)
    model.load_state_dict(checkpoint["state_dict"], strict=model.strict_loading)
