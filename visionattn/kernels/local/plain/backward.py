"""First derivatives of local attention on a CPU, chunk by chunk as the forward pass.

The weights are recomputed unless the forward pass has kept them. Gradients of keys are added tile by tile and
those of a bias table by products: the order of additions is fixed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from visionattn.kernels.local.pattern import Call, Pattern, Run, Segment
from visionattn.kernels.local.plain.bias import (
    add_to_table,
    chunk_biases,
    has_whole_block,
    part_of_block,
    run_pixels,
    whole_block,
)
from visionattn.kernels.local.plain.chunks import (
    TRAINING,
    Columns,
    as_matrices,
    as_tiles,
    chunks,
    key_tiles,
    put_key_tiles,
    query_tiles,
    rows_and_columns,
    shares_keys,
    stretched,
)
from visionattn.kernels.local.plain.groups import by_groups
from visionattn.kernels.local.plain.tiles import pad_keys
from visionattn.kernels.precision import without_autocast

# So many rows of tiles that share keys are worked off as one: their keys are to stay in the cache.
_TOGETHER = 4


def local_attention_backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
    with_bias: bool = True,
    kept: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Compute the gradients of q, k, v and the bias.

    Args:
        grad: gradient of the output `[B, H, W, heads, d]`.
        grad_lse: gradient of the log-sum-exp `[B, H, W, heads]`, or None.
        q: queries, keys, values and `call` as the forward pass had them.
        k: keys.
        v: values.
        call: all else.
        with_bias: whether the gradient of the bias is wanted; None otherwise.
        kept: the weights of every chunk, if the forward pass has kept them.
    """
    pattern, bias, *_ = call
    maps = [grad, q, pad_keys(k, pattern), pad_keys(v, pattern)]
    maps += [] if grad_lse is None else [grad_lse[..., None]]
    wide = torch.promote_types(q.dtype, torch.float32)
    grad_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and with_bias else None

    def attend_backward(group: Pattern, *args: Tensor) -> tuple[Tensor, ...]:
        return _chunks_backward(call._replace(pattern=group), grad_bias, kept, *args)

    with without_autocast(q):
        dq, dk, dv = by_groups(pattern, maps, attend_backward)
    (top, _), (left, _) = pattern.y.key_padding, pattern.x.key_padding
    dk, dv = (t[:, top : top + q.shape[1], left : left + q.shape[2]] for t in (dk, dv))
    dq, dk, dv = (t.to(q.dtype) for t in (dq, dk, dv))
    return dq, dk, dv, None if bias is None or grad_bias is None else grad_bias.to(bias.dtype)


def _chunks_backward(
    call: Call,
    grad_bias: Tensor | None,
    kept: Sequence[Tensor],
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_lse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of the maps of an undilated pattern; add that of the bias to `grad_bias`."""
    pattern, bias, scale, _ = call
    # In half precision the sums over all tiles that see a key would lose their small terms.
    wide = torch.promote_types(q.dtype, torch.float32)
    dq = torch.empty(q.shape, dtype=wide, device=q.device)
    alone = all(axis.key_window == axis.window and axis.border != "clamp" for axis in (pattern.y, pattern.x))
    new = torch.empty if alone else torch.zeros
    dk, dv = (new(t.shape, dtype=wide, device=t.device) for t in (k, v))
    rows, all_columns = rows_and_columns(pattern, q.shape[3])
    sums = None if bias is None or grad_bias is None else _BiasSums(pattern, bias, grad_bias)
    weights = iter(kept)
    for columns in all_columns:
        biases = [None] * len(rows) if kept else chunk_biases(bias, pattern, rows, columns, q)
        for y, bias_of_y in zip(rows, biases):
            shared = shares_keys(y)
            totals: list[Tensor] = []
            for chunk in chunks(q.shape, y, columns, TRAINING, _TOGETHER if shared else 0):
                steps = chunk.rows[1] if shared else 1
                tall, chunk = stretched(y, chunk) if shared else (y, chunk)
                tiles = [query_tiles(t, chunk, tall, columns) for t in (q, grad, grad_lse) if t is not None]
                tiles += [key_tiles(t, chunk, tall, columns) for t in (k, v)]
                matrices = [as_matrices(t, wide) for t in tiles]
                args = (matrices[:-2], matrices[-2:], bias_of_y, scale)
                if shared:
                    *grads, dlogits = _stretch_backward(*args, (y, columns.runs[0]), steps, sums is not None)
                else:
                    *grads, dlogits = _dense_backward(*args, next(weights, None))
                target = query_tiles(dq, chunk, tall, columns)
                target.copy_(as_tiles(grads[0], target.shape))
                for target, part in zip((dk, dv), grads[1:]):
                    put_key_tiles(target, as_tiles(part, tiles[-1].shape), chunk, tall, columns, alone)
                if sums is not None:
                    parts = _sums_of_runs(dlogits, columns, q.shape[3])
                    totals = [total.add_(part) for total, part in zip(totals, parts)] or parts
            if sums is not None:
                sums.add(totals, y, columns)
    if sums is not None:
        sums.finish()
    return dq, dk, dv


def _sums_of_runs(dlogits: Tensor, columns: Columns, heads: int) -> list[Tensor]:
    """Sum `[n * heads, nq, nk]` over the tiles of each run: `[heads, nq, nk]`."""
    dlogits = dlogits.unflatten(0, (-1, heads))
    parts = [dlogits] if len(columns.runs) == 1 else dlogits.split([run.count for run in columns.runs])
    return [part[0] if len(part) == 1 else part.sum(0) for part in parts]


def _stretch_backward(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    bias: Tensor | None,
    scale: float,
    runs: tuple[Run, Run],
    steps: int,
    with_bias: bool,
) -> tuple[Tensor, ...]:
    """`_dense_backward` of tiles made of `steps` rows of tiles; gradients of logits are added up."""
    y, x = runs
    dlogits = queries[0].new_zeros(())
    dq = torch.empty_like(queries[0])
    dk, dv = (torch.zeros_like(t) for t in keys)
    for step in range(steps):
        *parts, part = _dense_backward(
            [_step(t, step, y, y.query, x.query) for t in queries],
            [_step(t, step, y, y.key, x.key) for t in keys],
            bias,
            scale,
        )
        _step(dq, step, y, y.query, x.query).copy_(parts[0])
        for total, grad in zip((dk, dv), parts[1:]):
            _step(total, step, y, y.key, x.key).add_(grad)
        if with_bias:
            dlogits = dlogits + part
    return dq, dk, dv, dlogits


def _step(matrices: Tensor, step: int, y: Run, rows: Segment, columns: Segment) -> Tensor:
    """View the queries or keys of one row of tiles in tiles `[N, pixels, d]` made of several."""
    return matrices.narrow(1, step * y.step * columns.length, rows.length * columns.length)


def attention_weights(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Compute `softmax(scale q kᵀ + bias)` of `[n * heads, pixels, d]`; bias `[n | 1, heads | 1, nq, nk]`."""
    logits = _scaled_product(q, k.mT, scale)
    if bias is not None:
        # A bias for each of the n tiles has all heads.
        heads = bias.shape[1]
        logits.unflatten(0, (-1, heads)).add_(bias)
    return logits.softmax(-1)


def _dense_backward(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    bias: Tensor | None,
    scale: float,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of queries, keys, values and logits of dense attention.

    Args:
        queries: the queries, the gradient of the output and perhaps that of the log-sum-exp, all
            `[N, nq, d]`.
        keys: the keys and the values `[N, nk, d]`.
        bias: added to the logits, as in `attention_weights`.
        scale: multiplies q·k.
        weights: `attention_weights` of them, if they are known.
    """
    (q, grad, *grad_lse), (k, v) = queries, keys
    weights = attention_weights(q, k, bias, scale) if weights is None else weights
    dlogits = torch._softmax_backward_data(torch.bmm(grad, v.mT), weights, -1, weights.dtype)
    if grad_lse:
        dlogits.addcmul_(weights, grad_lse[0])
    dq, dk = _scaled_product(dlogits, k, scale), _scaled_product(dlogits.mT, q, scale)
    return dq, dk, torch.bmm(weights.mT, grad), dlogits


def _scaled_product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Compute `scale * a @ b` of batches of matrices in one pass."""
    return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=scale)


class _BiasSums:
    """Adds the gradients of logits up to that of a bias.

    Those of tiles that are whole blocks, or parts of one that a border cuts, are added up in the block: a
    dense bias is one, and the sums of a table are taken from it at the end.
    """

    def __init__(self, pattern: Pattern, bias: Tensor, grad_bias: Tensor) -> None:
        self.pattern, self.grad_bias = pattern, grad_bias
        self.is_table = pattern.is_table(bias)
        self.block = None
        if has_whole_block(pattern, self.is_table):
            y, x = pattern.y, pattern.x
            shape = bias.shape[0], y.window, x.window, y.key_window, x.key_window
            self.block = grad_bias.new_zeros(shape) if self.is_table else pattern.by_axes(grad_bias)

    def add(self, totals: Sequence[Tensor], y: Run, columns: Columns) -> None:
        """Add the gradients `[heads, nq, nk]` of the logits of all runs of the columns."""
        for x, total in zip(columns.runs, totals):
            total = total.unflatten(2, (y.key.length, -1)).unflatten(1, (y.query.length, -1))
            if self.block is not None:
                part_of_block(self.block, y, x).add_(total)
            elif self.is_table:
                add_to_table(self.grad_bias, total, self.pattern, y, x)
            else:
                self._add_to_pairs(total, y, x)

    def finish(self) -> None:
        """Add what the block of a table holds."""
        if self.is_table and self.block is not None:
            add_to_table(self.grad_bias, self.block, self.pattern, *whole_block(self.pattern))

    def _add_to_pairs(self, dlogits: Tensor, y: Run, x: Run) -> None:
        """Add the gradient `[heads, qy, qx, ky, kx]` of the logits of a tile of several blocks."""
        axes = self.pattern.y, self.pattern.x
        (_, _, query_y, key_y), (_, _, query_x, key_x) = (
            axis.visibility(*run_pixels(run, axis, dlogits.device)) for axis, run in zip(axes, (y, x))
        )
        heads = torch.arange(dlogits.shape[0], device=dlogits.device)
        where = (
            heads.view(-1, 1, 1, 1, 1),
            query_y.view(-1, 1, 1, 1),
            query_x.view(-1, 1, 1),
            key_y.clamp(0, axes[0].key_window - 1)[:, None, :, None],
            key_x.clamp(0, axes[1].key_window - 1)[:, None, :],
        )
        self.pattern.by_axes(self.grad_bias).index_put_(where, dlogits, accumulate=True)
