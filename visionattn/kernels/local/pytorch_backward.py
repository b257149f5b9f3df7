"""First derivatives of local attention in plain PyTorch, tile by tile as the forward pass.

The weights are recomputed, so that training keeps nothing but the inputs. Gradients of keys are added by
whole rectangles and those of a bias table by products: the order of additions is fixed.
"""

from __future__ import annotations

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from .pattern import Pattern, Run, Span
from .pytorch import blocks_per_tile, by_groups, cat_tiles, run_biases, run_pixels, tiles, untile


def local_attention_backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and the bias.

    Args:
        grad: gradient of the output `[B, H, W, heads, d]`.
        grad_lse: gradient of the log-sum-exp `[B, H, W, heads]`, or None.
        q: queries, keys and values as the forward pass had them, likewise the other arguments.
        k: keys.
        v: values.
        pattern: the geometry.
        bias: table or dense, or None.
        scale: multiplies q·k.
    """
    maps = [grad, q, F.pad(k, pattern.padding), F.pad(v, pattern.padding)]
    maps += [] if grad_lse is None else [grad_lse[..., None]]
    wide = torch.promote_types(q.dtype, torch.float32)
    grad_bias = None if bias is None else torch.zeros_like(bias, dtype=wide)

    def attend_backward(group: Pattern, *args: Tensor) -> tuple[Tensor, ...]:
        return _tiles_backward(group, bias, grad_bias, scale, *args)

    dq, dk, dv = by_groups(pattern, maps, attend_backward)
    (top, _), (left, _) = pattern.y.key_padding, pattern.x.key_padding
    dk, dv = (t[:, top : top + q.shape[1], left : left + q.shape[2]] for t in (dk, dv))
    return dq, dk, dv, None if bias is None or grad_bias is None else grad_bias.to(bias.dtype)


def _tiles_backward(
    pattern: Pattern,
    bias: Tensor | None,
    grad_bias: Tensor | None,
    scale: float,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_lse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the maps of an undilated pattern; that of the bias is added to `grad_bias`."""
    runs_y, runs_x = (axis.runs(blocks_per_tile(axis)) for axis in (pattern.y, pattern.x))
    of_queries = [[(run, run.query) for run in runs] for runs in (runs_y, runs_x)]
    of_keys = [[(run, run.key) for run in runs] for runs in (runs_y, runs_x)]
    queries, grads = (tiles(t, *of_queries) for t in (q, grad))
    keys, values = (tiles(t, *of_keys) for t in (k, v))
    lse_grads = [None] * len(queries) if grad_lse is None else tiles(grad_lse, *of_queries)
    biases = run_biases(bias, pattern, runs_y, runs_x, q)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    parts = []
    operands = zip(queries, keys, values, biases, grads, lse_grads)
    for (y, x), operand in zip(product(runs_y, runs_x), operands):
        tile_dq, tile_dk, tile_dv, dlogits = _dense_backward(scale, *operand)
        parts.append((untile(tile_dq, q.shape[0], y, x),))
        _add_tiles(dk, tile_dk, y, x)
        _add_tiles(dv, tile_dv, y, x)
        if bias is not None and grad_bias is not None:
            _add_bias(grad_bias, bias, dlogits.sum(0, dtype=grad_bias.dtype), pattern, y, x)
    return cat_tiles(parts, len(runs_x))[0], dk, dv


def _dense_backward(
    scale: float,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    grad: Tensor,
    grad_lse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v `[N, heads, n, d]` and of the logits `[N, heads, nq, nk]`."""
    q = q * scale
    wide = torch.promote_types(q.dtype, torch.float32)
    logits = q @ k.transpose(-2, -1)
    weights = (logits if bias is None else logits + bias).softmax(-1, dtype=wide)
    dv = weights.to(grad.dtype).transpose(-2, -1) @ grad
    dweights = (grad @ v.transpose(-2, -1)).to(wide)
    shift = (weights * dweights).sum(-1, keepdim=True)
    dlogits = weights * (dweights - (shift if grad_lse is None else shift - grad_lse))
    rounded = dlogits.to(q.dtype)
    return (rounded @ k) * scale, rounded.transpose(-2, -1) @ q, dv, dlogits


def _add_tiles(target: Tensor, tile: Tensor, y: Run, x: Run) -> None:
    """Add rectangles of keys `[B * tiles, heads, pixels, d]`, which may overlap, to their map."""
    tile = tile.transpose(1, 2).unflatten(1, (y.key.length, x.key.length))
    tile = tile.unflatten(0, (target.shape[0], y.count, x.count))
    for rows, columns in product(_steps(y), _steps(x)):
        part = tile.narrow(3, rows.offset, rows.length).narrow(4, columns.offset, columns.length)
        place = target
        for dim, run, span in ((1, y, rows), (2, x, columns)):
            step = run.step if run.count > 1 else span.length
            place = place.narrow(dim, span.start, (run.count - 1) * step + span.length)
            place = place.unfold(dim, span.length, step)
        place += part.permute(0, 1, 2, 5, 6, 3, 4)


def _steps(run: Run) -> list[Span]:
    """The keys of a tile in pieces that do not overlap those of the next tile."""
    step = run.step if run.count > 1 else run.key.length
    return [
        Span(run.key.start + first, min(step, run.key.length - first), first)
        for first in range(0, run.key.length, step)
    ]


def _add_bias(grad_bias: Tensor, bias: Tensor, dlogits: Tensor, pattern: Pattern, y: Run, x: Run) -> None:
    """Add the gradient of a tile's logits `[heads, nq, nk]` to that of the table or the dense block."""
    dlogits = dlogits.unflatten(2, (y.key.length, -1)).unflatten(1, (y.query.length, -1))
    seen_y, seen_x = (
        axis.visibility(*run_pixels(run, axis, bias.device)) for axis, run in ((pattern.y, y), (pattern.x, x))
    )
    if bias.shape[1:] == pattern.table_shape:
        rows, columns = (
            F.one_hot((seen[1] + axis.reach).clamp(0, 2 * axis.reach), 2 * axis.reach + 1).to(dlogits.dtype)
            for axis, seen in ((pattern.y, seen_y), (pattern.x, seen_x))
        )
        by_row = torch.einsum("hqpkl,qky->hypl", dlogits, rows)
        grad_bias += torch.einsum("hypl,plx->hyx", by_row, columns)
        return
    blocks = grad_bias.unflatten(2, (pattern.y.key_window, -1)).unflatten(1, (pattern.y.window, -1))
    (_, _, query_y, key_y), (_, _, query_x, key_x) = seen_y, seen_x
    heads = torch.arange(bias.shape[0], device=bias.device)
    where = (
        heads.view(-1, 1, 1, 1, 1),
        query_y.view(-1, 1, 1, 1),
        query_x.view(-1, 1, 1),
        key_y.clamp(0, pattern.y.key_window - 1)[:, None, :, None],
        key_x.clamp(0, pattern.x.key_window - 1)[:, None, :],
    )
    blocks.index_put_(where, dlogits, accumulate=True)
