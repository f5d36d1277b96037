"""The finders: from a configuration to overrides, by way of throwaway runs."""

import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from app.config import Config
from app.errors import Refused
from app.optim import with_rate
from app.process.files import write_atomically
from app.process.ranks import ranks
from app.run.build import holds_whole_model
from app.throwaway.rates import is_torchs
from app.throwaway.trace import left_as_found
from app.tuner.answers import NAME, cache_key, read_tuned, searching, write_tuned
from app.tuner.batches import LARGEST, Given, given, largest_allowed, made_up_for
from app.tuner.keys import (
    BATCH_SIZE_KEYS,
    EVAL_BATCH_SIZE_KEYS,
    LR_KEYS,
    tuned_key,
    typed,
    value_at,
)
from app.tuner.lr import range_test
from app.tuner.lr_rules import suggest
from app.tuner.plots import draw_batch_size, draw_lr
from app.tuner.probe import Attempt, Prober, Served, try_evaluation
from app.tuner.search import Answer, NoEffect, Trial, search_batch_size

if TYPE_CHECKING:
    from conf.tuner.schema import BatchSize


def find(config: Config, folder: Path) -> dict[str, Any]:
    """Search what the tuner of a configuration asks for; returns the overrides.

    Looks into the cache first. Writes `tuned.yaml`, and for each search a table and a plot, into
    `folder`, and prints the overrides as they are typed. All ranks of a run call it.
    """
    assert config.tuner is not None
    if config.tuner.cache is None:
        return _search(config, folder)
    path = Path(config.tuner.cache) / f"{cache_key(config.plain, device=device_name(config))}.yaml"
    with ExitStack() as stack:

        def found_before() -> dict[str, Any] | None:
            stack.enter_context(searching(path))
            return read_tuned(path) if path.exists() else None

        overrides = ranks().first(found_before)
        if overrides is not None:
            say(f"tuner: {typed(overrides) or 'no change'}  (from {path})")
            if ranks().is_first:
                write_atomically(folder / NAME, path.read_bytes())
            return overrides
        overrides = _search(config, folder)
        if ranks().is_first:
            write_atomically(path, (folder / NAME).read_bytes())
    return overrides


def say(text: str) -> None:
    """Print, once for all ranks."""
    if ranks().is_first:
        print(text, flush=True)


def device_name(config: Config) -> str:
    """The kind of device a run is on."""
    if config.trainer.accelerator != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return "cpu"


def _search(config: Config, folder: Path) -> dict[str, Any]:
    config = with_rate(config)
    overrides: dict[str, Any] = {}
    provenance: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "device": device_name(config),
        "torch": str(torch.__version__),
    }
    for finder in (find_batch_size, find_lr):
        with left_as_found(config.plain):
            found, about, complete = finder(config.changed(overrides), folder)
        overrides |= found
        provenance |= about
        if not complete:
            path = folder / "tuned_so_far.yaml"
            if ranks().is_first:
                write_tuned(path, overrides, provenance)
            say(f"tuner: interrupted; so far {typed(overrides)}  (in {path})")
            raise SystemExit(128 + signal.SIGINT)
    if ranks().is_first:
        write_tuned(folder / NAME, overrides, provenance)
    say(f"tuner: {typed(overrides) or 'no change'}")
    return overrides


Finding = tuple[dict[str, Any], dict[str, Any], bool]
"""Overrides, what was measured, and whether the search came to its end."""


def find_batch_size(config: Config, folder: Path) -> Finding:
    """The micro-batch, and what goes with it; nothing where its finder is off, or the key is."""
    assert config.tuner is not None
    settings = config.tuner.batch_size
    if settings is None:
        return {}, {}, True
    key = tuned_key(
        config.plain,
        chosen=settings.key,
        candidates=BATCH_SIZE_KEYS,
        setting="tuner.batch_size.key",
    )
    try:
        answer, reason, about = batch_size_of(config, key=key)
    except NoEffect as refusal:
        say(f"tuner: {refusal}; it stays")
        return {}, {"batch_size": {"trials": 0, "reason": str(refusal)}}, True
    say(f"tuner: {key}={answer.size}: {reason}")
    others, said = made_up_for(config, settings, about, key=key, size=answer.size)
    if said:
        say(f"tuner: {said}")
    if ranks().is_first:
        draw_batch_size(answer, reason=reason, key=key, path=folder / "batch_size")
    provenance = {"trials": len(answer.trials), "reason": reason, "changes": said}
    return {key: answer.size, **others}, {"batch_size": provenance}, answer.complete


def batch_size_of(config: Config, *, key: str) -> tuple[Answer, str, Given]:
    """Search the micro-batch of a checked configuration; returns the answer and why it is that.

    Raises NoEffect where the loaders do not heed the key.
    """
    assert config.tuner is not None
    settings = config.tuner.batch_size
    assert settings is not None
    about = given(config, settings, key=key)
    bound, why = largest_allowed(config, settings, about, key=key)
    attempt = Attempt(
        lambda size: config.changed({key: size}),
        served=Served(key, value_at(config.plain, key)),
        num_steps=settings.steps_per_trial,
    )
    answer = search(
        attempt,
        settings=settings,
        key=key,
        bound=bound,
        divisors_of=about.total,
        on_gpu=device_name(config) != "cpu",
        provoke=holds_whole_model(config),
    )
    return answer, why if answer.size == bound else answer.reason, about


def find_eval_batch_size(config: Config, settings: Any, *, stage: str) -> dict[str, Any]:
    """The largest batch of an evaluation that fits, for the configuration of a trained run."""
    key = tuned_key(
        config.plain,
        chosen=settings.key,
        candidates=EVAL_BATCH_SIZE_KEYS,
        setting="tuner.batch_size.key",
    )
    served = Served(key, value_at(config.plain, key))
    try:
        answer = search(
            partial(try_evaluation, config, stage=stage, served=served),
            settings=settings,
            key=key,
            bound=settings.max_val or LARGEST,
            divisors_of=None,
            on_gpu=device_name(config) != "cpu",
            provoke=True,
        )
    except NoEffect as refusal:
        say(f"tuner: {refusal}; it stays")
        return {}
    say(f"tuner: {key}={answer.size}: {answer.reason}")
    return {key: answer.size}


def search(
    attempt: Callable[[int], float | None],
    *,
    settings: "BatchSize",
    key: str,
    bound: int,
    divisors_of: int | None,
    on_gpu: bool,
    provoke: bool,
) -> Answer:
    """Search as the settings of `tuner.batch_size` say; prints each trial.

    Without `provoke` no size is tried that may run out of memory: on a GPU, by its reported memory.
    """
    prober = Prober(attempt=attempt, on_gpu=on_gpu, memory_fraction=settings.memory_fraction)
    mode: Any = settings.mode.value
    if mode == "auto":
        mode = "binsearch" if prober.capacity_bytes is None else "model"
    elif mode == "model" and prober.capacity_bytes is None:
        raise Refused(
            "tuner.batch_size.mode=model needs a device that reports its memory, and this one does "
            "not; type tuner.batch_size.mode=binsearch"
        )

    def probe(size: int) -> Trial:
        trial = prober(size)
        rate = "" if trial.samples_per_s is None else f"  {trial.samples_per_s:,.0f} samples/s"
        memory = "" if trial.peak_bytes is None else f"  {trial.peak_bytes / 2**30:.2f} GiB"
        fits = "fits" if trial.fits else f"does not fit{prober.reason}"
        say(f"tuner: {key}={size} {fits}{memory}{rate}")
        return trial

    return search_batch_size(
        probe,
        mode=mode,
        init_val=min(settings.init_val, bound),
        max_val=bound,
        num_samples=None,  # is in the bound
        divisors_of=divisors_of,
        max_trials=settings.max_trials,
        margin=settings.margin,
        capacity_bytes=prober.capacity_bytes,
        goal=settings.goal.value,
        provoke=provoke or prober.capacity_bytes is None,
    )


def find_lr(config: Config, folder: Path) -> Finding:
    """The learning rate, or one for each key; nothing where its finder is off or in doubt."""
    assert config.tuner is not None
    settings = config.tuner.lr
    if settings is None:
        return {}, {}, True
    chosen = settings.key
    several = isinstance(chosen, list)
    overrides: dict[str, Any] = {}
    about: dict[str, Any] = {}
    for position, candidate in enumerate(chosen if several else [chosen]):
        key = tuned_key(config.plain, chosen=candidate, candidates=LR_KEYS, setting="tuner.lr.key")
        base = float(value_at(config.plain, key))
        if base <= 0:
            raise Refused(f"{key} must be above 0 to be searched, got {base:g}; type {key}=0.1")
        test = partial(
            range_test,
            config,
            settings=settings,
            base=base,
            optimizer=position if several else None,
            from_now=False,
            callbacks=[],
        )
        try:
            lrs, losses, complete = test(key=None if is_torchs(config, key) else key)
        except NoEffect as refusal:
            say(
                f"tuner: {refusal}; " + ("it stays" if settings.on_doubt == "keep" else "searching")
            )
            if settings.on_doubt == "keep":
                continue
            lrs, losses, complete = test(key=None)
        found = suggest(lrs, losses, rule=settings.rule.value)
        name = f"lr_find_{position}" if several else "lr_find"
        if ranks().is_first:
            draw_lr(lrs, losses, found, key=key, path=folder / name)
        if found.doubt is not None:
            say(f"tuner: {key}: {found.doubt}")
        if found.lr is not None and (found.doubt is None or settings.on_doubt == "use"):
            overrides[key] = float(f"{found.lr:.3g}")
        about[f"lr {key}"] = {"steps": len(losses), "rules": found.by_rule, "doubt": found.doubt}
        if not complete:
            return overrides, about, False
    return overrides, about, True
