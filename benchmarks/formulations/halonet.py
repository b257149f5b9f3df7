"""HaloNet as timm writes it, for there is no code of its authors: planes, an unfold, logits one by one."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from benchmarks.formulations.formulation import Formulation
from benchmarks.formulations.linear_hosts import planes
from visionattn.layers.linear import NormedLinear
from visionattn.layers.local_attention import HaloAttention2d
from visionattn.models.frames.pyramid import Stage
from visionattn.models.halonet import HaloBlock


class TheirStage(Stage):
    """All blocks in planes."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to the map of the stage."""
        x = planes(x)
        for block in self.blocks:
            assert isinstance(block, HaloBlock)
            out = _attended(block.attn, F.relu(_normed(block.reduce, x)))
            out = _normed(block.expand, F.relu(block.norm(out)))
            shortcut = x
            if isinstance(block.shortcut, NormedLinear):
                shortcut = _normed(block.shortcut, x, block.stride)
            x = F.relu(shortcut + block.drop_path(out))
        return x.permute(0, 2, 3, 1)


def _normed(layer: NormedLinear, x: Tensor, stride: int = 1) -> Tensor:
    return layer.norm(F.conv2d(x, layer.linear.weight[..., None, None], stride=stride))


def _attended(attn: HaloAttention2d, x: Tensor) -> Tensor:
    block, window, heads = attn.block_size, attn.block_size + 2 * attn.halo, attn.num_heads
    size = x.shape[2:]
    if any(side % block for side in size):
        x = F.pad(x, (0, -size[1] % block, 0, -size[0] % block))
    rows, columns = x.shape[2] // block, x.shape[3] // block
    side = block // attn.stride
    q = F.conv2d(x, attn.q.weight[..., None, None], stride=attn.stride)
    q = q.reshape(-1, q.shape[1] // heads, rows, side, columns, side).permute(0, 1, 3, 5, 2, 4)
    q = q.reshape(q.shape[0], q.shape[1], side * side, -1).transpose(1, 3)  # [B * heads, blocks, queries, d]
    kv = F.pad(F.conv2d(x, attn.kv.weight[..., None, None]), (attn.halo,) * 4)
    kv = kv.unfold(2, window, block).unfold(3, window, block)
    kv = kv.reshape(len(q), -1, rows * columns, window * window).permute(0, 2, 3, 1)
    k, v = kv.split([n // heads for n in attn.dims], -1)
    logits = (q @ k.transpose(-1, -2)) * attn.scale + _relative(attn, q, side, window)
    out = (logits.softmax(-1) @ v).transpose(1, 3)
    out = out.reshape(-1, side, side, rows, columns).permute(0, 3, 1, 4, 2)
    out = out.reshape(-1, attn.dims[1], rows * side, columns * side)
    return out[:, :, : -(-size[0] // attn.stride), : -(-size[1] // attn.stride)]


def _relative(attn: HaloAttention2d, q: Tensor, side: int, window: int) -> Tensor:
    """The products of queries and embeddings of distances, moved to the keys by padding and reshaping."""
    shape = (*q.shape[:2], side * side, window * window)
    q = q.reshape(-1, side, side, q.shape[-1])
    of_columns = _moved(q, attn.width_rel, window).permute(0, 1, 3, 2, 4)
    of_rows = _moved(q.transpose(1, 2), attn.height_rel, window).permute(0, 3, 1, 4, 2)
    return (of_rows + of_columns).reshape(shape)


def _moved(q: Tensor, relative: Tensor, window: int) -> Tensor:
    """Relative logits `[N, y, rows of keys, x, keys]` of queries `[N, y, x, d]` along their second axis."""
    batch, height, width, _ = q.shape
    x = (q @ relative.t()).reshape(-1, width, len(relative))
    # Written behind one another and read in rows one longer, every row moves by one more than the last.
    x = F.pad(F.pad(x, (0, 1)).flatten(1), (0, len(relative) - width))
    x = x.reshape(-1, width + 1, len(relative))[:, :width, window - 1 :]
    x = x.reshape(batch, height, 1, width, window)
    return x.expand(-1, -1, window, -1, -1)


FORMULATION = Formulation(
    {Stage: TheirStage},
    ((256, 256), (512, 512)),
    "as in timm: planes, an unfold, relative logits by padding and reshaping, matmul-softmax-matmul",
)
