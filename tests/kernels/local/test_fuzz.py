"""Random geometry: the PyTorch path against the formula, and the tiles of the fused kernels against it."""

from __future__ import annotations

from cases import BIASES, assert_equals_reference, make, patterns
from hypothesis import given, settings
from hypothesis import strategies as st

from visionattn.kernels.local.fused.tiling import Owner, tiling
from visionattn.kernels.local.pattern import Pattern

FUZZ = {"deadline": None, "derandomize": True}


@settings(max_examples=500, **FUZZ)
@given(
    pattern=patterns(most_pixels=150, largest=8),
    bias=st.sampled_from(BIASES),
    dim=st.sampled_from([2, 12, 24]),
    return_lse=st.booleans(),
)
def test_torch_equals_the_formula(pattern: Pattern, bias: str, dim: int, return_lse: bool) -> None:
    assert_equals_reference("torch", pattern, make(pattern, bias, dim, heads=1), 1e-5, return_lse)


@settings(max_examples=300, **FUZZ)
@given(
    pattern=patterns(most_pixels=400, largest=12),
    owner=st.sampled_from(["query", "key"]),
    most=st.tuples(st.sampled_from([16, 32, 64]), st.sampled_from([16, 32, 64])),
    in_block=st.booleans(),
)
def test_tiles_cover_the_map_once(
    pattern: Pattern, owner: Owner, most: tuple[int, int], in_block: bool
) -> None:
    tiles = tiling(pattern, owner, *most, in_block)
    assert tiles.y.tile * tiles.x.tile <= tiles.own <= most[0]
    assert tiles.strip <= tiles.others <= most[1]
    for axis, tiled in ((pattern.y, tiles.y), (pattern.x, tiles.x)):
        assert not in_block or tiled.tile <= axis.window
        for group in axis.groups():
            pixels = []
            for number in range(tiled.tiles):
                cell = tiled.first + number // tiled.parts * tiled.cell
                begin = cell + number % tiled.parts * tiled.tile
                pixels += range(begin, min(begin + tiled.tile, cell + tiled.cell))
            assert [n for n in pixels if 0 <= n < group.axis.length] == list(range(group.axis.length))
