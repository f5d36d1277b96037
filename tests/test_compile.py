"""torch.compile of any model, in place: here on the CPU, with a C++ compiler."""

import copy
import pickle
import shutil
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torchmetrics import MeanSquaredError

from app.averaging.shadow import Shadow
from app.compile import Compile, refuse_without_compiler, worth_compiling
from app.memory import Checkpointing

pytestmark = [  # torch's own, of what it compiles with; it hides the second from a terminal
    pytest.mark.filterwarnings("ignore:`torch.jit.script.*` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    limit = torch._dynamo.config.cache_size_limit
    yield
    torch._dynamo.config.cache_size_limit = limit


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace, but do not compile: for what has nothing to do with the generated code."""
    real = torch.compile

    def trace(forward: Any, **settings: Any) -> Any:
        return real(forward, **settings, backend="eager")

    monkeypatch.setattr(torch, "compile", trace)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x).relu()


class Net(LightningModule):
    """A forward for predictions, and a step that calls the parts: both are common."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(Block(), Block())
        self.decoders = nn.ModuleList([Block()])
        self.head = nn.Linear(4, 1)
        self.metric = MeanSquaredError()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.decoders[0](self.encoder(x)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.head(self.decoders[0](self.encoder(batch[0]))).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def compiled(
    model: nn.Module, mode: str = "default", *, dynamic: bool | None = None, fullgraph: bool = True
) -> Any:
    Compile(mode=mode, dynamic=dynamic, fullgraph=fullgraph).apply(model, accelerator="cpu")
    return model


def num_graphs() -> int:
    return counters["stats"]["unique_graphs"]


def test_the_parts_that_a_step_may_call_are_worth_compiling() -> None:
    assert list(dict(worth_compiling(Net()))) == ["encoder", "decoders.0"]


@needs_compiler
@pytest.mark.slow
def test_generated_code_trains_as_the_model_does_and_sees_swapped_weights() -> None:
    model = Net()
    reference = copy.deepcopy(model)
    compiled(model)
    for each in (model, reference):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        shadow = Shadow(each)
        for _ in range(3):
            optimizer.zero_grad()
            each(X).square().mean().backward()
            optimizer.step()
            shadow.update(0.3)
        shadow.swap()
    assert num_graphs() == 1
    for (name, mine), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=name)
    for _ in range(2):
        with torch.inference_mode():
            torch.testing.assert_close(model(X), reference(X))
        for each in (model, reference):
            for parameter in each.parameters():
                parameter.data = 3 * parameter.data
    assert num_graphs() == 2


def test_a_step_that_calls_the_parts_profits_and_its_logging_stays_outside(eager: None) -> None:
    model = compiled(Net())
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X), batch_size=4)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(model, data)
    assert "loss" in trainer.callback_metrics
    assert num_graphs() == 2
    assert not counters["graph_break"]


def test_names_class_and_pickling_stay_as_they_were(eager: None) -> None:
    model = Net()
    names = [*model.state_dict()], [name for name, _ in model.named_modules()]
    expected = model(X)
    compiled(compiled(model))
    assert names == ([*model.state_dict()], [name for name, _ in model.named_modules()])
    assert type(model) is Net
    assert type(model.encoder) is nn.Sequential
    assert torch.equal(model(X), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(X), expected)
    assert num_graphs() == 1


def test_copies_run_their_own_weights_and_are_not_compiled_again(eager: None) -> None:
    model = compiled(Net())
    Checkpointing(classes=["Block"], min_parameters=None).apply(model)
    model(X).sum().backward()
    num_compiled = num_graphs()
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.data = torch.zeros_like(parameter)
    result = twin(X)
    assert not result.any()
    result.sum().backward()
    assert model(X).any()
    assert num_graphs() == num_compiled


@needs_compiler
@pytest.mark.slow
def test_checkpointed_blocks_are_compiled_with_equal_gradients_and_statistics() -> None:
    def gradients(model: nn.Module) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model(X).square().sum().backward()
        return {**{name: p.grad for name, p in model.named_parameters()}, **model.state_dict()}

    model = nn.Sequential(
        nn.Sequential(Block(), nn.BatchNorm1d(4), nn.Dropout(0.5)), nn.Linear(4, 1)
    )
    alone, both = compiled(copy.deepcopy(model)), copy.deepcopy(model)
    Checkpointing(classes=["Sequential"], min_parameters=None).apply(both)
    compiled(both)
    expected, found = gradients(alone), gradients(both)
    assert num_graphs() == 2
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert int(both.get_buffer("0.1.num_batches_tracked")) == 1


def test_a_block_that_breaks_the_graph_is_checkpointed_all_the_same(eager: None) -> None:
    class Broken(Block):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return self.norm(super().forward(x))

    model = nn.Sequential(nn.Sequential(Broken(), Broken()))
    reference = copy.deepcopy(model)
    Checkpointing(classes=["Broken"], min_parameters=None).apply(model)
    compiled(model, fullgraph=False)
    for each in (model, reference):
        each(X).square().sum().backward()
    assert counters["graph_break"]
    for name, value in reference.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)


def test_many_parts_stay_below_the_limit_of_torch_for_all_of_a_class(eager: None) -> None:
    model = nn.Module()
    parts = [nn.Sequential(nn.Linear(4, size), nn.Linear(size, 4)) for size in range(1, 11)]
    model.parts = nn.ModuleList(parts)
    compiled(model)
    for part in parts:
        part(X)
    assert num_graphs() == 10


def test_a_model_with_nothing_to_compile_is_refused() -> None:
    class Layers(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

    with pytest.raises(ValueError, match="nothing to compile") as refusal:
        compiled(Layers())
    assert str(refusal.value) == (
        "compile found nothing to compile in Layers: it has no forward, and no part of several "
        "layers; move the layers to its forward, or use compile=none"
    )


def test_without_a_compiler_it_is_refused_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    refuse_without_compiler(on_cpu=False)
    with pytest.raises(ValueError, match="compiler") as refusal:
        compiled(Net())
    assert str(refusal.value) == (
        "compile needs a C++ compiler on the CPU, and there is no no-such-compiler here; install "
        "one (Debian: apt-get install g++), name one in the environment variable CXX, or use "
        "compile=none"
    )


def test_cuda_graphs_on_a_cpu_are_refused() -> None:
    with pytest.raises(ValueError, match="GPU") as refusal:
        compiled(Net(), "reduce_overhead")
    assert str(refusal.value) == (
        "compile=reduce_overhead needs a GPU: CUDA graphs are all that it adds to "
        "compile=default; use that one"
    )
