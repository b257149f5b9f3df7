"""The authors' formulations of attention, to be run in our networks in place of our kernels.

Each function has the signature of the kernel that it replaces and computes the same numbers in the way of
the published code: what is gathered, rolled, unfolded, masked and copied there is so here. Everything around
it, the weights included, stays ours: the difference in time and memory is that of the formulation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from visionattn.models import biformer, hat


@dataclass(frozen=True)
class Formulation:
    """How the authors of a family write its attention.

    Attributes:
        module: the model file whose kernels are replaced.
        functions: replacements by the names that the file imports.
        sizes: inputs (height, width) that a comparison uses unless told otherwise.
        what: the formulation in a few words.
        per_forward: caches that the authors' network fills anew in every forward pass.
    """

    module: ModuleType
    functions: dict[str, Callable[..., Tensor]]
    sizes: tuple[tuple[int, int], ...]
    what: str
    per_forward: tuple[Callable[[], None], ...] = ()

    @contextmanager
    def in_place_of_kernels(self, net: nn.Module) -> Iterator[None]:
        """Inside the block, `net` and every other network of the family computes as the authors do."""

        def start_forward(*args: object) -> None:
            for clear in self.per_forward:
                clear()

        ours = {name: getattr(self.module, name) for name in self.functions}
        hook = net.register_forward_pre_hook(start_forward)
        for name, function in self.functions.items():
            setattr(self.module, name, function)
        try:
            # Attention that a family leaves to PyTorch is written out in products there.
            with sdpa_kernel(SDPBackend.MATH):
                yield
        finally:
            hook.remove()
            for name, function in ours.items():
                setattr(self.module, name, function)


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
    q, k, v = (_partition(x.flatten(3), region_size) for x in (q, k, v))
    regions, topk = indices.shape[2:]

    def gather(x: Tensor) -> Tensor:
        where = indices.long().view(batch, regions, topk, 1, 1).expand(-1, -1, -1, *x.shape[2:])
        listed = x[:, None].expand(-1, regions, -1, -1, -1).gather(2, where)
        return listed.flatten(2, 3).flatten(0, 1).unflatten(-1, (heads, -1)).transpose(1, 2)

    k, v = gather(k).contiguous(), gather(v).contiguous()
    q = q.flatten(0, 1).unflatten(-1, (heads, -1)).transpose(1, 2)
    out = (q * scale @ k.transpose(2, 3)).softmax(-1) @ v
    out = out.transpose(1, 2).flatten(2).unflatten(0, (batch, regions))
    return _merge(out, region_size, height, width).unflatten(-1, (heads, -1))


def rolled_window_attention(
    q: Tensor, k: Tensor, v: Tensor, window_size: int, *, shift: int = 0, bias: Tensor
) -> Tensor:
    """HAT, Swin: the map is rolled and cut into windows, a mask keeps apart what was not adjacent before."""
    batch, height, width, heads, dim = q.shape
    if shift:
        q, k, v = (x.roll((-shift, -shift), (1, 2)) for x in (q, k, v))
    q, k, v = (_window_heads(x, window_size) for x in (q, k, v))
    logits = (q * dim**-0.5) @ k.transpose(2, 3) + _gathered_bias(bias, window_size, 0)
    if shift:
        mask = shift_mask(height, width, window_size, shift, q.device)
        logits = (logits.unflatten(0, (batch, -1)) + mask[:, None]).flatten(0, 1)
    out = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2).unflatten(0, (batch, -1))
    out = _merge(out, (window_size, window_size), height, width)
    out = out.roll((shift, shift), (1, 2)) if shift else out
    return out.unflatten(-1, (heads, dim))


def unfolded_window_attention(
    q: Tensor, k: Tensor, v: Tensor, window_size: int, overlap: int, *, bias: Tensor
) -> Tensor:
    """HAT's overlapping cross-attention: keys and values are unfolded into their overlapping windows."""
    batch, height, width, heads, dim = q.shape
    side = window_size + 2 * overlap
    kv = torch.cat((k.flatten(3), v.flatten(3)), -1).permute(0, 3, 1, 2)
    kv = F.unfold(kv, side, padding=overlap, stride=window_size).unflatten(1, (2, heads, dim, side**2))
    k, v = kv.permute(1, 0, 5, 2, 4, 3).flatten(1, 2).contiguous()
    q = _window_heads(q, window_size)
    logits = (q * dim**-0.5) @ k.transpose(2, 3) + _gathered_bias(bias, window_size, overlap)
    out = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2).unflatten(0, (batch, -1))
    return _merge(out, (window_size, window_size), height, width).unflatten(-1, (heads, dim))


@lru_cache(maxsize=1)
def shift_mask(height: int, width: int, window: int, shift: int, device: torch.device) -> Tensor:
    """-100 between pixels of a rolled window that were not adjacent: `[windows, window², window²]`."""
    label = torch.zeros(1, height, width, 1, device=device)
    cuts = (slice(-window), slice(-window, -shift), slice(-shift, None))
    for i, rows in enumerate(cuts):
        for j, columns in enumerate(cuts):
            label[:, rows, columns] = 3 * i + j
    label = _partition(label, (window, window))[0, ..., 0]
    return ((label[:, None] - label[:, :, None]) != 0) * -100.0


def _gathered_bias(table: Tensor, window: int, overlap: int) -> Tensor:
    """The bias `[heads, window², key_window²]`, gathered through an index of every pair at every call."""
    index = _pair_index(window, overlap, table.device)
    bias = table.flatten(1).t().contiguous()[index.flatten()]
    return bias.view(*index.shape, -1).permute(2, 0, 1).contiguous()


@lru_cache(maxsize=8)
def _pair_index(window: int, overlap: int, device: torch.device) -> Tensor:
    """Where the bias of each pair stands in the flat table; a stored buffer of the authors' networks."""
    query = torch.arange(window, device=device)
    key = torch.arange(-overlap, window + overlap, device=device)
    offset = key[None] - query[:, None] + window - 1 + overlap
    rows, columns = offset[:, None, :, None], offset[None, :, None, :]
    return (rows * (2 * (window + overlap) - 1) + columns).flatten(2).flatten(0, 1)


def _partition(x: Tensor, region: tuple[int, int]) -> Tensor:
    """`[B, regions, pixels, C]` of `[B, H, W, C]`."""
    x = x.unflatten(2, (-1, region[1])).unflatten(1, (-1, region[0]))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _merge(x: Tensor, region: tuple[int, int], height: int, width: int) -> Tensor:
    """The inverse of `_partition`."""
    x = x.unflatten(2, region).unflatten(1, (height // region[0], width // region[1]))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _window_heads(x: Tensor, window: int) -> Tensor:
    """`[B * windows, heads, pixels, d]` of `[B, H, W, heads, d]`."""
    heads = x.shape[3]
    x = _partition(x.flatten(3), (window, window)).flatten(0, 1)
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


FORMULATIONS = {
    "biformer": Formulation(
        biformer,
        {"routed_attention": gathered_attention},
        ((224, 224), (448, 448)),
        "gather of keys and values, copies by head, matmul-softmax-matmul",
    ),
    "hat": Formulation(
        hat,
        {
            "window_attention": rolled_window_attention,
            "overlapping_window_attention": unfolded_window_attention,
        },
        ((64, 64),),
        "roll, window partition, mask, gathered bias, unfold, matmul-softmax-matmul",
        per_forward=(shift_mask.cache_clear,),
    ),
}
