"""Functions by bands of rows and by pieces of pixels give what they give for whole maps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from visionattn.inference.rehearsal import perform
from visionattn.layers import bands
from visionattn.layers.bands import folded, pixelwise, windowed


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
    whole = windowed(windows, x, window=2, shift=1, halo=1, torus=True)
    assert whole[0, 0, 0] == x[0, 0, 0] + x[0, 11, 0]
    with perform([height]):
        banded = windowed(windows, x, window=2, shift=1, halo=1, torus=True)
    torch.testing.assert_close(banded, whole, rtol=0, atol=0)


def test_folding_sees_every_row_once():
    x = torch.rand(2, 11, 3)

    def add(total: torch.Tensor, x: torch.Tensor, core: slice) -> torch.Tensor:
        assert x[:, core].shape[1] <= 4
        return total + x[:, core].sum()

    with perform([4]):
        total = folded(add, torch.zeros(()), x, halo=2)
    torch.testing.assert_close(total, x.sum())


def test_pieces_overwrite_what_may_be_overwritten():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, 2, 33, 20, 64, generator=generator)
    layer = nn.Linear(64, 64)

    def mix(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + layer(y)

    whole, seen = mix(x, y), []
    layer.register_forward_hook(lambda module, args, out: seen.append(args[0].shape))
    with torch.no_grad():
        out = pixelwise(mix, x, y, into=x, hidden_dim=2**10)
    assert out.data_ptr() == x.data_ptr()
    assert len(seen) > 1
    torch.testing.assert_close(out, whole, rtol=1e-6, atol=1e-6)
    seen.clear()
    pixelwise(mix, x, y, into=x, hidden_dim=2**10)  # gradients need the map
    with torch.no_grad(), perform([5]):
        pixelwise(mix, x, y, into=x, hidden_dim=2**10)
    assert [shape[1] for shape in seen] == [33, 5, 5, 5, 5, 5, 5, 3]


@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (7, 4)])
def test_large_maps_pass_branches_in_pieces(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch):
    sizes = []

    def add_square(x: torch.Tensor) -> torch.Tensor:
        sizes.append(x[..., 0].numel())
        return x + x.square()

    def run(x: torch.Tensor, training: bool) -> torch.Tensor:
        return pixelwise(add_square, x, into=None if training else x, hidden_dim=8)

    x = torch.randn(shape)
    pixels, expected = x[..., 0].numel(), x + x.square()
    assert torch.equal(run(x.clone(), training=False), expected)
    monkeypatch.setattr(bands, "_IN_CACHE", 0)
    monkeypatch.setattr(bands, "_PIECE", 3)
    assert torch.equal(run(x.clone(), training=False), expected)
    with torch.no_grad():
        assert torch.equal(run(x.clone(), training=True), expected)
        assert sizes == [pixels] * 3
        strided = x.clone().transpose(0, -2)
        assert torch.equal(run(strided, training=False), expected.transpose(0, -2))
    assert sum(sizes) == 4 * pixels
    assert max(sizes[3:]) <= 3 * torch.get_num_threads()
