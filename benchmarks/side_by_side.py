"""Contestants measured in turns, and the table of their ratios to one of them.

A ratio is that of two costs of the same round; printed are the median over the rounds, the smallest
and the largest. The load that other programs put on the machine hits neighbours alike.

Every benchmark takes `--smallest`: the least that runs all of it, in seconds, and measures nothing.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import TypeVar

T = TypeVar("T")

SMALLEST = "--smallest" in sys.argv


def sized(usual: T, smallest: T) -> T:
    """A size of a benchmark: the usual one, or the smallest."""
    return smallest if SMALLEST else usual


Contestant = Callable[[], float]
"""Does its work once and returns what it cost, in any unit that all share."""
Costs = Mapping[str, Sequence[float]]
"""What each contestant cost, round by round."""


def in_turns(contestants: Mapping[str, Contestant], *, rounds: int) -> dict[str, list[float]]:
    """Run all once to warm up, then `rounds` times, every other time in reverse order."""
    rounds = sized(rounds, 1)
    costs: dict[str, list[float]] = {name: [] for name in contestants}
    for contestant in () if SMALLEST else contestants.values():
        contestant()
    for number in range(rounds):
        for name in list(contestants) if number % 2 == 0 else reversed(contestants):
            costs[name].append(contestants[name]())
    return costs


def cpu_seconds(work: Callable[[], object], *, at_least: float) -> Contestant:
    """A contestant: CPU seconds of a call, over as many calls as take `at_least` seconds.

    CPU seconds leave out the time in which another program has the core. For work in one thread.
    """
    work()
    calls, spent = 1, _spent(work, 1)
    while spent < sized(at_least, 0.0):
        calls *= 2
        spent = _spent(work, calls)

    def contestant() -> float:
        return _spent(work, calls) / calls

    return contestant


def _spent(work: Callable[[], object], calls: int) -> float:
    start = time.process_time()
    for _ in range(calls):
        work()
    return time.process_time() - start


def ratios(costs: Costs, name: str, base: str) -> list[float]:
    """The cost of `name` over that of `base`, round by round."""
    return [cost / other for cost, other in zip(costs[name], costs[base], strict=True)]


def show(title: str, costs: Costs, *, base: str, targets: Mapping[str, float]) -> None:
    """Print a line per contestant: its ratios to `base`, and its target where it has one."""
    width = max(48, *(len(name) for name in costs))
    print(f"\n{title:<{width}}  median     min     max  target")
    for name in costs:
        found = ratios(costs, name, base)
        line = f"{name:<{width}}  {median(found):>6.3f}  {min(found):>6.3f}  {max(found):>6.3f}"
        if name in targets:
            verdict = "met" if median(found) <= targets[name] else "MISSED"
            line += f"  <= {targets[name]:g}  {verdict}"
        print(line, flush=True)
