"""Local attention: the specification's numbers, and the PyTorch path against the reference."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from visionattn import kernels
from visionattn.kernels import (
    grid_attention,
    merge_attention,
    neighborhood_attention,
    overlapping_window_attention,
    use_backend,
    window_attention,
)

BACKENDS = ("reference", "torch")


def means(function: Callable[..., Tensor], length: int, *args: Any, **kwargs: Any) -> list[float]:
    """Output over a sequence with equal logits and values 0, 1, 2, ...: the mean of what a query sees."""
    v = torch.arange(length, dtype=torch.float64).view(1, 1, length, 1, 1)
    zeros = torch.zeros_like(v)
    return function(zeros, zeros, v, *args, **kwargs).flatten().tolist()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("length", "kernel", "stride", "dilation", "causal", "expected"),
    [
        (5, 3, 1, 1, False, [1, 1, 2, 3, 3]),
        (6, 4, 1, 1, False, [1.5, 1.5, 1.5, 2.5, 3.5, 3.5]),
        (8, 4, 2, 1, False, [1.5, 1.5, 2.5, 2.5, 4.5, 4.5, 5.5, 5.5]),
        (10, 4, 4, 1, False, [1.5] * 4 + [5.5] * 4 + [7.5] * 2),
        (7, 3, 1, 2, False, [2, 3, 2, 3, 4, 3, 4]),
        (6, 3, 1, 1, True, [0, 0.5, 1, 2, 3, 4]),
        (8, 4, 2, 1, True, [0, 0.5, 1, 1.5, 3, 3.5, 5, 5.5]),
    ],
)
def test_neighborhood_table(
    backend: str, length: int, kernel: int, stride: int, dilation: int, causal: bool, expected: list[float]
) -> None:
    options = {"stride": (1, stride), "dilation": (1, dilation), "is_causal": (False, causal)}
    with use_backend(backend):
        assert means(neighborhood_attention, length, (1, kernel), **options) == pytest.approx(expected)
        # In two dimensions the set is the product: with v = 10 y + x the mean is 10 mean(y) + mean(x).
        v = 10 * torch.arange(length).view(-1, 1) + torch.arange(length)
        v = v.double().view(1, length, length, 1, 1)
        options = {"stride": stride, "dilation": dilation, "is_causal": causal}
        out = neighborhood_attention(torch.zeros_like(v), torch.zeros_like(v), v, kernel, **options)
    m = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(out.squeeze(), 10 * m[:, None] + m)


@pytest.mark.parametrize("backend", BACKENDS)
def test_special_cases_of_the_specification(backend: str) -> None:
    with use_backend(backend):
        shifted = means(window_attention, 12, (1, 4), shift=(0, 2))
        assert shifted == pytest.approx([0.5, 0.5, *[3.5] * 4, *[7.5] * 4, 10.5, 10.5])
        assert means(grid_attention, 8, (1, 4)) == pytest.approx([3, 4] * 4)
        halo = {
            border: means(overlapping_window_attention, 8, (1, 4), (0, 1), border=border)[::4]
            for border in ("zero", "mask", "clamp")
        }
    assert halo == {
        "zero": pytest.approx([10 / 6, 25 / 6]),
        "mask": pytest.approx([2, 5]),
        "clamp": pytest.approx([2.5, 4.5]),
    }


def test_windows_and_grids_are_neighborhoods() -> None:
    q, k, v = (torch.randn(2, 12, 8, 2, 8, dtype=torch.float64) for _ in range(3))
    windows = neighborhood_attention(q, k, v, 4, stride=4)
    torch.testing.assert_close(window_attention(q, k, v, 4), windows)
    grids = neighborhood_attention(q, k, v, 4, dilation=(3, 2))
    torch.testing.assert_close(grid_attention(q, k, v, 4), grids)
    halos = neighborhood_attention(q, k, v, 6, stride=4)
    torch.testing.assert_close(overlapping_window_attention(q, k, v, 4, 1, border="clamp"), halos)


def test_bias_sign_is_key_minus_query() -> None:
    q = torch.zeros(1, 1, 9, 1, 1, dtype=torch.float64)
    v = torch.arange(9, dtype=torch.float64).view_as(q)
    for offset in range(-2, 3):
        table = torch.full((1, 1, 5), -100.0, dtype=torch.float64)
        table[0, 0, 2 + offset] = 0
        out = neighborhood_attention(q, q, v, (1, 3), bias=table).flatten()
        ends = {-2: (8,), 2: (0,)}.get(offset, range(1, 8))
        assert [out[i].item() for i in ends] == pytest.approx([i + offset for i in ends])


def inputs(
    batch: int, height: int, width: int, heads: int, dim: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Views of one packed projection, as the networks pass them."""
    generator = torch.Generator().manual_seed(batch + 7 * height + 11 * width + 13 * dim)
    packed = torch.randn(batch, height, width, 3, heads, dim, generator=generator, dtype=dtype)
    q, k, v = packed.unbind(3)
    return q, k, v


def assert_backends_agree(function: Callable[..., Any], *tensors: Tensor, tolerance: float = 1e-9) -> None:
    """Values, all gradients, and inference without gradients, which takes another way through PyTorch."""
    results = []
    for backend in BACKENDS:
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        with use_backend(backend):
            outs = function(*leaves)
            outs = outs if isinstance(outs, tuple) else (outs,)
            generator = torch.Generator().manual_seed(0)
            weights = [torch.randn(o.shape, generator=generator, dtype=o.dtype) for o in outs]
            grads = torch.autograd.grad(outs, leaves, weights)
            with torch.no_grad():
                plain = function(*tensors)
        results.append([*outs, *grads, *(plain if isinstance(plain, tuple) else (plain,))])
    for expected, got in zip(*results):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


# height, width, heads, head_dim, kernel, stride, dilation, causal
NEIGHBORHOODS = [
    (7, 7, 2, 16, 7, 1, 1, False),
    (7, 30, 1, 24, 7, 1, 1, False),
    (19, 23, 2, 30, 3, 1, 1, False),
    (17, 40, 1, 32, 5, 1, 1, False),
    (33, 18, 1, 16, 7, 1, (2, 1), False),
    (29, 31, 1, 8, 3, 1, (4, 3), False),
    (37, 20, 2, 8, (5, 4), 1, (1, 3), False),
    (21, 22, 1, 64, 6, 2, 1, False),
    (20, 21, 1, 128, 4, 3, 1, False),
    (24, 24, 1, 8, 6, 6, 1, False),
    (25, 26, 1, 8, 6, 6, 2, False),
    (26, 19, 2, 8, 5, 5, 1, False),
    (18, 18, 1, 16, 9, 4, 1, False),
    (18, 27, 1, 16, 3, 1, 1, True),
    (18, 27, 1, 16, 5, 2, 1, (True, False)),
    (29, 19, 1, 16, 4, 3, (2, 1), (False, True)),
    (40, 1, 1, 4, (13, 1), 1, 1, False),
    (1, 41, 2, 4, (1, 8), (1, 3), (1, 2), True),
    (20, 20, 1, 1, 1, 1, 1, False),
    (20, 20, 1, 4, 20, 7, 1, False),
]


@pytest.mark.parametrize("bias", ["none", "table", "dense"])
@pytest.mark.parametrize("case", NEIGHBORHOODS, ids=str)
def test_neighborhood_equals_reference(case: tuple[Any, ...], bias: str) -> None:
    height, width, heads, dim, kernel, stride, dilation, causal = case
    ky, kx = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    ty, tx = stride if isinstance(stride, tuple) else (stride, stride)
    shapes = {"table": (heads, 2 * ky - 1, 2 * kx - 1), "dense": (heads, ty * tx, ky * kx)}
    tensors = [*inputs(2, height, width, heads, dim)]
    if bias != "none":
        tensors.append(torch.randn(shapes[bias], dtype=torch.float64))

    def attend(q: Tensor, k: Tensor, v: Tensor, b: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return neighborhood_attention(
            q, k, v, kernel, stride=stride, dilation=dilation, is_causal=causal, bias=b, return_lse=True
        )

    assert_backends_agree(attend, *tensors)
    assert_backends_agree(lambda *t: attend(*t)[0], *tensors)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("size", "grid"), [((8, 12), 4), ((13, 9), 4), ((7, 22), (7, 5)), ((3, 5), 4), ((1, 1), 2)]
)
def test_grid_equals_reference(size: tuple[int, int], grid: int | tuple[int, int], bias: bool) -> None:
    gy, gx = grid if isinstance(grid, tuple) else (grid, grid)
    tensors = [*inputs(2, *size, 2, 8)]
    if bias:
        tensors.append(torch.randn(2, 2 * gy - 1, 2 * gx - 1, dtype=torch.float64))
    assert_backends_agree(lambda q, k, v, b=None: grid_attention(q, k, v, grid, bias=b), *tensors)


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_any_batch(batch: int) -> None:
    q, k, v = inputs(batch, 18, 19, 2, 8)
    assert neighborhood_attention(q, k, v, 5, dilation=2).shape == q.shape
    out, lse = neighborhood_attention(q, k, v, 5, return_lse=True)
    assert out.is_contiguous()
    assert lse.shape == q.shape[:4]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    q, k, v = inputs(1, 20, 19, 2, 32, torch.float32)
    table = torch.randn(2, 13, 13)
    exact = neighborhood_attention(q, k, v, 7, bias=table)
    out, lse = neighborhood_attention(*(t.to(dtype) for t in (q, k, v)), 7, bias=table, return_lse=True)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    error = (out.float() - exact).norm() / exact.norm()
    assert error < {torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]


def test_derivatives_of_first_and_second_order() -> None:
    q, k, v = (t.clone().requires_grad_() for t in inputs(1, 6, 17, 1, 1))
    table = torch.randn(1, 3, 5, dtype=torch.float64, requires_grad=True)

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return neighborhood_attention(q, k, v, (2, 3), dilation=(2, 1), bias=bias, return_lse=True)

    assert torch.autograd.gradcheck(attend, (q, k, v, table), fast_mode=True)
    assert torch.autograd.gradgradcheck(attend, (q, k, v, table), fast_mode=True)


def test_vmap_and_per_sample_gradients() -> None:
    q, k, v = inputs(3, 18, 9, 1, 4)
    maps = [t[:, None] for t in (q, k, v)]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return neighborhood_attention(q, k, v, 3)

    torch.testing.assert_close(torch.vmap(attend)(*maps)[:, 0], attend(q, k, v))
    per_sample = torch.vmap(torch.func.grad(lambda *t: attend(*t).square().sum()))(*maps)
    whole = torch.func.grad(lambda *t: attend(*t).square().sum())(q, k, v)
    torch.testing.assert_close(per_sample[:, 0], whole)


def test_exports_with_dynamic_batch() -> None:
    class Attention(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return neighborhood_attention(q, k, v, 5)

    q, k, v = inputs(2, 20, 24, 2, 8, torch.float32)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(Attention(), (q, k, v), dynamic_shapes=[{0: batch}] * 3)
    q, k, v = inputs(5, 20, 24, 2, 8, torch.float32)
    torch.testing.assert_close(program.module()(q, k, v), neighborhood_attention(q, k, v, 5))


def test_merging_disjoint_keys_is_attention_over_all() -> None:
    q, k, v = (t.clone().requires_grad_() for t in inputs(2, 1, 12, 2, 4))
    whole = neighborhood_attention(q, k, v, (1, 12), return_lse=True)

    def part(keys: slice) -> tuple[Tensor, Tensor]:
        logits = torch.einsum("bhqnd,bhknd->bhnqk", q, k[:, :, keys]) * 4**-0.5
        out = torch.einsum("bhnqk,bhknd->bhqnd", logits.softmax(-1), v[:, :, keys])
        return out, logits.logsumexp(-1).transpose(-2, -1)

    merged = merge_attention(*zip(part(slice(5)), part(slice(5, 12))))
    weights = [torch.randn_like(t) for t in whole]
    torch.testing.assert_close(merged, whole)
    torch.testing.assert_close(
        torch.autograd.grad(merged, (q, k, v), weights), torch.autograd.grad(whole, (q, k, v), weights)
    )


def test_merging_branches_without_keys() -> None:
    outs = [torch.zeros(2, 3, requires_grad=True), torch.ones(2, 3, requires_grad=True)]
    lses = [torch.tensor([-math.inf, -math.inf]), torch.tensor([-math.inf, 2.0])]
    lses = [lse.requires_grad_() for lse in lses]
    out, lse = merge_attention(outs, lses)
    assert out.tolist() == [[0, 0, 0], [1, 1, 1]]
    assert lse.tolist() == [-math.inf, 2]
    grads = torch.autograd.grad(out.sum() + lse[1], [*outs, *lses])
    assert all(torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 11}, "needs a height of at least 11, got 10; pad the map by 1 pixels"),
        ({"kernel_size": 3, "dilation": (1, 5)}, "needs a width of at least 15, got 12"),
        ({"kernel_size": 3, "stride": 4}, "stride 4 is above kernel_size 3"),
        ({"kernel_size": 0}, "kernel_size must be one or two integers of at least 1"),
        ({"kernel_size": 3, "bias": torch.zeros(2, 3, 3)}, "needed is a relative table (2, 5, 5)"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    q, k, v = inputs(1, 10, 12, 2, 4)
    with pytest.raises(ValueError, match=re.escape(message)):
        neighborhood_attention(q, k, v, **options)


def test_explain_names_the_implementation() -> None:
    q, k, v = inputs(1, 10, 12, 2, 4)
    assert kernels.explain(neighborhood_attention, q, k, v, 3).backend == "torch"
