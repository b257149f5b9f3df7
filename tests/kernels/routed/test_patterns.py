"""Static patterns: what is listed, from the definitions, and how many layers carry everything everywhere."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from visionattn.kernels import (
    layers_to_reach,
    power_regions,
    radial_regions,
    routed_attention,
    strided_regions,
    window_regions,
)
from visionattn.kernels.routed.lists import listed_regions

# height, width, region: regions divide both sides, neither; one row; one region.
MAPS = [(16, 24, (2, 4)), (15, 22, (2, 4)), (1, 40, (1, 3)), (4, 4, (4, 4)), (26, 26, (2, 2))]


def grid(height: int, width: int, region: tuple[int, int]) -> tuple[int, int]:
    return math.ceil(height / region[0]), math.ceil(width / region[1])


def expected(rows: int, columns: int, rule: Callable[[int, int, int, int], bool]) -> Tensor:
    """`rule(dy, dx, y, x)`, key minus query and the key, for every pair of regions."""
    places = [(y, x) for y in range(rows) for x in range(columns)]
    return torch.tensor([[bool(rule(y - b, x - a, y, x)) for y, x in places] for b, a in places])


def ring(dy: int, dx: int) -> int:
    return max(abs(dy), abs(dx))


def check(lists: Tensor, masks: list[Tensor]) -> None:
    assert lists.dtype == torch.int32
    assert lists.shape[:2] == (1, len(masks))
    named = listed_regions(lists, lists.shape[2])
    assert torch.equal(named[0], torch.stack(masks))
    assert (lists >= 0).any(2).any(1).any(0).all(), "lists are cut to the longest"
    # Ascending, the padding behind.
    shown = torch.where(lists < 0, lists.shape[2], lists)
    assert torch.equal(shown, shown.sort(-1).values)
    assert torch.equal(named.sum(-1), (lists >= 0).sum(-1))


@pytest.mark.parametrize(("height", "width", "region"), MAPS)
def test_windows(height: int, width: int, region: tuple[int, int]) -> None:
    size = grid(height, width, region)
    for radius in (0, 1, 2):
        lists = window_regions(height, width, region, radius)
        check(lists, [expected(*size, lambda dy, dx, y, x, r=radius: ring(dy, dx) <= r)])
        layers = math.ceil((max(size) - 1) / radius) if radius else (0 if size == (1, 1) else None)
        assert layers_to_reach(lists) == layers
    per_head = window_regions(height, width, region, (0, 2))
    check(per_head, [expected(*size, lambda dy, dx, y, x, r=r: ring(dy, dx) <= r) for r in (0, 2)])


@pytest.mark.parametrize(("height", "width", "region"), MAPS)
@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (2, 1), (5, 3)])
def test_powers(height: int, width: int, region: tuple[int, int], window: int, sinks: int) -> None:
    rows, columns = grid(height, width, region)
    powers = [2**n for n in range(10)]

    def rule(dy: int, dx: int, y: int, x: int) -> bool:
        far = (dy == 0 and abs(dx) in powers) or (dx == 0 and abs(dy) in powers)
        return ring(dy, dx) < window or far or y * columns + x < sinks

    lists = power_regions(height, width, region, window=window, sinks=sinks)
    check(lists, [expected(rows, columns, rule)])
    layers = layers_to_reach(lists)
    assert layers is not None
    assert layers <= math.ceil(math.log2(rows)) + math.ceil(math.log2(columns))


@pytest.mark.parametrize(("height", "width", "region"), MAPS)
@pytest.mark.parametrize(("heads", "local", "stride"), [(4, 1, 3), (2, 2, 4), (3, 0, 5), (2, 1, 1)])
def test_strides(
    height: int, width: int, region: tuple[int, int], heads: int, local: int, stride: int
) -> None:
    size = grid(height, width, region)
    skew = round(stride**0.5)

    def rule(head: int, dense: bool) -> Callable[[int, int, int, int], bool]:
        shift = head * max(1, stride // heads) + 7
        return lambda dy, dx, y, x: dense or ring(dy, dx) < local or (y * skew + x + shift) % stride == 0

    lists = strided_regions(height, width, region, heads, local=local, stride=stride, offset=7, dense_heads=1)
    check(lists, [expected(*size, rule(h, h == heads - 1)) for h in range(heads)])
    lists = strided_regions(height, width, region, heads, local=local, stride=stride, offset=7)
    check(lists, [expected(*size, rule(h, False)) for h in range(heads)])
    if heads >= stride:
        assert layers_to_reach(lists) <= 1
    if heads == 2 and local == 2 and size != (1, 1):
        # Heads see the even regions along diagonals; every other one has such a neighbour.
        assert layers_to_reach(lists) <= 2

    def relative(dy: int, dx: int, y: int, x: int) -> bool:
        return max(0, ring(dy, dx) - local + 1) % stride == 0

    options = {"local": local, "stride": stride, "position": "relative"}
    lists = strided_regions(height, width, region, heads, **options)
    check(lists, [expected(*size, relative)])
    dense = strided_regions(height, width, region, heads, **options, dense_heads=1)
    masks = [expected(*size, relative)] * (heads - 1) + [torch.ones_like(expected(*size, relative))]
    check(dense, masks)


@pytest.mark.parametrize("stride", [2, 3, 5, 8])
def test_relative_strides_reach_all_in_three_layers(stride: int) -> None:
    local = stride // 2 + 1
    for height, width in ((1, 7), (1, 24), (1, 39), (12, 15), (20, 20)):
        lists = strided_regions(height, width, 1, 1, local=local, stride=stride, position="relative")
        layers = layers_to_reach(lists)
        assert layers is not None
        assert layers <= min(3, math.ceil((max(height, width) - 1) / (local - 1)))


@pytest.mark.parametrize(
    ("height", "width", "side"), [(8, 16, 4), (12, 24, 8), (16, 8, 8), (1, 12, 3), (9, 32, 2)]
)
@pytest.mark.parametrize("decay", [0.5, 1.0, 3.0])
def test_radial_rows(height: int, width: int, side: int, decay: float) -> None:
    power = 2 ** width.bit_length()

    def rule(dy: int, dx: int, y: int, x: int) -> bool:
        octave = 2 ** abs(dy).bit_length()
        if abs(dy) % max(1, side * octave // power):
            return False
        reach = width if abs(dy) <= 1 else max(side, decay * power / octave)
        seen = [sum(abs(dx * side + c - q) <= reach for q in range(side)) for c in range(side)]
        touched = [n for n in seen if n]
        return sum(n > side / 3 for n in touched) > 0.6 * len(touched)

    lists = radial_regions(height, width, (1, side), decay=decay)
    check(lists, [expected(height, width // side, rule)])
    assert torch.equal(lists, radial_regions(height, width, side, decay=decay))
    layers = layers_to_reach(lists)
    assert layers is not None
    assert layers <= max(1, height - 1)
    with_sink = radial_regions(height, width, side, decay=decay, sink=True)
    check(with_sink, [expected(height, width // side, lambda dy, dx, y, x: y == 0 or rule(dy, dx, y, x))])


@pytest.mark.parametrize(("height", "width", "region"), MAPS)
def test_radial_both_axes(height: int, width: int, region: tuple[int, int]) -> None:
    rows, columns = grid(height, width, region)

    def rule(dy: int, dx: int, y: int, x: int) -> bool:
        step = 2 ** max(0, math.floor(math.log2(max(ring(dy, dx), 1))) - 1)
        return dy % step == 0 and dx % step == 0

    lists = radial_regions(height, width, region, axis="both")
    check(lists, [expected(rows, columns, rule)])
    layers = layers_to_reach(lists)
    assert layers is not None
    assert layers <= max(1, math.ceil(math.log2(max(rows, columns))) - 1)


def test_what_cannot_be_reached_is_said() -> None:
    assert layers_to_reach(window_regions(4, 8, 2, 0)) is None
    assert layers_to_reach(window_regions(2, 2, 2, 0)) == 0
    # Regions see only those before them: the last hears of all, the first of none.
    ahead = torch.tensor([[[[0, -1], [0, 1], [1, 2]]]], dtype=torch.int32)
    assert layers_to_reach(ahead) is None


def test_patterns_are_kept_and_cannot_be_spoilt() -> None:
    first = window_regions(8, 8, 2, 1)
    first.fill_(-1)
    second = window_regions(8, 8, 2, 1)
    assert (second >= 0).any()
    with torch.inference_mode():
        window_regions(8, 8, 2, 2)
    q = torch.randn(1, 8, 8, 2, 4, requires_grad=True)
    routed_attention(q, q, q, window_regions(8, 8, 2, 2), 2).sum().backward()
    assert q.grad is not None


def test_patterns_compile_whole() -> None:
    def attend(q: Tensor) -> Tensor:
        lists = power_regions(q.shape[1], q.shape[2], 2, window=1)
        return routed_attention(q, q, q, lists, 2, distinct=True)

    q = torch.randn(1, 8, 6, 2, 4)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=False)
    torch.testing.assert_close(compiled(q), attend(q))


@pytest.mark.parametrize(
    ("function", "arguments", "options", "message"),
    [
        (window_regions, (8, 8, 2, -1), {}, "radius must be at least 0"),
        (window_regions, (8, 8, 2, ()), {}, "radius must be at least 0"),
        (window_regions, (0, 8, 2, 1), {}, "the size of the map must be"),
        (window_regions, (8, 8, 0, 1), {}, "region_size must be"),
        (power_regions, (8, 8, 2), {"window": 0}, "window must be at least 1"),
        (power_regions, (8, 8, 2), {"sinks": -1}, "sinks must be at least 0"),
        (strided_regions, (8, 8, 2, 0), {"local": 1, "stride": 2}, "heads must be at least 1"),
        (strided_regions, (8, 8, 2, 2), {"local": 1, "stride": 0}, "stride must be at least 1"),
        (strided_regions, (8, 8, 2, 2), {"local": -1, "stride": 2}, "local must be at least 0"),
        (strided_regions, (8, 8, 2, 2), {"local": 1, "stride": 2, "dense_heads": 3}, "at most the 2 heads"),
        (strided_regions, (8, 8, 2, 2), {"local": 1, "stride": 2, "position": "odd"}, "position must be"),
        (radial_regions, (8, 8, 2), {"axis": "columns"}, "axis must be"),
        (radial_regions, (8, 8, 2), {"decay": 0}, "decay must be above 0"),
        (radial_regions, (8, 8, (2, 2)), {}, r"regions \(1, n\)"),
        (radial_regions, (8, 8, 3), {}, "a divisor of the width 8"),
    ],
)
def test_bad_arguments(function: Callable, arguments: tuple, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
