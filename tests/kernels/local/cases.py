"""Ugly cases of local attention, and how the implementations are compared on them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from visionattn.kernels import use_backend
from visionattn.kernels.local.op import LOCAL_ATTENTION
from visionattn.kernels.local.pattern import (
    Call,
    Pattern,
    grid_axis,
    neighborhood_axis,
    overlapping_axis,
    window_axis,
)

# Maker of an axis from its length, and the arguments behind the length, in rows and columns.
Case = tuple[tuple[int, int], Callable[..., Any], tuple[Any, ...], tuple[Any, ...]]


def na(size: tuple[int, int], kernel: Any, stride: Any = 1, dilation: Any = 1, causal: Any = False) -> Case:
    y, x = zip(*((n, n) if not isinstance(n, tuple) else n for n in (kernel, stride, dilation, causal)))
    return size, neighborhood_axis, y, x


def windows(size: tuple[int, int], window: Any, shift: Any = 0) -> Case:
    y, x = zip(*((n, n) if isinstance(n, int) else n for n in (window, shift)))
    return size, window_axis, y, x


def overlapping(size: tuple[int, int], window: Any, overlap: Any, border: str) -> Case:
    y, x = zip(*((n, n) if isinstance(n, int) else n for n in (window, overlap)))
    return size, overlapping_axis, (*y, border), (*x, border)


def grid(size: tuple[int, int], side: Any) -> Case:
    y, x = (side, side) if isinstance(side, int) else side
    return size, grid_axis, (y,), (x,)


# Maps that are not square or not divisible, single rows and columns, kernels as large as the map, strides as
# large as the kernel, dilation with a remainder, causality per axis, even kernels, windows that borders cut.
NEIGHBORHOODS = [
    na((5, 7), 3),
    na((7, 5), (3, 5)),
    na((6, 9), 4),
    na((5, 5), 5),
    na((6, 6), (6, 3)),
    na((4, 9), (2, 4), (2, 3)),
    na((9, 10), (4, 3), (4, 3)),
    na((8, 10), 4, 2),
    na((11, 7), (5, 3), (2, 1)),
    na((7, 8), 3, 1, 2),
    na((11, 7), 3, 1, (3, 2)),
    na((9, 13), (4, 3), (2, 1), (2, 4)),
    na((6, 5), 3, 1, 1, True),
    na((8, 6), (4, 3), (2, 1), 1, (True, False)),
    na((7, 9), 3, (1, 3), (2, 1), (False, True)),
    na((1, 40), (1, 7)),
    na((37, 1), (13, 1), (4, 1)),
    na((1, 23), (1, 4), (1, 3), (1, 2), (False, True)),
    na((1, 1), 1),
    na((9, 17), 1),
    na((13, 3), (9, 2)),
    na((2, 70), (2, 5)),
    na((18, 18), 12, 6),
    na((7, 26), (7, 4), (7, 3), 1, (False, True)),
    na((21, 9), (5, 3), (1, 3), (4, 3)),
    na((12, 33), 3),
]
WINDOWS = [
    windows((8, 8), 4),
    windows((9, 7), 4),
    windows((9, 7), 4, 3),
    windows((9, 7), (4, 3), (1, 2)),
    windows((8, 12), 4, 2),
    windows((5, 6), 7),
    windows((5, 6), 7, 3),
    windows((1, 13), (1, 5), (0, 2)),
    windows((3, 5), 1),
    windows((1, 1), 3, 1),
    windows((14, 7), 7),
    windows((13, 11), 8, 4),
    windows((12, 17), (12, 11)),
    windows((6, 11), 2, 1),
    windows((19, 4), (8, 3), (5, 1)),
]
OVERLAPS = [
    overlapping(size, window, overlap, border)
    for (size, window, overlap), border in itertools.product(
        [
            ((9, 7), 4, 1),
            ((8, 11), (4, 3), (2, 1)),
            ((7, 6), 2, 2),
            ((1, 11), (1, 4), (0, 2)),
            ((12, 6), 1, 1),
        ],
        ("zero", "mask", "clamp"),
    )
    if border != "clamp" or (size, window) != ((8, 11), 4)
]
OVERLAPS += [overlapping((5, 4), 6, 1, "zero"), overlapping((5, 4), 6, 1, "mask")]
GRIDS = [
    grid((8, 12), 4),
    grid((13, 9), 4),
    grid((7, 22), (7, 5)),
    grid((3, 5), 4),
    grid((1, 1), 2),
    grid((10, 11), 3),
    grid((7, 1), (1, 4)),
]
CASES = NEIGHBORHOODS + WINDOWS + OVERLAPS + GRIDS
DIMS = (16, 24, 30, 32, 64, 128, 5, 1)
BIASES = ("none", "table", "dense")


def name_of(case: Case) -> str:
    (height, width), axis, y, x = case
    kind = axis.__name__.removesuffix("_axis")
    return f"{kind}-{height}x{width}-{'_'.join(map(str, y))}-{'_'.join(map(str, x))}".replace(" ", "")


def pattern_of(case: Case) -> Pattern:
    (height, width), axis, y, x = case
    return Pattern(axis(height, *y), axis(width, *x))


def make(
    pattern: Pattern,
    bias: str = "none",
    dim: int = 16,
    heads: int = 2,
    batch: int = 1,
    layout: str = "packed",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> list[Tensor]:
    """q, k, v and perhaps a bias: views of one projection, or maps in an order of their own."""
    shape = batch, pattern.y.length, pattern.x.length, 3, heads, dim
    packed = torch.randn(shape, dtype=torch.float64)
    if layout == "permuted":
        packed = packed.permute(4, 2, 3, 0, 5, 1).contiguous().permute(3, 5, 1, 2, 0, 4)
    tensors = list(packed.to(device=device, dtype=dtype).unbind(3))
    if bias != "none":
        entries = pattern.table_shape if bias == "table" else pattern.dense_shape
        tensors.append(torch.randn(heads, *entries, dtype=torch.float64).to(device=device, dtype=dtype))
    return [x.detach().requires_grad_() for x in tensors]


def run(backend: str, pattern: Pattern, tensors: list[Tensor], return_lse: bool = True) -> list[Tensor]:
    """Output, perhaps log-sum-exp, and all gradients of a weighted sum of them.

    The scale is not the default, but as large: the rounding of a logit grows with it.
    """
    q, k, v, *bias = tensors
    scale = 1.1 * q.shape[-1] ** -0.5
    with use_backend(backend):
        out, lse = LOCAL_ATTENTION(q, k, v, Call(pattern, bias[0] if bias else None, scale, return_lse))
    outs = [out] if lse is None else [out, lse]
    generator = torch.Generator().manual_seed(1)
    # The same numbers in every dtype.
    weights = [torch.randn(x.shape, generator=generator).bfloat16().to(x) for x in outs]
    return [*outs, *torch.autograd.grad(outs, tensors, weights)]


def assert_close(result: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Every tensor, in the norm of the whole.

    Half a unit for each number stands for what cancels out: the terms of a sum do not shrink with it. The
    gradients of queries, keys and bias are sums of logits' gradients, each the difference of two products of
    d numbers: for them it is a unit for each number of q.
    """
    outputs = 1 + (expected[1].dim() == 4)
    of_logits = {outputs, outputs + 1, outputs + 3}
    for place, (ours, theirs) in enumerate(zip(result, expected, strict=True)):
        assert ours.shape == theirs.shape
        error, scale = (ours.double() - theirs.double()).norm(), theirs.double().norm()
        cancelled = expected[0].numel() ** 0.5 if place in of_logits else 0.5 * theirs.numel() ** 0.5
        assert error <= tolerance * (scale + cancelled), error


def assert_equals_reference(
    backend: str, pattern: Pattern, tensors: list[Tensor], tolerance: float, return_lse: bool = True
) -> None:
    exact = [x.detach().double().requires_grad_() for x in tensors]
    ours, formula = (
        run(*args, return_lse) for args in ((backend, pattern, tensors), ("reference", pattern, exact))
    )
    assert_close(ours, formula, tolerance)


@pytest.fixture
def unwritten_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills what `torch.empty` returns with NaN, so that outputs that nobody writes are found."""
    zeros = torch.zeros

    def empty(*args: Any, **kwargs: Any) -> Tensor:
        x = zeros(*args, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", empty)


@st.composite
def patterns(draw: Any, most_pixels: int, largest: int) -> Pattern:
    """Any pattern that the public functions can make, on a map of at most so many pixels."""
    kind = draw(st.sampled_from(["neighborhood", "window", "zero", "mask", "clamp", "grid"]))

    def axis(most: int) -> Any:
        def number(low: int, high: int) -> int:
            return draw(st.integers(low, max(low, min(high, most))))

        if kind == "neighborhood":
            kernel = number(1, largest)
            dilation = draw(st.integers(1, max(1, min(3, most // kernel))))
            length = number(kernel * dilation, kernel * dilation + 9)
            return neighborhood_axis(length, kernel, number(1, kernel), dilation, draw(st.booleans()))
        if kind == "window":
            window = number(1, largest)
            return window_axis(number(1, 14), window, draw(st.integers(0, window - 1)))
        if kind == "grid":
            return grid_axis(number(1, 14), number(1, largest))
        window, overlap = number(1, largest), draw(st.integers(0, 3))
        smallest = window + 2 * overlap if kind == "clamp" else 1
        return overlapping_axis(draw(st.integers(smallest, smallest + 9)), window, overlap, kind)

    y = axis(most_pixels)
    return Pattern(y, axis(max(1, most_pixels // y.length)))
