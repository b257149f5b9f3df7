"""Fused linear attention: sums over pixels, and products of pixels with such sums, forward and backward.

Two kernels make both passes. `sum_kernel` adds outer products of two maps over the pixels; pixels are split
over programs, whose parts are added in one order: no atomics, equal inputs give equal bits. `apply_kernel`
multiplies the pixels of a map by such a sum. Everything runs in float32 from the load on. This file is
imported only when a kernel runs.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionattn.kernels.dense.fused.attention import num_programs, place, split_rows
from visionattn.kernels.triton_rows import equally_strided, store_rows


@triton.jit
def load_part(base, offset, valid, first, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Some of the numbers of vectors, `[rows, BLOCK]` float32, zero where there are none."""
    dim = first + tl.arange(0, BLOCK)
    mask = valid[:, None] & (dim < HEAD_DIM)[None, :]
    return tl.load(base + offset[:, None] + dim[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_vector(base, first, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Some of the numbers of one float32 vector."""
    dim = first + tl.arange(0, BLOCK)
    return tl.load(base + dim, mask=dim < HEAD_DIM, other=0.0)


@triton.jit
def sum_kernel(
    a,
    b,
    center,
    factor,
    slope,
    products,
    sums,
    stride_ab,
    stride_an,
    stride_ah,
    stride_bb,
    stride_bn,
    stride_bh,
    heads,
    pixels,
    per_split,
    images,
    CENTERED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`Σ (a - center) (factor b)ᵀ` and `Σ slope a` over one split of the pixels: one tile of the products."""
    tiles = tl.cdiv(HEAD_DIM, BLOCK_D)
    program = tl.program_id(0)
    row, column = program // tiles % tiles * BLOCK_D, program % tiles * BLOCK_D
    image = program // (tiles * tiles)
    batch, head = (image // heads).to(tl.int64), image % heads
    split = tl.program_id(1)
    a += batch * stride_ab + head * stride_ah
    b += batch * stride_bb + head * stride_bh
    place_of_image = batch * pixels * heads

    acc = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_D], tl.float32)
    for start in range(split * per_split, tl.minimum((split + 1) * per_split, pixels), BLOCK_N):
        pixel = start + tl.arange(0, BLOCK_N)
        valid = pixel < pixels
        left = load_part(a, pixel * stride_an, valid, row, HEAD_DIM, BLOCK_D)
        right = load_part(b, pixel * stride_bn, valid, column, HEAD_DIM, BLOCK_D)
        if WEIGHTED:
            where = place_of_image + pixel * heads + head
            total += tl.sum(left * tl.load(slope + where, mask=valid, other=0.0)[:, None], 0)
            right *= tl.load(factor + where, mask=valid, other=0.0)[:, None]
        else:
            total += tl.sum(left, 0)
        if CENTERED:
            left -= load_vector(center + image * HEAD_DIM, row, HEAD_DIM, BLOCK_D)[None, :]
        acc = tl.dot(tl.trans(left), right, acc, input_precision=PRECISION)

    part = (split * images * heads + image).to(tl.int64) * HEAD_DIM
    rows, columns = row + tl.arange(0, BLOCK_D), column + tl.arange(0, BLOCK_D)
    mask = (rows < HEAD_DIM)[:, None] & (columns < HEAD_DIM)[None, :]
    tl.store(products + part * HEAD_DIM + rows[:, None] * HEAD_DIM + columns[None, :], acc, mask=mask)
    if column == 0:
        tl.store(sums + part + rows, total, mask=rows < HEAD_DIM)


@triton.jit
def apply_kernel(
    x,
    q,
    products,
    sums,
    center,
    base,
    factor,
    slope,
    out,
    stride_xb,
    stride_xn,
    stride_xh,
    stride_qb,
    stride_qn,
    stride_qh,
    stride_in,
    stride_out,
    eps,
    floor,
    heads,
    pixels,
    CENTERED: tl.constexpr,
    BASED: tl.constexpr,
    DIVIDED: tl.constexpr,
    GRADIENT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_I: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`(x - center) products + base` for one tile of pixels, with strides of the products of either order.

    `DIVIDED`: over `n = max(q sums + eps, floor)`. `GRADIENT`: x is that of such an output; the result is the
    gradient of q, and `factor = 1 / n` and `slope`, the gradient of q sums, are kept.
    """
    batch, head, row, valid = place(tl.program_id(0), heads, pixels, BLOCK_N)
    x += batch * stride_xb + head * stride_xh
    image = batch * heads + head
    columns = tl.arange(0, BLOCK_D)

    acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for first in range(0, HEAD_DIM, BLOCK_I):
        part = load_part(x, row * stride_xn, valid, first, HEAD_DIM, BLOCK_I)
        if CENTERED:
            part -= load_vector(center + image * HEAD_DIM, first, HEAD_DIM, BLOCK_I)[None, :]
        rows = first + tl.arange(0, BLOCK_I)
        tile = tl.load(
            products
            + image * HEAD_DIM * HEAD_DIM
            + rows[:, None] * stride_in
            + columns[None, :] * stride_out,
            mask=(rows < HEAD_DIM)[:, None] & (columns < HEAD_DIM)[None, :],
            other=0.0,
        )
        acc = tl.dot(part, tile, acc, input_precision=PRECISION)
    where = row * heads + head + batch * pixels * heads
    if DIVIDED:
        total = load_vector(sums + image * HEAD_DIM, 0, HEAD_DIM, BLOCK_D)
        query = load_part(
            q + batch * stride_qb + head * stride_qh, row * stride_qn, valid, 0, HEAD_DIM, BLOCK_D
        )
        denominator = tl.sum(query * total[None, :], 1) + eps
        inverse = 1.0 / tl.maximum(denominator, floor)
        if GRADIENT:
            rate = tl.sum(query * acc, 1) * (inverse * inverse * -1.0)
            rate = tl.where(denominator >= floor, rate, 0.0)
            tl.store(factor + where, inverse, mask=valid)
            tl.store(slope + where, rate, mask=valid)
            acc = acc * inverse[:, None] + rate[:, None] * total[None, :]
        else:
            acc *= inverse[:, None]
    if BASED:
        acc += load_vector(base + image * HEAD_DIM, 0, HEAD_DIM, BLOCK_D)[None, :]
    out += batch * pixels * heads * HEAD_DIM
    store_rows(out, (row * heads + head) * HEAD_DIM, valid, acc, HEAD_DIM, BLOCK_D)


def forward(
    q: Tensor, k: Tensor, v: Tensor, normalize: str, scale: float, eps: float, floor: float
) -> Tensor:
    """Output `[B, H, W, heads, d]`; arguments as in `op.py`."""
    size = q.shape[1:3]
    q, k, v = equally_strided(*(x.flatten(1, 2) for x in (q, k, v)))
    products, sums, means = _state(k, v, normalize, scale)
    out = _apply(q, products, base=means[1], query=q, sums=sums, eps=eps, floor=floor)
    return out.unflatten(1, size)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, normalize: str, scale: float, eps: float, floor: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, contiguous; arguments as in `op.py`."""
    size = q.shape[1:3]
    q, k, v = equally_strided(*(x.flatten(1, 2) for x in (q, k, v)))
    # The gradient of a sum is an expanded number.
    grad = grad.contiguous().flatten(1, 2)
    products, sums, means = _state(k, v, normalize, scale)
    rows = mean = None
    if normalize == "sum":
        rows = [torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) for _ in range(2)]
    elif normalize == "injective":
        mean = grad.mean(1, dtype=torch.float32)
    grad_q = _apply(grad, products.mT, query=q, sums=sums, eps=eps, floor=floor, rows=rows)
    products, sums = _sum(q, grad, _factor(normalize, scale, q), rows=rows)
    grad_k = _apply(v, products.mT, center=means[1], base=sums if rows else None)
    grad_v = _apply(k, products, center=means[0], base=mean)
    return tuple(x.unflatten(1, size) for x in (grad_q, grad_k, grad_v))  # type: ignore[return-value]


def _state(
    k: Tensor, v: Tensor, normalize: str, scale: float
) -> tuple[Tensor, Tensor | None, tuple[Tensor | None, Tensor | None]]:
    """What all queries share: products `[B, heads, d, d]`, the scale in them; for "sum" also the sum of the
    keys `[B, heads, d]`, for "injective" the means of keys and values."""
    means = None, None
    if normalize == "injective":
        means = k.mean(1, dtype=torch.float32), v.mean(1, dtype=torch.float32)
    products, sums = _sum(k, v, _factor(normalize, scale, k), center=means[0])
    return products, sums if normalize == "sum" else None, means


def _factor(normalize: str, scale: float, x: Tensor) -> float:
    return scale / x.shape[1] if normalize == "injective" else scale


def _sum(
    a: Tensor, b: Tensor, scale: float, center: Tensor | None = None, rows: list[Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """`scale Σ (a - center) (rows[0] b)ᵀ` and `scale Σ rows[1] a` over the pixels of `[B, N, heads, d]`."""
    images, pixels, heads, dim = a.shape
    options = launch_options(a, "sum")
    options |= {"CENTERED": center is not None, "WEIGHTED": rows is not None}
    programs = images * heads * triton.cdiv(dim, options["BLOCK_D"]) ** 2
    splits, per_split = split_rows(programs, pixels, options["BLOCK_N"])
    products = torch.empty(splits, images, heads, dim, dim, dtype=torch.float32, device=a.device)
    sums = torch.empty(splits, images, heads, dim, dtype=torch.float32, device=a.device)
    factor, slope = rows or (sums, sums)
    sum_kernel[(programs, splits)](
        a,
        b,
        sums if center is None else center,
        factor,
        slope,
        products,
        sums,
        **dict(zip(("stride_ab", "stride_an", "stride_ah"), a.stride())),
        **dict(zip(("stride_bb", "stride_bn", "stride_bh"), b.stride())),
        heads=heads,
        pixels=pixels,
        per_split=per_split,
        images=images,
        **options,
    )
    return products.sum(0).mul_(scale), sums.sum(0).mul_(scale)


def _apply(
    x: Tensor,
    products: Tensor,
    *,
    center: Tensor | None = None,
    base: Tensor | None = None,
    query: Tensor | None = None,
    sums: Tensor | None = None,
    eps: float = 0.0,
    floor: float = 0.0,
    rows: list[Tensor] | None = None,
) -> Tensor:
    """`(x - center) products + base` as `[B, N, heads, d]`, over a denominator where there are `sums`."""
    pixels, heads = x.shape[1:3]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    query = x if query is None else query
    factor, slope = rows or (out, out)
    options = launch_options(x, "apply")
    options |= {"CENTERED": center is not None, "BASED": base is not None}
    options |= {"DIVIDED": sums is not None, "GRADIENT": rows is not None}
    apply_kernel[(num_programs(x, options["BLOCK_N"]),)](
        x,
        query,
        products,
        products if sums is None else sums,
        products if center is None else center,
        products if base is None else base,
        factor,
        slope,
        out,
        **dict(zip(("stride_xb", "stride_xn", "stride_xh"), x.stride())),
        **dict(zip(("stride_qb", "stride_qn", "stride_qh"), query.stride())),
        **dict(zip(("stride_in", "stride_out"), products.stride()[2:])),
        eps=eps,
        floor=floor,
        heads=heads,
        pixels=pixels,
        **options,
    )
    return out


def launch_options(x: Tensor, kernel: Literal["sum", "apply"], exact: bool | None = None) -> dict[str, Any]:
    """Tiles, warps and precision for these vectors `[B, N, heads, d]`; the tests assert that the compiled
    kernels keep their numbers in registers."""
    dim = max(16, triton.next_power_of_2(x.shape[3]))
    if exact is None:
        exact = x.dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32
    options: dict[str, Any] = {
        "HEAD_DIM": x.shape[3],
        # The numbers of half precision are exact in TF32.
        "PRECISION": "ieee" if exact else "tf32",
        "num_stages": 1 if exact or dim > 64 else 2,
    }
    if kernel == "sum":
        # Products in float32 do not run on matrix units and take registers for their operands.
        rows, warps = (32, 8) if x.dtype == torch.float32 else (64, 4)
        return {**options, "BLOCK_D": min(dim, 64), "BLOCK_N": rows, "num_warps": warps}
    rows = 64 if dim <= 64 else 32
    return {**options, "BLOCK_D": dim, "BLOCK_N": rows, "BLOCK_I": min(dim, 32), "num_warps": 4}
