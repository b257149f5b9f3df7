"""NAT, DiNAT, DiNAT_s: what is peculiar to the family."""

from __future__ import annotations

import pytest
import timm
import torch

import visionattn
from visionattn.layers import NeighborhoodAttention2d
from visionattn.models.nat import LAYOUT, NAT, TASK_DILATIONS


def dilations(model: torch.nn.Module) -> list[list[int]]:
    return [[block.attn.dilation for block in stage.blocks] for stage in model.stages]


def test_dilations_by_variant_list_and_task() -> None:
    def of(variant: str, **kwargs: object) -> list[list[int]]:
        return dilations(timm.create_model(variant, device="meta", **kwargs))

    assert of("nat_mini") == [[1] * 3, [1] * 4, [1] * 6, [1] * 5]
    assert of("dinat_mini") == [[1, 8, 1], [1, 4, 1, 4], [1, 2] * 3, [1] * 5]
    assert of("dinat_large_384") == [[1, 13, 1], [1, 6, 1, 6], [1, 3] * 9, [1] * 5]
    assert of("dinat_s_tiny", dilations="coco") == [[1, 28], [1, 14], [1, 3, 1, 5, 1, 7], [1, 3]]
    assert of("dinat_small", dilations="coco")[1:] == [[1, 7, 1, 14], [1, 3, 1, 5, 1, 7] * 3, [1, 3, 1, 3, 1]]
    assert of("dinat_s_large", dilations="ade20k_640")[:2] == [[1, 20], [1, 10]]
    assert of("dinat_isotropic_small") == [[1, 2] * 6]
    assert of("nat_mini", dilations=[(3,), (1,), (1,), (1,)])[0] == [3, 3, 3]


@pytest.mark.parametrize("wrong", ["imagenet", [(1, 2)], [(1,), (), (1,), (1,)]])
def test_wrong_dilations_are_refused(wrong: object) -> None:
    with pytest.raises(ValueError, match="dilations"):
        timm.create_model("dinat_mini", device="meta", dilations=wrong)


def test_weights_do_not_depend_on_dilations() -> None:
    torch.manual_seed(0)
    sizes = {"embed_dim": 16, "depths": (2, 1), "num_heads": (2, 4), "kernel_size": 3, "num_classes": 5}
    narrow, wide = (NAT(**sizes, dilations=steps).eval() for steps in (None, ((1, 4), (2,))))
    visionattn.load_checkpoint(wide, narrow.state_dict())
    x = torch.randn(1, 3, 64, 48)
    assert not torch.allclose(narrow(x), wide(x))


def test_small_maps_are_filled_up_before_the_projection() -> None:
    torch.manual_seed(0)
    attn = NeighborhoodAttention2d(8, 2, kernel_size=3, dilation=4).double()
    x = torch.randn(2, 7, 15, 8, dtype=torch.float64)
    filled = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 5))
    torch.testing.assert_close(attn(x), attn(filled)[:, :7])


@pytest.mark.parametrize("variant", ["dinat_mini", "dinat_s_tiny", "dinat_isotropic_small"])
@pytest.mark.parametrize("size", [(32, 32), (61, 90), (1, 17)])
def test_any_input_size(variant: str, size: tuple[int, int]) -> None:
    model = timm.create_model(variant, num_classes=3).eval()
    with torch.no_grad():
        out, features = model.forward_intermediates(torch.randn(1, 3, *size))
        assert model.forward_head(out).shape == (1, 3)
    for info, feature in zip(model.feature_info, features):
        reduced = [-(-side // info["reduction"]) for side in size]
        assert list(feature.shape) == [1, info["num_chs"], *reduced]


def test_dense_backbone_norms_what_it_returns() -> None:
    torch.manual_seed(0)
    options = {"embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2), "dilations": ((2,), (1,))}
    backbone = timm.create_model("dinat_mini", features_only=True, extra_norms=True, **options)
    plain = timm.create_model("dinat_mini", features_only=True, **options)
    visionattn.load_checkpoint(plain, backbone.model.state_dict(), strict=False)
    x = torch.randn(1, 3, 64, 64)
    for norm, normed, raw in zip(backbone.model.extra_norms, backbone(x), plain(x)):
        # Norms stand on channels-last maps.
        torch.testing.assert_close(normed, norm(raw.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


def test_official_names_of_the_isotropic_baseline() -> None:
    model = timm.create_model("vitrpb_small", device="meta")
    official = {
        "layers.3.attn.rpb": torch.zeros(12, 27, 27),
        "layers.3.attn.relative_position_index": torch.zeros(196, 196, dtype=torch.int64),
        "patch_embed.norm.weight": torch.ones(384),
        "head.bias": torch.zeros(1000),
    }
    ours = LAYOUT.checkpoint_filter_fn(official, model)
    assert set(ours) == {"stages.0.blocks.3.attn.rpb", "stem.norm.weight", "head.fc.bias"}
    assert all(model.state_dict()[name].shape == value.shape for name, value in ours.items())


def test_vitrpb_is_full_attention_at_its_size() -> None:
    torch.manual_seed(0)
    attn = NeighborhoodAttention2d(8, 1, kernel_size=14).double()
    x = torch.randn(1, 14, 14, 8, dtype=torch.float64)
    q, k, v = attn.qkv(x).flatten(1, 2).chunk(3, -1)
    y = torch.arange(14)
    offset = y - y[:, None] + 13
    bias = attn.rpb[0][offset[:, None, :, None], offset[None, :, None, :]].reshape(196, 196)
    weights = (q @ k.transpose(-2, -1) * 8**-0.5 + bias).softmax(-1)
    torch.testing.assert_close(attn(x).flatten(1, 2), attn.proj(weights @ v))


def test_relative_biases_are_not_decayed() -> None:
    model = timm.create_model("nat_mini", device="meta")
    assert len(model.no_weight_decay()) == sum((3, 4, 6, 5))


def test_task_dilations_name_four_stages() -> None:
    assert all(len(stages) == 4 for stages in TASK_DILATIONS.values())
