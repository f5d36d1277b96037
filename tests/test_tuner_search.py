"""The search for a micro-batch, against simulated memories and brute force."""

import math
import random
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from app.tuner.search import (
    Answer,
    Trial,
    allowed_sizes,
    power_ladder,
    search_batch_size,
)

MB = 2**20
GB = 2**30
MODES = ["power", "binsearch", "model"]
LIMITS: list[int | None] = [1, 2, 3, 37, 300, 1337, 5000, 8191, None]
Memory = Callable[[int], int]
Curve = Callable[[float, int, int], Memory]


class Device:
    """Reports the simulated peak of a size; runs out of memory above its capacity."""

    def __init__(
        self,
        memory: Memory,
        capacity: int = 16 * GB,
        speed: Callable[[int], float] | None = None,
        stop_at: int | None = None,
    ) -> None:
        self.memory = memory
        self.capacity = capacity
        self.speed = speed
        self.stop_at = stop_at
        self.tried: list[int] = []

    def __call__(self, size: int) -> Trial:
        if len(self.tried) == self.stop_at:
            raise KeyboardInterrupt
        self.tried.append(size)
        peak = self.memory(size)
        fits = peak <= self.capacity
        return Trial(
            size=size,
            fits=fits,
            peak_bytes=peak if fits else None,
            samples_per_s=self.speed(size) if fits and self.speed else None,
        )


def search(device: Device, **options: Any) -> Answer:
    """With an assertion of what holds for every search: no size twice, the answer ran, the trials
    are those made."""
    options = {
        "mode": "model",
        "init_val": 2,
        "max_val": 65536,
        "num_samples": None,
        "divisors_of": None,
        "max_trials": None,
        "margin": 0.0,
        "capacity_bytes": device.capacity,
        "goal": "largest",
        "provoke": True,
        **options,
    }
    answer = search_batch_size(device, **options)
    assert [trial.size for trial in answer.trials] == device.tried
    assert len(set(device.tried)) == len(device.tried)
    assert max(device.tried) <= min(options["max_val"], options["num_samples"] or math.inf)
    ran = [trial.size for trial in answer.trials if trial.fits]
    if options["margin"] == 0.0:
        assert answer.size in ran
    else:
        assert answer.size <= max(ran)
    return answer


def limited(limit: int | None) -> Device:
    """Memory in proportion to the size, that is enough for `limit` samples."""
    return Device(
        blocks(lambda size: size * MB, 1), capacity=GB**2 if limit is None else limit * MB
    )


def blocks(curve: Callable[[int], float], block: int) -> Memory:
    return lambda size: math.ceil(curve(size) / block) * block


def linear(limit: float, base: int, room: int) -> Memory:
    return blocks(lambda size: base + room * size / limit, 512)


def quantised_2mb(limit: float, base: int, room: int) -> Memory:
    return blocks(lambda size: base + room * size / limit, 2 * MB)


def quantised_20mb(limit: float, base: int, room: int) -> Memory:
    return blocks(lambda size: base + room * size / limit, 20 * MB)


def kinked(limit: float, base: int, room: int) -> Memory:
    """The optimizer step is the peak of small sizes."""
    step = base + room * limit**0.7 / limit
    return blocks(lambda size: max(step, base + room * size / limit), 512)


def superlinear(limit: float, base: int, room: int) -> Memory:
    return blocks(lambda size: base + room * (size / limit + (size / limit) ** 2) / 2, 512)


CURVES: list[Curve] = [linear, kinked, quantised_2mb, quantised_20mb, superlinear]


def largest_fitting(memory: Memory, capacity: int, sizes: Any) -> int:
    """By bisection over a memory that never falls; 0 where none fits."""
    low, high = -1, len(sizes)
    while high - low > 1:
        middle = (low + high) // 2
        if memory(sizes[middle]) <= capacity:
            low = middle
        else:
            high = middle
    return sizes[low] if low >= 0 else 0


def random_device(rng: random.Random) -> Device:
    """A limit of 1 to 8192, a fixed share of 2 to 70 %, a kink anywhere, a growth up to squared."""
    capacity = rng.choice([4, 8, 16, 24, 40, 80, 141]) * GB
    limit = int(2 ** rng.uniform(0, 13)) + rng.random()
    base = rng.uniform(0.02, 0.7) * capacity
    room = capacity - base
    bent, power = rng.uniform(0.05, 0.6), rng.uniform(1.2, 2.0)
    kink = limit ** rng.uniform(0, 0.98)
    kind = rng.choice(CURVES)
    block = {quantised_2mb: 2 * MB, quantised_20mb: 20 * MB}.get(kind, 512)

    def curve(size: int) -> float:
        share = size / limit
        if kind is superlinear:
            share = (1 - bent) * share + bent * share**power
        elif kind is kinked:
            share = max(share, kink / limit)
        return base + room * share

    return Device(blocks(curve, block), capacity)


def random_devices(num: int) -> list[Device]:
    """Those on which a micro-batch of 1 fits."""
    rng = random.Random(0)
    devices: list[Device] = []
    while len(devices) < num:
        device = random_device(rng)
        if device.memory(1) <= device.capacity:
            devices.append(device)
    return devices


def test_it_imports_neither_torch_nor_lightning() -> None:
    code = "import sys, app.tuner.search; assert not {'torch', 'lightning'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("curve", CURVES)
def test_bs_untested_the_answer_ran_and_the_next_size_did_not_fit(
    curve: Curve, limit: int | None, mode: str
) -> None:
    memory = linear(1e9, GB, GB) if limit is None else curve(limit + 0.5, 3 * GB, 13 * GB)
    device = Device(memory)
    answer = search(device, mode=mode, max_val=10000)

    sizes: Any = range(1, 10001)
    if mode == "power":
        sizes = [*(2**k for k in range(14)), 10000]
    expected = largest_fitting(memory, device.capacity, sizes)
    assert expected > 0
    assert answer.size == expected
    assert answer.complete
    if expected == 10000:
        assert answer.reason == "tuner.batch_size.max_val=10000 reached"
    else:
        next_size = sizes[sizes.index(expected) + 1]
        assert next_size in device.tried
        assert answer.reason == f"size {next_size} does not fit"


def test_bs_untested_model_is_exact_in_half_the_trials_of_bisection() -> None:
    counts: dict[str, list[int]] = {"model": [], "binsearch": []}
    for position, device in enumerate(random_devices(1700)):
        expected = largest_fitting(device.memory, device.capacity, range(1, 65537))
        init_val = [1, 2, 2, 8, 32][position % 5]
        for mode, found in counts.items():
            device.tried = []
            answer = search(device, mode=mode, init_val=init_val)
            assert answer.size == expected, (position, mode)
            found.append(len(answer.trials))

    assert statistics.median(counts["model"]) <= 6
    assert max(counts["model"]) <= 32
    assert statistics.median(counts["binsearch"]) >= 11


@pytest.mark.parametrize("limit", [1, 5, 700, 9000, 65536])
@pytest.mark.parametrize("reported", ["nothing", "anything", "the same", "too much"])
def test_bs_untested_model_is_exact_and_ends_for_peaks_that_mean_nothing(
    reported: str, limit: int
) -> None:
    rng = random.Random(0)
    tried: list[int] = []

    def probe(size: int) -> Trial:
        tried.append(size)
        peaks = {"nothing": 0, "anything": rng.randrange(2 * GB), "the same": GB}
        peak = peaks.get(reported, GB + size)
        return Trial(size=size, fits=size <= limit, peak_bytes=peak, samples_per_s=None)

    answer = search_batch_size(
        probe,
        mode="model",
        init_val=2,
        max_val=65536,
        num_samples=None,
        divisors_of=None,
        max_trials=None,
        margin=0.0,
        capacity_bytes=GB,
        goal="largest",
        provoke=True,
    )
    assert answer.size == limit
    assert len(tried) < 40


@pytest.mark.parametrize(("init_val", "expected"), [(1, 32), (2, 32), (3, 48), (37, 37), (38, 38)])
def test_power_tries_doublings_of_init_val(init_val: int, expected: int) -> None:
    device = limited(50)
    assert search(device, mode="power", init_val=init_val).size == expected
    assert device.tried == [init_val * 2**k for k in range(len(device.tried))]


@pytest.mark.parametrize(("max_trials", "expected"), [(1, 2), (3, 8), (6, 32)])
def test_bs_untested_power_ends_with_the_size_that_ran_last(max_trials: int, expected: int) -> None:
    answer = search(limited(50), mode="power", max_trials=max_trials)
    assert answer.size == expected
    if max_trials < 6:
        assert answer.reason == f"tuner.batch_size.max_trials={max_trials} reached"
    else:  # the last one failed
        assert answer.reason == "size 64 does not fit"


@pytest.mark.parametrize("mode", MODES)
def test_max_trials_bounds_every_mode(mode: str) -> None:
    answer = search(limited(3000), mode=mode, max_trials=3)
    assert len(answer.trials) == 3
    assert answer.reason == "tuner.batch_size.max_trials=3 reached"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("goal", ["largest", "fastest"])
def test_bs_max_the_bound_is_tried_and_never_passed(mode: str, goal: str) -> None:
    device = Device(linear(1e6, GB, GB), speed=lambda size: float(size))
    answer = search(device, mode=mode, goal=goal, max_val=100)
    assert answer.size == 100
    assert max(device.tried) == 100
    assert answer.reason == "tuner.batch_size.max_val=100 reached"


@pytest.mark.parametrize("mode", MODES)
def test_bs_max_a_bound_that_does_not_fit_is_not_the_answer(mode: str) -> None:
    answer = search(limited(99), mode=mode, max_val=100)
    assert answer.size == (64 if mode == "power" else 99)
    assert answer.reason == "size 100 does not fit"


@pytest.mark.parametrize("mode", MODES)
def test_bs_max_a_bound_above_8192_is_kept(mode: str) -> None:
    assert search(limited(None), mode=mode, max_val=20000).size == 20000


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("init_val", [2, 128])
def test_bs_dataset_no_size_is_larger_than_the_data_set(mode: str, init_val: int) -> None:
    answer = search(limited(None), mode=mode, init_val=init_val, num_samples=100, max_val=4096)
    assert answer.size == 100
    assert answer.reason == "the data set has 100 samples"


@pytest.mark.parametrize("mode", MODES)
def test_bs_dataset_the_smaller_of_both_bounds_is_the_reason(mode: str) -> None:
    answer = search(limited(None), mode=mode, num_samples=100, max_val=60)
    assert answer.size == 60
    assert answer.reason == "tuner.batch_size.max_val=60 reached"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("limit", [1, 2, 3, 37, 499, 511])
def test_where_init_val_does_not_fit_the_search_goes_down(mode: str, limit: int) -> None:
    device = limited(limit)
    answer = search(device, mode=mode, init_val=512)
    assert answer.size == (2 ** int(math.log2(limit)) if mode == "power" else limit)
    assert max(device.tried) == 512


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("init_val", [1, 2, 6, 512])
def test_where_1_does_not_fit_the_error_says_what_to_change(mode: str, init_val: int) -> None:
    device = limited(0)
    with pytest.raises(ValueError, match="even a micro-batch of 1") as error:
        search(device, mode=mode, init_val=init_val)
    assert str(error.value) == (
        "even a micro-batch of 1 does not fit into memory, which accumulation cannot change; "
        "type precision=bf16 or choose a smaller model"
    )
    assert device.tried[-1] == 1


def test_where_no_size_tried_fits_the_error_says_how_far_the_search_came() -> None:
    with pytest.raises(ValueError, match="max_trials") as error:
        search(limited(1), mode="binsearch", init_val=512, max_trials=3)
    assert str(error.value) == (
        "tuner.batch_size.max_trials must let the search reach a size that fits, got 3 and none "
        "did, down to 128; lower tuner.batch_size.init_val or raise tuner.batch_size.max_trials"
    )


@pytest.mark.parametrize("mode", MODES)
def test_margin_is_taken_off_the_size_found(mode: str) -> None:
    found = search(limited(1337), mode=mode).size
    for margin in (0.05, 0.1, 0.5):
        device = limited(1337)
        assert search(device, mode=mode, margin=margin).size == int(found * (1 - margin))
    assert search(limited(1), mode=mode, margin=0.9).size == 1
    assert search(limited(200), mode=mode, margin=0.1, divisors_of=384).size == 128


@pytest.mark.parametrize("mode", ["binsearch", "model"])
@pytest.mark.parametrize("divisors_of", [1, 7, 12, 96, 97, 360, 384, 1000, 4096, 5040, 7919])
def test_bs_effective_only_divisors_are_tried_and_the_largest_is_found(
    mode: str, divisors_of: int
) -> None:
    divisors = [size for size in range(1, divisors_of + 1) if divisors_of % size == 0]
    for limit in (1, 2, 3, 5, 37, 300, 1337, 5000, 8191):
        for init_val, bound in ((1, 8192), (2, 100), (64, 8192), (5000, 8192)):
            for curve in (linear, kinked, superlinear):
                device = Device(curve(limit + 0.5, GB, 15 * GB))
                answer = search(
                    device, mode=mode, divisors_of=divisors_of, init_val=init_val, max_val=bound
                )
                fitting = [d for d in divisors if d <= bound and device.memory(d) <= 16 * GB]
                assert answer.size == fitting[-1]
                assert set(device.tried) <= set(divisors)


@pytest.mark.parametrize("divisors_of", [7, 96, 360, 4096])
def test_bs_effective_power_finds_the_largest_rung(divisors_of: int) -> None:
    divisors = [size for size in range(1, divisors_of + 1) if divisors_of % size == 0]
    for init_val in (1, 2, 50):
        ladder = power_ladder(
            sizes=allowed_sizes(up_to=8192, divisors_of=divisors_of), init_val=init_val
        )
        assert set(ladder) <= set(divisors)
        assert ladder == sorted(set(ladder))
        for limit in (1, 3, 40, 5000):
            answer = search(
                limited(limit), mode="power", divisors_of=divisors_of, init_val=init_val
            )
            assert answer.size == max(size for size in ladder if size <= limit)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "the batch of 384 is one micro-batch"),
        (
            {"max_val": 200},
            "tuner.batch_size.max_val=200 reached: no larger divisor of 384",
        ),
        ({"num_samples": 150}, "the data set has 150 samples: no larger divisor of 384"),
    ],
)
def test_bs_effective_the_reason_names_the_batch(options: dict[str, int], reason: str) -> None:
    assert search(limited(None), divisors_of=384, **options).reason == reason


def test_fastest_is_the_smallest_size_within_3_percent_of_the_best() -> None:
    device = limited(1000)
    device.speed = lambda size: 100.0 * min(size, 200)  # the device is busy from 200 on
    answer = search(device, goal="fastest")
    assert answer.size == 250
    assert device.tried[-3:] == [500, 250, 125]
    assert answer.reason == "size 1001 does not fit"


def test_fastest_tries_few_sizes_and_keeps_the_largest_where_that_is_fastest() -> None:
    device = limited(1000)
    device.speed = lambda size: float(size)
    assert search(device, goal="fastest").size == 1000
    assert device.tried[-1] == 500

    device = limited(1000)
    device.speed = lambda size: 100.0
    before = len(search(limited(1000)).trials)
    answer = search(device, goal="fastest")
    assert answer.size == min(device.tried) == 2
    assert len(answer.trials) <= before + 3


def test_fastest_stays_within_margin_divisors_and_max_trials() -> None:
    speeds: dict[str, Any] = {"speed": lambda size: float(size)}
    memory = linear(1000.5, GB, 15 * GB)
    device = Device(memory, **speeds)
    assert search(device, goal="fastest", margin=0.1).size == 900
    assert 900 in device.tried
    device = Device(memory, **speeds)
    assert search(device, goal="fastest", divisors_of=384).size == 384
    assert all(384 % size == 0 for size in device.tried)
    device = Device(memory, **speeds)
    assert search(device, goal="fastest", max_trials=4).size == 1000
    assert len(device.tried) == 4


@pytest.mark.parametrize("curve", [linear, kinked, quantised_2mb, quantised_20mb])
@pytest.mark.parametrize("base", [1, 3, 6, 8])
def test_without_provoking_no_size_runs_out_of_memory(curve: Curve, base: int) -> None:
    for limit in (1, 2, 3, 37, 300, 1337, 5000, 8191):
        device = Device(curve(limit + 0.5, base * GB, (16 - base) * GB))
        answer = search(device, init_val=min(limit, 2), provoke=False)
        assert all(trial.fits for trial in answer.trials)
        assert answer.reason == f"size {answer.size + 1} is predicted not to fit"
        if limit >= 37:
            assert device.memory(answer.size) >= 0.9 * device.capacity


def test_without_provoking_bounds_are_reached_and_a_first_size_too_large_is_survived() -> None:
    assert search(limited(8191), provoke=False, max_val=100).size == 100
    answer = search(limited(300), provoke=False, init_val=512)
    assert 256 <= answer.size <= 300
    assert [trial.size for trial in answer.trials if not trial.fits] == [512]


@pytest.mark.parametrize("mode", ["power", "binsearch"])
def test_without_provoking_other_modes_are_refused(mode: str) -> None:
    with pytest.raises(ValueError, match="hang") as error:
        search(limited(300), mode=mode, provoke=False)
    assert str(error.value) == (
        "tuner.batch_size.mode must be model where running out of memory would hang the other "
        f"ranks, got {mode}; type tuner.batch_size.mode=model"
    )


def test_model_is_refused_where_no_memory_is_reported() -> None:
    text = (
        "tuner.batch_size.mode=model must have a device that reports its memory, got none; "
        "type tuner.batch_size.mode=binsearch"
    )
    with pytest.raises(ValueError, match="reports its memory") as error:
        search(limited(300), capacity_bytes=None)
    assert str(error.value) == text

    def silent(size: int) -> Trial:
        return Trial(size=size, fits=size < 9, peak_bytes=None, samples_per_s=None)

    with pytest.raises(ValueError, match="reports its memory") as error:
        search_batch_size(
            silent,
            mode="model",
            init_val=2,
            max_val=64,
            num_samples=None,
            divisors_of=None,
            max_trials=None,
            margin=0.0,
            capacity_bytes=GB,
            goal="largest",
            provoke=True,
        )
    assert str(error.value) == text


@pytest.mark.parametrize("mode", MODES)
def test_interrupted_it_answers_with_the_largest_size_that_ran(mode: str) -> None:
    whole = limited(1337)
    search(whole, mode=mode)
    for stop_at in range(1, len(whole.tried)):
        device = limited(1337)
        device.stop_at = stop_at
        answer = search(device, mode=mode)
        assert answer.size == max(size for size in device.tried if size <= 1337)
        assert answer.reason == "interrupted"
        assert not answer.complete


@pytest.mark.parametrize("stop_at", [0, 1])
def test_interrupted_before_anything_fits_it_has_no_answer(stop_at: int) -> None:
    device = limited(100)
    device.stop_at = stop_at
    with pytest.raises(KeyboardInterrupt):
        search(device, init_val=512)


def test_ranks_that_probe_alike_try_the_same_sizes() -> None:
    for device in random_devices(20):
        first = search(device)
        device.tried = []
        assert search(device) == first
