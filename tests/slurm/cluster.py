"""A real SLURM cluster of two nodes on this machine, for tests: started in seconds, as root.

By hand, where DIR is one folder for its configuration, keys, sockets, state and logs:

    python tests/slurm/cluster.py up --folder DIR
    eval "$(python tests/slurm/cluster.py env --folder DIR)"    # then sbatch, srun, squeue, ...
    python tests/slurm/cluster.py status | kill-node 1 | start-node 1 | down --folder DIR

A node is a slurmd in a UTS and a mount namespace: it has a host name (node1, node2) and an
/etc/hosts of its own, so that its tasks find each other by name as they do on a real cluster.
Network, files and process ids are the machine's. Jobs go to one of three partitions: main, low
(requeued for a job in high) and high. All listens on 127.0.0.1 only: outside of a job, srun works
where this machine's own name means that address; sbatch always does.
"""

import argparse
import contextlib
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

NODES = (1, 2)
HOSTS = ("controller", "node1", "node2")
CPUS = 8
"""The processors that a node claims to have, whatever the machine has."""
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "unshare")
START_TIMEOUT_S = 30.0

CONF = """\
ClusterName=test
SlurmctldHost=controller(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthType=auth/munge
CredType=cred/munge
# a requeued job waits until its credential has expired
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
KillWait={kill_wait_s}
SlurmdTimeout={slurmd_timeout_s}
ReturnToService=2
# jobs that ended stay visible; ids differ from those of other clusters, since files and the ports
# of a job's processes are named by them
MinJobAge=86400
FirstJobId={first_job_id}
NodeName=DEFAULT CPUs={cpus} RealMemory=16000
NodeName=node1 NodeAddr=127.0.0.1 Port={ports[1]}
NodeName=node2 NodeAddr=127.0.0.1 Port={ports[2]}
PartitionName=main Nodes=ALL Default=YES PriorityTier=5 PreemptMode=OFF
PartitionName=low Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace_s}
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""


def why_not() -> str | None:
    """Why there can be no cluster on this machine; None where there can be one."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"SLURM is not installed: no {', '.join(missing)}"
    if os.geteuid() != 0:
        return "SLURM's daemons need root"
    if subprocess.run(["unshare", "--mount", "--uts", "true"], capture_output=True).returncode:
        return "namespaces are not allowed here: the container lacks CAP_SYS_ADMIN"
    return None


class Cluster:
    """The cluster whose files are in a folder.

    Attributes:
        folder: everything that it writes, but for what its jobs write.
        environment: the variables that SLURM's commands, and programs that call them, need.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.environment = {"SLURM_CONF": f"{self.folder}/slurm.conf"}

    @classmethod
    def start(
        cls, folder: Path, *, kill_wait_s: int = 10, grace_s: int = 10, slurmd_timeout_s: int = 5
    ) -> "Cluster":
        """A new cluster, when its nodes are idle.

        Args:
            folder: is made; may be that of an earlier cluster, which is forgotten.
            kill_wait_s: from SIGTERM to SIGKILL.
            grace_s: from the first signal to a pre-empted job to its SIGTERM; SLURM waits for the
                next multiple of kill_wait_s + 10.
            slurmd_timeout_s: after which a silent node is down; SLURM looks every 12 s or so.
        """
        self = cls(folder)
        if self._hosts("controller").exists():
            self.stop()
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        for host in HOSTS:
            self._hosts(host).write_text(f"127.0.0.1 localhost {' '.join(HOSTS)}\n")
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        conf = CONF.format(
            folder=self.folder,
            ports=_free_ports(len(HOSTS)),
            cpus=CPUS,
            kill_wait_s=kill_wait_s,
            grace_s=grace_s,
            slurmd_timeout_s=slurmd_timeout_s,
            first_job_id=1 + secrets.randbelow(60_000_000),
        )
        (self.folder / "slurm.conf").write_text(conf)
        try:
            self._daemon(
                "controller",
                *("munged", "--force", f"--key-file={key}", f"--socket={self.folder}/munge.sock"),
                *(f"--pid-file={self.folder}/munge.pid", f"--log-file={self.folder}/munge.log"),
                f"--seed-file={self.folder}/munge.seed",
            )
            self._daemon("controller", "slurmctld")
            for i in NODES:
                self.start_node(i)
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """End all daemons and jobs, at once."""
        for host in HOSTS:
            self._kill(host)

    def run(self, *words: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command in the cluster's environment; unless told otherwise, it must succeed.

        Args:
            options: those of subprocess.run; its `env` is added to this environment.
        """
        env = {**os.environ, **self.environment, **options.pop("env", {})}
        defaults = {"check": True, "text": True, "stdout": subprocess.PIPE}
        return subprocess.run(words, env=env, **{**defaults, **options})

    def job(self, job_id: int | str) -> dict[str, str]:
        """What `scontrol show job` tells of a job, or of one of an array's as in "17_0"."""
        lines = self.run("scontrol", "show", "job", "--oneliner", str(job_id)).stdout.splitlines()
        if len(lines) != 1:
            raise ValueError(f"job {job_id} is an array; its first job is {job_id}_0")
        return _fields(lines[0])

    def wait(self, job_id: int | str, *states: str, timeout_s: float = 240) -> dict[str, str]:
        """The job as soon as it is in one of the states.

        Raises:
            TimeoutError: it was not, for so long.
        """
        end = time.monotonic() + timeout_s
        while (job := self.job(job_id))["JobState"] not in states:
            if time.monotonic() > end:
                state = f"{job['JobState']} ({job['Reason']})"
                raise TimeoutError(f"job {job_id} is {state}, not {states}, after {timeout_s} s")
            time.sleep(0.1)
        return job

    def kill_node(self, i: int) -> None:
        """As if its power went: its slurmd and all that its jobs run there die at once.

        Their connections are closed, though, so peers may learn of it sooner.
        """
        self._kill(f"node{i}")

    def start_node(self, i: int) -> None:
        """Start the node's slurmd, and wait until the controller gives it jobs."""
        host = f"node{i}"
        self._daemon(host, "slurmd")
        end = time.monotonic() + START_TIMEOUT_S
        while (state := self._state(host)) not in ("IDLE", "MIXED", "ALLOCATED"):
            if time.monotonic() > end:
                raise TimeoutError(
                    f"{host} is {state} after {START_TIMEOUT_S} s: see {self.folder}"
                )
            time.sleep(0.1)

    def _state(self, host: str) -> str:
        words = ("scontrol", "show", "node", "--oneliner", host)
        shown = self.run(*words, check=False, stderr=subprocess.DEVNULL)
        return _fields(shown.stdout)["State"] if shown.returncode == 0 else "unknown"

    def _hosts(self, host: str) -> Path:
        """What is /etc/hosts there, and so tells its processes from all others."""
        return self.folder / f"{host}.hosts"

    def _daemon(self, host: str, *words: str) -> None:
        """Run, on a host, a program that ends when it has become a daemon."""
        log = self.folder / "start.log"
        script = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'
        inside = ("unshare", "--mount", "--uts", "sh", "-c", script, "sh", host, self._hosts(host))
        with log.open("a") as file:
            ended = self.run(
                *inside, *words, check=False, stdin=subprocess.DEVNULL, stdout=file, stderr=file
            )
        if ended.returncode != 0:
            raise RuntimeError(f"{words[0]} did not start on {host}: {log.read_text()}")

    def _pids(self, host: str) -> list[int]:
        hosts = self._hosts(host)
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            # it has ended, or is none that we started
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                if (process / "root/etc/hosts").samefile(hosts):
                    found.append(int(process.name))
        return found

    def _kill(self, host: str) -> None:
        """End all processes of a host, and wait until they are gone."""
        while pids := self._pids(host):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)


def _fields(line: str) -> dict[str, str]:
    """Of one line of `scontrol show --oneliner`."""
    words = re.split(r"\s+(?=[A-Z][\w:/]*=)", line.strip())
    return dict(word.split("=", 1) for word in words)


def _free_ports(num: int) -> list[int]:
    """Ports that nobody has, from below those that the kernel gives to whoever asks for any."""
    found: set[int] = set()
    while len(found) < num:
        port = 25_000 + secrets.randbelow(7_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                found.add(port)
    return sorted(found)


def main() -> None:
    parser = argparse.ArgumentParser(description="A real SLURM cluster of two nodes, for tests.")
    commands = ("up", "down", "env", "status", "kill-node", "start-node")
    parser.add_argument("command", choices=commands)
    parser.add_argument("node", nargs="?", type=int, choices=NODES, help="to kill or to start")
    folder = Path(tempfile.gettempdir()) / "slurm-cluster"
    parser.add_argument("--folder", type=Path, default=folder, help="default: %(default)s")
    typed = parser.parse_args()
    if (typed.node is None) is typed.command.endswith("-node"):
        parser.error("kill-node and start-node need a node, the others have none")
    cluster = Cluster(typed.folder)
    match typed.command:
        case "up":
            if reason := why_not():
                sys.exit(reason)
            Cluster.start(typed.folder)
        case "down":
            cluster.stop()
        case "env":
            print(f"export SLURM_CONF={shlex.quote(cluster.environment['SLURM_CONF'])}")
        case "status":
            print(cluster.run("sinfo", "--Node", "--long").stdout, end="")
            print(cluster.run("squeue").stdout, end="")
        case "kill-node":
            cluster.kill_node(typed.node)
        case "start-node":
            cluster.start_node(typed.node)


if __name__ == "__main__":
    main()
