"""What is drawn of a run and of a search."""

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from app.pictures.curves import LOST, MARKS, SPLITS, draw_curves
from app.pictures.finders import CHOSEN, draw_batch_size, draw_lr


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved."""
    figures: list[Figure] = []
    save = Figure.savefig

    def kept(self: Figure, *args: Any, **settings: Any) -> None:
        figures.append(self)
        save(self, *args, **settings)

    monkeypatch.setattr(Figure, "savefig", kept)
    return figures


def curves(folder: Path, columns: Mapping[str, list[float]], result: Mapping[str, Any]) -> Path:
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *columns])
        writer.writerows([n, *row] for n, row in enumerate(zip(*columns.values(), strict=True)))
    draw_curves(folder / "metrics.csv", folder / "curves.png", result)
    return folder / "curves.png"


FALLING = [4.0, 2.0, 1.0]
RESULT = {
    "metrics": {"test_acc": 0.7, "val_acc": 0.8},
    "metrics_of": {
        "test_acc": {"on": "test", "checkpoint": "best", "step": 2},
        "val_acc": {"on": "validation", "checkpoint": "best", "step": 2},
        "acc_of_all": {"on": "validation", "checkpoint": None, "step": 3},
    },
    "continued_after": [1, 2],
    "averaged_after": 1,
}


def test_a_split_has_one_colour_and_what_happened_is_marked(
    tmp_path: Path, drawn: list[Figure]
) -> None:
    columns = {
        "train_loss": FALLING, "val/loss": FALLING, "val_acc": [0.1, 0.8, 0.7], "lr": [1.0] * 3,
        "acc_of_all": [0.1] * 3, "test_acc": [0.7] * 3, "averaged_models": [0.0, 1.0, 2.0],
    }  # fmt: skip
    curves(tmp_path, columns, RESULT)
    (figure,) = drawn
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes}
    assert [*panels] == ["loss", "acc", "acc_of_all", "lr"]
    assert panels["loss"].get_yscale() == "log"
    assert panels["acc"].get_yscale() == "linear"
    colors = {
        title: [to_hex(line.get_color()) for line in axes.lines if line.get_label()[0] == "_"]
        for title, axes in panels.items()
    }
    assert colors["loss"][:2] == [SPLITS["train"], SPLITS["val"]]
    assert colors["acc"][:2] == [SPLITS["test"], SPLITS["val"]]
    assert colors["acc_of_all"][0] == SPLITS["val"]
    test = next(line for line in panels["acc"].lines if line.get_marker() == "D")
    assert (list(test.get_xdata()), list(test.get_ydata())) == ([2], [0.7])
    for axes in panels.values():
        upright = [line for line in axes.lines if line.get_linestyle() in (":", "--", "-.")]
        assert sorted((line.get_linestyle(), line.get_xdata()[0]) for line in upright) == [
            ("--", 2), ("-.", 1), (":", 1), (":", 2)
        ]  # fmt: skip
    told = [text.get_text() for text in figure.legends[0].texts]
    assert told == [*SPLITS, *MARKS]


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        (FALLING, "log"),
        ([4.0, math.nan, 1.0], "log"),
        ([math.inf, 2.0, 1.0], "log"),
        ([math.nan] * 3, "linear"),
        ([1.0, 0.0, -1.0], "linear"),
        ([1e-9, 1e9, 1.0], "log"),
    ],
)
def test_a_loss_is_drawn_whatever_it_comes_to(
    values: list[float], scale: str, tmp_path: Path, drawn: list[Figure]
) -> None:
    assert curves(tmp_path, {"train_loss": values}, {}).exists()
    (axes,) = drawn[0].axes
    assert axes.get_yscale() == scale
    lost = [line for line in axes.lines if line.get_marker() == LOST]
    steps = [step for step, value in enumerate(values, start=1) if not math.isfinite(value)]
    assert [list(line.get_xdata()) for line in lost] == ([steps] if steps else [])
    assert ("not finite" in [text.get_text() for text in drawn[0].legends[0].texts]) == bool(steps)


def test_all_panels_show_the_same_steps(tmp_path: Path, drawn: list[Figure]) -> None:
    result = {
        "metrics": {"test_acc": 0.7},
        "metrics_of": {"test_acc": {"on": "test", "checkpoint": "last", "step": 3}},
    }
    curves(tmp_path, {"train_loss": [math.nan, 2.0, math.nan], "lr": [1.0] * 3}, result)
    loss, acc, lr = (axes.get_xlim() for axes in drawn[0].axes)
    assert loss == acc == lr
    assert loss[0] <= 1 < 3 <= loss[1]


@pytest.mark.parametrize(("num", "num_panels"), [(0, None), (1, 1), (7, 7), (40, 30)])
def test_as_many_metrics_as_a_model_has_are_drawn(
    num: int, num_panels: int | None, tmp_path: Path, drawn: list[Figure]
) -> None:
    columns = {f"val/metric_{n} $^{{": FALLING for n in range(num)}
    assert curves(tmp_path, columns, {}).exists() == (num > 0)
    if num_panels is not None:
        assert len(drawn[0].axes) == num_panels
        told = [text.get_text() for text in drawn[0].legends[0].texts]
        assert told == ["val", *(["and 10 more in metrics.csv"] if num == 40 else [])]


@pytest.mark.parametrize("doubt", [None, "the loss hardly changes; type tuner.lr.highest=1"])
@pytest.mark.parametrize("chosen", [None, 0.1])
def test_the_learning_rate_that_was_chosen_stands_out(
    chosen: float | None, doubt: str | None, tmp_path: Path, drawn: list[Figure]
) -> None:
    lrs, losses = [10.0**n for n in range(-5, 1)], [2.0, 2.0, 1.9, 1.0, 0.5, 3.0]
    rules = {"slope": chosen, "valley": 0.01, "steepest": 0.01, "minimum": None}
    draw_lr(
        lrs, losses, losses, rules=rules, chosen=chosen, doubt=doubt, key="model.lr",
        png=tmp_path / "x.png",
    )  # fmt: skip
    (axes,) = drawn[0].axes
    told = axes.get_title(loc="left").replace("\n", " ")
    assert told.startswith("model.lr=0.1" if chosen else "model.lr: no answer")
    assert (doubt or "") in told
    assert [text.get_text().strip() for text in axes.texts] == ["valley, steepest 0.01"]
    colored = [line for line in axes.lines if line.get_color() == CHOSEN]
    assert bool(colored) == (chosen is not None)
    assert max(line.get_markersize() for line in colored or axes.lines) == (12 if chosen else 3.5)


def test_the_picture_of_the_batch_size_says_why_it_is_that_one(
    tmp_path: Path, drawn: list[Figure]
) -> None:
    draw_batch_size(
        {"samples / s": [(8, 10.0), (16, 19.0)]}, refused=[32, 64], size=16,
        reason="32 does not fit", key="data.batch_size", png=tmp_path / "x.png",
    )  # fmt: skip
    (axes,) = drawn[0].axes
    assert drawn[0].get_suptitle() == "data.batch_size=16: 32 does not fit"
    assert axes.get_legend_handles_labels()[1] == ["fits", "does not fit", "16"]
    assert max(axes.lines, key=lambda line: line.get_markersize()).get_xydata().tolist() == [
        [16, 19]
    ]
