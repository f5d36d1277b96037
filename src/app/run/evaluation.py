"""Evaluating a trained run: its checkpoint, its configuration with other values, its metrics."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from app.cli.explained import explain, unknown_key
from app.config import ALWAYS_ON, Config, refuse_values
from app.errors import Refused
from app.process.files import replacing, write_json
from app.process.imports import importing
from app.process.intact import refuse_damaged
from app.process.targets import refuse_targets
from app.record.folder import RunFolder

KINDS: Mapping[Any, str] = {
    bool: "true or false",
    int | float: "a number",
    str: "a text",
    DictConfig: "a group",
    ListConfig: "a list",
}


def overridden(config: Mapping[str, Any], words: Sequence[str]) -> DictConfig:
    """The configuration of a run with other values.

    Raises Refused where one is no KEY=VALUE, its key is none of the run's, or its value of another
    kind.
    """
    found = OmegaConf.create(dict(config))
    for word in words:
        key, sign, _ = word.partition("=")
        parent = OmegaConf.select(found, key.rpartition(".")[0]) if "." in key else found
        known = [str(name) for name in parent] if isinstance(parent, DictConfig) else []
        if not sign:
            raise Refused(f"overrides must be KEY=VALUE, got {word}; type 'overrides=[\"seed=1\"]'")
        if key.rpartition(".")[2] not in known:
            raise Refused(unknown_key(key, [name for name in known if name[0] != "_"]))
        before = OmegaConf.select(found, key)
        value = OmegaConf.select(OmegaConf.from_dotlist([word]), key)
        kind = next((kind for kind in KINDS if isinstance(before, kind)), None)
        if kind is not None and value is not None and not isinstance(value, kind):
            raise Refused(
                f"{key} must be {KINDS[kind]}, as {before!s:.60} is, got {value}; leave it out"
            )
        OmegaConf.update(found, key, value)
    for group in dict.fromkeys(word.partition("=")[0].partition(".")[0] for word in words):
        _refuse_out_of_range(group, found[group])
    return found


def _refuse_out_of_range(group: str, chosen: Any) -> None:
    """Raise Refused where a group of a run has a value that its schema, if it has one, refuses."""
    if chosen is None and group in ALWAYS_ON:
        raise Refused(f"{group} must not be null; leave it out")
    schemas = ConfigStore.instance().repo["schema"]
    target = chosen.get("_target_") if isinstance(chosen, DictConfig) else None
    if target is None or group not in schemas:
        return
    schemas = schemas[group]
    for node in (schemas[preset].node for preset in schemas):
        if node.get("_target_") == target:
            try:
                typed = OmegaConf.create({group: OmegaConf.merge(node, chosen)})
                refuse_values(typed)
                OmegaConf.to_object(typed)
            except Refused:
                raise
            except OmegaConfBaseException as error:
                raise Refused(f"{group}.{explain(error)}") from None
            except ValueError as error:
                raise Refused(str(error)) from None
            return


def checkpoint_path(folder: RunFolder, checkpoint: str) -> Path:
    """The file that `checkpoint` means: the name of one of the run's, or a path.

    Raises Refused where there is none, or it is damaged, naming those that could be typed.
    """
    path = Path(checkpoint)
    if checkpoint in ("best", "last", *_names(folder)):
        path = folder.checkpoints / f"{checkpoint}.ckpt"
    if not path.exists():
        raise Refused(
            f"checkpoint must be best, last or the path of a checkpoint, got {checkpoint}: there "
            f"is no {path}; in this run there are: {', '.join(_names(folder)) or 'none'}"
        )
    if path.is_dir():
        raise Refused(
            f"checkpoint must be a file, got {path}, a folder that DeepSpeed wrote; make one of it "
            f"with python {path}/zero_to_fp32.py {path} weights.ckpt"
        )
    try:
        refuse_damaged(path)
    except Refused as refusal:
        whole = [name for name in _names(folder) if _is_whole(folder.checkpoints / f"{name}.ckpt")]
        instead = " or ".join(f"checkpoint={name}" for name in whole)
        hint = f"type {instead}" if whole else "no other one of this run is whole"
        raise Refused(f"{refusal}; {hint}") from None
    return path


def _names(folder: RunFolder) -> list[str]:
    return sorted(file.name[: -len(".ckpt")] for file in folder.checkpoints.glob("*.ckpt"))


def _is_whole(path: Path) -> bool:
    try:
        refuse_damaged(path)
    except Refused:
        return False
    return True


def evaluate(config: Config, folder: RunFolder, *, stage: str, checkpoint: Path) -> None:
    """Print the metrics and write them to `<stage>.json`, or predictions to `predictions.pt`."""
    with importing():
        import torch

        from app.run.build import (
            LOADERS_OF,
            build_callbacks,
            build_model_and_data,
            build_trainer,
            data_with,
            seed_all,
            technique_settings,
        )
        from app.run.checkpoint import Kept

    refuse_targets(config.plain | technique_settings(config))
    model, data = build_model_and_data(config)
    callbacks = build_callbacks({**(config.plain["callbacks"] or {}), "checkpoint": None})
    callbacks.append(Kept(dirpath=str(folder.checkpoints)))
    trainer = build_trainer(config, callbacks=callbacks, loggers=[])
    if data is not None:  # also a model with loaders of its own may ask it
        trainer.datamodule, data.trainer = data, trainer  # type: ignore[attr-defined]
    data = data_with(f"{LOADERS_OF.get(stage, stage)}_dataloader", model, data)
    seed_all(config.seed)
    # the techniques of the fit are not here: their work is in the weights
    warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")
    if stage == "predict":
        with _same_model(checkpoint):
            predictions = trainer.predict(model, datamodule=data, ckpt_path=checkpoint)
        path = folder.path / "predictions.pt"
        with replacing(path) as file:
            torch.save(predictions, file)
        print(path)
        return
    runner = trainer.test if stage == "test" else trainer.validate
    with _same_model(checkpoint):
        parts = runner(model, datamodule=data, ckpt_path=checkpoint, verbose=False)
    metrics = {name: value for part in parts for name, value in part.items()}
    path = folder.path / f"{stage}.json"
    write_json(path, {"checkpoint": folder.within(str(checkpoint)), "metrics": metrics})
    print("  ".join(f"{name} {value:.4g}" for name, value in sorted(metrics.items())))
    print(path)


@contextmanager
def _same_model(checkpoint: Path) -> Iterator[None]:
    """Raise Refused where torch says that the weights of a checkpoint are not the model's."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("Error(s) in loading state_dict"):
            raise
        words = " ".join(str(error).split())
        raise Refused(f"{checkpoint} is of another model: {words:.400}") from error
