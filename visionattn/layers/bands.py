"""Layers computed band by band of rows, so that what they hold in between stays within a budget of memory.

In a network of maps, most of the memory goes to what exists inside one layer: queries, keys and values, the
scores, the hidden layer of an MLP. All of it belongs to single rows, or to rows near them. A layer that says
so through `by_bands` runs on the whole map as ever, and inside `perform` on one band of rows after the other,
with the same numbers. How high each band may be is found by `rehearse`: the same network runs without data,
on tensors that have a shape only, and every allocation is counted.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

State = TypeVar("State")


class _Plan(Protocol):
    """Decides how high bands are."""

    def bands(self, first: int, end: int, align: int, offset: int) -> Iterator[tuple[int, int]]:
        """Begin and end of the bands from row `first` to `end`, cut at rows `offset + n * align`."""
        ...


_plan: _Plan | None = None


def by_bands(
    function: Callable[..., Tensor],
    *maps: Tensor,
    halo: int | tuple[int, int] = 0,
    align: int = 1,
    offset: int = 0,
    scale: int | Fraction = 1,
    dim: int = 1,
    wrap: bool = False,
    placed: bool = False,
    into: Tensor | None = None,
) -> Tensor:
    """`function(*maps)`; inside `perform` on one band of rows after the other.

    Args:
        function: every row of its output depends on no other rows of the maps than the corresponding ones and
            `halo` rows around. It may take the end of a band for the end of the map, as a convolution with
            zero padding does: what that makes of the outer `halo` rows is discarded.
        maps: tensors with the same number of rows.
        halo: rows that a row needs on either side, or (before, behind).
        align: bands begin at rows `offset + n * align`, the first one at 0.
        offset: see `align`.
        scale: rows of the output per row of the maps.
        dim: the axis of rows, in the maps and in the output.
        wrap: the map is a torus: the first row's halo is at the end of the map, and the rows before `offset`
            belong to the last band.
        placed: whether the function takes `top=`, the row at which its bands begin, halo included. With
            `wrap`, a band may begin before the map or reach beyond it; a whole map begins at None.
        into: a tensor of the output's shape that the output may be written to. It must be the caller's own;
            it may be one of the maps if rows of the output depend on no rows around of that one.

    Returns:
        What the function gives for whole maps.
    """
    if _plan is None:
        return function(*maps, top=None if wrap else 0) if placed else function(*maps)
    before, behind = halo if isinstance(halo, tuple) else (halo, halo)
    rows, first, out = maps[0].shape[dim], offset if wrap else 0, into
    for start, stop in _plan.bands(first, first + rows, align, offset):
        low, high = start - before, stop + behind
        if not wrap:
            low, high = max(low, 0), min(high, rows)
        bands = [_take(m, dim, low, high) for m in maps]
        part = function(*bands, top=low) if placed else function(*bands)
        begin, end = int(start * scale), int(stop * scale)
        part = part.narrow(dim, begin - int(low * scale), end - begin)
        if out is None:
            out = _empty_like(part, dim, int(rows * scale))
        _put(part, out, dim, begin)
        del bands, part  # or they would live beside those of the next band
    assert out is not None
    return out


def fold_by_bands(
    step: Callable[..., State], state: State, *maps: Tensor, halo: int = 0, dim: int = 1
) -> State:
    """`step(state, *maps, core=slice(None))`; inside `perform` once for every band of rows, in order.

    Args:
        step: takes the state, the bands, and as `core` those rows of the bands that are not halo; returns the
            next state. All bands in turn must come to the same as the whole maps at once.
        state: the first state.
        maps: tensors with the same number of rows.
        halo: rows that are needed on either side of the core.
        dim: the axis of rows.
    """
    if _plan is None:
        return step(state, *maps, core=slice(None))
    rows = maps[0].shape[dim]
    for start, stop in _plan.bands(0, rows, 1, 0):
        low, high = max(start - halo, 0), min(stop + halo, rows)
        bands = [_take(m, dim, low, high) for m in maps]
        state = step(state, *bands, core=slice(start - low, stop - low))
        del bands
    return state


def _take(x: Tensor, dim: int, low: int, high: int) -> Tensor:
    """Rows from `low` to `high` of a map; of a torus if they reach beyond it."""
    rows = x.shape[dim]
    if low < 0 or high > rows:
        return x.index_select(dim, torch.arange(low, high, device=x.device) % rows)
    band = x.narrow(dim, low, high - low)
    # Convolutions would copy a band with gaps, each for itself, and on a device where it cannot be counted.
    extent = 1 + sum((n - 1) * stride for n, stride in zip(band.shape, band.stride()))
    return band if extent == band.numel() else band.clone()


def _put(part: Tensor, out: Tensor, dim: int, begin: int) -> None:
    """Write rows to `out` from `begin` on; what does not fit goes to the beginning."""
    fitting = min(part.shape[dim], out.shape[dim] - begin)
    out.narrow(dim, begin, fitting).copy_(part.narrow(dim, 0, fitting))
    rest = part.shape[dim] - fitting
    if rest:
        out.narrow(dim, 0, rest).copy_(part.narrow(dim, fitting, rest))


def _empty_like(part: Tensor, dim: int, rows: int) -> Tensor:
    """An uninitialised map of `rows` rows, otherwise like a band of it."""
    shape = [*part.shape[:dim], rows, *part.shape[dim + 1 :]]
    # A band cut from a channels-last map is not contiguous; that its channels are next to each other tells.
    channels_last = part.dim() == 4 and part.stride(1) == 1 < part.shape[1]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=part.dtype, device=part.device, memory_format=layout)


def _cut(start: int, rows: int, end: int, align: int, offset: int) -> int:
    """The end of a band of at most `rows` rows from `start` on."""
    stop = start + rows
    return end if stop >= end else stop - (stop - offset) % align


class _Performance:
    """Runs bands of the heights that a rehearsal found, in the order of the calls."""

    def __init__(self, heights: Sequence[int]) -> None:
        self.heights = iter(heights)

    def bands(self, first: int, end: int, align: int, offset: int) -> Iterator[tuple[int, int]]:
        height, start = next(self.heights), first
        while start < end:
            stop = _cut(start, height, end, align, offset)
            yield start, stop
            start = stop


class _Rehearsal(TorchDispatchMode):
    """Counts what tensors on the meta device would occupy, and finds the highest bands within a budget.

    Attributes:
        heights: of the bands, in the order of the calls.
        needed: the smallest budget that would do, in bytes.
    """

    def __init__(self, budget: int) -> None:
        super().__init__()
        self.budget = budget
        self.heights: list[int] = []
        self.needed = self.held = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._trying = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in (out,) if isinstance(out, Tensor) else out:
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        if func is torch.ops.aten.convolution.default:
            # On a CPU the weights are copied into the order of the map and from there into the library's.
            self._reach(self.held + 2 * args[1].nbytes)
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        weakref.finalize(storage, self._release, key)
        self.held += storage.nbytes()
        self._reach(self.held)

    def _reach(self, size: int) -> None:
        self.peak = max(self.peak, size)
        if not self._trying:
            self.needed = max(self.needed, size)

    def _release(self, key: int) -> None:
        self.held -= self._sizes.pop(key)

    def bands(self, first: int, end: int, align: int, offset: int) -> Iterator[tuple[int, int]]:
        self._trying = True
        height = end - first
        whole = yield from self._try(first, end, height, align, offset)
        if whole > self.budget:
            least = yield from self._try(first, end, align, align, offset)
            self.needed = max(self.needed, least)
            # What bands take grows with their height, up to what stays the same for all heights.
            share = (self.budget - least) / max(whole - least, 1)
            height = int(align + share * (end - first - align)) // align * align
            while height > align and (yield from self._try(first, end, height, align, offset)) > self.budget:
                height = height * 3 // 4 // align * align
            # As many bands of equal height.
            bands = -(-(end - first) // max(height, align))
            height = -(-(end - first) // (bands * align)) * align
        self._trying = False
        self.heights.append(height)

    def _try(
        self, first: int, end: int, height: int, align: int, offset: int
    ) -> Generator[tuple[int, int], None, int]:
        """Yields bands that take the most, and returns how much is held at most while they are computed."""
        self.peak = self.held
        stop = _cut(first, height, end, align, offset)
        yield first, stop
        if stop < end:  # one between two neighbours, and the last one
            yield stop, _cut(stop, height, end, align, offset)
            yield stop + (end - stop - 1) // height * height, end
        return self.peak


class _FusedAttention(TorchFunctionMode):
    """Attention as devices compute it: without tensors of scores, where queries are as wide as values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Inside `sdpa_kernel(SDPBackend.MATH)` there are scores.
        fused = func is F.scaled_dot_product_attention and torch.backends.cuda.flash_sdp_enabled()
        if fused and args[0].shape[-1] == args[2].shape[-1]:
            return args[0].new_empty(args[0].shape)
        return func(*args, **(kwargs or {}))


def rehearse(function: Callable[[], object], budget: int) -> tuple[list[int], int]:
    """Find heights of bands with which a function stays within a budget.

    Args:
        function: computes on tensors of the meta device. Tensors that exist before are not counted.
        budget: bytes that its tensors may occupy at one time.

    Returns:
        What `perform` takes, and the smallest budget that is possible, which may be above the given one.
    """
    with _planned(_Rehearsal(budget)) as rehearsal, torch.no_grad(), rehearsal, _FusedAttention():
        function()
    return rehearsal.heights, rehearsal.needed


def count_bytes(function: Callable[[], object]) -> int:
    """The most that the tensors of a function on the meta device occupy at one time, in bytes."""
    with torch.no_grad(), _Rehearsal(0) as counter, _FusedAttention():
        function()
    return counter.peak


@contextmanager
def perform(heights: Sequence[int]) -> Iterator[None]:
    """Inside the block, the function that was rehearsed runs in bands of these heights, without gradients."""
    with _planned(_Performance(heights)), torch.no_grad():
        yield


@contextmanager
def _planned(plan: Any) -> Iterator[Any]:
    global _plan
    previous, _plan = _plan, plan
    try:
        yield plan
    finally:
        _plan = previous
