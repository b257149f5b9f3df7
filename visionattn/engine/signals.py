"""Signals that ask a run to stop, noted so that it can save before it ends."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Notes SIGTERM and Ctrl-C while a block runs, so that the run can end at a place of its choice.

    A second signal acts at once.

    Attributes:
        received: the signal that came, or None.
    """

    received: signal.Signals | None = None

    def __enter__(self) -> StopSignals:
        # Only the main thread may set handlers; a run in another thread is stopped by its owner.
        main = threading.current_thread() is threading.main_thread()
        self._previous = {int(s): signal.signal(s, self._note) for s in _SIGNALS} if main else {}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        signal.signal(number, self._previous[number])
