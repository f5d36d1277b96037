"""The finders: from a configuration to overrides, by way of throwaway runs."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from omegaconf import DictConfig

from app.build import build_model_and_data
from app.check import check
from app.tuner.answers import cache_key, read_tuned, searching, write_tuned
from app.tuner.batch_size import Prober
from app.tuner.keys import BATCH_SIZE_KEYS, LR_KEYS, tuned_key, typed, value_at, with_overrides
from app.tuner.lr import range_test
from app.tuner.lr_rules import suggest
from app.tuner.plots import draw_batch_size, draw_lr
from app.tuner.search import Trial, search_batch_size


def find(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """Search what the tuner of a composed configuration asks for; returns the overrides.

    Looks into the cache first. Writes `tuned.yaml`, and for each search a table and a plot, into
    `folder`, and prints the overrides as they are typed.
    """
    config = check(cfg)
    cache = config["tuner"]["cache"]
    if cache is None:
        return _search(cfg, folder)
    path = Path(cache) / f"{cache_key(config, device=device_name(config))}.yaml"
    with searching(path):
        if path.exists():
            overrides = read_tuned(path)
            print(f"tuner: {typed(overrides) or 'no change'}  (from {path})", flush=True)
        else:
            overrides = _search(cfg, folder)
            path.write_bytes((folder / "tuned.yaml").read_bytes())
    (folder / "tuned.yaml").write_bytes(path.read_bytes())
    return overrides


def device_name(config: Mapping[str, Any]) -> str:
    """The kind of device a run is on."""
    if config["trainer"]["accelerator"] != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return "cpu"


def _search(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    overrides: dict[str, Any] = {}
    provenance: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "device": device_name(check(cfg)),
        "torch": str(torch.__version__),
    }
    for finder in (find_batch_size, find_lr):
        found, about = finder(with_overrides(cfg, overrides), folder)
        overrides |= found
        provenance |= about
    write_tuned(folder / "tuned.yaml", overrides, provenance)
    print(f"tuner: {typed(overrides) or 'no change'}", flush=True)
    return overrides


def find_batch_size(cfg: DictConfig, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The micro-batch; nothing where its finder is off."""
    config = check(cfg)
    settings = config["tuner"]["batch_size"]
    if settings is None:
        return {}, {}
    key = tuned_key(
        config,
        chosen=settings["key"],
        candidates=BATCH_SIZE_KEYS,
        setting="tuner.batch_size.key",
    )
    prober = Prober(
        steps_per_trial=settings["steps_per_trial"],
        memory_fraction=settings["memory_fraction"],
        with_size=lambda size: check(with_overrides(cfg, {key: size})),
    )
    capacity = prober.capacity_bytes
    mode = settings["mode"]
    if mode == "auto":
        mode = "binsearch" if capacity is None else "model"

    def probe(size: int) -> Trial:
        trial = prober(size)
        rate = "" if trial.samples_per_s is None else f"  {trial.samples_per_s:,.0f} samples/s"
        memory = "" if trial.peak_bytes is None else f"  {trial.peak_bytes / 2**30:.2f} GiB"
        fits = "fits" if trial.fits else "does not fit"
        print(f"tuner: {key}={size} {fits}{memory}{rate}", flush=True)
        return trial

    bound, why = largest_allowed(config, settings)
    answer = search_batch_size(
        probe,
        mode=mode,
        init_val=min(settings["init_val"], bound),
        max_val=bound,
        num_samples=None,  # in the bound
        divisors_of=value_at(config, "accumulate.batch_size"),
        max_trials=settings["max_trials"],
        margin=settings["margin"],
        capacity_bytes=capacity,
        goal=settings["goal"],
        provoke=True,
    )
    reason = why if answer.size == bound else answer.reason
    print(f"tuner: {key}={answer.size}: {reason}", flush=True)
    draw_batch_size(answer, key=key, path=folder / "batch_size")
    about = {"batch_size": {"mode": mode, "trials": len(answer.trials), "reason": reason}}
    return {key: answer.size}, about


def largest_allowed(config: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[int, str]:
    """The largest micro-batch that is allowed, and why."""
    bounds = []
    if settings["max_val"] is not None:
        bounds.append((settings["max_val"], "tuner.batch_size.max_val is reached"))
    samples = num_samples(config)
    if samples is not None:
        size = max(1, samples // settings["min_batches"])
        bounds.append(
            (
                size,
                f"the data set has {samples} samples, and an epoch at least "
                f"tuner.batch_size.min_batches={settings['min_batches']} micro-batches",
            )
        )
    return min(bounds, default=(8192, "a data set without a length ends the search at 8192"))


def num_samples(config: Mapping[str, Any]) -> int | None:
    """Samples of the largest training data set; None where it has no length."""
    model, data = build_model_and_data(config)
    source: pl.LightningDataModule | pl.LightningModule = model
    if is_overridden("train_dataloader", data, pl.LightningDataModule):
        source = data
    data.prepare_data()
    data.setup("fit")
    loaders = source.train_dataloader()
    if not isinstance(loaders, CombinedLoader):
        loaders = CombinedLoader(loaders, "max_size_cycle")
    lengths = []
    for loader in loaders.flattened:
        try:
            lengths.append(len(loader.dataset))
        except (AttributeError, TypeError):
            return None
    return max(lengths)


def find_lr(cfg: DictConfig, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The learning rate, or one for each key; nothing where its finder is off or in doubt."""
    config = check(cfg)
    settings = config["tuner"]["lr"]
    if settings is None:
        return {}, {}
    chosen = settings["key"]
    several = isinstance(chosen, list)
    overrides: dict[str, Any] = {}
    about: dict[str, Any] = {}
    for position, candidate in enumerate(chosen if several else [chosen]):
        key = tuned_key(config, chosen=candidate, candidates=LR_KEYS, setting="tuner.lr.key")
        lrs, losses = range_test(
            config,
            settings=settings,
            base=float(value_at(config, key)),
            optimizer=position if several else None,
            callbacks=[],
        )
        found = suggest(lrs, losses, rule=settings["rule"], beta=settings["smoothing"])
        name = f"lr_find_{position}" if several else "lr_find"
        draw_lr(lrs, losses, found, key=key, beta=settings["smoothing"], path=folder / name)
        if found.doubt is not None:
            print(f"tuner: {key}: {found.doubt}", flush=True)
        if found.lr is not None and (found.doubt is None or settings["on_doubt"] == "use"):
            overrides[key] = float(f"{found.lr:.3g}")
        about[f"lr {key}"] = {"steps": len(losses), "rules": found.by_rule, "doubt": found.doubt}
    return overrides, about
