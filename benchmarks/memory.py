"""The memory that large pictures take: by the authors' formulation, by ours, and by ours within a budget."""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from benchmarks.formulations import FORMULATIONS
from benchmarks.measure import Timing, seconds_of, summary
from benchmarks.models import formulation_of
from benchmarks.report import Page, memory_cell
from visionattn.engine.yaml_io import dump_value
from visionattn.errors import InputError, as_input_error, nearest
from visionattn.inference.memory import parse_bytes, run_within
from visionattn.inference.rehearsal import count_bytes
from visionattn.models.registry.zoo import model_names

_AUTHORS, _WHOLE = "authors", "whole image"
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class LargePicture:
    """One line of the table.

    Attributes:
        network: the registered name.
        arguments: in which it differs from the published network, as `key=value`.
        input: shape of the input.
        computation: `"authors"`, `"whole image"` for ours, or ours within a memory budget, which it names.
        memory: peak bytes beyond what was held when network and input stood there; None where not run.
        counted: the most that tensors occupy at one time by their shapes; None for budgets.
        share: memory divided by that of the authors, which is the counted one where theirs was not run.
        time: of a pass; None where not run.
        slowdown: time divided by that of our whole image.
        difference: largest difference of the output from that of the network's first line that ran, relative
            to the largest output.
    """

    network: str
    arguments: str
    input: tuple[int, ...]
    computation: str
    memory: int | None
    counted: int | None
    share: float | None
    time: Timing | None
    slowdown: float | None
    difference: float | None

    def cells(self) -> tuple[str, ...]:
        """The line under the columns of `page`."""
        return (
            f"{self.network} {self.arguments}".strip(),
            "x".join(map(str, self.input)),
            self.computation,
            *map(memory_cell, (self.memory, self.counted)),
            "-" if self.share is None else f"1/{1 / self.share:.1f}",
            "not run" if self.time is None else _time_cell(self.time),
            "-" if self.slowdown is None else f"{self.slowdown:.2f}x",
            "-" if self.difference is None else f"{self.difference:.1e}",
        )


def _time_cell(time: Timing) -> str:
    return f"{time.median:.1f} s" + (f" ± {time.spread:.0%}" if time.spread else "")


def page(rows: Sequence[LargePicture]) -> Page:
    """Name the columns of these lines, and explain them."""
    shortened = any("depth" in row.arguments for row in rows)
    return Page(
        "Memory for large pictures",
        ("network", "input", "computation", "memory", "counted", "share", "time", "slowdown", "difference"),
        "Inference, each line in a process of its own, one after the other. Memory: on the CPU, the most "
        "that the process holds in RAM during the pass, beyond what it holds when network and picture stand "
        "there and a tiny picture has passed; on a GPU, what PyTorch allocates. Counted: the most that "
        "tensors occupy at one time by their shapes; what needs more than the limit is counted, not run. "
        "Share: memory as a part of that of the authors' formulation. Slowdown: time divided by that of our "
        "whole-image pass. Difference: largest difference from the output of the network's first line that "
        "ran, relative to the largest output.",
        [
            *(
                f"{name}, authors: {formulation_of(name).description}"
                for name in sorted({row.network for row in rows if row.computation == _AUTHORS})
            ),
            *(["fewer blocks take less time, but no less memory: they run one after another"] * shortened),
        ],
    )


@dataclass(frozen=True)
class Setting:
    """One line that a process of its own measures; `computation` as in `LargePicture`."""

    network: str
    shape: tuple[int, ...]
    computation: str
    repeats: int
    threads: int
    device: str
    kwargs: dict[str, Any] = field(default_factory=dict)

    def arguments(self) -> str:
        """`kwargs` as text."""
        return " ".join(f"{key}={dump_value(value)}" for key, value in self.kwargs.items())

    def build(self, device: str) -> Any:
        """The network in evaluation mode, with the same weights in every process."""
        torch.manual_seed(0)
        return timm.create_model(self.network, device=device, **self.kwargs).eval()

    def formulation(self, net: Any) -> AbstractContextManager[object]:
        """A context in which the network computes as the line says."""
        authors = self.computation == _AUTHORS
        return formulation_of(self.network).in_place_of_kernels(net) if authors else nullcontext()

    def count(self) -> int | None:
        """Bytes of the tensors of a pass, unless it has a budget."""
        if self.computation not in (_AUTHORS, _WHOLE):
            return None
        net = self.build("meta")
        with self.formulation(net):
            return count_bytes(lambda: net(torch.empty(self.shape, device="meta")))

    def measure(self) -> tuple[int, Timing, Tensor]:
        """Peak bytes, time and output."""
        torch.set_num_threads(self.threads)
        net, device = self.build(self.device), torch.device(self.device)
        image, tiny = (
            torch.rand(shape, generator=torch.Generator().manual_seed(1)).to(device)
            for shape in (self.shape, (*self.shape[:2], net.info.min_size, net.info.min_size))
        )
        outputs: list[Tensor] = []

        def run(x: Tensor) -> None:
            outputs.clear()
            whole = self.computation in (_AUTHORS, _WHOLE)
            outputs.append(net(x) if whole else run_within(net, x, self.computation))

        with torch.no_grad(), self.formulation(net):
            run(tiny)
            outputs.clear()
            before = _start_of_peak(device)
            passed = [seconds_of(lambda: run(image), device)]
            memory = _peak(device) - before
            passed += [seconds_of(lambda: run(image), device) for _ in range(self.repeats - 1)]
        return memory, summary(passed), outputs[0].cpu()


def measure_memory(
    names: Sequence[str],
    *,
    size: tuple[int, int],
    budgets: Sequence[str] = (),
    limit: str = "12GB",
    repeats: int = 1,
    threads: int = 1,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Iterator[LargePicture]:
    """Networks on one picture: by the authors' formulation where it is at hand, ours whole, ours in budgets.

    Args:
        names: registered restoration networks, all checked before the first is measured.
        size: height and width of the picture.
        budgets: memory budgets, as `run_within` takes them.
        limit: a pass whose tensors take more is counted and not run.
        repeats: measured passes.
        threads: CPU threads.
        device: where to run.
        kwargs: arguments of the networks.

    Raises:
        InputError: an unknown name or a network without a budget, a budget that cannot be read or is too
            small, a size that cannot work, or a process that ended early.
    """
    if torch.device(device).type == "cpu" and not _RESET.exists():
        raise InputError("on the CPU, the memory of a process can be measured on Linux only")
    with as_input_error("cannot measure", ValueError):
        most, *_ = [parse_bytes(text) for text in (limit, *budgets)]
    shapes = {name: _input_shape(name, size, kwargs) for name in names}
    for name, shape in shapes.items():
        family = timm.model_entrypoint(name).__module__.rsplit(".", 1)[-1]
        authors = [_AUTHORS] if family in FORMULATIONS else []
        settings = [
            Setting(name, shape, computation, repeats, threads, str(device), kwargs)
            for computation in (*authors, _WHOLE, *budgets)
        ]
        with as_input_error(f"cannot run {name} at {size[0]}x{size[1]}", ValueError):
            yield from _measure_lines(settings, most)


def _measure_lines(settings: Sequence[Setting], most: int) -> Iterator[LargePicture]:
    memory_of_authors = time_of_whole = first = None
    for setting in settings:
        counted = setting.count()
        runs = counted is None or counted <= most
        memory, timing, out = in_own_process(setting) if runs else (None, None, None)
        first = out if first is None else first
        if setting.computation == _AUTHORS:
            memory_of_authors = memory or counted
        elif setting.computation == _WHOLE and timing:
            time_of_whole = timing.median
        share = slowdown = difference = None
        if memory_of_authors and (memory or counted):
            share = (memory or counted or 0) / memory_of_authors
        if timing and time_of_whole:
            slowdown = timing.median / time_of_whole
        if out is not None and first is not None:
            difference = ((out - first).abs().max() / first.abs().max()).item()
        yield LargePicture(
            network=setting.network,
            arguments=setting.arguments(),
            input=setting.shape,
            computation=setting.computation,
            memory=memory,
            counted=counted,
            share=share,
            time=timing,
            slowdown=slowdown,
            difference=difference,
        )


def _input_shape(name: str, size: tuple[int, int], kwargs: dict[str, Any]) -> tuple[int, ...]:
    if name not in model_names():
        raise InputError(f"unknown network {name!r}: {nearest(name, model_names())}")
    info = getattr(timm.create_model(name, device="meta", **kwargs), "info", None)
    if info is None:
        raise InputError(f"{name} does not restore pictures: there is no memory budget for it")
    return (1, info.channels, *size)


def in_own_process(setting: Setting) -> tuple[int, Timing, Tensor]:
    """`setting.measure()` where nobody allocated before, and from where everything is given back."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(setting.measure).result()
        except BrokenProcessPool:
            size = "x".join(map(str, setting.shape[2:]))
            raise InputError(
                f"{setting.network} at {size}, {setting.computation}: the process was ended from outside, "
                "most likely because it took too much memory; a lower --limit leaves such lines out"
            ) from None


def _start_of_peak(device: torch.device) -> int:
    """Bytes that are held now, from where `_peak` will look for the most."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    _RESET.write_text("5")  # the kernel's sign for: the peak begins anew
    return _resident("VmRSS")


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _resident("VmHWM")


def _resident(which: str) -> int:
    found = re.search(rf"{which}:\s+(\d+) kB", _STATUS.read_text())
    assert found is not None
    return int(found[1]) * 1024
