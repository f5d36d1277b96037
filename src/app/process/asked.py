"""One owner of the signals that ask a run to stop. Needs no torch.

The handler only notes a signal. A fit heeds it between two optimizer steps; outside of a fit
nothing is half done, and the process leaves at once.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

HEEDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Pre-emption and `kill`, a user's `scancel --signal=USR1`, and SLURM's warning before a time-out
as submitit asks for it."""


class Asked:
    """The signals that have asked this process to stop.

    Attributes:
        first: the first of them; None before.
        is_heeded: whether what becomes of the run was settled.
        is_fitting: whether signals are only noted, and all ranks leave after the same step.
    """

    def __init__(self) -> None:
        self.first: signal.Signals | None = None
        self.is_heeded = False
        self._on_first: Callable[[], None] | None = None
        self.is_fitting = False
        self._is_listening = False

    @property
    def exit_code(self) -> int:
        """What a shell says of a process that a signal ended; 0 before."""
        return 0 if self.first is None else 128 + self.first

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note signals to the end of the block, or of one around it; where this is the main
        thread."""
        if self._is_listening:
            yield
            return
        self.first, self._on_first = None, None
        self.is_heeded = self.is_fitting = False
        is_main = threading.current_thread() is threading.main_thread()
        before = [(n, signal.getsignal(n)) for n in (*HEEDED, signal.SIGINT)] if is_main else []
        self.listen()
        self._is_listening = True
        try:
            yield
        finally:
            self._is_listening = False
            for number, handler in before:
                signal.signal(number, handler)

    def listen(self) -> None:
        """Take the signals, also back from Lightning, whose handler talks to other ranks."""
        if threading.current_thread() is threading.main_thread():
            for number in (*HEEDED, signal.SIGINT):
                signal.signal(number, self._note)

    def hold(self, on_first: Callable[[], None]) -> None:
        """From here on a signal is only noted, and `on_first` called at the first."""
        self.is_fitting, self._on_first = True, on_first
        if self.first is not None:
            on_first()

    def release(self) -> None:
        """A signal ends the process at once again. Raises SystemExit where one came before."""
        self.is_fitting, self._on_first = False, None
        if self.first is not None:
            raise SystemExit(self.exit_code)

    def note(self, number: int) -> None:
        """Note that another rank was asked to stop."""
        self.first = self.first or signal.Signals(number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        is_first = self.first is None
        self.note(number)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.is_fitting:
            raise SystemExit(self.exit_code)
        if is_first and self._on_first is not None:
            self._on_first()


asked = Asked()
"""Of this process: signals are the process's."""
