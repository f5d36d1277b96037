"""The launcher of `launch=local`: the jobs of a sweep, a queue over devices. Needs no torch."""

import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from types import FrameType

from omegaconf import DictConfig

from app.errors import Refused
from app.launch.apart import JOB_GRACE_S, JobProcess, Outcome
from app.launch.local import PRELOADED
from app.launch.slots import Slots, find_slots
from app.record.states import State
from app.sweep.journal import Job
from app.sweep.launcher import SweepLauncher
from app.sweep.progress import Progress

REFRESH_S = 0.2
KILL_AFTER_S = JOB_GRACE_S + 5.0
"""How long jobs may take to stop before they are killed."""


class Queue(SweepLauncher):
    """A queue over the devices of this machine, for one sweep.

    Attributes:
        context: how the processes of jobs are started.
    """

    def prepare(self, config: DictConfig) -> None:
        """Start the server that the processes of jobs are forked from, where one is wanted."""
        method = self.settings.start_method.value
        self.context = multiprocessing.get_context(method)
        if method == "forkserver":
            multiprocessing.set_forkserver_preload(PRELOADED)
            forkserver.ensure_running()  # imports torch while the sweeper composes the jobs

    def run(self, jobs: list[Job], progress: Progress) -> signal.Signals | None:
        """Run jobs to their ends; the signal that stopped them before, None where none did."""
        slots = find_slots(
            asked=self.settings.slots,
            accelerator=self.config.trainer.accelerator.value,
            context=self.context,
        )
        unit = "GPU" if slots.are_gpus else "CPU slot"
        progress.say(f"{len(slots.names)} {unit}{'s' if len(slots.names) > 1 else ''}")
        return _Runner(self, slots, progress).run(jobs)


@dataclass(kw_only=True)
class _Running:
    job: Job
    process: JobProcess
    devices: list[str]
    began: float


class _Runner:
    """Starts jobs over slots, watches them, tries again, stops."""

    def __init__(self, queue: Queue, slots: Slots, progress: Progress) -> None:
        self._queue = queue
        self._slots = slots
        self._progress = progress
        self._running: list[_Running] = []
        self._waiting: deque[Job] = deque()
        self._next: tuple[DictConfig, int] | None = None
        self._failures: dict[int, int] = {}
        self._asked: list[signal.Signals] = []
        self._is_closed = False

    def run(self, jobs: Sequence[Job]) -> signal.Signals | None:
        """Run the jobs to their ends; the signal that stopped them before, None where none did."""
        self._waiting.extend(jobs)
        with self._listening():
            told, kill_at = 0, float("inf")
            while self._waiting or self._running:
                if len(self._asked) > told:
                    self._start_no_more()
                    for running in self._running:
                        running.process.stop(self._asked[0])
                    kill_at = 0.0 if told else time.monotonic() + KILL_AFTER_S
                    told = len(self._asked)
                if time.monotonic() > kill_at:
                    for running in self._running:
                        running.process.kill()
                while self._waiting and self._start_first():
                    pass
                self._progress.live(waiting=len(self._waiting))
                sources = [source for r in self._running for source in r.process.sources]
                connection.wait(sources, timeout=REFRESH_S)
                for running in [r for r in self._running if r.process.read()]:
                    self._finish(running)
        self._progress.close()
        return self._asked[0] if self._asked else None

    def _start_first(self) -> bool:
        """Start the job that is first, where its devices are free; whether another may follow."""
        job = self._waiting[0]
        try:
            cfg, needed = self._prepared(job)
        except Refused as refusal:
            self._waiting.popleft()
            self._progress.started(job)
            self._end(job, Outcome(state=State.failed, error=str(refusal), is_refusal=True))
            return True
        devices = self._slots.take(needed)
        if devices is None:
            return False
        self._waiting.popleft()
        self._next = None
        job.state, job.device = State.running, ",".join(devices)
        job.error = job.seconds = None
        job.attempt += 1
        self._queue.folder.note(job, "folder", "attempt", "device")
        process = JobProcess(
            context=self._queue.context,
            task=self._queue.task,
            cfg=cfg,
            folder=self._queue.folder.path / job.place,
            environment=self._slots.environment(devices),
        )
        began = time.monotonic()  # not before: the first one waits for torch to be imported
        self._progress.started(job)
        self._running.append(_Running(job=job, process=process, devices=devices, began=began))
        return not self._asked

    def _prepared(self, job: Job) -> tuple[DictConfig, int]:
        """The configuration of the first job and how many devices it takes: composed while others
        run."""
        if self._next is None:
            cfg = self._queue.composed(job)
            needed = self._slots.needed(cfg, devices_per_job=self._queue.settings.devices_per_job)
            self._next = cfg, needed
        return self._next

    def _finish(self, running: _Running) -> None:
        self._running.remove(running)
        self._slots.give_back(running.devices)
        outcome = running.process.outcome
        assert outcome is not None
        running.job.seconds = round(time.monotonic() - running.began, 3)
        self._end(running.job, outcome)

    def _end(self, job: Job, outcome: Outcome) -> None:
        """Note how a job ended, and let it wait again where it may be tried again."""
        job.state, job.error = outcome.state, outcome.error
        if isinstance(outcome.value, int | float):
            job.value = outcome.value
        if job.state == State.failed:
            if self._asked:
                job.state = State.interrupted
            else:
                self._retry_or_not(job, outcome)
        self._queue.folder.note(job, "seconds", "error", "value")
        self._progress.ended(job, waiting=len(self._waiting))

    def _retry_or_not(self, job: Job, outcome: Outcome) -> None:
        failures = self._failures[job.job] = self._failures.get(job.job, 0) + 1
        may_help = not outcome.is_refusal and not self._is_closed
        if may_help and failures <= self._queue.settings.retries:
            job.state = State.queued
            self._waiting.append(job)
        elif self._queue.settings.on_fail.value == "stop":
            self._start_no_more()

    def _start_no_more(self) -> None:
        self._is_closed = True
        self._waiting.clear()

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Note the signals that ask to stop: the first asks the jobs, a second ends them."""

        def note(number: int, frame: FrameType | None) -> None:
            self._asked.append(signal.Signals(number))

        before = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
