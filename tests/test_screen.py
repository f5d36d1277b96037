"""What one sees: why a build failed, what is on when a fit starts, where it is."""

import itertools
import json
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hydra import compose, initialize_config_module
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau, StepLR

from app import cli
from app.config import check
from app.errors import Refused
from app.launch.failures import failure_of
from app.record.folder import RunFolder
from app.run.build import build
from app.run.progress import EpochLines
from app.screen.start import of_optimizer, of_schedule
from app.train import main as train

SHORT = ("trainer.max_epochs=2", "trainer.limit_train_batches=2", "trainer.limit_val_batches=1",
         "trainer.limit_test_batches=1", "trainer.accelerator=cpu", "logger=csv")  # fmt: skip

BUILDS = {
    "a missing file": ("open('/no/vocab')", "FileNotFoundError: [Errno 2] No such file or"),
    "a keyword": ("nn.Linear(3, out_feature=3)", "TypeError: Linear.__init__() got an unexpected"),
    "a shape": ("nn.Linear(3, 4)(nn.Parameter())", "RuntimeError: "),
    "no text": ("raise Empty", "Empty"),
    "several": ("raise ExceptionGroup('two', [ValueError('a'), KeyError('b')])",
                "ExceptionGroup: two (2 sub-exceptions)"),
    "a key": ("{}['missing']", "KeyError: 'missing'"),
    "an import": ("import nowhere", "ModuleNotFoundError: No module named 'nowhere'"),
    "memory": ("raise MemoryError('CUDA out of memory')", "MemoryError: CUDA out of memory"),
    "one inside of Hydra again": ("instantiate({'_target_': 'unbuilt.Model', 'deep': True})",
                                  "RuntimeError: deep"),
}  # fmt: skip
THEIRS = """
    import abc
    import lightning.pytorch as pl
    from hydra.utils import instantiate
    from torch import nn
    class Empty(Exception): pass
    class Model(pl.LightningModule):
        def __init__(self, deep=False):
            super().__init__()
            if deep: raise RuntimeError("deep")
            self.made()
        def made(self):
            {body}
    class Attribute(Model):
        def __init__(self, cfg):
            self.deep = cfg
            super().__init__()
    class Abstract(Model, abc.ABC):
        @abc.abstractmethod
        def forward(self, x): ...
"""


UNBUILT = ("model=custom", "model._target_=unbuilt.Model", "optimizer=none")


@pytest.fixture
def unbuilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Write the module of the user's, in the working directory."""
    monkeypatch.delitem(sys.modules, "unbuilt", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    text = textwrap.dedent(THEIRS)
    return lambda body: Path("unbuilt.py").write_text(text.format(body=body)) and None


@pytest.fixture(scope="module")
def plain() -> Any:
    """Composed once."""
    with initialize_config_module("app.conf", version_base="1.3"):
        return check(compose("train", [*UNBUILT, *SHORT, "name=x", "run_dir=x"]))


@pytest.mark.parametrize("case", BUILDS)
def test_a_failed_build_raises_what_the_users_class_raised(
    case: str, plain: Any, unbuilt: Callable[[str], None]
) -> None:
    body, told = BUILDS[case]
    unbuilt(body)
    with pytest.raises(Exception) as raised:  # noqa: PT011  # the user's own
        build(plain, [])
    called = raised.value.with_traceback(raised.tb.tb_next)  # without this file
    failure = failure_of(called, 1)  # as a rank, or a job of a sweep, tells it
    assert failure.error.startswith(told)
    assert "unbuilt.py" in failure.trace.partition("File ")[2].splitlines()[0]
    assert "/hydra/" not in failure.trace or case == "one inside of Hydra again"
    assert "while unbuilt.Model was built" in failure.trace


def test_a_class_that_reads_attributes_of_a_mapping_gets_them_where_that_is_typed(
    plain: Any, unbuilt: Callable[[str], None]
) -> None:
    unbuilt("self.layer = nn.Linear(self.deep.size, 1)")
    model = {"_target_": "unbuilt.Attribute", "cfg": {"size": 3}}
    with pytest.raises(AttributeError) as raised:
        build(plain.but(model=model), [])
    assert "for configurations of OmegaConf add _convert_=none" in raised.value.__notes__[0]
    run = build(plain.but(model={**model, "_convert_": "none"}), [])
    assert run.model.layer.weight.shape == (1, 3)


def test_a_command_shows_a_failed_build_from_the_users_code_on(
    unbuilt: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    unbuilt("raise Empty")
    monkeypatch.setattr(sys, "argv", ["train", *UNBUILT, *SHORT, "name=x"])
    with pytest.raises(Exception) as raised:  # noqa: PT011  # the user's own
        cli.main(train, "train", "")
    assert {frame.path.name for frame in raised.traceback[1:]} == {"unbuilt.py"}  # behind this one
    result = json.loads(Path("runs/x/result.json").read_text())
    assert result["error"] == "Empty"
    assert result["where"] == f"{Path('unbuilt.py').absolute()}:13 in made"
    folder = RunFolder(Path("runs/x"))
    other = {"run_dir": "runs/x"}
    folder.refuse_changes(other)  # what has not begun keeps no name
    (folder.path / "metrics.csv").touch()
    with pytest.raises(Refused, match="another configuration"):
        folder.refuse_changes(other)


def test_a_class_that_cannot_be_called_is_refused(
    plain: Any, unbuilt: Callable[[str], None]
) -> None:
    unbuilt("pass")
    model = {"_target_": "unbuilt.Abstract"}
    message = (
        "unbuilt.Abstract cannot be built: Can't instantiate abstract class Abstract with "
        "abstract method forward; mend it, or name another class"
    )
    with pytest.raises(Refused, match=re.escape(message)):
        build(plain.but(model=model), [])


def weights(number: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(2)) for _ in range(number)]


OPTIMIZERS: dict[str, Callable[[], torch.optim.Optimizer]] = {
    "SGD lr=0.001": lambda: torch.optim.SGD(weights(1)),
    "AdamW lr=0.01 weight_decay=0.02": lambda: torch.optim.AdamW(
        weights(2), lr=torch.tensor(0.01), weight_decay=0.02
    ),
    "AdamW lr=0.001|0.0001 weight_decay=0.1|0 in 2 groups": lambda: torch.optim.AdamW(
        [{"params": weights(1), "weight_decay": 0.1}, {"params": weights(1), "lr": 1e-4}],
        weight_decay=0.0,
    ),
    "Adam lr=0.001 betas=(0.5, 0.9)": lambda: torch.optim.Adam(weights(1), betas=(0.5, 0.9)),
}


@pytest.mark.parametrize("told", OPTIMIZERS)
def test_an_optimizer_is_told_in_a_line(told: str) -> None:
    optimizer = OPTIMIZERS[told]()
    assert of_optimizer(optimizer) == told
    LambdaLR(optimizer, lambda step: 0.5)  # a schedule has begun to move the rate
    assert of_optimizer(optimizer) == told


@pytest.mark.parametrize(
    ("make", "settings", "told"),
    [
        (lambda o: StepLR(o, 3), {}, "StepLR each epoch"),
        (lambda o: StepLR(o, 3), {"interval": "step", "frequency": 5}, "StepLR every 5 steps"),
        (
            ReduceLROnPlateau,
            {"monitor": "val_loss", "reduce_on_plateau": True},
            "ReduceLROnPlateau each epoch by val_loss",
        ),
    ],
)
def test_a_schedule_is_told_in_a_line(make: Any, settings: dict[str, Any], told: str) -> None:
    schedule = make(torch.optim.SGD(weights(1), lr=0.1))
    assert of_schedule(LRSchedulerConfig(scheduler=schedule, **settings)) == told


class Net(pl.LightningModule):
    """Makes its own optimizer, and none, and a bar."""

    def __init__(self, makes: bool = True, bar: bool = False) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(40, 10), nn.Sequential(nn.Linear(10, 10), nn.ReLU()))
        self.automatic_optimization = makes
        self.makes, self.bar = makes, bar

    def training_step(self, batch: Any, index: int) -> Any:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.RMSprop(self.parameters(), lr=0.02) if self.makes else None

    def configure_callbacks(self) -> list[pl.Callback]:
        return [RichProgressBar()] if self.bar else []


OWN = ("model=custom", "model._target_=test_screen.Net", "optimizer=none", "clip=none", *SHORT)


def fitted(config: Any) -> Any:
    from app.screen.start import StartTable

    run = build(config, [StartTable(config.plain)])
    run.trainer.fit(run.model, datamodule=run.data)
    return run


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`", "ignore:.*returned `None`")
@pytest.mark.parametrize(
    ("makes", "told"),
    [(True, "RMSprop lr=0.02"), (False, "the model's configure_optimizers returns none")],
)
def test_the_table_has_the_optimizer_that_the_model_made(
    makes: bool, told: str, checked: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    fitted(checked(*OWN, f"+model.makes={makes}", "callbacks.checkpoint=null"))
    lines = [re.split(" +", line, maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    rows = [line for line in lines if len(line) == 2]
    assert ["optimizer", told] in rows
    assert [name for name, _ in rows].index("optimizer") == 3  # behind run, model and data


@pytest.mark.parametrize(("depth", "num_rows"), [(1, 1), (2, 3), (-1, 5), (0, 0)])
@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`")
def test_a_summary_of_the_model_is_printed(
    depth: int, num_rows: int, checked: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    fitted(checked(*OWN, "callbacks=summary", f"callbacks.summary.max_depth={depth}"))
    text = capsys.readouterr().out
    assert len(re.findall(r"^\d +\| net", text, re.MULTILINE)) == num_rows
    assert ("520       Trainable params" in text) == (depth != 0)


class Terminal:
    """Stands for one: what rich asks before it draws."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def isatty(self) -> bool:
        return True


BARS = {
    "ours": (),
    "of the configuration": (
        "+callbacks.mine._target_=lightning.pytorch.callbacks.RichProgressBar",
    ),
    "of the model": (*OWN, "+model.bar=true"),
}


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`")
@pytest.mark.parametrize("whose", BARS)
def test_a_terminal_has_one_bar_and_ours_counts_epochs_as_the_lines_do(
    whose: str,
    checked: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdout", Terminal(sys.stdout))
    monkeypatch.setenv("TERM", "xterm")
    run = fitted(checked(*SHORT, *BARS[whose]))
    drawn = [
        one
        for one in run.trainer.callbacks
        if isinstance(one, RichProgressBar) and not one.is_disabled
    ]
    assert len(drawn) == 1
    assert isinstance(drawn[0], EpochLines) == (whose == "ours")
    assert any(isinstance(one, EpochLines) for one in run.trainer.callbacks)
    told = re.findall(r"[Ee]poch \d/\d", capsys.readouterr().out)
    named = [name for name, _ in itertools.groupby(told)]
    if whose == "ours":
        assert {*named} == {"Epoch 1/2", "epoch 1/2", "Epoch 2/2", "epoch 2/2"}
    else:
        assert {"epoch 1/2", "epoch 2/2"} <= {*named}
