"""Routed attention on a GPU at the sizes of networks: the formula, and the same bits every time."""

from __future__ import annotations

import pytest
import torch
from list_cases import CASES, inputs_of
from torch import Tensor

from visionattn.kernels import explain, routed_attention, topk_regions, use_backend

pytestmark = pytest.mark.gpu

# height, width, heads, topk: the routed stages of BiFormer at 448 with 7x7 regions, and one of 800x1216.
STAGES = [(112, 112, 2, 1), (56, 56, 4, 4), (28, 28, 8, 16), (50, 76, 8, 16)]
# Three times the error that rounding inputs and weights to these formats makes; float32 is exact products.
BOUNDS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def maps(
    stage: tuple[int, int, int, int], dtype: torch.dtype
) -> tuple[list[Tensor], Tensor, tuple[int, int]]:
    height, width, heads, topk = stage
    generator = torch.Generator("cuda").manual_seed(0)
    packed = torch.randn(2, height, width, 3, heads, 32, generator=generator, device="cuda").to(dtype)
    q, k, v = (x.requires_grad_() for x in packed.unbind(3))
    region = -(-height // 7), -(-width // 7)
    return [q, k, v], topk_regions(q, k, region, topk), region


def outcome(
    inputs: list[Tensor], indices: Tensor, region: tuple[int, int], bias: Tensor | None
) -> list[Tensor]:
    """Output, log-sum-exp and the gradients of a weighted sum of both."""
    out, lse = routed_attention(*inputs, indices, region, bias=bias, return_lse=True)
    generator = torch.Generator("cuda").manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, device="cuda").to(x.dtype) for x in (out, lse)]
    leaves = inputs if bias is None else [*inputs, bias]
    return [out, lse, *torch.autograd.grad((out, lse), leaves, weights)]


def table(stage: tuple[int, int, int, int], dtype: torch.dtype) -> Tensor:
    height, width, heads, _ = stage
    values = torch.randn(heads, 2 * height - 1, 2 * width - 1, device="cuda", dtype=dtype)
    return values.requires_grad_()


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
@pytest.mark.parametrize("stage", STAGES[1:], ids=str)
def test_equals_the_formula(stage: tuple[int, int, int, int], dtype: torch.dtype, with_bias: bool) -> None:
    inputs, indices, region = maps(stage, dtype)
    bias = table(stage, dtype) if with_bias else None
    assert explain(routed_attention, *inputs, indices, region, bias=bias).backend == "triton"
    result = outcome(inputs, indices, region, bias)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    exact_bias = None if bias is None else bias.detach().double().requires_grad_()
    with use_backend("reference"):
        expected = outcome(exact, indices, region, exact_bias)
    for ours, theirs in zip(result, expected):
        assert (ours.double() - theirs).norm() <= BOUNDS[dtype] * theirs.norm()


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
@pytest.mark.parametrize("stage", STAGES, ids=str)
def test_gives_the_same_bits_twenty_times(
    stage: tuple[int, int, int, int], dtype: torch.dtype, with_bias: bool
) -> None:
    inputs, indices, region = maps(stage, dtype)
    bias = table(stage, dtype) if with_bias else None
    first = outcome(inputs, indices, region, bias)
    for _ in range(19):
        assert all(map(torch.equal, outcome(inputs, indices, region, bias), first))


@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
def test_routing_is_that_of_the_cpu(dtype: torch.dtype) -> None:
    for stage in STAGES:
        (q, k, _), indices, region = maps(stage, dtype)
        assert torch.equal(topk_regions(q.cpu(), k.cpu(), region, stage[3]), indices.cpu())


@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_list(name: str, dtype: torch.dtype) -> None:
    inputs, arguments = inputs_of(CASES[name], torch.float32, dim=32)
    arguments = {n: x.cuda() if isinstance(x, Tensor) else x for n, x in arguments.items()}
    low = [x.cuda().to(dtype).detach().requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in low]

    def result(leaves: list[Tensor]) -> list[Tensor]:
        bias = leaves[3] if len(leaves) > 3 else None
        out = routed_attention(*leaves[:3], bias=bias, **arguments)
        generator = torch.Generator("cuda").manual_seed(1)
        weights = torch.randn(out.shape, generator=generator, device="cuda").to(out.dtype)
        return [out, *torch.autograd.grad(out, leaves, weights)]

    with use_backend("reference"):
        expected = result(exact)
    first = result(low)
    for ours, theirs in zip(first, expected):
        assert (ours.double() - theirs).norm() <= BOUNDS[dtype] * theirs.norm()
    assert all(map(torch.equal, result(low), first))
