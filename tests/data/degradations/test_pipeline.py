"""Degradations as a configuration lists them, and those that are more than noise and blur."""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from numpy.random import RandomState
from PIL import Image

from visionattn.data.degradations.haze import haze, scatter, synthetic_depth
from visionattn.data.degradations.jpeg import jpeg
from visionattn.data.degradations.noise import gaussian_noise
from visionattn.data.degradations.pipeline import STEPS, Degradation
from visionattn.data.degradations.real_world import SecondStage, Stage, real_world
from visionattn.data.degradations.resize import bicubic_low_resolution, to_uint8


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    smooth = torch.rand(1, 3, 8, 10, generator=torch.Generator().manual_seed(0))
    large = torch.nn.functional.interpolate(smooth, (96, 120), mode="bicubic")[0]
    return to_uint8(large).float() / 255


def test_jpeg_is_libjpeg_at_its_quality(image: torch.Tensor):
    for planes in (image, image[:1]):
        content = io.BytesIO()
        pixels = to_uint8(planes).permute(1, 2, 0).numpy()
        Image.fromarray(pixels if len(planes) == 3 else pixels[..., 0]).save(content, "JPEG", quality=10)
        expected = np.atleast_3d(np.array(Image.open(content))).transpose(2, 0, 1)
        ours = jpeg(planes, RandomState(0), (10, 10))
        assert torch.equal(to_uint8(ours), torch.from_numpy(expected))
    errors = [(jpeg(image, RandomState(0), (q, q)) - image).abs().mean() for q in (95, 50, 10)]
    assert errors[0] < errors[1] < errors[2]
    rng = RandomState(0)
    assert len({jpeg(image, rng, (10, 90)).sum().item() for _ in range(5)}) > 1
    with pytest.raises(ValueError, match="1 or 3 channels"):
        jpeg(torch.zeros(4, 8, 8), RandomState(0), (10, 10))


def test_haze_is_the_scattering_model(image: torch.Tensor):
    depth = torch.rand(1, 96, 120) * 2
    hazy = scatter(image, depth, 0.8, 0.9)
    expected = image.numpy() * np.exp(-0.8 * depth.numpy()) + 0.9 * (1 - np.exp(-0.8 * depth.numpy()))
    np.testing.assert_allclose(hazy, expected, atol=1e-6)
    torch.testing.assert_close(scatter(image, torch.zeros_like(depth), 1.0, 1.0), image)
    # A given depth is used; the transmission can be read back where two colours are known.
    ours = haze(image, RandomState(0), depth, (1.0, 1.0), (0.8, 0.8))
    transmission = (ours[0] - ours[1]) / (image[0] - image[1])
    known = (image[0] - image[1]).abs() > 0.1
    torch.testing.assert_close(transmission[known], torch.exp(-depth[0])[known], atol=1e-4, rtol=0)


def test_synthetic_depth_recedes_upwards():
    depths = [synthetic_depth(60, 80, RandomState(seed)) for seed in range(30)]
    assert all(depth.shape == (1, 60, 80) and depth.min() >= 0 for depth in depths)
    assert np.mean([depth[0, :10].mean() > depth[0, -10:].mean() for depth in depths]) > 0.8
    steps = [max(d.diff(dim=-1).abs().max(), d.diff(dim=-2).abs().max()) for d in depths]
    assert max(steps) < 0.12  # soft


def test_real_world_degradations_vary_and_keep_the_size(image: torch.Tensor):
    found = [real_world(image, RandomState(seed), 4) for seed in range(12)]
    for degraded in found:
        assert degraded.shape == (3, 24, 30)
        assert 0 <= degraded.min() < degraded.max() <= 1
        torch.testing.assert_close(degraded * 255, (degraded * 255).round(), atol=1e-3, rtol=0)
    clean = bicubic_low_resolution(to_uint8(image), 4).float() / 255
    errors = [(degraded - clean).abs().mean().item() for degraded in found]
    assert len(set(errors)) == 12
    assert max(errors) > 2 * min(errors)
    assert torch.equal(real_world(image, RandomState(3), 4), found[3])
    assert real_world(image[..., :95, :], RandomState(0), 1).shape == (3, 95, 120)


def test_the_stages_of_the_real_world_can_be_set(image: torch.Tensor):
    quiet: dict[str, Any] = {
        "blur_probability": 0,
        "resize": (0, 0, 1),
        "gaussian_probability": 1,
        "sigma": (0, 0),
        "quality": (100, 100),
    }
    soft = real_world(image, RandomState(0), 4, Stage(**quiet), SecondStage(**quiet), 0.0, False)
    loud = real_world(image, RandomState(0), 4)
    clean = bicubic_low_resolution(to_uint8(image), 4).float() / 255
    assert (soft - clean).abs().mean() < 0.5 * (loud - clean).abs().mean()
    assert SecondStage(sigma=3).blur_sigma == (0.2, 1.5)  # type: ignore[arg-type]


def test_steps_are_carried_out_in_order(image: torch.Tensor):
    steps = [{"name": "bicubic"}, {"name": "gaussian_noise", "sigma": 20}, {"name": "quantize"}]
    made = Degradation(steps, upscale=2)
    small = Degradation(steps[:1], upscale=2)(image, RandomState(0))
    assert torch.equal(to_uint8(small), bicubic_low_resolution(to_uint8(image), 2))
    noisy = gaussian_noise(small, RandomState(4), (20, 20))
    assert torch.equal(to_uint8(made(image, RandomState(4))), to_uint8(noisy))
    assert torch.equal(pickle.loads(pickle.dumps(made))(image, RandomState(4)), made(image, RandomState(4)))


def test_every_step_has_a_working_form(image: torch.Tensor):
    options = {
        "gaussian_noise": {"sigma": 5},
        "hyperspectral_noise": {"kind": "stripe"},
        "jpeg": {"quality": 50},
    }
    sharp = image.roll(1, 0) * 0.999  # not in steps of 1 / 255
    for name in STEPS:
        made = Degradation([{"name": name, **options.get(name, {})}], 2)
        degraded = made(sharp, RandomState(0))
        assert degraded.dtype == torch.float32
        assert degraded.shape[-1] in (60, 120)
        assert torch.equal(degraded, made(sharp, RandomState(0)))
        assert not torch.equal(degraded, sharp)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"name": "jpg"}, "no degradation 'jpg': did you mean jpeg?"),
        ({}, "there is no degradation None"),
        ({"name": "jpeg", "qality": 10}, "has no option 'qality': did you mean quality?"),
        ({"name": "bicubic", "scale": 2}, "bicubic has no option 'scale': it has none"),
        ({"name": "jpeg"}, "jpeg needs the option quality"),
        ({"name": "jpeg", "quality": 0}, "quality.* should be greater than or equal to 1"),
        ({"name": "gaussian_noise", "sigma": [9, 3]}, r"low <= high, but is \[9"),
        ({"name": "gaussian_noise", "sigma": -3}, "0 <= low"),
        ({"name": "hyperspectral_noise", "kind": "blue"}, "kind of .* should be 'iid'"),
        ({"name": "hyperspectral_noise", "kind": "iid", "sigma": []}, "sigma of .* at least 1 item"),
        ({"name": "real_world", "first": {"sigm": 3}}, "first.sigm"),
    ],
)
def test_wrong_steps_are_one_sentence(step: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message) as caught:
        Degradation([step])
    assert "\n" not in str(caught.value)
