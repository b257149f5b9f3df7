from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from visionattn.tasks.metrics import psnr, rgb_to_y, ssim

GOLDEN = load_file(Path(__file__).parents[1] / "parity/metrics/psnr_ssim_bicubic.safetensors")
PAIRS = ("noise", "waves", "astronaut", "chelsea", "coffee", "camera")


def pair(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    return GOLDEN[f"{name}.img"].permute(2, 0, 1), GOLDEN[f"{name}.gt"].permute(2, 0, 1)


@pytest.mark.parametrize("row", range(3))
@pytest.mark.parametrize("name", PAIRS)
def test_equals_basicsr(name: str, row: int):
    image, truth = pair(name)
    border = (0, 2, 4)[row]
    measured = [
        metric(image, truth, border=border, luma=luma) for luma in (False, True) for metric in (psnr, ssim)
    ]
    for ours, golden in zip(measured, GOLDEN[f"{name}.metrics"][row].tolist(), strict=True):
        # BasicSR leaves the luma of grey images out; ours is then the plain value.
        assert math.isnan(golden) or ours == pytest.approx(golden, abs=2e-6)


def test_ssim_equals_scikit_image():
    structural_similarity = pytest.importorskip("skimage.metrics").structural_similarity
    image, truth = pair("chelsea")
    expected = structural_similarity(
        truth.numpy(), image.numpy(), channel_axis=0, data_range=255,
        gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
    )  # fmt: skip
    assert ssim(image, truth) == pytest.approx(expected, abs=1e-12)


def test_luma_of_known_colours():
    colours = torch.tensor([[255, 255, 255], [0, 0, 0], [255, 0, 0]], dtype=torch.uint8).T.reshape(3, 1, 3)
    torch.testing.assert_close(
        rgb_to_y(colours).flatten(), torch.tensor([235, 16, 81.481]), atol=1e-4, rtol=0
    )


def test_equal_images_and_bad_input():
    _, truth = pair("noise")
    assert psnr(truth, truth) == math.inf
    assert ssim(truth, truth) == pytest.approx(1)
    with pytest.raises(TypeError, match="uint8"):
        psnr(truth.float(), truth)
    with pytest.raises(ValueError, match="one shape"):
        psnr(truth[:, 1:], truth)
    with pytest.raises(ValueError, match="more than 48"):
        psnr(truth, truth, border=24)
    with pytest.raises(ValueError, match="11 pixels"):
        ssim(truth[:, :10], truth[:, :10])
