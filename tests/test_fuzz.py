"""Whatever is typed, and whatever is in the files: it trains, or one line says why not.

Seeded, and two minutes long; `make test ARGS="tests/test_fuzz.py --hypothesis-profile=long"` draws
thirty times as many cases, each time others.
"""

import gc
import math
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from app import check, cli, conf, evaluate, train
from app.report.__main__ import main as report
from app.sweep.folder import quoted

pytestmark = pytest.mark.filterwarnings("ignore")
SCALE = settings().max_examples / 100
ROOT = Path(conf.__file__).parent
SMALL = ("trainer.accelerator=cpu", "trainer.max_steps=1", "trainer.limit_val_batches=1",
         "trainer.limit_test_batches=1", "callbacks.progress=null", "logger=csv", "name=fuzz",
         "hydra/job_logging=none", "hydra/hydra_logging=none")  # fmt: skip
BASES = {
    "": (),
    "accumulate=constant": (),
    "accumulate=schedule": (),
    "accumulate=effective": ("accumulate.batch_size=256",),
    "averaging=ema": (),
    "averaging=swa": (),
    "averaging=uniform": (),
    "clip=adaptive": (),
    "clip=percentile": (),
    "clip=value": (),
    "optimizer=adamw": (),
    "scheduler=cosine": (),
    "scheduler=onecycle": (),
    "scheduler=steps": (),
    "scheduler=plateau": (),
    "model=mlp": (),
    "model=transformer": (),
    "model=graphsage": ("data=graph",),
    "data=digits": (),
    "callbacks=early_stopping": (),
    "logger=tensorboard": (),
    "tuner=full": (),
    "tuner=milestones": (),
    "sharing=mmap": (),
    "memory=checkpointing": ("memory.min_parameters=10",),
    "compile=default": (),
    "strategy=ddp": (),
    "strategy=tp_fsdp": ("trainer.devices=2",),
    "launch=local": (),
    "launch=slurm": (),
    "sweep=optuna": (),
}
"""What brings every schema into a configuration, and what it needs."""

NOT_TRAINED = ("tuner", "compile", "strategy", "launch", "sweep", "trainer.devices", "sharing")
"""Groups that take seconds, or other processes, for one step."""


def keys_of(node: Any, path: str) -> Iterator[str]:
    for name in node:
        yield f"{path}{name}"
        if not OmegaConf.is_missing(node, name) and isinstance(node[name], DictConfig):
            yield from keys_of(node[name], f"{path}{name}.")


def discovered() -> list[tuple[tuple[str, ...], str]]:
    """Every key, with the choices that bring it."""
    found: dict[str, tuple[str, ...]] = {}
    with initialize_config_module("app.conf", version_base="1.3"):
        for choice, needs in BASES.items():
            typed = tuple(filter(None, (choice, *needs)))
            cfg = compose("train", [*typed, "name=x", "run_dir=x"])
            for key in keys_of(cfg, ""):
                found.setdefault(key, typed)
    return [(typed, key) for key, typed in found.items() if key != "run_dir"]


KEYS = discovered()
TRAINED = [
    (typed, key)
    for typed, key in KEYS
    if not any(word.startswith(NOT_TRAINED) for word in (*typed, key))
]
NUMBERS = st.one_of(
    st.integers(-3, 3),
    st.sampled_from([7, 64, 2**31, 2**32, 2**63, 10**25, -(10**12)]),
    st.sampled_from([0.0, -0.0, 0.5, 1.0, 1.5, 1e-300, 1e300, -1.0, math.inf, -math.inf, math.nan]),
)
TEXTS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["", " ", ".", "..", "../x", "a/b", "=", "val_loss", "none", "a" * 300, "é",
                     "\0", "${seed}", "${nowhere}", "${", "???", "math", "torch.nn.Linear", "-1",
                     "1e3", "[", "{a", "'", '"', "\\", "\n", "*", "auto", "cpu", "inf"]),
)  # fmt: skip
SCALARS = st.one_of(
    NUMBERS.map(str),
    st.sampled_from(["null", "true", "false", ""]),
    TEXTS.map(quoted),
    TEXTS,
)
VALUES = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=3).map(lambda items: f"[{','.join(items)}]"),
    st.dictionaries(st.sampled_from(["a", "_target_", "1"]), SCALARS, max_size=2).map(
        lambda items: "{" + ",".join(f"{key}:{item}" for key, item in items.items()) + "}"
    ),
)


PRESETS = {
    group: {path.stem for path in (ROOT / group).glob("*.yaml")}
    for group in (*conf.GROUPS, "experiment")
}
WRONG = sorted(
    f"{group}={preset}"
    for group, own in PRESETS.items()
    for preset in set().union(*PRESETS.values()) - own
)
"""Every group with the presets of the others."""


@st.composite
def overrides(draw: Any, keys: list[tuple[tuple[str, ...], str]]) -> list[str]:
    """One to three keys with values of any kind, some misspelt, added or taken away; at times a
    preset of another group."""
    typed: list[str] = []
    if draw(st.integers(0, 9)) == 0:
        typed.append(draw(st.sampled_from(WRONG)))
    for needs, key in draw(st.lists(st.sampled_from(keys), min_size=1, max_size=3)):
        typed += [word for word in needs if word not in typed]
        sign = draw(st.sampled_from(["", "", "", "", "", "", "+", "++", "~"]))
        if draw(st.integers(0, 9)) == 0:
            place = draw(st.integers(0, len(key)))
            key = key[:place] + draw(st.sampled_from("xa._")) + key[place:]
        typed.append(f"~{key}" if sign == "~" else f"{sign}{key}={draw(VALUES)}")
    return typed


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., int]:
    """Calls an entry point as a command line does; returns its exit code.

    Fails where it says no line, more than one, or a traceback.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gc, "freeze", lambda: None)  # thousands of commands in one process
    monkeypatch.setattr(sys, "stdin", None)

    def call(task: Any, name: str, words: list[str]) -> int:
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", [name, *words])
        code: Any = 0
        try:
            cli.main(task, name, "")
        except SystemExit as stop:
            code = stop.code
        finally:
            gc.enable()
            torch.set_num_threads(1)
        printed, said = capfd.readouterr()
        assert "Traceback" not in printed + said, (words, printed + said)
        told = [line for line in said.splitlines() if line.startswith(f"{name}: ")]
        assert code in (0, 2), (words, code, said)
        assert len(told) == (code == 2) or "holds a run with another" in said, (words, said)
        return int(code)

    return call


@settings(max_examples=int(120 * SCALE))
@given(typed=overrides(KEYS))
def test_whatever_is_typed_is_checked_or_refused_in_a_line(
    command: Callable[..., int], typed: list[str]
) -> None:
    command(check.main, "check", typed)


@settings(max_examples=int(25 * SCALE))
@given(typed=overrides(TRAINED))
def test_what_is_checked_trains_a_step_or_is_refused_in_a_line(
    command: Callable[..., int], typed: list[str]
) -> None:
    words = [*SMALL, *(word for word in typed if not word.startswith("hydra")), "resume=never"]
    command(train.main, "train", words)


def damaged(content: bytes, draw: random.Random) -> bytes:
    """A file after an accident."""
    kind = draw.randrange(7)
    place = draw.randrange(len(content) + 1)
    if kind == 0:
        return content[:place]
    if kind == 1:
        return b"\0" * len(content)
    if kind == 2:
        return b""
    if kind == 3 and content:
        flipped = bytearray(content)
        flipped[place % len(content)] ^= 1 << draw.randrange(8)
        return bytes(flipped)
    if kind == 4:
        return content[:place] + bytes(draw.randrange(256) for _ in range(20)) + content[place:]
    if kind == 5:
        return draw.choice(
            [b"[]", b"3", b"null", b"{}", b'"x"', b"a: [", b"\xff\xfe", b"- a\n- b\n"]
        )
    lines = content.splitlines(keepends=True)
    draw.shuffle(lines)
    return b"".join(lines)


@settings(max_examples=int(12 * SCALE))
@given(seed=st.integers(0, 2**32))
def test_a_run_with_a_damaged_file_goes_on_is_evaluated_and_reported_or_says_why(
    command: Callable[..., int], seed: int, tmp_path: Path
) -> None:
    draw = random.Random(seed)
    folder = tmp_path / f"runs/{seed}"
    words = [*SMALL, f"name={seed}", "data.batch_size=2000", "model.channels=2"]
    assert command(train.main, "train", words) == 0
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".png")
    path = draw.choice(files)
    path.write_bytes(damaged(path.read_bytes(), draw))
    if draw.random() < 0.5 and path.name != "result.json":
        (folder / "result.json").unlink()  # as where it was cut
    command(evaluate.main, "evaluate", [f"run={folder}", "checkpoint=last"])
    assert report([str(folder)]) in (0, 2)
    command(train.main, "train", words)
