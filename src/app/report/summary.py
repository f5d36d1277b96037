"""The rows of a report with their numbers."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from app.record.states import State
from app.report.configurations import Configuration, Labels, common, configurations
from app.report.metric import Metric, choose_metric
from app.report.numbers import NOTHING, Decimals, Estimate, estimate, mean_of, shortened
from app.report.reading import StoredRun, StoredRuns


@dataclass(kw_only=True)
class Row:
    """One configuration.

    Attributes:
        number: its place, from 1.
        values: of the report's columns, as typed.
        mean: of the metric over seeds; None where no run has finished with it.
        best: of one seed.
        tested: the mean of what measures the same on test data; None where nothing does.
        seconds: of a finished run, in the mean.
        versus: the mean of the paired differences from the baseline over common seeds.
        common_seeds: how many; None where no baseline was chosen, and for the baseline itself.
        config_diff: key, value, and the value in the report's common configuration.
    """

    number: int = 0
    config: Configuration
    values: tuple[str, ...]
    mean: Estimate | None
    best: float | None
    tested: Estimate | None
    seconds: float | None
    versus: Estimate | None
    common_seeds: int | None
    is_baseline: bool
    config_diff: list[tuple[str, str, str]]

    @property
    def states(self) -> Counter[State]:
        """How many runs are in which state."""
        return Counter(run.state for run in self.config.runs)

    def why_no_interval(self) -> str:
        """Of the difference from the baseline; empty where there is an interval."""
        if self.common_seeds is None or (self.versus and self.versus.half_width is not None):
            return ""
        return {0: "no common seed", 1: "one common seed"}.get(self.common_seeds, "not finite")


@dataclass(kw_only=True)
class Report:
    """Everything that is shown.

    Attributes:
        notes: what could not be read; drawing adds to them.
        columns: the keys in which the rows differ.
        rows: best first; those without a number last.
    """

    top: Path
    runs: list[StoredRun]
    notes: list[str]
    columns: list[str]
    rows: list[Row]
    metric: Metric | None

    @property
    def metric_name(self) -> str:
        """What stands above the means."""
        return self.metric.name if self.metric else "metric"

    @property
    def problems(self) -> list[StoredRun]:
        """Runs that have ended without a result, or cannot be read, by their folders."""
        return [run for run in self.runs if run.state.is_lost or run.state.has_no_result]

    @property
    def repeats(self) -> int:
        """How many finished runs repeat a seed of their row; their mean counts once."""
        return sum(len(same) - 1 for row in self.rows for same in row.config.finished.values())

    @cached_property
    def baseline(self) -> str | None:
        """The row that others are compared with, in words."""
        return next((self.label(row) for row in self.rows if row.is_baseline), None)

    @cached_property
    def common(self) -> str:
        """What the rows' `config_diff` are against, in words."""
        return next((self.label(row) for row in self.rows if not row.config_diff), "")

    @cached_property
    def decimals(self) -> Decimals:
        """Of the metric."""
        return Decimals(row.mean for row in self.rows)

    @property
    def tested_name(self) -> str | None:
        """What stands above the means on test data; None where there are none."""
        return self.metric.tested if self.metric else None

    @cached_property
    def tested_decimals(self) -> Decimals:
        """Of those."""
        return Decimals(row.tested for row in self.rows)

    @cached_property
    def signed(self) -> Decimals:
        """Of the differences from the baseline."""
        return Decimals((row.versus for row in self.rows), sign="+")

    def verdict(self, row: Row) -> str:
        """better, worse or unclear: what the interval of a row's difference from the baseline says;
        empty where it has none."""
        versus = row.versus
        if self.metric is None or versus is None or versus.half_width is None:
            return ""
        if abs(versus.mean) <= versus.half_width:
            return "unclear"
        return "better" if (versus.mean < 0) == self.metric.lower_is_better else "worse"

    def label(self, row: Row) -> str:
        """A row in words: its columns as they are typed, long numbers shortened."""
        pairs = zip(self.columns, row.values, strict=True)
        shown = [f"{key}={shortened(value)}" for key, value in pairs if value != NOTHING]
        return " ".join(shown) or "all runs"


def summarize(
    top: Path, found: StoredRuns, *, metric: str | None, mode: str | None, baseline: Sequence[str]
) -> Report:
    """Rows with their numbers.

    Raises Refused where the metric or the baseline is not there.
    """
    chosen = choose_metric(found.runs, name=metric, mode=mode)
    is_lower_better = chosen is not None and chosen.lower_is_better
    configs = configurations(found.runs)
    labels = Labels(configs)
    base = labels.matching(baseline) if baseline else None
    usual = common(configs, base)
    measured = {config: _by_seed(config, chosen.name) if chosen else {} for config in configs}
    rows = []
    for config in configs:
        by_seed = measured[config]
        tested = _by_seed(config, chosen.tested) if chosen and chosen.tested else {}
        finite = [value for value in by_seed.values() if math.isfinite(value)]
        finished = (run for same in config.finished.values() for run in same)
        seconds = [run.seconds for run in finished if run.seconds]
        others = measured[base] if base and config is not base else {}
        paired = [by_seed[seed] - others[seed] for seed in by_seed if seed in others]
        rows.append(
            Row(
                config=config,
                values=tuple(labels.of(config, name) for name in labels.columns),
                mean=estimate([*by_seed.values()]),
                best=(min if is_lower_better else max)(finite, default=None),
                tested=estimate([*tested.values()]),
                seconds=mean_of(seconds) if seconds else None,
                versus=estimate(paired),
                common_seeds=len(paired) if base and config is not base else None,
                is_baseline=config is base,
                config_diff=config.differences(usual) if usual else [],
            )
        )
    rows.sort(key=lambda row: _last_if_none(row.mean, 1 if is_lower_better else -1))
    for number, row in enumerate(rows, 1):
        row.number = number
    return Report(
        top=top, runs=found.runs, notes=found.notes, columns=labels.columns, rows=rows,
        metric=chosen,
    )  # fmt: skip


def _by_seed(config: Configuration, metric: str) -> dict[object, float]:
    """A metric by seed, the mean where a seed was run again."""
    values = {
        seed: [float(run.metrics[metric]) for run in same if metric in run.metrics]
        for seed, same in config.finished.items()
    }
    return {seed: mean_of(same) for seed, same in values.items() if same}


def _last_if_none(mean: Estimate | None, sign: int) -> tuple[int, float]:
    if mean is None:
        return 2, 0.0
    return (1, 0.0) if math.isnan(mean.mean) else (0, sign * mean.mean)
