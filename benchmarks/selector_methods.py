"""The methods that the comparison of selectors sets to a density, each as data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn import kernels
from visionattn.kernels import Blocks, block_attention, routed_attention, sort_blocks, union_regions
from visionattn.kernels.routed.selectors.antidiagonal import antidiagonal_scores
from visionattn.kernels.routed.selectors.mass import mass_scores
from visionattn.kernels.routed.selectors.pick import pick_topk


class Maps(NamedTuple):
    """Queries, keys and values `[B, H, W, heads, d]`."""

    q: Tensor
    k: Tensor
    v: Tensor


class Choice(NamedTuple):
    """What a method attends to.

    Attributes:
        lists: for `routed_attention`, or for `block_attention` where there are blocks.
        rows: the region size of the queries; None: that of the keys.
        region: the region size of the keys; None: that of the comparison.
        blocks: partitions of queries and keys.
        run: the attention itself, where it is no list; and then its density.
        density: share of all pairs.
    """

    lists: Tensor | None = None
    rows: int | tuple[int, int] | None = None
    region: int | None = None
    blocks: tuple[Blocks, Blocks] | None = None
    run: Callable[[Maps], Tensor] | None = None
    density: float | None = None


Region = tuple[int, int]
Options = dict[str, Any]


class Method(NamedTuple):
    """A way to attend to a part of a map.

    Attributes:
        name: as in the table.
        choose: `(maps, region, **options)` to a `Choice`.
        options: `(density, maps, region)` to options among which the nearest in density is taken.
    """

    name: str
    choose: Callable[..., Choice]
    options: Callable[[float, Maps, Region], Iterator[Options]]


def attend(maps: Maps, choice: Choice, region: Region) -> tuple[Tensor, Tensor | None]:
    """Output and, where it is a softmax over what is listed, log-sum-exp."""
    if choice.run is not None:
        return choice.run(maps), None
    assert choice.lists is not None
    if choice.blocks is not None:
        return block_attention(*maps, choice.lists, *choice.blocks, return_lse=True)
    rows = choice.rows or (region if choice.region is None else choice.region)
    keys = choice.region or region
    return routed_attention(*maps, choice.lists, keys, query_region_size=rows, return_lse=True, distinct=True)


def density_of(choice: Choice, maps: Maps, region: Region) -> float:
    """Pairs of pixels that are compared, as a share of all, for regions that divide the map."""
    if choice.density is not None:
        return choice.density
    assert choice.lists is not None
    pixels = maps.q.shape[1] * maps.q.shape[2]
    listed = choice.lists >= 0
    if choice.blocks is None:
        side = (choice.region, choice.region) if choice.region else region
        return listed.sum(-1).float().mean().item() * side[0] * side[1] / pixels
    queries, keys = (blocks.starts.diff() for blocks in choice.blocks)
    batch, heads, rows = maps.q.shape[0], maps.q.shape[3], choice.lists.shape[2]
    numbers = choice.lists.clamp(min=0).long().expand(batch, heads, -1, -1)
    keys = keys[:, :, None].expand(batch, heads, rows, -1).gather(3, numbers) * listed
    return ((queries * keys.sum(-1)).sum(-1).float() / pixels**2).mean().item()


def with_own(choice: Choice, maps: Maps, region: Region) -> Choice:
    """The own region of every query, or the own pixel where lists name pixels, forced onto its list."""
    assert choice.lists is not None
    height, width = maps.q.shape[1:3]
    rows = choice.rows or region
    if choice.region is not None:
        return choice  # One list for all queries: their own keys would be all keys.
    blocks = kernels.region_blocks(height, width, region, maps.q.device)
    own = torch.arange(blocks.starts.shape[2] - 1, dtype=torch.int32, device=maps.q.device)
    if rows == 1:
        sizes = blocks.starts[0, 0].diff()
        own = torch.empty_like(blocks.order[0, 0]).scatter(
            0, blocks.order[0, 0].long(), own.repeat_interleave(sizes)
        )
    return choice._replace(lists=union_regions(choice.lists, own[None, None, :, None]))


def _count(density: float, maps: Maps, region: Region) -> int:
    height, width = maps.q.shape[1:3]
    return max(1, round(density * (height // region[0]) * (width // region[1])))


def _lists(function: Callable[..., Tensor], maps: Maps, region: Region, **options: Any) -> Choice:
    return Choice(function(maps.q, maps.k, region, **options))


def _static(function: Callable[..., Tensor], maps: Maps, region: Region, **options: Any) -> Choice:
    return Choice(function(*maps.q.shape[1:3], region, device=maps.q.device, **options))


def _topk(density: float, maps: Maps, region: Region) -> Iterator[Options]:
    yield {"topk": _count(density, maps, region)}


def _random(maps: Maps, region: Region, topk: int) -> Choice:
    generator = torch.Generator().manual_seed(0)
    regions = _count(1, maps, region)
    scores = torch.rand(1, maps.q.shape[3], regions, regions, generator=generator).to(maps.q.device)
    return Choice(pick_topk(scores, topk))


def _antidiagonal(maps: Maps, region: Region, topk: int) -> Choice:
    return Choice(pick_topk(antidiagonal_scores(maps.q, maps.k, region, 8), topk))


def _gated(maps: Maps, region: Region, topk: int, pool: Any) -> Choice:
    return Choice(kernels.gated_regions(maps.q, maps.k, region, topk=topk, pool=pool), rows=1)


def _one_set(maps: Maps, region: Region, keys: int) -> Choice:
    """The same keys for all queries of a head, by the mass that they truly receive: what a learned bias may
    at best find."""
    mass = mass_scores(maps.q, maps.k, (1, 1)).mean(2).unflatten(2, maps.q.shape[1:3])
    return Choice(kernels.dynamic_mask_keys(mass, keys), rows=(maps.q.shape[1], maps.q.shape[2]), region=1)


def _best_pattern(maps: Maps, region: Region, topk: int) -> Choice:
    """The better of a window and strides, for each head."""
    height, width = maps.q.shape[1:3]
    side = max(0, round((topk**0.5 - 1) / 2))
    stride = max(1, round(_count(1, maps, region) / topk))
    patterns = [
        kernels.window_regions(height, width, region, side),
        kernels.strided_regions(height, width, region, maps.q.shape[3], local=1, stride=stride),
    ]
    generator = torch.Generator().manual_seed(0)
    samples = torch.randperm(height * width, generator=generator)[:64].to(maps.q.device)
    return Choice(kernels.best_pattern(*maps, region, patterns, samples))


def _clusters(maps: Maps, region: Region, clusters: int, top_p: float) -> Choice:
    own = kernels.kmeans_blocks(maps.q, clusters, 10)
    others = kernels.kmeans_blocks(maps.k, 2 * clusters, 10)
    lists = kernels.topp_blocks(own.centroids, others.centroids, others.counts, top_p)
    blocks = sort_blocks(own.labels, clusters), sort_blocks(others.labels, 2 * clusters)
    return Choice(lists, blocks=blocks)


def _chunks(maps: Maps, region: Region, budget: int, equal: bool) -> Choice:
    """Runs of row-major pixels, as many as regions; they end where keys change most, or are equally long."""
    height, width = maps.q.shape[1:3]
    count, device = _count(1, maps, region), maps.q.device
    starts = torch.arange(count + 1, device=device) * height * width // count
    if not equal:
        keys = maps.k.flatten(3).flatten(1, 2)[0]
        jumps = (keys[1:] - keys[:-1]).norm(dim=1).argsort(descending=True, stable=True)[: count - 1] + 1
        starts[1:-1] = jumps.sort().values
    order = torch.arange(height * width, dtype=torch.int32, device=device)[None, None]
    own, others = (
        kernels.region_blocks(height, width, region, device),
        Blocks(order, starts.int()[None, None]),
    )
    return Choice(
        kernels.topk_blocks(maps.q, maps.k, own, others, budget, per_head=True), blocks=(own, others)
    )


def _buckets(maps: Maps, region: Region, block: int) -> Choice:
    """Equal blocks by hashed codes, without the sample of the rest."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(maps.q.shape[4], 7, generator=generator).to(maps.q.device)
    blocks = []
    for x in (maps.q, maps.k):
        order = kernels.lsh_codes(x, directions).argsort(dim=-1, stable=True).int()
        starts = torch.arange(0, order.shape[2] + block, block, device=order.device).clamp(max=order.shape[2])
        blocks.append(Blocks(order, starts.int().expand(*order.shape[:2], -1)))
    lists = torch.arange(blocks[0].starts.shape[2] - 1, dtype=torch.int32, device=maps.q.device)
    return Choice(lists[None, None, :, None], blocks=(blocks[0], blocks[1]))


def _sampled(maps: Maps, region: Region, block: int) -> Choice:
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(maps.q.shape[4], 7, generator=generator).to(maps.q.device)
    pixels = maps.q.shape[1] * maps.q.shape[2]
    samples = torch.randint(pixels, (1, maps.q.shape[3], block), generator=generator).to(maps.q.device)

    def run(maps: Maps) -> Tensor:
        return kernels.lsh_attention(maps.q, maps.k, maps.v, directions, block=block, samples=samples)

    return Choice(run=run, density=2 * block / pixels)


def _overlapping(maps: Maps, region: Region, clusters: int) -> Choice:
    count = maps.q.shape[1] * maps.q.shape[2] // clusters

    def run(maps: Maps) -> Tensor:
        centroids = kernels.kmeans_blocks(F.normalize(maps.q, dim=-1), clusters, 10).centroids
        return kernels.cluster_attention(*maps, centroids, count, count)

    return Choice(run=run, density=1 / clusters)


def _pixels(density: float, maps: Maps) -> int:
    return round(density * maps.q.shape[1] * maps.q.shape[2])


def _budget(density: float, maps: Maps, region: Region) -> Iterator[Options]:
    yield {"budget": _pixels(density, maps)}


_SHARES = (0.05, 0.1, 0.15, 0.25, 0.4, 0.6, 0.8, 0.9)
_THRESHOLDS = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.015, 0.03, 0.06, 0.12, 0.25, 0.5)


def _each(name: str, values: Any, **others: Any) -> Callable[[float, Maps, Region], Iterator[Options]]:
    return lambda *_: iter([{name: value, **others} for value in values])


METHODS = (
    Method("random", _random, _topk),
    Method("window", partial(_static, kernels.window_regions), _each("radius", range(8))),
    Method("power", partial(_static, kernels.power_regions), _each("window", range(1, 8), sinks=0)),
    Method(
        "strided",
        lambda maps, region, **options: _static(
            kernels.strided_regions, maps, region, heads=maps.q.shape[3], **options
        ),
        _each("stride", (2, 3, 4, 6, 8, 12, 16, 24, 32), local=1),
    ),
    Method("radial, both axes", partial(_static, kernels.radial_regions), _each("axis", ("both",))),
    Method("best pattern", _best_pattern, _topk),
    Method("top-k", partial(_lists, kernels.topk_regions), _topk),
    Method("top-k per head", partial(_lists, partial(kernels.topk_regions, per_head=True)), _topk),
    Method("bounds", partial(_lists, kernels.bound_regions), _topk),
    Method("antidiagonal", _antidiagonal, _topk),
    Method("hierarchical", partial(_lists, kernels.hierarchical_regions), _topk),
    Method("hierarchical, Z-order", partial(_lists, partial(kernels.hierarchical_regions, order="z")), _topk),
    Method("quantized", partial(_lists, kernels.quantized_regions), _each("threshold", _THRESHOLDS)),
    Method("gate per query", partial(_gated, pool="query"), _topk),
    Method("gate per head", partial(_gated, pool="head"), _topk),
    Method("exact mass", partial(_lists, kernels.mass_regions), lambda d, *_: iter([{"sparsity": 1 - d}])),
    Method("one set of keys (exact)", _one_set, lambda d, maps, _: iter([{"keys": _pixels(d, maps)}])),
    Method("clusters, 32", partial(_clusters, clusters=32), _each("top_p", _SHARES)),
    Method("clusters, 64", partial(_clusters, clusters=64), _each("top_p", _SHARES)),
    Method("chunks", partial(_chunks, equal=False), _budget),
    Method("equal chunks", partial(_chunks, equal=True), _budget),
    Method("LSH blocks", _buckets, lambda d, maps, _: iter([{"block": _pixels(d, maps)}])),
    Method("LSH blocks, sampled rest", _sampled, lambda d, maps, _: iter([{"block": _pixels(d / 2, maps)}])),
    Method("overlapping clusters", _overlapping, lambda d, *_: iter([{"clusters": round(1 / d)}])),
)  # fmt: skip
