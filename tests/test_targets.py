"""A class that a configuration names is looked at before it, or anything else, is called."""

from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from app.errors import Refused
from app.process.targets import refuse_targets, with_members
from app.tuner.answers import read_tuned

MONITOR = "lightning.pytorch.callbacks.LearningRateMonitor"
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no module": (
        {"model": {"_target_": "nowhere.Model"}},
        "model._target_ must be package.module.Class, got nowhere.Model: ModuleNotFoundError: No "
        "module named 'nowhere'",
    ),
    "no class in it": (
        {"model": {"_target_": "theirs.LitMoodel"}},
        "model._target_ must be package.module.Class, got theirs.LitMoodel: AttributeError: module "
        "'theirs' has no attribute 'LitMoodel'",
    ),
    "a module": (
        {"model": {"_target_": "torch.nn"}},
        "model._target_ must be package.module.Class, got torch.nn, which is a module; type "
        "model._target_=torch.nn.CLASS",
    ),
    "one that is left at import": (
        {"model": {"_target_": "leaves.Model"}},
        "model._target_ must be package.module.Class, got leaves.Model: SystemExit: 0, "
        "{folder}/leaves.py:2",
    ),
    "a function that ends the process": (
        {"model": {"_target_": "os._exit", "_args_": [0]}},
        "model._target_ must be a LightningModule, got os._exit; type model._target_=package.Class",
    ),
    "a function that runs what a file says": (
        {"data": {"_target_": "torch.load", "f": "x", "weights_only": False}},
        "data._target_ must be a LightningDataModule, got torch.load; type "
        "data._target_=package.Class",
    ),
    "another kind": (
        {"callbacks": {"mine": {"_target_": "torch.nn.Identity"}}},
        "callbacks.mine._target_ must be a Callback, got torch.nn.Identity; type "
        "callbacks.mine._target_=package.Class",
    ),
    "an unknown argument": (
        {"model": {"_target_": "theirs.LitModel", "hiden": 3}},
        "model.hiden is not an argument of theirs.LitModel; did you mean model.hidden?",
    ),
    "a missing argument": (
        {"model": {"_target_": "leaves_not.Model"}},
        "model.width is required by leaves_not.Model; type model.width=VALUE",
    ),
    "too many positions": (
        {"callbacks": {"mine": {"_target_": MONITOR, "_args_": [1, 2, 3, 4]}}},
        f"callbacks.mine: too many positional arguments, of {MONITOR}; mend callbacks.mine._args_",
    ),
    "positions that are none": (
        {"callbacks": {"mine": {"_target_": MONITOR, "_args_": 7}}},
        "callbacks.mine._args_ must be a list, got 7; leave it out",
    ),
    "a flag that is none": (
        {"callbacks": {"mine": {"_target_": MONITOR, "_partial_": "maybe"}}},
        "callbacks.mine._partial_ must be a bool, got maybe; leave it out",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_class_that_cannot_be_what_its_place_is_for_is_refused(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(0)\n")
    (tmp_path / "leaves_not.py").write_text(
        "import lightning.pytorch as pl\n\n\nclass Model(pl.LightningModule):\n"
        "    def __init__(self, width): super().__init__()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config, message = REFUSED[case]
    with pytest.raises(Refused) as refusal:
        refuse_targets(config)
    assert str(refusal.value) == message.format(folder=tmp_path)


class Shade(Enum):
    DARK = "dark"


@pytest.mark.parametrize("text", ["dark", "DARK"])
def test_a_text_is_the_member_of_an_enum_that_a_class_wants(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(shade: Shade, other: object = Shade.DARK, free: str = "") -> None: ...

    monkeypatch.setattr("theirs.made", made, raising=False)
    node = {"_target_": "theirs.made", "shade": text, "other": text, "free": text}
    dark = {"shade": Shade.DARK, "other": Shade.DARK, "free": text}
    assert with_members(node) == {"_target_": "theirs.made", **dark}
    with pytest.raises(Refused, match=r"model\.shade must be one of dark, DARK, got light"):
        refuse_targets({"model": {"_target_": "theirs.made", "shade": "light"}})


def test_what_a_class_builds_itself_may_lack_arguments() -> None:
    sgd = {"_target_": "torch.optim.SGD", "lr": 0.1}
    model = {"_target_": "theirs.LitModel", "hidden": sgd}
    with pytest.raises(Refused, match=r"or model\.hidden\._partial_=true where the model"):
        refuse_targets({"model": model})
    refuse_targets({"model": {**model, "_recursive_": False}})


def test_every_class_that_is_shipped_is_what_its_place_is_for(checked: Callable[..., Any]) -> None:
    refuse_targets(checked("averaging=ema", "accumulate=constant", "callbacks=early_stopping"))


def test_an_answer_of_a_finder_names_no_class(tmp_path: Path) -> None:
    path = tmp_path / "tuned.yaml"
    path.write_text("overrides:\n  model._target_: os.system\n")
    with pytest.raises(Refused, match=r"holds 'os\.system', and a finder answers numbers"):
        read_tuned(path)
