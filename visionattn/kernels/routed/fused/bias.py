"""The gradient of the bias of routed attention, without atomics.

A program owns a pair of rows of the map (dense bias) or all pairs of rows of one distance (relative table),
a tile of their columns and a head. It adds the gradients of the logits over images and, for a table, over the
rows, in one order; the columns of a table are then summed along the diagonals of the tiles.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from visionattn.kernels.routed.fused.forward import bias_geometry, geometry, load_bias
from visionattn.kernels.triton_rows import LOG2_E, load_rows, padded_head_dim, precision


@triton.jit
def bias_kernel(
    q,
    k,
    v,
    listed,
    bias,
    lse,
    grad_out,
    delta,
    grad_bias,
    scale,
    batch,
    stride_b,
    stride_y,
    stride_x,
    stride_h,
    listed_stride_b,
    listed_stride_h,
    heads,
    height,
    width,
    region_h,
    region_w,
    regions_x,
    regions,
    bias_start,
    bias_stride_h,
    bias_stride_qy,
    bias_stride_qx,
    bias_stride_ky,
    bias_stride_kx,
    IS_TABLE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`grad_bias` `[heads, row pairs or distances, width, width]`: a tile of `BLOCK` by `BLOCK` columns."""
    tiles = tl.cdiv(width, BLOCK)
    program = tl.program_id(0)
    x = program % tiles * BLOCK + tl.arange(0, BLOCK)
    key_x = program // tiles % tiles * BLOCK + tl.arange(0, BLOCK)
    entry = program // (tiles * tiles)
    if IS_TABLE:
        entries = 2 * height - 1
        distance = entry % entries - (height - 1)
        first = tl.maximum(0, -distance)
        last = tl.minimum(height, height - distance)
    else:
        entries = height * height
        first = entry % entries // height
        last = first + 1
        distance = entry % entries % height - first
    head = entry // entries
    valid = x < width
    key_valid = key_x < width
    bias_of_head = head.to(tl.int64) * bias_stride_h
    listed += head * listed_stride_h

    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for step in range(batch * (last - first)):
        image = (step // (last - first)).to(tl.int64)
        y = first + step % (last - first)
        key_y = y + distance
        begin = image * stride_b + head * stride_h
        query = load_rows(q + begin, y * stride_y + x * stride_x, valid, HEAD_DIM, BLOCK_D)
        key = load_rows(k + begin, key_y * stride_y + key_x * stride_x, key_valid, HEAD_DIM, BLOCK_D)
        value = load_rows(v + begin, key_y * stride_y + key_x * stride_x, key_valid, HEAD_DIM, BLOCK_D)
        row = (y * width + x) * heads + head
        start = image * height * width * heads
        grad = load_rows(grad_out + start * HEAD_DIM, row * HEAD_DIM, valid, HEAD_DIM, BLOCK_D)
        norm = tl.load(lse + start + row, mask=valid, other=float("inf")) * LOG2_E
        drop = tl.load(delta + start + row, mask=valid, other=0.0)
        region = y // region_h * regions_x + x // region_w
        key_region = key_y // region_h * regions_x + key_x // region_w
        seen = tl.load(
            listed + image * listed_stride_b + region[:, None] * regions + key_region[None, :],
            mask=valid[:, None] & key_valid[None, :],
            other=0,
        )
        bias_of_row = bias_start + y * bias_stride_qy + x * bias_stride_qx
        bias_of_key = key_y * bias_stride_ky + key_x * bias_stride_kx
        logits = tl.dot(query, tl.trans(key), input_precision=PRECISION) * (scale * LOG2_E)
        logits += load_bias(bias + bias_of_head, bias_of_row, bias_of_key, valid, key_valid)
        weights = tl.exp2(tl.where(seen != 0, logits - norm[:, None], float("-inf")))
        grad_weights = tl.dot(grad, tl.trans(value), input_precision=PRECISION)
        acc += weights * (grad_weights - drop[:, None])
    place = grad_bias + entry.to(tl.int64) * width * width
    tl.store(place + x[:, None] * width + key_x[None, :], acc, mask=valid[:, None] & key_valid[None, :])


def bias_gradient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    bias: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    delta: Tensor,
    region: tuple[int, int],
    scale: float,
) -> Tensor:
    """The gradient of a table or of a dense bias, in its shape and dtype; the maps share their strides."""
    batch, height, width, heads, _ = q.shape
    is_table = bias.shape[1:] == (2 * height - 1, 2 * width - 1)
    entries = 2 * height - 1 if is_table else height * height
    sums = torch.empty((heads, entries, width, width), dtype=torch.float32, device=q.device)
    listed = listed_regions(indices)
    shape = {**geometry(q, indices, region), **bias_geometry(bias, q)}
    options = {name: value for name, value in shape.items() if name in bias_kernel.arg_names}
    options |= {
        "listed_stride_b": listed.stride(0),
        "listed_stride_h": listed.stride(1) if listed.shape[1] > 1 else 0,
        **bias_launch_options(q, is_table),
    }
    grid = (heads * entries * triton.cdiv(width, options["BLOCK"]) ** 2,)
    bias_kernel[grid](q, k, v, listed, bias, lse, grad_out, delta, sums, scale, batch, **options)
    if is_table:
        return _sum_of_diagonals(sums).to(bias.dtype)
    sums = sums.unflatten(1, (height, height)).transpose(2, 3)
    return sums.reshape(bias.shape).to(bias.dtype)


def bias_launch_options(q: Tensor, is_table: bool) -> dict[str, object]:
    """Tiles, warps and precision of `bias_kernel` for these shapes."""
    dim = padded_head_dim(q)
    single = q.dtype == torch.float32
    widest = 16 if dim > 128 else 32 if dim > 64 or single else 64
    return {
        "IS_TABLE": is_table,
        "HEAD_DIM": q.shape[4],
        "BLOCK_D": dim,
        "BLOCK": min(max(16, triton.next_power_of_2(q.shape[2])), widest),
        "PRECISION": precision(q),
        "num_warps": 8,
        "num_stages": 1,
    }


def listed_regions(indices: Tensor) -> Tensor:
    """Which region lists which `[B, lists, regions, regions]` int8, from lists with -1 for padding."""
    regions = indices.shape[2]
    listed = torch.zeros((*indices.shape[:3], regions + 1), dtype=torch.int8, device=indices.device)
    # The last column collects the padding and is cut off.
    where = torch.where(indices < 0, regions, indices).long()
    return listed.scatter_(3, where, 1)[..., :regions].contiguous()


def _sum_of_diagonals(tiles: Tensor) -> Tensor:
    """`[..., 2 * n - 1]` of `[..., n, n]`: entry `n - 1 + d` is the sum over all column - row = d."""
    n = tiles.shape[-1]
    # A row of 2n - 1 numbers is one shorter than a padded one: reading in such rows shifts each by one.
    rows = F.pad(tiles.flip(-2), (0, n)).flatten(-2)[..., : n * (2 * n - 1)]
    return rows.unflatten(-1, (n, 2 * n - 1)).sum(-2)
