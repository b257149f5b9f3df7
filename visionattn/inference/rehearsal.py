"""Rehearse a network: it runs without data, every allocation is counted, and bands are made to fit a budget.

Tensors of the meta device have a shape only. A rehearsal with them tells how much memory a pass would take,
and how high the bands of `visionattn.layers.bands` may be within a budget.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from visionattn.layers.bands import Rows, planned


def rehearse(function: Callable[[], object], budget: int) -> tuple[list[int], int]:
    """Find heights of bands with which a function stays within a budget.

    Args:
        function: computes on tensors of the meta device. Tensors that exist before are not counted.
        budget: bytes that its tensors may occupy at one time.

    Returns:
        The heights, for `perform`, and the smallest possible budget, which may be above the given one.
    """
    rehearsal = _Rehearsal(budget)
    with planned(rehearsal), torch.no_grad(), rehearsal, _FusedAttention():
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
    with planned(_Performance(heights)), torch.no_grad():
        yield


def without_data(net: nn.Module) -> nn.Module:
    """A copy of a network on the meta device; the network itself stays as it is, and no number is copied."""
    # To `deepcopy`, tensors that the memo knows are copied already.
    memo: dict[int, Any] = {}
    for p in net.parameters():
        memo[id(p)] = nn.Parameter(p.detach().to("meta"), p.requires_grad)
    for buffer in net.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    return copy.deepcopy(net, memo)


class _Performance:
    """Runs bands of the heights that a rehearsal found, in the order of the calls."""

    def __init__(self, heights: Sequence[int]) -> None:
        self.heights = iter(heights)

    def bands(self, rows: Rows) -> Iterator[tuple[int, int]]:
        height, start = next(self.heights), rows.first
        while start < rows.end:
            stop = rows.cut(start, height)
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

    def bands(self, rows: Rows) -> Iterator[tuple[int, int]]:
        """Bands of some heights, for the highest ones that the budget allows."""
        self._trying = True
        step, count = rows.step, rows.end - rows.first
        height = count
        whole = yield from self._try(rows, height)
        if whole > self.budget:
            least = yield from self._try(rows, step)
            self.needed = max(self.needed, least)
            # What bands take grows with their height, up to what stays the same for all heights.
            share = (self.budget - least) / max(whole - least, 1)
            height = int(step + share * (count - step)) // step * step
            while height > step and (yield from self._try(rows, height)) > self.budget:
                height = height * 3 // 4 // step * step
            # As many bands of equal height.
            bands = -(-count // max(height, step))
            height = -(-count // (bands * step)) * step
        self._trying = False
        self.heights.append(height)

    def _try(self, rows: Rows, height: int) -> Generator[tuple[int, int], None, int]:
        """Yields bands that take the most, and returns how much is held at most while they are computed."""
        self.peak = self.held
        first, end = rows.first, rows.end
        stop = rows.cut(first, height)
        yield first, stop
        if stop < end:  # one between two neighbours, and the last one
            yield stop, rows.cut(stop, height)
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
