"""Linear attention in fast plain PyTorch: no product ever forms pairs of pixels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from visionattn.kernels.precision import without_autocast


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, normalize: str, scale: float, eps: float, floor: float
) -> Tensor:
    """One reduction over keys and values, one pass over queries; arguments as in `op.py`."""
    recording = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if not recording or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return differentiable(q, k, v, normalize, scale, eps, floor)
    return _LinearAttention.apply(q, k, v, normalize, scale, eps, floor)


def differentiable(q: Tensor, k: Tensor, v: Tensor, *form: Any) -> Tensor:
    """`linear_attention` in operations of PyTorch: for compilers, and for derivatives of any order."""
    height, width = q.shape[1:3]
    with without_autocast(q):
        q, k, v_ = _state_precision(q, k, v)
        out = _FORMS[form[0]](q, k, v_, *form[1:]).to(v.dtype)
    return _to_map(out, height, width)


def _state_precision(*tensors: Tensor) -> tuple[Tensor, ...]:
    """By head. Sums over ten thousand pixels lose what half precision cannot hold: they are made in float32,
    autocast or not."""
    half = tensors[0].dtype in (torch.float16, torch.bfloat16)
    return tuple(_by_head(x).to(torch.float32 if half else x.dtype) for x in tensors)


def _unnormalized(q: Tensor, k: Tensor, v: Tensor, scale: float, eps: float, floor: float) -> Tensor:
    return q @ (k.transpose(-2, -1) @ v * scale)


def _sum_normalized(q: Tensor, k: Tensor, v: Tensor, scale: float, eps: float, floor: float) -> Tensor:
    return _unnormalized(q, k, v, scale, eps, floor) / _denominator(q, k, scale, eps).clamp(min=floor)


def _denominator(q: Tensor, k: Tensor, scale: float, eps: float) -> Tensor:
    return q @ (k.sum(-2, keepdim=True) * scale).transpose(-2, -1) + eps


def _injective(q: Tensor, k: Tensor, v: Tensor, scale: float, eps: float, floor: float) -> Tensor:
    # The published form subtracts two large numbers at the end; the covariance of keys and values is the same
    # number without the cancellation.
    return _unnormalized(q, _centred(k), v, scale / k.shape[-2], eps, floor) + v.mean(-2, keepdim=True)


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(-2, keepdim=True)


_FORMS = {"none": _unnormalized, "sum": _sum_normalized, "injective": _injective}


class _LinearAttention(torch.autograd.Function):
    """`differentiable`, keeping nothing but its arguments for the backward pass."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, *form: Any) -> Tensor:
        return differentiable(q, k, v, *form)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.normalize, ctx.scale, ctx.eps, ctx.floor = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        form: Any = (ctx.normalize, ctx.scale, ctx.eps, ctx.floor)
        rule = _differentiable_gradients if torch.is_grad_enabled() else gradients
        return *rule(grad_out, *ctx.saved_tensors, *form), None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        """A mapped axis is more batch."""
        tensors = [
            x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            for x, dim in zip(args[:3], in_dims)
        ]
        out = _LinearAttention.apply(*(x.flatten(0, 1) for x in tensors), *args[3:])
        return out.unflatten(0, (info.batch_size, -1)), 0


def _differentiable_gradients(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *form: Any
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k and v that can be differentiated again, by PyTorch's own rules."""
    wanted = [x for x in (q, k, v) if x.requires_grad]
    out = differentiable(q, k, v, *form)
    grads = iter(torch.autograd.grad(out, wanted, grad_out, create_graph=True))
    return tuple(next(grads) if x.requires_grad else None for x in (q, k, v))


def gradients(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    normalize: str,
    scale: float,
    eps: float,
    floor: float,
) -> tuple[Tensor, ...]:
    """Gradients of q, k and v.

    With S = scale Σ k vᵀ, z = scale Σ k, n the denominator (else 1), u = dO / n and ρ = -(u·O): dQ = u Sᵀ +
    ρ z, dS = scale Σ q uᵀ, dz = scale Σ ρ q, dK = V dSᵀ + dz and dV = K dS. The injective form has centred
    keys and values in their place, and adds the mean of dO to dV.
    """
    height, width = q.shape[1:3]
    dtype = q.dtype
    with without_autocast(q):
        u, q, k, v = _state_precision(grad_out, q, k, v)
        if normalize == "injective":
            scale = scale / k.shape[-2]
            mean, k, v = u.mean(-2, keepdim=True), _centred(k), _centred(v)
        state = k.transpose(-2, -1) @ v * scale
        if normalize == "sum":
            raw = _denominator(q, k, scale, eps)
            u = u / raw.clamp(min=floor)
            slope = -((q @ state) * u).sum(-1, keepdim=True) / raw.clamp(min=floor)
            slope = slope.masked_fill(raw < floor, 0) * scale
            grad_q = u @ state.transpose(-2, -1) + slope * k.sum(-2, keepdim=True)
        else:
            grad_q = u @ state.transpose(-2, -1)
        grad_state = q.transpose(-2, -1) @ u * scale
        grad_k, grad_v = v @ grad_state.transpose(-2, -1), k @ grad_state
        if normalize == "sum":
            grad_k = grad_k + slope.transpose(-2, -1) @ q
        elif normalize == "injective":
            grad_v = grad_v + mean
    return tuple(_to_map(x.to(dtype), height, width) for x in (grad_q, grad_k, grad_v))


def _by_head(x: Tensor) -> Tensor:
    """`[B, heads, H * W, d]` of `[B, H, W, heads, d]`."""
    return x.flatten(1, 2).transpose(1, 2)


def _to_map(x: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `_by_head`."""
    return x.transpose(1, 2).unflatten(1, (height, width))
