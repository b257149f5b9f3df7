"""Fused linear attention: sums over pixels, and products of pixels with such sums, forward and backward.

Two kernels make both passes. `sum_kernel` adds outer products of two maps over the pixels; pixels are split
over programs, whose parts are added in one order: no atomics, equal inputs give equal bits. `apply_kernel`
multiplies the pixels of a map by such a sum. Everything runs in float32 from the load on. This file is
imported only when a kernel runs.
"""

# Inside kernels, constants and shapes follow Triton's rules.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionattn.kernels.dense.fused.attention import Rows, Strides, num_programs, place, split_rows
from visionattn.kernels.triton_rows import equally_strided, store_rows


class Geometry(NamedTuple):
    """The numbers that both kernels take.

    Attributes:
        heads: attention heads.
        pixels: rows of the maps.
        per_split: pixels that one program adds up.
        images: the batch.
        strides_a: of the map that is summed, or multiplied.
        strides_b: of the other map of a sum; of the queries where there is a denominator.
        strides_products: of rows and columns of the products, in either order.
    """

    heads: int
    pixels: int
    per_split: int
    images: int
    strides_a: Strides
    strides_b: Strides
    strides_products: tuple[int, int]


class Form(NamedTuple):
    """The constants that a kernel is compiled for.

    Attributes:
        head_dim: width of a head.
        block_d: numbers of it that a tile holds.
        pixels: pixels of a tile.
        inner: numbers of a head that are multiplied at a time.
        precision: how products of float32 are computed.
    """

    head_dim: int
    block_d: int
    pixels: int
    inner: int
    precision: str


@triton.jit
def load_part(x, batch, head, rows, strides, first, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Load some of the numbers of vectors, `[rows, BLOCK]` float32, zero where there are none."""
    dim = first + tl.arange(0, BLOCK)
    mask = rows.valid[:, None] & (dim < HEAD_DIM)[None, :]
    x += batch * strides.b + head * strides.h
    return tl.load(x + (rows.number * strides.n)[:, None] + dim[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_vector(base, image, first, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Load some of the numbers of the float32 vector of a head of an image."""
    dim = first + tl.arange(0, BLOCK)
    return tl.load(base + image * HEAD_DIM + dim, mask=dim < HEAD_DIM, other=0.0)


@triton.jit
def sum_kernel(a, b, center, factor, slope, products, sums, g, FORM: tl.constexpr):
    """`Σ (a - center) (factor b)ᵀ` and `Σ slope a` over one split of the pixels: one tile of the products.

    Without a factor the sums are those of `b` and `a`.
    """
    tiles = tl.cdiv(FORM.head_dim, FORM.block_d)
    program = tl.program_id(0)
    row, column = program // tiles % tiles * FORM.block_d, program % tiles * FORM.block_d
    image = program // (tiles * tiles)
    batch, head = (image // g.heads).to(tl.int64), image % g.heads
    split = tl.program_id(1)

    acc = tl.zeros([FORM.block_d, FORM.block_d], tl.float32)
    total = tl.zeros([FORM.block_d], tl.float32)
    for start in range(split * g.per_split, tl.minimum((split + 1) * g.per_split, g.pixels), FORM.pixels):
        number = start + tl.arange(0, FORM.pixels)
        rows = Rows(number, number < g.pixels)
        left = load_part(a, batch, head, rows, g.strides_a, row, FORM.head_dim, FORM.block_d)
        right = load_part(b, batch, head, rows, g.strides_b, column, FORM.head_dim, FORM.block_d)
        if factor is not None:
            where = batch * g.pixels * g.heads + number * g.heads + head
            total += tl.sum(left * tl.load(slope + where, mask=rows.valid, other=0.0)[:, None], 0)
            right *= tl.load(factor + where, mask=rows.valid, other=0.0)[:, None]
        else:
            total += tl.sum(left, 0)
        if center is not None:
            left -= load_vector(center, image, row, FORM.head_dim, FORM.block_d)[None, :]
        acc = tl.dot(tl.trans(left), right, acc, input_precision=FORM.precision)

    part = (split * g.images * g.heads + image).to(tl.int64) * FORM.head_dim
    rows, columns = row + tl.arange(0, FORM.block_d), column + tl.arange(0, FORM.block_d)
    mask = (rows < FORM.head_dim)[:, None] & (columns < FORM.head_dim)[None, :]
    place = rows[:, None] * FORM.head_dim + columns[None, :]
    tl.store(products + part * FORM.head_dim + place, acc, mask=mask)
    if column == 0:
        tl.store(sums + part + rows, total, mask=rows < FORM.head_dim)


@triton.jit
def apply_kernel(x, q, products, sums, center, base, factor, slope, out, eps, floor, g, FORM: tl.constexpr):
    """`(x - center) products + base` for one tile of pixels.

    With sums: over `n = max(q sums + eps, floor)`. With factor and slope, x is the gradient of such an
    output; the result is that of q, and `factor = 1 / n` and `slope`, the gradient of q sums, are kept.
    """
    batch, head, rows = place(tl.program_id(0), g.heads, g.pixels, FORM.pixels)
    image = batch * g.heads + head
    columns = tl.arange(0, FORM.block_d)

    acc = tl.zeros([FORM.pixels, FORM.block_d], tl.float32)
    for first in range(0, FORM.head_dim, FORM.inner):
        part = load_part(x, batch, head, rows, g.strides_a, first, FORM.head_dim, FORM.inner)
        if center is not None:
            part -= load_vector(center, image, first, FORM.head_dim, FORM.inner)[None, :]
        inner = first + tl.arange(0, FORM.inner)
        pointers = products + image * FORM.head_dim * FORM.head_dim
        pointers += inner[:, None] * g.strides_products[0] + columns[None, :] * g.strides_products[1]
        mask = (inner < FORM.head_dim)[:, None] & (columns < FORM.head_dim)[None, :]
        acc = tl.dot(part, tl.load(pointers, mask=mask, other=0.0), acc, input_precision=FORM.precision)
    where = rows.number * g.heads + head + batch * g.pixels * g.heads
    if sums is not None:
        total = load_vector(sums, image, 0, FORM.head_dim, FORM.block_d)
        query = load_part(q, batch, head, rows, g.strides_b, 0, FORM.head_dim, FORM.block_d)
        denominator = tl.sum(query * total[None, :], 1) + eps
        inverse = 1.0 / tl.maximum(denominator, floor)
        if factor is not None:
            rate = tl.sum(query * acc, 1) * (inverse * inverse * -1.0)
            rate = tl.where(denominator >= floor, rate, 0.0)
            tl.store(factor + where, inverse, mask=rows.valid)
            tl.store(slope + where, rate, mask=rows.valid)
            acc = acc * inverse[:, None] + rate[:, None] * total[None, :]
        else:
            acc *= inverse[:, None]
    if base is not None:
        acc += load_vector(base, image, 0, FORM.head_dim, FORM.block_d)[None, :]
    store_rows(out, where * FORM.head_dim, rows.valid, acc, FORM.head_dim, FORM.block_d)


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
    """Sum over the keys, once for all queries: products `[B, heads, d, d]`, scaled; for "sum" also the sum of
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
    form = options["FORM"]
    programs = images * heads * triton.cdiv(dim, form.block_d) ** 2
    splits, per_split = split_rows(programs, pixels, form.pixels)
    products = torch.empty(splits, images, heads, dim, dim, dtype=torch.float32, device=a.device)
    sums = torch.empty(splits, images, heads, dim, dtype=torch.float32, device=a.device)
    g = geometry(a, b, per_split=per_split)
    sum_kernel[(programs, splits)](a, b, center, *(rows or (None, None)), products, sums, g, **options)
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
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    options = launch_options(x, "apply")
    g = geometry(x, x if query is None else query, products)
    factor, slope = rows or (None, None)
    apply_kernel[(num_programs(x, options["FORM"].pixels),)](
        x, query, products, sums, center, base, factor, slope, out, eps, floor, g, **options
    )
    return out


def geometry(a: Tensor, b: Tensor, products: Tensor | None = None, per_split: int = 0) -> Geometry:
    """The numbers that both kernels take, for maps `[B, N, heads, d]`."""
    images, pixels, heads, _ = a.shape
    strides = Strides(*a.stride()[:3]), Strides(*b.stride()[:3])
    places = (0, 0) if products is None else products.stride()[2:]
    return Geometry(heads, pixels, per_split, images, *strides, (places[0], places[1]))


def launch_options(x: Tensor, kernel: Literal["sum", "apply"], exact: bool | None = None) -> dict[str, Any]:
    """Tiles, warps and precision for these vectors `[B, N, heads, d]`; the tests assert that the compiled
    kernels keep their numbers in registers."""
    dim = max(16, triton.next_power_of_2(x.shape[3]))
    if exact is None:
        exact = x.dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32
    # The numbers of half precision are exact in TF32.
    precision = "ieee" if exact else "tf32"
    if kernel == "sum":
        # Products in float32 do not run on matrix units and take registers for their operands.
        rows, warps = (32, 8) if x.dtype == torch.float32 else (64, 4)
        form = Form(x.shape[3], min(dim, 64), rows, dim, precision)
    else:
        rows, warps = 64 if dim <= 64 else 32, 4
        form = Form(x.shape[3], dim, rows, min(dim, 32), precision)
    return {"FORM": form, "num_warps": warps, "num_stages": 1 if exact or dim > 64 else 2}
