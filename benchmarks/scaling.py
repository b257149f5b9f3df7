"""How time and memory of a network grow with the number of pixels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import timm
import torch

from benchmarks.measure import Timing, peak_memory, time_in_turn
from benchmarks.report import Page, memory_cell, time_cell
from visionattn.errors import InputError, as_input_error, nearest
from visionattn.models.registry.zoo import model_names


@dataclass(frozen=True)
class Growth:
    """One network at several sizes.

    Attributes:
        network: the registered name.
        sides: heights and widths of the inputs in pixels.
        timings: of an inference pass at each.
        memory: peak bytes that it allocates at each; None where the device does not tell.
        time_exponent: of the growth of time with the number of pixels from the first to the last side: 1 is
            linear, 2 that of attention among all pixels.
        memory_exponent: that of memory.
    """

    network: str
    sides: tuple[int, ...]
    timings: tuple[Timing, ...]
    memory: tuple[int | None, ...]
    time_exponent: float
    memory_exponent: float | None

    def cells(self) -> tuple[str, ...]:
        """The line under the columns of `page`."""
        exponent = "-" if self.memory_exponent is None else f"{self.memory_exponent:.2f}"
        sides = (f"{time_cell(t)}, {memory_cell(m)}" for t, m in zip(self.timings, self.memory))
        return (self.network, *sides, f"{self.time_exponent:.2f}", exponent)


def measure_growth(
    names: Sequence[str], sides: Sequence[int], *, repeats: int = 5, device: torch.device | str = "cpu"
) -> Iterator[Growth]:
    """Inference of one square image without the classifier, all sides in turn.

    Args:
        names: registered networks.
        sides: heights and widths in pixels, ascending.
        repeats: measured rounds.
        device: where to run.

    Raises:
        InputError: an unknown name, fewer than two sides, or a side that cannot work.
    """
    if len(sides) < 2 or list(sides) != sorted(set(sides)):
        raise InputError(f"at least two sides are needed, ascending, got {list(sides)}")
    for name in names:
        if name not in model_names():
            raise InputError(f"unknown network {name!r}: {nearest(name, model_names())}")
    device = torch.device(device)
    for name in names:
        torch.manual_seed(0)
        net: Any = timm.create_model(name, num_classes=0, device=device).eval()
        with as_input_error(f"cannot run {name}", ValueError):
            yield _growth(net, name, tuple(sides), repeats, device)


def _growth(net: Any, name: str, sides: tuple[int, ...], repeats: int, device: torch.device) -> Growth:
    images = {str(side): torch.rand(1, net.in_chans, side, side, device=device) for side in sides}

    @torch.inference_mode()
    def run(side: str) -> None:
        net(images[side])

    calls = {side: lambda side=side: run(side) for side in images}
    memory = []
    for call in calls.values():
        call()  # what networks keep for a size is kept before it is measured
        memory.append(peak_memory(call, device))
    timings = time_in_turn(calls, dict.fromkeys(calls, nullcontext), device, repeats)
    pixels = math.log((sides[-1] / sides[0]) ** 2)
    first, last = memory[0], memory[-1]
    return Growth(
        network=name,
        sides=sides,
        timings=tuple(timings.values()),
        memory=tuple(memory),
        time_exponent=math.log(timings[str(sides[-1])].median / timings[str(sides[0])].median) / pixels,
        memory_exponent=math.log(last / first) / pixels if first and last else None,
    )


def page(rows: Sequence[Growth]) -> Page:
    """Name the columns of these lines, and explain them; all networks are measured at the same sides."""
    sides = rows[0].sides
    return Page(
        "Time and memory against the number of pixels",
        ("network", *map(str, sides), "exponent, time", "exponent, memory"),
        "One image, inference, no classifier; the sizes in turn. Time: median, ± the difference of the "
        "quartiles. Memory: the most that PyTorch allocates at one time, weights and input not counted. The "
        f"exponent is that of growth with the number of pixels from {sides[0]} to {sides[-1]}: 1 is linear, "
        "2 is attention among all pixels; below 1, fixed costs still count at the smallest size.",
    )
