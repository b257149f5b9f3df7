"""Every selector of the table: what its scores and its lists are, on every map and in every precision.

A new selector joins by a line in `OPTIONS`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from agreement import packed_qkv
from torch import Tensor

from visionattn.kernels import routed_attention
from visionattn.kernels.routed.selectors.table import SELECTORS, Selector

# For each selector the arguments of its scores, those of its pick, and a wrong one with what is said of it.
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]] = {
    "antidiagonal": ({"stride": 3}, {"threshold": 0.6}, {"threshold": 0}, "threshold must be above 0"),
    "bound": ({}, {"topk": 3}, {"topk": 0}, "topk must be at least 1"),
    "gated": ({}, {"threshold": 0.4}, {"threshold": 1.5}, "threshold must be above 0 and at most 1"),
    "hierarchical": ({}, {"topk": 3}, {"topk": 0}, "topk must be at least 1"),
    "mass": ({}, {"sparsity": 0.6}, {"sparsity": 1.0}, "sparsity must be at least 0 and below 1"),
    "quantized": ({}, {"threshold": 0.3}, {"threshold": 0}, "threshold must be above 0"),
    "topk": ({}, {"topk": 3}, {"topk": 0}, "topk must be at least 1"),
}
# Those that list the own region of every query, whatever its score.
WITH_OWN = {"gated", "quantized"}
# height, width, region: regions divide both sides, one, none; a region is a pixel, or the map.
MAPS = [(6, 8, (2, 4)), (6, 7, (3, 2)), (7, 5, (3, 2)), (3, 4, (1, 1)), (4, 5, (4, 5)), (1, 9, (1, 2))]
BATCH, HEADS, DIM = 2, 2, 4


@pytest.fixture(params=list(SELECTORS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def selector(name: str) -> Selector:
    return SELECTORS[name]


def test_every_selector_is_tested() -> None:
    assert OPTIONS.keys() == SELECTORS.keys()


def make(height: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(height + width)
    q, k, _ = packed_qkv(BATCH, height, width, HEADS, DIM, dtype)
    return q.requires_grad_(), k


def select(name: str, q: Tensor, k: Tensor, region: tuple[int, int]) -> Tensor:
    scoring, picking, _, _ = OPTIONS[name]
    return SELECTORS[name].regions(q, k, region, **scoring, **picking)


@pytest.mark.parametrize(("height", "width", "region"), MAPS)
def test_lists_are_distinct_regions_of_the_map_best_first(
    name: str, selector: Selector, height: int, width: int, region: tuple[int, int]
) -> None:
    q, k = make(height, width)
    count = -(-height // region[0]) * -(-width // region[1])
    rows = height * width if selector.per_pixel else count
    lists = select(name, q, k, region)
    assert lists.dtype == torch.int32
    assert lists.shape[0] == BATCH
    assert lists.shape[1] in (1, HEADS)
    assert lists.shape[2] == rows
    assert not lists.requires_grad
    assert (lists[..., 0] >= 0).all()
    assert (lists >= 0).any((0, 1, 2)).all(), "lists are cut to the longest"
    if selector.is_full:
        assert (lists >= 0).all()
    for listed in lists.flatten(0, 2).tolist():
        named = [n for n in listed if n >= 0]
        assert listed == named + [-1] * (len(listed) - len(named))
        assert len(set(named)) == len(named)
        assert max(named) < count
    if selector.scores is None:
        return
    scores = selector.scores(q, k, region, **OPTIONS[name][0])
    assert scores.shape == (*lists.shape[:3], count)
    for row, listed in zip(scores.flatten(0, 2).tolist(), lists.flatten(0, 2).tolist()):
        named = [n for n in listed if n >= 0]
        others = named if name in WITH_OWN else range(count)
        assert named == sorted(others, key=lambda n: (-row[n], n))[: len(named)]


@pytest.mark.parametrize(("height", "width", "region"), MAPS)
def test_decisions_are_those_of_float32(
    name: str, selector: Selector, height: int, width: int, region: tuple[int, int]
) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        q, k = (x.to(dtype) for x in make(height, width))
        expected = select(name, q.float(), k.float(), region)
        assert torch.equal(select(name, q, k, region), expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(select(name, q, k, region), expected)
            if selector.scores is not None:
                assert selector.scores(q, k, region, **OPTIONS[name][0]).dtype == torch.float32
    if selector.scores is not None:
        double = make(height, width, torch.float64)
        assert selector.scores(*double, region, **OPTIONS[name][0]).dtype == torch.float64


def test_decisions_do_not_vary(name: str) -> None:
    q, k = make(6, 7)
    # Equal maps tie everywhere; the lowest index is first.
    flat = torch.ones_like(q)
    for maps in ((q, k), (flat, flat)):
        first = select(name, *maps, (2, 3))
        assert all(torch.equal(select(name, *maps, (2, 3)), first) for _ in range(5))
    if name not in WITH_OWN:
        # The first of the regions that divide the map alike.
        assert (select(name, flat[:, :6, :6], flat[:, :6, :6], (2, 3))[..., 0] == 0).all()


def test_an_empty_batch_has_no_lists(name: str) -> None:
    q, k = (x[:0] for x in make(6, 7))
    assert select(name, q, k, (2, 3)).shape[:1] == (0,)


@pytest.mark.parametrize(("height", "width", "region"), MAPS)
def test_lists_are_taken_by_the_attention(
    name: str, selector: Selector, height: int, width: int, region: tuple[int, int]
) -> None:
    q, k = make(height, width, torch.float64)
    lists = select(name, q, k, region)
    rows: Any = {"query_region_size": 1} if selector.per_pixel else {}
    expected = routed_attention(q, k, k, lists, region, **rows)
    out = routed_attention(q, k, k, lists, region, distinct=True, full=selector.is_full, **rows)
    torch.testing.assert_close(out, expected)


def test_compiles_whole_to_the_same_regions(name: str) -> None:
    q, k = make(6, 7)
    compiled = torch.compile(select, fullgraph=True, backend="aot_eager")(name, q, k, (2, 3))
    expected = select(name, q, k, (2, 3))
    assert torch.equal(compiled[..., : expected.shape[-1]], expected)
    # How long the longest list is, a compiled program cannot know.
    assert (compiled[..., expected.shape[-1] :] == -1).all()


def test_bad_arguments_are_refused(name: str, selector: Selector) -> None:
    q, k = make(6, 7)
    scoring, picking, wrong, message = OPTIONS[name]
    cases = [
        (q, k[:, :5], 2, {}, r"of one shape, got \(2, 6, 7, 2, 4\) and \(2, 5"),
        (q[0], k[0], 2, {}, "of one shape"),
        (q.long(), k.long(), 2, {}, "floating-point"),
        (q[:, :0], k[:, :0], 2, {}, "only their batch may be empty"),
        (q, k, 0, {}, "region_size must be"),
        (q, k, 2, wrong, message),
    ]
    for queries, keys, region, change, said in cases:
        with pytest.raises(ValueError, match=said) as caught:
            selector.regions(queries, keys, region, **{**scoring, **picking, **change})
        assert "\n" not in str(caught.value)
