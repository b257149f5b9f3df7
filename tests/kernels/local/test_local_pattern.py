"""The geometry of local attention against the rules of its specification, query by query."""

from __future__ import annotations

import itertools

import pytest
import torch

from visionattn.kernels.local.pattern import (
    Axis,
    Pattern,
    grid_axis,
    neighborhood_axis,
    overlapping_axis,
    window_axis,
)


def visible_keys(axis: Axis) -> list[list[int]]:
    pixels = torch.arange(axis.length)
    return [row.nonzero().flatten().tolist() for row in axis.visibility(pixels, pixels)[0]]


def neighborhood_by_rule(length: int, k: int, t: int, e: int, causal: bool) -> list[list[int]]:
    """Generalised neighborhood attention as the paper states it: leader, then start, in dilation groups."""
    keys = []
    for i in range(length):
        r, p = i % e, i // e
        n = -(-(length - r) // e)
        if causal:
            leader = min((p // t) * t + t - 1, n - 1)
            steps = range(max(leader - k + 1, 0), p + 1)
        else:
            leader = min((p // t) * t + t // 2, n - 1)
            start = min(max(leader - k // 2, 0), n - k)
            steps = range(start, start + k)
        keys.append([r + e * a for a in steps])
    return keys


SMALL = [
    (length, k, t, e, causal)
    for length in range(1, 15)
    for k in range(1, length + 1)
    for t in range(1, k + 1)
    for e in range(1, length // k + 1)
    for causal in (False, True)
]


def test_neighborhoods_follow_the_rule() -> None:
    for case in SMALL:
        assert visible_keys(neighborhood_axis(*case)) == neighborhood_by_rule(*case), case


def axes() -> list[Axis]:
    undilated = [neighborhood_axis(*case) for case in SMALL if case[3] == 1]
    windows = [window_axis(n, w, s) for n in range(1, 12) for w in range(1, 6) for s in range(w)]
    halos = [
        overlapping_axis(n, w, o, border)
        for n, w, o, border in itertools.product(range(1, 12), range(1, 5), range(4), ("zero", "mask"))
    ]
    return undilated + windows + halos


def keys_with_padding(axis: Axis) -> torch.Tensor:
    before, behind = axis.key_padding
    return torch.arange(-before, axis.length + behind)


def test_ranges_and_their_inverse_describe_the_same_pairs() -> None:
    for axis in axes():
        visible = axis.visibility(torch.arange(axis.length), keys_with_padding(axis))[0]
        for query, (start, stop) in enumerate(axis.key_ranges()):
            assert visible[query].nonzero().flatten().tolist() == list(range(start, stop)), axis
        for key, (start, stop) in enumerate(axis.query_ranges()):
            assert visible[:, key].nonzero().flatten().tolist() == list(range(start, stop)), axis


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_tiles_hold_every_query_once_and_every_key_it_sees(blocks: int) -> None:
    for axis in axes():
        ranges, queries = axis.key_ranges(), []
        for run in axis.runs(blocks):
            for tile in range(run.count):
                shift = tile * run.step
                first = run.query.start + shift
                queries += range(first, first + run.query.length)
                seen = ranges[first : first + run.query.length]
                keys = (run.key.start + shift, run.key.start + shift + run.key.length)
                assert keys == (min(start for start, _ in seen), max(stop for _, stop in seen)), axis
                assert run.masked or set(seen) == {keys}, axis
        assert queries == list(range(axis.length)), axis


def test_every_neighborhood_key_is_seen() -> None:
    for case in SMALL:
        if case[3] == 1:
            assert all(start < stop for start, stop in neighborhood_axis(*case).query_ranges()), case


def test_grid_groups_are_spread_evenly() -> None:
    assert visible_keys(grid_axis(8, 4))[3] == [1, 3, 5, 7]
    assert visible_keys(grid_axis(7, 4)) == [[0, 2, 4, 6], [1, 3, 5]] * 3 + [[0, 2, 4, 6]]
    assert visible_keys(grid_axis(3, 8)) == [[0, 1, 2]] * 3


def test_flops_count_every_visible_pair() -> None:
    for y, x in (
        (neighborhood_axis(11, 4, 2, 2, True), neighborhood_axis(9, 3, 1, 1, False)),
        (window_axis(10, 4, 1), grid_axis(7, 3)),
    ):
        pairs = sum(map(len, visible_keys(y))) * sum(map(len, visible_keys(x)))
        assert Pattern(y, x).flops(heads=3, head_dim=5) == 4 * 3 * 5 * pairs
