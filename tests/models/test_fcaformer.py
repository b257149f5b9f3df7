"""FcaFormer: its biases, its tokens, and windows for images of any size."""

from __future__ import annotations

from typing import Any

import families
import pytest
import timm
import torch

import visionattn
from visionattn.checkpoints import identify
from visionattn.checkpoints.identify import layout_of
from visionattn.layers.windows.cross_attention import CrossAttention
from visionattn.models.registry.zoo import model_facts

SMALL: dict[str, Any] = families.SMALL["fcaformer"]


@pytest.mark.parametrize(
    ("name", "gmacs"),
    [("fcaformer_l1", 1.37), ("fcaformer_l2", 3.60), ("fcaformer_l3", 6.65), ("fcaformer_l4", 14.49)],
)
def test_costs_are_those_of_the_authors_code(name: str, gmacs: float):
    assert round(model_facts(name).gmacs, 2) == gmacs


def test_the_bias_of_pixels_belongs_to_their_distance_and_that_of_tokens_to_the_token():
    torch.manual_seed(0)
    attn = CrossAttention(64, 2, (2, 3), 4)
    torch.nn.init.normal_(attn.attention_biases)
    torch.nn.init.normal_(attn.s_token_bias)
    bias = attn.bias()
    assert bias.shape == (2, 6, 10)
    for q in range(6):
        for k in range(6):
            dy, dx = abs(q // 3 - k // 3), abs(q % 3 - k % 3)
            assert torch.equal(bias[:, q, k], attn.attention_biases[:, 3 * dy + dx])
        assert torch.equal(bias[:, q, 6:], attn.s_token_bias[0, :, 0])


def test_one_window_is_the_whole_map():
    whole = families.small("fcaformer_l1").eval()
    windowed = families.small("fcaformer_l1", windowed=True).eval()
    windowed.load_state_dict(whole.state_dict())
    x = torch.rand(2, 3, *SMALL["img_size"])
    with torch.no_grad():
        torch.testing.assert_close(windowed(x), whole(x))


@pytest.mark.parametrize("size", [(1, 1), (64, 97), (35, 66), (150, 130)])
def test_windows_take_images_of_any_size(size: tuple[int, int]):
    net = families.small("fcaformer_l1", windowed=True, extra_norms=True, features_only=True).eval()
    with torch.no_grad():
        maps = net(torch.rand(2, 3, *size))
    expected = [tuple(-(-side // stride) for side in size) for stride in (4, 8, 16, 32)]
    assert [tuple(m.shape[2:]) for m in maps] == expected
    assert [m.shape[1] for m in maps] == net.feature_info.channels() == [96, 192, 384, 768]
    assert not net.model.pretrained_cfg["fixed_input_size"]


def test_windows_begin_at_the_end_and_at_the_beginning_in_turn():
    """A pixel acts on its own window alone: of the first block, the last row of windows is a whole one."""
    net = families.small("fcaformer_l1", windowed=True, depths=(1, 1, 2, 1)).double().eval()
    stage, (rows, columns) = net.stages[2], net.stages[2].window
    stage.downsample = torch.nn.Identity()
    x = torch.randn(1, rows + 1, columns, 32, dtype=torch.float64)
    for blocks, reached in ((stage.blocks[:1], rows), (stage.blocks[:2], rows + 1)):
        stage.blocks = blocks
        y = x.clone()
        y[0, -1] = torch.randn(columns, 32, dtype=torch.float64)  # a constant would vanish in the norm
        with torch.no_grad():
            changed = (stage(y) - stage(x)).abs().amax((0, 2, 3)) > 0
        # Of two windows, the first holds the first row alone; the second block joins it to the others.
        assert changed.sum() == reached


def test_no_more_tokens_than_of_twelve_blocks_without_windows():
    net = timm.create_model("fcaformer_l1", **{**SMALL, "depths": (1, 1, 15, 1)}).eval()
    tokens = [b.attn.s_token_bias.shape[-1] for b in net.stages[2].blocks[1:]]
    assert tokens == [2 * min(i, 12) for i in range(1, 15)]
    assert net(torch.rand(1, 3, *SMALL["img_size"])).isfinite().all()


def test_gradient_checkpointing_inside_windows():
    net = families.small("fcaformer_l1", windowed=True).train()
    x = torch.rand(2, 3, 70, 50)
    torch.manual_seed(0)
    net(x).sum().backward()
    expected = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    net.set_grad_checkpointing()
    net(x).sum().backward()
    for parameter, gradient in zip(net.parameters(), expected):
        torch.testing.assert_close(parameter.grad, gradient)


def test_classification_weights_load_into_the_dense_form():
    source = families.small("fcaformer_l2")
    dense = families.small("fcaformer_l2", windowed=True, extra_norms=True, features_only=True)
    assert not visionattn.load_checkpoint(dense, layout_of(source).to_official(source.state_dict(), source))


@pytest.mark.parametrize("size", [(96, 96), (64, 96), 224])
def test_the_training_size_is_recognised(size: int | tuple[int, int]):
    net = timm.create_model("fcaformer_l1", **{**SMALL, "img_size": size}, device="meta")
    found = identify(layout_of(net).to_official(net.state_dict(), net))
    again = timm.create_model(found.name, **found.arguments, device="meta")
    assert again.img_size == net.img_size


def test_what_cannot_work_is_refused():
    with pytest.raises(ValueError, match="img_size must be a multiple of 32, got 100"):
        timm.create_model("fcaformer_l1", img_size=100, device="meta")
    with pytest.raises(ValueError, match="must be multiples of 32, got"):
        timm.create_model("fcaformer_l1", embed_dims=(64, 128, 200, 320), device="meta")
    with pytest.raises(ValueError, match="an input of 96x128 does not fit: the weights are for"):
        families.small("fcaformer_l1")(torch.rand(1, 3, 96, 128))
