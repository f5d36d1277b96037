"""Files that are torn, foreign or of another kind: every reader names them and shows the rest."""

import csv
import html
import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import yaml
from test_report import write_run

from app.errors import Refused, Unreadable
from app.process import files
from app.record.folder import RunFolder
from app.record.loggers import MetricsCsv, read_metrics
from app.record.states import SLURM_JOB, State
from app.record.trials import STUDY, open_study, url
from app.report import __main__ as report
from app.report.tables import defused
from app.slurm import states as slurm_states
from app.sweep import __main__ as sweep
from app.sweep import cluster
from app.sweep.folder import SweepFolder
from app.sweep.journal import Job, Journal
from app.sweep.progress import Progress

TUNER = {"_target_": "app.tuner.Full"}
CSV = "step,train_loss,val_acc\n0,1.5,0.1\n1,1.25,0.2\n2,1.0,0.3\n3,0.75,0.4\n"
EVENTS: list[dict[str, Any]] = [
    {"event": "sweep", "command": ["python", "-m", "app.train", "-m", "seed=1,2,3"], "cwd": "/",
     "definition": {"config": "train", "config_dirs": [], "overrides": ["seed=1,2,3"]},
     "hash": "0", "jobs": [["seed=1"], ["seed=2"], ["seed=3"]]},
    *({"event": "job", "job": job, "overrides": [f"seed={job + 1}"], "folder": str(job),
       "state": "finished", "attempt": 1, "seconds": 1.5} for job in range(3)),
]  # fmt: skip
SOURCES = [{"path": "/presets", "provider": "command-line"}]
MULTIRUN = {"hydra": {"runtime": {"config_sources": SOURCES}, "job": {"config_name": "train"}}}


def write_tree(top: Path) -> None:
    """A sweep of three finished jobs with every file that a run can have."""
    for job in range(3):
        folder = write_run(
            top / str(job), seed=job + 1, typed=[f"seed={job + 1}"], tuner=TUNER,
            tuned={"optimizer.lr": 0.2}, metrics={"test_acc": 0.9, "val_acc": 0.8},
        )  # fmt: skip
        (folder / "metrics.csv").write_text(CSV)
        for name in ("batch_size", "lr_find"):
            (folder / f"{name}.csv").write_text("value,seconds\n1,2\n")
            (folder / f"{name}.png").write_bytes(b"png")
        (top / f".{job}.lock").write_text("7")
    write_lines(top, [json.dumps(event) for event in EVENTS])
    (top / ".launcher.lock").write_text('{"pid": 7, "host": "here"}')


def write_lines(top: Path, lines: Sequence[str | bytes]) -> None:
    """A journal of these lines."""
    whole = [line if isinstance(line, bytes) else line.encode() for line in lines]
    (top / "journal.jsonl").write_bytes(b"".join(line + b"\n" for line in whole))


def rows_in(out: Path) -> list[dict[str, str]]:
    """The rows of report.csv."""
    with (out / "report.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(autouse=True)
def _never_hangs() -> Iterator[None]:
    def too_long(number: int, frame: FrameType | None) -> None:
        raise TimeoutError("a reader waits")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(240)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def _without_pictures_and_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "draw", lambda *_, **__: b"png")
    monkeypatch.setattr(slurm_states, "_answer", lambda *_: None)


Calling = Callable[..., tuple[int, str]]


@pytest.fixture
def calling(capsys: pytest.CaptureFixture[str]) -> Calling:
    """Call a command here; its exit code and what it prints."""

    def call(command: Callable[[list[str]], int | None], *arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        try:
            code = command([str(argument) for argument in arguments]) or 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        printed = "".join(capsys.readouterr())
        printed.encode()  # as a terminal gets it
        return code, printed

    return call


# every file, with every damage


Harm = Callable[[Path], object]


def put(content: bytes) -> Harm:
    """What replaces the content of a file."""
    return lambda path: path.write_bytes(content)


def emptied_in_place(path: Path) -> None:
    path.write_bytes(b"\0" * path.stat().st_size)


def halved(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: content.rindex(b":", 0, len(content) // 2) + 1])


def grown(path: Path) -> None:
    os.truncate(path, 1 << 34)  # sparse


def instead(make: Harm) -> Harm:
    """Something else of the same name."""

    def damage(path: Path) -> None:
        path.unlink()
        make(path)

    return damage


KEYS = "\n".join(f"k{number}: 1" for number in range(20_000))
DOCUMENTS: dict[str, tuple[Harm, str]] = {
    "empty": (put(b""), "it holds nothing"),
    "zeros": (emptied_in_place, "it holds nothing"),
    "blank": (put(b" \n\n\t"), "it is blank"),
    "half": (halved, ""),
    "binary": (put(bytes(range(256)) * 8), "codec can't decode"),
    "utf16": (put("status: finished".encode("utf-16")), "codec can't decode"),
    "text": (put(b"once upon a time\n"), "it holds a str where|Expecting value"),
    "number": (put(b"3"), "it holds a int where"),
    "null": (put(b"null"), "it holds nothing where"),
    "other": (put(b'{"a": 1}'), "it has no|overrides holds None|its hydra holds|it holds a dict"),
    "deep": (put(b'{"a": ' * 50_000), "it has more than 100 levels|Expecting"),
    "deep list": (put(b"[" * 50_000 + b"]" * 50_000), "it has more than 100 levels"),
    "huge number": (put(b'{"status": %s}' % (b"9" * 5000)), "Exceeds the limit|more than 64 bits"),
    "large": (grown, "it has more than 4194304 bytes"),
}  # fmt: skip
YAMLS: dict[str, tuple[Harm, str]] = {
    "deep dashes": (put(b"- " * 100_000), "it has more than 100 levels"),
    "many keys": (put(KEYS.encode()), "it has more than 10000 keys|it holds a dict where"),
    "laughs": (put(b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"), "it refers to parts of itself"),
    "object": (put(b"!!python/object/apply:os.system ['touch owned']"), "constructor for the tag"),
    "date": (put(b"seed: 2001-01-01\n"), "it holds a date"),
    "bad tag": (put(b'seed: !!int ""\n'), "a value is not what its tag says"),
    "hexadecimal": (put(b"seed: 0x" + b"f" * 5000), "a number of more than 64 bits"),
    "two documents": (put(b"a: 1\n---\nb: 1\n"), "expected a single document"),
}
LIST = {"list": (put(b"[1, 2]"), "it holds a list where a mapping belongs")}
PLACES: dict[str, tuple[Harm, str]] = {
    "folder": (instead(Path.mkdir), "it is no file"),
    "pipe": (instead(os.mkfifo), "it is no file"),
    "lost link": (instead(lambda path: path.symlink_to("nowhere")), "a link to what is not there"),
    "loop": (instead(lambda path: path.symlink_to(path)), "too many levels of symbolic links"),
    "device": (instead(lambda path: path.symlink_to("/dev/zero")), "it is no file"),
}
UNHEADED = "its first line names no column step"
TABLES: dict[str, tuple[Harm, str]] = {
    "empty": (put(b""), "it holds nothing"),
    "zeros": (emptied_in_place, UNHEADED),
    "half": (put(CSV[:-7].encode()), "1 line is torn, or none of ours, and skipped: 5"),
    "zeros at the end": (put(CSV.encode() + b"\0" * 99), "1 line is torn.*skipped: 6"),
    "word": (put(CSV.replace("1.25", "x").encode()), "1 line is torn.*skipped: 3"),
    "blank line": (put(CSV.replace("1,1.25", "\n1,1.25").encode()), "1 line is torn.*skipped: 3"),
    "step": (put(CSV.replace("\n2,", "\n-2,").encode()), "1 line is torn.*skipped: 4"),
    "huge step": (put(CSV.replace("\n2,", f"\n{'9' * 400},").encode()), "1 line is.*skipped: 4"),
    "quote": (put(CSV.replace("1.25", '"').encode()), "1 line is torn.*skipped: 5"),
    "binary": (put(bytes(range(256)) * 8), UNHEADED),
    "utf16": (put(CSV.encode("utf-16")), UNHEADED),
    "text": (put(b"once upon a time\n"), UNHEADED),
    "large": (grown, "a line has more than 4194304 bytes"),
}
PICTURES = {"large": DOCUMENTS["large"]}
CASES = [
    (name, damage)
    for name, damages in {
        "1/result.json": {**DOCUMENTS, **LIST, **PLACES},
        "1/config.yaml": {**DOCUMENTS, **YAMLS, **LIST, **PLACES},
        "1/overrides.yaml": {**DOCUMENTS, **YAMLS, **PLACES},
        "1/tuned.yaml": {**DOCUMENTS, **YAMLS, **LIST, **PLACES},
        "multirun.yaml": {**DOCUMENTS, **YAMLS, **LIST, **PLACES},
        "1/metrics.csv": {**TABLES, **PLACES},
        "1/lr_find.png": {**PICTURES, **PLACES},
        "1/batch_size.png": {**PICTURES, **PLACES},
        ".launcher.lock": PLACES,
        ".1.lock": PLACES,
    }.items()
    for damage in damages
    # half of a list, and of a list's file, is one too
    if (name, damage) not in (("1/overrides.yaml", "half"), ("1/overrides.yaml", "deep list"))
]


def expected_of(name: str, damage: str) -> tuple[Harm, str]:
    """The damage, and what is said of it."""
    if name.endswith("metrics.csv") and damage in TABLES:
        return TABLES[damage]
    return {**DOCUMENTS, **YAMLS, **LIST, **PLACES}[damage]


@pytest.mark.parametrize(("name", "damage"), CASES)
def test_the_report_names_a_file_that_cannot_be_read_and_shows_the_other_runs(
    tmp_path: Path, calling: Calling, name: str, damage: str
) -> None:
    top = tmp_path / "sweep"
    write_tree(top)
    if name == "multirun.yaml":
        (top / "journal.jsonl").unlink()
        (top / name).write_text(yaml.safe_dump(MULTIRUN))
    if name == ".1.lock":
        (top / "1/result.json").write_text('{"status": "running"}\n')
    harm, reason = expected_of(name, damage)
    harm(top / name)
    code, printed = calling(report.main, top)
    assert code == 0
    is_fatal = name in ("1/result.json", "1/config.yaml")
    what = r"(?: cannot be read: |: )"
    line = re.search(rf"^ *{re.escape(str(top / name))}{what}.*?(?:{reason})", printed, re.M)
    assert line is not None, printed
    state = {True: "unreadable"}.get(is_fatal, "missing" if name == ".1.lock" else "")
    counted = f"3 runs (2 finished, 1 {state}) of " if state else "3 runs (3 finished) of "
    assert printed.startswith(f"{top}: {counted}")
    assert (f"{top}/1  unreadable\n" in printed) == is_fatal
    # a run whose finder's answer is not known has a row of its own
    seeds = ["2", "1"] if name == "1/tuned.yaml" else ["2" if state else "3"]
    assert [(row["n"], row["test_acc_mean"]) for row in rows_in(top)] == [(n, "0.9") for n in seeds]
    assert html.escape(str(top / name)) in (top / "report.html").read_text()
    assert f"{name.rpartition('/')[2]}".replace("_", "\\_") in (top / "report.md").read_text()
    assert not (Path.cwd() / "owned").exists()


@pytest.mark.parametrize("name", ["1/batch_size.csv", "1/lr_find.csv"])
@pytest.mark.parametrize("damage", ["zeros", "large", "folder", "pipe"])
def test_files_that_are_only_for_the_user_are_not_opened(
    tmp_path: Path, calling: Calling, name: str, damage: str
) -> None:
    write_tree(tmp_path / "a")
    write_tree(tmp_path / "b")
    expected_of(name, damage)[0](tmp_path / "b" / name)
    texts = []
    for top in (tmp_path / "a", tmp_path / "b"):
        code, printed = calling(report.main, top)
        assert code == 0
        texts.append(printed.replace(str(top), "TOP"))
    assert texts[0] == texts[1]


# values of another kind


ODD = [None, True, 7, -7, "", "word", "2", [], [1], {}, {"a": 1}, {"a": None}, {"a": [1]}]
NUMBERS = (7, -7)
GROUPS: tuple[Any, ...] = (None, {}, {"a": 1}, {"a": None}, {"a": [1]})
RESULTS: dict[str, Any] = {
    "status": (),
    "slurm_job": ("2",),
    "metrics": ({}, {"a": 1}),
    "seconds": ({}, {"a": 1}),
    "error": ("", "word", "2"),
    "rank": NUMBERS,
    "submitted_at": NUMBERS,
    "checkpoints": GROUPS,
}
CONFIGS: dict[str, Any] = {
    "seed": NUMBERS,
    "name": ("", "word", "2"),
    "model": GROUPS[1:],
    "optimizer": GROUPS,
    "callbacks": (None, {}, {"a": None}),
    "tuner": GROUPS,
}


def values_in(name: str) -> list[tuple[str, Any, bool]]:
    """Keys, values, and whether we write such."""
    keys = RESULTS if name == "result.json" else CONFIGS
    return [
        (key, value, any(type(value) is type(one) and value == one for one in allowed))
        for key, allowed in keys.items()
        for value in ODD
    ]


@pytest.mark.parametrize("name", ["result.json", "config.yaml"])
def test_a_key_with_a_value_of_another_kind_is_named_with_it(
    tmp_path: Path, calling: Calling, name: str
) -> None:
    for number, (key, value, _) in enumerate(values_in(name)):
        folder = write_run(tmp_path / str(number))
        content = yaml.safe_load((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, key: value}))
    assert calling(report.main, tmp_path, "--out", tmp_path / "out")[0] == 0
    page = (tmp_path / "out/report.html").read_text()
    for number, (key, value, is_ours) in enumerate(values_in(name)):
        path = tmp_path / str(number) / name
        told = html.escape(f"{path} cannot be read: {key} holds {value!r}")
        assert (told in page) == (not is_ours), (key, value)


def test_keys_and_values_that_no_run_of_ours_has_do_not_end_the_report(
    tmp_path: Path, calling: Calling
) -> None:
    write_run(tmp_path / "good", metrics={"test_acc": 0.5, "val_acc": 0.5})
    groups: list[dict[str, Any]] = [
        {"clip": {"_target_": "x", "max_norm": {"a": 1}}},
        {"clip": {"_target_": "x", "max_norm": [1, {"2": 3, 4: [{}]}]}},
        {"averaging": {"a": 5, "a.b": {"c": 2}, "": {"": 1}}},
        {"averaging": {"a": {"b": 5}, "_target_": ["x"]}},
        {"callbacks": {"checkpoint": {"monitor": ["val_acc"], "mode": 3}}},
        {"callbacks": {"checkpoint": {"monitor": "val_acc"}}},
        {"model": {"=x": "=1+1", "a|b\n": "|\n", "<b>": HOSTILE, "nan": float("nan")}},
        {"model": {"_target_": "x", "note": "n" * 100_000}},
        {"seed": float("nan")},
        {"seed": -1.5},
    ]
    for number, group in enumerate(groups):
        write_run(tmp_path / f"g{number}", **group)
    metrics: list[tuple[float, float]] = [
        (1e308, -1e308), (1e200, 1e200), (float("inf"), -float("inf")), (float("nan"), 1.0),
        (5e-324, 1e-320), (1e149, -1e149),
    ]  # fmt: skip
    for number, pair in enumerate(metrics):
        for seed, value in enumerate((*pair, pair[0])):
            write_run(
                tmp_path / f"m{number}{seed}", seed=seed % 2, model={"_target_": "m", "i": number},
                metrics={"test_acc": value, "": 1.0, "=a|b\n<script>": value, "x" * 400: 0.0},
                result={"seconds": {"fit": -value}},
            )  # fmt: skip
    out = tmp_path / "out"
    for name in ("test_acc", "", "=a|b\n<script>", "x" * 400):
        arguments = ("--metric", name, "--baseline", "model.i=5", "--out", out)
        code, printed = calling(report.main, tmp_path, *arguments)
        assert code == 0
        assert f"{1 + len(groups) + 3 * len(metrics)} runs (" in printed
        assert "unreadable" not in printed
        assert (out / "report.html").read_text().count("<script") == 1
        table = [line for line in (out / "report.md").read_text().splitlines() if line[:1] == "|"]
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1
        with (out / "report.csv").open(newline="") as file:
            cells = [cell for line in csv.reader(file) for cell in line]
        assert not [cell for cell in cells if defused(cell) != cell]


HOSTILE = """</script><script>alert("it's")</script><img src=x onerror=alert(1)>"""


def test_numbers_stay_numbers_and_formulas_become_texts(tmp_path: Path, calling: Calling) -> None:
    for cell in ("=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "+", "-inf"):
        assert defused(cell) == f"'{cell}"
    for cell in ("-1", "+1", "-0.5", "-1e-05", "1", "a=b", "", "-", -1.5, None, 3):
        assert defused(cell) == cell
    for number, note in enumerate(("=1+1", "-0.5", '=HYPERLINK("x")')):
        write_run(tmp_path / str(number), model={"_target_": "x", "note": note},
                  metrics={"val_acc": -0.5, "test_acc": -0.5})  # fmt: skip
    assert calling(report.main, tmp_path)[0] == 0
    rows = rows_in(tmp_path)
    assert [row["model.note"] for row in rows] == ["'=1+1", "-0.5", '\'=HYPERLINK("x")']
    assert {row["test_acc_mean"] for row in rows} == {"-0.5"}


def test_names_of_folders_that_are_no_text_are_shown_as_far_as_they_are(
    tmp_path: Path, calling: Calling
) -> None:
    write_run(tmp_path / "good")
    names = [b"\xff\xfe", b"a\nb", b"<script>", b'it\'s "x"', b"|`*", b"\x1b[2J", b"l" * 250]
    for name in names:
        for torn in (b"", b"t"):
            folder = tmp_path / os.fsdecode(name[:249] + torn)
            write_run(tmp_path / "new").rename(folder)
            if torn:
                (folder / "result.json").write_text("{")
    code, printed = calling(report.main, tmp_path)
    assert code == 0
    assert printed.count("cannot be read: Expecting") == len(names)
    assert "\x1b" not in printed
    assert (tmp_path / "report.html").read_text().count("<script") == 1
    (row,) = rows_in(tmp_path)
    assert row["num_finished"] == str(1 + len(names))


def test_a_report_of_nothing_that_can_be_read_is_refused_with_the_reasons(
    tmp_path: Path, calling: Calling
) -> None:
    (tmp_path / "journal.jsonl").write_text("x\n")
    assert calling(report.main, tmp_path) == (
        2,
        f"report: no run could be read: {tmp_path}/journal.jsonl cannot be read: no line says "
        "which sweep it is of; 1 line is torn, or none of ours, and skipped: 1\n",
    )


def test_folders_in_folders_may_be_deeper_than_python_recurses(
    tmp_path: Path, calling: Calling, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "good")
    monkeypatch.chdir(tmp_path)
    for _ in range(1200):
        os.mkdir("x")
        os.chdir("x")
    try:
        assert calling(report.main, tmp_path)[0] == 0
    finally:  # pytest recurses
        subprocess.run(["rm", "-r", str(tmp_path / "x")], check=True)


# the journal


BAD_LINES: dict[str, str | bytes] = {
    "blank": "",
    "torn": '{"event": "job", "jo',
    "zeros": b"\0" * 50,
    "binary": bytes(range(128, 256)),
    "text": "once upon a time",
    "number": "3",
    "null": "null",
    "list": "[1]",
    "deep": "[" * 100_000,
    "no event": '{"job": 1}',
    "other event": '{"event": "x", "job": 1}',
    "event of a list": '{"event": ["job"], "job": 1}',
    "no job": '{"event": "job", "state": "failed"}',
    **{
        f"{key}={value!r:.20}": json.dumps({"event": "job", "job": 1, key: value})
        for key, value in (
            ("job", "1"), ("job", -1), ("job", True), ("job", 1.5), ("job", [1]), ("job", 10**30),
            ("state", "zzz"), ("state", None), ("state", ["failed"]), ("overrides", None),
            ("overrides", "seed=1"), ("overrides", [1]), ("overrides", ["a\0b"]),
            ("overrides", ["\ud800"]), ("folder", 3), ("folder", "a\0b"), ("attempt", "1"),
            ("attempt", None), ("seconds", "1"), ("seconds", [1]), ("error", {"a": 1}),
            ("value", "x"), ("device", 0),
        )
    },
    **{
        f"sweep with {key}={value!r:.20}": json.dumps({**EVENTS[0], key: value})
        for key, value in (
            ("command", []), ("command", "python"), ("command", [1]), ("cwd", None), ("cwd", 3),
            ("definition", {}), ("definition", []), ("definition", {"config": 1}), ("hash", 0),
            ("jobs", None), ("jobs", [[1]]), ("jobs", ["seed=1"]),
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_line_of_the_journal_that_is_none_of_ours_is_skipped_and_said_once(
    tmp_path: Path, calling: Calling, kind: str
) -> None:
    write_tree(tmp_path)
    good = [json.dumps(event) for event in EVENTS]
    write_lines(tmp_path, [*good[:2], BAD_LINES[kind], *good[2:]])
    note = f"{tmp_path}/journal.jsonl: 1 line is torn, or none of ours, and skipped: 3"
    code, printed = calling(report.main, tmp_path)
    assert code == 0
    assert f"{tmp_path}: 3 runs (3 finished) of 1 configuration\n" in printed
    assert printed.count(note) == 1
    for action, said in (
        ("status", "3 finished; not running"), ("resume", "3 finished; nothing to resume"),
        ("retry", "3 finished; nothing to retry"), ("cancel", "3 finished"),
    ):  # fmt: skip
        code, printed = calling(sweep.main, action, tmp_path)
        assert code == 0
        assert f"{tmp_path}: {said}\n" in printed
        assert printed.count(note) == 1


def test_a_job_whose_first_line_is_torn_is_known_by_the_sweeps(tmp_path: Path) -> None:
    good = [json.dumps(event) for event in EVENTS]
    later = json.dumps({"event": "job", "job": 1, "state": "failed", "error": "no"})
    write_lines(tmp_path, [*good[:2], good[2][:30], later, "", good[3]])
    found = Journal(tmp_path).required()
    assert found.note == (
        f"{tmp_path}/journal.jsonl: 2 lines are torn, or none of ours, and skipped: 3, 5"
    )
    assert found.jobs[1] == Job(job=1, overrides=["seed=2"], state=State.failed, error="no")
    again = SweepFolder(tmp_path).add(EVENTS[0]["definition"], [["seed=1"], ["seed=2"]])
    assert [job.job for job in again] == [0, 1]


# half of it says of the sweep
@pytest.mark.parametrize(
    "damage", [*(kind for kind in DOCUMENTS if kind != "half"), *LIST, *PLACES]
)
def test_a_journal_that_says_of_no_sweep_is_refused_in_a_line_and_its_runs_are_shown(
    tmp_path: Path, calling: Calling, damage: str
) -> None:
    top = tmp_path / "sweep"
    write_tree(top)
    expected_of("journal.jsonl", damage)[0](top / "journal.jsonl")
    path = re.escape(str(top / "journal.jsonl"))
    reason = PLACES[damage][1] if damage in PLACES else "no line says|no whole line|a line has"
    for action in sweep.ACTIONS:
        code, printed = calling(sweep.main, action, top)
        assert code == 2
        assert re.fullmatch(f"sweep: {path} cannot be read: .*(?:{reason}).*\n", printed)
    code, printed = calling(report.main, top)
    assert code == 0
    assert re.search(f"^{path} cannot be read: .*(?:{reason})", printed, re.M)
    assert f"{top}: 3 runs (3 finished) of 1 configuration\n" in printed


def test_a_launcher_refuses_a_journal_of_no_sweep_and_says_what_to_type(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path)
    write_lines(tmp_path, ["{}"])
    with pytest.raises(Refused) as refusal:
        folder.refuse_changes(EVENTS[0]["definition"])
    assert str(refusal.value) == (
        f"{tmp_path}/journal.jsonl cannot be read: no line says which sweep it is of; 1 line is "
        "torn, or none of ours, and skipped: 1; type another hydra.sweep.dir=, or resume=never to "
        "move the old one aside"
    )


def test_what_is_written_to_the_journal_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    journal = Journal(tmp_path)
    journal.write(EVENTS[:1])
    journal.write(EVENTS[1:])
    assert synced == [str(journal.path), str(tmp_path), str(journal.path)]


# a sweep


@pytest.mark.parametrize("damage", [*DOCUMENTS, *LIST, *PLACES])
def test_a_job_without_a_result_that_can_be_read_is_shown_and_run_again(
    tmp_path: Path, calling: Calling, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    top = tmp_path / "sweep"
    write_tree(top)
    harm, reason = expected_of("1/result.json", damage)
    harm(top / "1/result.json")
    said = rf"{re.escape(str(top))}/1/result\.json cannot be read: .*(?:{reason})"
    code, printed = calling(sweep.main, "status", top)
    assert code == 0
    assert f"{top}: 2 finished, 1 unreadable; not running\n" in printed
    assert re.search(rf"^1 +unreadable +1 +1\.5 +seed=2  {said}", printed, re.M)
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda _, words: started.append(words))
    cwd = Path.cwd()
    for action, last in (("resume", "seed=1,2,3"), ("retry", "launch.jobs=[1]")):
        expected = [{"event": "job", "job": 1, "state": "queued"}]
        write_lines(top, [json.dumps(event) for event in EVENTS])
        code, printed = calling(sweep.main, action, top)
        os.chdir(cwd)
        assert code == 0
        assert re.match(f"{said}.*; job 1 is run again\n", printed)
        assert last in started.pop()
        events = Journal(top).events()[len(EVENTS) :]
        assert [{key: event[key] for key in expected[0]} for event in events] == expected
    code, printed = calling(sweep.main, "cancel", top)
    assert code == 0
    assert re.search(f"{said}.*; if SLURM runs job 1 of the sweep, type scancel NUMBER\n", printed)
    assert printed.endswith(f"{top}: 2 finished, 1 cancelled\n")


@pytest.mark.parametrize("damage", PLACES)
def test_a_lock_that_is_no_file_is_refused_in_a_line(
    tmp_path: Path, calling: Calling, damage: str
) -> None:
    write_tree(tmp_path)
    PLACES[damage][0](tmp_path / ".launcher.lock")
    for action in sweep.ACTIONS:
        code, printed = calling(sweep.main, action, tmp_path)
        assert code == 2
        assert re.fullmatch(
            rf"sweep: {re.escape(str(tmp_path))}/\.launcher\.lock cannot be read: "
            rf".*(?:{PLACES[damage][1]}).*\n", printed
        )  # fmt: skip
    with pytest.raises(Unreadable):
        SweepFolder(tmp_path).hold()


@pytest.mark.parametrize(
    "content",
    ["", "\0" * 9, "{", "[]", "{}", '{"pid": -1, "host": "HERE"}', '{"pid": 0, "host": "HERE"}',
     '{"pid": "1", "host": "HERE"}', '{"pid": 1e99, "host": "HERE"}', '{"pid": 7}',
     '{"pid": true, "host": "HERE"}', '{"pid": 99999999999, "host": "HERE"}', "7" * 9999],
)  # fmt: skip
def test_nobody_is_ended_where_the_lock_does_not_say_who_holds_it(
    tmp_path: Path, calling: Calling, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tree(tmp_path)
    folder = SweepFolder(tmp_path)
    assert folder.hold()
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("somebody was ended"))
    (tmp_path / ".launcher.lock").write_text(content.replace("HERE", socket.gethostname()))
    code, printed = calling(sweep.main, "status", tmp_path)
    assert code == 0
    assert "run by process ? on ?\n" in printed
    code, printed = calling(sweep.main, "cancel", tmp_path)
    assert code == 2
    assert f"{tmp_path} is being run by process ? on ?; wait for it, or type " in printed
    folder.release()


def test_a_process_that_is_not_there_or_a_folder_that_is_gone_is_told(
    tmp_path: Path, calling: Calling
) -> None:
    write_tree(tmp_path)
    folder = SweepFolder(tmp_path)
    assert folder.hold()
    lock = {"pid": (1 << 31) - 1, "host": socket.gethostname()}
    (tmp_path / ".launcher.lock").write_text(json.dumps(lock))
    code, printed = calling(sweep.main, "cancel", tmp_path)
    assert code == 2
    assert printed == (
        f"sweep: process 2147483647, which {tmp_path}/.launcher.lock names, cannot be ended: no "
        "such process; end the launcher yourself\n"
    )
    folder.release()
    moved = [{**EVENTS[0], "cwd": "/not/there"}, *EVENTS[1:3]]
    write_lines(tmp_path, [json.dumps(event) for event in moved])
    code, printed = calling(sweep.main, "resume", tmp_path)
    assert code == 2
    assert printed == (
        "sweep: the sweep was started in /not/there, which cannot be entered: no such file or "
        "directory; type its command in the folder that it is in now\n"
    )


# SLURM


def test_a_job_of_slurm_is_waited_for_though_its_result_is_torn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = write_run(tmp_path / "0", status="running", result={SLURM_JOB: "7"}) / "result.json"
    job = Job(job=0, overrides=["seed=1"], folder="0")
    waiting = cluster.Waiting({tmp_path / "0": job}, Progress([job]), "leave")
    waiting._look(tmp_path / "0", job, {})
    result.write_text("{")
    assert waiting._ids() == ["7"]
    waiting._look(tmp_path / "0", job, {"7": "RUNNING"})
    assert job.state == "running"
    waiting._look(tmp_path / "0", job, {"7": "COMPLETED"})
    assert (job.state, waiting._left) == ("failed", {})
    assert f"{result} cannot be read: Expecting property name" in capsys.readouterr().out


def test_a_torn_result_is_refreshed_to_unreadable_except_of_a_job_that_was_cancelled(
    tmp_path: Path,
) -> None:
    write_tree(tmp_path)
    for number in range(2):
        (tmp_path / f"{number}/result.json").write_text("")
    jobs = [Job(job=number, overrides=[], state=State.finished) for number in range(3)]
    jobs[1].state = State.cancelled
    SweepFolder(tmp_path).refresh(jobs)
    assert [job.state for job in jobs] == ["unreadable", "cancelled", "finished"]
    assert jobs[0].error == f"{tmp_path}/0/result.json cannot be read: it holds nothing"


@pytest.mark.parametrize("number", ["-u root", "7 8", "--me", "", "7_", "seven"])
def test_the_number_of_a_job_is_one(tmp_path: Path, number: str) -> None:
    folder = write_run(tmp_path / "0", result={SLURM_JOB: number})
    with pytest.raises(Unreadable, match="slurm_job holds"):
        RunFolder(folder).read_result()


# a study


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The storage of a study of ten trials."""
    import optuna

    path = tmp_path_factory.mktemp("study") / "study.db"
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    found = optuna.create_study(study_name=STUDY, storage=url(path))
    found.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=10)
    return path.read_bytes()


PAGE = 4096
TORN: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "zeros": lambda good: b"\0" * len(good),
    "half": lambda good: good[: len(good) // 2],
    "head": lambda good: good[:50],
    "text": lambda good: b"once upon a time" * 999,
    "zeros inside": lambda good: good[: 2 * PAGE] + b"\0" * PAGE + good[3 * PAGE :],
    "zeros at the end": lambda good: good[: -2 * PAGE] + b"\0" * 2 * PAGE,
}


@pytest.mark.skipif(find_spec("optuna") is None, reason="needs pip install -e '.[optuna]'")
@pytest.mark.filterwarnings("ignore:Deprecated API features detected")  # Optuna's
@pytest.mark.parametrize("damage", [*TORN, *PLACES])
def test_a_storage_that_is_torn_or_none_is_refused_by_name_with_what_to_type(
    tmp_path: Path, study: bytes, damage: str
) -> None:
    path = tmp_path / "study.db"
    path.write_bytes(study)
    assert len(open_study(path).trials) == 10
    if damage in TORN:
        path.write_bytes(TORN[damage](study))
    else:
        PLACES[damage][0](path)
    with pytest.raises(Unreadable) as refusal:
        open_study(path)
    assert str(refusal.value).startswith(f"{path} cannot be read: ")
    assert "\n" not in str(refusal.value)
    if damage in TORN:
        assert str(refusal.value).endswith("; type another name=, which begins a new study")


# a run that goes on


@pytest.mark.parametrize("damage", TABLES)
def test_a_run_goes_on_with_the_lines_of_its_metrics_that_are_whole(
    tmp_path: Path, damage: str
) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text(CSV)
    TABLES[damage][0](path)
    with pytest.warns(UserWarning, match=TABLES[damage][1]):
        before = read_metrics(path)
    logger = MetricsCsv(save_dir=str(tmp_path))
    logger.log_metrics({"train_loss": 0.5}, step=4)
    with pytest.warns(UserWarning, match=re.escape(str(path))):
        logger.save()
    assert read_metrics(path) == [*before, {"step": 4.0, "train_loss": 0.5}]


def test_a_mark_before_a_text_and_other_ends_of_lines_are_read(tmp_path: Path) -> None:
    for name, content in (("a.json", b'{"a": 1}'), ("a.yaml", b"a: 1\r\n")):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content)
    assert files.read_json(tmp_path / "a.json") == files.read_yaml(tmp_path / "a.yaml") == {"a": 1}
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbf" + CSV.replace("\n", "\r\n").encode())
    lines = list(files.read_steps(tmp_path / "a.csv"))
    assert [number for number, line in lines if line is not None] == [2, 3, 4, 5]
