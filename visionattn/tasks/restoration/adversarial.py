"""The losses that the real-world recipe adds to that of pixels: VGG features and a discriminator.

Real-ESRGAN (Wang et al., 2021, arXiv 2107.10833), which HAT's real-world variants follow.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torchvision.models import VGG19_Weights
from torchvision.models.vgg import cfgs, make_layers

#: Weights of the features before the activation.
PERCEPTUAL_LAYERS = {"conv1_2": 0.1, "conv2_2": 0.1, "conv3_4": 1.0, "conv4_4": 1.0, "conv5_4": 1.0}
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PerceptualLoss(nn.Module):
    """Weighted mean absolute difference of features of VGG19 before their activation.

    Args:
        weights: torchvision's file of VGG19; None looks where torch keeps its downloads.
        layers: layers, as `conv5_4`, and their weights.

    Raises:
        FileNotFoundError: there is no such file; the message says where to get it.
        ValueError: the file does not hold VGG19.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, weights: str | Path | None = None, layers: Mapping[str, float] = PERCEPTUAL_LAYERS
    ) -> None:
        super().__init__()
        positions = _layer_positions()
        self.layers = {positions[name]: weight for name, weight in layers.items()}
        self.features = _load_vgg19(weights)[: max(self.layers) + 1].eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor(_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_STD).view(3, 1, 1), persistent=False)

    def forward(self, image: Tensor, truth: Tensor) -> Tensor:
        """The loss of images `[B, 3, H, W]` in [0, 1], sides of at least 16 pixels; a scalar."""
        loss = image.new_zeros(())
        x, y = ((z - self.mean) / self.std for z in (image, truth.detach()))
        for position, layer in enumerate(self.features):
            x, y = layer(x), layer(y)
            if position in self.layers:
                loss = loss + self.layers[position] * F.l1_loss(x, y)
        return loss


class Discriminator(nn.Module):
    """U-Net with spectral normalisation, which judges every pixel of an image.

    Its parameters are those of Real-ESRGAN's `UNetDiscriminatorSN`.

    Args:
        in_chans: image channels.
        dim: channels at full size.
    """

    def __init__(self, in_chans: int = 3, dim: int = 64) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_chans, dim, 3, padding=1)
        self.down = nn.ModuleList(
            spectral_norm(nn.Conv2d(dim << i, dim << i + 1, 4, stride=2, padding=1, bias=False))
            for i in range(3)
        )
        self.up = nn.ModuleList(
            spectral_norm(nn.Conv2d(dim << i + 1, dim << i, 3, padding=1, bias=False)) for i in (2, 1, 0)
        )
        self.last = nn.ModuleList(
            spectral_norm(nn.Conv2d(dim, dim, 3, padding=1, bias=False)) for _ in range(2)
        )
        self.head = nn.Conv2d(dim, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Images `[B, in_chans, H, W]`, sides multiples of 8, to logits `[B, 1, H, W]` of being real."""
        x = F.leaky_relu(self.stem(x), 0.2)
        skips = []
        for conv in self.down:
            skips.append(x)
            x = F.leaky_relu(conv(x), 0.2)
        for conv in self.up:
            x = F.leaky_relu(conv(F.interpolate(x, scale_factor=2, mode="bilinear")), 0.2) + skips.pop()
        for conv in self.last:
            x = F.leaky_relu(conv(x), 0.2)
        return self.head(x)


def adversarial_losses(
    discriminator: nn.Module, image: Tensor, truth: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The losses of both sides of the game.

    The gradient of the first reaches the image alone and that of the second the discriminator alone, so one
    backward pass over their sum serves both. This equals two steps in turn, because the discriminator learns
    from the very image that it judged.

    Args:
        discriminator: gives logits of being real.
        image: what the network made.
        truth: real images of the same shape.

    Returns:
        The network's loss (its image should pass for real), the discriminator's, and two means to be logged.
    """
    discriminator.requires_grad_(False)
    judged = discriminator(image)
    discriminator.requires_grad_(True)
    real, fake = discriminator(truth), discriminator(image.detach())
    learned = F.softplus(-real).mean() + F.softplus(fake).mean()
    return F.softplus(-judged).mean(), learned, {"logit_real": real.mean(), "logit_fake": fake.mean()}


def _layer_positions() -> dict[str, int]:
    """Position of each convolution of VGG19 among its layers; every one is followed by its activation."""
    positions, block, conv, position = {}, 1, 1, 0
    for entry in cfgs["E"]:
        if entry == "M":
            block, conv, position = block + 1, 1, position + 1
        else:
            positions[f"conv{block}_{conv}"] = position
            conv, position = conv + 1, position + 2
    return positions


def _load_vgg19(file: str | Path | None) -> nn.Sequential:
    address = VGG19_Weights.IMAGENET1K_V1.url
    path = Path(file) if file else Path(torch.hub.get_dir()) / "checkpoints" / Path(address).name
    if not path.is_file():
        raise FileNotFoundError(
            f"the perceptual loss needs torchvision's weights of VGG19, but there is no {path}: "
            f"download {address}"
        )
    prefix = "features."
    with torch.device("meta"):
        features = make_layers(cfgs["E"])
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}
        features.load_state_dict(state, assign=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} does not hold torchvision's VGG19: {reason}") from error
    for layer in features:
        if isinstance(layer, nn.ReLU):
            layer.inplace = False  # the features are taken before the activation
    return features
