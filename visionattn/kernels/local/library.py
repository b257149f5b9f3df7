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
