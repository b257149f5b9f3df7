"""Time and memory of functions that do the same work, measured in turn: a busy machine slows all alike."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], object]

# Calls of a turn together take about so many seconds, unless they are more than so many.
_SHORT, _MOST_CALLS = 0.05, 10

# The profiler otherwise reports on stderr when it starts and stops.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


@dataclass(frozen=True)
class Timing:
    """The time of a function that was measured repeatedly.

    Attributes:
        median: seconds.
        spread: difference of the quartiles as a share of the median.
    """

    median: float
    spread: float


def clock_name(device: torch.device) -> str:
    """Say which clock `time_in_turn` reads for a device."""
    if device.type == "cpu" and torch.get_num_threads() == 1:
        return "CPU time of the process"
    return "GPU time between events" if device.type == "cuda" else "wall time"


def time_in_turn(
    calls: Mapping[str, Call],
    settings: Mapping[str, Callable[[], AbstractContextManager[object]]],
    device: torch.device,
    repeats: int,
) -> dict[str, Timing]:
    """Measure several functions, one call of each per round.

    On the CPU with one thread it is the processor time, which other programs prolong less than wall time.
    A short call is made several times and its mean counts, after one that does not: what ran before it has
    left other data in the caches and other memory to the allocator.

    Args:
        calls: the measured functions by name.
        settings: for each name, a context in which the call runs; entering it is not measured.
        device: where the functions run.
        repeats: rounds that count; one more goes before them.

    Returns:
        The timing of each name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    times = dict.fromkeys(calls, 1)
    for turn in range(repeats + 1):
        # Every other round in reverse, so that no function always follows the same one.
        for name in list(calls) if turn % 2 else reversed(list(calls)):
            call = calls[name]
            with settings[name]():
                if times[name] > 1:
                    call()
                passed = seconds_of(lambda call=call, n=times[name]: [call() for _ in range(n)], device)
            if turn:
                seconds[name].append(passed / times[name])
            else:
                times[name] = max(1, min(_MOST_CALLS, int(_SHORT / max(passed, 1e-9))))
    return {name: summary(values) for name, values in seconds.items()}


def summary(seconds: Sequence[float]) -> Timing:
    """Median and spread of measured seconds."""
    median = statistics.median(seconds)
    low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else (median,) * 3
    return Timing(median, (high - low) / median)


def seconds_of(call: Call, device: torch.device) -> float:
    """Measure one call by the clock that `clock_name` names."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize(device)
        return begin.elapsed_time(end) / 1e3
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    _synchronize(device)
    begin = clock()
    call()
    _synchronize(device)
    return clock() - begin


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def peak_memory(call: Call, device: torch.device) -> int | None:
    """Bytes that PyTorch allocates at most at one time during a call, beyond what exists before it.

    On a GPU from the allocator's statistics; on the CPU from every allocation and release that the profiler
    records, hence without what a library takes for itself. None on devices that report neither.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        return None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = call()
        del result
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda moment: moment[0]):
        held += change
        peak = max(peak, held)
    return peak
