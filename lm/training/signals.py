"""Signals that stop a run: Ctrl-C (SIGINT) ends it early; SIGTERM, which clusters send, at once but resumable."""

import signal
import threading
from types import TracebackType
from typing import Any, Self

from lm.training import distributed

INTERRUPT = 1
TERMINATE = 2


class Terminated(SystemExit):
    """SIGTERM has come. Uncaught, it ends the process with 143, a shell's code for an end by that signal."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


class StopSignals:
    """Remembers signals between `with` and its end, so that no step is cut in two.

    A second SIGINT raises KeyboardInterrupt at once, wherever the program is.

    Args:
        every: the processes of a distributed run tell each other of signals at each `every`-th call of `poll`.
    """

    def __init__(self, every: int = 1) -> None:
        self._asked = 0
        self._previous: dict[int, Any] = {}
        self._maximum = distributed.Maximum(every)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # no other may handle signals
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and self._asked:
            raise KeyboardInterrupt
        self._asked = max(self._asked, TERMINATE if number == signal.SIGTERM else INTERRUPT)

    def poll(self) -> int:
        """Return 0, INTERRUPT or TERMINATE. All processes of a distributed run must ask, and get the same answer."""
        return self._maximum(self._asked)

    def end_if_terminated(self) -> None:
        """Raise Terminated once SIGTERM has come; all processes of a distributed run must ask."""
        if self.poll() == TERMINATE:
            raise Terminated
