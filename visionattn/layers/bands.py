"""Layers computed band by band of rows, so that what they hold in between stays within a budget of memory.

In a network of maps, most of the memory goes to what exists inside one layer: queries, keys and values, the
scores, the hidden layer of an MLP. All of it belongs to single rows, or to rows near them. A layer says so
with one of three verbs: `pixelwise`, `convolved` and `windowed` call a function on whole maps as ever, and
inside `planned` on one band of rows after the other, with the same numbers. `folded` is for sums over rows.
How high each band may be is found out in `visionattn.inference`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from fractions import Fraction
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

State = TypeVar("State")

# How many numbers of the hidden features of an MLP caches hold; and pixels of a piece where they are more.
# The best of powers of two as measured: up to 1.8 times faster.
_IN_CACHE, _PIECE = 1 << 19, 512


class Rows(NamedTuple):
    """The rows of a map, and where bands of them may begin.

    Attributes:
        first: the first row; on a torus it need not be 0.
        end: the row behind the last one.
        step: bands begin at rows `offset + n * step`, the first one at `first`.
        offset: see `step`.
    """

    first: int
    end: int
    step: int = 1
    offset: int = 0

    def cut(self, start: int, height: int) -> int:
        """The end of a band of at most `height` rows from `start` on."""
        stop = start + height
        return self.end if stop >= self.end else stop - (stop - self.offset) % self.step


class Plan(Protocol):
    """Decides how high bands are."""

    def bands(self, rows: Rows) -> Iterator[tuple[int, int]]:
        """First row of every band and the row behind its last one, from the top down."""
        ...


_plan: ContextVar[Plan | None] = ContextVar("bands", default=None)


@contextmanager
def planned(plan: Plan) -> Iterator[None]:
    """Inside the block, in this thread, the verbs compute in bands as high as the plan says."""
    token = _plan.set(plan)
    try:
        yield
    finally:
        _plan.reset(token)


def _current_plan() -> Plan | None:
    # A compiled program is one for whole maps, and older compilers do not know context variables.
    return None if torch.compiler.is_compiling() else _plan.get()


def pixelwise(
    function: Callable[..., Tensor],
    *maps: Tensor,
    dim: int = 1,
    into: Tensor | None = None,
    hidden_dim: int | None = None,
) -> Tensor:
    """`function(*maps)` for a function that sees every pixel by itself, as a norm and an MLP do.

    Args:
        function: no row of its output depends on another row of the maps.
        maps: tensors with the same number of rows.
        dim: the axis of rows, in the maps and in the output.
        into: a tensor of the output's shape that the output may be written to; it may be one of the maps. It
            must be the caller's own, that nobody needs any more.
        hidden_dim: features of the widest layer in the function, if `into` and all maps are `[..., C]` and
            the function takes `[n, C]` as well. Inference on a CPU then computes large maps in small pieces,
            so that caches hold the hidden features.

    Returns:
        The function's output for whole maps.
    """
    plan = _current_plan()
    if plan is not None:
        return _by_bands(plan, function, maps, Rows(0, maps[0].shape[dim]), dim=dim, into=into)
    if into is None or hidden_dim is None or not _outgrows_caches(into, hidden_dim):
        return function(*maps)
    out = into.contiguous()
    pixels = [(out if m is into else m).reshape(-1, m.shape[-1]) for m in (into, *maps)]
    length = _PIECE * torch.get_num_threads()
    for target, *pieces in zip(*(m.split(length) for m in pixels)):
        target.copy_(function(*pieces))
    return out


def _outgrows_caches(x: Tensor, hidden_dim: int) -> bool:
    """Whether the hidden features of inference on a CPU are worth the trouble of computing them in pieces."""
    on_cpu = x.device.type == "cpu" and not torch.compiler.is_compiling()
    return on_cpu and not torch.is_grad_enabled() and hidden_dim * x[..., 0].numel() > _IN_CACHE


def convolved(
    function: Callable[..., Tensor],
    *maps: Tensor,
    halo: int = 0,
    scale: int | Fraction = 1,
    dim: int = 1,
    into: Tensor | None = None,
) -> Tensor:
    """`function(*maps)` for a function that sees pixels and their neighbourhood, as a convolution does.

    Args:
        function: every row of its output depends on no other rows of the maps than the corresponding ones and
            `halo` rows on either side. It may take the end of a band for the end of the map, as a convolution
            with zero padding does: what that makes of the outer `halo` rows is discarded.
        maps: tensors with the same number of rows.
        halo: see `function`.
        scale: rows of the output per row of the maps; bands for a `scale` of 1 / n begin at multiples of n.
        dim: the axis of rows, in the maps and in the output.
        into: a tensor of the output's shape that the output may be written to. It must be the caller's own;
            it may be one of the maps if rows of the output depend on no rows around of that one.

    Returns:
        The function's output for whole maps.
    """
    plan = _current_plan()
    if plan is None:
        return function(*maps)
    rows = Rows(0, maps[0].shape[dim], Fraction(scale).denominator)
    return _by_bands(plan, function, maps, rows, halo=halo, scale=scale, dim=dim, into=into)


def windowed(
    function: Callable[..., Tensor],
    *maps: Tensor,
    window: int,
    shift: int = 0,
    halo: int = 0,
    torus: bool = False,
    into: Tensor | None = None,
) -> Tensor:
    """`function(*maps, top)` for a function on `[B, H, W, C]` that sees whole windows.

    Args:
        function: no row of its output depends on other rows of the maps than those of the windows in which
            the row lies, and `halo` rows on either side of these. `top` is the row at which its maps begin;
            on a torus a band may begin before the map or reach beyond it, and `top` of the whole map is None.
        maps: tensors with the same number of rows.
        window: height of a window.
        shift: the row at which a window begins.
        halo: see `function`.
        torus: whether the first row's neighbour is the last row, and the rows before `shift` belong to the
            last window.
        into: as in `convolved`.

    Returns:
        The function's output for whole maps.
    """
    plan = _current_plan()
    if plan is None:
        return function(*maps, None if torus else 0)
    first = shift if torus else 0
    rows = Rows(first, first + maps[0].shape[1], window, shift)
    return _by_bands(plan, function, maps, rows, halo=halo, torus=torus, placed=True, into=into)


def folded(step: Callable[..., State], state: State, *maps: Tensor, halo: int = 0, dim: int = 1) -> State:
    """`step(state, *maps, core=slice(None))`; inside `planned` once for every band of rows, in order.

    Args:
        step: takes the state, the bands, and as `core` those rows of the bands that are not halo; returns the
            next state. All bands in turn must come to the same as the whole maps at once.
        state: the first state.
        maps: tensors with the same number of rows.
        halo: rows that are needed on either side of the core.
        dim: the axis of rows.
    """
    plan = _current_plan()
    if plan is None:
        return step(state, *maps, core=slice(None))
    rows = maps[0].shape[dim]
    for start, stop in plan.bands(Rows(0, rows)):
        low, high = max(start - halo, 0), min(stop + halo, rows)
        bands = [_take(m, dim, low, high) for m in maps]
        state = step(state, *bands, core=slice(start - low, stop - low))
        del bands
    return state


def _by_bands(
    plan: Plan,
    function: Callable[..., Tensor],
    maps: tuple[Tensor, ...],
    rows: Rows,
    *,
    halo: int = 0,
    scale: int | Fraction = 1,
    dim: int = 1,
    torus: bool = False,
    placed: bool = False,
    into: Tensor | None = None,
) -> Tensor:
    """The verbs' common part; `placed`: the function takes the row at which its maps begin."""
    count, out = maps[0].shape[dim], into
    for start, stop in plan.bands(rows):
        low, high = start - halo, stop + halo
        if not torus:
            low, high = max(low, 0), min(high, count)
        bands = [_take(m, dim, low, high) for m in maps]
        part = function(*bands, low) if placed else function(*bands)
        begin, end = int(start * scale), int(stop * scale)
        part = part.narrow(dim, begin - int(low * scale), end - begin)
        if out is None:
            out = _empty_like(part, dim, int(count * scale))
        _put(part, out, dim, begin)
        del bands, part  # or they would live beside those of the next band
    assert out is not None
    return out


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
