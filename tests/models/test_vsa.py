"""VSA in Swin and in ViTAEv2: costs, the dense form, stochastic depth, the authors' layers."""

from __future__ import annotations

import families
import pytest
import torch
from timm.layers import DropPath

from visionattn.checkpoints.identify import layout_of
from visionattn.models.registry.zoo import model_facts


@pytest.mark.parametrize(
    ("name", "gmacs"),
    [
        ("swin_vsa_t", 4.6),
        ("swin_vsa_s", 8.9),
        ("vitaev2_vsa_s", 5.7),
        ("vitaev2_vsa_48m", 15.0),
        ("vitaev2_vsa_b", 27.1),
    ],
)
def test_costs_are_those_of_the_authors_code(name: str, gmacs: float):
    assert round(model_facts(name).gmacs, 1) == gmacs


def test_the_dense_form_is_the_same_where_windows_divide_square_maps():
    plain = families.small("vitaev2_vsa_s").eval()
    dense = families.small("vitaev2_vsa_s", dense=True).eval()
    dense.load_state_dict(plain.state_dict())
    with torch.no_grad():
        # The last map has four windows of 2x2 pixels.
        torch.testing.assert_close(dense(square := torch.rand(1, 3, 128, 128)), plain(square))
        oblong = torch.rand(1, 3, 128, 192)
        assert not torch.allclose(dense(oblong), plain(oblong), rtol=1e-4)


def test_stochastic_depth_of_stages_begins_where_the_authors_does():
    net = families.small("vitaev2_vsa_s", depths=(2, 2, 8, 2), drop_path_rate=1.3)
    rates = [[m.drop_prob for m in stage.modules() if isinstance(m, DropPath)] for stage in net.stages]
    expected = [[0.1], [0.2, 0.3], [0.1 * i for i in range(2, 10)], [0.8, 0.9]]
    for found, wanted in zip(rates, expected, strict=True):
        assert found == pytest.approx(wanted)


def test_the_windows_of_swin_lie_where_the_queries_do_at_first():
    net = families.small("swin_vsa_t")
    for name, parameter in net.named_parameters():
        assert ".transform." not in name or not parameter.any()


def test_movement_and_stretch_are_layers_of_their_own_in_the_authors_file():
    net = families.small("vitaev2_vsa_s")
    weights = layout_of(net).to_official(net.state_dict(), net)
    ours = net.stages[1].blocks[0].attn.transform[2]
    move = weights["layers.1.NC.0.attn.sampling_offsets.2.weight"]
    stretch = weights["layers.1.NC.0.attn.sampling_scales.2.weight"]
    for head in range(2):
        assert torch.equal(ours.weight[4 * head : 4 * head + 2], move[2 * head : 2 * head + 2])
        assert torch.equal(ours.weight[4 * head + 2 : 4 * head + 4], stretch[2 * head : 2 * head + 2])
    assert weights["layers.0.RC.attn.qkv.weight"].shape == (48, 64, 1, 1)
    assert weights["layers.0.RC.attn.relative_position_index"].dtype == torch.int64
