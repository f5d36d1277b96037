"""The rows of a report with their numbers."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from app.record.states import State
from app.report.configurations import (
    NOTHING,
    Configuration,
    Labels,
    columns,
    common,
    configurations,
    difference,
    matching,
)
from app.report.metric import Metric, choose_metric
from app.report.numbers import shortened
from app.report.reading import Found, Run
from app.report.statistics import Estimate, estimate, mean_of


@dataclass(frozen=True, kw_only=True)
class Row:
    """One configuration.

    Attributes:
        values: of the report's columns, as typed.
        mean: of the metric over seeds; None where no run has finished with it.
        best: of one seed.
        seconds: of a finished run, in the mean.
        versus: the mean of the paired differences from the baseline over common seeds.
        common_seeds: how many; None where no baseline was chosen, and for the baseline itself.
        config_diff: key, value, and the value in the report's common configuration.
    """

    number: int
    config: Configuration
    values: tuple[str, ...]
    mean: Estimate | None
    best: float | None
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
        if self.common_seeds is None or (self.versus and self.versus.low is not None):
            return ""
        if self.common_seeds == 0:
            return "no common seed"
        return "one common seed" if self.common_seeds == 1 else "not finite"


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that is shown.

    Attributes:
        columns: the keys in which the rows differ.
        rows: best first; those without a number last.
        common: what the rows' `config_diff` are against, in words.
        repeats: how many runs repeat a seed of their row; their mean counts once.
        problems: runs that have ended without a result, or cannot be read, in the order of their
            folders.
    """

    top: Path
    runs: list[Run]
    notes: list[str]
    columns: list[str]
    rows: list[Row]
    metric: Metric | None
    baseline: str | None
    common: str
    repeats: int
    problems: list[Run]

    def verdict(self, row: Row) -> str:
        """better, worse or unclear: what the interval of a row's difference from the baseline says;
        empty where it has none."""
        if self.metric is None or row.versus is None or row.versus.low is None:
            return ""
        assert row.versus.high is not None
        if row.versus.low <= 0 <= row.versus.high:
            return "unclear"
        return "better" if self.metric.better(row.versus.mean, 0.0) else "worse"

    def label(self, row: Row) -> str:
        """A row in words: its columns as they are typed, long numbers shortened."""
        pairs = zip(self.columns, row.values, strict=True)
        shown = [f"{key}={shortened(value)}" for key, value in pairs if value != NOTHING]
        return " ".join(shown) or "all runs"


def summarize(
    top: Path, found: Found, *, metric: str | None, mode: str | None, baseline: Sequence[str]
) -> Report:
    """Rows with their numbers.

    Raises Refused where the metric or the baseline is not there.
    """
    chosen = choose_metric(found.runs, name=metric, mode=mode)
    configs = configurations(found.runs)
    names, labels = columns(configs), Labels(configs)
    base = matching(configs, labels, baseline, names=names) if baseline else None
    base_values = _by_seed(base, chosen)[0] if base is not None else {}
    usual = common(configs, base) if configs else None
    rows, repeats = [], 0
    for config in configs:
        by_seed, num_repeats = _by_seed(config, chosen)
        repeats += num_repeats
        values = list(by_seed.values())
        finite = [value for value in values if math.isfinite(value)]
        pick = min if chosen and chosen.lower_is_better else max
        seconds = [
            run.seconds for run in config.runs if run.state == State.finished and run.seconds
        ]
        paired = [by_seed[seed] - base_values[seed] for seed in by_seed if seed in base_values]
        compared = base is not None and config is not base
        assert usual is not None
        rows.append(
            Row(
                number=0,
                config=config,
                values=tuple(labels.of(config, name) for name in names),
                mean=estimate(values),
                best=pick(finite) if finite else None,
                seconds=mean_of(seconds) if seconds else None,
                versus=estimate(paired) if compared else None,
                common_seeds=len(paired) if compared else None,
                is_baseline=config is base,
                config_diff=difference(config, usual),
            )
        )
    sign = 1 if chosen and chosen.lower_is_better else -1
    rows.sort(key=lambda row: _last_if_none(row.mean, sign))
    report = Report(
        top=top,
        runs=found.runs,
        notes=found.notes,
        columns=names,
        rows=[replace(row, number=number) for number, row in enumerate(rows, 1)],
        metric=chosen,
        baseline=None,
        common="",
        repeats=repeats,
        problems=[run for run in found.runs if run.state.is_lost or run.state.has_no_result],
    )
    by_config = {id(row.config): report.label(row) for row in report.rows}
    return replace(
        report,
        baseline=by_config[id(base)] if base is not None else None,
        common=by_config[id(usual)] if usual is not None else "",
    )


def _by_seed(config: Configuration, metric: Metric | None) -> tuple[dict[object, float], int]:
    """The metric by seed, the mean where a seed was run again; and how many runs were that."""
    values: dict[object, list[float]] = {}
    for run in config.runs:
        if run.state == State.finished and metric and metric.name in run.result.get("metrics", {}):
            seed = run.folder if run.seed is None else run.seed
            values.setdefault(seed, []).append(float(run.result["metrics"][metric.name]))
    repeats = sum(len(same) - 1 for same in values.values())
    return {seed: mean_of(same) for seed, same in values.items()}, repeats


def _last_if_none(mean: Estimate | None, sign: int) -> tuple[int, float]:
    if mean is None:
        return 2, 0.0
    return (1, 0.0) if math.isnan(mean.mean) else (0, sign * mean.mean)
