"""The form of local attention for sizes that vary: the definition at every size, and one program for all."""

from __future__ import annotations

import pytest
import torch
from test_local_pattern import axes
from torch import Tensor, nn
from torch.export import Dim

from visionattn.kernels import neighborhood_attention, use_backend, window_attention
from visionattn.kernels.local.pattern import (
    Axis,
    Call,
    Pattern,
    grid_axis,
    neighborhood_axis,
    overlapping_axis,
)
from visionattn.kernels.local.plain.uniform import can_be_uniform, uniform_attention
from visionattn.kernels.local.reference import local_attention

DILATED = [
    neighborhood_axis(n, 3, t, d, c) for n in (9, 11, 17) for t in (1, 2) for d in (2, 3) for c in (0, 1)
]
AXES = [*axes()[::7], *DILATED, *(overlapping_axis(n, 4, 1, "clamp") for n in (6, 7, 12)), grid_axis(11, 4)]


def check(y: Axis, x: Axis, kind: str) -> bool:
    pattern = Pattern(y, x)
    shapes = {"table": pattern.table_shape, "dense": pattern.dense_shape}
    bias = torch.randn(2, *shapes[kind], dtype=torch.float64) if kind in shapes else None
    if not can_be_uniform(pattern, bias):
        return False
    q, k, v = torch.randn(3, 2, y.length, x.length, 2, 4, dtype=torch.float64)
    call = Call(pattern, bias, 0.5, True)
    wanted = local_attention(q, k, v, call)
    for ours, theirs in zip(uniform_attention(q, k, v, call), wanted):
        torch.testing.assert_close(ours, theirs, msg=f"{pattern} {kind}")
    return True


@pytest.mark.parametrize("kind", ["none", "table", "dense"])
def test_it_is_the_definition(kind: str) -> None:
    pairs = [(axis, AXES[(17 * i + 5) % len(AXES)]) for i, axis in enumerate(AXES)]
    assert sum(check(y, x, kind) for y, x in pairs) > 10


class Mixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = x.unflatten(3, (3, 2, 4)).unbind(3)
        table = torch.linspace(-1, 1, 2 * 49).view(2, 7, 7)
        out = window_attention(q, k, v, 4, shift=2, bias=table)
        out = neighborhood_attention(out, k, v, 3)
        return neighborhood_attention(out, k, v, 3, dilation=2)


def test_one_program_for_all_sizes() -> None:
    dims = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC, 2: Dim.DYNAMIC},)
    with torch.no_grad(), use_backend("torch"):
        program = torch.export.export(Mixed(), (torch.randn(2, 16, 20, 24),), dynamic_shapes=dims).module()
        for shape in ((1, 19, 21), (3, 40, 17), (1, 33, 50)):
            x = torch.randn(*shape, 24)
            torch.testing.assert_close(program(x), Mixed()(x))
