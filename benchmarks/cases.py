"""The named shapes of the kernel comparison."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visionattn.kernels import (
    neighborhood_attention,
    overlapping_window_attention,
    routed_attention,
    topk_regions,
    window_attention,
)
from visionattn.kernels.local.pattern import Pattern, neighborhood_axis, overlapping_axis, window_axis


@dataclass(frozen=True)
class Case:
    """One kernel on one shape.

    Attributes:
        name: its name on the command line.
        kind: which kernel: `"window"`, `"neighborhood"`, `"overlap"` or `"routed"`.
        side: height and width of the map.
        heads: attention heads.
        head_dim: their width.
        options: arguments of the kernel beyond the maps and the bias.
        has_bias: whether a relative bias table with a gradient is added.
    """

    name: str
    kind: str
    side: int
    heads: int
    head_dim: int
    options: dict[str, Any]
    has_bias: bool = False

    @property
    def description(self) -> str:
        """The shape in words."""
        options = ", ".join(f"{name} {value}" for name, value in self.options.items())
        bias = ", relative bias" if self.has_bias else ""
        return f"{self.kind}, {self.side}x{self.side}, {self.heads} heads of {self.head_dim}, {options}{bias}"

    @property
    def is_large(self) -> bool:
        """Whether a CPU is too slow for it."""
        return self.side > 128

    @property
    def pattern(self) -> Pattern:
        """The geometry of a local kernel."""
        options = self.options
        if self.kind == "window":
            axis = window_axis(self.side, options["window_size"], options.get("shift", 0))
        elif self.kind == "overlap":
            axis = overlapping_axis(self.side, options["window_size"], options["overlap"], "zero")
        else:
            axis = neighborhood_axis(self.side, options["kernel_size"], options.get("stride", 1), 1, False)
        return Pattern(axis, axis)

    def inputs(self, batch: int, device: torch.device, dtype: torch.dtype, training: bool) -> list[Tensor]:
        """q, k, v as views of one packed projection, and the bias."""
        generator = torch.Generator(device).manual_seed(0)
        shape = (batch, self.side, self.side, 3, self.heads, self.head_dim)
        packed = torch.randn(shape, generator=generator, device=device).to(dtype)
        tensors = list(packed.unbind(3))
        if self.has_bias:
            table = torch.randn((self.heads, *self.pattern.table_shape), generator=generator, device=device)
            tensors.append(table.to(dtype))
        return [x.requires_grad_(training) for x in tensors]

    def pairs(self, inputs: list[Tensor]) -> int:
        """Pairs of pixels times images and heads: the logits of dense attention."""
        return math.prod(inputs[0].shape[:4]) * self.side**2

    def ours(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        """Our kernel."""
        if self.kind == "routed":
            region, indices = self.routing(q, k)
            return routed_attention(q, k, v, indices, region, distinct=True, full=True)
        kernels: dict[str, Callable[..., Tensor]] = {
            "window": window_attention,
            "overlap": overlapping_window_attention,
            "neighborhood": neighborhood_attention,
        }
        return kernels[self.kind](q, k, v, bias=bias, **self.options)

    def routing(self, q: Tensor, k: Tensor) -> tuple[tuple[int, int], Tensor]:
        """The size of a region and the index lists."""
        region = (self.side // self.options["regions"],) * 2
        return region, topk_regions(q, k, region, self.options["topk"])


def _windows() -> list[Case]:
    cases = []
    for window, side in ((7, 56), (8, 56), (16, 64)):
        options = {"window_size": window}
        cases += [
            Case(f"window{window}", "window", side, 4, 32, options, True),
            Case(f"window{window}_shifted", "window", side, 4, 32, {**options, "shift": window // 2}, True),
        ]
    return cases


def _neighborhoods() -> list[Case]:
    cases = [Case(f"na{kernel}", "neighborhood", 56, 4, 32, {"kernel_size": kernel}) for kernel in (7, 13)]
    cases += [Case("na7_bias", "neighborhood", 56, 4, 32, {"kernel_size": 7}, True)]
    for stride in (1, 16):
        options = {"kernel_size": 80, "stride": stride}
        cases.append(Case(f"na80_stride{stride}", "neighborhood", 256, 4, 128, options))
    return cases


def _routed() -> list[Case]:
    """The three routed stages of BiFormer-T at 448."""
    stages = enumerate(((112, 2, 1), (56, 4, 4), (28, 8, 16)), start=1)
    return [
        Case(f"routed_stage{stage}", "routed", side, heads, 32, {"regions": 7, "topk": topk})
        for stage, (side, heads, topk) in stages
    ]


CASES = {
    case.name: case
    for case in (
        *_windows(),
        *_neighborhoods(),
        Case("hat_overlap", "overlap", 64, 6, 30, {"window_size": 16, "overlap": 4}, True),
        *_routed(),
    )
}
