"""What a folder of runs came to: rows, states, commands, files and the page in a browser."""

import csv
import html
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import SMALL, wait_until
from hydra import compose, initialize_config_module
from matplotlib.image import imread

from app.errors import Refused
from app.fit import run as train_run
from app.record.folder import RunFolder
from app.report import __main__ as report_command
from app.report.configurations import columns, configurations
from app.report.curves import averaged, read_curves
from app.report.markup import element
from app.report.numbers import Decimals, duration, estimate, shortened, t_quantile
from app.report.reading import StoredRun, read_runs
from app.report.rerun import command, quoted
from app.report.summary import Report, summarize
from app.report.tables import error_line, escaped, markdown, terminal
from app.slurm.states import KILLED, Signs, true_state
from app.sweep.folder import SweepFolder
from app.sweep.journal import Job, Journal

EMA = {"_target_": "app.averaging.Ema", "horizon": 0.05}
SWA = {"_target_": "app.averaging.Swa", "start": 0.75}
HOSTILE = """<img src=x onerror="document.title='owned'"><script>document.title='owned'</script>"""


def write_run(
    folder: Path,
    *,
    seed: int = 1,
    typed: Sequence[str] = (),
    status: str | None = "finished",
    metrics: Mapping[str, float] | None = None,
    monitor: tuple[str, str] = ("val_acc", "max"),
    tuned: Mapping[str, Any] | None = None,
    result: Mapping[str, Any] | None = None,
    **groups: Any,
) -> Path:
    """A run's folder as app.train leaves it."""
    folder.mkdir(parents=True)
    config = {
        "name": folder.name,
        "seed": seed,
        "resume": "auto",
        "test": "best",
        "fit": True,
        "tuned": None,
        "model": {"_target_": "app.models.cnn1d.Cnn1d", "channels": 25, "kernel_sizes": [5, 3, 3]},
        "optimizer": {"_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.2},
        "clip": {"_target_": "app.clip.NormClip", "max_norm": 1.0},
        "averaging": None,
        "sharing": None,
        "callbacks": {
            "checkpoint": {
                "dirpath": "${run_dir}/checkpoints",
                "monitor": monitor[0],
                "mode": monitor[1],
            },
        },
        "tuner": None,
        **groups,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "overrides.yaml").write_text(yaml.safe_dump(list(typed)))
    if tuned is not None:
        (folder / "tuned.yaml").write_text(yaml.safe_dump({"overrides": tuned, "provenance": {}}))
    if status is not None:
        content = {"status": status, "seconds": {"fit": 1.5, "test": 0.5}, **(result or {})}
        if status == "finished":
            content["metrics"] = metrics or {"test_acc": 0.9, "val_acc": 0.91, "train_loss": 0.3}
        RunFolder(folder).write_result(content)
    return folder


def write_sweep(top: Path) -> None:
    """Averaging off, ema and swa with seeds 1, 2, 3; one of swa has failed."""
    values = {"none": (0.90, 0.91, 0.92), "ema": (0.95, 0.955, 0.96), "swa": (0.93, 0.95, 0.9)}
    for index, seed in enumerate((1, 2, 3)):
        for number, (name, kind) in enumerate((("none", None), ("ema", EMA), ("swa", SWA))):
            has_failed = (name, seed) == ("swa", 3)
            folder = write_run(
                top / str(3 * index + number),
                seed=seed,
                typed=[f"seed={seed}", f"averaging={name}"],
                averaging=kind,
                status="failed" if has_failed else "finished",
                metrics={"val_acc": values[name][index], "test_acc": 0.5, "test_loss": 1.0},
                result={"error": f"RuntimeError: {HOSTILE}\nlong", "rank": 1} if has_failed else {},
            )
            lines = [f"{s},{math.exp(-s / 9) + seed / 50},{1 - math.exp(-s / 9)}" for s in range(9)]
            text = "\n".join(["step,train_loss,val_acc", *lines])
            (folder / "metrics.csv").write_text(f"{text}\n")


def summary(
    top: Path, *baseline: str, metric: str | None = None, mode: str | None = None
) -> Report:
    return summarize(top, read_runs(top), metric=metric, mode=mode, baseline=baseline)


def one_run(top: Path) -> StoredRun:
    (found,) = read_runs(top).runs
    return found


def refusal(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert report_command.main(arguments) == 2
    return capsys.readouterr().err.strip()


# numbers


@pytest.mark.parametrize(
    ("n", "expected"),
    [(2, 12.7062), (3, 4.3027), (4, 3.1824), (5, 2.7764), (6, 2.5706), (7, 2.4469), (8, 2.3646),
     (9, 2.3060), (10, 2.2622), (11, 2.2281), (12, 2.2010), (15, 2.1448), (20, 2.0930),
     (25, 2.0639), (30, 2.0452)],
)  # fmt: skip
def test_the_t_quantile_is_that_of_the_tables(n: int, expected: float) -> None:
    assert t_quantile(0.975, df=n - 1) == pytest.approx(expected, abs=1e-4)


def test_the_t_quantile_is_scipys_for_every_n() -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy comes with the digits extra")
    for df in [*range(1, 60), 500]:
        for p in (0.9, 0.975, 0.995):
            assert t_quantile(p, df=df) == pytest.approx(stats.t.ppf(p, df), rel=1e-8)


def test_an_interval_needs_two_finite_values() -> None:
    one = estimate([0.5])
    assert one is not None
    assert (one.mean, one.low, one.n) == (0.5, None, 1)
    two = estimate([1.0, 3.0])
    assert two is not None
    assert (two.low, two.high) == pytest.approx((2 - 12.7062, 2 + 12.7062), abs=1e-4)
    bad = estimate([1.0, math.nan])
    assert bad is not None
    assert math.isnan(bad.mean)
    assert bad.low is None
    assert estimate([]) is None


def test_a_column_has_the_decimals_that_its_intervals_deserve() -> None:
    digits = Decimals([estimate([0.9512, 0.9534, 0.9478]), estimate([0.9, 0.91, 0.92])])
    assert digits.of(0.95) == "0.950"
    assert digits.of(None) == "-"
    assert Decimals([estimate([12.0])]).of(12.0) == "12.00"
    assert Decimals([estimate([3e-7])], sign="+").of(3e-7) == "+3.000e-07"
    assert [duration(s) for s in (0.333, 45, 600, 9000)] == ["0.33 s", "45 s", "10.0 min", "2.5 h"]


# rows


def test_what_a_search_chose_is_shown_with_four_digits() -> None:
    shown = {
        "0.15702970884055384": "0.157",
        "0.0029380279387035343": "0.002938",
        "1.2345678901e-05": "1.235e-05",
        "0.0005": "0.0005",
        "1234567890123": "1234567890123",
        "ema": "ema",
    }
    assert {value: shortened(value) for value in shown} == shown


def test_runs_that_differ_in_seed_name_or_cache_are_one_row(tmp_path: Path) -> None:
    shared = {"_target_": "app.sharing.Mmap", "min_bytes": 1}
    write_run(tmp_path / "a", seed=1, sharing={**shared, "cache": "here"})
    write_run(tmp_path / "b", seed=2, sharing={**shared, "cache": "there"}, resume="never")
    (row,) = summary(tmp_path).rows
    assert row.mean is not None
    assert row.mean.n == 2
    assert row.seconds == 2.0


def test_only_what_tells_rows_apart_is_a_column_and_a_preset_is_one(tmp_path: Path) -> None:
    write_run(tmp_path / "0", typed=["averaging=none"])
    write_run(tmp_path / "1", typed=["averaging=ema"], averaging=EMA)
    write_run(tmp_path / "2", averaging=SWA)
    report = summary(tmp_path)
    assert report.columns == ["averaging"]
    assert sorted(row.values for row in report.rows) == [("ema",), ("none",), ("swa",)]
    write_run(tmp_path / "3", typed=["averaging=ema"], averaging={**EMA, "horizon": 0.1})
    report = summary(tmp_path)
    assert report.columns == ["averaging", "averaging.horizon"]
    labels = {report.label(row) for row in report.rows}
    assert "averaging=ema averaging.horizon=0.1" in labels
    assert "averaging=none" in labels


def test_a_key_that_follows_from_a_typed_one_is_no_column(tmp_path: Path) -> None:
    for number, size in enumerate((16, 64)):
        write_run(
            tmp_path / str(number),
            typed=[f"data.batch_size={size}"],
            accumulate={"_target_": "app.accumulate.Effective", "micro_batch_size": size},
            data={"_target_": "theirs.Data", "batch_size": size},
        )
    assert summary(tmp_path).columns == ["data.batch_size"]


def test_a_class_that_is_no_preset_keeps_its_name_and_values_read_as_typed(tmp_path: Path) -> None:
    theirs = {"_target_": "theirs.LitModel", "sizes": [1, 2], "bias": True}
    write_run(tmp_path / "0", model=theirs)
    write_run(tmp_path / "1", model={**theirs, "sizes": []})
    write_run(tmp_path / "2")
    report = summary(tmp_path)
    assert report.columns == ["model", "model.sizes"]
    assert {row.values for row in report.rows} == {
        ("LitModel", "[1,2]"), ("LitModel", "[]"), ("cnn1d", "-"),
    }  # fmt: skip


def test_answers_of_a_finder_that_differ_by_seed_do_not_split_a_row(tmp_path: Path) -> None:
    for seed, lr in ((1, 0.03), (2, 0.05)):
        optimizer = {"_target_": "torch.optim.SGD", "lr": lr}
        write_run(tmp_path / f"{seed}", seed=seed, tuner={"_target_": "app.tuner.LrFind"},
                  tuned={"optimizer.lr": lr}, optimizer=optimizer)  # fmt: skip
    assert len(summary(tmp_path).rows) == 1


def test_the_metric_is_what_is_monitored_and_the_test_stands_beside_it(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    metric = summary(tmp_path).metric
    assert metric is not None
    assert (metric.name, metric.lower_is_better) == ("val_acc", False)
    assert metric.tested == "test_acc"
    assert metric.why_mode == "callbacks.checkpoint.mode=max"
    assert metric.why == "callbacks.checkpoint.monitor names it"
    by_name = summary(tmp_path, metric="train_loss").metric
    assert by_name is not None
    assert (by_name.lower_is_better, by_name.why_mode) == (True, "by its name")
    typed = summary(tmp_path, metric="train_loss", mode="max").metric
    assert typed is not None
    assert not typed.lower_is_better


def test_a_monitored_metric_without_a_test_part_and_none_at_all(tmp_path: Path) -> None:
    write_run(tmp_path / "a", metrics={"val_acc": 0.5, "val_loss": 1.0})
    metric = summary(tmp_path).metric
    assert metric is not None
    assert metric.name == "val_acc"
    write_run(tmp_path / "b/0", callbacks=None, metrics={"val_perplexity": 9.0})
    metric = summary(tmp_path / "b").metric
    assert metric is not None
    assert (metric.name, metric.lower_is_better) == ("val_perplexity", True)
    write_run(tmp_path / "c/0", status="interrupted")
    assert summary(tmp_path / "c").metric is None


def test_a_row_is_compared_with_the_baseline_over_common_seeds(tmp_path: Path) -> None:
    for seed, base, other in ((1, 0.90, 0.95), (2, 0.91, 0.98), (3, 0.92, None), (4, None, 0.5)):
        for name, value, kind in (("none", base, None), ("ema", other, EMA)):
            if value is not None:
                write_run(tmp_path / f"{name}{seed}", seed=seed, averaging=kind,
                          metrics={"val_acc": value, "test_acc": 0.0})  # fmt: skip
    report = summary(tmp_path, "averaging=none")
    (row,) = [row for row in report.rows if not row.is_baseline]
    assert row.common_seeds == 2
    assert row.versus is not None
    assert row.versus.mean == pytest.approx(0.06)
    assert row.versus.half_width == pytest.approx(12.7062 * 0.01, abs=1e-4)


@pytest.mark.parametrize(
    ("seeds", "words"), [((7, 8), "no common seed"), ((2, 8), "one common seed"), ((1, 2), "")]
)
def test_a_difference_says_where_seeds_are_missing(
    tmp_path: Path, seeds: tuple[int, int], words: str
) -> None:
    for seed in (1, 2):
        write_run(tmp_path / f"a{seed}", seed=seed, metrics={"val_acc": 0.1, "test_acc": 0.0})
    for seed in seeds:
        write_run(tmp_path / f"b{seed}", seed=seed, averaging=EMA)
    report = summary(tmp_path, "averaging=none")
    assert report.rows[0].why_no_interval() == words
    assert words in terminal(report)


def test_a_seed_that_was_run_twice_counts_once(tmp_path: Path) -> None:
    for name, seed, value in (("a", 1, 0.8), ("b", 1, 0.9), ("c", 2, 0.95)):
        write_run(tmp_path / name, seed=seed, metrics={"val_acc": value, "test_acc": 0.0})
    report = summary(tmp_path)
    mean = report.rows[0].mean
    assert mean is not None
    assert (mean.n, mean.mean) == (2, pytest.approx(0.9))
    assert "runs that repeat a seed of their row: 1; their mean counts" in terminal(report)


def test_a_diverged_run_is_not_left_out_of_the_mean_and_ranks_last(tmp_path: Path) -> None:
    write_run(tmp_path / "a", seed=1, metrics={"val_acc": math.nan, "test_acc": 0.0})
    write_run(tmp_path / "b", seed=2, metrics={"val_acc": 0.9, "test_acc": 0.0})
    write_run(tmp_path / "c", seed=1, averaging=EMA, metrics={"val_acc": 0.1, "test_acc": 0.0})
    first, last = summary(tmp_path).rows
    assert first.values == ("ema",)
    assert last.mean is not None
    assert math.isnan(last.mean.mean)
    assert last.best == 0.9


def test_nested_runs_are_sorted_as_numbers_and_checkpoints_are_not_searched(tmp_path: Path) -> None:
    for name in ("10", "9", "deep/er/2", ".hidden"):
        write_run(tmp_path / name)
    write_run(tmp_path / "9/checkpoints/old")
    names = [str(run.folder.relative_to(tmp_path)) for run in read_runs(tmp_path).runs]
    assert names == ["9", "10", "deep/er/2"]


def test_a_configuration_is_compared_with_the_one_of_the_most_runs(tmp_path: Path) -> None:
    write_run(tmp_path / "0", averaging=EMA)
    for seed in (1, 2):
        write_run(tmp_path / f"1{seed}", seed=seed, logger={"csv": {"_target_": str(seed)}})
    report = summary(tmp_path)
    assert report.common == "averaging=none"
    ema, usual = sorted(report.rows, key=lambda row: row.values)
    assert usual.config_diff == []
    assert ema.config_diff == [
        ("averaging._target_", "app.averaging.Ema", "-"), ("averaging.horizon", "0.05", "-"),
    ]  # fmt: skip


# states


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Another process holds the run's folder."""
    code = (
        "import sys, pathlib; from app.record.folder import RunFolder\n"
        f"with RunFolder(pathlib.Path({str(path)!r})).locked(): print('held', flush=True); input()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    try:
        yield
    finally:
        process.communicate("\n", timeout=120)


def test_a_run_that_says_running_is_interrupted_where_nobody_holds_its_folder(
    tmp_path: Path,
) -> None:
    folder = write_run(tmp_path / "a", status="running")
    assert one_run(tmp_path).state == "interrupted"
    assert one_run(tmp_path).error == KILLED
    with held(folder):
        assert one_run(tmp_path).state == "running"
    assert one_run(tmp_path).state == "interrupted"
    assert not RunFolder(folder).lock_path.exists()  # its holder took it away, looking left none


@pytest.mark.parametrize(
    ("said", "noted", "is_held", "is_launched", "expected"),
    [
        ("finished", "failed", False, False, ("finished", None)),
        ("running", "running", True, True, ("running", None)),
        ("running", "failed", False, True, ("failed", "killed by 9")),
        ("running", "interrupted", False, False, ("interrupted", "killed by 9")),
        ("running", "running", False, False, ("interrupted", KILLED)),
        (None, "running", False, True, ("running", None)),
        (None, "queued", False, True, ("queued", None)),
        (None, "queued", False, False, ("queued", "no launcher runs the sweep")),
        (None, "cancelled", False, False, ("cancelled", "killed by 9")),
        (None, "finished", False, False,
         ("missing", "the journal says finished, but there is no result")),
        ("pruned", "pruned", False, False, ("pruned", None)),
        (None, "pruned", False, False,
         ("missing", "the journal says pruned, but there is no result")),
        (None, None, False, False, ("interrupted", KILLED)),
        ("failed", "queued", False, True, ("failed", "no error was noted; attempt 2 is queued")),
        ("failed", "finished", False, True, ("failed", "no error was noted")),
        ("interrupted", "failed", False, True, ("interrupted", None)),
        ("interrupted", "cancelled", False, True, ("cancelled", "killed by 9")),
        ("interrupted", "queued", False, True, ("interrupted", "attempt 2 is queued")),
    ],
)  # fmt: skip
def test_what_result_journal_and_lock_say_together(
    said: str | None, noted: str | None, is_held: bool, is_launched: bool, expected: Any
) -> None:
    error = "killed by 9" if noted in ("failed", "interrupted", "cancelled") else None
    job = noted and Job(job=0, overrides=[], folder="0", state=noted, attempt=1, error=error)
    result = {} if said is None else {"status": said}
    signs = Signs(result=result, job=job or None, is_held=is_held, is_launched=is_launched)
    assert true_state(signs) == expected


def write_journal(
    folder: Path, *events: Mapping[str, Any], config_dirs: Sequence[str] = ()
) -> None:
    folder.mkdir(exist_ok=True)
    definition = {"config": "train", "config_dirs": list(config_dirs), "overrides": []}
    sweep = {"event": "sweep", "command": ["python", "-m", "app.train"], "cwd": str(folder),
             "definition": definition, "hash": "0", "jobs": []}  # fmt: skip
    Journal(folder).write([sweep, *({"event": "job", **event} for event in events)])


def test_jobs_of_the_journal_are_runs_also_without_a_folder_and_a_torn_line_is_none(
    tmp_path: Path,
) -> None:
    write_run(tmp_path / "0", status="running")
    write_journal(
        tmp_path,
        {"job": 0, "overrides": ["seed=1"], "state": "queued"},
        {"job": 1, "overrides": ["seed=2"], "state": "queued"},
        {"job": 2, "overrides": ["seed=3"], "state": "failed", "error": "refused: no", "attempt": 2,
         "device": "1"},
        {"job": 0, "folder": "0", "state": "running", "attempt": 1},
        {"job": 0, "state": "failed", "error": "process 7 was ended by SIGKILL"},
    )  # fmt: skip
    with (tmp_path / "journal.jsonl").open("a") as file:
        file.write('{"event": "job", "job": 0, "sta')
    report = summary(tmp_path)
    assert [run.state for run in report.runs] == ["failed", "queued", "failed"]
    printed = terminal(report)
    assert "process 7 was ended by SIGKILL" in printed
    assert f"{tmp_path}/2  failed, attempt 2, device 1\n  refused: no" in printed
    assert f"python -m app.train seed=3 hydra.run.dir={tmp_path}/2" in printed
    sweep = SweepFolder(tmp_path)
    assert sweep.hold()
    assert read_runs(tmp_path).runs[1].error is None  # a launcher runs the sweep
    sweep.release()
    assert read_runs(tmp_path).runs[1].error == "no launcher runs the sweep"
    assert one_run(tmp_path / "0").error == "process 7 was ended by SIGKILL"  # by the one above


def test_a_run_that_ended_before_its_configuration_is_shown(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    with RunFolder(tmp_path / "b").locked():
        assert [run.state for run in read_runs(tmp_path).runs] == ["finished", "running"]
    report = summary(tmp_path)
    assert [run.state for run in report.runs] == ["finished", "interrupted"]
    assert command(report.problems[0]) is None


def test_a_file_that_cannot_be_read_is_named_and_the_others_are_reported(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b")
    (tmp_path / "b/config.yaml").write_text("a: [")
    (tmp_path / "a/overrides.yaml").write_text("a: 1")
    report = summary(tmp_path)
    assert len(report.rows) == 1
    printed = terminal(report)
    assert f"{tmp_path}/b  unreadable\n  {tmp_path}/b/config.yaml cannot be read: " in printed
    assert printed.splitlines()[0].endswith("2 runs (1 finished, 1 unreadable) of 1 configuration")
    assert f"\n{tmp_path}/a/overrides.yaml cannot be read: it holds a dict where a list" in printed
    assert command(report.runs[0]) is None


# commands


def test_the_command_goes_on_in_the_folder_that_the_run_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    typed = ["seed=1", "resume=never", "run_dir=x", "data.note=it's", "+model.lr=0.1", "name=old"]
    write_run(Path("runs/mine"), typed=typed, status="failed")
    assert command(one_run(Path("runs"))) == (
        """python -m app.train seed=1 'data.note=it'"'"'s' +model.lr=0.1 name=mine"""
    )
    write_run(Path("a b/0"), typed=["seed=1", "name=old"], status="failed")
    assert command(one_run(Path("a b"))) == (
        """python -m app.train seed=1 name=old 'hydra.run.dir='"'"'a b/0'"'"''"""
    )


def test_the_command_knows_app_tune_and_the_folder_of_presets(tmp_path: Path) -> None:
    tuner = {"_target_": "app.tuner.Full"}
    write_run(tmp_path / "a/0", typed=["seed=1"], status="failed", tuner=tuner)
    assert str(command(one_run(tmp_path / "a"))).startswith("python -m app.tune seed=1 ")
    write_run(tmp_path / "b/0", typed=["tuner=full"], status="failed", tuner=tuner)
    write_journal(tmp_path / "b", {"job": 0, "overrides": []}, config_dirs=["my presets"])
    assert str(command(one_run(tmp_path / "b"))).startswith(
        "python -m app.train --config-dir 'my presets' tuner=full "
    )
    write_run(tmp_path / "c/0", status="failed")
    sources = [{"path": "/presets", "provider": "command-line"}, {"path": "x", "provider": "main"}]
    multirun = {"hydra": {"runtime": {"config_sources": sources}}}
    (tmp_path / "c/multirun.yaml").write_text(yaml.safe_dump(multirun))
    assert "--config-dir /presets" in str(command(one_run(tmp_path / "c")))


def test_a_value_with_quotes_and_backslashes_is_read_back_by_hydra(tmp_path: Path) -> None:
    for value in ("plain/x-1.0", "a b", "it's", "back\\slash", "\\'", "a,b=c{d}"):
        with initialize_config_module("app.conf", version_base="1.3"):
            cfg = compose("train", [f"name={quoted(value)}", f"run_dir={tmp_path}"])
        assert cfg.name == value


# files


def test_everything_that_is_not_ours_is_escaped(tmp_path: Path) -> None:
    kind = {"_target_": "theirs.A|`B`", "note": HOSTILE}
    write_run(tmp_path / "a", typed=[f"model.note={HOSTILE}", "```"], model=kind, status="failed",
              result={"error": f"Error: {HOSTILE} | `x`\nmore"})  # fmt: skip
    write_run(tmp_path / "b")
    assert report_command.main([str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert HOSTILE not in page
    assert "<img src=x" not in page
    assert page.count("<script>") == 1
    assert html.escape(HOSTILE) in page
    text = (tmp_path / "report.md").read_text()
    outside = re.sub(r"  (````+)sh\n.*?\n  \1", "", text, flags=re.DOTALL)
    assert outside != text  # fenced by more backticks than the command has
    assert not re.search(r"(?<!\\)[<`]", outside.replace("](<", ""))
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(table) == 4
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1


def test_a_text_that_comes_into_an_element_is_escaped_and_markup_is_not() -> None:
    inner = element("b", HOSTILE, title='"x"')
    assert inner == f'<b title="&quot;x&quot;">{html.escape(HOSTILE)}</b>'
    assert (
        element("td", inner, 1.5, data_v="<", class_=None) == f'<td data-v="&lt;">{inner}1.5</td>'
    )
    assert element("td", inner + "<i>") == f"<td>{html.escape(inner + '<i>')}</td>"  # no Markup


def test_an_escape_sequence_does_not_reach_the_terminal(tmp_path: Path) -> None:
    write_run(tmp_path / "a", status="failed", result={"error": "Bad: \x1b[2J\x07 here"})
    printed = terminal(summary(tmp_path))
    assert "\x1b" not in printed
    assert "Bad: �[2J� here" in printed


def test_the_line_of_an_error_is_the_one_that_says_what_happened() -> None:
    assert error_line("ValueError: one\ntwo\n") == "ValueError: one"
    assert error_line("Traceback (most recent call last):\n  File x\nKeyError: 'a'\n") == (
        "KeyError: 'a'"
    )
    assert error_line("") == ""
    assert escaped("a|b `c`\n_d_") == "a\\|b \\`c\\` \\_d\\_"


def test_the_files_hold_the_table_the_curves_and_the_failures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_sweep(tmp_path / "sweep")
    out = tmp_path / "out"
    arguments = [str(tmp_path / "sweep"), "--baseline", "averaging=none", "--out", str(out)]
    assert report_command.main(arguments) == 0
    printed = capsys.readouterr().out
    names = ["report.html", "report.md", "report.csv", "report-train_loss.png",
             "report-val_acc.png"]  # fmt: skip
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    assert printed.rstrip().endswith("\n".join(str(out / name) for name in names))
    assert "9 runs (8 finished, 1 failed) of 3 configurations" in printed
    answer = (
        "highest mean val_acc: averaging=ema, 0.955 [0.943, 0.967]; better than the baseline: "
        "+0.0450 [+0.0326, +0.0574]"
    )
    for text in (printed, (out / "report.html").read_text()):
        assert answer in text
    ema = next(line for line in printed.splitlines() if line.startswith("ema"))
    assert ema.split() == ["ema", "3", "0.955", "[0.943,", "0.967]", "0.960", "0.5000", "[0.5000,",
                           "0.5000]", "2.00", "s", "+0.0450", "[+0.0326,", "+0.0574]", "3", "3",
                           "finished"]  # fmt: skip
    assert f"{tmp_path}/sweep/8  failed, rank 1" in printed
    with (out / "report.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["averaging"] for row in rows] == ["ema", "swa", "none"]
    assert float(rows[0]["val_acc_mean"]) == pytest.approx(0.955)
    assert float(rows[0]["difference_low"]) == pytest.approx(0.0326, abs=1e-4)
    assert rows[2]["difference"] == ""
    assert imread(out / "report-val_acc.png").shape[1] == 792
    text = (out / "report.md").read_text()
    assert "![report-val\\_acc.png](<report-val_acc.png>)" in text
    assert "## Runs without a result" in text
    page = (out / "report.html").read_text()
    assert not re.search(
        r"""(src|href|srcset)=["'](?!data:)""", page.replace(html.escape(HOSTILE), "")
    )
    assert "better, 3 seeds" in page


def test_a_report_can_be_made_again_and_leaves_the_run_as_it_was(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "mine")
    (folder / "curves.png").write_bytes(b"the run's own")
    for _ in range(2):
        assert report_command.main([str(folder)]) == 0
    assert (folder / "curves.png").read_bytes() == b"the run's own"
    assert not list(folder.glob(".*.part"))
    assert len(read_runs(folder).runs) == 1


def test_a_curve_is_the_mean_over_seeds_where_all_have_a_value(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,val_acc,lr\n0,0.5,1\n1,,1\n4,0.75,1\n5,0.")
    told: list[str] = []
    curves = read_curves(path, ["val_acc", "missing"], told)
    assert curves == {"val_acc": {1.0: 0.5, 5.0: 0.75}, "missing": {}}
    assert told == [f"{path}: 1 line is torn, or none of ours, and skipped: 5"]
    line = averaged("x", [{1.0: 0.25, 5.0: 0.75}, {1.0: 0.75, 3.0: 9.0}])
    assert line is not None
    assert (line.steps, line.mean, line.low, line.high, line.n) == ([1], [0.5], [0.25], [0.75], 2)
    assert averaged("x", [{1.0: 1.0}, {2.0: 1.0}]) is None
    assert read_curves(tmp_path / "none.csv", ["a"], told) == {"a": {}}


def test_labels_that_matplotlib_would_read_are_drawn_as_they_are(tmp_path: Path) -> None:
    for index, note in enumerate(("$\\frac{", "_hidden", "日本\n€")):
        folder = write_run(tmp_path / str(index), model={"_target_": "theirs.A", "note": note})
        (folder / "metrics.csv").write_text("step,train_loss\n0,1.0\n1,inf\n2,nan\n")
    assert report_command.main([str(tmp_path)]) == 0


def test_plots_of_finders_are_in_the_page_once_for_runs_that_share_one(tmp_path: Path) -> None:
    for seed in (1, 2):
        folder = write_run(tmp_path / str(seed), seed=seed, tuner={"_target_": "app.tuner.LrFind"},
                           tuned={"optimizer.lr": 0.2})  # fmt: skip
        (folder / "lr_find.png").write_bytes(b"png")
    assert report_command.main([str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,cG5n") == 1
    assert f"{tmp_path}/1, {tmp_path}/2: optimizer.lr=0.2" in page


# refusals


def test_what_cannot_be_reported_is_refused_with_what_to_type(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    types = "type python -m app.report runs/NAME or multirun/DATE/TIME"
    of_runs = "report: DIR must be the folder of a run, of a sweep or of several, got"
    assert refusal(f"{tmp_path}/x", capsys=capsys) == (
        f"{of_runs} {tmp_path}/x, which does not exist; {types}"
    )
    assert refusal(str(tmp_path), capsys=capsys) == (
        f"{of_runs} {tmp_path}: neither it nor a folder in it holds a config.yaml, a result.json "
        f"or a journal.jsonl; {types}"
    )
    write_sweep(tmp_path / "s")
    top = str(tmp_path / "s")
    for typed, words in {
        "--metrik=x": "--metrik is not an option; did you mean --metric?",
        "metric=test_acc": "metric=test_acc is not an option; type --metric test_acc",
        "other": "one folder is reported at a time, got also other; type one that holds all",
        "--metric=f1": "--metric f1 is in no finished run; choose one of test_acc, test_loss, "
        "val_acc",
        "--mode=up": "--mode must be min or max, got up; type --mode max",
        "--baseline=averaging": "--baseline must be KEY=VALUE, got averaging; type --baseline "
        "averaging=none, --baseline averaging=ema, --baseline averaging=swa",
        "--baseline=averaging=nine": "--baseline averaging=nine matches no row; averaging is one "
        "of none, ema, swa",
        "--baseline=clip=norm": "--baseline clip=norm matches 3 rows; add one of --baseline "
        "averaging=none, --baseline averaging=ema, --baseline averaging=swa",
        "--baseline=foo=1": "--baseline foo=1: foo is not a key of these runs; they differ in "
        "averaging",
        f"--out={tmp_path}/s/0/config.yaml": f"{tmp_path}/s/0/config.yaml cannot be written: file "
        "exists; type --out FOLDER",
    }.items():
        assert refusal(top, typed, capsys=capsys) == f"report: {words}"
    assert "the following arguments are required: DIR" in refusal(capsys=capsys)


def test_a_report_imports_neither_torch_nor_lightning(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    code = (
        "import sys; from app.report.__main__ import main\n"
        f"main([{str(tmp_path)!r}]); print({{'torch', 'lightning'}} & sys.modules.keys())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.endswith("set()\n")


# real runs


def test_real_runs_make_the_rows_that_their_command_says(tmp_path: Path) -> None:
    for seed in (1, 2):
        for averaging in ("none", "ema"):
            typed = [f"seed={seed}", f"averaging={averaging}", *SMALL]
            name = f"{averaging}-{seed}"
            with initialize_config_module("app.conf", version_base="1.3"):
                cfg = compose("train", [*typed, f"name={name}", f"run_dir={tmp_path}/{name}"])
            train_run(cfg, typed=typed)
    report = summary(tmp_path, "averaging=none")
    assert report.columns == ["averaging"]
    assert {row.values for row in report.rows} == {("none",), ("ema",)}
    assert report.metric is not None
    assert (report.metric.name, report.metric.lower_is_better) == ("val_loss", True)
    assert all(row.mean is not None and row.mean.n == 2 for row in report.rows)
    assert report_command.main([str(tmp_path)]) == 0
    assert (tmp_path / "report-val_loss.png").exists()


@pytest.mark.slow
def test_the_command_of_a_killed_run_finishes_it_in_its_folder(tmp_path: Path) -> None:
    typed = [*SMALL, "trainer.max_epochs=150", "seed=3", "hydra.run.dir='a b/0'"]
    process = subprocess.Popen(
        [sys.executable, "-m", "app.train", *typed], cwd=tmp_path, stdout=subprocess.DEVNULL
    )
    last = tmp_path / "a b/0/checkpoints/last.ckpt"
    wait_until(last.exists)
    assert reported(tmp_path)["state"] == "running"
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = reported(tmp_path)
    assert found["state"] == "interrupted"
    words = shlex.split(found["command"])
    done = subprocess.run(
        [sys.executable, *words[1:]], cwd=tmp_path, capture_output=True, text=True, check=False,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "continuing from" in done.stdout
    assert reported(tmp_path)["state"] == "finished"
    assert [path.name for path in tmp_path.iterdir()] == ["a b"]


def reported(cwd: Path) -> dict[str, str]:
    """State and command of the run in `a b`."""
    code = (
        "from pathlib import Path; import json\n"
        "from app.report.reading import read_runs; from app.report.rerun import command\n"
        "run, = read_runs(Path('a b')).runs\n"
        "print(json.dumps({'state': run.state, 'command': command(run)}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=True
    )
    found: dict[str, str] = json.loads(done.stdout)
    return found


# the page in a browser

CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="the page is looked at in chromium: apt-get install chromium"
)


def chromium(*arguments: str, profile: Path) -> str:
    done = subprocess.run(
        [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
         "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", f"--user-data-dir={profile}", "--virtual-time-budget=3000", *arguments],
        capture_output=True, text=True, check=True, timeout=180, env={**os.environ, "LC_ALL": "C"},
    )  # fmt: skip
    return done.stdout


@pytest.fixture(scope="session")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of the sweep with a failure, with a baseline."""
    top = tmp_path_factory.mktemp("page")
    write_sweep(top)
    assert report_command.main([str(top), "--baseline", "averaging=none"]) == 0
    return top / "report.html"


def shown_rows(dom: str) -> list[str]:
    """The averaging of the rows that are not hidden, in their order."""
    bodies = re.findall(
        r'<tbody( hidden="")?><tr class="row"><td[^>]*>.*?</td><td data-v="(\w+)"', dom
    )
    return [name for hidden, name in bodies if not hidden]


def in_a_frame(page: Path, *, width: int, script: str, to: Path) -> Path:
    """A page that shows the report `width` pixels wide and puts what a script finds into #found.

    The copy is without the policy that would keep the script out.
    """
    source = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    to.write_text(
        f'<body style="margin:0"><iframe style="border:0" width="{width}" height="3000" '
        f'srcdoc="{html.escape(source)}"></iframe><p id="found"></p><script>onload = () => {{'
        "const page = document.querySelector('iframe').contentDocument;"
        f"document.getElementById('found').textContent = JSON.stringify((() => {{{script}}})());"
        "}</script>"
    )
    return to


def found_in(dom: str) -> Any:
    match = re.search(r'<p id="found">(.*?)</p>', dom)
    assert match is not None
    return json.loads(html.unescape(match[1]))


@needs_chromium
@pytest.mark.slow
def test_the_page_sorts_and_filters_and_runs_no_script_of_others(
    page: Path, tmp_path: Path
) -> None:
    dom = chromium("--dump-dom", f"file://{page}", profile=tmp_path / "a")
    assert shown_rows(dom) == ["ema", "swa", "none"]
    assert "<title>Report of" in dom
    assert "<title>owned" not in dom
    assert "3 of 3 shown" in dom
    assert "baseline</span>" in dom
    address = f"file://{page}#sort=mean&direction=ascending&filter=finished%20A"
    dom = chromium("--dump-dom", address, profile=tmp_path / "a")
    assert shown_rows(dom) == ["none", "swa", "ema"]
    assert re.findall(r'aria-sort="ascending" data-key="(\w+)"', dom) == ["mean"]
    dom = chromium("--dump-dom", f"file://{page}#filter=swa", profile=tmp_path / "a")
    assert shown_rows(dom) == ["swa"]
    assert "1 of 3 shown" in dom


@needs_chromium
@pytest.mark.slow
@pytest.mark.parametrize("width", [320, 360, 1280])
def test_the_page_never_scrolls_sideways_and_its_buttons_act(
    page: Path, tmp_path: Path, width: int
) -> None:
    script = """
        page.querySelectorAll(".more").forEach((button) => button.click());
        const head = page.querySelector("[data-key=averaging]");
        head.querySelector("button").click();
        const orders = [head.getAttribute("aria-sort")];
        head.querySelector("button").click();
        orders.push(head.getAttribute("aria-sort"));
        page.querySelector("summary").click();
        page.querySelector(".copy").click();
        return {
            overflow: page.documentElement.scrollWidth - page.documentElement.clientWidth,
            orders,
            rows: [...page.querySelectorAll("tr.row")].map((row) => row.cells[1].textContent),
            open: page.querySelectorAll("#rows td.detail > div").length,
            hidden: page.querySelectorAll("#rows tr[hidden]").length,
            hidden_sideways: Math.max(...[".scroll", ".detail > div"].map((name) =>
                page.querySelector(name).scrollWidth - page.querySelector(name).clientWidth)),
            pictures: [...page.images].map((image) => image.naturalWidth),
            command: page.querySelector(".problem pre:last-of-type").textContent,
        };"""
    frame = in_a_frame(page, width=width, script=script, to=tmp_path / "frame.html")
    found = found_in(chromium("--dump-dom", f"file://{frame}", profile=tmp_path / "a"))
    assert found["overflow"] == found["hidden_sideways"] == 0
    assert found["orders"] == ["ascending", "descending"]
    assert found["rows"] == ["swa", "none", "ema"]
    assert (found["open"], found["hidden"]) == (3, 0)
    assert found["pictures"] == [792, 792]


@needs_chromium
@pytest.mark.slow
def test_the_page_has_a_light_and_a_dark_face(page: Path, tmp_path: Path) -> None:
    brightness = {}
    for name, flags in {"light": (), "dark": ("--blink-settings=preferredColorScheme=0",)}.items():
        picture = tmp_path / f"{name}.png"
        chromium(
            f"--screenshot={picture}", "--window-size=1280,1200", *flags, f"file://{page}",
            profile=tmp_path / "a",
        )  # fmt: skip
        pixels = imread(picture)
        assert pixels.shape[:2] == (1200, 1280)
        assert pixels[..., :3].std() > 0.02  # something is on it
        brightness[name] = float(pixels[..., :3].mean())
    assert brightness["light"] > 0.8
    assert brightness["dark"] < 0.2


def test_columns_of_no_and_of_one_configuration_are_none(tmp_path: Path) -> None:
    assert columns([]) == []
    write_run(tmp_path / "a")
    assert columns(configurations(read_runs(tmp_path).runs)) == []
    assert markdown(summary(tmp_path), curves=[]).startswith("# Report\n")
    with pytest.raises(Refused, match="matches no row"):
        summary(tmp_path, "clip=value")
