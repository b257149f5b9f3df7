"""Noise against the protocols that define it, and its statistics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.random import RandomState

from visionattn.data.degradations.noise import gaussian_noise, hyperspectral_noise, poisson_noise

GREY = torch.full((3, 120, 160), 0.5)
CUBE = torch.full((31, 80, 100), 0.5)


@pytest.mark.parametrize("channels", [1, 3])
def test_gaussian_noise_is_that_of_the_benchmarks(channels: int):
    image = torch.rand(channels, 9, 13, generator=torch.Generator().manual_seed(1))
    # What the evaluation scripts do: a blue-green-red image [H, W, C] and numpy's global generator.
    np.random.seed(0)
    bgr = image.flip(0).permute(1, 2, 0).numpy()
    noisy = bgr + np.random.normal(0, 25 / 255.0, bgr.shape)
    expected = torch.from_numpy(noisy[..., ::-1].copy()).permute(2, 0, 1).float()
    assert torch.equal(gaussian_noise(image, RandomState(0), (25, 25)), expected)


def test_a_range_of_levels_is_drawn_evenly():
    rng = RandomState(1)
    deviations = [gaussian_noise(GREY, rng, (10, 50)).std().item() * 255 for _ in range(60)]
    assert 10 <= min(deviations) < 16
    assert 44 < max(deviations) <= 51
    assert np.mean(deviations) == pytest.approx(30, abs=5)


def test_grey_noise_is_equal_on_all_channels():
    noise = gaussian_noise(GREY, RandomState(0), (20, 20), grey_probability=1.0) - GREY
    assert torch.equal(noise[0], noise[1])
    assert noise.std().item() * 255 == pytest.approx(20, rel=0.03)
    coloured = gaussian_noise(GREY, RandomState(0), (20, 20)) - GREY
    assert abs(np.corrcoef(coloured[0].flatten(), coloured[1].flatten())[0, 1]) < 0.03


def test_poisson_noise_has_the_variance_of_photons():
    levels = torch.arange(0, 256).float().div(255).repeat(3, 200, 1)  # 256 levels: 256 photons at white
    noise = poisson_noise(levels, RandomState(0)) - levels
    for level in (32, 128, 224):
        assert noise[..., level].var().item() == pytest.approx(level / 255 / 256, rel=0.2)
    half = poisson_noise(levels, RandomState(0), (0.5, 0.5)) - levels
    torch.testing.assert_close(half, noise / 2, atol=1e-6, rtol=0)
    grey = poisson_noise(levels * torch.tensor([1.0, 0.5, 0.2]).view(3, 1, 1), RandomState(0), (1, 1), 1.0)
    grey = grey - levels * torch.tensor([1.0, 0.5, 0.2]).view(3, 1, 1)
    torch.testing.assert_close(grey[0], grey[2], atol=1e-6, rtol=0)


def deviations(kind: str, **options: object) -> np.ndarray:
    noise = hyperspectral_noise(CUBE, RandomState(3), kind, **options) - CUBE  # type: ignore[arg-type]
    return noise.std((1, 2)).numpy() * 255


def test_hyperspectral_gaussian_noise():
    one = hyperspectral_noise(CUBE, RandomState(5), "iid", [50])
    expected = CUBE.numpy() + RandomState(5).randn(*CUBE.shape) * 50 / 255
    assert torch.equal(one, torch.from_numpy(expected).float())
    assert deviations("iid").std() < 1
    per_band = deviations("noniid")
    nearest = np.array([10, 30, 50, 70])[np.abs(per_band[:, None] - [10, 30, 50, 70]).argmin(1)]
    assert np.abs(per_band - nearest).max() < 3
    assert set(nearest) == {10, 30, 50, 70}


def damaged(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Cubes with the damage of a kind alone, and which bands it struck."""
    cube = hyperspectral_noise(CUBE, RandomState(7), kind, [0])  # type: ignore[arg-type]
    return cube, (cube != CUBE).flatten(1).any(1)


def test_stripes_and_deadlines_strike_columns_of_a_third_of_the_bands():
    for kind in ("stripe", "deadline"):
        cube, struck = damaged(kind)
        assert struck.sum() == 10
        for band in cube[struck]:
            columns = (band != 0.5).any(0)
            assert 5 <= columns.sum() < 15
            assert (band[:, columns].std(0) == 0).all()
            if kind == "deadline":
                assert (band[:, columns] == 0).all()
            else:
                assert (band[:, columns] - 0.5).abs().max() <= 0.25


def test_impulses_are_half_salt():
    cube, struck = damaged("impulse")
    assert struck.sum() == 10
    amounts = (cube[struck] != 0.5).float().mean((1, 2))
    assert (amounts[:, None] - torch.tensor([0.1, 0.3, 0.5, 0.7])).abs().min(1).values.max() < 0.02
    salt, pepper = (cube == 1).sum().item(), (cube == 0).sum().item()
    assert salt / (salt + pepper) == pytest.approx(0.5, abs=0.02)


def test_a_mixture_strikes_three_thirds_and_complex_is_one_of_four():
    assert damaged("mixture")[1].sum() == 30
    struck = set()
    for seed in range(20):
        cube = hyperspectral_noise(CUBE[:6], RandomState(seed), "complex", [0])
        struck.add(int((cube != CUBE[:6]).flatten(1).any(1).sum()))
    assert struck == {0, 2}


def test_the_seed_decides():
    for make in (
        lambda rng: gaussian_noise(GREY, rng, (5, 50), 0.5),
        lambda rng: poisson_noise(GREY, rng, (0.1, 3), 0.5),
        lambda rng: hyperspectral_noise(CUBE, rng, "mixture"),
    ):
        assert torch.equal(make(RandomState(1)), make(RandomState(1)))
        assert not torch.equal(make(RandomState(1)), make(RandomState(2)))
