from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from lightning.pytorch import LightningModule, Trainer
from omegaconf import OmegaConf

from app.config import refuse_values
from app.data.in_memory import InMemoryLoader

CONF = Path(__file__).parents[1] / "conf"
PRESETS = sorted(path.stem for path in (CONF / "model").glob("*.yaml") if path.stem != "custom")
DATA = {"mnist1d": 40, "digits": 64}
HOPS = {"graphsage": (3, 4)}
"""Dimensions between batch and features, of models of neighbourhoods."""

# Lightning 2.6 asks torch's pytree a question that torch 2.13 has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(preset: str, *overrides: str, data: str = "mnist1d") -> Any:
    with initialize_config_module("app.conf", version_base="1.3"):
        cfg = compose(overrides=[f"+data={data}", f"+model={preset}", *overrides])
    refuse_values(cfg)
    OmegaConf.to_object(cfg)
    torch.manual_seed(0)
    return instantiate(cfg.model)


def batches(num_samples: int, batch_size: int, preset: str) -> InMemoryLoader:
    generator = torch.Generator().manual_seed(1)
    return InMemoryLoader(
        tensors=(
            torch.randn(num_samples, *HOPS.get(preset, ()), 40, generator=generator),
            torch.arange(num_samples) % 10,
        ),
        batch_size=batch_size,
        shuffle=False,
        drop_last=False,
        seed=0,
    )


def trainer(**changes: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **changes,
    )


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_fits_every_data_set(preset: str, data: str) -> None:
    model = build(preset, data=data)
    assert isinstance(model, LightningModule)
    assert model(torch.zeros(3, *HOPS.get(preset, ()), DATA[data])).shape == (3, 10)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_learns_one_batch_by_heart(preset: str) -> None:
    model = build(preset)
    batch = next(iter(batches(20, 20, preset)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        loss = model.training_step(batch, 0)
        loss.backward()
        optimizer.step()
    assert loss < 0.1


@pytest.mark.parametrize("preset", PRESETS)
def test_lightning_trains_validates_tests_and_predicts(preset: str) -> None:
    model = build(preset)
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=0.1)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    run = trainer(max_epochs=1)
    run.fit(model, batches(32, 8, preset), batches(20, 8, preset))
    assert all(
        not torch.equal(new, old) for new, old in zip(model.parameters(), before, strict=True)
    )
    assert sorted(run.callback_metrics) == ["val_acc", "val_loss"]
    tested = run.test(model, batches(20, 8, preset), verbose=False)[0]
    assert sorted(tested) == ["test_acc", "test_loss"]
    probabilities = torch.cat(run.predict(model, batches(20, 8, preset)))
    assert probabilities.shape == (20, 10)
    assert torch.allclose(probabilities.sum(dim=1), torch.ones(20))


@pytest.mark.parametrize("preset", PRESETS)
def test_metrics_are_means_over_samples_not_over_batches(preset: str) -> None:
    model = build(preset).eval()
    data = batches(20, 18, preset)  # batches of 18 and 2
    x, y = data.dataset.tensors
    with torch.no_grad():
        logits = model(x)
    logged = trainer().validate(model, data, verbose=False)[0]
    assert logged["val_acc"] == pytest.approx((logits.argmax(1) == y).float().mean().item())
    loss = torch.nn.functional.cross_entropy(logits, y).item()
    assert logged["val_loss"] == pytest.approx(loss, rel=1e-5)


def test_the_cnn_has_the_documented_number_of_parameters() -> None:
    def count(preset: str) -> int:
        return sum(parameter.numel() for parameter in build(preset).parameters())

    assert count("cnn1d") == 5210
    assert count("cnn1d_bn") == 5210 + 3 * 2 * 25


def test_no_hidden_layer_is_a_linear_classifier() -> None:
    assert [tuple(p.shape) for p in build("mlp", "model.hidden_sizes=[]").parameters()] == [
        (10, 40),
        (10,),
    ]


@pytest.mark.parametrize(
    ("preset", "override", "message"),
    [
        (
            "cnn1d",
            "model.kernel_sizes=[]",
            "model.kernel_sizes must be one or more numbers >= 1, got []; "
            "type 'model.kernel_sizes=[5,3,3]'",
        ),
        (
            "cnn1d",
            "model.kernel_sizes=[41,9]",
            "model.kernel_sizes must fit into the 40 features of the data, got [41, 9]; "
            "use fewer layers or a smaller model.stride",
        ),
        (
            "transformer",
            "model.patch_size=7",
            "model.patch_size must divide the 40 features of the data, got 7; "
            "type model.patch_size=4",
        ),
        (
            "transformer",
            "model.num_heads=5",
            "model.num_heads must divide model.dim=32, got 5; type model.num_heads=1",
        ),
        (
            "transformer",
            "model.dropout=1",
            "model.dropout must be >= 0 and < 1, got 1.0; type model.dropout=0",
        ),
    ],
)
def test_a_model_that_cannot_be_is_refused(preset: str, override: str, message: str) -> None:
    with pytest.raises(ValueError, match="must") as error:
        build(preset, override)
    assert str(error.value) == message


def test_custom_takes_any_lightning_module() -> None:
    target = "model._target_=lightning.pytorch.demos.boring_classes.BoringModel"
    assert type(build("custom", target)).__name__ == "BoringModel"
    assert build("custom", "model._target_=builtins.dict", "+model.lr=0.01") == {"lr": 0.01}
