"""What every command line needs: errors as one sentence, and signals that let a run save before it ends."""

from __future__ import annotations

import csv
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch

from visionattn.engine.run_folder import replacing
from visionattn.errors import InputError, LostProcess, RunError, as_input_error, nearest

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def run_command(command: Callable[[], int | None]) -> None:
    """Run a tool and end the program with its exit status.

    Wrong input ends it with status 2 and a run that cannot go on with status 1, each with one sentence on
    stderr. Every other exception is a defect of the program and keeps its traceback.

    Args:
        command: the tool; what it returns is the exit status, None meaning 0.
    """
    try:
        status = command()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except InputError as error:
        _say(f"error: {error}")
        status = 2
    except RunError as error:
        _say(f"stopped: {error}", everywhere=isinstance(error, LostProcess))
        status = 1
    sys.exit(status)


def write_rows(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a table as CSV, complete or not at all.

    Args:
        path: the file.
        rows: mappings of the same keys, which become the columns.

    Raises:
        InputError: there are no rows, or the place cannot be written to.
    """
    if not rows:
        raise InputError(f"there are no figures of single samples to write to {path}")
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with as_input_error(f"cannot write {path}", OSError), replacing(Path(path)) as beside:
        beside.write_text(table.getvalue(), encoding="utf-8", newline="")


def check_requirements(metrics: Mapping[str, float], requirements: Sequence[str]) -> None:
    """Hold metrics against bounds such as `"top1>=97"` or `"loss<=0.5"`.

    Raises:
        InputError: a bound cannot be read, or names no metric.
        RunError: the metrics that do not meet their bounds, and by how much.
    """
    failed = []
    for requirement in requirements:
        parts = re.fullmatch(r"(\w+)\s*(>=|<=)\s*([-+]?\d+\.?\d*(?:[eE][-+]?\d+)?)", requirement.strip())
        if parts is None:
            raise InputError(
                f"a requirement reads METRIC>=VALUE or METRIC<=VALUE, but {requirement!r} was given"
            )
        name, relation, bound = parts[1], parts[2], float(parts[3])
        if name not in metrics:
            raise InputError(f"there is no metric {name!r} to require: {nearest(name, metrics)}")
        sign = 1 if relation == ">=" else -1
        if not sign * metrics[name] >= sign * bound:
            failed.append(f"{name} is {metrics[name]:.6g}, required is {relation} {bound:g}")
    if failed:
        raise RunError("; ".join(failed))


def _say(sentence: str, everywhere: bool = False) -> None:
    # All processes of a machine meet the same wrong input; one of them says it.
    if everywhere or os.environ.get("LOCAL_RANK", "0") == "0":
        print(sentence, file=sys.stderr)


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
