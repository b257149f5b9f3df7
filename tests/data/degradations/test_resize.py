from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from numpy.random import RandomState
from safetensors.torch import load_file

from visionattn.data.degradations.jpeg import jpeg
from visionattn.data.degradations.resize import bicubic_low_resolution, imresize, modcrop, to_uint8

GOLDEN = load_file(Path(__file__).parents[2] / "parity/metrics/psnr_ssim_bicubic.safetensors")


def planes(name: str) -> torch.Tensor:
    image = GOLDEN[name]
    image = image.permute(2, 0, 1) if image.ndim == 3 else image
    return image.float() / 255 if image.dtype == torch.uint8 else image


@pytest.mark.parametrize("factor", [2, 3, 4])
@pytest.mark.parametrize("name", ["noise", "waves", "astronaut", "chelsea", "camera"])
def test_reduction_equals_matlab(name: str, factor: int):
    torch.testing.assert_close(
        imresize(planes(f"{name}.gt"), 1 / factor), planes(f"{name}.down{factor}"), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_enlargement_equals_matlab(factor: int):
    small = planes("waves.gt")[:, :20, :24]
    torch.testing.assert_close(imresize(small, factor), planes(f"waves20x24.up{factor}"), atol=1e-6, rtol=0)


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_taps_are_matlabs(factor: int):
    impulses = torch.eye(12 * factor, dtype=torch.float64).unsqueeze(1)
    taps = imresize(impulses, 1 / factor)[:, 0, 6]
    golden = GOLDEN[f"weights.down{factor}"].double()
    ours, theirs = (weights[weights.abs() > 1e-12] for weights in (taps, golden))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_the_low_resolution_of_a_benchmark():
    reduced = bicubic_low_resolution(GOLDEN["astronaut.gt"].permute(2, 0, 1), 4)
    assert torch.equal(reduced, GOLDEN["astronaut.lr4_uint8"].permute(2, 0, 1))


def test_jpeg_equals_opencvs():
    truth = GOLDEN["coffee.gt"].permute(2, 0, 1)
    decoded = jpeg(truth.float() / 255, RandomState(0), (20, 20))
    assert torch.equal(to_uint8(decoded), GOLDEN["coffee.img"].permute(2, 0, 1))


def test_without_antialiasing_and_ramp():
    torch.testing.assert_close(
        imresize(planes("waves.gt"), 0.5, antialias=False), planes("waves.down2_noaa"), atol=1e-6, rtol=0
    )
    ramp = (torch.arange(8) / 7).expand(8, 8)
    torch.testing.assert_close(imresize(ramp, 0.5), GOLDEN["ramp8.down2"], atol=1e-6, rtol=0)


@pytest.mark.parametrize(("size", "scale"), [(7, 1 / 3), (9, 1 / 3), (5, 0.3), (3, 2.5), (1, 4), (2, 1 / 4)])
def test_sizes_are_rounded_up_and_constants_kept(size: int, scale: float):
    resized = imresize(torch.full((2, size, size + 1), 0.25), scale)
    assert resized.shape == (2, math.ceil(size * scale - 1e-9), math.ceil((size + 1) * scale - 1e-9))
    torch.testing.assert_close(resized, torch.full_like(resized, 0.25))


def test_gradient_flows():
    x = torch.rand(1, 6, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: imresize(x, 0.5), (x,))


def test_rounding_to_bytes():
    half = torch.tensor([-1.0, 0.5 / 255, 1.5 / 255, 2.5 / 255, 2.0], dtype=torch.float64)
    assert to_uint8(half).tolist() == [0, 0, 2, 2, 255]
    assert bicubic_low_resolution(torch.full((3, 8, 8), 200, dtype=torch.uint8), 2).unique().tolist() == [200]


def test_modcrop():
    assert modcrop(torch.zeros(3, 13, 9), 4).shape == (3, 12, 8)
    with pytest.raises(ValueError, match="smaller than 4"):
        modcrop(torch.zeros(3, 13, 3), 4)


@pytest.mark.parametrize(("x", "scale", "error"), [(torch.zeros(4, 4, dtype=torch.uint8), 0.5, TypeError),
                                                   (torch.zeros(4, 4), 0.0, ValueError)])  # fmt: skip
def test_bad_input(x: torch.Tensor, scale: float, error: type[Exception]):
    with pytest.raises(error):
        imresize(x, scale)
