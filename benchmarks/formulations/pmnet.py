"""PMNet's attention as its paper writes it; there is no code of the authors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.formulations.formulation import Formulation
from visionattn.models.pmnet import ContextualTransformer, SeparableHybridAttention


class PaperAttention(SeparableHybridAttention):
    """Pooled rows and columns through 2-D convolutions, then an outer product."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """`[B, C, H, W]`, and what is added to it, to `[B, C, H, W]`."""
        rows, columns = (x.mean(axis, keepdim=True) + x.amax(axis, keepdim=True) for axis in (3, 2))
        lines = self.shuffle(torch.cat((rows, columns.transpose(2, 3)), 2))
        rows, columns = self.act(self.reduce(lines)).split(x.shape[2:], 2)
        x = x * (self.expand(rows) * self.expand(columns.transpose(2, 3))).sigmoid()
        return x if residual is None else residual + x


class PaperTransformer(ContextualTransformer):
    """Logits of every neighbour are made, then averaged."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, C, H, W]`."""
        key = self.act(F.instance_norm(self.key(x)))
        value = F.instance_norm(self.value(x))
        logits = self.att2(self.act(F.instance_norm(self.att1(torch.cat((key, x), 1)))))
        logits = logits.unflatten(1, (-1, self.neighbours)).mean(2).flatten(2)
        return key + (logits.softmax(-1) * value.flatten(2)).view_as(value)


FORMULATION = Formulation(
    {SeparableHybridAttention: PaperAttention, ContextualTransformer: PaperTransformer},
    ((64, 64),),
    "the formulas of the paper, whose authors published no code",
)
