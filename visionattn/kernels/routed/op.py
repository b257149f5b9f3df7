"""The public routed attention function: argument checks and the choice of the implementation."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from visionattn.kernels.checks import check_bias, check_qkv, pair
from visionattn.kernels.operator import leaf
from visionattn.kernels.routed.library import ROUTED_ATTENTION


@overload
def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    region_size: int | tuple[int, int],
    *,
    bias: Tensor | None = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    distinct: bool = ...,
) -> Tensor: ...


@overload
def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    region_size: int | tuple[int, int],
    *,
    bias: Tensor | None = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
    distinct: bool = ...,
) -> tuple[Tensor, Tensor]: ...


@leaf
def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    region_size: int | tuple[int, int],
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    distinct: bool = False,
) -> Tensor | tuple[Tensor, Tensor | None]:
    """Attention of each region of queries to the union of the regions on its list.

    The token level of BiFormer's bi-level routing (https://arxiv.org/abs/2303.08810); the lists come from
    `topk_regions` or any other selector. All logits of a query are in one softmax.

    Args:
        q: queries `[B, H, W, heads, d]`.
        k: keys, same shape.
        v: values, same shape.
        indices: `[B, 1 or heads, regions, topk]` integers: the regions that each region attends to, in
            row-major numbers; -1 is padding. A list of nothing but padding gives zeros and a log-sum-exp of
            -inf.
        region_size: side of a region in pixels, or (height, width); a border region may be smaller.
        bias: added to the scaled logits, with gradient: relative table `[heads, 2 * H - 1, 2 * W - 1]`, entry
            `[h, H - 1 + dy, W - 1 + dx]` for key minus query = (dy, dx), or dense `[heads, H * W, H * W]`.
        scale: multiplies q·k; `d ** -0.5` by default.
        return_lse: also return the natural log of the softmax denominator, differentiable.
        distinct: promises full lists of distinct, valid regions, as `topk_regions` gives. Otherwise the lists
            are checked (on a GPU this waits for the device; `torch.vmap` over lists cannot do it) and padding
            is looked for.

    Returns:
        `[B, H, W, heads, d]`, contiguous; with `return_lse` also `[B, H, W, heads]`.

    Raises:
        ValueError: shapes, devices or dtypes do not fit, an index is out of range, or a list names a region
            twice, which would count its keys twice.
    """
    height, width = check_qkv("routed_attention", q, k, v)
    region = pair("region_size", region_size)
    indices = _checked(indices, q, -(-height // region[0]) * -(-width // region[1]), distinct)
    if bias is not None:
        heads = q.shape[3]
        table, dense = (heads, 2 * height - 1, 2 * width - 1), (heads, height * width, height * width)
        check_bias("routed_attention", bias, q, table, dense)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, lse = ROUTED_ATTENTION(q, k, v, indices, bias, region, scale, return_lse, distinct)
    return out.contiguous() if lse is None else (out.contiguous(), lse.contiguous())


def _checked(indices: Tensor, q: Tensor, regions: int, distinct: bool) -> Tensor:
    """The lists, without repetitions."""
    batch, _, _, heads, _ = q.shape
    if indices.dim() != 4 or indices.shape[0] != batch or indices.shape[1] not in (1, heads):
        raise ValueError(
            f"routed_attention: indices must be [{batch}, 1 or {heads}, regions, topk], "
            f"got {tuple(indices.shape)}"
        )
    if indices.shape[2] != regions:
        raise ValueError(
            f"routed_attention: indices list {indices.shape[2]} regions, "
            f"the map has {regions} of this region_size"
        )
    if indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"routed_attention: indices must be int32 or int64, got {indices.dtype}")
    if indices.device != q.device:
        raise ValueError(f"routed_attention: indices are on {indices.device}, the queries are on {q.device}")
    if distinct or not indices.numel():
        return indices
    if torch.compiler.is_compiling():
        # A compiled graph cannot refuse a repetition; it counts once.
        repeated = (indices[..., :, None] == indices[..., None, :]).tril(-1).any(-1)
        return indices.masked_fill(repeated, -1)
    if indices.max() >= regions or indices.min() < -1:
        raise ValueError(f"routed_attention: indices must lie in -1 (padding) .. {regions - 1}")
    listed = indices.sort(-1).values
    if ((listed[..., 1:] == listed[..., :-1]) & (listed[..., 1:] >= 0)).any():
        raise ValueError("routed_attention: a list names a region twice, its keys would count twice")
    return indices
