"""Arguments that are no tensors, or tensors of other layouts: one sentence before any work."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from visionattn import kernels

X = torch.rand(1, 8, 8, 2, 4)
LISTS = torch.zeros(1, 1, 4, 1, dtype=torch.int64)
# Every public operator with its tensors, which are replaced one by one.
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]] = {
    "window_attention": (kernels.window_attention, {"q": X, "k": X, "v": X}, {"window_size": 4}),
    "overlapping_window_attention": (
        kernels.overlapping_window_attention,
        {"q": X, "k": X, "v": X},
        {"window_size": 4, "overlap": 1},
    ),
    "grid_attention": (kernels.grid_attention, {"q": X, "k": X, "v": X}, {"grid_size": 4}),
    "neighborhood_attention": (kernels.neighborhood_attention, {"q": X, "k": X, "v": X}, {"kernel_size": 3}),
    "dense_attention": (kernels.dense_attention, {"q": X, "k": X, "v": X}, {}),
    "linear_attention": (kernels.linear_attention, {"q": X, "k": X, "v": X}, {}),
    "agent_attention": (kernels.agent_attention, {"q": X, "agents": X[:, :2, :2], "k": X, "v": X}, {}),
    "routed_attention": (
        kernels.routed_attention,
        {"q": X, "k": X, "v": X, "indices": LISTS},
        {"region_size": 4},
    ),
    "topk_regions": (kernels.topk_regions, {"q": X, "k": X}, {"region_size": 4, "topk": 2}),
    "antidiagonal_regions": (
        kernels.antidiagonal_regions,
        {"q": X, "k": X},
        {"region_size": 4, "stride": 2, "threshold": 0.9},
    ),
    "product": (kernels.product, {"x": X, "weight": torch.rand(3, 4)}, {}),
}
PLACES = [(name, tensor) for name, (_, tensors, _) in CALLS.items() for tensor in tensors]


@pytest.mark.parametrize(("name", "tensor"), PLACES)
@pytest.mark.parametrize("value", [None, 3, [1.0]], ids=["none", "a number", "a list"])
def test_what_is_no_tensor(name: str, tensor: str, value: Any):
    call, tensors, others = CALLS[name]
    call(**tensors, **others)
    with pytest.raises(
        TypeError, match=f"^{name}: {tensor} must be a tensor .*, got {type(value).__name__}$"
    ):
        call(**{**tensors, tensor: value}, **others)


@pytest.mark.parametrize("name", ["window_attention", "dense_attention", "routed_attention"])
def test_biases_that_are_no_tensors(name: str):
    call, tensors, others = CALLS[name]
    with pytest.raises(TypeError, match=f"{name}: bias must be a tensor .*, got str"):
        call(**tensors, **others, bias="relative")


def test_parts_that_are_no_tensors():
    lse = torch.rand(1, 8, 8, 2)
    with pytest.raises(TypeError, match="merge_attention: lses must be a list of tensors, got NoneType"):
        kernels.merge_attention([X], None)  # pyright: ignore
    with pytest.raises(TypeError, match="every one of outputs must be a tensor"):
        kernels.merge_attention([None], [lse])  # pyright: ignore


def test_heads_first_tensors_are_told_how_to_turn():
    tokens = torch.rand(2, 4, 49, 8)  # [B, heads, N, head_dim], as PyTorch's own attention takes them
    with pytest.raises(ValueError, match=r"got shape \(2, 4, 49, 8\); a sequence .* is x.transpose"):
        kernels.dense_attention(tokens, tokens, tokens)
    ours = tokens.transpose(1, 2)[:, None]
    expected = torch.nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)
    torch.testing.assert_close(kernels.dense_attention(ours, ours, ours)[:, 0].transpose(1, 2), expected)

    first = torch.rand(1, 4, 8, 8, 16)  # [B, heads, H, W, head_dim]
    turn = r"if q is heads-first, \[B, heads, H, W, head_dim\] is x.permute\(0, 2, 3, 1, 4\) here"
    with pytest.raises(ValueError, match=turn):
        kernels.neighborhood_attention(first, first, first, 7)
    with pytest.raises(ValueError, match=turn):
        kernels.window_attention(first, first, first, 4, bias=torch.rand(4, 7, 7))
    large = torch.rand(1, 4, 40, 40, 8)
    with pytest.warns(UserWarning, match="means a map of 4x40 with 40 heads; if it is heads-first"):
        kernels.window_attention(large, large, large, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernels.window_attention(*3 * (large.permute(0, 2, 3, 1, 4),), 4)
        kernels.dense_attention(*3 * (torch.rand(1, 1, 8, 8, 4),))  # a sequence with as many heads as tokens
