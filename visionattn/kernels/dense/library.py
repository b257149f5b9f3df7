"""Dense attention as an operator: implementations, gradients and FLOPs. Triton is imported when it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from visionattn.kernels.dense import reference
from visionattn.kernels.dense.plain import attention as plain
from visionattn.kernels.operator import Definition, register


def _fused(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor]:
    from visionattn.kernels.dense.fused.attention import forward

    rows = (x.flatten(1, 2) for x in (q, k, v))
    out, lse = forward(*rows, bias, scale)
    return out.unflatten(1, q.shape[1:3]), lse.unflatten(1, q.shape[1:3])


def _fused_gradients(
    grads: Sequence[Tensor | None],
    outputs: Sequence[Tensor],
    wanted: Sequence[bool],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float,
    return_lse: bool,
) -> tuple[Tensor | None, ...]:
    from visionattn.kernels.dense.fused.attention import backward

    out, lse = outputs
    grad, grad_lse = (torch.zeros_like(x) if g is None else g for g, x in zip(grads, outputs))
    rows = [x.flatten(1, 2) for x in (grad, grad_lse, q, k, v, out, lse)]
    *found, grad_bias = backward(*rows[:5], bias, *rows[5:], scale, wanted[3])
    sizes = (x.shape[1:3] for x in (q, k, v))
    return *(x.unflatten(1, size) for x, size in zip(found, sizes)), grad_bias


def _refuses(q: Tensor, *args: Any) -> str | None:
    if q.dtype == torch.float32 and q.shape[-1] > 128:
        return "in float32 the fused kernels hold 128 channels of a head in registers"
    return None


def _flops(q: Sequence[int], k: Sequence[int], products: int) -> int:
    """So many products of queries and keys."""
    batch, height, width, heads, dim = q
    return 2 * products * batch * height * width * k[1] * k[2] * heads * dim


DENSE_ATTENTION = register(
    Definition(
        name="dense_attention",
        schema="Tensor q, Tensor k, Tensor v, Tensor? bias, float scale, bool return_lse",
        implementations={
            "reference": reference.dense_attention,
            "torch": plain.dense_attention,
            "triton": _fused,
        },
        backwards={"torch": plain.gradients, "triton": _fused_gradients},
        flops=(
            lambda q, k, *args: _flops(q, k, 2),
            # Every kernel computes the logits and the gradients of the weights; then one, two and no products.
            lambda q, k, v, bias, *args: _flops(q, k, 7 if bias is None else 9),
        ),
        refusals={"triton": _refuses},
    )
)
