"""The real-world recipe in miniature: VGG features, discriminator, and both trained by the one loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn
from torchvision.models import vgg19

from visionattn import tasks
from visionattn.data.images import to_pil
from visionattn.engine import loop
from visionattn.engine.config import parse_config
from visionattn.errors import InputError
from visionattn.tasks.restoration.adversarial import (
    PERCEPTUAL_LAYERS,
    Discriminator,
    PerceptualLoss,
    adversarial_losses,
)
from visionattn.tasks.restoration.config import RestorationConfig
from visionattn.tasks.restoration.task import RestorationTask

CFSR = {"embed_dim": 8, "depths": [1], "kernel_size": 3}


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights under torchvision's names, without the classifier, which the loss does not read."""
    with torch.device("meta"):
        features = vgg19().features
    features = features.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in features.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
        parameter.data.normal_(0, (2 / fan_in) ** 0.5 if parameter.ndim > 1 else 0.01, generator=generator)
    path = tmp_path_factory.mktemp("vgg") / "vgg19.pth"
    torch.save({f"features.{name}": value for name, value in features.state_dict().items()}, path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "gt").mkdir()
    for name in "abc":
        small = torch.rand(1, 3, 6, 6)
        large = torch.nn.functional.interpolate(small, (64, 64), mode="bicubic")[0].clamp(0, 1)
        to_pil((large * 255).to(torch.uint8)).save(tmp_path / f"gt/{name}.png")
    return tmp_path / "gt"


def config(folder: Path, output: Path, loss: dict[str, Any], **sections: Any) -> RestorationConfig:
    parsed = parse_config(
        {
            "task": "restoration",
            "model": {"name": "cfsr_x2", "kwargs": CFSR},
            "data": {
                "source": "folders",
                "train_gt": str(folder),
                "eval_gt": str(folder),
                "patch_size": 16,
                "degraded_size": 24,
                "degradations": [{"name": "real_world"}],
            },
            "loss": loss,
            "optimizer": {"name": "adam", "lr": 1e-3, "weight_decay": 0, "betas": [0.9, 0.99]},
            "schedule": {"steps": 4, "name": "constant"},
            "ema": {"decay": 0.9},
            "train": {"batch_size": 1, "workers": 0, "eval_every": None, "log_every": 1, "save_every": 2},
            "output": str(output),
            **sections,
        },
        RestorationConfig,
    )
    assert isinstance(parsed, RestorationConfig)
    return parsed


def test_perceptual_loss_is_the_weighted_difference_of_features(vgg_file: Path):
    loss = PerceptualLoss(vgg_file)
    image, truth = torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32)
    with torch.device("meta"):
        features = vgg19().features
    state = torch.load(vgg_file)
    features.load_state_dict({k.removeprefix("features."): v for k, v in state.items()}, assign=True)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    # torchvision counts its layers through; these are the convolutions that the recipe names.
    positions = {"conv1_2": 2, "conv2_2": 7, "conv3_4": 16, "conv4_4": 25, "conv5_4": 34}
    expected = 0.0
    for name, position in positions.items():
        part = features[: position + 1]
        x, y = (part((z - mean) / std).detach() for z in (image, truth))
        expected += PERCEPTUAL_LAYERS[name] * (x - y).abs().mean().item()
    assert loss(image, truth).item() == pytest.approx(expected, rel=1e-5)
    assert loss(truth, truth) == 0
    image.requires_grad_()
    loss(image, truth).backward()
    assert image.grad is not None
    assert image.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in loss.parameters())


def test_missing_and_wrong_vgg_weights_are_one_sentence(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(InputError, match=r"hub/checkpoints/vgg19-.*\.pth: download https://") as caught:
        RestorationTask(config(folder, tmp_path / "run", {"perceptual": 1})).train_loader()
    assert "\n" not in str(caught.value)
    torch.save({"features.0.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="does not hold torchvision's VGG19"):
        PerceptualLoss(tmp_path / "other.pth")


def test_discriminator_is_real_esrgans_in_size_and_bounds_its_weights():
    net = Discriminator()
    assert sum(parameter.numel() for parameter in net.parameters()) == 4_376_897
    assert net(torch.rand(2, 3, 24, 32)).shape == (2, 1, 24, 32)
    small = Discriminator(dim=4).train()
    for _ in range(100):  # every forward pass sharpens the estimate of the largest singular value
        small(torch.rand(1, 3, 16, 16))
    for conv in (*small.down, *small.up, *small.last):
        weight = conv.weight.flatten(1)  # type: ignore[operator]
        assert torch.linalg.matrix_norm(weight, 2).item() == pytest.approx(1, rel=0.02)


def test_one_backward_pass_serves_both_sides():
    """Its gradients are those of two separate steps, as the recipe describes them."""
    make, image, truth = nn.Conv2d(3, 3, 1), torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16)
    net = Discriminator(dim=4).eval()  # no power iteration between the passes
    made = make(image)
    judged, learned, logits = adversarial_losses(net, made, truth)
    (0.1 * judged + learned).backward()

    bce = nn.BCEWithLogitsLoss()
    ours = net(make(image))
    (generator,) = torch.autograd.grad(0.1 * bce(ours, torch.ones_like(ours)), [make.weight])
    real, fake = net(truth), net(made.detach())
    total = bce(real, torch.ones_like(real)) + bce(fake, torch.zeros_like(fake))
    discriminator = torch.autograd.grad(total, list(net.parameters()))
    torch.testing.assert_close(make.weight.grad, generator)
    for parameter, expected in zip(net.parameters(), discriminator):
        torch.testing.assert_close(parameter.grad, expected)
    assert logits["logit_real"].item() == pytest.approx(real.mean().item())
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_both_networks_learn_in_the_loop_and_a_resumed_run_repeats_it(
    folder: Path, tmp_path: Path, vgg_file: Path
):
    loss = {
        "perceptual": 1,
        "adversarial": 0.1,
        "discriminator_dim": 4,
        "vgg_weights": str(vgg_file),
        "sharpen_targets": True,
    }

    def run(name: str, **sections: Any) -> tuple[Any, loop.Result]:
        task = tasks.create_task(config(folder, tmp_path / name, loss, **sections))
        return task, loop.train(task)

    whole, result = run("whole")
    fresh: Any = tasks.create_task(config(folder, tmp_path / "fresh", loss))
    fresh.train_loader()
    moved = [
        (a - b).abs().max().item() for a, b in zip(whole.adversary.parameters(), fresh.adversary.parameters())
    ]
    assert min(moved) > 0
    columns = (tmp_path / "whole/metrics.csv").read_text().splitlines()[0].split(",")
    assert {"perceptual", "adversarial", "discriminator", "logit_real", "logit_fake"} <= set(columns)
    saved = load_file(tmp_path / "whole/checkpoints/last.safetensors")
    assert set(saved) == set(timm.create_model("cfsr_x2", **CFSR).state_dict())

    # Half of the run, then the other half from its state.
    run("half", schedule={"steps": 2, "name": "constant"})
    resumed, again = run("half", resume="auto")
    assert again.metrics == result.metrics
    for a, b in zip(whole.adversary.state_dict().values(), resumed.adversary.state_dict().values()):
        assert torch.equal(a, b)

    # To judge and to use the network needs neither VGG nor discriminator.
    vgg_gone = {**loss, "vgg_weights": "gone.pth"}
    second = config(folder, tmp_path / "whole", vgg_gone)
    second.model.checkpoint = str(tmp_path / "whole/checkpoints/last.safetensors")
    assert loop.evaluate(tasks.create_task(second)) == result.metrics

    # The second stage starts from the weights of the first.
    second = config(folder, tmp_path / "second", loss)
    second.model.checkpoint = str(tmp_path / "whole/checkpoints/last.safetensors")
    started = tasks.create_task(second).model.state_dict()
    assert all(torch.equal(started[name], value) for name, value in saved.items())


@pytest.mark.parametrize(
    ("model", "loss", "message"),
    [
        ({"name": "cfsr_x2", "kwargs": {**CFSR, "in_chans": 1}}, {"adversarial": 0.1}, "need RGB, not 1"),
        ({"name": "cfsr_x2", "kwargs": CFSR}, {"intermediate": 1}, "cfsr_x2 has no intermediate image"),
    ],
)
def test_losses_that_do_not_fit_the_network(
    folder: Path, tmp_path: Path, model: dict[str, Any], loss: dict[str, Any], message: str
):
    with pytest.raises(InputError, match=message):
        RestorationTask(config(folder, tmp_path / "run", loss, model=model))
