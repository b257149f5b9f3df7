"""RGT's rectangle windows, its attention to a shrunken map, and its MLP, each by way of planes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.formulations.formulation import Formulation
from benchmarks.formulations.linear_hosts import planes
from benchmarks.formulations.rectangles import TheirRectangleAttention
from visionattn.layers.windows.rectangle_window import RectangleWindowAttention
from visionattn.models.rgt import GatedMlp, RecursiveGeneralizationAttention


class TheirRecursiveAttention(RecursiveGeneralizationAttention):
    """Matmul-softmax-matmul with the keys of the shrunken map."""

    def add_to(self, x: Tensor, norm: nn.Module, drop_path: nn.Module) -> Tensor:
        """`x + drop_path(attention(norm(x)))`."""
        batch, height, width, dim = x.shape
        tokens = norm(x).flatten(1, 2)
        small = planes(tokens.unflatten(1, (height, width)))
        for _ in range(self.reductions(height, width, self.training)):
            small = self.reduction(small)
        size = (small.shape[2], small.shape[3])
        small = F.conv2d(self.dwconv(small), self.conv.weight[..., None, None], self.conv.bias)
        small = F.gelu(self.norm(small.flatten(2).transpose(1, 2).contiguous()))
        q, k, v = (
            layer(t).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer, t in ((self.q, tokens), (self.k, small), (self.v, small))
        )
        weights = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1)
        values = v.transpose(1, 2).flatten(2).transpose(1, 2).contiguous().unflatten(2, size)
        v = v + self.cpe(values).flatten(2).unflatten(1, (self.num_heads, -1)).transpose(2, 3)
        out = self.proj((weights @ v).transpose(1, 2).reshape(batch, -1, dim))
        return x + drop_path(out.view_as(x))


class TheirGatedMlp(GatedMlp):
    """The gate is normalised as rows of pixels and convolved as planes."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        size = x.shape[1:3]
        x, gate = F.gelu(self.fc1(x.flatten(1, 2))).chunk(2, -1)
        gate = self.conv(self.norm(gate).transpose(1, 2).contiguous().unflatten(2, size))
        return self.fc2(x * gate.flatten(2).transpose(1, 2).contiguous()).unflatten(1, size)


FORMULATION = Formulation(
    {
        RectangleWindowAttention: TheirRectangleAttention,
        RecursiveGeneralizationAttention: TheirRecursiveAttention,
        GatedMlp: TheirGatedMlp,
    },
    ((64, 64),),
    "padding, roll, planes to windows to heads, mask, bias by MLP and gather, matmul-softmax-matmul, "
    "convolutions in planes",
)
