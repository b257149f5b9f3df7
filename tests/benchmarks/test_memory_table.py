"""The memory of large pictures: measured in processes of their own, or counted without running."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import memory
from benchmarks.measure import peak_memory
from benchmarks.memory import LargePicture, measure_memory
from visionattn.errors import InputError

SMALL: dict[str, Any] = {
    "depths": (2,),
    "embed_dim": 24,
    "num_heads": 2,
    "window_size": 8,
    "squeeze_factor": 2,
}


def test_every_way_gives_the_same_picture_and_budgets_less_memory():
    rows = list(measure_memory(["hat_x2"], size=(240, 240), budgets=["30MB"], **SMALL))
    authors, whole, banded = rows
    assert [row.computation for row in rows] == ["authors", "whole image", "30MB"]
    assert all(row.input == (1, 3, 240, 240) for row in rows)
    assert authors.memory is not None
    assert authors.counted is not None
    # The process holds more than the tensors for libraries and for the allocator.
    assert 0.8 * authors.counted < authors.memory < 2 * authors.counted
    for row in rows:
        assert row.memory is not None
        assert row.share == row.memory / authors.memory
        assert row.time is not None
        assert row.difference is not None
        assert row.difference < 1e-5
    assert authors.difference == 0
    assert whole.slowdown == 1
    assert authors.slowdown is None
    assert banded.slowdown is not None
    assert banded.share is not None
    assert whole.share is not None
    assert 2 * banded.share < whole.share < 1
    assert all(len(row.cells()) == len(memory.page(rows).columns) for row in rows)


@pytest.mark.parametrize("computation", ["authors", "whole image"])
def test_counting_tells_what_would_be_allocated(computation: str):
    setting = memory.Setting("hat_x2", (1, 3, 120, 120), computation, 1, 1, "cpu", SMALL)
    net, image = setting.build("cpu"), torch.rand(setting.shape)
    with torch.no_grad(), setting.formulation(net):
        net(image)
        measured = peak_memory(lambda: net(image), torch.device("cpu"))
    assert setting.count() == pytest.approx(measured, rel=0.1)


def test_what_would_take_too_much_is_counted_and_not_run():
    rows = measure_memory(["hat_x4"], size=(512, 512), limit="1GB")
    authors, whole = rows
    assert authors.memory is whole.memory is authors.time is whole.difference is None
    assert authors.counted is not None
    assert authors.counted > 10e9
    assert authors.share == 1
    assert whole.counted is not None
    assert whole.share == whole.counted / authors.counted
    assert "not run" in whole.cells()


def test_bad_requests_are_one_sentence_before_work_starts():
    for names, options, message in (
        (["hat_x4", "hat_x5"], {}, "unknown network 'hat_x5': did you mean hat_x"),
        (["biformer_tiny"], {}, "biformer_tiny does not restore pictures"),
        (["hat_x4"], {"budgets": ["much"]}, "a size in bytes reads 2GB"),
        (["hat_x4"], {"limit": "0"}, "a size in bytes reads 2GB"),
    ):
        with pytest.raises(InputError, match=message):
            next(measure_memory(names, size=(16, 16), **options))
    with pytest.raises(InputError, match=r"cannot run hat_x2 at 3x16: .* at least 5 pixels"):
        next(measure_memory(["hat_x2"], size=(3, 16), **SMALL))
    with pytest.raises(InputError, match=r"cannot run hat_x2 at 40x40: .* needs at least"):
        list(measure_memory(["hat_x2"], size=(40, 40), budgets=["1KB"], limit="1KB", **SMALL))


class Dying(memory.Setting):
    def measure(self) -> Any:
        os._exit(9)


def test_a_process_that_dies_is_an_error_that_says_so():
    with pytest.raises(InputError, match=r"hat_x2 at 8x9, authors: the process was ended from outside"):
        memory.in_own_process(Dying("hat_x2", (1, 3, 8, 9), "authors", 1, 1, "cpu"))


def test_command_line(run_tool: Any, tmp_path: Path):
    output = tmp_path / "memory.json"
    arguments = [
        "hat_s_x4",
        "depths=[2, 1]",
        "--size",
        "720",
        "1280",
        "--limit",
        "1MB",
        "--output",
        str(output),
    ]
    status, printed, _ = run_tool("benchmark.py", "memory", *arguments)
    assert status == 0
    content = json.loads(output.read_text())
    rows = [LargePicture(**{**row, "input": tuple(row["input"])}) for row in content["results"]]
    assert [row.computation for row in rows] == ["authors", "whole image"]
    assert rows[0].cells()[0] == "hat_s_x4 depths=[2, 1]"
    assert "no less memory" in output.with_suffix(".md").read_text()
    for row in rows:
        assert all(f" {cell} " in printed for cell in row.cells())
    status, _, error = run_tool(
        "benchmark.py", "memory", "hat_s_x4", "--size", "720", "1280", "--budgets", "x"
    )
    assert status == 2
    assert len(error.splitlines()) == 1
