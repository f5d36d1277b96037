"""What listens while ranks of this machine train, and what garbage that is sent there does."""

import json
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import theirs
import torch
from conftest import wait_until
from omegaconf import DictConfig
from test_processes import checkpoint, environment

from app.fit import run
from app.process.ranks import Ranks

LOOPBACK = {"127.0.0.1", "::1"}
LISTENS = "0A"
THEIRS = ("optimizer=none", "model=custom", "model._target_=test_sockets.Waiting", "data=custom",
          "data._target_=theirs.LitData", "trainer.accelerator=cpu", "trainer.max_epochs=1",
          "trainer.threads=1", "logger=csv", "callbacks.progress=null")  # fmt: skip
TWO = {
    "ddp": (),
    "ddp_find_unused": (),
    "fsdp": ("strategy.shard_min_parameters=null",),
    "tp_fsdp": ("strategy.shard_min_parameters=null", "strategy.colwise=[net.0]",
                "strategy.rowwise=[net.3]"),
    "ddp_spawn": (),
}  # fmt: skip
"""What a strategy takes to run that model in two ranks."""


class Waiting(theirs.LitModel):
    """Waits in the second batch of a fit until there is a file `go`."""

    def __init__(self, go: str, lr: float = 0.1) -> None:
        super().__init__(lr=lr)
        self.go = Path(go)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self.go.with_name(f"{os.getpid()}.waits").touch()
            wait_until(self.go.exists)


class Payload:
    """A pickle that makes a file where it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def descendants(pid: int) -> set[int]:
    """A process and those that it, or they, have started."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def listening(pids: set[int]) -> set[tuple[str, int]]:
    """Address and port of every socket at which one of the processes listens."""
    inodes = set()
    for pid in pids:
        with suppress(FileNotFoundError, ProcessLookupError):
            for path in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(FileNotFoundError):
                    inodes.add(os.readlink(path))
    found = set()
    for name, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            _, local, _, state, _, _, _, _, _, inode, *_ = line.split()
            if state == LISTENS and f"socket:[{inode}]" in inodes:
                address, port = local.split(":")
                words = [bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8)]
                found.add((socket.inet_ntop(family, b"".join(words)), int(port, 16)))
    return found


class Attack:
    """Sends garbage, and a payload, to all that a process and its descendants listen at.

    Attributes:
        found: addresses and ports.
        payload: the folder that was made if somebody read the payload.
    """

    def __init__(self, folder: Path) -> None:
        self.found: set[tuple[str, int]] = set()
        self.payload = folder / "payload"
        self.go = folder / "go"
        self._open: list[socket.socket] = []
        self._ours = listening({os.getpid()})  # which a child has too, until it is a command

    def __call__(self, pid: int, *, num_ranks: int) -> None:
        """Attack from the start on, and again when so many ranks wait; then let them go on."""
        try:
            wait_until(lambda: self._sees(pid) and self._may_go(num_ranks))
            for address in self.found:
                self._send(address)
        finally:
            self.go.touch()

    def close(self) -> None:
        """Close the connections that were left open."""
        for connection in self._open:
            connection.close()

    def _may_go(self, num_ranks: int) -> bool:
        return self.go.exists() or len(list(self.go.parent.glob("*.waits"))) >= num_ranks

    def _sees(self, pid: int) -> bool:
        for address in listening(descendants(pid)) - self.found - self._ours:
            self.found.add(address)
            self._send(address)
        return True

    def _send(self, address: tuple[str, int]) -> None:
        payload = pickle.dumps(Payload(self.payload))
        for garbage in (b"", b"\0" * 8, os.urandom(3), os.urandom(4096), payload):
            for stays in (True, False):
                with suppress(OSError):  # it hangs up
                    connection = socket.create_connection(address)
                    self._open.append(connection)
                    connection.sendall(garbage)
                    if not stays:
                        connection.close()


@pytest.fixture
def attack(tmp_path: Path) -> Iterator[Attack]:
    attack = Attack(tmp_path)
    yield attack
    attack.close()


@pytest.fixture
def compared(
    attack: Attack, composed: Callable[..., DictConfig], tmp_path: Path
) -> Callable[..., tuple[Any, Any]]:
    """Run a configuration under an attack and in peace: metrics and weights of both."""

    def compared_(*typed: str, num_ranks: int) -> tuple[Any, Any]:
        found = []
        for name in ("attacked", "peace"):
            cfg = composed(*THEIRS, *typed, f"+model.go={attack.go}", f"run_dir={tmp_path}/{name}")
            with ThreadPoolExecutor(1) as pool:
                if name == "attacked":
                    attacked = pool.submit(attack, os.getpid(), num_ranks=num_ranks)
                try:
                    result = run(cfg, typed=[])
                finally:
                    attack.go.touch()
                attacked.result()
            if result is None:
                found.append((tmp_path / name / "tuned.yaml").read_text().partition("date")[0])
            else:
                found.append((result["metrics"], checkpoint(tmp_path / name)["state_dict"]))
        return found[0], found[1]

    return compared_


@pytest.mark.slow
@pytest.mark.parametrize("strategy", TWO)
def test_two_ranks_listen_on_loopback_only_and_garbage_changes_nothing(
    strategy: str, attack: Attack, compared: Callable[..., tuple[Any, Any]]
) -> None:
    typed = (f"strategy={strategy}", "trainer.devices=2", *TWO[strategy])
    attacked, in_peace = compared(*typed, num_ranks=2)
    assert len(attack.found) >= 3  # the store, and gloo in each rank
    assert {address for address, _ in attack.found} <= LOOPBACK
    assert not attack.payload.exists()
    assert attacked[0] == in_peace[0]
    for name, tensor in in_peace[1].items():
        assert torch.equal(tensor, attacked[1][name]), name


def test_a_run_of_one_process_listens_nowhere(
    attack: Attack, compared: Callable[..., tuple[Any, Any]]
) -> None:
    compared("strategy=single", num_ranks=1)
    assert attack.found == set()


def test_a_finder_of_two_ranks_listens_on_loopback_only_and_finds_the_same(
    attack: Attack, compared: Callable[..., tuple[Any, Any]]
) -> None:
    typed = ("strategy=ddp", "trainer.devices=2", "tuner=lr_find", "tuner.cache=null", "fit=false",
             "tuner.lr.num_steps=20", "tuner.lr.on_doubt=use", "+model.lr=0.1")  # fmt: skip
    attacked, in_peace = compared(*typed, num_ranks=2)
    assert len(attack.found) >= 3
    assert {address for address, _ in attack.found} <= LOOPBACK
    assert not attack.payload.exists()
    assert attacked == in_peace
    assert "model.lr" in in_peace


@pytest.mark.slow
@pytest.mark.parametrize(
    ("typed", "num_ranks"),
    [
        (("trainer.devices=1", "name=alone"), 1),
        (("-m", "trainer.devices=2", "launch=local", "launch.slots=4", "seed=1,2"), 4),
    ],
    ids=["one process with a process group", "a sweep of two jobs of two ranks"],
)
def test_a_command_listens_on_loopback_only(
    typed: tuple[str, ...], num_ranks: int, attack: Attack, tmp_path: Path
) -> None:
    found = []
    for name in ("attacked", "peace"):
        cwd = tmp_path / name
        cwd.mkdir()
        words = (*typed, "strategy=ddp", *THEIRS, f"+model.go={attack.go}", "hydra.sweep.dir=jobs")
        process = subprocess.Popen(
            [sys.executable, "-m", "app.train", *words], cwd=cwd, env=environment(), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        if name == "attacked":
            attack(process.pid, num_ranks=num_ranks)
        printed, _ = process.communicate(timeout=120)
        assert process.returncode == 0, printed
        results = sorted(cwd.rglob("result.json"))
        found.append([json.loads(path.read_text())["metrics"] for path in results])
    assert len(attack.found) >= 2
    assert {address for address, _ in attack.found} <= LOOPBACK
    assert not attack.payload.exists()
    assert found[0] == found[1]
    assert len(found[1]) == max(1, num_ranks // 2)


def test_what_ranks_tell_each_other_is_read_as_plain_values(tmp_path: Path) -> None:
    store = torch.distributed.HashStore()
    store.set("told/0", pickle.dumps(Payload(tmp_path / "payload"), protocol=2))
    with pytest.raises(pickle.UnpicklingError):
        Ranks(rank=1, size=2, store=store).first(dict)
    assert not (tmp_path / "payload").exists()


MEETS = """
import time
from app.process.ranks import ranks
print(ranks().gathered(ranks().rank), flush=True)
time.sleep(600)
"""
OTHER = "192.0.2.99"  # nobody's: what is sent there would go to the network
SCONTROL = f"#!/bin/sh\necho here {OTHER}\n"


def address_towards_others() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((OTHER, 9))
        except OSError:
            pytest.skip("this machine is in no network")
        address: str = probe.getsockname()[0]
        return address


@pytest.mark.parametrize("num_nodes", [1, 2])
def test_tasks_of_srun_meet_at_one_address_which_is_loopback_on_one_machine(
    num_nodes: int, tmp_path: Path
) -> None:
    expected = "127.0.0.1" if num_nodes == 1 else address_towards_others()
    (tmp_path / "scontrol").write_text(SCONTROL)
    (tmp_path / "scontrol").chmod(0o755)
    processes = []
    for rank in range(2):
        slurm = {"STEP_NUM_TASKS": 2, "STEP_NUM_NODES": num_nodes, "PROCID": rank, "NODEID": 0,
                 "LOCALID": rank, "STEP_NODELIST": "here,other"}  # fmt: skip
        env = {
            **environment(),
            **{f"SLURM_{name}": str(value) for name, value in slurm.items()},
            "SLURMD_NODENAME": "here",
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
        }
        words = [sys.executable, "-c", MEETS]
        processes.append(
            subprocess.Popen(words, cwd=tmp_path, env=env, text=True, stdout=subprocess.PIPE)
        )
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "[0, 1]\n"
        ((address, _),) = listening({process.pid for process in processes})
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert address == expected
