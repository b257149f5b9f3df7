"""Softmax attention of query sets over key sets in plain PyTorch: what the other PyTorch paths reduce to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn._compat import is_functorch_active
from visionattn.kernels.precision import at_least_float32

# As few keys, and no more than queries, are taken as rows.
_FEW = 64


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Output and log-sum-exp (None unless asked for); arguments as in `op.py`."""
    size = q.shape[1:3]
    q, k, v = (_by_head(x) for x in (q, k, v))
    if return_lse:
        out, lse = attend_lse(q, k, v, bias, scale)
        return _to_map(out, size), _to_map(lse, size)
    if _are_few(k.shape[2], q.shape[2]):
        return _to_map(attend_to_few(q, k, v, bias, scale), size), None
    if bias is None and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or is_functorch_active()
        if not is_traced:
            return _to_map(_Recorded.apply(q, k, v, scale), size), None
    return _to_map(attend(q, k, v, bias, scale), size), None


def _are_few(keys: int, queries: int) -> bool:
    """Whether keys are taken as rows. A size that varies decides nothing: the program is to be for all."""
    if isinstance(keys, torch.SymInt):
        return False
    return keys <= _FEW and (isinstance(queries, torch.SymInt) or keys <= queries)


class _Recorded(torch.autograd.Function):
    """PyTorch's fused attention, which keeps no weights, and its gradient; second derivatives by `attend`."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.scale = scale
        with torch.enable_grad():
            q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
            ctx.inputs, ctx.out = (q, k, v), F.scaled_dot_product_attention(q, k, v, scale=scale)
        return ctx.out.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if not torch.is_grad_enabled():
            return *torch.autograd.grad(ctx.out, ctx.inputs, grad, retain_graph=True), None
        wanted = [x for x in ctx.saved_tensors if x.requires_grad]
        out = attend(*ctx.saved_tensors, bias=None, scale=ctx.scale)
        found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
        return *(next(found) if x.requires_grad else None for x in ctx.saved_tensors), None


def gradients(
    grads: Sequence[Tensor | None],
    outputs: Sequence[Tensor | None],
    wanted: Sequence[bool],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float,
    return_lse: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v and the bias from those of the output and the log-sum-exp.

    With P the weights and dP = dO Vᵀ: dS = P * (dP - rowsum(P * dP) + dLSE), dQ = scale dS K, dK = scale dSᵀ
    Q, dV = Pᵀ dO, and the gradient of the bias is the sum of dS over the batch.
    """
    query, key, value = (at_least_float32(_by_head(x)) for x in (q, k, v))
    weights = _logits(query, key, bias, scale).softmax(-1)
    grad_logits, grad_v = torch.zeros_like(weights), torch.zeros_like(value)
    grad, grad_lse = grads
    if grad is not None:
        grad = at_least_float32(_by_head(grad))
        grad_logits = grad @ value.transpose(-2, -1)
        grad_logits = grad_logits - (grad_logits * weights).sum(-1, keepdim=True)
        grad_v = weights.transpose(-2, -1) @ grad
    if grad_lse is not None:
        grad_logits = grad_logits + grad_lse.flatten(1, 2).transpose(1, 2)[..., None]
    grad_logits = weights * grad_logits
    found = grad_logits @ key * scale, grad_logits.transpose(-2, -1) @ query * scale, grad_v
    maps = (_to_map(x, t.shape[1:3]).to(t.dtype) for x, t in zip(found, (q, k, v)))
    return *maps, None if bias is None else grad_logits.sum(0).to(bias.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """`softmax(scale q kᵀ + bias) v`.

    Inference uses the fused attention of PyTorch. Training writes the products out: a mask that needs a
    gradient would select PyTorch's slow path anyway, windows of 49 keys are faster so, and derivatives of any
    order exist.

    Args:
        q: queries `[N, heads, nq, d]`.
        k: keys `[N, heads, nk, d]`.
        v: values `[N, heads, nk, d]`.
        bias: added to the logits, broadcastable to `[N, heads, nq, nk]`.
        scale: multiplies q·k only.

    Returns:
        `[N, heads, nq, d]` in the dtype of `v`.
    """
    inputs = (q, k, v) if bias is None else (q, k, v, bias)
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in inputs)):
        # PyTorch falls back to its slow path for a mask that requires a gradient, even under no_grad, and
        # for a mask of three axes.
        mask = None if bias is None else bias.detach().to(q.dtype)[(None,) * (4 - bias.dim())]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    logits = _logits(q, k, bias, scale)
    # Half-precision weights of many keys lose their small terms unless the softmax runs in float32.
    precision = torch.float32 if logits.dtype in (torch.float16, torch.bfloat16) else None
    return logits.softmax(-1, dtype=precision).to(v.dtype) @ v


def attend_lse(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """`attend` and the natural log of its softmax denominator `[N, heads, nq]`, at least float32."""
    logits = _logits(q, k, bias, scale)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    lse = logits.logsumexp(-1)
    return (logits - lse[..., None]).exp().to(v.dtype) @ v, lse


def attend_to_few(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """`attend` to few keys, with logits `[N, heads, nk, nq]`.

    A softmax over rows of nine keys leaves vector units idle; over columns, every query is a lane. Up to 25
    times faster on a CPU than attention in the usual order.
    """
    logits = (k * scale) @ q.transpose(-2, -1)
    if bias is not None:
        logits = logits + bias.transpose(-2, -1)
    precision = torch.float32 if logits.dtype in (torch.float16, torch.bfloat16) else None
    return logits.softmax(-2, dtype=precision).to(v.dtype).transpose(-2, -1) @ v


def _by_head(x: Tensor) -> Tensor:
    """`[B, heads, H * W, d]` of `[B, H, W, heads, d]`."""
    return x.flatten(1, 2).transpose(1, 2)


def _to_map(x: Tensor, size: Sequence[int]) -> Tensor:
    """`[B, H, W, heads, ...]` of `[B, heads, H * W, ...]`."""
    return x.transpose(1, 2).unflatten(1, size)


def _logits(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    logits = (q * scale) @ k.transpose(-2, -1)
    return logits if bias is None else logits + bias
