"""Local attention as an operator: implementations, gradients and FLOPs. Triton is imported when it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from visionattn.kernels.local import reference
from visionattn.kernels.local.pattern import Axis, Border, Call, Pattern
from visionattn.kernels.local.plain.attention import tiled_attention
from visionattn.kernels.local.plain.backward import local_attention_backward
from visionattn.kernels.local.plain.neighborhood import (
    neighborhood_aggregation,
    neighborhood_scores,
    products_with_keys,
    sums_at_keys,
    sums_of_values,
    without_unseen,
)
from visionattn.kernels.operator import Definition, register

_BORDERS = get_args(Border)


def encode(pattern: Pattern) -> list[int]:
    """Write a pattern as numbers for an operator of PyTorch, without the size of the map."""
    return [
        number
        for a in (pattern.y, pattern.x)
        for number in (
            *(a.window, a.key_window, a.before, a.shift),
            *(_BORDERS.index(a.border), a.dilation, int(a.is_causal)),
        )
    ]


def decode(geometry: Sequence[int], size: Sequence[int]) -> Pattern:
    """Undo `encode` for a map of `size` (height, width)."""
    axes = []
    for length, numbers in zip(size, (geometry[:7], geometry[7:])):
        window, key_window, before, shift, border, dilation, is_causal = numbers
        causal = bool(is_causal)
        axes.append(Axis(length, window, key_window, before, shift, _BORDERS[border], dilation, causal))
    return Pattern(*axes)


def _pack(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Any, ...]:
    return q, k, v, call.bias, encode(call.pattern), call.scale, call.return_lse


def _unpack(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, geometry: list[int], *rest: Any) -> Any:
    return q, k, v, Call(decode(geometry, q.shape[1:3]), bias, *rest)


def _gradients(
    grads: Sequence[Tensor | None],
    outputs: Sequence[Tensor | None],
    wanted: Sequence[bool],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
) -> tuple[Tensor | None, ...]:
    grad = torch.zeros_like(q) if grads[0] is None else grads[0]
    return local_attention_backward(grad, grads[1], q, k, v, call, wanted[3])


def _fused(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    from visionattn.kernels.local.fused.forward import forward

    return forward(q, k, v, call)


def _fused_gradients(*args: Any) -> tuple[Tensor | None, ...]:
    from visionattn.kernels.local.fused.backward import backward

    return backward(*args)


def _score_gradients(
    grads: Sequence[Tensor],
    outputs: Sequence[Tensor | None],
    wanted: Sequence[bool],
    q: Tensor,
    k: Tensor,
    pattern: Pattern,
    scale: float,
) -> tuple[Tensor | None, ...]:
    grad = without_unseen(grads[0], pattern) * scale
    dq = sums_of_values(k, grad, pattern) if wanted[0] else None
    return dq, sums_at_keys(q, grad, pattern) if wanted[1] else None


def _aggregation_gradients(
    grads: Sequence[Tensor],
    outputs: Sequence[Tensor | None],
    wanted: Sequence[bool],
    v: Tensor,
    weights: Tensor,
    pattern: Pattern,
) -> tuple[Tensor | None, ...]:
    seen = without_unseen(weights, pattern)
    dv = sums_at_keys(grads[0], seen, pattern) if wanted[0] else None
    dw = without_unseen(products_with_keys(grads[0], v, pattern), pattern) if wanted[1] else None
    return dv, dw


def _fused_scores(*args: Any) -> Tensor:
    from visionattn.kernels.local.fused.neighborhood import scores

    return scores(*args)


def _fused_score_gradients(
    grads: Sequence[Tensor],
    outputs: Sequence[Tensor | None],
    wanted: Sequence[bool],
    q: Tensor,
    k: Tensor,
    pattern: Pattern,
    scale: float,
) -> tuple[Tensor | None, ...]:
    from visionattn.kernels.local.fused.neighborhood import aggregate, distribute

    dq = aggregate(k, grads[0], pattern, scale) if wanted[0] else None
    return dq, distribute(q, grads[0], pattern, scale) if wanted[1] else None


def _refuses_scores(q: Tensor, k: Tensor, pattern: Pattern, scale: float) -> str | None:
    _, height, width, heads, _ = q.shape
    numbers = height * width * heads * pattern.y.key_window * pattern.x.key_window
    return "the fused kernels address 2**31 numbers per image" if numbers >= 2**31 else None


def _fused_aggregation(*args: Any) -> Tensor:
    from visionattn.kernels.local.fused.neighborhood import aggregate

    return aggregate(*args)


def _fused_aggregation_gradients(
    grads: Sequence[Tensor],
    outputs: Sequence[Tensor | None],
    wanted: Sequence[bool],
    v: Tensor,
    weights: Tensor,
    pattern: Pattern,
) -> tuple[Tensor | None, ...]:
    from visionattn.kernels.local.fused.neighborhood import distribute, scores

    dv = distribute(grads[0], weights, pattern) if wanted[0] else None
    return dv, scores(grads[0], v, pattern, unseen=0.0) if wanted[1] else None


def _flops(q: Sequence[int], geometry: Sequence[int], products: int) -> int:
    """Count the operations of so many products of the queries and keys that see each other."""
    return q[0] * decode(geometry, q[1:3]).flops(q[3], q[4]) // 2 * products


LOCAL_ATTENTION = register(
    Definition(
        name="local_attention",
        schema="Tensor q, Tensor k, Tensor v, Tensor? bias, int[] geometry, float scale, bool return_lse",
        implementations={"reference": reference.local_attention, "torch": tiled_attention, "triton": _fused},
        backwards={"torch": _gradients, "triton": _fused_gradients},
        flops=(
            lambda q, k, v, bias, geometry, *args: _flops(q, geometry, 2),
            # The logits again, and a product for each of the weights' gradient, dq, dk and dv.
            lambda q, k, v, bias, geometry, *args: _flops(q, geometry, 5),
        ),
        pack=_pack,
        unpack=_unpack,
    )
)


NEIGHBORHOOD_SCORES = register(
    Definition(
        name="neighborhood_scores",
        schema="Tensor q, Tensor k, int[] geometry, float scale",
        implementations={
            "reference": reference.neighborhood_scores,
            "torch": neighborhood_scores,
            "triton": _fused_scores,
        },
        backwards={"torch": _score_gradients, "triton": _fused_score_gradients},
        flops=(
            lambda q, k, geometry, scale: _flops(q, geometry, 1),
            lambda q, k, geometry, scale: _flops(q, geometry, 2),
        ),
        refusals={"triton": _refuses_scores},
        keeps_outputs=False,
        shape=lambda q, k, geometry, scale: (*q.shape[:4], geometry[1] * geometry[8]),
        pack=lambda q, k, pattern, scale: (q, k, encode(pattern), scale),
        unpack=lambda q, k, geometry, scale: (q, k, decode(geometry, q.shape[1:3]), scale),
    )
)

NEIGHBORHOOD_AGGREGATION = register(
    Definition(
        name="neighborhood_aggregation",
        schema="Tensor v, Tensor weights, int[] geometry",
        implementations={
            "reference": reference.neighborhood_aggregation,
            "torch": neighborhood_aggregation,
            "triton": _fused_aggregation,
        },
        backwards={"torch": _aggregation_gradients, "triton": _fused_aggregation_gradients},
        flops=(
            lambda v, weights, geometry: _flops(v, geometry, 1),
            lambda v, weights, geometry: _flops(v, geometry, 2),
        ),
        keeps_outputs=False,
        pack=lambda v, weights, pattern: (v, weights, encode(pattern)),
        unpack=lambda v, weights, geometry: (v, weights, decode(geometry, v.shape[1:3])),
    )
)
