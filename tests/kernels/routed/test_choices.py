"""What single selectors promise beyond what all do: pools, heads that adapt, bounds, budgets, shares."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from agreement import packed_qkv
from torch import Tensor

from visionattn.kernels import (
    Blocks,
    best_pattern,
    bound_regions,
    dense_attention,
    dynamic_mask_keys,
    gated_regions,
    hierarchical_regions,
    kmeans_blocks,
    mass_regions,
    quantized_regions,
    region_blocks,
    routed_attention,
    strided_regions,
    topk_blocks,
    topk_regions,
    topp_blocks,
    window_regions,
)
from visionattn.kernels.routed.lists import listed_regions
from visionattn.kernels.routed.reference import places
from visionattn.kernels.routed.regions import region_means, split_heads
from visionattn.kernels.routed.selectors.bounds import bound_scores
from visionattn.kernels.routed.selectors.mass import mass_scores
from visionattn.kernels.routed.selectors.quantized import quantized_scores

MAPS = [(6, 8, (2, 4)), (7, 5, (3, 2)), (1, 9, (1, 2))]


def maps(height: int, width: int, heads: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(height * width)
    return list(packed_qkv(2, height, width, heads, 4, dtype))


def logits_of(q: Tensor, k: Tensor) -> Tensor:
    """`[B, heads, H * W, H * W]`."""
    q, k = (x.flatten(1, 2).transpose(1, 2) for x in (q, k))
    return q @ k.transpose(2, 3) * q.shape[-1] ** -0.5


def members(height: int, width: int, region: tuple[int, int]) -> Tensor:
    """Which pixels are in which region `[regions, H * W]`."""
    region_of, _ = places((height, width), region)
    return region_of == torch.arange(int(region_of.max()) + 1)[:, None]


@pytest.mark.parametrize(("height", "width", "region"), MAPS)
def test_masses_are_those_of_the_attention(height: int, width: int, region: tuple[int, int]) -> None:
    q, k, _ = maps(height, width)
    inside = members(height, width, region).double()
    weights = logits_of(q, k).softmax(-1)
    expected = inside @ weights @ inside.T / inside.sum(1, keepdim=True)
    torch.testing.assert_close(mass_scores(q, k, region), expected)
    lse = logits_of(q, k).logsumexp(-1).transpose(1, 2).unflatten(1, (height, width))
    torch.testing.assert_close(mass_scores(q, k, region, lse), expected)
    torch.testing.assert_close(mass_scores(q, k, region, lse + math.log(2)), expected / 2)
    assert torch.equal(mass_regions(q, k, region, 0.5, lse=lse), mass_regions(q, k, region, 0.5))


def test_masses_do_not_depend_on_how_queries_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, _ = maps(7, 5)
    whole = [f(q, k, (3, 2)) for f in (mass_scores, quantized_scores)]
    whole.append(hierarchical_regions(q, k, (3, 2), 2))
    pieces = "visionattn.kernels.routed.selectors.{}.query_chunks"
    for name in ("mass", "quantized", "hierarchical"):
        monkeypatch.setattr(pieces.format(name), lambda _x, n, _size: [slice(i, i + 1) for i in range(n)])
    cut = [f(q, k, (3, 2)) for f in (mass_scores, quantized_scores)]
    cut.append(hierarchical_regions(q, k, (3, 2), 2))
    for a, b in zip(whole, cut):
        torch.testing.assert_close(a, b)


def test_heads_with_much_mass_give_regions_to_those_with_little() -> None:
    q, k, _ = maps(6, 8, heads=4)
    q[..., 0, :] *= 40  # a head whose mass stands in few places
    lists = mass_regions(q, k, (2, 2), 0.5, adapt_heads=True)
    lengths = (lists >= 0).sum(-1)
    assert (lengths[:, 0] == 3).all()  # of 12 regions a quarter
    assert (lengths.amax((1, 2)) == 9).all()  # the worst head lists three quarters
    assert (lengths.sum(1) == 24).all()
    plain = mass_regions(q, k, (2, 2), 0.5)
    assert torch.equal(lists[:, 0, :, :3], plain[:, 0, :, :3])


@pytest.mark.parametrize(("height", "width", "region"), MAPS)
def test_bounds_hold(height: int, width: int, region: tuple[int, int]) -> None:
    q, k, _ = maps(height, width)
    inside = members(height, width, region)
    products = logits_of(q, k) * 2  # without the scale
    for i, rows in enumerate(inside):
        for j, columns in enumerate(inside):
            largest = products[:, :, rows][..., columns].amax((2, 3))
            assert (bound_scores(q, k, region)[:, :, i, j] >= largest - 1e-12).all()
    # A region of one pixel has a box of one point.
    exact = products.view(*products.shape[:2], height * width, height * width)
    torch.testing.assert_close(bound_scores(q, k, (1, 1)), exact)
    assert bound_regions(q, k, region, 2).shape[-1] == 2


def gated_by_loops(
    gates: Tensor, own: Tensor, pool: str, threshold: float | None, topk: int | None
) -> Tensor:
    """The listed gates of one image, `[heads, N, R]`, entry by entry."""
    heads, pixels, regions = gates.shape
    key = {
        "query": lambda h, i, j: (h, i),
        "head": lambda h, i, j: h,
        "region": lambda h, i, j: j,
        "all": lambda h, i, j: 0,
    }[pool]
    pools: dict[Any, list[tuple[int, int, int]]] = {}
    for h in range(heads):
        for i in range(pixels):
            for j in range(regions):
                pools.setdefault(key(h, i, j), []).append((h, i, j))
    listed = torch.zeros_like(gates, dtype=torch.bool)
    for entries in pools.values():
        values = torch.stack([gates[e] for e in entries])
        others = [e for e in entries if not own[e[1], e[2]]]
        if topk is not None:
            wanted = min(topk, regions) * len(entries) // regions - (len(entries) - len(others))
            chosen = sorted(others, key=lambda e: -gates[e])[:wanted]
        else:
            extent = float(values.max() - values.min())
            share = lambda e: float(gates[e] - values.min()) / (1 if extent <= 1e-6 else extent)  # noqa: E731, B023
            total = sum(map(share, entries)) + 1e-6
            missing = max(0, threshold - sum(share(e) for e in entries if own[e[1], e[2]]) / total)
            chosen, held = [], 0.0
            for e in sorted(others, key=lambda e: -gates[e]):
                chosen.append(e)
                held += share(e)
                if held / total >= missing:
                    break
        for e in [e for e in entries if own[e[1], e[2]]] + chosen:
            listed[e] = True
    return listed


@pytest.mark.parametrize("pool", ["query", "head", "region", "all"])
@pytest.mark.parametrize(("height", "width", "region"), MAPS)
def test_gates_compete_in_their_pool(pool: Any, height: int, width: int, region: tuple[int, int]) -> None:
    q, k, _ = maps(height, width)
    means = split_heads(region_means(k, region), 2)
    gates = q.flatten(1, 2).transpose(1, 2) @ means.transpose(2, 3)
    own = members(height, width, region).T
    cases: list[dict[str, Any]] = [{"threshold": t} for t in (0.05, 0.4, 0.9)]
    cases += [] if pool == "region" else [{"topk": n} for n in (1, 2)]
    for case in cases:
        lists = gated_regions(q, k, region, pool=pool, **case)
        named = listed_regions(lists, own.shape[1])
        for image in range(2):
            given = {"threshold": None, "topk": None, **case}
            assert torch.equal(named[image], gated_by_loops(gates[image], own, pool, **given))
    assert torch.equal(
        gated_regions(q, k, region, pool=pool), gated_regions(q, k, region, threshold=0.25, pool=pool)
    )


def test_moba_is_a_case() -> None:
    q, k, _ = maps(6, 8)
    lists = gated_regions(q, k, 2, topk=3, pool="query")
    assert (lists >= 0).sum(-1).eq(3).all()
    everything = gated_regions(q, k, 2, topk=99, pool="query")
    assert (everything >= 0).sum(-1).eq(12).all()


@pytest.mark.parametrize("order", [None, "z"])
def test_the_search_finds_what_stands_out(order: Any) -> None:
    q = torch.ones(1, 8, 8, 1, 4)
    k = torch.zeros(1, 8, 8, 1, 4)
    # Larger towards one corner: a half's first region tells how large its others are.
    k += torch.arange(8.0)[:, None, None, None] * 8 + torch.arange(8.0)[:, None, None]
    lists = hierarchical_regions(q, k, 2, 4, order=order)
    best = topk_regions(q, k, 2, 4)
    assert lists[0, 0, 0, 0] == best[0, 0, 0, 0] == 15
    # As many lists as the map has regions: all of them, best first.
    assert torch.equal(hierarchical_regions(q, k, 2, 99, order=order), topk_regions(q, k, 2, 99))


def test_the_search_has_query_regions_of_its_own() -> None:
    q, k, v = maps(7, 8)
    lists = hierarchical_regions(q, k, (2, 2), 3, query_region_size=(7, 3))
    assert lists.shape == (2, 2, 3, 3)
    routed_attention(q, k, v, lists, 2, query_region_size=(7, 3))
    assert (lists.sort(-1).values.diff() > 0).all()


@pytest.mark.parametrize(("height", "width", "region"), MAPS)
def test_many_bits_are_exact(height: int, width: int, region: tuple[int, int]) -> None:
    q, k, _ = maps(height, width)
    inside = members(height, width, region)
    logits = logits_of(q, k)
    expected = torch.empty(2, 2, len(inside), len(inside), dtype=q.dtype)
    for i, rows in enumerate(inside):
        base = logits[:, :, rows][..., inside[i] | inside[0]].logsumexp(-1, keepdim=True)
        for j, columns in enumerate(inside):
            expected[:, :, i, j] = (logits[:, :, rows][..., columns] - base).exp().amax((2, 3))
    found = quantized_scores(q, k, region, local=1, sinks=1, bits=16)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
    lists = quantized_regions(q, k, region, 0.5, sinks=1, bits=16)
    forced = torch.eye(len(inside), dtype=torch.bool) | (torch.arange(len(inside)) == 0)
    assert torch.equal(listed_regions(lists, len(inside)), (found > 0.5) | forced)


def test_chunks_fill_a_budget() -> None:
    q, k, _ = maps(4, 6)
    starts = torch.tensor([0, 3, 3, 10, 12, 24], dtype=torch.int32)
    keys = Blocks(torch.arange(24, dtype=torch.int32)[None, None], starts[None, None])
    own = region_blocks(4, 6, (2, 3))
    every = topk_blocks(q, k, own, keys, 24)
    assert every.shape == (2, 1, 4, 4), "an empty block is not listed"
    for budget in (1, 4, 11):
        lists = topk_blocks(q, k, own, keys, budget, per_head=True)
        sizes = starts.diff()[lists.clamp(min=0)] * (lists >= 0)
        listed = sizes.cumsum(-1)
        last = (lists >= 0).sum(-1, keepdim=True) - 1
        assert (listed.gather(-1, last) >= budget).all()
        assert ((listed - sizes).gather(-1, last) < budget).all()
    # The square root lifts large blocks; where all are alike it changes nothing.
    flat = torch.ones_like(q)
    assert topk_blocks(flat, flat, own, keys, 1)[0, 0, 0].tolist() == [4]
    assert topk_blocks(flat, flat, own, keys, 1, normalise=None)[0, 0, 0].tolist() == [0]
    equal = topk_blocks(q, k, own, own, 12, per_head=True)
    assert torch.equal(equal, topk_regions(q, k, (2, 3), 2, per_head=True))
    assert torch.equal(equal, topk_blocks(q, k, own, own, 12, per_head=True, normalise=None))


def test_shares_of_clusters() -> None:
    query, key = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 4, 4)
    counts = torch.tensor([[[1, 5, 0, 4]]])
    for top_p, expected in (
        (0.4, [1]),
        (0.5, [1, 3]),
        (0.55, [1, 3]),
        (0.95, [1, 3, 0]),
        (1.0, [1, 3, 0, 2]),
    ):
        assert topp_blocks(query, key, counts, top_p)[0, 0, 0].tolist() == expected
    assert topp_blocks(query, key, counts, 0.1, min_share=0.75)[0, 0, 0].tolist() == [1, 3, 0]
    assert topp_blocks(query[0, 0], key[0, 0], counts[0, 0], 0.4).shape == (1, 1)


def test_keys_by_bias() -> None:
    bias = torch.tensor([[[[3.0, 1.0, 2.0], [5.0, 4.0, 0.0]]]])
    assert dynamic_mask_keys(bias, 3).tolist() == [[[[3, 4, 0]]]]
    # Columns of regions (2, 2) and (2, 1): three of four pixels, none of two; then two of four is not enough.
    assert dynamic_mask_keys(bias, 4, region_size=2).tolist() == [[[[0]]]]
    assert dynamic_mask_keys(bias, 2, region_size=2).shape[-1] == 0
    assert dynamic_mask_keys(bias, 99, region_size=2).tolist() == [[[[0, 1]]]]


def test_the_nearest_pattern_of_each_head() -> None:
    q, k, v = maps(8, 8, heads=2)
    patterns = [window_regions(8, 8, 2, 1), strided_regions(8, 8, 2, 2, local=0, stride=2)]
    full = dense_attention(q, k, v)
    errors = torch.stack([(routed_attention(q, k, v, x, 2) - full).square().sum((1, 2, 4)) for x in patterns])
    lists = best_pattern(q, k, v, 2, patterns, 64)  # all queries
    for image in range(2):
        for head in range(2):
            best = patterns[int(errors[:, image, head].argmin())]
            shown = lists[image, head, :, : best.shape[-1]]
            assert torch.equal(shown, best[0, min(head, best.shape[1] - 1)])
    generator = [torch.Generator().manual_seed(3) for _ in range(2)]
    assert torch.equal(*(best_pattern(q, k, v, 2, patterns, 5, generator=x) for x in generator))


SELECTING: dict[str, Callable[..., Tensor]] = {
    "blocks": lambda q, k: topk_blocks(q, k, region_blocks(5, 7, 2), region_blocks(5, 7, (1, 7)), 9),
    "clusters": lambda q, k: topp_blocks(
        *(kmeans_blocks(x, 3, 2).centroids for x in (q, k)), kmeans_blocks(k, 3, 2).counts, 0.7
    ),
    "keys": lambda q, k: dynamic_mask_keys(q[..., 0].permute(0, 3, 1, 2), 20, region_size=2),
    "pattern": lambda q, k: best_pattern(
        q, k, k, 2, [window_regions(5, 7, 2, 0), window_regions(5, 7, 2, 1)], torch.arange(0, 35, 3)
    ),
    "per_head": lambda q, k: topk_regions(q, k, 2, 3, per_head=True),
    "z_order": lambda q, k: hierarchical_regions(q, k, 2, 3, query_region_size=3, order="z"),
    "adapted": lambda q, k: mass_regions(q, k, 2, adapt_heads=True),
    **{
        f"gated_{pool}": lambda q, k, pool=pool: gated_regions(q, k, 2, pool=pool)
        for pool in ("query", "head", "region", "all")
    },
}


@pytest.mark.parametrize("name", SELECTING)
def test_choices_are_float32_detached_and_compile(name: str) -> None:
    select = SELECTING[name]
    for dtype in (torch.float32, torch.bfloat16):
        q, k, _ = (x.requires_grad_() for x in maps(5, 7, dtype=dtype))
        expected = select(q.float(), k.float())
        assert expected.dtype == torch.int32
        assert not expected.requires_grad
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(select(q, k), expected)
        assert all(torch.equal(select(q, k), expected) for _ in range(3))
    assert select(q[:0], k[:0]).shape[0] == 0
    compiled = torch.compile(select, fullgraph=True, backend="aot_eager")(q, k)
    assert torch.equal(compiled[..., : expected.shape[-1]], expected)
    assert (compiled[..., expected.shape[-1] :] == -1).all()


X = torch.zeros(1, 4, 4, 2, 4)
PARTS = region_blocks(4, 4, 2)
C = torch.zeros(3, 4)
PATTERN = window_regions(4, 4, 2, 1)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: gated_regions(X, X, 2, topk=2, threshold=0.5), "topk=2 does not go with threshold"),
        (lambda: gated_regions(X, X, 2, topk=2, pool="region"), "does not go with the pool 'region'"),
        (lambda: gated_regions(X, X, 2, pool="heads"), "pool must be one of query, head, region, all"),
        (lambda: gated_regions(X, X, 2, topk=0), "topk must be at least 1"),
        (lambda: mass_regions(X, X, 2, -0.1), "sparsity must be at least 0"),
        (lambda: mass_regions(X, X, 2, lse=X), "lse must be"),
        (lambda: quantized_regions(X, X, 2, 1.5), "threshold must be above 0 and at most 1"),
        (lambda: quantized_regions(X, X, 2, 0.1, local=0), "one of them 1 or more"),
        (lambda: quantized_regions(X, X, 2, 0.1, bits=1), "bits must lie in 2 .. 16"),
        (lambda: hierarchical_regions(X, X, 2, 2, order="x"), "order must be None or 'z'"),
        (lambda: hierarchical_regions(X, X, 2, 2, query_region_size=0), "query_region_size must be"),
        (lambda: topk_blocks(X, X, PARTS, PARTS, 0), "budget must be at least 1"),
        (lambda: topk_blocks(X, X, PARTS, PARTS, 1, normalise="log"), "normalise must be 'sqrt' or None"),
        (lambda: topk_blocks(X, X, PARTS, region_blocks(4, 5, 2), 1), "key_blocks need order"),
        (lambda: topk_blocks(X, X, Blocks(*(t.repeat(1, 2, 1) for t in PARTS)), PARTS, 1), "need per_head"),
        (lambda: topp_blocks(C, C, torch.ones(3), 0), "top_p must be above 0 and at most 1"),
        (lambda: topp_blocks(C, C, torch.ones(3), 0.5, min_share=1.5), "min_share must lie in 0 .. 1"),
        (lambda: topp_blocks(C, C, torch.ones(2), 0.5), "centroids must be"),
        (lambda: dynamic_mask_keys(X, 2), r"bias must be \[B, heads, H, W\]"),
        (lambda: dynamic_mask_keys(X[0], 0), "keys must be at least 1"),
        (lambda: best_pattern(X, X, X, 2, []), "at least one pattern"),
        (lambda: best_pattern(X, X, X, 2, [PATTERN[:, :, :3]]), "a pattern must be"),
        (lambda: best_pattern(X, X, X, 2, [PATTERN * 0 - 1]), "names no region"),
        (lambda: best_pattern(X, X, X, 2, [PATTERN], 0), "samples must be at least 1"),
    ],
)
def test_bad_arguments(function: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        function()
    assert "\n" not in str(caught.value)
