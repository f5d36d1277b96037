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


def test_about_a_fifth_of_the_sweep_counts_however_many_steps_it_has() -> None:
    assert [beta_for(num) for num in (10, 100, 400)] == pytest.approx([0.5, 0.95, 0.9875])


# -------------------------------------------------------------------------------------- divergence


@pytest.mark.parametrize("last", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("num_before", [0, 5, 50])
def test_a_loss_that_is_not_finite_stops_at_once(last: float, num_before: int) -> None:
    assert diverged([1.0] * num_before + [last], beta=0.9, factor=4.0)


@pytest.mark.parametrize("shift", [0.0, -2.3, -1e3, 1e3])
def test_divergence_does_not_depend_on_where_zero_is(shift: float) -> None:
    """A multiple of the smallest loss would stop at once where that is negative."""
    losses = [loss + more for loss, more in zip(cliff(), noise(1, 0.05), strict=True)]
    at_zero = len(stopped(losses))
    assert -2 < EXPONENTS[at_zero - 1] < -1
    assert len(stopped([loss + shift for loss in losses])) == at_zero


def test_divergence_does_not_depend_on_the_scale() -> None:
    losses = [loss + more for loss, more in zip(cliff(), noise(1, 0.05), strict=True)]
    assert len(stopped([loss * 1000 for loss in losses])) == len(stopped(losses))


@pytest.mark.parametrize("seed", range(20))
def test_noise_alone_does_not_stop_a_test(seed: int) -> None:
    assert len(stopped(noise(seed, 1.0))) == 81


def test_a_constant_loss_does_not_stop_a_test() -> None:
    assert len(stopped([1.0] * 81)) == 81


def test_a_larger_factor_stops_later() -> None:
    assert len(stopped(cliff(), factor=1.0)) < len(stopped(cliff(), factor=20.0))


# ------------------------------------------------------------------- the rules on analytic curves


def tanh_fall(centre: float, low: float) -> list[float]:
    """Falls fastest at `centre`, is smallest at `low`, rises by 1 a decade after it."""
    floor = -math.tanh(low - centre)
    return [-math.tanh(x - centre) if x <= low + 1e-9 else floor + x - low for x in EXPONENTS]


def test_slope_is_where_the_loss_falls_fastest_in_log_lr() -> None:
    assert slope(LRS, tanh_fall(-3, -1)) == pytest.approx(1e-3)


def test_slope_stays_a_third_below_the_minimum() -> None:
    assert slope(LRS, tanh_fall(-1.2, -1)) == pytest.approx(0.1 / 3)


def test_slope_does_not_look_behind_the_minimum_and_steepest_does() -> None:
    fall_from_high = [100.0 - 90.0 * (x > 0.45) for x in EXPONENTS]
    losses = [
        low if x < -0.5 else high
        for x, low, high in zip(EXPONENTS, tanh_fall(-3, -1), fall_from_high, strict=True)
    ]
    assert slope(LRS, losses) == pytest.approx(1e-3)
    assert steepest(LRS, losses) == pytest.approx(10**0.45, rel=0.2)


def test_minimum_is_a_tenth_of_the_lr_at_the_smallest_loss() -> None:
    assert minimum(LRS, tanh_fall(-3, -1)) == pytest.approx(1e-2)


def test_valley_is_halfway_down_the_longest_valley() -> None:
    """Falling at 61 places, 0 to 60: a third and a sixth of 61 after the start, as in fastai."""
    assert valley(LRS, tanh_fall(-3, -1)) == LRS[29]


def fastai_valley(losses: list[float]) -> int:
    """By the definition, in quadratic time."""
    lengths: list[int] = []
    for place, loss in enumerate(losses):
        before = [lengths[j] for j in range(place) if losses[j] > loss]
        lengths.append(1 + max(before, default=0))
    longest = max(lengths)
    start = lengths.index(longest) - longest
    return start + int(longest / 3) + int(longest / 3 / 2)


@pytest.mark.parametrize("seed", range(20))
def test_valley_is_fastais_on_any_curve(seed: int) -> None:
    losses = [
        round(loss + more, 2)
        for loss, more in zip(tanh_fall(-3, -1), noise(seed, 0.3), strict=True)
    ]
    assert valley(LRS, losses) == LRS[fastai_valley(losses)]


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(
    "losses",
    [[1.0], [1.0, 1.0], [1.0] * 81, [float(n) for n in range(81)]],
    ids=["one", "two", "constant", "rising"],
)
def test_no_rule_has_an_answer_where_nothing_falls(name: str, losses: list[float]) -> None:
    assert RULES[name](LRS[: len(losses)], losses) is None


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("scale", [1.0, 1000.0])
@pytest.mark.parametrize("shift", [0.0, -50.0])
def test_rules_do_not_depend_on_the_zero_or_the_scale_of_the_loss(
    name: str, scale: float, shift: float
) -> None:
    losses = smooth(cliff(), beta=0.9)
    moved = [loss * scale + shift for loss in losses]
    assert RULES[name](LRS, moved) == RULES[name](LRS, losses)


@pytest.mark.parametrize("name", RULES)
def test_rules_answer_in_plain_floats(name: str) -> None:
    assert type(RULES[name](LRS, tanh_fall(-3, -1))) is float


# --------------------------------------------------------------------------------- the suggestion


@pytest.mark.parametrize("shift", [0.0, -10.0])
@pytest.mark.parametrize("at", [-4.0, -3.0, -2.0, -1.0])
def test_lr_slope_the_suggestion_is_within_a_decade_below_the_cliff(
    at: float, shift: float
) -> None:
    """Lightning's, the steepest slope in linear lr, is at the left end, whatever the curve."""
    losses = [loss + shift for loss in cliff(at)]
    linear = LRS[int(np.argmin(np.gradient(losses[:60], LRS[:60])))]
    found = suggest(LRS, stopped(losses), rule="slope")
    assert linear < 10 ** (at - 2.5)
    assert found.lr is not None
    assert 10 ** (at - 1) <= found.lr < 10**at
    assert found.doubt is None
    assert set(found.by_rule) == set(RULES)
    assert found.by_rule["slope"] == found.lr


def test_each_rule_can_be_asked_for() -> None:
    losses = stopped(cliff())
    for name in RULES:
        found = suggest(LRS, losses, rule=name)
        assert found.lr == found.by_rule[name]


@pytest.mark.parametrize("seed", range(10))
def test_a_noisy_curve_gives_a_suggestion_near_the_cliff(seed: int) -> None:
    losses = [loss + more for loss, more in zip(cliff(), noise(seed, 0.1), strict=True)]
    found = suggest(LRS, stopped(losses), rule="slope")
    assert found.lr is not None
    assert 3e-4 < found.lr < 1e-2
    assert found.doubt is None


def test_a_noisy_start_does_not_draw_the_suggestion_to_the_lowest_learning_rates() -> None:
    losses = cliff()
    losses[:4] = [2.6, 2.0, 2.7, 2.1]
    found = suggest(LRS, stopped(losses), rule="slope")
    assert found.lr is not None
    assert 1e-3 <= found.lr < 1e-2
    assert found.doubt is None


def test_a_wild_start_is_doubted() -> None:
    losses = cliff()
    losses[:4] = [6.0, 0.1, 5.0, 3.0]
    found = suggest(LRS, stopped(losses), rule="slope")
    assert found.doubt is not None


def test_what_follows_a_nan_is_left_out() -> None:
    losses = cliff()
    until_nan = suggest(LRS, [*losses[:54], math.nan], rule="slope")
    assert until_nan == suggest(LRS, [*losses[:54], math.nan, -1e9, math.inf], rule="slope")
    assert until_nan.lr is not None
    assert until_nan.doubt is None


# -------------------------------------------------------------------------------------- the doubts


def test_a_flat_curve_is_doubted() -> None:
    found = suggest(LRS, [2.3] * 81, rule="slope")
    assert found.lr is None
    assert found.doubt == (
        "the loss hardly changes up to a learning rate of 10; type tuner.lr.highest=1e+03"
    )


@pytest.mark.parametrize("rule", RULES)
def test_noise_alone_is_doubted(rule: str) -> None:
    doubted = sum(
        suggest(LRS, noise(seed, 1.0), rule=rule).doubt is not None for seed in range(100)
    )
    assert doubted >= 95


@pytest.mark.parametrize("shift", [0.0, -100.0])
def test_a_curve_that_only_rises_is_doubted(shift: float) -> None:
    losses = [shift + 1.0 + 0.1 * step + more for step, more in enumerate(noise(0, 0.02))]
    found = suggest(LRS, stopped(losses), rule="slope")
    assert found.lr is None
    assert found.doubt == (
        "the loss only rises, from a learning rate of 1e-07 on; type tuner.lr.lowest=1e-10"
    )


def test_a_fall_that_is_lost_in_the_noise_is_doubted() -> None:
    fall = [0.02 * loss for loss in cliff()]
    losses = [loss + more for loss, more in zip(fall, noise(3, 0.3), strict=True)]
    found = suggest(LRS, [*losses[:60], math.nan], rule="slope")
    assert found.doubt is not None
    assert found.doubt.startswith("the loss does not fall clearly before it rises: by 0.")
    assert "from step to step; type tuner.lr.num_steps=324 or train with larger" in found.doubt


def test_a_doubt_tells_how_to_go_on_where_there_is_a_suggestion() -> None:
    found = suggest(LRS, [-x for x in EXPONENTS], rule="slope")
    assert found.lr is not None
    assert found.doubt == (
        "the loss still falls at the highest learning rate, 10; type tuner.lr.highest=1e+03; "
        f"to train with {found.lr:.2g} all the same, type tuner.lr.on_doubt=use"
    )


def test_a_fall_at_the_lowest_learning_rates_is_doubted() -> None:
    losses = [math.exp(-step) if step < 40 else 0.01 * (step - 39) for step in range(81)]
    found = suggest(LRS, stopped(losses), rule="slope")
    assert found.doubt is not None
    assert found.doubt.startswith("the loss falls fastest at the lowest learning rates, at ")
    assert "; type tuner.lr.lowest=1e-10; to train with " in found.doubt


def test_a_loss_that_is_nan_at_once_is_doubted() -> None:
    found = suggest(LRS, [2.3, 2.2, math.nan], rule="slope")
    assert found.lr is None
    assert found.doubt == (
        "the loss is NaN or infinite at step 2 already, at a learning rate of 1.6e-07; "
        "type tuner.lr.lowest=1e-10"
    )


def test_no_finite_loss_at_all_is_doubted() -> None:
    found = suggest(LRS, [math.nan], rule="slope")
    assert found.by_rule == dict.fromkeys(RULES)
    assert found.doubt is not None


def test_rules_that_disagree_are_doubted() -> None:
    """A second, steeper fall behind a divergence draws `steepest` away; only it is in doubt."""
    losses = [
        low if x < -2.5 else 300.0 if x < 0.5 else 10.0
        for x, low in zip(EXPONENTS, tanh_fall(-4, -3), strict=True)
    ]
    assert suggest(LRS, losses, rule="slope").doubt is None
    found = suggest(LRS, losses, rule="steepest")
    assert found.doubt is not None
    said = ", ".join(f"{name} {lr:.2g}" for name, lr in found.by_rule.items())
    assert found.doubt == (
        f"the rules disagree by more than a decade ({said}); type tuner.lr.num_steps=324; "
        f"to train with {found.lr:.2g} all the same, type tuner.lr.on_doubt=use"
    )
