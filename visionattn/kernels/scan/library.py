"""Recurrent operators of PyTorch: implementations, gradients and FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from visionattn.kernels.operator import Definition, register
from visionattn.kernels.scan import reference
from visionattn.kernels.scan.orders import as_orders, as_text
from visionattn.kernels.scan.plain import chunks, first_order, selective

Shape = Sequence[int]


def _pack(*args: Any) -> list[Any]:
    """Orders as text."""
    return [as_text(x) if isinstance(x, tuple) else x for x in args]


def _unpack(*args: Any) -> list[Any]:
    return [as_orders(x) if isinstance(x, str) else x for x in args]


def _numbers(shape: Shape) -> int:
    """Pixels times heads of `[B, H, W, heads, ...]`."""
    return shape[0] * shape[1] * shape[2] * shape[3]


def _scan_flops(passes: int) -> Callable[..., int]:
    """Per channel and state: decay, write, add and read, and so many times that."""
    return lambda x, delta, B, *args: 6 * passes * _numbers(x) * x[4] * B[4]


def _state_flops(products: int) -> Callable[..., int]:
    """So many products of states `[d, e]` with vectors: the recurrence as it is written, not its chunks."""
    return lambda v, q, *args: 2 * products * _numbers(v) * q[4] * v[4]


SELECTIVE_SCAN = register(
    Definition(
        name="selective_scan",
        schema=(
            "Tensor x, Tensor delta, Tensor B, Tensor C, Tensor? z, Tensor A, Tensor? D, Tensor? delta_bias, "
            "str order, bool delta_softplus"
        ),
        implementations={"reference": reference.selective_scan, "torch": selective.selective_scan},
        backwards={"torch": selective.selective_scan.backward},
        flops=(_scan_flops(1), _scan_flops(3)),
        shared=("A", "D", "delta_bias"),
        pack=_pack,
        unpack=_unpack,
    )
)

DECAY_ATTENTION = register(
    Definition(
        name="decay_attention",
        schema="Tensor v, Tensor q, Tensor k, Tensor log_decay, str order, float scale",
        implementations={"reference": reference.decay_attention, "torch": chunks.decay_attention},
        backwards={"torch": chunks.decay_attention.backward},
        # A state is decayed and written, which is two products, and read.
        flops=(_state_flops(3), _state_flops(8)),
        pack=_pack,
        unpack=_unpack,
    )
)

LINEAR_RECURRENCE = register(
    Definition(
        name="linear_recurrence",
        schema="Tensor x, Tensor log_decay, str order",
        implementations={"reference": reference.linear_recurrence, "torch": first_order.linear_recurrence},
        backwards={"torch": first_order.linear_recurrence.backward},
        flops=(
            lambda x, *args: 2 * _numbers(x) * x[4],
            lambda x, *args: 4 * _numbers(x) * x[4],
        ),
        pack=_pack,
        unpack=_unpack,
    )
)

ADDITIVE_DECAY_ATTENTION = register(
    Definition(
        name="additive_decay_attention",
        schema="Tensor v, Tensor q, Tensor k, str order, float scale",
        implementations={
            "reference": reference.additive_decay_attention,
            "torch": chunks.additive_decay_attention,
        },
        backwards={"torch": chunks.additive_decay_attention.backward},
        flops=(_state_flops(3), _state_flops(8)),
        pack=_pack,
        unpack=_unpack,
    )
)

DELTA_ATTENTION = register(
    Definition(
        name="delta_attention",
        schema=("Tensor v, Tensor q, Tensor k, Tensor beta, Tensor log_decay, str order, float scale"),
        implementations={"reference": reference.delta_attention, "torch": chunks.delta_attention},
        backwards={"torch": chunks.delta_attention.backward},
        # A state is decayed, read with the key, written and read.
        flops=(_state_flops(4), _state_flops(11)),
        pack=_pack,
        unpack=_unpack,
    )
)
