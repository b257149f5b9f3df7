"""Parts of all fused attention kernels: the vectors of a head, base-2 exponentials, and sizes of tiles.

Imported only when a kernel runs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


class Strides(NamedTuple):
    """The strides of maps `[B, H, W, heads, ...]`, in numbers; `y` and `x` from pixel to pixel."""

    b: int
    y: int
    x: int
    h: int


@triton.jit
def load_rows(base, offset, valid, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Vectors `[rows, BLOCK_D]` at these offsets, zero where not valid and beyond the head's width."""
    dim = tl.arange(0, BLOCK_D)
    mask = valid[:, None] if HEAD_DIM == BLOCK_D else valid[:, None] & (dim < HEAD_DIM)[None, :]
    return tl.load(base + offset[:, None] + dim[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(base, offset, valid, rows, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write what `load_rows` reads."""
    dim = tl.arange(0, BLOCK_D)
    mask = valid[:, None] if HEAD_DIM == BLOCK_D else valid[:, None] & (dim < HEAD_DIM)[None, :]
    tl.store(base + offset[:, None] + dim[None, :], rows.to(base.dtype.element_ty), mask=mask)


def equally_strided(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors themselves where they share strides and heads are dense, as views of a projection are."""
    strides = tensors[0].stride()
    if strides[-1] == 1 and all(x.stride() == strides for x in tensors):
        return tensors
    return tuple(x.contiguous() for x in tensors)


def padded_head_dim(q: Tensor) -> int:
    """The power of two that the kernels compute with for the heads of `q` `[..., d]`."""
    return max(16, triton.next_power_of_2(q.shape[-1]))


def precision(q: Tensor) -> str:
    """How products of float32 are computed: exactly, unless PyTorch is told that TF32 will do."""
    return "tf32" if q.dtype != torch.float32 or torch.backends.cuda.matmul.allow_tf32 else "ieee"


def tile_options(
    x: Tensor,
    rows: int,
    has_bias: bool = False,
    backward: bool = False,
    hip: bool = torch.version.hip is not None,
) -> dict[str, Any]:
    """Tiles, warps and precision for kernels whose programs own some of `rows` vectors of `x` `[..., d]`.

    `OWN` vectors are a program's own, `OTHERS` at a time are streamed. Chosen so that the compiled kernels
    keep their numbers in registers; the tests assert it.
    """
    dim = padded_head_dim(x)
    single = x.dtype == torch.float32
    # Products in float32 do not run on matrix units and take registers for their operands.
    widest = 32 if dim > 128 or single else 64
    own = min(max(16, triton.next_power_of_2(rows)), widest)
    if dim > 128 and not hip:
        warps = 8
    elif own < 64:
        warps = 4 if dim > 64 or single else 2
    else:
        warps = 4 if hip or dim <= (32 if backward else 64) else 8
    return {
        "HEAD_DIM": x.shape[-1],
        "BLOCK_D": dim,
        "OWN": own,
        # The places of a bias are held beside the logits.
        "OTHERS": 32 if dim > 64 or single or has_bias else 64,
        "PRECISION": precision(x),
        "num_warps": warps,
        "num_stages": 1 if dim > 64 or single else 2,
    }
