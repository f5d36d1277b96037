"""Real processes of this machine: what they tell each other, and what is seen when one fails."""

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import wait_until

from app.config import what_decides
from app.errors import RankFailed, Refused
from app.launch.local import run_local
from app.launch.start import placed
from app.process.ranks import Ranks, ranks, started_elsewhere

HERE = Path(__file__).parent
STARTS = ("forkserver", "spawn")


def start(function: Callable[..., Any], *arguments: Any, start_method: str = "forkserver") -> Any:
    return run_local(
        function, *arguments, num_processes=2, start_method=start_method, logging_config=None
    )


def introduce(tensor: torch.Tensor, text: str) -> dict[str, Any]:
    """What a rank knows and hears."""
    assert started_elsewhere()
    told = ranks().first(lambda: {"by": ranks().rank, "tensor": torch.ones(2)})
    return {
        "rank": ranks().rank,
        "told": told["by"],
        "gathered": ranks().gathered({"rank": ranks().rank}),
        "shared": tensor.is_shared(),
        "text": text,
        "environment": os.environ["GIVEN"],
    }


@pytest.mark.parametrize("start_method", STARTS)
def test_ranks_meet_and_the_first_ones_value_comes_back(
    start_method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = ("one", "two") if start_method == "forkserver" else ("one",)
    for job in jobs:  # one after another in the same process
        monkeypatch.setenv("GIVEN", job)
        found = start(introduce, torch.ones(1000), "${local_rank}", start_method=start_method)
        assert found == {
            "rank": 0, "told": 0, "gathered": [{"rank": 0}, {"rank": 1}], "shared": True,
            "text": "${local_rank}", "environment": job,
        }  # fmt: skip
    assert not started_elsewhere()
    assert ranks().size == 1


def fail(how: str) -> None:
    """Rank 1 fails; rank 0 then waits for it in a collective."""
    torch.distributed.init_process_group("gloo")
    if ranks().rank == 1:
        if how in ("raises", "leaves a deaf one"):
            raise LookupError("the data are gone")
        if how == "refuses":
            raise Refused("clip.max_norm must be > 0, got -1; type clip.max_norm=1")
        if how == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "exits":
            sys.exit(130)
    elif how == "leaves a deaf one":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(60)
    torch.distributed.barrier()
    time.sleep(60)


def test_the_first_failure_is_shown_with_its_rank_and_its_traceback() -> None:
    with pytest.raises(RankFailed) as failure:
        start(fail, "raises")
    assert failure.value.rank == 1
    assert failure.value.error == "LookupError: the data are gone"
    text = str(failure.value)
    assert text.startswith("rank 1 failed, and the other ranks were ended:\nTraceback")
    assert "test_launch.py" in text
    assert "peer" not in text


def test_a_killed_rank_is_named_and_nothing_stays() -> None:
    with pytest.raises(RankFailed, match=r"rank 1 .* was ended by SIGKILL; was memory short"):
        start(fail, "is killed")


def test_a_rank_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.launch.local.KILL_AFTER_S", 0.5)
    with pytest.raises(RankFailed, match=r"rank 1 failed"):
        start(fail, "leaves a deaf one")


def test_a_thread_can_start_ranks_as_a_notebook_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIVEN", "")
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(start, introduce, torch.ones(1), "").result()
    assert found["gathered"] == [{"rank": 0}, {"rank": 1}]


@pytest.mark.parametrize(("how", "error"), [("refuses", Refused), ("exits", SystemExit)])
def test_a_refusal_and_an_exit_come_through(how: str, error: type[BaseException]) -> None:
    with pytest.raises(error) as raised:
        start(fail, how)
    assert str(raised.value) in (
        "clip.max_norm must be > 0, got -1; type clip.max_norm=1",
        "130",
    )


def refuse_first() -> None:
    def refuse() -> None:
        raise Refused("the folder is taken")

    ranks().first(refuse)


def test_what_the_first_rank_refuses_ends_all_and_is_told_once() -> None:
    with pytest.raises(Refused, match=r"^the folder is taken$"):
        start(refuse_first)


def differ(config: dict[str, Any]) -> None:
    own = {**config, "clip": {"max_norm": float(ranks().rank)}}
    ranks().refuse_different(what_decides(own))


def test_ranks_of_different_configurations_are_refused_by_key() -> None:
    with pytest.raises(Refused) as refusal:
        start(differ, {"run_dir": "runs/a", "name": "a"})
    assert str(refusal.value) == (
        "rank 1 has another configuration than rank 0:\n  clip.max_norm: 0.0 -> 1.0\n"
        "start every rank with the same command"
    )


def report_pid(folder: str) -> None:
    Path(folder, f"{ranks().rank}.pid").write_text(str(os.getpid()))
    time.sleep(60)


LAUNCHER = """
import sys
from test_launch import report_pid, start
if __name__ == "__main__":
    start(report_pid, sys.argv[1], start_method=sys.argv[2])
"""


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return state != "Z"


@pytest.mark.parametrize(
    ("start_method", "by"),
    [
        *itertools.product(STARTS, (signal.SIGKILL, signal.SIGTERM)),
        *itertools.product(STARTS[:1], (signal.SIGHUP, signal.SIGUSR2)),
    ],
)
def test_no_rank_outlives_the_launcher(tmp_path: Path, start_method: str, by: int) -> None:
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    launcher = subprocess.Popen(
        [sys.executable, "launcher.py", str(tmp_path), start_method],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(HERE)},
    )
    files = [tmp_path / f"{rank}.pid" for rank in range(2)]
    wait_until(lambda: all(file.exists() and file.read_text() for file in files))
    launcher.send_signal(by)
    exit_code = launcher.wait(timeout=120)
    assert exit_code == (-by if by == signal.SIGKILL else 128 + by)
    pids = [int(file.read_text()) for file in files]
    wait_until(lambda: not any(is_alive(pid) for pid in pids))


def test_a_process_alone_needs_no_store() -> None:
    alone = Ranks(rank=0, size=1, store=None)
    assert alone.first(lambda: "value") == "value"
    assert alone.gathered("value") == ["value"]


def test_ranks_that_leave_do_not_wait_for_one_that_waits_for_them() -> None:
    store = torch.distributed.HashStore()
    first, second = (Ranks(rank=rank, size=2, store=store) for rank in range(2))
    second.come()
    assert second.absent(0.0) == [0]
    assert second.one(lambda: "requeued", patience_s=0.1) == "requeued"
    first.come()
    assert first.absent(0.0) == []
    assert first.one(lambda: "too late", patience_s=0.1) == "requeued"


@pytest.mark.parametrize(
    ("environment", "elsewhere"),
    [
        ({}, False),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}, False),
        ({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}, True),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, False),  # sbatch, without srun
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}, True),
    ],
)
def test_processes_of_torchrun_and_srun_are_known(
    environment: dict[str, str], elsewhere: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    assert started_elsewhere() is elsewhere


def test_the_devices_of_a_run_are_counted_and_several_machines_need_a_launcher(
    checked: Callable[..., Any],
) -> None:
    assert placed(checked()).trainer.devices == 1
    assert placed(checked("strategy=ddp", "trainer.accelerator=cpu")).trainer.devices == 1
    assert placed(checked("strategy=ddp", "trainer.devices=3")).trainer.devices == 3
    with pytest.raises(Refused, match=r"trainer\.num_nodes=2 needs torchrun or srun"):
        placed(checked("strategy=ddp", "trainer.num_nodes=2"))
