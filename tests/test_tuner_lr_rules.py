"""Learning-rate rules on curves whose answer is known, and the doubts, word for word."""

import math
import random

import numpy as np
import pytest

from app.tuner.lr_rules import (
    RULES,
    beta_for,
    diverged,
    minimum,
    slope,
    smooth,
    steepest,
    suggest,
    sweep,
    valley,
)

LRS = sweep(num_steps=81, lowest=1e-7, highest=10.0, mode="exponential")
"""Ten steps a decade."""
EXPONENTS = [-7 + step / 10 for step in range(81)]


def noise(seed: int, size: float, num: int = 81) -> list[float]:
    drawn = random.Random(seed)
    return [drawn.gauss(0.0, size) for _ in range(num)]


def cliff(at: float = -2.0) -> list[float]:
    """Flat at 2.3, falls from three decades before `at` to 0.5, then explodes to 1,000 at most."""
    losses = []
    for x in EXPONENTS:
        if x < at - 3:
            losses.append(2.3)
        elif x <= at:
            losses.append(2.3 - 1.8 * (x - at + 3) / 3)
        else:
            losses.append(min(0.5 * 10 ** (4 * (x - at)), 1000.0))
    return losses


def stopped(losses: list[float], factor: float = 4.0) -> list[float]:
    """The losses up to and with the first at which the test stops."""
    for num in range(1, len(losses) + 1):
        if diverged(losses[:num], beta=beta_for(len(losses)), factor=factor):
            return losses[:num]
    return losses


# ------------------------------------------------------------------------------------------- sweep


def test_an_exponential_sweep_has_equal_factors() -> None:
    lrs = sweep(num_steps=5, lowest=1e-4, highest=1.0, mode="exponential")
    assert lrs == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1.0], rel=1e-12)
    assert (lrs[0], lrs[-1]) == (1e-4, 1.0)


def test_a_linear_sweep_has_equal_differences() -> None:
    lrs = sweep(num_steps=4, lowest=1.0, highest=4.0, mode="linear")
    assert lrs == pytest.approx([1.0, 2.0, 3.0, 4.0])


@pytest.mark.parametrize(
    "wrong",
    [{"num_steps": 1}, {"lowest": 0.0}, {"lowest": 20.0}, {"mode": "quadratic"}],
)
def test_a_sweep_that_cannot_be_is_refused(wrong: dict[str, object]) -> None:
    right = {"num_steps": 10, "lowest": 1e-7, "highest": 10.0, "mode": "linear"}
    with pytest.raises(AssertionError):
        sweep(**{**right, **wrong})  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------- smoothing


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.95, 0.99])
@pytest.mark.parametrize("loss", [1.0, -3.7, 0.0])
def test_lr_smoothing_a_constant_loss_is_recorded_as_constant(beta: float, loss: float) -> None:
    assert smooth([loss] * 200, beta=beta) == [loss] * 200


def test_smoothing_is_the_weighted_mean_of_all_losses_so_far() -> None:
    losses = noise(0, 1.0, 30)
    for num, smoothed in enumerate(smooth(losses, beta=0.9), start=1):
        weights = 0.9 ** np.arange(num)[::-1]
        assert smoothed == pytest.approx(np.average(losses[:num], weights=weights), abs=1e-12)


def test_nothing_is_smoothed_to_nothing() -> None:
    assert smooth([], beta=0.9) == []


