"""Simulated tilings against the published and the measured tilings."""

from __future__ import annotations

import pytest

from benchmarks.simulation import simulate
from visionattn.kernels.local.pattern import Pattern, grid_axis, neighborhood_axis, window_axis


def square(size: int, kernel: int, stride: int = 1, dilation: int = 1) -> Pattern:
    return Pattern(*[neighborhood_axis(size, kernel, stride, dilation, False)] * 2)


@pytest.mark.parametrize(
    ("kernel", "query_tile", "key_tile", "aligned", "floating"),
    [
        (7, (8, 8), (8, 8), 9.6, 5.2),
        (7, (8, 8), (16, 8), 13.2, 5.2),
        (7, (4, 8), (8, 8), 6.6, 4.9),
        (7, (7, 7), (7, 7), 7.6, 4.0),
        (13, (8, 8), (8, 8), 2.8, 2.8),
        (13, (4, 4), (8, 8), 2.8, 1.5),
    ],
)
def test_waste_at_56(
    kernel: int, query_tile: tuple[int, int], key_tile: tuple[int, int], aligned: float, floating: float
) -> None:
    pattern = square(56, kernel)
    for layout, expected in (("aligned", aligned), ("floating", floating)):
        assert simulate(pattern, query_tile, key_tile, layout).waste == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize(("stride", "bound"), [(16, 10.24), (1, 7.5)])
def test_speedup_bound_of_large_kernels(stride: int, bound: float) -> None:
    result = simulate(square(256, 80, stride), (16, 8), (16, 8), "aligned")
    assert result.speedup_bound == pytest.approx(bound, abs=0.05)
    assert (result.waste == 1) == (stride == 16)


def test_windows_and_grids_waste_nothing_with_their_own_tiles() -> None:
    windows = Pattern(*[window_axis(56, 8)] * 2)
    assert simulate(windows, (8, 8), (8, 8), "aligned").waste == 1
    grids = Pattern(*[grid_axis(56, 8)] * 2)
    assert simulate(grids, (8, 8), (8, 8), "floating").waste == 1


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="layout='sideways' is unknown"):
        simulate(square(8, 3), (4, 4), (4, 4), "sideways")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="tile sides must be at least 1"):
        simulate(square(8, 3), (0, 4), (4, 4), "aligned")
