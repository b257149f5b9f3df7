"""The public local attention functions: argument checks, geometry, and the choice of the implementation.

All tensors are heads-last `[B, H, W, heads, head_dim]` and may be strided views of a packed projection; a 1-D
sequence is a map of height 1 with windows of height 1. A bias is either

- a relative table `[heads, 2 * reach_y + 1, 2 * reach_x + 1]`, entry `[h, reach_y + dy, reach_x + dx]` for
  key minus query = (dy, dx), with the reach of each function below, or
- dense, `[heads, nq, nk]`, over the queries and keys of one whole block in row-major order;

the shape tells which. It is added to the scaled logits and receives a gradient.
"""

from __future__ import annotations

from typing import get_args

from torch import Tensor

from ..checks import check_bias, check_qkv, pair
from ..dispatch import Operator
from . import pytorch, reference
from .pattern import Axis, Border, Pattern

LOCAL_ATTENTION = Operator("local_attention", reference.local_attention, pytorch.local_attention)


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
        k: keys, same shape.
        v: values, same shape.
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
    pattern = Pattern(Axis(height, window[0], shift_y), Axis(width, window[1], shift_x))
    return _local_attention("window_attention", q, k, v, pattern, bias, scale)


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
        k: keys, same shape.
        v: values, same shape.
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
    if border not in get_args(Border):
        raise ValueError(f"border={border!r} is unknown; choose one of {', '.join(get_args(Border))}")
    y, x = (Axis(size, w, 0, o, border) for size, w, o in zip((height, width), window, overlap))
    for name, axis in (("height", y), ("width", x)):
        if border == "clamp" and axis.length < axis.key_window:
            raise ValueError(
                f"border='clamp' needs a {name} of at least window + 2 * overlap = {axis.key_window}, "
                f"got {axis.length}; pad the map or choose 'zero' or 'mask'"
            )
    return _local_attention("overlapping_window_attention", q, k, v, Pattern(y, x), bias, scale)


def _local_attention(
    name: str, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, bias: Tensor | None, scale: float | None
) -> Tensor:
    if bias is not None:
        heads = q.shape[3]
        check_bias(name, bias, q, (heads, *pattern.table_shape), (heads, *pattern.dense_shape))
    return LOCAL_ATTENTION(
        q, k, v, pattern, bias, q.shape[-1] ** -0.5 if scale is None else scale
    ).contiguous()
