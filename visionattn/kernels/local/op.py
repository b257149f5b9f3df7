"""The public local attention functions: argument checks, geometry, and the choice of the implementation.

All tensors are heads-last `[B, H, W, heads, head_dim]` and may be strided views of a packed projection; a 1-D
sequence is a map of height 1 with windows of height 1. A bias is either

- a relative table `[heads, 2 * reach_y + 1, 2 * reach_x + 1]`, entry `[h, reach_y + dy, reach_x + dx]` for
  key minus query = (dy, dx), with the reach of each function below, or
- dense, `[heads, nq, nk]`, over the queries and keys of one whole block in row-major order;

the shape tells which. It is added to the scaled logits and receives a gradient.

k and v may have more heads than q, or fewer, by any factor (`kernels/grouped.py`); a bias has the larger
number, or the smaller one where a group shares it, and the output the larger.

Neighborhood attention is there in one piece and in its two halves, the logits and the weighted sum, for
networks that do something else between them or make the weights in another way. The halves take maps with
equal numbers of heads.
"""

from __future__ import annotations

from typing import Literal, get_args, overload

from torch import Tensor

from visionattn.kernels.checks import check_bias, check_qkv, check_weights, heads_first_hint, pair
from visionattn.kernels.grouped import grouped_heads
from visionattn.kernels.local.library import (
    LOCAL_ATTENTION,
    NEIGHBORHOOD_AGGREGATION,
    NEIGHBORHOOD_SCORES,
)
from visionattn.kernels.local.pattern import (
    Border,
    Call,
    Pattern,
    grid_axis,
    neighborhood_axis,
    overlapping_axis,
    window_axis,
)
from visionattn.kernels.local.reference import bias_of_neighborhoods
from visionattn.kernels.operator import leaf

_BORDERS = get_args(Border)


@leaf
@grouped_heads(bias=0)
def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: int | tuple[int, int],
    *,
    shift: int | tuple[int, int] = 0,
    mask_shift: bool = True,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention inside non-overlapping windows (Swin, https://arxiv.org/abs/2103.14030).

    Windows are cut at the borders of the map, so any size works: a last, smaller window holds what remains.
    (Swin pads the map with zero pixels *before* the projection instead; do that where its numbers are
    wanted.)

    Args:
        q: queries `[B, H, W, heads, d]`.
        k: keys, same shape but for the number of heads.
        v: values, as the keys.
        window_size: side of a window in pixels, or (height, width).
        shift: windows begin at `shift + n * window_size`; Swin's cyclic roll by `-shift`.
        mask_shift: whether windows end at the border (Swin's mask). If False, the map is a torus.
        bias: relative table `[heads, 2 * height - 1, 2 * width - 1]` or dense `[heads, height * width,
            height * width]`.
        scale: multiplies q·k; `d ** -0.5` by default.

    Returns:
        `[B, H, W, heads, d]`, contiguous.

    Raises:
        ValueError: shapes, devices, window or bias do not fit.
    """
    height, width = check_qkv("window_attention", q, k, v)
    window, shift = pair("window_size", window_size), pair("shift", shift, minimum=0)
    shift_y, shift_x = shift[0] % window[0], shift[1] % window[1]
    if (shift_y or shift_x) and not mask_shift:
        q, k, v = (t.roll((-shift_y, -shift_x), (1, 2)) for t in (q, k, v))
        out = window_attention(q, k, v, window, bias=bias, scale=scale)
        return out.roll((shift_y, shift_x), (1, 2))
    pattern = Pattern(window_axis(height, window[0], shift_y), window_axis(width, window[1], shift_x))
    return _local_attention("window_attention", q, k, v, pattern, bias, scale)[0]


@leaf
@grouped_heads(bias=0)
def overlapping_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: int | tuple[int, int],
    overlap: int | tuple[int, int],
    *,
    border: Border = "zero",
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Windows of queries over larger, concentric windows of keys.

    HAT's overlapping cross-attention (https://arxiv.org/abs/2205.04437) and halo attention
    (https://arxiv.org/abs/2103.12731).

    Args:
        q: queries `[B, H, W, heads, d]`.
        k: keys, same shape but for the number of heads.
        v: values, as the keys.
        window_size: side of a query window in pixels, or (height, width).
        overlap: pixels by which the key window reaches beyond the query window on every side, or (y, x).
        border: keys beyond the map: `"zero"`, zero keys and values that take part in the softmax with their
            bias (HAT, timm's HaloNet); `"mask"`, absent; `"clamp"`, the key window moves inwards.
        bias: dense `[heads, nq, nk]`, nq and nk being the pixels of the query and the key window, or a
            relative table with a reach of `window - 1 + overlap` (`"clamp"`: `window - 1 + 2 * overlap`) on
            each axis.
        scale: multiplies q·k; `d ** -0.5` by default.

    Returns:
        `[B, H, W, heads, d]`, contiguous.

    Raises:
        ValueError: shapes, devices, window, overlap or bias do not fit; `"clamp"` on a map smaller than the
            key window.
    """
    height, width = check_qkv("overlapping_window_attention", q, k, v)
    window, overlap = pair("window_size", window_size), pair("overlap", overlap, minimum=0)
    if border not in _BORDERS:
        raise ValueError(f"border={border!r} is unknown; choose one of {', '.join(_BORDERS)}")
    y, x = (overlapping_axis(size, w, o, border) for size, w, o in zip((height, width), window, overlap))
    for name, axis in (("height", y), ("width", x)):
        if border == "clamp" and axis.length < axis.key_window:
            raise ValueError(
                f"border='clamp' needs a {name} of at least window + 2 * overlap = {axis.key_window}, "
                f"got {axis.length}; pad the map or choose 'zero' or 'mask'"
            )
    return _local_attention("overlapping_window_attention", q, k, v, Pattern(y, x), bias, scale)[0]


@leaf
@grouped_heads(bias=0)
def grid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid_size: int | tuple[int, int],
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention among pixels that lie evenly spread over the whole map (MaxViT's grid,
    https://arxiv.org/abs/2204.01697).

    Every pixel sees a grid of `grid_size` by `grid_size` pixels, `ceil(side / grid_size)` apart. On sides
    that the grid does not divide, some grids have fewer pixels.

    Args:
        q: queries `[B, H, W, heads, d]`.
        k: keys, same shape but for the number of heads.
        v: values, as the keys.
        grid_size: pixels per side of a grid, or (height, width).
        bias: relative table `[heads, 2 * height - 1, 2 * width - 1]` in grid steps or dense `[heads, height *
            width, height * width]`.
        scale: multiplies q·k; `d ** -0.5` by default.

    Returns:
        `[B, H, W, heads, d]`, contiguous.

    Raises:
        ValueError: shapes, devices, grid or bias do not fit.
    """
    sides, grid = check_qkv("grid_attention", q, k, v), pair("grid_size", grid_size)
    y, x = (grid_axis(side, size) for side, size in zip(sides, grid))
    return _local_attention("grid_attention", q, k, v, Pattern(y, x), bias, scale)[0]


@overload
def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: int | tuple[int, int],
    *,
    stride: int | tuple[int, int] = ...,
    dilation: int | tuple[int, int] = ...,
    is_causal: bool | tuple[bool, bool] = ...,
    bias: Tensor | None = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: int | tuple[int, int],
    *,
    stride: int | tuple[int, int] = ...,
    dilation: int | tuple[int, int] = ...,
    is_causal: bool | tuple[bool, bool] = ...,
    bias: Tensor | None = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@leaf
@grouped_heads(bias=0)
def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: int | tuple[int, int],
    *,
    stride: int | tuple[int, int] = 1,
    dilation: int | tuple[int, int] = 1,
    is_causal: bool | tuple[bool, bool] = False,
    bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every pixel to its nearest `kernel_size` by `kernel_size` pixels.

    Neighborhood attention (https://arxiv.org/abs/2204.07143), dilated (https://arxiv.org/abs/2209.15001) and
    strided (https://arxiv.org/abs/2504.16922). At a border the neighborhood moves inwards: unless causal,
    every query has all its keys. An even kernel has one key more before the query than behind it.

    Args:
        q: queries `[B, H, W, heads, d]`.
        k: keys, same shape but for the number of heads.
        v: values, as the keys.
        kernel_size: keys per side, or (height, width).
        stride: side of a block of queries that share their keys, or (y, x); at most the kernel size.
        dilation: pixels from one key to the next, or (y, x); a query sees pixels of its own residue only.
        is_causal: whether keys behind the query are absent, for both axes or (y, x).
        bias: relative table `[heads, 2 * height - 1, 2 * width - 1]` of the kernel, in steps of `dilation`,
            or dense `[heads, stride_y * stride_x, height * width]` over a block of queries and its keys.
        scale: multiplies q·k; `d ** -0.5` by default.
        return_lse: also return the natural log of the softmax denominator, differentiable.

    Returns:
        `[B, H, W, heads, d]`, contiguous; with `return_lse` also `[B, H, W, heads]`, at least float32.

    Raises:
        ValueError: shapes, devices or bias do not fit, a stride above the kernel size, or a map smaller than
            `kernel_size * dilation`.
    """
    name = "neighborhood_attention"
    pattern = _neighborhood(name, check_qkv(name, q, k, v), kernel_size, stride, dilation, is_causal, q)
    out, lse = _local_attention(name, q, k, v, pattern, bias, scale, return_lse)
    return out if lse is None else (out, lse)


@leaf
def neighborhood_scores(
    q: Tensor,
    k: Tensor,
    kernel_size: int | tuple[int, int],
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    dilation: int | tuple[int, int] = 1,
    is_causal: bool | tuple[bool, bool] = False,
    scale: float | None = None,
) -> Tensor:
    """Logits of every pixel and its neighborhood: the first half of `neighborhood_attention`.

    `neighborhood_aggregation(neighborhood_scores(q, k, n).softmax(-1), v, n)` is that attention.

    Args:
        q: queries `[B, H, W, heads, d]`.
        k: keys, same shape.
        kernel_size: keys per side, or (height, width).
        bias: as in `neighborhood_attention`.
        stride: as in `neighborhood_attention`, and so the next three.
        dilation: pixels from one key to the next, or (y, x).
        is_causal: whether keys behind the query are absent, for both axes or (y, x).
        scale: multiplies q·k; `d ** -0.5` by default.

    Returns:
        `[B, H, W, heads, height * width]`, contiguous, the keys of a pixel in row-major order; -inf for keys
        that causality hides.

    Raises:
        ValueError: what `neighborhood_attention` raises it for.
    """
    name = "neighborhood_scores"
    pattern = _neighborhood(name, check_qkv(name, q, k, k), kernel_size, stride, dilation, is_causal, q)
    if bias is not None:
        _check_bias(name, bias, q.shape[3], q, pattern)
    scores = NEIGHBORHOOD_SCORES(q, k, pattern, q.shape[-1] ** -0.5 if scale is None else scale)
    return scores if bias is None else scores + bias_of_neighborhoods(bias, pattern).to(scores.dtype)


@leaf
def neighborhood_aggregation(
    weights: Tensor,
    v: Tensor,
    kernel_size: int | tuple[int, int],
    *,
    stride: int | tuple[int, int] = 1,
    dilation: int | tuple[int, int] = 1,
    is_causal: bool | tuple[bool, bool] = False,
) -> Tensor:
    """Sum the values of every pixel's neighborhood by given weights.

    The second half of `neighborhood_attention`, and by itself a convolution whose kernel is another at every
    pixel (OverLoCK, https://arxiv.org/abs/2502.20087). At a border the neighborhood moves inwards.

    Args:
        weights: `[B, H, W, heads, height * width]`, the keys of a pixel in row-major order; those of keys
            that causality hides are not read.
        v: values `[B, H, W, heads, d]`.
        kernel_size: keys per side, or (height, width).
        stride: side of a block of queries that share their keys, or (y, x); at most the kernel size.
        dilation: pixels from one key to the next, or (y, x).
        is_causal: whether keys behind the query are absent, for both axes or (y, x).

    Returns:
        `[B, H, W, heads, d]`, contiguous.

    Raises:
        ValueError: shapes, devices or dtypes do not fit, a stride above the kernel size, or a map smaller
            than `kernel_size * dilation`.
    """
    name, (rows, columns) = "neighborhood_aggregation", pair("kernel_size", kernel_size)
    sides = check_weights(name, weights, v, rows * columns)
    pattern = _neighborhood(name, sides, kernel_size, stride, dilation, is_causal)
    return NEIGHBORHOOD_AGGREGATION(v, weights, pattern)


@leaf
def neighborhood_bias(
    bias: Tensor,
    size: tuple[int, int],
    kernel_size: int | tuple[int, int],
    *,
    stride: int | tuple[int, int] = 1,
    dilation: int | tuple[int, int] = 1,
    is_causal: bool | tuple[bool, bool] = False,
) -> Tensor:
    """Write out the bias of every pixel and its neighborhood, for logits that are made in another way.

    Args:
        bias: a relative table or a dense bias, as in `neighborhood_attention`.
        size: (H, W) of the map.
        kernel_size: keys per side, or (height, width).
        stride: as in `neighborhood_attention`, and so the next two.
        dilation: pixels from one key to the next, or (y, x).
        is_causal: whether keys behind the query are absent, for both axes or (y, x).

    Returns:
        `[H, W, heads, height * width]`, which is added to what `neighborhood_scores` returns.

    Raises:
        ValueError: a bias of another shape, a stride above the kernel size, or a map smaller than
            `kernel_size * dilation`.
    """
    name = "neighborhood_bias"
    pattern = _neighborhood(name, size, kernel_size, stride, dilation, is_causal)
    _check_bias(name, bias, bias.shape[0] if bias.dim() else 1, bias, pattern)
    return bias_of_neighborhoods(bias, pattern)


def _neighborhood(
    name: str,
    sides: tuple[int, int],
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int],
    dilation: int | tuple[int, int],
    is_causal: bool | tuple[bool, bool],
    q: Tensor | None = None,
) -> Pattern:
    """The pattern of a neighborhood operator on a map of these sides."""
    kernel = pair("kernel_size", kernel_size)
    strides, dilations = pair("stride", stride), pair("dilation", dilation)
    causal = pair("is_causal", is_causal, minimum=0)
    for side, size, n, t, e in zip(("height", "width"), sides, kernel, strides, dilations):
        if t > n:
            raise ValueError(f"{name}: stride {t} is above kernel_size {n} ({side}); it must be at most that")
        if n * e > size:
            raise ValueError(
                f"{name}: kernel_size {n} with dilation {e} needs a {side} of at least {n * e}, got {size}; "
                f"pad the map by {n * e - size} pixels or choose a smaller kernel or dilation"
                f"{'' if q is None else heads_first_hint(q)}"
            )
    y, x = (
        neighborhood_axis(*numbers) for numbers in zip(sides, kernel, strides, dilations, map(bool, causal))
    )
    return Pattern(y, x)


def _check_bias(name: str, bias: Tensor, heads: int, q: Tensor, pattern: Pattern) -> None:
    check_bias(name, bias, q, (heads, *pattern.table_shape), (heads, *pattern.dense_shape))


def _local_attention(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    bias: Tensor | None,
    scale: float | None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    if bias is not None:
        _check_bias(name, bias, q.shape[3], q, pattern)
    call = Call(pattern, bias, q.shape[-1] ** -0.5 if scale is None else scale, return_lse)
    out, lse = LOCAL_ATTENTION(q, k, v, call)
    return out.contiguous(), None if lse is None else lse.contiguous()
