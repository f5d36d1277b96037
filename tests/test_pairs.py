"""Every technique preset with every other, and with what it trains, trains or is refused."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL

from app import conf
from app.config import check
from app.errors import Refused
from app.run.build import build

TECHNIQUES = ("accumulate", "clip", "averaging")
OTHERS = ("optimizer", "scheduler", "precision", "model")
ROOT = Path(conf.__file__).parent
CHOICES = {
    group: sorted(
        f"{group}={path.stem}" for path in (ROOT / group).glob("*.yaml") if path.stem != "custom"
    )
    for group in (*TECHNIQUES, *OTHERS)
}
PAIRS = [
    pair
    for one, other in (
        *itertools.combinations(TECHNIQUES, 2),
        *itertools.product(TECHNIQUES, OTHERS),
    )
    for pair in itertools.product(CHOICES[one], CHOICES[other])
]
NEEDED = {
    "accumulate=schedule": ["accumulate.starts=[0,1]", "accumulate.factors=[1,3]"],
    "accumulate=effective": ["accumulate.batch_size=48"],
    "averaging=swa": ["averaging.anneal_epochs=1"],
    "scheduler=steps": ["scheduler.milestones=[1]"],
    "model=graphsage": ["data=graph", "data.num_nodes=400"],
    "optimizer=none": [],
}
"""What a preset needs to fit into a run of two epochs of six batches."""


def is_refused(cfg: Any) -> bool:
    try:
        check(cfg)
    except Refused:
        return True
    return False


@pytest.mark.parametrize("pair", PAIRS, ids=",".join)
def test_a_pair_trains_or_is_refused(composed: Callable[..., Any], pair: tuple[str, str]) -> None:
    small = [
        key for key in SMALL if not (key.startswith("callbacks.") and "callbacks=none" in pair)
    ]
    if "model=cnn1d" not in pair and any(choice.startswith("model=") for choice in pair):
        small = [key for key in small if not key.startswith("model.")]
    theirs = ["model=custom", "model._target_=theirs.LitModel",
              "data=custom", "data._target_=theirs.LitData"]  # fmt: skip
    if "optimizer=none" in pair:
        small = [key for key in small if not key.startswith(("model.", "data."))] + theirs
        if "accumulate=effective" in pair:
            small += ["accumulate.micro_batch_size=4", "+data.num_samples=80"]
    needed = [key for choice in pair for key in NEEDED.get(choice, [])]
    cfg = composed(*pair, *small, *needed)
    if is_refused(cfg):
        with pytest.raises(Refused, match="|".join(choice.partition("=")[0] for choice in pair)):
            check(cfg)
        return
    config = check(cfg)
    run = build(config, [])
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.trainer.fit(run.model, datamodule=run.data)
    assert run.trainer.global_step > 0
    assert all(math.isfinite(value) for value in run.trainer.callback_metrics.values())
    assert any(not torch.equal(before[name], p) for name, p in run.model.named_parameters())
