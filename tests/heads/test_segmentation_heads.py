"""The decoders of segmentation: the parameter names of MMSegmentation, and its formulas written out again."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.heads.segmentation import FPN, FCNHead, FPNHead, UPerHead

WIDTHS, STRIDES, SIZES = (6, 8, 10, 12), (4, 8, 16, 32), ((25, 19), (13, 10), (7, 5), (4, 3))
NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def maps(batch: int = 2) -> list[Tensor]:
    return [torch.randn(batch, width, *size) for width, size in zip(WIDTHS, SIZES)]


def randomized(module: nn.Module) -> nn.Module:
    """Statistics and affine parameters of norms that are not those of a new network."""
    for name, value in module.state_dict().items():
        if ".bn." in name and value.is_floating_point():
            value.uniform_(0.5, 1.5)
    return module.eval()


def conv_modules(*names: str) -> set[str]:
    return {
        f"{name}.{part}" for name in names for part in ("conv.weight", *(f"bn.{entry}" for entry in NORM))
    }


def conv_bn_relu(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    kernel = weights[f"{name}.conv.weight"]
    x = F.conv2d(x, kernel, padding=kernel.shape[-1] // 2)
    mean, var, weight, bias = (
        weights[f"{name}.bn.{entry}"][:, None, None]
        for entry in ("running_mean", "running_var", "weight", "bias")
    )
    return ((x - mean) / (var + 1e-5).sqrt() * weight + bias).clamp(min=0)


def enlarged(x: Tensor, size: torch.Size | tuple[int, int]) -> Tensor:
    """Bilinear resizing with half-pixel centres, written as two matrix products."""
    for dim, target in ((-2, size[-2]), (-1, size[-1])):
        source = x.shape[dim]
        centres = ((torch.arange(target) + 0.5) * source / target - 0.5).clamp(0, source - 1)
        low = centres.floor().long()
        high = (low + 1).clamp(max=source - 1)
        part = centres - low
        matrix = torch.zeros(target, source)
        matrix[torch.arange(target), low] += 1 - part
        matrix[torch.arange(target), high] += part
        x = torch.einsum("ts,bchs->bcht", matrix, x.transpose(dim, -1)).transpose(dim, -1)
    return x


def classified(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    return F.conv2d(x, weights["conv_seg.weight"], weights["conv_seg.bias"])


def test_upernet_names():
    expected = conv_modules(
        *(f"psp_modules.{i}.1" for i in range(4)),
        "bottleneck",
        *(f"lateral_convs.{i}" for i in range(3)),
        *(f"fpn_convs.{i}" for i in range(3)),
        "fpn_bottleneck",
    )
    head = UPerHead(WIDTHS, 16, 5)
    assert set(head.state_dict()) == expected | {"conv_seg.weight", "conv_seg.bias"}
    assert head.bottleneck.conv.weight.shape == (16, 12 + 4 * 16, 3, 3)
    assert head.fpn_bottleneck.conv.weight.shape == (16, 64, 3, 3)


def test_upernet_formula():
    head, inputs = randomized(UPerHead(WIDTHS, 16, 5)), maps()
    weights = head.state_dict()
    top = inputs[3]
    pooled = [
        enlarged(conv_bn_relu(weights, f"psp_modules.{i}.1", F.adaptive_avg_pool2d(top, scale)), top.shape)
        for i, scale in enumerate((1, 2, 3, 6))
    ]
    levels = [conv_bn_relu(weights, f"lateral_convs.{i}", inputs[i]) for i in range(3)]
    levels.append(conv_bn_relu(weights, "bottleneck", torch.cat([top, *pooled], 1)))
    for i in (2, 1, 0):
        levels[i] = levels[i] + enlarged(levels[i + 1], levels[i].shape)
    outputs = [conv_bn_relu(weights, f"fpn_convs.{i}", levels[i]) for i in range(3)] + [levels[3]]
    joined = torch.cat([enlarged(x, SIZES[0]) for x in outputs], 1)
    expected = classified(weights, conv_bn_relu(weights, "fpn_bottleneck", joined))
    torch.testing.assert_close(head(inputs), expected, rtol=1e-4, atol=1e-5)
    assert expected.shape == (2, 5, *SIZES[0])


def test_semantic_fpn_names():
    pyramid, head = FPN(WIDTHS, 16), FPNHead((16,) * 4, STRIDES, 8, 5)
    assert set(pyramid.state_dict()) == {
        f"{kind}.{i}.conv.{entry}"
        for kind in ("lateral_convs", "fpn_convs")
        for i in range(4)
        for entry in ("weight", "bias")
    }
    # Between the convolutions stand the enlargements, which have no parameters.
    places = ("0.0", "1.0", "2.0", "2.2", "3.0", "3.2", "3.4")
    expected = conv_modules(*(f"scale_heads.{place}" for place in places))
    assert set(head.state_dict()) == expected | {"conv_seg.weight", "conv_seg.bias"}


def test_semantic_fpn_formula():
    pyramid, head = randomized(FPN(WIDTHS, 16)), randomized(FPNHead((16,) * 4, STRIDES, 8, 5))
    inputs = maps()
    w, h = pyramid.state_dict(), head.state_dict()

    def conv(name: str, x: Tensor) -> Tensor:
        kernel = w[f"{name}.conv.weight"]
        return F.conv2d(x, kernel, w[f"{name}.conv.bias"], padding=kernel.shape[-1] // 2)

    levels = [conv(f"lateral_convs.{i}", x) for i, x in enumerate(inputs)]
    for i in (2, 1, 0):
        rows, columns = (
            (torch.arange(fine) * coarse // fine) for fine, coarse in zip(SIZES[i], SIZES[i + 1])
        )
        levels[i] = levels[i] + levels[i + 1][:, :, rows][..., columns]
    levels = [conv(f"fpn_convs.{i}", x) for i, x in enumerate(levels)]
    torch.testing.assert_close(pyramid(inputs), levels, rtol=1e-4, atol=1e-5)

    out = conv_bn_relu(h, "scale_heads.0.0", levels[0])
    for i in (1, 2, 3):
        x = levels[i]
        for step in range(i):
            x = conv_bn_relu(h, f"scale_heads.{i}.{2 * step}", x)
            x = enlarged(x, (2 * x.shape[-2], 2 * x.shape[-1]))
        out = out + enlarged(x, SIZES[0])
    torch.testing.assert_close(head(levels), classified(h, out), rtol=1e-4, atol=1e-5)


def test_fcn_head():
    head, x = randomized(FCNHead(10, 8, 5)), maps()[2]
    assert set(head.state_dict()) == conv_modules("convs.0") | {"conv_seg.weight", "conv_seg.bias"}
    weights = head.state_dict()
    torch.testing.assert_close(
        head(x), classified(weights, conv_bn_relu(weights, "convs.0", x)), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("levels", [1, 3])
def test_any_number_of_levels(levels: int):
    inputs = maps()[-levels:]
    assert UPerHead(WIDTHS[-levels:], 16, 5)(inputs).shape == (2, 5, *inputs[0].shape[2:])
    pyramid = FPN(WIDTHS[-levels:], 16)(inputs)
    assert FPNHead((16,) * levels, STRIDES[-levels:], 8, 5)(pyramid).shape == (2, 5, *inputs[0].shape[2:])


def test_dropout_acts_on_whole_channels_in_training_only():
    head = FCNHead(10, 400, 1)
    seen: list[Tensor] = []
    head.conv_seg.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    head(maps()[2])
    head.eval()(maps()[2])
    trained, judged = ((x == 0).all((2, 3)).float().mean().item() for x in seen)
    assert trained == pytest.approx(0.1, abs=0.04)
    assert judged == 0
