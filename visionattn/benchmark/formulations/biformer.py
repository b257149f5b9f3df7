"""BiFormer's gather of the listed regions."""

from __future__ import annotations

from torch import Tensor

from visionattn.layers import bilevel_routing

from .formulation import Formulation
from .windows import merge, partition


def gathered_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    region_size: tuple[int, int],
    *,
    scale: float,
    distinct: bool = True,
) -> Tensor:
    """BiFormer: keys and values of the listed regions are gathered, then copied into a layout by heads."""
    batch, height, width, heads, _ = q.shape
    q, k, v = (partition(x.flatten(3), region_size) for x in (q, k, v))
    regions, topk = indices.shape[2:]

    def gather(x: Tensor) -> Tensor:
        where = indices.long().view(batch, regions, topk, 1, 1).expand(-1, -1, -1, *x.shape[2:])
        listed = x[:, None].expand(-1, regions, -1, -1, -1).gather(2, where)
        return listed.flatten(2, 3).flatten(0, 1).unflatten(-1, (heads, -1)).transpose(1, 2)

    k, v = gather(k).contiguous(), gather(v).contiguous()
    q = q.flatten(0, 1).unflatten(-1, (heads, -1)).transpose(1, 2)
    out = (q * scale @ k.transpose(2, 3)).softmax(-1) @ v
    out = out.transpose(1, 2).flatten(2).unflatten(0, (batch, regions))
    return merge(out, region_size, height, width).unflatten(-1, (heads, -1))


FORMULATION = Formulation(
    bilevel_routing,
    {"routed_attention": gathered_attention},
    ((224, 224), (448, 448)),
    "gather of keys and values, copies by head, matmul-softmax-matmul",
)
