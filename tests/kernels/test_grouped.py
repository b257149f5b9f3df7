"""Queries and keys of unlike numbers of heads, in every operator that takes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from visionattn.kernels import (
    agent_attention,
    block_attention,
    dense_attention,
    explain,
    grid_attention,
    linear_attention,
    neighborhood_attention,
    overlapping_window_attention,
    routed_attention,
    sort_blocks,
    use_backend,
    window_attention,
)

HEADS = [(4, 2), (2, 4), (3, 1), (1, 3)]


def lists(heads: int, rows: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2, heads, rows, 9, generator=generator).argsort(-1)[..., :3].int()


def blocks(heads: int, count: int) -> Any:
    return sort_blocks(torch.arange(30).mul(7).remainder(count).expand(2, heads, -1), count)


def counts(heads: int) -> Tensor:
    return torch.arange(9 * heads).remainder(5).view(1, heads, 9).int()


# Shape of the bias of a head, None for none, and a call with the larger number of heads.
OPERATORS: dict[str, tuple[tuple[int, int] | None, Callable[..., Any]]] = {
    "window": ((5, 5), lambda heads, *qkv, **kw: window_attention(*qkv, 3, shift=1, **kw)),
    "torus": ((5, 5), lambda heads, *qkv, **kw: window_attention(*qkv, 3, shift=1, mask_shift=False, **kw)),
    "overlapping": ((9, 25), lambda heads, *qkv, **kw: overlapping_window_attention(*qkv, 3, 1, **kw)),
    "grid": ((3, 3), lambda heads, *qkv, **kw: grid_attention(*qkv, 2, **kw)),
    "neighborhood": (
        (5, 5),
        lambda heads, *qkv, **kw: neighborhood_attention(*qkv, 3, return_lse=True, **kw),
    ),
    "dense": ((30, 30), lambda heads, *qkv, **kw: dense_attention(*qkv, return_lse=True, **kw)),
    "linear": (None, lambda heads, *qkv: linear_attention(*qkv)),
    "routed": ((11, 9), lambda heads, *qkv, **kw: routed_attention(*qkv, lists(1), 2, **kw)),
    "routed per head": (
        None,
        lambda heads, *qkv: routed_attention(
            *qkv, lists(heads, 30), 2, query_region_size=1, counts=counts(heads), return_lse=True
        ),
    ),
    "blocks": (
        None,
        lambda heads, *qkv: block_attention(
            *qkv, lists(heads, 4), blocks(heads, 4), blocks(1, 9), tile=4, return_lse=True
        ),
    ),
}


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_equals_repeated_heads(name: str, heads: tuple[int, int], backend: str):
    torch.manual_seed(0)
    bias_shape, attention = OPERATORS[name]
    most = max(heads)
    maps = [torch.randn(2, 6, 5, n, 3, dtype=torch.float64) for n in (heads[0], heads[1], heads[1])]
    given = {} if bias_shape is None else {"bias": torch.randn(most, *bias_shape, dtype=torch.float64)}

    def outcome(is_repeated: bool) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in maps]
        biases = {n: x.clone().requires_grad_() for n, x in given.items()}
        full = [x.repeat_interleave(most // x.shape[3], 3) if is_repeated else x for x in leaves]
        with use_backend(backend):
            outs = attention(most, *full, **biases)
        outs = [outs] if isinstance(outs, Tensor) else list(outs)
        assert all(x.is_contiguous() and x.shape[3] == most for x in outs)
        torch.manual_seed(1)
        loss = sum((torch.randn_like(x) * x).masked_fill(~x.isfinite(), 0).sum() for x in outs)
        return [*outs, *torch.autograd.grad(loss, [*leaves, *biases.values()])]

    torch.testing.assert_close(outcome(False), outcome(True))


def test_a_group_may_share_its_lists_and_its_bias():
    q, k = torch.randn(2, 6, 5, 4, 3), torch.randn(2, 6, 5, 2, 3)
    bias = torch.randn(2, 11, 9)
    shared = routed_attention(q, k, k, lists(2), 2, bias=bias)
    each = [x.repeat_interleave(2, axis) for x, axis in ((lists(2), 1), (bias, 0))]
    torch.testing.assert_close(shared, routed_attention(q, k, k, each[0], 2, bias=each[1]))


@pytest.mark.parametrize("heads", HEADS[:2], ids=str)
def test_compiles_whole(heads: tuple[int, int]):
    q, k = torch.randn(2, 6, 5, heads[0], 3), torch.randn(2, 6, 5, heads[1], 3)
    for attention in (lambda q, k: neighborhood_attention(q, k, k, 3), lambda q, k: dense_attention(q, k, k)):
        compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(q, k), attention(q, k))


def test_explain_and_names_of_arguments():
    q, k = torch.randn(1, 6, 5, 4, 3), torch.randn(1, 6, 5, 2, 3)
    assert explain(dense_attention, q, k, k).backend == "torch"
    out = routed_attention(q=q, k=k, v=k, indices=lists(1)[:1], region_size=2)
    torch.testing.assert_close(out, routed_attention(q, k, k, lists(1)[:1], 2))


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (
            r"dense_attention: q has 3 heads, k has 2; one number must be a multiple of the other",
            lambda q, k: dense_attention(q[..., :3, :], k, k),
        ),
        (
            r"neighborhood_attention: bias has shape \(3, 5, 5\); its axis 0 must have one of 1, 2, 4 heads",
            lambda q, k: neighborhood_attention(q, k, k, 3, bias=torch.zeros(3, 5, 5)),
        ),
        (
            r"routed_attention: indices has shape \(2, 3, 9, 3\); its axis 1 must have",
            lambda q, k: routed_attention(q, k, k, lists(3), 2),
        ),
        (
            r"block_attention: key_blocks has shape \(2, 3, 30\); its axis 1 must have",
            lambda q, k: block_attention(q, k, k, lists(1, 4), blocks(1, 4), blocks(3, 9)),
        ),
        (r"agent_attention: k has shape", lambda q, k: agent_attention(q, q[:, :1], k, k)),
    ],
)
def test_refusals(message: str, call: Callable[..., Any]):
    with pytest.raises(ValueError, match=message) as caught:
        call(torch.randn(2, 6, 5, 4, 3), torch.randn(2, 6, 5, 2, 3))
    assert "\n" not in str(caught.value)
