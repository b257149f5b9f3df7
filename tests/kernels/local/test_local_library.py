"""Local attention as a registered operator: its checks, compiled programs and hand-written gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from visionattn.kernels import neighborhood_attention, overlapping_window_attention, window_attention
from visionattn.kernels.local.library import decode, encode
from visionattn.kernels.local.pattern import (
    Call,
    Pattern,
    grid_axis,
    neighborhood_axis,
    overlapping_axis,
    window_axis,
)
from visionattn.kernels.local.plain.attention import attention_of_tiles

OPERATOR = torch.ops.visionattn.local_attention.default
GRADIENTS = torch.ops.visionattn.local_attention_backward.default


def local_attention(*args: Any) -> tuple[Tensor, Tensor]:
    """The operator, on the path in plain PyTorch."""
    return OPERATOR(*args, "torch")


def backward(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """All gradients from that of the output, likewise."""
    return GRADIENTS(grad, None, None, None, *args, False, "torch", [True] * 4)


PATTERNS = {
    "tiles": Pattern(neighborhood_axis(19, 3, 1, 1, False), neighborhood_axis(18, 5, 1, 1, False)),
    "dilated": Pattern(neighborhood_axis(14, 3, 1, 3, False), neighborhood_axis(9, 4, 1, 2, True)),
    "strided": Pattern(neighborhood_axis(20, 6, 2, 1, False), neighborhood_axis(11, 5, 4, 1, True)),
    "windows": Pattern(window_axis(10, 4, 1), window_axis(9, 3)),
    "zero": Pattern(overlapping_axis(9, 4, 2, "zero"), overlapping_axis(7, 3, 1, "zero")),
    "mask": Pattern(overlapping_axis(9, 4, 2, "mask"), overlapping_axis(20, 2, 1, "mask")),
    "grid": Pattern(grid_axis(9, 4), grid_axis(7, 7)),
}


def sample(pattern: Pattern, bias: str = "none") -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    shape = (2, pattern.y.length, pattern.x.length, 3, 2, 4)
    packed = torch.randn(shape, generator=generator, dtype=torch.float64)
    shapes = {"table": pattern.table_shape, "dense": pattern.dense_shape}
    table = None
    if bias != "none":
        table = torch.randn(2, *shapes[bias], generator=generator, dtype=torch.float64).requires_grad_()
    q, k, v = (t.detach().requires_grad_() for t in packed.unbind(3))
    return q, k, v, table


@pytest.mark.parametrize("bias", ["none", "table", "dense"])
@pytest.mark.parametrize("name", PATTERNS)
def test_gradient_equals_that_of_the_tiles(name: str, bias: str) -> None:
    pattern = PATTERNS[name]
    q, k, v, table = sample(pattern, bias)
    leaves = [q, k, v] + ([] if table is None else [table])
    results = []
    for return_lse in (False, True):
        expected = attention_of_tiles(q, k, v, Call(pattern, table, 0.3, return_lse))
        got = local_attention(q, k, v, table, encode(pattern), 0.3, return_lse)
        outs = list(zip(expected, got))[: 1 + return_lse]
        torch.manual_seed(0)
        weights = [torch.randn_like(e) for e, _ in outs]
        results += [
            torch.autograd.grad([e for e, _ in outs], leaves, weights),
            torch.autograd.grad([g for _, g in outs], leaves, weights),
        ]
        for e, g in outs:
            torch.testing.assert_close(g, e)
    for expected, got in zip(results[::2], results[1::2]):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", PATTERNS)
def test_geometry_survives_as_numbers(name: str) -> None:
    pattern = PATTERNS[name]
    assert decode(encode(pattern), sample(pattern)[0].shape[1:3]) == pattern


@pytest.mark.parametrize("bias", ["none", "table"])
def test_second_derivatives(bias: str) -> None:
    pattern = Pattern(neighborhood_axis(4, 2, 1, 2, False), neighborhood_axis(17, 3, 1, 1, False))
    q, k, v, table = sample(pattern, bias)
    q, k, v = (t[:1, ..., :1, :1].detach().clone().requires_grad_() for t in (q, k, v))
    table = None if table is None else table[:1].detach().clone().requires_grad_()

    def attend(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        bias = tensors[3] if len(tensors) > 3 else None
        return local_attention(*tensors[:3], bias, encode(pattern), 0.7, True)

    leaves = (q, k, v) if table is None else (q, k, v, table)
    assert torch.autograd.gradcheck(attend, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(attend, leaves, fast_mode=True)


@pytest.mark.parametrize("bias", ["none", "table"])
@pytest.mark.parametrize("return_lse", [False, True])
def test_opcheck(bias: str, return_lse: bool) -> None:
    pattern = PATTERNS["tiles"]
    q, k, v, table = sample(pattern, bias)
    torch.library.opcheck(OPERATOR, (q, k, v, table, encode(pattern), 0.3, return_lse, "torch"))
    grad_lse = torch.randn(q.shape[:4], dtype=q.dtype) if return_lse else None
    grad = torch.ones(1, dtype=q.dtype).expand(q.shape)
    inputs = [None if t is None else t.detach() for t in (q, k, v, table)]
    arguments = (*inputs, encode(pattern), 0.3, return_lse, "torch", [True, True, True, table is not None])
    torch.library.opcheck(GRADIENTS, (grad, grad_lse, None, None, *arguments))


def test_vmap_over_maps_and_biases() -> None:
    pattern = PATTERNS["tiles"]
    q, k, v, table = (None if t is None else t.detach() for t in sample(pattern, "table"))
    assert table is not None
    maps, tables = torch.stack([q, k, v]), torch.stack([table, 2 * table, -table])

    def attend(q: Tensor, table: Tensor) -> tuple[Tensor, ...]:
        return local_attention(q, k, v, table, encode(pattern), 0.3, True)

    def differentiate(q: Tensor, table: Tensor) -> tuple[Tensor, ...]:
        return backward(k, q, k, v, table, encode(pattern), 0.3)

    for function in (attend, differentiate):
        samples = [function(m, t) for m, t in zip(maps, tables)]
        expected = tuple(torch.stack(parts) for parts in zip(*samples))
        torch.testing.assert_close(torch.vmap(function)(maps, tables), expected)


@pytest.mark.parametrize(
    "attend",
    [
        lambda q, k, v: neighborhood_attention(q, k, v, 5),
        lambda q, k, v: neighborhood_attention(q, k, v, 3, dilation=2, return_lse=True),
        lambda q, k, v: window_attention(q, k, v, 4, shift=2),
        lambda q, k, v: overlapping_window_attention(q, k, v, 4, 1),
    ],
)
def test_compiles_whole_with_dynamic_sizes(attend: Any) -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=counter)
    for batch, height, width in ((4, 24, 26), (3, 29, 30), (5, 36, 17)):
        torch.manual_seed(0)
        packed = torch.randn(batch, height, width, 3, 2, 8, requires_grad=True)
        results = []
        for function in (attend, compiled):
            outs = function(*packed.unbind(3))
            outs = outs if isinstance(outs, tuple) else (outs,)
            results.append((*outs, *torch.autograd.grad(sum(o.square().sum() for o in outs), packed)))
        torch.testing.assert_close(results[1], results[0])
    assert counter.frame_count == 1


def test_flops_are_those_of_the_visible_pairs() -> None:
    pattern = PATTERNS["windows"]
    q, k, v, _ = sample(pattern)
    with FlopCounterMode(display=False) as counter:
        out, _ = local_attention(q, k, v, None, encode(pattern), 0.3, False)
        out.sum().backward()
    assert counter.get_total_flops() == 2 * pattern.flops(heads=2, head_dim=4) * (2 + 5) // 2
