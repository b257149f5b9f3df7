"""Routed attention in fast plain PyTorch.

Eager calls work the lists off in chunks that stay in the cache: list by list (`rows.py`), or, where regions
of queries are small beside those of keys, key region by key region (`columns.py`). Traced programs and
derivatives of higher order take all lists in one piece, and PyTorch differentiates them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from visionattn._compat import is_functorch_active
from visionattn.kernels.dense.plain.attention import attend, attend_lse, dense_attention
from visionattn.kernels.routed.call import Call
from visionattn.kernels.routed.plain.columns import attend_from_keys, gradients_from_keys
from visionattn.kernels.routed.plain.pairs import PairBias, lists_of_heads, present_keys, row_numbers
from visionattn.kernels.routed.plain.rows import attend_to_lists, gather, gradients_of_lists
from visionattn.kernels.routed.reference import bias_of_pairs
from visionattn.kernels.routed.regions import from_rows, to_rows


def routed_attention(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor | None]:
    """Output and log-sum-exp (None unless asked for); arguments as in `op.py`."""
    if call.is_full and call.counts is None and call.indices.shape[3] == _num_regions(k, call):
        # Every region is listed: attention of the whole map, no need to sort it by regions.
        bias = None if call.bias is None else bias_of_pairs(call.bias, *q.shape[1:3])
        return dense_attention(q, k, v, bias, call.scale, call.return_lse)
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return _in_one_piece(q, k, v, call)
    tensors = (q, k, v, *call[:3])
    is_recorded = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    # Recording a call for autograd costs as much as the attention of a small map.
    attention = _Chunked.apply if is_recorded or is_functorch_active() else _Chunked.forward
    out, *lse = attention(q, k, v, *call)
    return out, lse[0] if call.return_lse else None


def gradients(
    grads: Sequence[Tensor | None],
    outputs: Sequence[Tensor | None],
    wanted: Sequence[bool],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v and the bias, without autograd."""
    grad_out = torch.zeros_like(q) if grads[0] is None else grads[0]
    if not _has_few_queries(call):
        return gradients_of_lists(grad_out, grads[1], q, k, v, call, wanted[3])
    return gradients_from_keys(grad_out, grads[1], attend_from_keys(q, k, v, call), q, k, v, call, wanted[3])


def _num_regions(k: Tensor, call: Call) -> int:
    return -(-k.shape[1] // call.region[0]) * -(-k.shape[2] // call.region[1])


def _has_few_queries(call: Call) -> bool:
    """Whether regions of queries are so small that it pays to gather these in place of keys, as measured."""
    return 16 * call.query_region[0] * call.query_region[1] <= call.region[0] * call.region[1]


class _Chunked(torch.autograd.Function):
    """`_in_one_piece`, chunk by chunk, keeping its arguments for the backward pass, and its outputs where
    that starts from them."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, *call: Any) -> tuple[Tensor, ...]:
        called = Call(*call)
        return (
            attend_from_keys(q, k, v, called)
            if _has_few_queries(called)
            else attend_to_lists(q, k, v, called)
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.numbers = inputs[6:]
        ctx.save_for_backward(*inputs[:6], *(output if _has_few_queries(Call(*inputs[3:])) else ()))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, *tensors = ctx.saved_tensors
        call = Call(*tensors[:3], *ctx.numbers)
        grad_out = torch.zeros_like(q) if grads[0] is None else grads[0]
        given = grad_out, grads[1] if len(grads) > 1 else None
        with_bias = ctx.needs_input_grad[5]
        if torch.is_grad_enabled():
            found = _differentiable_gradients(*given, q, k, v, call)
        elif outputs := tensors[3:]:
            found = gradients_from_keys(*given, tuple(outputs), q, k, v, call, with_bias)
        else:
            found = gradients_of_lists(*given, q, k, v, call, with_bias)
        return *found[:3], None, None, found[3], *[None] * len(ctx.numbers)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], Any]:
        """A mapped axis is more batch; maps with a bias of their own are taken one by one."""
        if in_dims[5] is not None:
            samples = [
                _Chunked.apply(*(x.select(d, i) if isinstance(d, int) else x for x, d in zip(args, in_dims)))
                for i in range(info.batch_size)
            ]
            outs = tuple(torch.stack(parts) for parts in zip(*samples))
        else:
            batched = [
                x if x is None else x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
                for x, dim in zip(args[:5], in_dims)
            ]
            outs = _Chunked.apply(*(x if x is None else x.flatten(0, 1) for x in batched), *args[5:])
            outs = tuple(x.unflatten(0, (info.batch_size, -1)) for x in outs)
        return outs, (0,) * len(outs)


def _differentiable_gradients(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, call: Call
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v and the bias that can be differentiated again, by PyTorch's own rules."""
    tensors = (q, k, v, call.bias)
    inputs = [x for x in tensors if x is not None and x.requires_grad]
    out, lse = _in_one_piece(q, k, v, call._replace(return_lse=grad_lse is not None))
    outs, weights = ([out], [grad_out]) if lse is None else ([out, lse], [grad_out, grad_lse])
    grads = iter(torch.autograd.grad(outs, inputs, weights, create_graph=True))
    return tuple(next(grads) if x is not None and x.requires_grad else None for x in tensors)


def _in_one_piece(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor | None]:
    """All lists at once: the form for compilers, and the one that is differentiable any number of times."""
    indices = lists_of_heads(q, call)
    rows = row_numbers(indices, _num_regions(k, call))
    keys, values = (to_rows(x, call.region) for x in (k, v))
    query, key, value = (x[:, None] for x in (to_rows(q, call.query_region), *gather(rows, keys, values)))
    added, empty = _added(q, k, indices, call)
    if call.return_lse:
        out, lse = attend_lse(query, key, value, added, call.scale)
    else:
        out, lse = attend(query, key, value, added, call.scale), None
    maps = [out.squeeze(1)] if lse is None else [out.squeeze(1), lse.squeeze(1)[..., None]]
    out, *lses = (from_rows(x, q, call.query_region) for x in maps)
    if empty is not None:
        empty = from_rows(empty, q, call.query_region)
        out, lses = out.masked_fill(empty, 0), [x.masked_fill(empty, float("-inf")) for x in lses]
    return out, lses[0].squeeze(-1) if lses else None


def _added(q: Tensor, k: Tensor, indices: Tensor, call: Call) -> tuple[Tensor | None, Tensor | None]:
    """The additions to the logits, -inf where a key is absent, `[B * heads * regions, 1, 1 | pixels, keys]`,
    and which queries have no key `[B * heads * regions, pixels, 1]` (their logits stay finite); None for
    neither."""
    batch, heads, rows, topk = indices.shape
    pixels = call.query_region[0] * call.query_region[1]
    total = q.new_zeros((batch, heads, rows, 1, topk * call.region[0] * call.region[1]))
    if call.bias is not None:
        places = PairBias(q, k, call.bias, call)
        own = torch.arange(rows, device=q.device).view(1, 1, -1, 1).expand(batch, heads, -1, -1)
        head = torch.arange(heads, device=q.device).view(1, -1, 1).expand(batch, -1, rows)
        total = places.take(head, places.entries(own, indices.clamp(min=0).long()))
    present = present_keys(k, call)
    if present is None and call.is_full:
        return (None if call.bias is None else total.flatten(0, 2)[:, None]), None
    visible = (indices >= 0)[..., None].expand(*indices.shape, call.region[0] * call.region[1])
    if present is not None:
        listed = row_numbers(indices, present.shape[2]).view(indices.shape)
        visible = visible & present.expand(batch, heads, -1, -1).flatten(0, 2)[listed]
    empty = ~visible.flatten(-2).any(-1)
    visible = (visible.flatten(-2) | empty[..., None])[..., None, :]
    total = total.masked_fill(~visible, float("-inf")).flatten(0, 2)[:, None]
    return total, empty.flatten()[:, None, None].expand(-1, pixels, 1)
