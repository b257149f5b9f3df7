"""The fused local attention on a GPU, at real sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import BIASES, assert_close, make, run

from visionattn.kernels import explain, neighborhood_attention
from visionattn.kernels.local.pattern import (
    Pattern,
    grid_axis,
    neighborhood_axis,
    overlapping_axis,
    window_axis,
)

pytestmark = pytest.mark.gpu


def square(axis: Any, *args: Any) -> Pattern:
    return Pattern(axis(*args), axis(*args))


PATTERNS = {
    "windows 7": square(window_axis, 56, 7),
    "shifted windows 8": square(window_axis, 64, 8, 4),
    "shifted windows 16": square(window_axis, 64, 16, 8),
    "grid 7": square(grid_axis, 56, 7),
    "overlapping 16": square(overlapping_axis, 64, 16, 4, "zero"),
    "halo 8": square(overlapping_axis, 64, 8, 3, "mask"),
    "neighborhood 7": square(neighborhood_axis, 56, 7, 1, 1, False),
    "neighborhood 13": square(neighborhood_axis, 56, 13, 1, 1, False),
    "dilated 7": square(neighborhood_axis, 59, 7, 1, 8, False),
    "causal 9": square(neighborhood_axis, 40, 9, 3, 1, True),
    "strided 24": square(neighborhood_axis, 96, 24, 8, 1, False),
    "large 40": square(neighborhood_axis, 72, 40, 1, 1, False),
}
# About three times what rounding the operands of every product costs the worst tensor; in float32, sums of up
# to 1600 keys are less exact than those of 256.
TOLERANCES = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("name", PATTERNS)
def test_equals_the_pytorch_path_in_double_precision(name: str, bias: str, dtype: torch.dtype) -> None:
    pattern = PATTERNS[name]
    tensors = make(pattern, bias, 32, heads=2, batch=2, dtype=dtype, device="cuda")
    exact = [x.detach().double().requires_grad_() for x in tensors]
    result, expected = run("triton", pattern, tensors), run("torch", pattern, exact)
    assert_close(result, expected, TOLERANCES[dtype])


@pytest.mark.parametrize("dim", [16, 24, 30, 64, 80, 128, 256])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", ["shifted windows 8", "neighborhood 7"])
def test_every_head_dim(name: str, dtype: torch.dtype, dim: int) -> None:
    pattern = PATTERNS[name]
    tensors = make(pattern, "table", dim, heads=2, dtype=dtype, device="cuda")
    exact = [x.detach().double().requires_grad_() for x in tensors]
    result = run("triton", pattern, tensors)
    assert_close(result, run("torch", pattern, exact), TOLERANCES[dtype])


@pytest.mark.parametrize("name", ["windows 7", "shifted windows 16", "neighborhood 7", "overlapping 16"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_twenty_backward_runs_give_equal_bits(name: str, dtype: torch.dtype) -> None:
    pattern = PATTERNS[name]
    tensors = make(pattern, "table", 32, heads=4, batch=8, dtype=dtype, device="cuda")
    first = run("triton", pattern, tensors)
    for _ in range(19):
        assert all(torch.equal(*pair) for pair in zip(first, run("triton", pattern, tensors), strict=True))


def test_is_the_default() -> None:
    q, k, v = make(PATTERNS["neighborhood 7"], dtype=torch.bfloat16, device="cuda")
    assert explain(neighborhood_attention, q, k, v, 7).backend == "triton"
