"""The local attribution map where the dependence is known, and the index against a hand computation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, small
from torch import Tensor, nn

from visionattn.inference.attribution import diffusion_index, local_attribution


def convolution(kernel_size: int) -> nn.Module:
    torch.manual_seed(1)
    return nn.Conv2d(3, 3, kernel_size, padding=kernel_size // 2)


@pytest.mark.parametrize("kernel_size", [1, 5, 9])
def test_nothing_outside_the_receptive_field(kernel_size: int):
    x = torch.rand(3, 40, 44)
    share = local_attribution(convolution(kernel_size), x, 1, top=18, left=20, side=4).map
    reach = kernel_size // 2
    inside = torch.zeros(40, 44, dtype=torch.bool)
    inside[18 - reach : 22 + reach, 20 - reach : 24 + reach] = True
    assert share.max() == 1
    assert (share[~inside] == 0).all()
    assert (share[inside] > 0).float().mean() > 0.9


def test_the_gradient_is_that_of_the_definition():
    """For a linear network on one channel, by the formula written out with another blur."""
    torch.manual_seed(0)
    x, net = torch.rand(1, 21, 23).double(), nn.Conv2d(1, 1, 3, padding=1).double()
    total = torch.zeros_like(x)

    def blurred(i: int) -> Tensor:
        sigma = 1.2 * (1 - i / 50)
        if not sigma:
            return x
        offset = torch.arange(-4.0, 5).double()
        weights = torch.exp(-(offset**2) / (2 * sigma**2))
        weights = weights / weights.sum()
        padded = F.pad(x[None], (4, 4, 4, 4), mode="reflect")
        rows = F.conv2d(padded, weights.view(1, 1, 9, 1))
        return F.conv2d(rows, weights.view(1, 1, 1, 9))[0]

    for i in range(1, 51):
        image = blurred(i).requires_grad_()
        window = net(image[None])[0, 0, 6:12, 7:13]
        dx, dy = window[:-1, 1:] - window[:-1, :-1], window[1:, :-1] - window[:-1, :-1]
        (gradient,) = torch.autograd.grad((dx**2 + dy**2).sqrt().sum(), image)
        total += gradient * 50 * (image.detach() - blurred(i - 1)) / 50
    expected = total[0].abs() / total.abs().max()
    found = local_attribution(net, x, 1, top=6, left=7, side=6)
    torch.testing.assert_close(found.map, expected, rtol=1e-8, atol=1e-10)


def test_flat_windows_have_no_gradient_and_no_nan():
    found = local_attribution(convolution(3), torch.full((3, 12, 12), 0.5), 1, top=4, left=4, side=4)
    assert (found.map == 0).all()
    assert found.diffusion_index == pytest.approx(100)


def test_diffusion_index():
    assert diffusion_index(torch.full((5, 8), 0.3)) == pytest.approx(100)
    one = torch.zeros(5, 8)
    one[2, 3] = 1
    assert diffusion_index(one) == pytest.approx(100 / 40, abs=1e-3)
    # Mean absolute difference of all pairs over twice the mean, by hand: (1, 2, 3, 6).
    values = torch.tensor([[6.0, 1.0], [3.0, 2.0]])
    pairs = 2 * (1 + 2 + 5 + 1 + 4 + 3)
    assert diffusion_index(values) == pytest.approx(100 * (1 - pairs / (2 * 16 * 3)), abs=1e-4)


@pytest.mark.parametrize(("top", "left", "side"), [(-1, 0, 4), (0, 9, 4), (0, 0, 1), (0, 0, 30)])
def test_windows_outside_are_refused(top: int, left: int, side: int):
    with pytest.raises(ValueError, match="does not lie in the output of 12x12"):
        local_attribution(convolution(3), torch.rand(3, 12, 12), 1, top, left, side)


@pytest.mark.slow  # fifty forward and backward passes a network
@pytest.mark.parametrize("name", [name for name in FAMILIES if name.endswith("_x2")])
def test_every_super_resolution_network(name: str):
    net = small(name).eval()
    found = local_attribution(net, torch.rand(3, 24, 24), 2, top=16, left=16, side=16)
    assert found.map.shape == (24, 24)
    assert found.map.isfinite().all()
    assert found.map.max() == 1
    assert 0 < found.diffusion_index < 100
