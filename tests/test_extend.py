"""A run that is made longer is the run that was as long from its start, or is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL
from killing import is_same

from app.errors import Refused
from app.fit import run
from app.record.folder import RunFolder

OWN = ("model=custom", "model._target_=theirs.LitModel", "data=custom",
       "data._target_=theirs.LitData", "callbacks.progress=null", "logger=csv",
       "trainer.accelerator=cpu")  # fmt: skip
EXACT: dict[str, tuple[str, ...]] = {
    "plain": (),
    "a memory of given length": ("averaging=ema", "averaging.decay=0.9"),
    "averaging from an epoch on": ("averaging=swa", "averaging.start=1"),
    "steps": ("scheduler=steps", "scheduler.milestones=[1]"),
    "plateau": ("scheduler=plateau",),
    "warm-up": ("scheduler=warmup", "scheduler.warmup=3"),
    "accumulation": ("accumulate=constant", "accumulate.factor=4"),
    "a length that begins to act behind the end": (
        "scheduler=custom", "scheduler._target_=torch.optim.lr_scheduler.SequentialLR",
        "scheduler.interval=step", "+scheduler.milestones=[14]",
        "+scheduler.schedulers=[{_target_: torch.optim.lr_scheduler.ConstantLR, _partial_: true, "
        "factor: 1.0}, {_target_: torch.optim.lr_scheduler.CosineAnnealingLR, _partial_: true, "
        "T_max: total_steps}]"),
}  # fmt: skip


def ended(composed: Any, folder: Path, *typed: str) -> dict[str, Any]:
    result = run(composed(*SMALL, f"run_dir={folder}", *typed), typed=[])
    assert result is not None
    return result


def last(folder: Path) -> Any:
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)


IN_EPOCHS = ("trainer.max_epochs=2", "trainer.max_epochs=4")
LENGTHS = {
    **dict.fromkeys(EXACT, IN_EPOCHS),
    "to the middle of an epoch": ("trainer.max_steps=9", "trainer.max_steps=15"),
    "to the end of one": ("trainer.max_steps=12", "trainer.max_steps=15"),
}


@pytest.mark.parametrize("name", LENGTHS)
def test_a_longer_run_is_as_if_it_had_been_so_from_its_start(
    composed: Any, tmp_path: Path, name: str
) -> None:
    typed, (short, long) = EXACT.get(name, ("trainer.max_epochs=null",)), LENGTHS[name]
    whole = ended(composed, tmp_path / "whole", *typed, long)
    first = ended(composed, tmp_path / "run", *typed, short)
    longer = (*typed, long, "extend=true")
    result = ended(composed, tmp_path / "run", *longer)
    one, other = last(tmp_path / "whole"), last(tmp_path / "run")
    assert {key for key in one if not is_same(one[key], other[key])} <= {"callbacks"}
    assert result["metrics"] == whole["metrics"]
    assert result["extended"][0]["epochs"] == first["epochs"]
    assert json.loads((tmp_path / "run/result.1.json").read_text()) == first
    assert ended(composed, tmp_path / "run", *longer) == result  # finished: left alone
    rows = [(tmp_path / f"{folder}/metrics.csv").read_text() for folder in ("whole", "run")]
    assert rows[0] == rows[1]


REFUSED = {
    ("scheduler=cosine",): "the schedule is laid out; to go on with a new layout type extend=relay",
    ("averaging=ema",): "averaging.horizon is laid out",
    ("averaging=swa",): "averaging.start is laid out; to go on with a new layout begin a run",
    (*OWN, "trainer.max_epochs=2"): "OneCycleLR is laid out; to lay it out anew type extend=relay",
}


@pytest.mark.parametrize("typed", REFUSED, ids=str)
def test_what_the_length_decides_is_refused(
    composed: Any, tmp_path: Path, typed: tuple[str, ...]
) -> None:
    small = () if typed[0] == OWN[0] else SMALL
    command = (*small, f"run_dir={tmp_path}/run", *typed)
    run(composed(*command), typed=[])
    with pytest.raises(Refused) as refusal:
        run(composed(*command, "trainer.max_epochs=4", "extend=true"), typed=[])
    assert REFUSED[typed] in str(refusal.value)


@pytest.mark.parametrize("typed", [(*SMALL, "scheduler=cosine"), (*OWN, "trainer.max_epochs=2")])
def test_schedules_are_laid_out_anew(composed: Any, tmp_path: Path, typed: tuple[str, ...]) -> None:
    rates = []
    for folder, lengths in (("whole", (4,)), ("run", (2, 4))):
        for length in lengths:
            more = ("extend=relay",) if length == 4 and folder == "run" else ()
            command = (*typed, f"run_dir={tmp_path}/{folder}", f"trainer.max_epochs={length}")
            run(composed(*command, *more), typed=[])
        groups = last(tmp_path / folder)["optimizer_states"][0]["param_groups"]
        rates.append([group["lr"] for group in groups])
    assert rates[0] == pytest.approx(rates[1])


def test_a_run_that_its_length_did_not_end_is_refused(composed: Any, tmp_path: Path) -> None:
    ended(composed, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    result = folder.read_result()
    assert result is not None
    folder.write_result({**result, "epochs": 1})
    with pytest.raises(Refused, match="was not its length that ended it"):
        ended(composed, tmp_path / "run", "trainer.max_epochs=4", "extend=true")
    folder.write_result(result)
    with pytest.raises(Refused, match=r"extend needs a larger trainer.max_epochs than 2, got 1"):
        ended(composed, tmp_path / "run", "trainer.max_epochs=1", "extend=true")
    with pytest.raises(Refused, match="holds a run with another configuration"):
        ended(composed, tmp_path / "run", "trainer.max_epochs=4", "extend=true", "seed=7")
    with pytest.raises(Refused, match="extend goes on with a run"):
        ended(composed, tmp_path / "none", "extend=true")
