"""Local attention in plain PyTorch.

On a CPU the tiles are worked off in chunks that stay in the cache, forward and backward; training keeps
nothing but the inputs and the weights of small windows. On other devices, in traced programs and for
derivatives of higher order all tiles of equal geometry are one batch, and PyTorch differentiates them.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor

from visionattn._compat import is_functorch_active
from visionattn.kernels.dense.plain.attention import attend, attend_lse
from visionattn.kernels.local.pattern import Call, Pattern
from visionattn.kernels.local.plain.backward import attention_weights, local_attention_backward
from visionattn.kernels.local.plain.bias import chunk_biases, run_biases
from visionattn.kernels.local.plain.chunks import (
    INFERENCE,
    TRAINING,
    as_matrices,
    as_tiles,
    chunks,
    has_small_tiles,
    key_tiles,
    query_tiles,
    rows_and_columns,
)
from visionattn.kernels.local.plain.groups import by_groups
from visionattn.kernels.local.plain.tiles import laid_out, pad_keys, rectangles, tile_runs, whole_maps
from visionattn.kernels.local.plain.uniform import can_be_uniform, uniform_attention
from visionattn.kernels.precision import without_autocast


def tiled_attention(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor | None]:
    """Compute the output and, if asked for, the log-sum-exp; maps as in `op.py`."""
    pattern, bias, _, return_lse = call
    if any(isinstance(side, torch.SymInt) for side in q.shape[1:3]) and can_be_uniform(pattern, bias):
        return uniform_attention(q, k, v, call)
    if q.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return attention_of_tiles(q, k, v, call)
    is_recorded = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, bias))
    is_transformed = is_functorch_active()
    is_dilated = pattern.y.dilation > 1 or pattern.x.dilation > 1
    keeps = is_recorded and not (is_transformed or is_dilated or return_lse) and has_small_tiles(pattern, q)
    # Recording a call for autograd costs as much as the attention of a small map.
    attention = _Chunked.apply if is_recorded or is_transformed else _Chunked.forward
    out, *lse = attention(q, k, v, bias, call._replace(bias=None), [] if keeps else None)
    return out, lse[0] if lse else None


def attention_of_tiles(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor | None]:
    """`tiled_attention` with all tiles of a run at once, in operations that PyTorch can differentiate."""
    k, v = pad_keys(k, call.pattern), pad_keys(v, call.pattern)

    def attend_group(group: Pattern, *maps: Tensor) -> tuple[Tensor, ...]:
        return _attend_tiles(call._replace(pattern=group), *maps)

    out, *lse = by_groups(call.pattern, (q, k, v), attend_group)
    return out, lse[0].squeeze(-1) if lse else None


def _attend_tiles(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Attend in an undilated pattern: `[B, H, W, heads, d]` and, if asked for, `[B, H, W, heads, 1]`."""
    rows, columns = tile_runs(call.pattern)
    queries = rectangles(q, rows, columns, "query")
    keys, values = (rectangles(x, rows, columns, "key") for x in (k, v))
    biases = run_biases(call.bias, call.pattern, rows, columns, q.dtype, q.device)
    attend_tile = attend_lse if call.return_lse else attend
    outs = []
    for (y, x), query, key, value, bias in zip(product(rows, columns), queries, keys, values, biases):
        results = attend_tile(query, key, value, bias, call.scale)
        results = results if isinstance(results, tuple) else (results,)
        outs.append(tuple(laid_out(t if t.dim() == 4 else t[..., None], q.shape[0], y, x) for t in results))
    return whole_maps(outs, len(columns))


class _Chunked(torch.autograd.Function):
    """`attention_of_tiles`, chunk by chunk, keeping nothing but its arguments for the backward pass.

    Unless it gets a list: that takes the weights of every chunk, for the backward pass as well.
    """

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, call: Call, kept: list[Tensor] | None
    ) -> tuple[Tensor, ...]:
        k, v = (pad_keys(x, call.pattern) for x in (k, v))

        def attend_group(group: Pattern, *maps: Tensor) -> tuple[Tensor, ...]:
            return _attend_chunks(call._replace(pattern=group, bias=bias), kept, *maps)

        with without_autocast(q):
            out, *lse = by_groups(call.pattern, (q, k, v), attend_group)
        return (out, lse[0].squeeze(-1)) if lse else (out,)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.call, kept = inputs
        ctx.save_for_backward(*tensors, *(kept or ()))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, bias, *kept = ctx.saved_tensors
        grad = torch.zeros_like(q) if grads[0] is None else grads[0]
        grad_lse = grads[1] if ctx.call.return_lse else None
        wanted, call = ctx.needs_input_grad[:4], ctx.call._replace(bias=bias)
        if torch.is_grad_enabled():
            results = _differentiable_gradients(grad, grad_lse, q, k, v, call)
        else:
            results = local_attention_backward(grad, grad_lse, q, k, v, call, wanted[3], kept)
        return *(result if want else None for result, want in zip(results, wanted)), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], Any]:
        """A mapped axis is more batch; maps with a bias of their own are taken one by one."""
        if in_dims[3] is not None:
            pairs = [
                [x if dim is None else x.select(dim, i) for x, dim in zip(args[:4], in_dims)]
                for i in range(info.batch_size)
            ]
            outs = [_Chunked.apply(*tensors, *args[4:]) for tensors in pairs]
            return tuple(torch.stack(parts) for parts in zip(*outs)), (0,) * len(outs[0])
        stacked = (
            x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            for x, dim in zip(args[:3], in_dims)
        )
        out = _Chunked.apply(*(x.flatten(0, 1) for x in stacked), *args[3:])
        return tuple(x.unflatten(0, (info.batch_size, -1)) for x in out), (0,) * len(out)


def _attend_chunks(
    call: Call, kept: list[Tensor] | None, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, ...]:
    """`_attend_tiles`, chunk by chunk.

    The weights `[n * heads, nq, nk]` of every chunk are put into `kept`, unless it is None.
    """
    pattern, bias, scale, return_lse = call
    wide = torch.promote_types(q.dtype, torch.float32)
    small = not return_lse and has_small_tiles(pattern, q)
    dtype = wide if small else q.dtype
    outs = [torch.empty(q.shape, dtype=q.dtype, device=q.device)]
    if return_lse:
        outs.append(q.new_empty((*q.shape[:4], 1), dtype=wide))
    attend_chunk = attend_lse if return_lse else attend
    rows, all_columns = rows_and_columns(pattern, q.shape[3])
    for columns in all_columns:
        for y, bias_of_y in zip(rows, chunk_biases(bias, pattern, rows, columns, q)):
            for chunk in chunks(q.shape, y, columns, INFERENCE if kept is None else TRAINING):
                tiles = [
                    query_tiles(q, chunk, y, columns),
                    *(key_tiles(x, chunk, y, columns) for x in (k, v)),
                ]
                query, key, value = (as_matrices(x, dtype) for x in tiles)
                if small:
                    weights = attention_weights(query, key, bias_of_y, scale)
                    results = torch.bmm(weights, value)
                    if kept is not None:
                        kept.append(weights)
                else:
                    query, key, value = (x.unflatten(0, (-1, q.shape[3])) for x in (query, key, value))
                    results = attend_chunk(query, key, value, bias_of_y, scale)
                for out, result in zip(outs, results if isinstance(results, tuple) else (results,)):
                    target = query_tiles(out, chunk, y, columns)
                    target.copy_(as_tiles(result, target.shape))
    return tuple(outs)


def _differentiable_gradients(
    grad: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, call: Call
) -> tuple[Tensor | None, ...]:
    """`local_attention_backward` in operations that can be differentiated again."""
    out, lse = attention_of_tiles(q, k, v, call._replace(return_lse=grad_lse is not None))
    outs, weights = ([out], [grad]) if lse is None else ([out, lse], [grad, grad_lse])
    inputs = [x for x in (q, k, v, call.bias) if x is not None and x.requires_grad]
    grads = iter(torch.autograd.grad(outs, inputs, weights, create_graph=True))
    return tuple(None if x is None or not x.requires_grad else next(grads) for x in (q, k, v, call.bias))
