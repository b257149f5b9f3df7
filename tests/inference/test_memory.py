"""Every restoration network within a budget: the whole-image result, and no more memory than promised."""

from __future__ import annotations

import re

import pytest
import torch
from families import FAMILIES, RESTORATION, small
from torch import nn

from benchmarks.measure import peak_memory
from visionattn.inference import parse_bytes, run_within
from visionattn.layers.bands import by_bands, fold_by_bands, perform

CPU = torch.device("cpu")
every_restorer = pytest.mark.parametrize(
    "name",
    # One of every family; the others differ in their heads.
    [name if name in FAMILIES else pytest.param(name, marks=pytest.mark.slow) for name in RESTORATION],
)


# With one thread, PyTorch unfolds inputs of convolutions below 20480 elements, which is not counted.
UNFOLDED = 9 * 20480 * 4


def build(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A network and an image with rows enough for several bands, and sides that nothing divides."""
    net = small(name).eval()
    return net, torch.rand(1, net.info.channels, 163, 19, generator=torch.Generator().manual_seed(0))


def smallest_budget(net: nn.Module, image: torch.Tensor) -> int:
    with pytest.raises(ValueError, match="needs at least") as error:
        run_within(net, image, 1)
    return parse_bytes(re.findall(r"at least (\S+)$", str(error.value))[0])


@every_restorer
def test_the_result_is_that_of_the_whole_image_in_less_memory(name: str):
    net, image = build(name)
    with torch.no_grad():
        whole = net(image)
        needed = peak_memory(lambda: net(image), CPU)
    assert needed is not None
    least = smallest_budget(net, image)
    assert least < 0.7 * needed
    for budget in (least, (least + needed) // 2):
        out = run_within(net, image, budget)
        assert out.shape == whole.shape
        assert (out - whole).abs().max() <= 1e-6 * whole.abs().max()


@every_restorer
def test_memory_stays_within_the_budget(name: str):
    net, image = build(name)
    budget = 2 * smallest_budget(net, image)
    peak = peak_memory(lambda: run_within(net, image, budget), CPU)
    assert peak is not None
    assert budget / 2 < peak <= budget + UNFOLDED


def test_a_batch_and_another_dtype():
    net = small("hat_x2").double().eval()
    images = torch.rand(3, 3, 40, 19, dtype=torch.float64)
    with torch.no_grad():
        whole = net(images)
    out = run_within(net, images, smallest_budget(net, images))
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, whole, rtol=0, atol=1e-12)


def test_the_budget_holds_for_one_call_and_leaves_no_trace():
    net, image = build("hat_x2")
    out = run_within(net, image, "1GB")
    assert not out.requires_grad
    assert net(image).requires_grad
    with pytest.raises(ValueError, match="call eval"):
        run_within(net.train(), image, "1GB")


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GB", 2 * 10**9), ("512MiB", 512 * 2**20), ("1.5 gib", 3 * 2**29), ("800M", 8 * 10**8), (12, 12)],
)
def test_sizes(text: str | int, size: int):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-2GB", "2TBs", "1,5GB", 0, -3, True, "0.1"])
def test_wrong_sizes_are_one_sentence(text: str | int):
    with pytest.raises(ValueError, match="a size in bytes reads 2GB"):
        parse_bytes(text)


def windows(x: torch.Tensor, top: int | None) -> torch.Tensor:
    """Sums of pairs of rows that begin at odd ones, on a torus."""
    if top is None:
        return windows(torch.cat((x[:, -1:], x, x[:, :1]), 1), -1)[:, 1:-1]
    first = (1 - top) % 2
    rows = (x.shape[1] - first) // 2 * 2
    sums = x[:, first : first + rows].unflatten(1, (-1, 2)).sum(2).repeat_interleave(2, 1)
    return torch.nn.functional.pad(sums, (0, 0, first, x.shape[1] - first - rows))


@pytest.mark.parametrize("height", [2, 4, 7, 12, 30])
def test_bands_of_a_torus(height: int):
    x = torch.arange(24.0).square().view(1, 12, 2)
    whole = by_bands(windows, x, halo=1, align=2, offset=1, wrap=True, placed=True)
    assert whole[0, 0, 0] == x[0, 0, 0] + x[0, 11, 0]
    with perform([height]):
        banded = by_bands(windows, x, halo=1, align=2, offset=1, wrap=True, placed=True)
    torch.testing.assert_close(banded, whole, rtol=0, atol=0)


def test_folding_sees_every_row_once():
    x = torch.rand(2, 11, 3)

    def add(total: torch.Tensor, x: torch.Tensor, core: slice) -> torch.Tensor:
        assert x[:, core].shape[1] <= 4
        return total + x[:, core].sum()

    with perform([4]):
        total = fold_by_bands(add, torch.zeros(()), x, halo=2)
    torch.testing.assert_close(total, x.sum())
