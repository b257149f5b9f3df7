"""The public routed attention function: argument checks and the choice of the implementation."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from visionattn.kernels.checks import check_maps, pair
from visionattn.kernels.grouped import grouped_heads
from visionattn.kernels.operator import leaf
from visionattn.kernels.routed.call import Call
from visionattn.kernels.routed.checks import check_pair_bias, checked_counts, checked_lists, num_regions
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
    query_region_size: int | tuple[int, int] | None = ...,
    counts: Tensor | None = ...,
    return_lse: Literal[False] = ...,
    distinct: bool = ...,
    full: bool = ...,
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
    query_region_size: int | tuple[int, int] | None = ...,
    counts: Tensor | None = ...,
    return_lse: Literal[True],
    distinct: bool = ...,
    full: bool = ...,
) -> tuple[Tensor, Tensor]: ...


@leaf
@grouped_heads(indices=1, counts=1, bias=0)
def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    region_size: int | tuple[int, int],
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    query_region_size: int | tuple[int, int] | None = None,
    counts: Tensor | None = None,
    return_lse: bool = False,
    distinct: bool = False,
    full: bool = False,
) -> Tensor | tuple[Tensor, Tensor | None]:
    """Attention of each region of queries to the union of the regions on its list.

    The token level of BiFormer's bi-level routing (https://arxiv.org/abs/2303.08810), and of every other way
    to attend to a part of a map: the lists come from `topk_regions` or any other selector. All logits of a
    query are in one softmax.

    Args:
        q: queries `[B, H, W, heads, d]`.
        k: keys `[B, height, width, heads, d]`, of the same map or of one of another size, with more or
            fewer heads by any factor (`kernels/grouped.py`).
        v: values, as the keys.
        indices: `[B or 1, 1 or heads, query regions, topk]` integers: the key regions that each region of
            queries attends to, in row-major numbers; -1 is padding and may stand anywhere. A list of nothing
            but padding gives zeros and a log-sum-exp of -inf.
        region_size: side of a key region in pixels, or (height, width); a border region may be smaller.
        bias: added to the scaled logits, with gradient: relative table `[heads, 2 * H - 1, 2 * W - 1]`, entry
            `[h, H - 1 + dy, W - 1 + dx]` for key minus query = (dy, dx), where keys and queries are of one
            map; or dense `[heads, H * W, height * width]`.
        scale: multiplies q·k; `d ** -0.5` by default.
        query_region_size: side of a region of queries, or (height, width): what the rows of `indices` belong
            to; 1 is a list for every pixel. `region_size` by default.
        counts: `[B or 1, 1 or heads, key regions]` integers: only the first so many places of a key region,
            in row-major order, hold a key. The places of a region that the border cuts are numbered as if it
            were whole. All places by default.
        return_lse: also return the natural log of the softmax denominator, differentiable.
        distinct: promises lists of distinct, valid regions or padding, and counts that fit. Otherwise they
            are checked (on a GPU this waits for the device; `torch.vmap` over lists cannot do it).
        full: promises lists without padding, as `topk_regions` gives. Otherwise plain PyTorch looks for it,
            or, in a compiled graph, provides for it.

    Returns:
        `[B, H, W, heads, d]`, contiguous; with `return_lse` also `[B, H, W, heads]`.

    Raises:
        ValueError: shapes, devices or dtypes do not fit, an index or a count is out of range, or a list names
            a region twice, which would count its keys twice.
    """
    name = "routed_attention"
    check_maps(name, q, k, v)
    region = pair("region_size", region_size)
    query_region = region if query_region_size is None else pair("query_region_size", query_region_size)
    rows, regions = num_regions(q, query_region), num_regions(k, region)
    indices = checked_lists(name, "indices", indices, q, rows, regions, distinct)
    if counts is not None:
        counts = checked_counts(name, counts, q, regions, region[0] * region[1], distinct)
    if bias is not None:
        check_pair_bias(name, bias, q, k)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    call = Call(indices, counts, bias, query_region, region, scale, return_lse, full)
    out, lse = ROUTED_ATTENTION(q, k, v, call)
    return out.contiguous() if lse is None else (out.contiguous(), lse.contiguous())
