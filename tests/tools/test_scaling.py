"""Growth with the number of pixels: linear networks are, and what the page says."""

from __future__ import annotations

import pytest

from visionattn.benchmark.scaling import measure_growth, page
from visionattn.engine.errors import InputError


def test_memory_of_a_linear_network_grows_linearly() -> None:
    (row,) = measure_growth(["inline_pvt_tiny"], [64, 128], repeats=1)
    assert row.sides == (64, 128)
    assert row.memory_exponent == pytest.approx(1, abs=0.15)
    text = page([row], {"machine": "a machine"}, "a command")
    assert "| inline_pvt_tiny | " in text
    assert "`a command`\n\n- machine: a machine\n" in text


@pytest.mark.parametrize(
    ("names", "sides", "message"),
    [
        (["inline_pvt_tinny"], [64, 128], "did you mean inline_pvt_tiny"),
        (["inline_pvt_tiny"], [64], "at least two sides"),
        (["inline_pvt_tiny"], [128, 64], "ascending"),
        (["inline_pvt_tiny"], [16, 64], "cannot run inline_pvt_tiny: .* at least 32 pixels"),
    ],
)
def test_bad_input_is_one_sentence(names: list[str], sides: list[int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        next(measure_growth(names, sides))
