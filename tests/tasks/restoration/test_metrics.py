from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.random import RandomState
from safetensors.torch import load_file

from visionattn.data.degradations.jpeg import jpeg
from visionattn.data.degradations.resize import to_uint8
from visionattn.data.images import rgb_to_y
from visionattn.tasks.restoration.metrics import mpsnr, mssim, psnr, psnr_b, sam, ssim

GOLDEN = load_file(Path(__file__).parents[2] / "parity/metrics/psnr_ssim_bicubic.safetensors")
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


@pytest.mark.parametrize("name", PAIRS)
def test_is_near_the_metrics_of_unrounded_images(name: str):
    """BasicSR's variant for floats adds 1e-8 to the error; on stored images it says almost the same."""
    assert psnr(*pair(name)) == pytest.approx(GOLDEN[f"{name}.metrics_pt"][0, 0].item(), abs=2e-4)


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


def psnr_b_by_loops(image: np.ndarray, truth: np.ndarray) -> float:
    """PSNR-B of one channel, pixel pair by pixel pair, in the order of its definition."""
    height, width = image.shape
    steps: dict[bool, list[float]] = {True: [], False: []}
    for i in range(height):
        for j in range(width - 1):
            steps[j % 8 == 7].append((image[i, j] - image[i, j + 1]) ** 2)
    for j in range(width):
        for i in range(height - 1):
            steps[i % 8 == 7].append((image[i, j] - image[i + 1, j]) ** 2)
    borders = height * (width // 8 - 1) + width * (height // 8 - 1)
    others = height * (width - 1) + width * (height - 1) - borders
    at_border, elsewhere = sum(steps[True]) / borders, sum(steps[False]) / others
    weight = math.log2(8) / math.log2(min(height, width)) if at_border > elsewhere else 0
    error = ((image - truth) ** 2).mean() + weight * (at_border - elsewhere)
    return 10 * math.log10(255**2 / error)


@pytest.mark.parametrize("size", [(40, 48), (37, 51)])
def test_psnr_b_equals_its_definition(size: tuple[int, int]):
    truth = pair("chelsea")[1][:, : size[0], : size[1]]
    image = to_uint8(jpeg(truth / 255, RandomState(0), (10, 10)))
    expected = [psnr_b_by_loops(*(x[c].double().numpy() for x in (image, truth))) for c in range(3)]
    assert psnr_b(image, truth) == pytest.approx(np.mean(expected), abs=1e-9)
    assert psnr_b(image, truth) < psnr(image, truth) - 0.1  # the blocks of JPEG count
    luma = [rgb_to_y(x)[0].double().numpy() for x in (image, truth)]
    assert psnr_b(image, truth, luma=True) == pytest.approx(psnr_b_by_loops(*luma), abs=1e-6)


def test_psnr_b_without_blocks_is_psnr():
    truth = pair("waves")[1][:1]
    image = truth.clone()
    image[:, 3::8, 3::8] //= 2  # steps inside the blocks alone
    assert psnr_b(image, truth) == pytest.approx(psnr(image, truth))
    with pytest.raises(ValueError, match="16 pixels"):
        psnr_b(truth[:, :15], truth[:, :15])


@pytest.fixture
def cubes() -> tuple[torch.Tensor, torch.Tensor]:
    truth = torch.nn.functional.interpolate(torch.rand(1, 5, 4, 4), (30, 26), mode="bicubic")[0].clamp(0, 1)
    return truth + 0.05 * torch.randn(truth.shape), truth


def test_cube_metrics_equal_scikit_image(cubes: tuple[torch.Tensor, torch.Tensor]):
    metrics = pytest.importorskip("skimage.metrics")
    cube, truth = cubes
    a, b = (x.double().clamp(0, 1).numpy() for x in cubes)
    assert mpsnr(cube, truth) == pytest.approx(
        np.mean([metrics.peak_signal_noise_ratio(y, x, data_range=1) for x, y in zip(a, b)]), abs=1e-9
    )
    for data_range in (1.0, 2.0):
        expected = np.mean([metrics.structural_similarity(y, x, data_range=data_range) for x, y in zip(a, b)])
        assert mssim(cube, truth, data_range) == pytest.approx(expected, abs=1e-9)
    assert mssim(cube, truth) == mssim(cube, truth, 2.0)


def test_spectral_angle(cubes: tuple[torch.Tensor, torch.Tensor]):
    cube, truth = cubes
    angles = []
    for x, y in zip(cube.clamp(0, 1).flatten(1).T.double(), truth.flatten(1).T.double()):
        angles.append(math.acos(min((x @ y / (x.norm() * y.norm())).item(), 1.0)))
    assert sam(cube, truth) == pytest.approx(np.mean(angles), abs=1e-6)
    red, green = torch.zeros(3, 2, 2), torch.zeros(3, 2, 2)
    red[0], green[1] = 1, 1
    assert sam(red, green) == pytest.approx(math.pi / 2, abs=1e-6)
    assert sam(truth / 2, truth) == pytest.approx(0, abs=1e-3)  # brightness does not count
    assert mpsnr(truth, truth) == math.inf
    for metric in (mpsnr, mssim, sam):
        with pytest.raises(ValueError, match="one shape"):
            metric(cube[1:], truth)
    with pytest.raises(ValueError, match="7 pixels"):
        mssim(cube[:, :6], truth[:, :6])
