"""The public dense attention function: argument checks and the choice of the implementation."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from visionattn.kernels.checks import check_dense_bias, check_maps
from visionattn.kernels.dense.library import DENSE_ATTENTION
from visionattn.kernels.grouped import grouped_heads
from visionattn.kernels.operator import leaf


@overload
def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@leaf
@grouped_heads(bias=0)
def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor | None]:
    """Softmax attention of every query to every key, `softmax(scale q kᵀ + bias) v`.

    A sequence of tokens is a map of height 1. Few keys for many queries, or the reverse, are no special case
    for the caller.

    Args:
        q: queries `[B, H, W, heads, d]`, any strides.
        k: keys `[B, height, width, heads, d]` of a map of any size, with more or fewer heads by any factor.
        v: values, as the keys.
        bias: added to the scaled logits, `[heads, H * W, height * width]`, with gradient.
        scale: multiplies q·k; `d ** -0.5` by default.
        return_lse: also return the natural log of the softmax denominator, differentiable.

    Returns:
        `[B, H, W, heads, d]`, contiguous; with `return_lse` also `[B, H, W, heads]`, at least float32.

    Raises:
        ValueError: shapes, devices or dtypes do not fit.
    """
    queries, keys = check_maps("dense_attention", q, k, v)
    if bias is not None:
        check_dense_bias("dense_attention", "bias", bias, (q.shape[3], queries, keys), q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, lse = DENSE_ATTENTION(q, k, v, bias, scale, return_lse)
    return out.contiguous() if lse is None else (out.contiguous(), lse.contiguous())
