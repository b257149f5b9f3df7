"""Runs in processes of their own, forked so that nothing is imported anew."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from accelerate.state import AcceleratorState

from visionattn.cli.command import exit_status
from visionattn.engine.loop import Result


class Started:
    """A process that ends with the status of `tools/train.py`.

    Args:
        run: what it does.
        environment: variables to set in it.
    """

    def __init__(self, run: Callable[[], Result | None], **environment: str) -> None:
        # A pipe, because the limits of some tests hold for files; it has room for all that a test says.
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._reading, False)
        self.said = ""
        self.process: Any = multiprocessing.get_context("fork").Process(
            target=self._work, args=(run, environment)
        )
        self.process.start()
        os.close(self._writing)

    def _work(self, run: Callable[[], Result | None], environment: dict[str, str]) -> None:
        os.dup2(self._writing, 2)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        os.environ.update(environment)
        # PyTorch makes its pool anew after a fork, which several threads must not do at once.
        torch.set_num_threads(1)
        AcceleratorState._reset_state(reset_partial_state=True)

        def command() -> int:
            result = run()
            return 0 if result is None or result.stopped_by is None else 128 + result.stopped_by

        with exit_status():
            sys.exit(command())

    def listen(self) -> str:
        """All that it said so far on stderr."""
        try:
            while part := os.read(self._reading, 1 << 16):
                self.said += part.decode()
        except BlockingIOError:
            pass
        return self.said

    def status(self, seconds: float | None = None) -> int | None:
        """Its exit status, None if it still runs after so many seconds."""
        self.process.join(seconds)
        self.listen()
        return self.process.exitcode

    def signal(self, number: int) -> None:
        """Send a signal, if it still runs."""
        if self.process.exitcode is None:
            os.kill(self.process.pid, number)
