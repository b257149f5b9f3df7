"""CARE: two classifiers, costs, and what its variants differ in."""

from __future__ import annotations

import families
import pytest
import timm
import torch
from torch import nn

from visionattn.checkpoints import identify
from visionattn.checkpoints.identify import layout_of
from visionattn.models.registry.zoo import model_facts


@pytest.mark.parametrize(("name", "gmacs"), [("care_s0", 0.72), ("care_s1", 1.03), ("care_s2", 1.92)])
def test_costs_are_those_of_the_authors_code(name: str, gmacs: float):
    assert round(model_facts(name).gmacs, 2) == gmacs


def test_training_gives_both_logits_where_a_teacher_asks_for_them():
    net = families.small("care_s0").train()
    x = torch.rand(2, 3, 64, 64)
    assert isinstance(net(x), torch.Tensor)
    net.set_distilled_training()
    own, dist = net(x)
    assert own.shape == dist.shape == (2, 1000)
    assert not torch.allclose(own, dist)
    (own.square().mean() + dist.square().mean()).backward()
    assert all(p.grad is not None for p in net.parameters())
    features = net.eval().forward_features(x)
    branches = net.get_classifier()
    pooled = features.mean((2, 3))
    torch.testing.assert_close(net(x), (branches.own(pooled) + branches.dist(pooled)) / 2)
    # A new classifier goes on as the old one did.
    net.reset_classifier(5)
    assert [logits.shape for logits in net.train()(x)] == [(2, 5), (2, 5)]
    net.set_distilled_training(False)
    assert net(x).shape == (2, 5)


def test_the_classifier_activates_before_it_normalises():
    net = families.small("care_s0").eval()
    branch, pooled = net.get_classifier().own, torch.randn(3, net.num_features)
    expected = branch.fc(nn.functional.layer_norm(nn.functional.gelu(pooled), pooled.shape[1:], eps=1e-6))
    torch.testing.assert_close(branch(pooled), expected)


def test_a_new_classifier_is_of_the_same_precision_and_pools_as_told():
    net = families.small("care_s0", dtype=torch.float64).eval()
    net.reset_classifier(3, "max")
    assert net(torch.rand(1, 3, 64, 64, dtype=torch.float64)).dtype == torch.float64
    with pytest.raises(ValueError, match="global_pool='' goes with num_classes=0"):
        net.reset_classifier(3, "")


def test_sides_that_do_not_divide_lose_their_last_rows():
    net = families.small("care_s0", features_only=True).eval()
    x = torch.rand(1, 3, 61, 64)
    with torch.no_grad():
        maps, cut = net(x), net(x[:, :, :60])
    assert [m.shape[2] for m in maps] == [15, 7, 3, 1]
    assert all(map(torch.equal, maps, cut))


def test_widths_that_heads_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"multiples of 4 \* head_dims, got 96 and 16"):
        timm.create_model("care_s0", embed_dims=(32, 64, 96, 256), device="meta")


def test_networks_of_other_sizes_are_recognised():
    arguments = {
        "depths": (1, 2, 3, 1),
        "embed_dims": (16, 32, 64, 128),
        "ratios": ((2, 3), (1, 2), (3, 4), (2, 2)),
    }
    net = timm.create_model("care_s1", **arguments, num_classes=7, in_chans=1, device="meta")
    found = identify(layout_of(net).to_official(net.state_dict(), net))
    again = timm.create_model(found.name, **found.arguments, device="meta")
    shapes = [{name: v.shape for name, v in n.state_dict().items()} for n in (net, again)]
    assert shapes[0] == shapes[1]
