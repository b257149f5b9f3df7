"""What publications claim of their selectors, as far as a CPU can check it, on the same queries and keys."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import time_in_turn
from benchmarks.selector_methods import Choice, Maps, density_of
from benchmarks.selectors import Row, full_attention, judge
from visionattn import kernels
from visionattn.kernels.routed.lists import listed_regions
from visionattn.kernels.routed.reference import places

Region = tuple[int, int]


def check_claims(
    rows: Sequence[Row], maps: Sequence[Maps], region: Region, growing: Callable[[int], Maps]
) -> Iterator[str]:
    """One line per claim.

    Args:
        rows: the measured comparison.
        maps: what it was measured on.
        region: side of a region in pixels.
        growing: maps of a photograph of this side.
    """
    yield _gates(maps, region)
    yield _linear_rest(maps, region)
    yield "AdaSpa, most mass at equal density. " + _against(rows, "exact mass", None)
    yield "DHSA, chunks that follow the content. " + _against(rows, "chunks", "equal chunks")
    yield _search_cost(rows, maps, region)
    yield _few_bits(maps, region)
    yield _list_lengths(region)
    yield "SVG2, clusters against regions. " + _against(rows, "clusters, 64", "top-k per head")
    yield _growth(growing)


def _found(rows: Sequence[Row], method: str) -> dict[float, Row]:
    return {row.target: row for row in rows if row.method == method}


def _against(rows: Sequence[Row], method: str, other: str | None) -> str:
    """Two methods at every density, or the best other in mass where none is named."""
    said = []
    for target, row in _found(rows, method).items():
        others = [x for x in rows if x.target == target and x.method != method and x.chosen.mass is not None]
        if other is not None:
            others = [x for x in others if x.method == other]
        if others:
            best = max(others, key=lambda x: x.chosen.mass or 0)
            said.append(
                f"at 1/{1 / target:.0f} mass {row.chosen.mass:.2f}, error {row.chosen.error:.2f}; "
                f"{best.method} {best.chosen.mass:.2f} and {best.chosen.error:.2f}"
            )
    return f"Found: {'; '.join(said)}."


def _gates(maps: Sequence[Maps], region: Region) -> str:
    truths = [full_attention(x, region) for x in maps]
    said = []
    for threshold in (0.1, 0.25, 0.4, 0.6):
        lists = [kernels.gated_regions(x.q, x.k, region, threshold=threshold) for x in maps]
        found = judge([Choice(x, rows=1) for x in lists], truths, region)
        said.append(f"{threshold}: density {found.density:.2f}, error {found.error:.2f}")
    return (
        "VMoBA, density .18 to .31 at the threshold .25, errors fall with it. Found, pool of a head, by "
        f"threshold: {'; '.join(said)}."
    )


def _linear_rest(maps: Sequence[Maps], region: Region) -> str:
    """SLA with the least-squares projection for the other photographs, as far as training could get."""
    sparse, rest, full = [], [], []
    for x in maps:
        truth = full_attention(x, region)
        count = truth.mass.shape[3]
        lists = kernels.topk_regions(x.q, x.k, region, max(1, count // 16), per_head=True)
        sparse.append(kernels.routed_attention(*x, lists, region, distinct=True, full=True))
        rest.append(_unlisted(x, listed_regions(lists, count), region))
        full.append(truth.out)
    missing = [x - y for x, y in zip(full, sparse)]
    fitted, wanted = (torch.cat([t.flatten(0, -2) for t in side[:-1]]) for side in (rest, missing))
    weights = torch.linalg.lstsq(fitted, wanted, rcond=1e-3, driver="gelsd").solution
    error, with_rest = (
        ((x - full[-1]).norm() / full[-1].norm()).item()
        for x in (sparse[-1], sparse[-1] + rest[-1] @ weights)
    )
    return (
        "SLA, 95 % sparse after tuning. Found with 1/16 listed, the linear part fitted to "
        f"{len(maps) - 1} photographs and judged on another: error {error:.2f} sparse alone, {with_rest:.2f} "
        "with it."
    )


def _unlisted(maps: Maps, listed: Tensor, region: Region) -> Tensor:
    """Linear attention, softmax features, to the regions that are not listed."""
    height, width = maps.q.shape[1:3]
    q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in maps)
    q, k = q.softmax(-1), k.softmax(-1)
    region_of, _ = places((height, width), region)
    seen = ~listed[:, :, region_of][..., region_of]
    weights = (q @ k.transpose(2, 3)) * seen
    out = weights @ v / weights.sum(-1, keepdim=True).clamp(min=1e-12)
    return out.transpose(1, 2).unflatten(1, (height, width))


def _search_cost(rows: Sequence[Row], maps: Sequence[Maps], region: Region) -> str:
    height, width = maps[0].q.shape[1:3]
    regions = height // region[0] * (width // region[1])
    said = []
    for target, row in _found(rows, "hierarchical").items():
        count = round(target * regions)
        looked = count + 2 * count * math.ceil(math.log2(regions / count))
        looked = f"{looked} of {regions} regions looked at"
        said.append(f"1/{1 / target:.0f}: {looked}, recall {row.chosen.recall:.2f}")
    return f"HiP, T log T. Found by density: {'; '.join(said)}; on maps of so few regions it is no saving."


def _few_bits(maps: Sequence[Maps], region: Region) -> str:
    said = []
    for threshold in (0.004, 0.05, 0.2):
        same, density = [], []
        for x in maps:
            lists = [kernels.quantized_regions(x.q, x.k, region, threshold, bits=bits) for bits in (4, 16)]
            regions = lists[0].shape[2]
            few, many = (listed_regions(t, regions) for t in lists)
            same.append((few == many).float().mean().item())
            density.append(density_of(Choice(lists[0]), x, region))
        mean = sum(same) / len(same), sum(density) / len(density)
        said.append(f"{threshold}: {mean[0]:.1%} at density {mean[1]:.2f}")
    return f"SALE, choices of 4 bits as those of 16, by threshold: {'; '.join(said)}."


def _list_lengths(region: Region) -> str:
    said = []
    patterns = {
        "power (window 2)": lambda n: kernels.power_regions(n, n, 1, window=2, sinks=0),
        "radial (both axes)": lambda n: kernels.radial_regions(n, n, 1, axis="both"),
        "strided (stride 8, 4 heads)": lambda n: kernels.strided_regions(n, n, 1, 4, local=2, stride=8),
    }
    for name, pattern in patterns.items():
        found = []
        for side in (8, 16, 32):
            lists = pattern(side)
            mean = (lists >= 0).sum(-1).float().mean().item()
            found.append(f"{mean:.0f} of {side * side} regions in {kernels.layers_to_reach(lists)} layers")
        said.append(f"{name}: {', '.join(found)}")
    return f"PowerAttention, Radial, S2, mean list and layers to reach all. Found: {'; '.join(said)}."


def _growth(growing: Callable[[int], Maps]) -> str:
    """Exponents of time in the number of pixels."""
    sides = (32, 64, 128)
    found: dict[str, list[float]] = {}
    for side in sides:
        maps = growing(side)
        directions = torch.randn(maps.q.shape[4], 7, generator=torch.Generator().manual_seed(0))
        samples = torch.arange(256).expand(1, 1, -1) * (side * side // 256)
        centroids = kernels.kmeans_blocks(F.normalize(maps.q, dim=-1), side, 3).centroids
        q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in maps)
        calls = {
            "full": partial(F.scaled_dot_product_attention, q, k, v),
            "HyperAttention (256, 256 sampled)": partial(
                kernels.lsh_attention, *maps, directions, block=256, samples=samples
            ),
            "Routing (sqrt N clusters)": partial(kernels.cluster_attention, *maps, centroids, side, side),
        }
        timings = time_in_turn(calls, dict.fromkeys(calls, nullcontext), maps.q.device, 1)
        for name, timing in timings.items():
            found.setdefault(name, []).append(timing.median)
    said = []
    for name, times in found.items():
        exponent = math.log(times[-1] / times[0]) / math.log((sides[-1] / sides[0]) ** 2)
        ratio = times[-1] / found["full"][-1]
        said.append(f"{name} N^{exponent:.2f}, at N = {sides[-1] ** 2} {ratio:.2f}x of full")
    return (
        f"HyperAttention near-linear, Routing N^1.5; time from N = {sides[0] ** 2}. Found: {'; '.join(said)}."
    )
