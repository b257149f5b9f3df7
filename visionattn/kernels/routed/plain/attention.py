"""Routed attention in fast plain PyTorch.

Keys and values are laid out once as rows `[B * heads * regions, pixels, d]`, so that a selected region is one
contiguous row and gathering it a plain copy, already in the layout that the attention reads. The lists are
worked off in chunks whose gathered keys stay in the cache; training stores none of them, but gathers again in
the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from visionattn._compat import is_functorch_active
from visionattn.kernels.dense.plain.attention import attend, attend_lse, dense_attention
from visionattn.kernels.precision import at_least_float32, without_autocast
from visionattn.kernels.routed import reference
from visionattn.kernels.routed.call import Call
from visionattn.kernels.routed.regions import from_rows, to_rows

# How many numbers of gathered keys or of logits are held at a time: on a CPU what the caches take (the best
# of 2**17 to 2**22 as measured), elsewhere what bounds memory without costing launches.
_CPU_CHUNK, _CHUNK = 2**18, 2**26


def is_extended(q: Tensor, k: Tensor, call: Call) -> bool:
    """Whether a call has counts, or query regions or a key map that differ."""
    is_plain = call.counts is None and q.shape == k.shape and tuple(call.query_region) == tuple(call.region)
    return not is_plain


def routed_attention(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor | None]:
    """Output and log-sum-exp (None unless asked for); arguments as in `op.py`."""
    if is_extended(q, k, call):
        return reference.routed_attention(q, k, v, call)
    indices, _, bias, _, region, scale, return_lse, is_full = call
    if is_full and indices.shape[3] == indices.shape[2]:
        # Every region is listed: attention of the whole map, no need to sort it by regions.
        bias = None if bias is None else reference.bias_of_pairs(bias, *q.shape[1:3])
        return dense_attention(q, k, v, bias, scale, return_lse)
    is_full = is_full or _has_no_padding(indices)
    pair_bias, empty = _pair_bias(q, indices, bias, region, is_full)
    if return_lse or torch.compiler.is_compiling() or torch.jit.is_tracing():
        out, lse = _in_one_piece(q, k, v, indices, pair_bias, region, scale, return_lse)
    else:
        out, lse = _Chunked.apply(q, k, v, indices, pair_bias, region, scale), None
    if empty is not None:
        out = out.masked_fill(empty, 0)
        lse = None if lse is None else lse.masked_fill(empty.squeeze(-1), float("-inf"))
    return out, lse


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
    indices, _, bias, _, region, scale, _, is_full = call
    if is_extended(q, k, call):
        leaves = [None if x is None else x.detach().requires_grad_() for x in (q, k, v, bias)]
        with torch.enable_grad():
            pairs = zip(reference.routed_attention(*leaves[:3], call._replace(bias=leaves[3])), grads)
            pairs = [pair for pair in pairs if pair[0] is not None and pair[1] is not None]
            given = [x for x in leaves if x is not None]
            found = iter(torch.autograd.grad([x for x, _ in pairs], given, [g for _, g in pairs]))
        return tuple(None if x is None else next(found) for x in leaves)
    pair_bias, empty = _pair_bias(q, indices, bias, region, is_full or _has_no_padding(indices))
    grad_out, grad_lse = grads
    grad_out = torch.zeros_like(q) if grad_out is None else grad_out
    if empty is not None:
        grad_out = grad_out.masked_fill(empty, 0)
        grad_lse = None if grad_lse is None else grad_lse.masked_fill(empty.squeeze(-1), 0)
    tensors = (grad_out, grad_lse, q, k, v, indices, pair_bias)
    *found, grad_pairs = _chunked_gradients(*tensors, region, scale, wanted[3])
    if bias is None or grad_pairs is None:
        return *found, None
    head, entry = _bias_entries(q, indices, bias, region)
    grad_bias = torch.zeros_like(bias.flatten(1))
    grad_pairs = grad_pairs.squeeze(1).unflatten(0, (len(q), q.shape[3], -1))
    return *found, grad_bias.index_put_((head, entry), grad_pairs, accumulate=True).view(bias.shape)


def _has_no_padding(indices: Tensor) -> bool:
    """Look for padding, where that costs less than masking it does."""
    if indices.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return not is_functorch_active() and not bool((indices < 0).any())


def _in_one_piece(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    pair_bias: Tensor | None,
    region: Sequence[int],
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """All lists at once: the form for compilers, and the one that is differentiable any number of times."""
    rows = _row_numbers(indices, q.shape[3])
    queries, keys, values = (to_rows(x, region) for x in (q, k, v))
    queries, keys, values = (x[:, None] for x in (queries, *_gather(rows, keys, values)))
    out, lse = _attend(queries, keys, values, pair_bias, scale, return_lse)
    out, lse = out.squeeze(1), None if lse is None else lse.squeeze(1)[..., None]
    return from_rows(out, q, region), None if lse is None else from_rows(lse, q, region).squeeze(-1)


class _Chunked(torch.autograd.Function):
    """`_in_one_piece`, chunk by chunk, keeping nothing but its arguments for the backward pass."""

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        indices: Tensor,
        pair_bias: Tensor | None,
        region: Sequence[int],
        scale: float,
    ) -> Tensor:
        rows = _row_numbers(indices, q.shape[3])
        queries, keys, values = (to_rows(x, region) for x in (q, k, v))
        out = torch.empty_like(queries)
        with without_autocast(q):
            for part in _parts(rows, keys):
                key, value = _gather(rows[part], keys, values)
                mask = None if pair_bias is None else pair_bias[part]
                chunk = attend(queries[part][:, None], key[:, None], value[:, None], mask, scale)
                out[part] = chunk.squeeze(1)
        return from_rows(out, q, region)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.region, ctx.scale = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, indices, pair_bias = ctx.saved_tensors
        if torch.is_grad_enabled():
            grads = _differentiable_gradients(grad_out, q, k, v, indices, pair_bias, ctx.region, ctx.scale)
        else:
            tensors, with_bias = (grad_out, None, q, k, v, indices, pair_bias), ctx.needs_input_grad[4]
            grads = _chunked_gradients(*tensors, ctx.region, ctx.scale, with_bias)
        return *grads[:3], None, grads[3], None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        """A mapped axis is more batch: every tensor argument begins with the batch (times heads)."""
        tensors = [
            x if x is None else x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            for x, dim in zip(args[:5], in_dims)
        ]
        out = _Chunked.apply(*(x if x is None else x.flatten(0, 1) for x in tensors), *args[5:])
        return out.unflatten(0, (info.batch_size, -1)), 0


def _differentiable_gradients(grad_out: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v and pair_bias that can be differentiated again, by PyTorch's own rules."""
    q, k, v, _indices, pair_bias = args[:5]
    wanted = [x is not None and x.requires_grad for x in (q, k, v, pair_bias)]
    inputs = [x for x in (q, k, v, pair_bias) if x is not None and x.requires_grad]
    out, _ = _in_one_piece(*args, return_lse=False)
    grads = iter(torch.autograd.grad(out, inputs, grad_out, create_graph=True))
    return tuple(next(grads) if want else None for want in wanted)


def _chunked_gradients(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    pair_bias: Tensor | None,
    region: Sequence[int],
    scale: float,
    with_bias: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v and, if wanted, pair_bias.

    With P the weights and dP = dO Vᵀ: dS = P * (dP - rowsum(P * dP) + dLSE), dQ = scale dS K,
    dK = scale dSᵀ Q, dV = Pᵀ dO.
    """
    rows = _row_numbers(indices, q.shape[3])
    # In half precision the sums over all lists that name a key would lose their small terms.
    queries, keys, values, outs = (at_least_float32(to_rows(x, region)) for x in (q, k, v, grad_out))
    lses = None if grad_lse is None else to_rows(grad_lse[..., None], region)
    grad_q, grad_k, grad_v = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
    grad_bias = torch.empty_like(pair_bias) if pair_bias is not None and with_bias else None
    with without_autocast(q):
        for part in _parts(rows, keys):
            key, value = _gather(rows[part], keys, values)
            query, grad = queries[part] * scale, outs[part]
            weights = query @ key.transpose(1, 2)
            if pair_bias is not None:
                weights += pair_bias[part].squeeze(1)
            weights = weights.softmax(-1)
            grad_logits = (grad @ value.transpose(1, 2)).mul_(weights)
            total = grad_logits.sum(-1, keepdim=True)
            grad_logits.addcmul_(weights, total if lses is None else total - lses[part], value=-1)
            if grad_bias is not None:
                grad_bias[part] = grad_logits.sum_to_size(grad_bias[part].squeeze(1).shape)[:, None]
            torch.mul(grad_logits @ key, scale, out=grad_q[part])
            listed = rows[part].flatten()
            grad_k.index_add_(0, listed, (grad_logits.transpose(1, 2) @ query).view(-1, *keys.shape[1:]))
            grad_v.index_add_(0, listed, (weights.transpose(1, 2) @ grad).view(-1, *keys.shape[1:]))
    return *(from_rows(x.to(q.dtype), q, region) for x in (grad_q, grad_k, grad_v)), grad_bias


def _parts(rows: Tensor, keys: Tensor) -> Iterator[slice]:
    """The lists in chunks of about so many numbers, in gathered keys or, for large regions, logits."""
    limit = _CPU_CHUNK if keys.device.type == "cpu" else _CHUNK
    pixels, dim = keys.shape[1:]
    step = max(limit // max(rows.shape[1] * pixels * max(pixels, dim), 1), 1)
    return (slice(start, start + step) for start in range(0, len(rows), step))


def _gather(rows: Tensor, *tensors: Tensor) -> Iterator[Tensor]:
    """The listed rows of each `[rows, pixels, d]` one after the other: `[lists, topk * pixels, d]`."""
    return (x.index_select(0, rows.flatten()).unflatten(0, rows.shape).flatten(1, 2) for x in tensors)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    return attend_lse(q, k, v, bias, scale) if return_lse else (attend(q, k, v, bias, scale), None)


def _row_numbers(indices: Tensor, heads: int) -> Tensor:
    """Rows of `to_rows` that the lists name, `[B * heads * regions, topk]`; padding reads a first row."""
    batch, _, regions, _ = indices.shape
    first = torch.arange(batch * heads, device=indices.device).view(batch, heads, 1, 1) * regions
    return (indices.clamp(min=0) + first).flatten(0, 2)


def _pair_bias(
    q: Tensor, indices: Tensor, bias: Tensor | None, region: Sequence[int], is_full: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The additions to the logits, -inf where a key is absent, `[B * heads * regions, 1, 1 | pixels, keys]`,
    and which pixels have an empty list `[B, H, W, heads, 1]` (their logits stay finite); None for neither."""
    batch, height, width, heads, _ = q.shape
    is_whole = height % region[0] == 0 and width % region[1] == 0
    if bias is None and is_whole and is_full:
        return None, None
    shape = (batch, heads, indices.shape[2], 1, indices.shape[3] * region[0] * region[1])
    total = q.new_zeros(shape) if bias is None else bias.flatten(1)[_bias_entries(q, indices, bias, region)]
    if is_whole and is_full:
        return total.flatten(0, 2)[:, None], None
    visible = (indices >= 0)[..., None].expand(*indices.shape, region[0] * region[1])
    if not is_whole:
        y, x = _pixels(region, height, width, indices.device)
        visible = visible & ((y < height) & (x < width))[indices.clamp(min=0).long()]
    empty = ~visible.flatten(-2).any(-1)
    visible = (visible.flatten(-2) | empty[..., None])[..., None, :]
    total = total.masked_fill(~visible, float("-inf"))
    total = total.expand(*shape[:3], *total.shape[3:]).flatten(0, 2)[:, None]
    empty = empty.expand(*shape[:3]).flatten()[:, None, None].expand(-1, region[0] * region[1], 1)
    return total, from_rows(empty, q, region)


def _bias_entries(q: Tensor, indices: Tensor, bias: Tensor, region: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Head and number of the entry of a bias for every query and key `[B, heads, regions, pixels, keys]`."""
    _, height, width, heads, _ = q.shape
    y, x = _pixels(region, height, width, indices.device)
    y, x = y.clamp(max=height - 1), x.clamp(max=width - 1)
    listed = indices.clamp(min=0).long()
    query_y, query_x = y[..., None], x[..., None]
    key_y, key_x = (n[listed].flatten(-2)[..., None, :] for n in (y, x))
    if bias.shape[1:] == (2 * height - 1, 2 * width - 1):
        entry = (key_y - query_y + height - 1) * (2 * width - 1) + key_x - query_x + width - 1
    else:
        entry = (query_y * width + query_x) * height * width + key_y * width + key_x
    return torch.arange(heads, device=indices.device).view(-1, 1, 1, 1), entry


def _pixels(region: Sequence[int], height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column of every pixel of every region `[regions, pixels]`, also of those beyond the map."""
    rows, columns = -(-height // region[0]), -(-width // region[1])
    y = torch.arange(rows * region[0], device=device).view(rows, 1, region[0], 1)
    x = torch.arange(columns * region[1], device=device).view(1, columns, 1, region[1])
    y, x = (n.expand(rows, columns, *region).flatten(2, 3).flatten(0, 1) for n in (y, x))
    return y, x
