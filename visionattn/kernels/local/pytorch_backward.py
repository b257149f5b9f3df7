"""First derivatives of local attention in plain PyTorch, chunk by chunk as the forward pass.

The weights are recomputed, so that training keeps nothing but the inputs. Gradients of keys are added tile by
tile and those of a bias table by products: the order of additions is fixed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..precision import without_autocast
from .chunks import (
    Band,
    as_tiles,
    band_biases,
    bands,
    chunks,
    key_tiles,
    put_key_tiles,
    query_tiles,
    shares_keys,
    step_matrix,
    stretched,
)
from .pattern import Pattern, Run
from .tiles import by_groups, pad_keys, run_pixels

# How many rows of tiles that share keys are worked off as one: their keys are to stay in the cache.
_TOGETHER = 4


def local_attention_backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    bias: Tensor | None,
    scale: float,
    with_bias: bool = True,
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
        with_bias: whether the gradient of the bias is wanted; None otherwise.
    """
    maps = [grad, q, pad_keys(k, pattern), pad_keys(v, pattern)]
    maps += [] if grad_lse is None else [grad_lse[..., None]]
    wide = torch.promote_types(q.dtype, torch.float32)
    grad_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and with_bias else None

    def attend_backward(group: Pattern, *args: Tensor) -> tuple[Tensor, ...]:
        return _chunks_backward(group, bias, grad_bias, scale, *args)

    with without_autocast(q):
        dq, dk, dv = by_groups(pattern, maps, attend_backward)
    (top, _), (left, _) = pattern.y.key_padding, pattern.x.key_padding
    dk, dv = (t[:, top : top + q.shape[1], left : left + q.shape[2]] for t in (dk, dv))
    dq, dk, dv = (t.to(q.dtype) for t in (dq, dk, dv))
    return dq, dk, dv, None if bias is None or grad_bias is None else grad_bias.to(bias.dtype)


def _chunks_backward(
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
    # In half precision the sums over all tiles that see a key would lose their small terms.
    wide = torch.promote_types(q.dtype, torch.float32)
    dq = torch.empty(q.shape, dtype=wide, device=q.device)
    alone = all(axis.key_window == axis.window and axis.border != "clamp" for axis in (pattern.y, pattern.x))
    new = torch.empty if alone else torch.zeros
    dk, dv = (new(t.shape, dtype=wide, device=t.device) for t in (k, v))
    rows, columns = bands(pattern, q.shape[3])
    for band in columns:
        for y, bias_of_y in zip(rows, band_biases(bias, pattern, rows, band, q)):
            shared = shares_keys(y)
            totals: list[Tensor] = []
            for chunk in chunks(q.shape, y, band, _TOGETHER if shared else 0):
                steps = chunk.rows[1] if shared else 1
                tall, chunk = stretched(y, chunk) if shared else (y, chunk)
                queries = [query_tiles(t, chunk, tall, band) for t in (q, grad, grad_lse) if t is not None]
                keys = [key_tiles(t, chunk, tall, band) for t in (k, v)]
                matrices = ([_heads_first(t).to(wide) for t in tiles] for tiles in (queries, keys))
                *grads, dlogits = _stretch_backward(
                    *matrices, y, steps, bias_of_y, scale, grad_bias is not None
                )
                query_tiles(dq, chunk, tall, band).copy_(as_tiles(grads[0], queries[0].shape))
                for target, part in zip((dk, dv), grads[1:]):
                    put_key_tiles(target, as_tiles(part, keys[0].shape), chunk, tall, band, alone)
                if grad_bias is not None:
                    sums = [part.sum(0) for part in _parts(dlogits, band)]
                    totals = [total.add_(part) for total, part in zip(totals, sums)] or sums
            if bias is not None and grad_bias is not None:
                for x, total in zip(band.runs, totals):
                    _add_bias(grad_bias, bias, total, pattern, y, x)
    return dq, dk, dv


def _heads_first(tiles: Tensor) -> Tensor:
    """`[n, heads, y, x, d]`, contiguous, of tiles `[B, rows, columns, y, x, heads, d]`."""
    return tiles.permute(0, 1, 2, 5, 3, 4, 6).contiguous().flatten(0, 2)


def _parts(dlogits: Tensor, band: Band) -> tuple[Tensor, ...]:
    """The gradient of the logits for each run of a band."""
    return (dlogits,) if len(band.runs) == 1 else dlogits.split([run.count for run in band.runs])


def _stretch_backward(
    queries: list[Tensor],
    keys: list[Tensor],
    y: Run,
    steps: int,
    bias: Tensor | None,
    scale: float,
    with_bias: bool,
) -> list[Tensor]:
    """`_dense_backward` of maps `[n, heads, y, x, d]` whose tiles are `steps` stretches of rows.

    Gradients of the maps are `[n, heads, pixels, d]`, that of the logits, if the bias wants it, is the sum
    over the stretches.
    """
    totals: list[Tensor] = []
    dlogits = torch.zeros(())
    for step in range(steps):
        *parts, part = _dense_backward(
            [step_matrix(t, y, y.query, step) for t in queries],
            [step_matrix(t, y, y.key, step) for t in keys],
            bias,
            scale,
        )
        if steps == 1:
            return [*parts, part]
        totals = totals or [torch.zeros_like(t) for t in (queries[0], *keys)]
        for total, grad, span in zip(totals, parts, (y.query, y.key, y.key)):
            step_matrix(total, y, span, step).add_(grad)
        dlogits = dlogits + part if with_bias else dlogits
    return [*(total.flatten(2, 3) for total in totals), dlogits]


def _dense_backward(
    queries: list[Tensor], keys: list[Tensor], bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of queries, keys, values and logits of dense attention.

    Args:
        queries: the queries, the gradient of the output and perhaps that of the log-sum-exp, all
            `[N, heads, nq, d]`.
        keys: the keys and the values `[N, heads, nk, d]`.
        bias: added to the logits `[N, heads, nq, nk]`.
        scale: multiplies q·k.
    """
    batch = queries[0].shape[:2]
    (q, grad, *grad_lse), (k, v) = ([x.flatten(0, 1) for x in maps] for maps in (queries, keys))
    logits = _scaled_product(q, k.mT, scale)
    if bias is not None:
        logits.unflatten(0, batch).add_(bias)
    weights = logits.softmax(-1)
    dlogits = (grad @ v.mT).mul_(weights)
    shift = dlogits.sum(-1, keepdim=True)
    dlogits.addcmul_(weights, shift - grad_lse[0] if grad_lse else shift, value=-1)
    dq, dk = _scaled_product(dlogits, k, scale), _scaled_product(dlogits.mT, q, scale)
    dq, dk, dv, dlogits = (x.unflatten(0, batch) for x in (dq, dk, weights.mT @ grad, dlogits))
    return dq, dk, dv, dlogits


def _scaled_product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """`scale * a @ b` of batches of matrices in one pass."""
    return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=scale)


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
