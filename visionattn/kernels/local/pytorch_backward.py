"""First derivatives of local attention in plain PyTorch, chunk by chunk as the forward pass.

The weights are recomputed, so that training keeps nothing but the inputs. Gradients of keys are added tile by
tile and those of a bias table by products: the order of additions is fixed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..precision import without_autocast
from .pattern import Pattern, Run
from .strips import (
    add_key_strips,
    band_biases,
    bands,
    chunks,
    key_strips,
    put_query_strips,
    query_strips,
    sums_of_runs,
    tile,
)
from .tiles import by_groups, pad_keys, run_pixels


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
        return _strips_backward(group, bias, grad_bias, scale, *args)

    with without_autocast(q):
        dq, dk, dv = by_groups(pattern, maps, attend_backward)
    (top, _), (left, _) = pattern.y.key_padding, pattern.x.key_padding
    dk, dv = (t[:, top : top + q.shape[1], left : left + q.shape[2]] for t in (dk, dv))
    dq, dk, dv = (t.to(q.dtype) for t in (dq, dk, dv))
    return dq, dk, dv, None if bias is None or grad_bias is None else grad_bias.to(bias.dtype)


def _strips_backward(
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
    dq, dk, dv = (torch.zeros(t.shape, dtype=wide, device=t.device) for t in (q, k, v))
    rows, columns = bands(pattern, q.shape[3])
    for band in columns:
        queries, grads = (query_strips(t, band, wide) for t in (q * scale, grad))
        keys, values = (key_strips(t, band, wide) for t in (k, v))
        lse_grads = None if grad_lse is None else query_strips(grad_lse, band, wide)
        of_queries = torch.empty_like(queries)
        of_keys, of_values = torch.zeros_like(keys), torch.zeros_like(values)
        for y, bias_of_y in zip(rows, band_biases(bias, pattern, rows, band, q)):
            total = None
            for chunk in chunks(queries, y, band.runs[0]):
                dlogits = _dense_backward(
                    *(tile(t, chunk, y, y.query) for t in (queries, grads)),
                    *(tile(t, chunk, y, y.key) for t in (keys, values)),
                    bias_of_y,
                    None if lse_grads is None else tile(lse_grads, chunk, y, y.query),
                    tile(of_queries, chunk, y, y.query),
                    *(tile(t, chunk, y, y.key) for t in (of_keys, of_values)),
                )
                if grad_bias is not None:
                    total = dlogits.sum(0) if total is None else total.add_(dlogits.sum(0))
            if bias is not None and grad_bias is not None and total is not None:
                for x, part in zip(band.runs, sums_of_runs(total, band)):
                    _add_bias(grad_bias, bias, part, pattern, y, x)
        put_query_strips(dq, of_queries.mul_(scale), band)
        add_key_strips(dk, of_keys, band)
        add_key_strips(dv, of_values, band)
    return dq, dk, dv


def _dense_backward(
    q: Tensor,
    grad: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    grad_lse: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> Tensor:
    """Write the gradient of scaled queries, and add those of keys and values, to the last three.

    All maps are `[N, heads, n, d]`. Returns the gradient of the logits `[N, heads, nq, nk]`.
    """
    logits = q @ k.transpose(-2, -1)
    weights = (logits if bias is None else logits.add_(bias)).softmax(-1)
    dv += weights.transpose(-2, -1) @ grad
    dlogits = (grad @ v.transpose(-2, -1)).mul_(weights)
    shift = dlogits.sum(-1, keepdim=True)
    dlogits.addcmul_(weights, shift if grad_lse is None else shift - grad_lse, value=-1)
    dq.copy_(dlogits @ k)
    dk += dlogits.transpose(-2, -1) @ q
    return dlogits


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
