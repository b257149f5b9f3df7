"""The comparison of selectors: quality by its definition, methods at their densities, the page, the plot."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch

from benchmarks import selectors
from benchmarks.selector_methods import METHODS, Choice, Maps, attend, density_of, with_own
from visionattn.errors import InputError
from visionattn.kernels import window_regions

REGION = (4, 4)


@pytest.fixture(scope="module")
def maps() -> list[Maps]:
    generator = torch.Generator().manual_seed(0)
    return [Maps(*torch.randn(3, 1, 16, 16, 2, 8, generator=generator)) for _ in range(2)]


def test_quality_is_its_definition(maps: list[Maps]) -> None:
    truths = [selectors.full_attention(x, REGION) for x in maps]
    choices = [Choice(window_regions(16, 16, REGION, 1)) for _ in maps]
    found = selectors.judge(choices, truths, REGION)
    # Of 4x4 regions the four in the middle have 9 neighbours, eight 6 and four 4.
    assert found.density == pytest.approx((4 * 9 + 8 * 6 + 4 * 4) / 16 / 16)
    masses, errors = [], []
    for truth, choice in zip(truths, choices):
        listed = torch.zeros(16, 16, dtype=torch.bool)
        for row, names in enumerate(choice.lists[0, 0].tolist()):
            listed[row, [n for n in names if n >= 0]] = True
        region_of = (torch.arange(16)[:, None] // 4 * 4 + torch.arange(16) // 4).flatten()
        masses.append((truth.mass * listed[region_of]).sum(-1).mean())
        errors.append(attend(truth.maps, choice, REGION)[0] - truth.out)
    assert found.mass == pytest.approx(float(sum(masses) / 2), rel=1e-4)
    norm = torch.stack([truth.out for truth in truths]).norm()
    assert found.error == pytest.approx(float(torch.stack(errors).norm() / norm), rel=1e-4)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_method_that_lists_all_is_full_attention(method, maps: list[Maps]) -> None:
    truth = selectors.full_attention(maps[0], REGION)
    options = selectors.nearest_options(method, maps[0], REGION, 0.5, {})
    if options is not None:
        density = density_of(method.choose(maps[0], REGION, **options), maps[0], REGION)
        assert 0.5 / 1.4 <= density <= 0.5 * 1.4
    if method.name in ("window", "top-k", "gate per query", "exact mass", "chunks", "LSH blocks"):
        options = selectors.nearest_options(method, maps[0], REGION, 1.0, {})
        choice = method.choose(maps[0], REGION, **options)
        found = selectors.judge([choice], [truth], REGION)
        assert found.density == pytest.approx(1)
        assert found.error < 1e-5
        assert found.mass == pytest.approx(1, rel=1e-5)
        assert found.recall in (None, 1.0)


@pytest.mark.parametrize("name", ["random", "gate per head"])
def test_the_own_region_is_forced(name: str, maps: list[Maps]) -> None:
    (method,) = (x for x in METHODS if x.name == name)
    choice = with_own(method.choose(maps[0], REGION, topk=1), maps[0], REGION)
    pixel = 5 * 16 + 14  # in the region 7
    row = choice.lists[0, 0, pixel if choice.rows == 1 else 7].tolist()
    assert 7 in row


def test_rows_page_and_plot(maps: list[Maps], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [x for x in METHODS if x.name in ("random", "exact mass", "LSH blocks, sampled rest")]
    monkeypatch.setattr(selectors, "METHODS", chosen)
    rows = list(selectors.measure_selectors(maps, REGION, repeats=1, densities=(0.25, 0.5)))
    assert [row.method for row in rows] == [x.name for x in chosen] * 2
    assert {row.forced is None for row in rows if row.method != "LSH blocks, sampled rest"} == {False}
    page = selectors.page(rows, ["a claim"])
    assert all(len(row.cells()) == len(page.columns) for row in rows)
    random, exact = rows[:2]
    assert exact.chosen.error < random.chosen.error
    assert exact.chosen.recall == 1
    pytest.importorskip("matplotlib")
    selectors.plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_maps_of_a_layer_and_wrong_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"embed_dim": 16, "num_heads": 2, "depths": [1], "window_size": 4, "squeeze_factor": 4}
    net = timm.create_model("hat_s_x2", **sizes, compress_ratio=4).eval()
    task = torch.nn.Module()
    task.model = net
    monkeypatch.setattr(selectors, "load_trained_config", lambda run: run)
    monkeypatch.setattr(selectors, "create_task", lambda config: task)
    run = str(tmp_path)
    model, layer = selectors.open_layer(run, "layers.0.blocks.0.attn")
    maps = selectors.read_maps(model, layer, 18)
    assert len(maps) == 3
    assert all(x.shape == (1, 18, 18, 2, 8) for one in maps for x in one)
    with pytest.raises(InputError, match=r"no attention layer 'layers.9'; it has layers.0.blocks.0.attn"):
        selectors.open_layer(run, "layers.9")
    with pytest.raises(InputError, match="there is no run folder"):
        selectors.open_layer(f"{run}/missing", "layers.0.blocks.0.attn")
    with pytest.raises(InputError, match="side must be at most"):
        selectors.read_maps(model, layer, 1000)
