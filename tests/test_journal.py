"""The journal of a sweep: several and killed writers; which sweep is in a folder; devices."""

import json
import multiprocessing.dummy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig

from app.errors import Refused
from app.launch import apart
from app.launch.slots import VISIBLE, Slots, find_slots
from app.record.states import State
from app.sweep.folder import SweepFolder, claim, hash_of
from app.sweep.journal import Job, Journal
from app.sweep.progress import Progress, duration, labels, table

WRITER = """
import sys
from pathlib import Path
from app.sweep.journal import Journal
journal, writer = Journal(Path(sys.argv[1])), int(sys.argv[2])
for number in range(100):
    error = "long " * 300 + f"{writer} {number}"
    journal.write([{"event": "job", "job": writer, "state": "failed", "error": error}])
"""
DEFINITION: dict[str, Any] = {"config": "train", "config_dirs": [], "overrides": []}
SWEEP = {"event": "sweep", "command": ["python"], "cwd": "/", "definition": DEFINITION,
         "hash": "0", "jobs": []}  # fmt: skip


def test_events_of_four_writers_at_once_are_all_there_and_whole(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_text('{"event": "job", "jo')  # of a writer that was killed
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(number)])
        for number in range(4)
    ]
    assert [writer.wait(timeout=120) for writer in writers] == [0] * 4
    events = Journal(tmp_path).events()
    assert len(events) == 400
    for writer in range(4):
        ends = [event["error"].split()[-2:] for event in events if event["job"] == writer]
        assert ends == [[str(writer), str(number)] for number in range(100)]


@pytest.mark.parametrize("torn", ['{"event": "job", "jo', '{"e', "x" * 200_000, ""])
def test_a_torn_last_line_is_ignored_and_then_repaired(tmp_path: Path, torn: str) -> None:
    journal = Journal(tmp_path)
    queued = {"event": "job", "job": 0, "overrides": ["seed=1"], "state": "queued"}
    journal.write([SWEEP, queued])
    with journal.path.open("a") as file:
        file.write(torn)
    sweep = journal.read()
    assert sweep is not None
    assert sweep.jobs[0] == Job(job=0, overrides=["seed=1"])
    journal.write([{"event": "job", "job": 0, "state": "running", "attempt": 1, "folder": "0"}])
    assert [json.loads(line)["event"] for line in journal.path.read_text().splitlines()] == [
        "sweep", "job", "job",
    ]  # fmt: skip


def test_later_events_win_and_an_error_belongs_to_its_attempt(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    assert journal.read() is None
    journal.write(
        [
            SWEEP,
            {"event": "job", "job": 3, "overrides": ["seed=1"], "state": "queued"},
            {"event": "job", "job": 3, "state": "failed", "error": "ValueError: no", "attempt": 1},
            {"event": "job", "job": 3, "state": "running", "attempt": 2},
        ]
    )
    sweep = journal.read()
    assert sweep is not None
    assert sweep.jobs == {3: Job(job=3, overrides=["seed=1"], state=State.running, attempt=2)}


def test_jobs_are_known_again_by_what_was_typed_whatever_their_order(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path)
    first = folder.add(DEFINITION, [["seed=1", "launch=local"], ["seed=2"], ["seed=2"]])
    assert [job.job for job in first] == [0, 1, 2]
    again = folder.add(
        DEFINITION, [["seed=3"], ["seed=2", "launch.retries=1"], ["seed=1"], ["seed=2"]]
    )
    assert [job.job for job in again] == [3, 1, 0, 2]


Sweeping = Callable[..., DictConfig]


@pytest.fixture
def sweeping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sweeping:
    """Compose as the command line does for a sweep, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def compose_(*typed: str) -> DictConfig:
        with initialize_config_module("app.conf", version_base="1.3"):
            return GlobalHydra.instance().hydra.compose_config(
                config_name="train",
                overrides=["run_dir=.", *typed],
                run_mode=RunMode.MULTIRUN,
                with_log_configuration=False,
            )

    return compose_


FIXED = "hydra.sweep.dir=sweep"
STAMPED = "hydra.sweep.dir='multirun/${now:%Y}'"


def begun(cfg: DictConfig) -> SweepFolder:
    """The folder of a sweep of two jobs, of which one is finished."""
    folder, definition = claim(cfg)
    first, _ = folder.add(definition, [["seed=1"], ["seed=2"]])
    first.state = State.finished
    folder.note(first)
    return folder


def test_two_sweeps_of_the_same_second_have_two_folders(sweeping: Sweeping) -> None:
    year, next_ = (begun(sweeping(STAMPED, "seed=1,2")).path for _ in range(2))
    assert next_.name == f"{year.name}-1"


def test_the_unfinished_sweep_of_the_same_definition_goes_on_unless_anew_or_held(
    sweeping: Sweeping,
) -> None:
    held = begun(sweeping(STAMPED, "seed=1,2"))
    held.release()
    same, _ = claim(sweeping(STAMPED, "seed=1,2", "launch=local", "launch.slots=1"))
    assert same.path == held.path
    other, _ = claim(sweeping(STAMPED, "seed=1,2"))
    assert other.path != held.path
    same.release()
    anew, _ = claim(sweeping(STAMPED, "seed=1,2", "resume=never"))
    assert anew.path != held.path
    another, _ = claim(sweeping(STAMPED, "seed=1,3"))
    assert another.path != held.path
    sweep = same.journal.read()
    assert sweep is not None
    sweep.jobs[1].state = State.cancelled
    same.note(sweep.jobs[1])  # so that nothing is left to do, of which nobody was told
    untold, _ = claim(sweeping(STAMPED, "seed=1,2"))
    assert untold.path == held.path
    untold.note_end()
    untold.release()
    assert claim(sweeping(STAMPED, "seed=1,2"))[0].path != held.path


def test_another_sweep_in_the_folder_is_refused_by_what_changed_or_moved_aside(
    sweeping: Sweeping,
) -> None:
    begun(sweeping(FIXED, "seed=1,2", "clip=norm,value")).release()
    claim(sweeping(FIXED, "seed=1,2", "clip=norm,value"))[0].release()
    for typed, change in (
        (("seed=1,3", "clip=norm,value"), "seed=1,2 -> seed=1,3"),
        (("seed=1,2",), "clip=norm,value -> nothing"),
        (("clip=norm,value", "seed=1,2"), "the order: "),
    ):
        with pytest.raises(Refused) as refusal:
            claim(sweeping(FIXED, *typed))
        assert str(refusal.value).startswith(f"sweep holds another sweep:\n  {change}")
        assert str(refusal.value).endswith(
            "\ntype another hydra.sweep.dir=, or resume=never to move the old one aside"
        )
    folder, _ = claim(sweeping(FIXED, "seed=1,3", "resume=never"))
    assert folder.journal.read() is None
    assert Journal(Path("sweep.1")).read() is not None


def test_a_sweep_goes_on_without_torn_lines_and_passes_over_what_is_no_journal(
    sweeping: Sweeping, capsys: pytest.CaptureFixture[str]
) -> None:
    held = begun(sweeping(STAMPED, "seed=1,2"))
    held.release()
    with held.journal.path.open("a") as file:
        file.write("once upon a time\n\n")
    other = Path("multirun/zz/journal.jsonl")
    other.parent.mkdir()
    other.write_text("{}\n")
    capsys.readouterr()
    same, _ = claim(sweeping(STAMPED, "seed=1,2"))
    assert same.path == held.path
    assert capsys.readouterr().out == (
        f"passed over: {other} cannot be read: no line says which sweep it is of; 1 line is torn, "
        f"or none of ours, and skipped: 1\n{held.journal.path}: 2 lines are torn, or none of ours, "
        "and skipped: 5, 6\n"
    )


@pytest.mark.parametrize("content", [b"", b"\0" * 500, b'{"event": "swe'])
def test_a_sweep_whose_journal_was_lost_begins_anew_and_says_so(
    sweeping: Sweeping, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    held = begun(sweeping(FIXED, "seed=1,2"))
    held.release()
    held.journal.path.write_bytes(content)
    capsys.readouterr()
    same = begun(sweeping(FIXED, "seed=1,2"))
    said = "sweep/journal.jsonl holds no whole line; the sweep begins anew\n"
    assert capsys.readouterr().out == said
    assert [job.state for job in same.journal.required().jobs.values()] == ["finished", "queued"]


def test_a_folder_that_is_held_is_refused_with_the_process(sweeping: Sweeping) -> None:
    claim(sweeping(FIXED, "seed=1,2"))
    with pytest.raises(Refused) as refusal:
        claim(sweeping(FIXED, "seed=1,2"))
    assert str(refusal.value).startswith(f"sweep is being run by process {os.getpid()} on ")
    assert str(refusal.value).endswith("; wait for it, or type python -m app.sweep cancel sweep")


def test_the_hash_is_of_what_decides_the_jobs(sweeping: Sweeping) -> None:
    def of(*typed: str) -> str:
        return hash_of(claim(sweeping(STAMPED, *typed))[1])

    assert of("seed=1,2") == of("seed=1,2", "launch=local", "launch.retries=2", "resume=never")
    assert of("seed=1,2") != of("seed=1,2,3")


def test_gpus_are_handed_out_and_seen_by_one_job_each(
    composed: Callable[..., DictConfig],
) -> None:
    slots = Slots(["2", "3", "5"], are_gpus=True)
    single, several = composed(), composed("strategy=ddp", "trainer.devices=2")
    everything = composed("strategy=ddp")
    assert [slots.needed(cfg, devices_per_job=None) for cfg in (single, several, everything)] == [
        1, 2, 3,
    ]  # fmt: skip
    assert slots.needed(everything, devices_per_job=2) == 2
    assert slots.take(2) == ["2", "3"]
    assert slots.take(2) is None
    assert slots.take(1) == ["5"]
    slots.give_back(["3"])
    slots.give_back(["2"])
    assert slots.take(2) == ["2", "3"]
    assert slots.environment(["2", "3"])[VISIBLE] == "2,3"
    with pytest.raises(Refused) as refusal:
        slots.needed(composed("strategy=ddp", "trainer.devices=4"), devices_per_job=None)
    assert str(refusal.value) == (
        "trainer.devices must be <= 3, the GPUs that the queue has, got 4; type trainer.devices=3"
    )
    with pytest.raises(Refused) as refusal:
        slots.needed(several, devices_per_job=1)
    assert str(refusal.value) == (
        "launch.devices_per_job must be >= trainer.devices=2, got 1; type "
        "launch.devices_per_job=null"
    )


def test_gpus_are_those_that_this_process_may_see(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(asked: int | None, accelerator: str = "auto") -> list[str]:
        context: Any = multiprocessing.dummy  # threads, which see what is patched
        slots = find_slots(asked=asked, accelerator=accelerator, context=context)
        return slots.names if slots.are_gpus else [f"core {name}" for name in slots.names]

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv(VISIBLE, raising=False)
    assert found(None) == ["0", "1"]
    monkeypatch.setenv(VISIBLE, "4,GPU-7")
    assert found(None) == ["4", "GPU-7"]
    assert found(1) == ["4"]
    with pytest.raises(Refused) as refusal:
        found(3)
    assert str(refusal.value) == (
        "launch.slots must be <= 2, the GPUs of this machine, got 3; type launch.slots=null"
    )
    assert found(3, "cpu") == ["core 0", "core 1", "core 2"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert len(found(None)) == len(os.sched_getaffinity(0))


def test_cores_are_shared_by_jobs_that_want_more_and_hide_no_gpu(
    composed: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VISIBLE, raising=False)
    slots = Slots(["0", "1"], are_gpus=False)
    assert slots.needed(composed("strategy=ddp", "trainer.devices=4"), devices_per_job=None) == 2
    assert slots.needed(composed("strategy=ddp"), devices_per_job=None) == 1
    assert VISIBLE not in slots.environment(["0"])


def test_tables_show_what_tells_the_jobs_apart() -> None:
    jobs: list[Any] = [
        Job(
            job=0, overrides=["seed=1", "clip=norm"], state=State.finished, attempt=1, seconds=1.25
        ),
        Job(
            job=1,
            overrides=["seed=2", "clip=norm"],
            state=State.failed,
            error="ValueError: no\nmore",
        ),
    ]
    assert labels(jobs) == {0: "seed=1", 1: "seed=2"}
    assert labels(jobs[:1]) == {0: "seed=1 clip=norm"}
    assert table(jobs).splitlines() == [
        "job  state     attempt  device  seconds  overrides",
        "0    finished  1                1.2      seed=1",
        "1    failed    0                         seed=2  ValueError: no",
    ]
    assert [duration(seconds) for seconds in (7, 67, 3667)] == ["7 s", "1 min 7 s", "1 h 1 min"]


def test_the_time_left_is_that_of_all_slots_together(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr("app.sweep.progress.time.monotonic", lambda: now[0])
    jobs = [Job(job=number, overrides=[f"seed={number}"]) for number in range(6)]
    progress = Progress(jobs)

    def ended(number: int, *, waiting: int) -> str:
        jobs[number].state = State.finished
        progress.ended(jobs[number], waiting=waiting)
        return capsys.readouterr().out

    progress.started(jobs[0])
    progress.started(jobs[1])
    now[0] = 10.0
    assert ended(0, waiting=4).endswith("[1/6 done, 1 running, 0 failed, about 20 s left]\n")
    assert ended(1, waiting=4).endswith("[2/6 done, 0 running, 0 failed, about 20 s left]\n")
    progress.started(jobs[2])
    now[0] = 12.0
    progress.started(jobs[3])
    now[0] = 20.0
    assert ended(2, waiting=0).endswith("[3/6 done, 1 running, 0 failed, about 2 s left]\n")
    assert ended(3, waiting=0).endswith("[4/6 done, 0 running, 0 failed]\n")


class Noting:
    """A callback of Hydra's as others write it, which may fail."""

    heard: ClassVar[list[str]] = []

    def __init__(self, name: str, fails: bool = False) -> None:
        self.name, self.fails = name, fails

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        self.heard.append(f"{self.name} start {kwargs['task_function'].__name__}")
        if self.fails:
            raise LookupError("no server")

    def on_job_end(self, config: DictConfig, job_return: Any, **kwargs: Any) -> None:
        self.heard.append(f"{self.name} end {job_return.return_value}")


def test_hydras_callbacks_hear_of_a_job_and_one_that_fails_only_warns(
    sweeping: Sweeping, tmp_path: Path
) -> None:
    def task(cfg: DictConfig) -> float:
        return float(cfg.seed)

    one, other = ({"_target_": "test_journal.Noting", "name": name} for name in ("one", "other"))
    cfg = sweeping("hydra.sweep.dir=sweep", "hydra.sweep.subdir='0'", "seed=3")
    log = {"_target_": "hydra.experimental.callbacks.LogJobReturnCallback"}
    cfg.hydra.callbacks = {"one": one, "log": log, "other": {**other, "fails": True}}
    with pytest.warns(UserWarning, match="^Callback Noting.on_job_start raised LookupError: no s"):
        outcome = apart._outcome(task, cfg, tmp_path / "sweep/0")
    assert (outcome.state, outcome.value) == (State.finished, 3.0)
    assert Noting.heard == ["one start task", "other start task", "other end 3.0", "one end 3.0"]
