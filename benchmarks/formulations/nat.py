"""NAT and DiNAT without the NATTEN library: every pixel's keys and values are copied beside it."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.formulations.formulation import Formulation
from visionattn.layers import NeighborhoodAttention2d


class TheirNeighborhoodAttention(NeighborhoodAttention2d):
    """Three operators in a row: logits of queries and keys with their bias, softmax, mean of the values."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        height, width = x.shape[1:3]
        smallest = self.kernel_size * self.dilation
        x = F.pad(x, (0, 0, 0, max(smallest - width, 0), 0, max(smallest - height, 0)))
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(3, 0, 4, 1, 2, 5)  # [B, heads, H, W, d]
        with torch.inference_mode(False):
            rows, columns = (
                neighbours(side, self.kernel_size, self.dilation, x.device) for side in x.shape[1:3]
            )
        logits = (q * q.shape[-1] ** -0.5).unsqueeze(-2) @ _copied(k, rows[0], columns[0]).transpose(-2, -1)
        bias = self.rpb[:, rows[1][:, None, :, None], columns[1][None, :, None, :]].flatten(3)
        weights = (logits + bias.unsqueeze(-2)).softmax(-1)
        out = (weights @ _copied(v, rows[0], columns[0])).squeeze(-2)
        return self.proj(out.permute(0, 2, 3, 1, 4).flatten(3)[:, :height, :width])


@lru_cache(maxsize=16)
def neighbours(length: int, kernel: int, dilation: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The keys of every pixel of a line `[length, kernel]`, and where their biases stand in the table."""
    pixel = torch.arange(length, device=device)
    group, place = pixel % dilation, pixel // dilation
    last = (length - group + dilation - 1) // dilation - kernel
    first = (place - kernel // 2).clamp(min=0).minimum(last)
    keys = first[:, None] + torch.arange(kernel, device=device)
    return keys * dilation + group[:, None], keys - place[:, None] + kernel - 1


def _copied(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The neighbours `[B, heads, H, W, kernel², d]` of every pixel of `[B, heads, H, W, d]`."""
    x = x.index_select(2, rows.flatten()).index_select(3, columns.flatten())
    x = x.unflatten(3, columns.shape).unflatten(2, rows.shape)
    return x.transpose(3, 4).flatten(4, 5)


FORMULATION = Formulation(
    {NeighborhoodAttention2d: TheirNeighborhoodAttention},
    ((224, 224),),
    "keys and values of every pixel copied, logits with their bias, softmax and sum one after another",
)
