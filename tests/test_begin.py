"""What a run begins from: weights of others, what the data know, what constructors say."""

import argparse
import copy
import functools
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from conftest import SMALL
from omegaconf import OmegaConf
from theirs import LitData, LitModel
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from app.begin.defaults import rows, unsaid
from app.begin.weights import InitialWeights
from app.config import Config
from app.errors import Refused
from app.fit import run
from app.launch.local import run_local
from app.record.folder import RunFolder
from app.run.build import build

OWN = ("model=custom", "model._target_=theirs.LitModel", "data=custom",
       "data._target_=theirs.LitData", "trainer.max_epochs=2",
       "callbacks.progress=null", "logger=csv", "trainer.accelerator=cpu")  # fmt: skip


class Scheduler:  # of the user's: no import of it, no call
    def __init__(self) -> None:
        raise AssertionError

    def __setstate__(self, state: Any) -> None:
        raise AssertionError


def scheduler() -> Scheduler:
    found = Scheduler.__new__(Scheduler)
    found.last_epoch = 3  # type: ignore[attr-defined]
    return found


class Student(LitModel):
    """A teacher beside, of the same layers."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.net)


class Migrates(LitModel):
    """Renamed its layers once."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {k.replace("old.", "net."): v for k, v in state.items()}


class Late(LitModel):
    """Makes its layers when it is asked to."""

    def __init__(self) -> None:
        super().__init__()
        del self.net

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            self.net = LitModel().net


class Lazy(LitModel):
    def __init__(self) -> None:
        super().__init__()
        self.net[0] = nn.LazyLinear(8)


def drawn(prefix: str = "net.") -> dict[str, Tensor]:
    torch.manual_seed(7)
    return {f"{prefix}{name}": value for name, value in LitModel().net.state_dict().items()}


def lightnings(state: Mapping[str, Any], **others: Any) -> dict[str, Any]:
    return {"state_dict": state, "pytorch-lightning_version": "2.0.0", "epoch": 4,
            "global_step": 50, **others}  # fmt: skip


TAKES: dict[str, tuple[Callable[[], Any], type, dict[str, Any]]] = {
    "bare": (drawn, LitModel, {}),
    "of the module in it": (lambda: drawn(""), LitModel, {}),
    "of DDP": (lambda: drawn("module.net."), LitModel, {}),
    "compiled": (lambda: drawn("_orig_mod.net."), LitModel, {}),
    "compiled inside, of another LightningModule": (
        lambda: lightnings(drawn("model._orig_mod.")), LitModel, {}),
    "as in torch's tutorial": (
        lambda: {"epoch": 3, "model_state_dict": drawn(), "optimizer_state_dict": {"state": {}},
                 "loss": torch.tensor(0.1)}, LitModel, {}),
    "of a trainer of one's own": (
        lambda: {"model": drawn(), "scheduler": scheduler(),
                 "args": argparse.Namespace(lr=0.1), "counts": defaultdict(int, a=1),
                 "mean": np.float64(0.5), "partial": functools.partial(print, "x")}, LitModel, {}),
    "of lightning-hydra-template, with partials among the hyper-parameters": (
        lambda: lightnings(drawn(), hyper_parameters={"optimizer": functools.partial(
            torch.optim.Adam, lr=0.1), "cfg": OmegaConf.create({"a": [1]})}), LitModel, {}),
    "torch's AveragedModel": (
        lambda: AveragedModel(nn.ModuleDict({"net": moved()})).state_dict(), LitModel, {}),
    "timm, averaged": (
        lambda: {"state_dict": LitModel().state_dict(), "state_dict_ema": drawn()}, LitModel,
        {"weights": "averaged"}),
    "timm, raw": (
        lambda: {"state_dict": drawn(), "state_dict_ema": LitModel().state_dict()}, LitModel,
        {"weights": "raw"}),
    "Lightning's WeightAveraging, raw": (
        lambda: lightnings(LitModel().state_dict(), current_model_state=drawn()), LitModel,
        {"weights": "raw"}),
    "migrated": (lambda: lightnings(drawn("old.")), Migrates, {}),
    "renamed": (lambda: drawn("trunk."), LitModel, {"rename": {"trunk": "net"}}),
    "part of a larger one": (
        lambda: {**drawn("encoder."), "head.weight": torch.ones(3)}, LitModel,
        {"rename": {"encoder": "net"}, "only": ["*"]}),
    "of a GAN": (
        lambda: {"generator": drawn(""), "critic": LitModel().net.state_dict(), "epoch": 3},
        LitModel, {"rename": {"generator": "net"}, "only": ["*"]}),
    "the student only": (lambda: drawn(""), Student, {"only": ["net.*"]}),
    "layers made late": (drawn, Late, {}),
    "lazy layers": (drawn, Lazy, {}),
}  # fmt: skip


def moved() -> nn.Module:
    model = LitModel()
    model.load_state_dict(drawn())
    return model.net


def begun(path: Path, kind: type, **settings: Any) -> tuple[pl.LightningModule, dict[str, Any]]:
    """A model that has begun from a file, and what is said of it."""
    model = kind()
    model.configure_model()
    defaults: dict[str, Any] = {"weights": None, "only": None, "rename": {}}
    initial = InitialWeights(init_from=str(path), **(defaults | settings))
    assert initial.before(model, lambda: "optimizers") == "optimizers"
    return model, initial.report


@pytest.mark.parametrize("name", TAKES)
def test_weights_are_taken_as_others_write_them(name: str, tmp_path: Path) -> None:
    make, kind, settings = TAKES[name]
    torch.save(make(), tmp_path / "weights.pt")
    model, report = begun(tmp_path / "weights.pt", kind, **settings)
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in drawn().items())
    assert report["taken"] == len(drawn())


REFUSED: dict[str, tuple[Callable[[], Any], type, dict[str, Any], str]] = {
    "another size": (
        lambda: LitModel(hidden=9).state_dict(), LitModel, {},
        "does not fit LitModel: net.0.bias (9, the model's 8), net.0.weight (9x10, the model's "
        "8x10), net.3.weight (2x9, the model's 2x8); to take what fits type 'init_only=*'"),
    "an entry more, one less": (
        lambda: {**{k: v for k, v in drawn().items() if k != "net.0.bias"}, "x": torch.ones(1)},
        LitModel, {},
        "does not fit LitModel: net.0.bias (not in the file), x (not in the model); to take what"),
    "nothing of it": (
        lambda: {"a.x": torch.ones(1)}, LitModel, {"only": ["*"]},
        "nothing of init_only=* is taken: it has a.x, and the model net.0.weight, net.0.bias, "
        "net.3.weight, net.3.bias; type 'init_rename={OLD: NEW}'"),
    "no such part": (
        drawn, LitModel, {"only": ["head.*"]}, "nothing of init_only=head.* is taken"),
    "two parts alike": (
        lambda: drawn(""), Student, {},
        "fits several parts of the model alike: weight of it may be net.0.weight or "
        "teacher.0.weight; choose by 'init_only=net.*'"),
    "no average": (
        drawn, LitModel, {"weights": "raw"}, "init_weights=raw needs an average beside raw"),
    "two networks": (
        lambda: {"generator": drawn(), "critic": drawn()}, LitModel, {},
        "nothing is taken: it has generator.net.0.weight, generator.net.0.bias, "),
    "no mapping": (lambda: [1], LitModel, {}, "must hold a mapping of weights, got a list"),
    "a whole model": (LitModel, LitModel, {}, "got a whole object, whose code is not run"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_other_weights_are_refused_in_a_sentence(name: str, tmp_path: Path) -> None:
    make, kind, settings, said = REFUSED[name]
    torch.save(make(), tmp_path / "weights.pt")
    with pytest.raises(Refused) as refusal:
        begun(tmp_path / "weights.pt", kind, **settings)
    assert said in str(refusal.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 torn", b"no weights"])
def test_a_file_of_no_weights_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_bytes(content)
    with pytest.raises(Refused, match=r"weights\.pt"):
        begun(tmp_path / "weights.pt", LitModel)


def test_by_a_pattern_what_fits_is_taken_and_the_rest_is_said(tmp_path: Path) -> None:
    torch.save({**LitModel(hidden=9).state_dict(), "x": torch.ones(1)}, tmp_path / "weights.pt")
    _, report = begun(tmp_path / "weights.pt", LitModel, only=["*"])
    assert report["taken"] == 1
    assert [text.partition(" ")[0] for text in report["not_taken"]] == [
        "net.0.bias", "net.0.weight", "net.3.weight", "x"]  # fmt: skip
    assert report["not_in_file"] == ["net.0.bias", "net.0.weight", "net.3.weight"]


def state_of(path: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return found


STILL = ("optimizer=sgd", "optimizer.lr=1e-30", "optimizer.momentum=0", "trainer.max_epochs=1",
         "clip=none", "averaging=none")  # fmt: skip
"""A run whose weights stay what they were at its start."""


@pytest.mark.parametrize("weights", ["averaged", "raw"])
def test_a_run_begins_from_another_run_and_is_continued_without_it(
    checked: Any, composed: Any, tmp_path: Path, weights: str
) -> None:
    first = tmp_path / "first"
    run(composed(*SMALL, "averaging=ema", f"run_dir={first}"), typed=[])
    typed = (*SMALL, *STILL, f"init_from={first}", f"init_weights={weights}")
    result = run(composed(*typed), typed=[])
    assert result is not None
    kept = torch.load(first / "checkpoints/best.ckpt", weights_only=True)
    from_it = kept["state_dict"] if weights == "averaged" else kept["raw"]["state_dict"]
    last = tmp_path / "run/checkpoints/last.ckpt"
    assert all(torch.equal(state_of(last)[name], value) for name, value in from_it.items())
    assert result["init_from"]["weights"] == weights
    assert result["init_from"]["taken"] == len(from_it)
    first.rename(tmp_path / "gone")
    folder = RunFolder(tmp_path / "run")
    folder.write_result({**result, "status": "interrupted"})
    again = run(composed(*typed), typed=[])  # goes on from its own checkpoint
    assert again is not None
    assert again["init_from"] == result["init_from"]


def weights_after(config: Config) -> dict[str, Tensor]:
    made = build(config, [])
    try:
        made.trainer.fit(made.model, datamodule=made.data)
        found: dict[str, Tensor] = made.trainer.strategy.lightning_module_state_dict()
    finally:
        made.hooks.release()
    return found


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_begin_from_the_same_weights(checked: Any, tmp_path: Path, strategy: str) -> None:
    torch.save(drawn(), tmp_path / "weights.pt")
    typed = (*OWN, *STILL, f"init_from={tmp_path}/weights.pt", "callbacks.checkpoint=null",
             "trainer.limit_val_batches=0")  # fmt: skip
    config = checked(*typed, f"strategy={strategy}", "trainer.devices=2")
    found = run_local(weights_after, config, num_processes=2, start_method="forkserver",
                      logging_config=None)  # fmt: skip
    assert all(torch.equal(found[name], value) for name, value in drawn().items())


def test_the_probes_of_a_finder_begin_there_too(composed: Any, tmp_path: Path) -> None:
    torch.save(drawn(), tmp_path / "weights.pt")
    typed = (*OWN, "optimizer=sgd", "tuner=lr_find", "tuner.lr.num_steps=10", "fit=false",
             "tuner.lr.on_doubt=use")  # fmt: skip
    found = []
    for number, more in enumerate(([], [f"init_from={tmp_path}/weights.pt"])):
        run(composed(*typed, *more, f"run_dir={tmp_path}/{number}",
                     f"tuner.cache={tmp_path}/cache"), typed=[])  # fmt: skip
        found.append((tmp_path / f"{number}/lr_find.csv").read_text())
    assert found[0] != found[1]


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (("init_only=*",), "init_only has no effect without weights to begin from; type init_from"),
        (("init_from=x", "init_only=[]"), "init_only must be a pattern of names, or a list of "),
        (("init_from=/nowhere",), "init_from must be the folder of a run, or a file of weights, "
         "got /nowhere: there is none; type init_from=runs/NAME, or init_from=PATH.ckpt"),
    ],
)  # fmt: skip
def test_what_is_typed_of_it_is_refused(composed: Any, typed: tuple[str, ...], said: str) -> None:
    with pytest.raises(Refused) as refusal:
        run(composed(*typed), typed=[])
    assert str(refusal.value).startswith(said)


class Vocabulary:
    def __init__(self) -> None:
        self.words = ["a", "b"]

    def __len__(self) -> int:
        return len(self.words)

    def __call__(self) -> None:
        raise AssertionError


class Known(LitData):
    """Knows its classes when it is set up, which draws."""

    prepared = 0

    def prepare_data(self) -> None:
        Known.prepared += 1

    def setup(self, stage: str) -> None:
        assert Known.prepared
        torch.rand(3)
        self.classes = {"yes": 0, "no": 1}
        self.vocab = Vocabulary()
        self.dims = torch.Size([10, 2])
        self.weights = torch.tensor([0.5, 1.0])

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def count(self) -> int:
        return len(self.classes)


class Classes(LitModel):
    def __init__(self, num_classes: int, width: int = 8, weights: Any = None) -> None:
        super().__init__(hidden=width)
        self.net[3] = nn.Linear(width, num_classes)


LINKED = ("model=custom", "model._target_=test_begin.Classes", "data=custom",
          "data._target_=test_begin.Known", *OWN[4:])  # fmt: skip
SOURCES = ("num_classes", "count", "dims.1", "vocab.__len__")


@pytest.mark.parametrize("source", SOURCES)
def test_what_the_data_know_is_as_if_typed(
    composed: Any,
    tmp_path: Path,
    source: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Known, "prepared", 0)
    link = f"link={{model.num_classes: {source}, model.weights: weights}}"
    linked = run(composed(*LINKED, link, f"run_dir={tmp_path}/a"), typed=[])
    assert f"model.num_classes=2 (the data's {source})" in capsys.readouterr().out
    asked = Known.prepared
    words = ("model.num_classes=2", "model.weights=[0.5,1.0]")
    plain = run(composed(*LINKED, *words, f"run_dir={tmp_path}/b"), typed=[])
    assert Known.prepared == 2 * asked  # the first time leaves nothing
    assert linked is not None
    assert plain is not None
    assert linked["metrics"] == plain["metrics"]
    one, other = (state_of(tmp_path / f"{name}/checkpoints/last.ckpt") for name in "ab")
    assert all(torch.equal(one[name], other[name]) for name in other)
    kept = RunFolder(tmp_path / "a").read_config()
    assert kept is not None
    assert kept["model"]["num_classes"] == 2
    assert kept["model"]["weights"] == [0.5, 1.0]


BROKEN = {
    "{model.num_classes: num_clases}": "link.model.num_classes=num_clases: the data, a "
    "test_begin.Known, has no num_clases; did you mean num_classes?",
    "{model.num_classes: vocab}": "link.model.num_classes=vocab must be a number, a text, or a "
    "list or mapping of them, got a Vocabulary; for how many it holds type "
    "'{model.num_classes: vocab.__len__}'",
    "{data.batch_size: num_classes}": "link must name keys such as model.num_classes, got "
    "data.batch_size; type 'link={model.num_classes: num_classes}'",
    "3": "link must be a mapping of names, got 3; type 'link={model.num_classes: num_classes}'",
}


@pytest.mark.parametrize("link", BROKEN)
def test_a_link_to_nothing_is_refused(composed: Any, link: str) -> None:
    assert Known.prepared == 0
    with pytest.raises(Refused) as refusal:
        run(composed(*LINKED, f"link={link}"), typed=[])
    assert Known.prepared == 0
    assert str(refusal.value) == BROKEN[link]


def test_a_constructor_says_its_defaults(composed: Any, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    run(composed(*OWN, "model.lr=0.05", "trainer.max_epochs=1"), typed=[])
    kept = folder.read_config()
    assert kept is not None
    assert kept["model"] == {"_target_": "theirs.LitModel", "lr": 0.05, "hidden": 8}
    assert kept["data"]["batch_size"] == 4
    assert kept["clip"] is None
    assert kept["trainer"]["threads"] is None
    # what began without them, or with others, is continued as it began
    del kept["model"]["hidden"]
    kept["data"]["batch_size"] = 8
    folder.write_config({**kept, "run_dir": str(folder.path)}, [])
    again = run(composed(*OWN, "model.lr=0.05", "trainer.max_epochs=1"), typed=[])
    assert again == folder.read_result()


def test_a_wrong_argument_leaves_no_run(composed: Any, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"data\.batch_sise is not an argument of theirs\.LitData; "):
        run(composed(*OWN, "data.batch_sise=2"), typed=[])
    assert not (tmp_path / "run").exists()


def takes(
    a: Any = (1, 2), b: Any = float("nan"), c: str = "${x}", d: Any = {"k": [1]}, e: bool = True,  # noqa: B006
    *args: Any, f: Any = print, g: float = 1.5, **others: Any,
) -> None:  # fmt: skip
    """Defaults of many kinds."""


def test_plain_defaults_alone_are_said() -> None:
    cfg = OmegaConf.create({"model": {"_target_": "test_begin.takes", "e": False}, "data": None})
    assert unsaid(cfg) == {"model.d": {"k": [1]}, "model.g": 1.5}


@pytest.mark.parametrize(
    ("typed", "threads", "clip", "optimizer"),
    [
        ((), 1, "app.clip.NormClip", "torch.optim.SGD"),
        (("model=mlp",), 1, "app.clip.NormClip", "torch.optim.SGD"),
        (OWN[:4], None, None, None),
        ((*OWN[:4], "clip=norm", "trainer.threads=2", "optimizer=adamw"), 2, "app.clip.NormClip",
         "torch.optim.AdamW"),
    ],
)  # fmt: skip
def test_the_defaults_of_the_demo_are_its_models_alone(
    checked: Any, typed: tuple[str, ...], threads: int | None, clip: str, optimizer: str
) -> None:
    plain = checked(*typed).plain
    assert plain["trainer"]["threads"] == threads
    assert (plain["clip"] or {}).get("_target_") == clip
    assert (plain["optimizer"] or {}).get("_target_") == optimizer
    assert plain["trainer"]["max_epochs"] == 30


def test_a_number_of_epochs_that_nobody_chose_is_said(composed: Any) -> None:
    said = [("default", "trainer.max_epochs=30, as of the demo: type trainer.max_epochs=N")]
    assert rows(composed(*OWN[:4])) == said
    assert rows(composed(*OWN)) == rows(composed()) == []
