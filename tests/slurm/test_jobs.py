"""`launch=slurm` on a real cluster: what SLURM, the report and the checkpoints say afterwards.

Left out: GPUs, and file systems over a network: both nodes are this machine.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from cluster import Cluster, why_not
from conftest import wait_until
from test_sockets import listening

pytestmark = pytest.mark.slurm

THEIRS = ("optimizer=none", "model=custom", "model._target_=noting.LitModel", "data=custom",
          "data._target_=noting.LitData", "trainer.accelerator=cpu", "logger=csv", "test=none",
          "callbacks.progress=null", "callbacks.checkpoint.every_min=null")  # fmt: skip
TWO_BY_TWO = ("strategy=ddp", "trainer.num_nodes=2", "trainer.devices=2")
TINY = ("model.channels=4", "trainer.max_epochs=1", "trainer.limit_train_batches=2",
        "trainer.limit_val_batches=1", "test=none", "callbacks.progress=null", "logger=csv",
        "data.batch_size=16", "trainer.accelerator=cpu")  # fmt: skip
SLOW = "+model.step_s=0.15"
NUM_SAMPLES = 480  # two epochs of 15 optimizer steps of 32 samples


class Commands:
    """Commands of a user of the cluster, in a folder of their own."""

    def __init__(self, cluster: Cluster, cwd: Path) -> None:
        self.cluster = cluster
        self.cwd = cwd
        self.env = {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}

    def __call__(self, module: str, *typed: str, exit_code: int = 0) -> str:
        done = self.cluster.run(
            sys.executable, "-m", module, *typed,
            cwd=self.cwd, env=self.env, check=False, stderr=-2, timeout=300,
        )  # fmt: skip
        assert done.returncode == exit_code, done.stdout
        printed: str = done.stdout
        return printed

    def submit(self, name: str, *typed: str) -> str:
        """Submit a run; the number of its job."""
        self("app.train", "launch=slurm", "launch.wait=false", f"name={name}", *typed)
        return str(self.result(name)["slurm_job"])

    def result(self, name: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.cwd / f"runs/{name}/result.json").read_text())
        return content

    def state(self, name: str) -> str:
        """What the report says of a run."""
        lines = self("app.report", f"runs/{name}").splitlines()
        return lines[0].partition("(1 ")[2].partition(")")[0]

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        path = self.cwd / f"runs/{name}/checkpoints/last.ckpt"
        found: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["state_dict"]
        return found

    def seen(self, name: str) -> list[tuple[int, int, list[int]]]:
        """Step, epoch and samples of every micro-batch that any rank has trained on."""
        lines = [
            line.split()
            for path in (self.cwd / f"runs/{name}/seen").iterdir()
            for line in path.read_text().splitlines()
        ]
        return [(int(line[0]), int(line[1]), [int(i) for i in line[2:]]) for line in lines]

    def until_step(self, name: str, step: int) -> None:
        """Wait until rank 0 has begun this optimizer step."""
        folder = self.cwd / f"runs/{name}/seen"

        def has_begun() -> bool:
            noted = [path.read_text().splitlines() for path in folder.glob("0-*")]
            return any(line and int(line.split()[0]) >= step for file in noted for line in file)

        wait_until(has_begun)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := why_not():
        pytest.skip(reason)
    cluster = Cluster.start(tmp_path_factory.mktemp("slurm"))
    yield cluster
    cluster.stop()


@pytest.fixture
def commands(cluster: Cluster, tmp_path: Path) -> Commands:
    return Commands(cluster, tmp_path)


def assert_equal_to_undisturbed(commands: Commands, name: str) -> None:
    """Bit-equal weights; every sample of every epoch once."""
    whole, found = commands.weights("whole"), commands.weights(name)
    for key, tensor in whole.items():
        assert torch.equal(tensor, found[key]), key
    assert Counter(
        (epoch, sample) for _, epoch, samples in commands.seen(name) for sample in samples
    ) == Counter((epoch, sample) for epoch in range(2) for sample in range(NUM_SAMPLES))


@pytest.mark.slow
def test_slurm_signals_half_step_goes_on_port_a_run_of_four_tasks_loses_nothing(
    commands: Commands,
) -> None:
    typed = (*THEIRS, *TWO_BY_TWO, "trainer.max_epochs=2", "accumulate=constant",
             "accumulate.factor=2", "+data.workers=1", f"+data.num_samples={NUM_SAMPLES}",
             "launch.partition=low", "launch.timeout_min=1", "launch.signal_s=10")  # fmt: skip
    cluster = commands.cluster
    whole = commands.submit("whole", *typed)
    cluster.wait(whole, "COMPLETED")

    job = commands.submit("asked", *typed, SLOW)
    requeue = ("scontrol", "requeue", job)  # an administrator
    preempt = ("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null",
               "--wrap=true")  # fmt: skip
    for restarts, words in enumerate((requeue, preempt, preempt, None)):
        commands.until_step("asked", 5 * restarts + 2)
        if words is None:  # so slow that the time is out
            (commands.cwd / "runs/asked/pace").write_text("2")
        else:
            cluster.run(*words)
        wait_until(lambda r=restarts: cluster.job(job)["Restarts"] == str(r + 1))  # type: ignore[misc]
    (commands.cwd / "runs/asked/pace").unlink()
    cluster.wait(job, "COMPLETED")
    assert cluster.job(job)["Restarts"] == "4"
    assert_equal_to_undisturbed(commands, "asked")
    assert commands.state("asked") == "finished"
    log = (commands.cwd / "runs/asked/job.log").read_text()
    assert log.count(f"SIGUSR2: saved, and job {job} is requeued") == 3
    assert not list(commands.cwd.glob("runs/asked/slurm/.meeting-*"))


@pytest.mark.slow
def test_a_run_on_a_node_that_dies_goes_on_from_the_newest_checkpoint(commands: Commands) -> None:
    typed = (*THEIRS, *TWO_BY_TWO, "trainer.max_epochs=2", "callbacks.checkpoint.every_n_steps=4")
    cluster = commands.cluster
    cluster.wait(commands.submit("whole", *typed), "COMPLETED")
    job = commands.submit("dies", *typed, SLOW)
    commands.until_step("dies", 7)
    cluster.kill_node(2)
    wait_until(lambda: cluster.job(job)["Restarts"] == "1")
    cluster.start_node(2)
    cluster.wait(job, "COMPLETED")
    whole, found = commands.weights("whole"), commands.weights("dies")
    assert all(torch.equal(tensor, found[key]) for key, tensor in whole.items())
    steps = Counter(step for step, _, _ in commands.seen("dies"))
    redone = [step for step, times in steps.items() if times > 4]
    assert len(redone) <= 5  # the interval, and the step that the death cut


def test_slurm_completed_a_failed_rank_is_failed_everywhere_with_its_traceback(
    commands: Commands,
) -> None:
    cluster = commands.cluster
    typed = (*THEIRS, *TWO_BY_TWO, "trainer.max_epochs=1", "+model.fails_on=3")
    job = commands.submit("fails", *typed)
    after = cluster.run(
        "sbatch", "--parsable", "--output=/dev/null", f"--dependency=afterok:{job}", "--wrap=true"
    ).stdout.strip()
    cluster.wait(job, "FAILED")
    assert cluster.job(after)["JobState"] == "PENDING"
    assert cluster.job(after)["Reason"] in ("DependencyNeverSatisfied", "Dependency")
    result = commands.result("fails")
    assert (result["status"], result["rank"]) == ("failed", 3)
    assert result["error"] == "LookupError: the data are gone"
    assert commands.state("fails") == "failed"
    printed = "".join(p.read_text() for p in commands.cwd.glob("runs/fails/slurm/*_3_log.out"))
    assert "in training_step" in printed
    cluster.run("scancel", after)
    printed = commands("app.train", "launch=slurm", "name=waits", *typed, exit_code=1)
    assert "the data are gone" in printed
    assert printed.endswith("job.log\n")


def test_the_ranks_of_two_nodes_listen_only_where_the_nodes_names_lead(commands: Commands) -> None:
    job = commands.submit("listens", *THEIRS, *TWO_BY_TWO, SLOW)
    commands.until_step("listens", 2)
    found = listening(processes_of_job(job))
    commands.cluster.run("scancel", job)
    assert len(found) >= 5  # the store, and gloo in each rank
    assert {address for address, _ in found} == {"127.0.0.1"}


def processes_of_job(job: str) -> set[int]:
    """Those of Python."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # it has ended, or is not ours
            is_python = Path(os.readlink(path.with_name("exe"))).name.startswith("python")
            if is_python and f"SLURM_JOB_ID={job}".encode() in path.read_bytes().split(b"\0"):
                found.add(int(path.parent.name))
    return found


def test_a_rank_that_is_killed_fails_the_job_and_is_named(commands: Commands) -> None:
    typed = (*THEIRS, *TWO_BY_TWO, "+model.fails_on=3", "+model.killed=true")
    job = commands.submit("killed", *typed)
    assert commands.cluster.wait(job, "FAILED")["Restarts"] == "0"
    result = commands.result("killed")
    assert (result["status"], result["rank"]) == ("failed", 3)
    assert result["error"] == "rank 3 was ended from outside"


def test_slurm_blocks_twenty_jobs_are_submitted_at_once_and_reported_as_they_are(
    commands: Commands,
) -> None:
    cluster = commands.cluster
    typed = ("-m", "launch=slurm", "hydra.sweep.dir=sweep", "launch.max_parallel=12", *THEIRS,
             "trainer.max_epochs=1", "+model.fails_on=range(20)")  # fmt: skip  # in the first job
    printed = commands("app.train", *typed, "launch.wait=false")
    assert "submitted 20 jobs" in printed
    ids = [json.loads((commands.cwd / f"sweep/{n}/result.json").read_text())["slurm_job"]
           for n in range(20)]  # fmt: skip
    cluster.wait(ids[1], "RUNNING")
    cluster.run("scancel", ids[1], ids[19])  # one that runs, one that waits
    cluster.wait(ids[0], "FAILED")
    for job in ids[2:19]:
        cluster.wait(job, "COMPLETED")
    report = commands("app.report", "sweep")
    assert "20 runs (17 finished, 2 cancelled, 1 failed)" in report.splitlines()[0]
    assert "LookupError: the data are gone" in report
    again = commands("app.train", *typed, exit_code=1)
    assert "1 failed, 2 cancelled, 17 finished; 3 to run" in again
    assert "sweep: 1 failed, 19 finished" in again


def test_jobs_that_need_other_resources_are_arrays_of_their_own(commands: Commands) -> None:
    commands(
        "app.train", "-m", "launch=slurm", "hydra.sweep.dir=sweep", *TINY, "strategy=ddp",
        "trainer.devices=1,2", "seed=1,2",
    )  # fmt: skip
    found = [json.loads((commands.cwd / f"sweep/{n}/result.json").read_text()) for n in range(4)]
    assert [result["batch"]["world_size"] for result in found] == [1, 1, 2, 2]
    arrays = [result["slurm_job"].partition("_")[0] for result in found]
    assert arrays[0] == arrays[1] != arrays[2] == arrays[3]


def test_a_job_that_is_requeued_too_often_fails_and_says_what_to_type(commands: Commands) -> None:
    job = commands.submit("loops", *THEIRS, SLOW, "trainer.max_epochs=9", "launch.max_requeues=0")
    commands.until_step("loops", 1)
    commands.cluster.run("scancel", "--signal=USR2", job)
    assert commands.cluster.wait(job, "FAILED")["Restarts"] == "0"
    assert commands.state("loops") == "failed"
    assert (
        "launch.max_requeues=0: the job has been requeued as often"
        in (commands.result("loops")["error"])
    )
    assert (commands.cwd / "runs/loops/checkpoints/last.ckpt").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "tasks", "num_nodes", "number"),
    [
        (f"srun {sys.executable}", 2, 2, "USR1"),
        # torchrun itself dies of USR1
        (f"srun {sys.executable} -m torch.distributed.run --nproc-per-node=2", 1, 1, "TERM"),
    ],
    ids=["srun", "torchrun"],
)
def test_hydra_rundir_srun_in_a_batch_script_by_hand_is_one_run_that_is_requeued(
    commands: Commands, launcher: str, tasks: int, num_nodes: int, number: str
) -> None:
    typed = (*THEIRS, "strategy=ddp", f"trainer.num_nodes={num_nodes}", "trainer.max_epochs=2",
             SLOW)  # fmt: skip
    job = commands.cluster.run(
        "sbatch", "--parsable", "--requeue", f"--nodes={num_nodes}", f"--ntasks-per-node={tasks}",
        f"--wrap={launcher} -m app.train {shlex.join(typed)}", cwd=commands.cwd, env=commands.env,
    ).stdout.strip()  # fmt: skip
    runs = commands.cwd / "runs"
    wait_until(lambda: any(runs.glob("slurm-*/seen/0-0")))
    (folder,) = runs.glob("slurm-*")
    commands.until_step(folder.name, 2)
    commands.cluster.run("scancel", f"--signal={number}", job)
    assert commands.cluster.wait(job, "COMPLETED")["Restarts"] == "1"
    assert [path.name for path in runs.glob("[!.]*")] == [folder.name]
    result = commands.result(folder.name)
    assert (result["status"], result["batch"]["world_size"]) == ("finished", 2 * num_nodes)
    seen = Counter(
        (epoch, sample) for _, epoch, samples in commands.seen(folder.name) for sample in samples
    )
    assert set(seen.values()) == {1}
    assert len(seen) == 2 * 160


def test_a_client_that_dies_or_is_interrupted_leaves_its_job_or_asks(commands: Commands) -> None:
    cluster = commands.cluster
    typed = ("-m", "app.train", "launch=slurm", "name=mine", *THEIRS, "+model.step_s=1",
             "trainer.max_epochs=9", "launch.mem_gb=1", "launch.cpus_per_task=2",
             "launch.setup=['export OMP_NUM_THREADS=2']",
             "+launch.options.comment=mine")  # fmt: skip
    env = {**os.environ, **cluster.environment, **commands.env}

    def client(*more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *typed, *more], cwd=commands.cwd, env=env, text=True,
            stdin=terminal, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    keyboard, terminal = os.openpty()
    first = client()
    wait_until((commands.cwd / "runs/mine/result.json").exists)
    job = commands.result("mine")["slurm_job"]
    info = cluster.wait(job, "RUNNING")
    assert (info["Comment"], info["CPUs/Task"], info["MinMemoryNode"]) == ("mine", "2", "1G")
    (script,) = commands.cwd.glob("runs/mine/slurm/*_submission.sh")
    assert "\nexport OMP_NUM_THREADS=2\n" in script.read_text()
    commands.until_step("mine", 1)
    first.kill()
    first.communicate()
    assert cluster.job(job)["JobState"] == "RUNNING"
    for more, answer, state in (
        (["launch.on_interrupt=leave"], "", "RUNNING"),
        ([], "n\n", "RUNNING"),
        ([], "y\n", "CANCELLED"),
    ):
        again = client(*more)
        assert again.stdout is not None
        assert again.stdout.readline().endswith("runs/mine: running\n")
        time.sleep(1)
        again.send_signal(signal.SIGINT)
        os.write(keyboard, answer.encode())
        printed, _ = again.communicate(timeout=120)
        assert again.returncode == 128 + signal.SIGINT
        cluster.wait(job, state)
        assert ("cancelled" if state == "CANCELLED" else f"scancel {job}") in printed
    assert commands.state("mine") == "cancelled"
    os.close(keyboard)
    os.close(terminal)


def test_what_srun_starts_and_is_refused_says_so_without_a_traceback(commands: Commands) -> None:
    done = commands.cluster.run(
        "srun", "--nodes=2", "--ntasks-per-node=2", sys.executable, "-m", "app.train", *TINY,
        "name=refused", cwd=commands.cwd, env=commands.env, check=False, stderr=-2, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2
    assert "need a strategy of several processes; type strategy=ddp" in done.stdout
    assert "Traceback" not in done.stdout
    assert not (commands.cwd / "runs/refused").exists()


def test_without_slurm_the_command_says_so(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)  # not started
    where = Commands(cluster, tmp_path)
    where.env["PATH"] = os.path.dirname(sys.executable)
    printed = where("app.train", "launch=slurm", exit_code=2)
    assert printed == (
        "train: launch=slurm needs SLURM, and there is no sbatch here; type launch=local with -m, "
        "or launch=none\n"
    )
