"""Growth with the number of pixels: linear networks are, and what the page says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.scaling import measure_growth, page
from visionattn.errors import InputError


def test_memory_of_a_linear_network_grows_linearly() -> None:
    (row,) = measure_growth(["inline_pvt_tiny"], [64, 128], repeats=1)
    assert row.sides == (64, 128)
    assert row.memory_exponent == pytest.approx(1, abs=0.15)
    columns = page([row]).columns
    assert columns == ("network", "64", "128", "exponent, time", "exponent, memory")
    assert len(row.cells()) == len(columns)
    assert row.cells()[0] == "inline_pvt_tiny"


def test_command_line(run_tool, tmp_path: Path) -> None:
    output = tmp_path / "growth.json"
    arguments = ["inline_pvt_tiny", "--sides", "32", "64", "--repeats", "1", "--output", str(output)]
    status, printed, _ = run_tool("benchmark.py", "scaling", *arguments)
    assert status == 0
    content = json.loads(output.read_text())
    (row,) = content["results"]
    assert row["sides"] == [32, 64]
    assert len(row["timings"]) == len(row["memory"]) == 2
    assert printed.split("\n\n")[0].strip() in output.with_suffix(".md").read_text()
    status, _, error = run_tool("benchmark.py", "scaling", "inline_pvt_tiny", "--sides", "64")
    assert status == 2
    assert error.startswith("error: at least two sides")


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
