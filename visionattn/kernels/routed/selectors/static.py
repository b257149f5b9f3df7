"""Static lists by how well they do on a few queries: Sparse VideoGen (https://arxiv.org/abs/2502.01776)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.kernels.checks import check_qkv, pair
from visionattn.kernels.precision import at_least_float32, without_autocast
from visionattn.kernels.routed.lists import cut_to_longest, listed_regions
from visionattn.kernels.routed.reference import places
from visionattn.kernels.routed.regions import check_counts


@torch.no_grad()
def best_pattern(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    region_size: int | tuple[int, int],
    patterns: Sequence[Tensor],
    samples: int | Tensor = 64,
    generator: torch.Generator | None = None,
    *,
    scale: float | None = None,
) -> Tensor:
    """For each head the static pattern whose attention is nearest to the full one on a few queries.

    The squared error of the outputs of randomly drawn queries decides, as Sparse VideoGen tells spatial from
    temporal heads (https://arxiv.org/abs/2502.01776). Patterns should have equal costs; of two that are
    equally near the first is taken. Float32 whatever the input and the autocast state. Detached.

    Args:
        q: queries `[B, H, W, heads, d]`.
        k: keys, same shape.
        v: values, same shape.
        region_size: side of a region in pixels, or (height, width); a border region may be smaller.
        patterns: lists `[1 or B, 1 or heads, regions, n]` as `visionattn.kernels.window_regions` and the
            others give; lengths may differ. Every list names a region.
        samples: how many different queries are drawn, or their row-major numbers `[samples]`, which makes the
            choice repeatable, and which a compiled graph needs where a generator is given.
        generator: draws them, on the device of q; PyTorch's own by default.
        scale: multiplies q·k; `d ** -0.5` by default.

    Returns:
        `[B, heads, regions, n]` int32, -1 behind the end of a list. n is the length of the longest list, or,
        in a compiled graph, of the longest pattern.

    Raises:
        ValueError: shapes do not fit, no patterns, a list of nothing but padding, or an argument is out of
            its range.
    """
    height, width = check_qkv("best_pattern", q, k, v)
    region = pair("region_size", region_size)
    count = samples.numel() if isinstance(samples, Tensor) else samples
    check_counts("best_pattern", samples=count)
    lists = _stacked(patterns, q, -(-height // region[0]) * -(-width // region[1]))
    if not isinstance(samples, Tensor):
        samples = torch.randperm(height * width, generator=generator, device=q.device)[:samples]
    region_of, _ = places((height, width), region, q.device)
    with without_autocast(q):
        q, k, v = (at_least_float32(x).flatten(1, 2).transpose(1, 2) for x in (q, k, v))
        q = q[:, :, samples.long()]
        expected = F.scaled_dot_product_attention(q, k, v, scale=scale)
        errors = []
        for pattern in lists:
            listed = listed_regions(pattern, pattern.shape[2])
            visible = listed[:, :, region_of[samples.long()]][..., region_of]
            out = F.scaled_dot_product_attention(q, k, v, visible, scale=scale)
            errors.append((out - expected).square().mean((2, 3)))
    best = torch.stack(errors).argmin(0)[None, :, :, None, None]
    return cut_to_longest(lists.take_along_dim(best, 0)[0].to(torch.int32))


def _stacked(patterns: Sequence[Tensor], q: Tensor, regions: int) -> Tensor:
    """Patterns of one length `[patterns, B, heads, regions, n]`."""
    if not len(patterns):
        raise ValueError("best_pattern: at least one pattern is needed, got none")
    batch, heads = q.shape[0], q.shape[3]
    longest = max(pattern.shape[-1] for pattern in patterns)
    full = []
    for pattern in patterns:
        lead, rest = pattern.shape[:2], pattern.shape[2:-1]
        if pattern.dim() != 4 or lead[0] not in (1, batch) or lead[1] not in (1, heads) or rest != (regions,):
            raise ValueError(
                f"best_pattern: a pattern must be [1 or {batch}, 1 or {heads}, {regions}, n], "
                f"got {tuple(pattern.shape)}"
            )
        if not torch.compiler.is_compiling() and not (pattern >= 0).any(-1).all():
            raise ValueError("best_pattern: a list of a pattern names no region")
        pattern = F.pad(pattern.to(q.device), (0, longest - pattern.shape[-1]), value=-1)
        full.append(pattern.expand(batch, heads, -1, -1))
    return torch.stack(full)
