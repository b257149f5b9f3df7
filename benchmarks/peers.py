"""The peers of our kernels: PyTorch's attention, the published formulations, NATTEN."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.formulations.biformer import gathered_attention
from benchmarks.formulations.hat import (
    rolled_window_attention,
    shift_mask,
    unfolded_window_attention,
)
from benchmarks.formulations.windows import merge, window_heads
from visionattn.kernels.local.pattern import Axis, Pattern
from visionattn.kernels.local.reference import bias_of_pairs

Peer = Callable[..., Tensor]


def peers_of(case: Case, inputs: list[Tensor]) -> dict[str, Peer]:
    """The peers of a shape by name; each takes q, k, v and the bias `[B, H, W, heads, d]` as our kernel does.

    Masks and indices, which they prepare once and keep, are prepared here.
    """
    if case.kind == "routed":
        return {"gather, matmul-softmax-matmul": partial(_gathered, case)}
    peers: dict[str, Peer] = {"dense SDPA, mask": _dense(case.pattern, inputs)}
    if case.kind == "overlap":
        peers["unfold, matmul-softmax-matmul"] = _by_keyword(unfolded_window_attention, **case.options)
    if case.kind == "window" and case.side % case.options["window_size"] == 0:
        window, shift = case.options["window_size"], case.options.get("shift", 0)
        peers["partition, matmul-softmax-matmul"] = _by_keyword(
            rolled_window_attention, window_size=window, shift=(shift, shift)
        )
        peers["partition, SDPA"] = partial(_partitioned, case)
    if case.kind != "overlap":
        peers["flex_attention, compiled"] = _flex(case.pattern, inputs)
    if case.kind == "neighborhood":
        peers["NATTEN"] = partial(_natten, case)
        peers["dense SDPA, all pairs"] = _all_pairs
    return peers


def _by_keyword(formulation: Peer, **options: Any) -> Peer:
    """A formulation that takes its bias by name."""
    return lambda q, k, v, bias: formulation(q, k, v, bias=bias, **options)


def _gathered(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    region, indices = case.routing(q, k)
    return gathered_attention(q, k, v, indices, region, scale=case.head_dim**-0.5)


def _partitioned(case: Case, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Swin's roll and windows; the bias and the mask of a shift as one mask for PyTorch's fused attention."""
    batch, height, width, heads, _ = q.shape
    window, shift = case.options["window_size"], case.options.get("shift", 0)
    if shift:
        q, k, v = (x.roll((-shift, -shift), (1, 2)) for x in (q, k, v))
    q, k, v = (window_heads(x, window) for x in (q, k, v))
    place = torch.arange(window, device=q.device)
    offset = place - place[:, None] + window - 1
    mask = bias[:, offset[:, None, :, None], offset[None, :, None, :]].flatten(3, 4).flatten(1, 2)
    if shift:
        mask = mask + shift_mask(height, width, window, shift, q.device)[:, None].to(q.dtype)
        mask = mask.repeat(batch, 1, 1, 1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask if shift else mask[None])
    out = merge(out.transpose(1, 2).flatten(2).unflatten(0, (batch, -1)), (window, window), height, width)
    return (out.roll((shift, shift), (1, 2)) if shift else out).unflatten(-1, (heads, -1))


def _all_pairs(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Another function, without the pattern: the time of a fused dense kernel that takes no mask."""
    if bias is not None:
        raise RuntimeError("a bias would need all pairs written out")
    size = q.shape[1:3]
    q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).unflatten(1, size)


def _dense(pattern: Pattern, inputs: list[Tensor]) -> Peer:
    """PyTorch's attention over all pairs of pixels under a mask that is written out once."""
    q = inputs[0]
    axes = _visibility(pattern, q.device)
    visible = (axes[0][0][:, None, :, None] & axes[1][0][None, :, None, :]).flatten(2, 3).flatten(0, 1)
    mask = torch.zeros(visible.shape, dtype=q.dtype, device=q.device).masked_fill_(~visible, float("-inf"))

    def dense(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        total = mask
        if bias is not None:
            total = mask + bias_of_pairs(bias, pattern, *axes).flatten(3, 4).flatten(1, 2)
        k, v = (F.pad(x, pattern.padding) for x in (k, v))
        maps = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(*maps, attn_mask=total[(None,) * (4 - total.dim())])
        return out.transpose(1, 2).unflatten(1, q.shape[1:3])

    return dense


def _flex(pattern: Pattern, inputs: list[Tensor]) -> Peer:
    """PyTorch's flex_attention, compiled, with a block mask of the pattern and the bias as a score."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q = inputs[0]
    height, width = q.shape[1:3]

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return _sees(pattern.y, i // width, j // width) & _sees(pattern.x, i % width, j % width)

    def biased(bias: Tensor, score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        offsets = ((pattern.y, j // width - i // width), (pattern.x, j % width - i % width))
        y, x = (d.clamp(-axis.reach, axis.reach) + axis.reach for axis, d in offsets)
        return score + bias[h, y, x]

    # Too many masks for one function make the compiler give up, and PyTorch would compute all pairs.
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    blocks: list[Any] = []

    def flex(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        if not blocks:
            pixels = height * width
            blocks.append(create_block_mask(mask_mod, None, None, pixels, pixels, device=q.device.type))
        maps = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
        score = None if bias is None else partial(biased, bias)
        out = compiled(*maps, score_mod=score, block_mask=blocks[0])
        return out.transpose(1, 2).unflatten(1, (height, width))

    return flex


def _sees(axis: Axis, query: Tensor, key: Tensor) -> Tensor:
    """Whether a query sees a key of an undilated axis without zero keys, in arithmetic alone."""
    begin = (query + axis.window - axis.shift) // axis.window * axis.window + axis.shift - axis.window
    begin = begin - axis.before
    if axis.border == "clamp":
        begin = begin.clamp(0, axis.length - axis.key_window)
    return (key >= begin) & (key < begin + axis.key_window)


def _natten(case: Case, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    try:
        import natten  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise RuntimeError("NATTEN is not installed") from error
    if bias is not None:
        raise RuntimeError("NATTEN takes no bias")
    return natten.na2d(q, k, v, case.options["kernel_size"], stride=case.options.get("stride", 1))


def _visibility(pattern: Pattern, device: torch.device) -> list[tuple[Tensor, ...]]:
    """The visibility of all keys to all queries, as `Axis.visibility` gives it, for both axes."""
    found = []
    for axis in (pattern.y, pattern.x):
        before, behind = axis.key_padding
        queries = torch.arange(axis.length, device=device)
        found.append(axis.visibility(queries, torch.arange(-before, axis.length + behind, device=device)))
    return found
