"""Routing to regions and attention over index lists: hand-made cases, agreement, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from agreement import assert_implementations_agree, packed_qkv
from torch import Tensor

from visionattn.kernels import routed_attention, topk_regions, use_backend

BACKENDS = ("reference", "torch")
# (height, width), region, topk
CASES = [
    ((8, 8), 4, 2),
    ((9, 7), 3, 2),
    ((9, 7), (4, 3), 3),
    ((5, 6), 7, 1),
    ((6, 6), 2, 9),
    ((7, 5), 2, 12),
    ((1, 12), (1, 4), 2),
    ((3, 3), 1, 4),
]


def two(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def make_bias(kind: str, heads: int, height: int, width: int) -> list[Tensor]:
    shapes = {"table": (2 * height - 1, 2 * width - 1), "dense": (height * width, height * width)}
    return [] if kind == "none" else [torch.randn(heads, *shapes[kind], dtype=torch.float64)]


def random_lists(batch: int, heads: int, regions: int, topk: int) -> Tensor:
    """Lists of distinct regions, some with padding at any place, one of nothing else."""
    lists = torch.rand(batch, heads, regions, regions).argsort(-1)[..., :topk]
    lists = lists.masked_fill(torch.rand(lists.shape) < 0.3, -1)
    lists[:, :, 0] = -1
    return lists.to(torch.int32)


@pytest.mark.parametrize("bias", ["none", "table", "dense"])
@pytest.mark.parametrize(("size", "region", "topk"), CASES)
@pytest.mark.parametrize("return_lse", [False, True])
def test_routing_and_attention_agree(size: Any, region: Any, topk: int, bias: str, return_lse: bool):
    heads = 2
    q, k, v = packed_qkv(2, *size, heads, 1 + sum(size) % 5)
    indices = topk_regions(q, k, region, topk)
    inputs = [q, k, v, *make_bias(bias, heads, *size)]
    for distinct in (True, False):

        def function(
            q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, distinct: bool = distinct
        ) -> Any:
            return routed_attention(
                q, k, v, indices, region, bias=bias, return_lse=return_lse, distinct=distinct
            )

        assert_implementations_agree(function, inputs)


@pytest.mark.parametrize("bias", ["none", "table", "dense"])
@pytest.mark.parametrize("list_heads", [1, 2])
@pytest.mark.parametrize(("size", "region", "topk"), CASES)
def test_padded_lists_agree(size: Any, region: Any, topk: int, list_heads: int, bias: str):
    regions = 1
    for side, length in zip(size, two(region)):
        regions *= -(-side // length)
    indices = random_lists(2, list_heads, regions, min(topk, regions))
    inputs = [*packed_qkv(2, *size, 2, 3), *make_bias(bias, 2, *size)]

    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return routed_attention(q, k, v, indices, region, bias=bias, scale=0.4, return_lse=True)

    assert_implementations_agree(function, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_hand_computed_lists(backend: str):
    v = torch.arange(12, dtype=torch.float64).view(1, 1, 12, 1, 1)
    zero = torch.zeros_like(v)
    indices = torch.tensor([[[[0, 2], [1, -1], [-1, -1]]]])
    with use_backend(backend):
        out, lse = routed_attention(zero, zero, v, indices, (1, 4), return_lse=True)
    assert out.flatten().tolist() == pytest.approx([5.5] * 4 + [5.5] * 4 + [0.0] * 4)
    logarithms = torch.tensor([8.0] * 4 + [4.0] * 4 + [0.0] * 4, dtype=torch.float64).log()
    torch.testing.assert_close(lse.flatten(), logarithms)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_regions_are_full_attention(backend: str):
    q, k, v = packed_qkv(2, 6, 5, 2, 4)
    weights = torch.einsum("byxhd,bvuhd->bhyxvu", q, k).flatten(-2).mul(0.5).softmax(-1)
    expected = torch.einsum("bhyxk,bkhd->byxhd", weights, v.flatten(1, 2))
    indices = torch.arange(9).flip(0).expand(2, 1, 9, 9)
    for distinct in (False, True):
        with use_backend(backend):
            torch.testing.assert_close(routed_attention(q, k, v, indices, 2, distinct=distinct), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_lists_pass_no_gradient(backend: str):
    q, k, v = (t.requires_grad_() for t in packed_qkv(1, 4, 4, 1, 2))
    indices = torch.full((1, 1, 4, 2), -1)
    with use_backend(backend):
        out, lse = routed_attention(q, k, v, indices, 2, return_lse=True)
    assert not out.any()
    assert (lse == float("-inf")).all()
    for gradient in torch.autograd.grad(out.sum(), (q, k, v)):
        assert not gradient.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_lists_without_entries(backend: str):
    q, k, v = packed_qkv(1, 4, 4, 1, 2)
    with use_backend(backend):
        out, lse = routed_attention(q, k, v, torch.empty(1, 1, 4, 0, dtype=torch.int32), 2, return_lse=True)
    assert not out.any()
    assert (lse == float("-inf")).all()


@pytest.mark.parametrize("batch", [0, 1])
def test_batch(batch: int):
    q, k, v = packed_qkv(batch, 6, 5, 2, 3)
    indices = topk_regions(q, k, 2, 4)
    for distinct in (True, False):
        assert_implementations_agree(
            lambda q, k, v, distinct=distinct: routed_attention(
                q, k, v, indices, 2, return_lse=True, distinct=distinct
            ),
            [q, k, v],
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("indices", [[[1, 0], [0, -1], [-1, -1]], [[1, 0], [0, 2], [2, 1]]])
def test_second_derivatives(backend: str, indices: list[list[int]]):
    lists = torch.tensor(indices).view(1, 1, 3, 2)
    inputs = [*packed_qkv(1, 3, 4, 1, 2), *make_bias("table", 1, 3, 4)]
    leaves = [x.detach().requires_grad_() for x in inputs]

    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Any:
        # A list of nothing has a log-sum-exp of -inf, which finite differences cannot take.
        out, lse = routed_attention(q, k, v, lists, (1, 4), bias=bias, return_lse=True)
        return out, lse[lse.isfinite()]

    with use_backend(backend):
        assert torch.autograd.gradcheck(function, leaves)
        assert torch.autograd.gradgradcheck(function, leaves)


# The choice of the regions


def test_routing_follows_the_means():
    q, k, _ = packed_qkv(2, 6, 9, 2, 4)
    means = [x.flatten(3).view(2, 2, 3, 3, 3, 8).mean((2, 4)).flatten(1, 2) for x in (q, k)]
    affinity = means[0] @ means[1].transpose(1, 2)
    expected = affinity.topk(3).indices[:, None]
    chosen = topk_regions(q, k, 3, 3)
    assert chosen.dtype == torch.int32
    assert torch.equal(chosen, expected.int())


def test_means_of_border_regions_run_over_their_own_pixels():
    # The last column holds one pixel of a region of two; padding would halve its mean.
    q = torch.ones(1, 1, 5, 1, 1)
    k = torch.tensor([1.0, 1.0, 1.1, 1.1, 1.5]).view(1, 1, 5, 1, 1)
    assert topk_regions(q, k, (1, 2), 3)[0, 0, 0].tolist() == [2, 1, 0]


def test_ties_go_to_the_lowest_index():
    q = torch.ones(1, 8, 8, 1, 2)
    assert topk_regions(q, q, 2, 5)[0, 0].tolist() == [[0, 1, 2, 3, 4]] * 16


def test_more_regions_than_there_are():
    q, k, _ = packed_qkv(1, 4, 4, 1, 2)
    assert topk_regions(q, k, 2, 99).shape == (1, 1, 4, 4)
    assert sorted(topk_regions(q, k, 2, 99)[0, 0, 0].tolist()) == [0, 1, 2, 3]


def test_routing_is_float32_under_autocast_and_detached():
    q, k = (x.float().requires_grad_() for x in packed_qkv(4, 16, 16, 2, 32)[:2])
    expected = topk_regions(q, k, 4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(topk_regions(q, k, 4, 3), expected)
    # Half-precision maps are averaged in float32: the same as averaging their float32 copies.
    q, k = q.bfloat16(), k.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(topk_regions(q, k, 4, 3), topk_regions(q.float(), k.float(), 4, 3))
    assert not expected.requires_grad


# PyTorch's transformations


class Routed(torch.nn.Module):
    def __init__(self, distinct: bool = True):
        super().__init__()
        self.distinct = distinct

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return routed_attention(q, k, v, topk_regions(q, k, 3, 2), 3, distinct=self.distinct)


@pytest.mark.slow  # half a minute each: sizes as symbols make for long expressions
@pytest.mark.parametrize("distinct", [True, False])
def test_compile_with_dynamic_shapes(distinct: bool):
    torch.compiler.reset()
    net = Routed(distinct)
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.inference_mode():
        for shape in ((2, 9, 10), (3, 12, 7)):
            inputs = packed_qkv(*shape, 2, 3)
            torch.testing.assert_close(compiled(*inputs), net(*inputs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_gradients(backend: str):
    torch.compiler.reset()
    net, inputs = Routed(), [x.clone().requires_grad_() for x in packed_qkv(2, 9, 10, 2, 3)]
    with use_backend(backend):
        out = torch.compile(net, fullgraph=True, backend="aot_eager")(*inputs)
        expected = net(*inputs)
    torch.testing.assert_close(out, expected)
    gradients = torch.autograd.grad(out.square().sum(), inputs)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.square().sum(), inputs))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("distinct", [True, False])
def test_export(backend: str, distinct: bool):
    inputs = packed_qkv(2, 9, 10, 2, 3)
    batch = {0: torch.export.Dim("batch", min=1)}
    with use_backend(backend):
        program = torch.export.export(Routed(distinct), inputs, dynamic_shapes=(batch, batch, batch))
    for example in (inputs, packed_qkv(3, 9, 10, 2, 3)):
        torch.testing.assert_close(program.module()(*example), Routed()(*example))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_vmap(backend: str):
    stacked = [torch.stack(x) for x in zip(*(packed_qkv(1, 6, 7, 2, 3) for _ in range(3)))]
    net = Routed()

    def gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.func.grad(lambda v: net(q, k, v).square().sum())(v)

    with use_backend(backend):
        for function in (net, gradient):
            expected = torch.stack([function(*inputs) for inputs in zip(*stacked)])
            torch.testing.assert_close(torch.func.vmap(function)(*stacked), expected)


# Errors

Q, K, V = packed_qkv(1, 6, 4, 2, 4)
LISTS = torch.tensor([[0, 1], [2, -1], [3, 4], [5, 0], [1, 2], [4, 3]]).view(1, 1, 6, 2)
BAD_ARGUMENTS: list[tuple[str, list[Any], dict[str, Any]]] = [
    (r"v has shape", [Q, K, V[..., :3], LISTS, 2], {}),
    (r"region_size must be", [Q, K, V, LISTS, 0], {}),
    (r"indices must be \[1 or 1, 1 or 2, rows, n\]", [Q, K, V, LISTS[0], 2], {}),
    (r"indices must be \[1 or 1, 1 or 2, rows, n\]", [Q, K, V, LISTS.expand(1, 3, 6, 2), 2], {}),
    (r"indices hold 6 lists, the queries have 24 regions", [Q, K, V, LISTS, 1], {}),
    (r"indices must be int32 or int64", [Q, K, V, LISTS.double(), 2], {}),
    (r"indices are on meta", [Q, K, V, LISTS.to("meta"), 2], {}),
    (r"indices must lie in -1 \(padding\) \.\. 5", [Q, K, V, LISTS + 1, 2], {}),
    (r"indices must lie in -1 \(padding\) \.\. 5", [Q, K, V, LISTS - 1, 2], {}),
    (r"names the same one twice", [Q, K, V, LISTS.clamp(max=2), 2], {}),
    (r"bias has shape \(2, 3, 3\); needed is", [Q, K, V, LISTS, 2], {"bias": torch.zeros(2, 3, 3)}),
    (r"bias is on meta", [Q, K, V, LISTS, 2], {"bias": torch.zeros(2, 11, 7, device="meta")}),
    (r"bias must be of a floating", [Q, K, V, LISTS, 2], {"bias": torch.zeros(2, 11, 7, dtype=torch.int32)}),
]


@pytest.mark.parametrize(("message", "args", "kwargs"), BAD_ARGUMENTS)
def test_bad_arguments_of_routed_attention(message: str, args: list[Any], kwargs: dict[str, Any]):
    with pytest.raises(ValueError, match=message) as caught:
        routed_attention(*args, **kwargs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("message", "args"),
    [
        (r"q and k must be \[B, H, W, heads, head_dim\] of one shape", [Q, K[:, :5], 2, 1]),
        (r"q and k must be \[B, H, W, heads, head_dim\] of one shape", [Q[0], K[0], 2, 1]),
        (r"floating-point", [Q.long(), K.long(), 2, 1]),
        (r"topk must be at least 1, got 0", [Q, K, 2, 0]),
        (r"region_size must be", [Q, K, (2, 2, 2), 1]),
    ],
)
def test_bad_arguments_of_topk_regions(message: str, args: list[Any]):
    with pytest.raises(ValueError, match=message) as caught:
        topk_regions(*args)
    assert "\n" not in str(caught.value)
