"""What a precision asks of the device is refused where the device has not got it."""

from collections.abc import Iterator

import pytest
import torch

from app.conf.precision.schema import PRESETS, Precision
from app.precision import use_matmul

REFUSED = {
    ("high", "32-true", "cpu", None): "precision=tf32 needs a GPU since Ampere, and "
    "trainer.accelerator is cpu; use precision=fp32",
    ("high", "32-true", "auto", None): "precision=tf32 needs a GPU since Ampere, and there is none "
    "here; use precision=fp32",
    ("high", "32-true", "gpu", (7, 5)): "precision=tf32 needs a GPU since Ampere, and this is a "
    "Test GPU; use precision=fp32",
    ("highest", "transformer-engine", "cpu", None): "precision=fp8 needs a GPU since Ada, and "
    "trainer.accelerator is cpu; use precision=bf16",
    ("highest", "transformer-engine", "auto", (8, 6)): "precision=fp8 needs a GPU since Ada, and "
    "this is a Test GPU; use precision=bf16",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")


def pretend(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Test GPU")


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_what_the_device_has_not_got_is_refused(
    monkeypatch: pytest.MonkeyPatch, case: tuple[str, str, str, tuple[int, int] | None]
) -> None:
    matmul, mode, accelerator, capability = case
    pretend(monkeypatch, capability)
    with pytest.raises(ValueError, match="precision") as refusal:
        use_matmul(matmul, mode=mode, accelerator=accelerator)
    assert str(refusal.value) == REFUSED[case]
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_run_sets_the_products_of_its_process_also_after_another_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(monkeypatch, (9, 0))
    for matmul in ("high", "highest"):
        use_matmul(matmul, mode="transformer-engine", accelerator="auto")
        assert torch.get_float32_matmul_precision() == matmul


def test_an_unknown_mode_is_refused_with_the_presets() -> None:
    with pytest.raises(ValueError, match="mode") as refusal:
        Precision(mode="8-true")
    assert str(refusal.value) == (
        "precision.mode must be one of 32-true, bf16-mixed, 16-mixed, bf16-true, "
        f"transformer-engine, 64-true, got 8-true; use precision={', '.join(PRESETS)}"
    )
