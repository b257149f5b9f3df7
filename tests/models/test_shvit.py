"""SHViT, which is timm's network: its authors' weights recognised, loaded and written back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import parity
import pytest
import timm
import torch

from visionattn.checkpoints import (
    convert_checkpoint,
    identify,
    load_checkpoint,
    official_state_dict,
    read_checkpoint,
    save_official,
)
from visionattn.models.registry.variants import ADOPTED
from visionattn.models.registry.zoo import count_macs, model_names
from visionattn.models.shvit import VARIANTS

SMALL: dict[str, Any] = {"embed_dim": (32, 48, 64), "partial_dim": (8, 16, 24), "depth": (1, 2, 1)}


@pytest.mark.parametrize(
    ("name", "params", "mmacs"),
    [
        ("shvit_s1", 6_330_808, 241),
        ("shvit_s2", 11_483_072, 365),
        ("shvit_s3", 14_245_273, 601),
        ("shvit_s4", 16_588_484, 986),
    ],
)
def test_published_networks(name: str, params: int, mmacs: int):
    net: Any = timm.create_model(name, device="meta").eval()
    assert sum(p.numel() for p in net.parameters()) == params
    assert round(count_macs(net, (1, *net.default_cfg["input_size"])) / 1e6) == mmacs
    weights = official_state_dict(timm.create_model(name))
    assert {n.split(".")[0] for n in weights} == {"patch_embed", "blocks1", "blocks2", "blocks3", "head"}
    found = identify(weights)
    assert (found.name, found.arguments, found.alternatives) == (name, {}, ())


def test_the_table_is_that_of_timm():
    assert set(VARIANTS) == set(ADOPTED) == set(timm.list_models("shvit*"))
    assert not set(VARIANTS) & set(model_names())  # they stay timm's
    for name in VARIANTS:
        arguments = {key: ADOPTED[name].arguments[key] for key in (*VARIANTS[name], "qk_dim")}
        same = timm.create_model(name, **arguments, device="meta")
        theirs = timm.create_model(name, device="meta")
        shapes = ({n: v.shape for n, v in net.state_dict().items()} for net in (same, theirs))
        assert next(shapes) == next(shapes)


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_classes": 0},
        {"num_classes": 5, "in_chans": 1},
        {"types": ("s", "s", "i"), "qk_dim": (8, 8, 16)},
    ],
)
def test_networks_of_other_sizes(arguments: dict[str, Any]):
    net = timm.create_model("shvit_s1", **{**SMALL, **arguments})
    found = identify({"model": official_state_dict(net)})
    again = timm.create_model(found.name, **found.arguments)
    assert not load_checkpoint(again, official_state_dict(net))
    x = torch.rand(1, arguments.get("in_chans", 3), 70, 64)
    assert torch.equal(again.eval()(x), net.eval()(x))


def test_features_only_takes_whole_checkpoints_and_those_of_detectors():
    net: Any = timm.create_model("shvit_s1", **SMALL).eval()
    x = torch.rand(1, 3, 128, 96)
    expected = net.forward_intermediates(x, intermediates_only=True)
    weights = official_state_dict(net)
    for content in (weights, {f"backbone.{n}": v for n, v in weights.items() if not n.startswith("head.")}):
        features = timm.create_model("shvit_s1", features_only=True, **SMALL)
        assert not load_checkpoint(features, content)
        torch.testing.assert_close(features.eval()(x), expected)


def test_conversion_both_ways(tmp_path: Path):
    net = timm.create_model("shvit_s1", num_classes=7, **SMALL)
    save_official(net, tmp_path / "shvit_s1.pth")
    assert list(read_checkpoint(tmp_path / "shvit_s1.pth")) == ["model"]
    convert_checkpoint(tmp_path / "shvit_s1.pth", tmp_path / "folder")
    x = torch.rand(1, 3, 64, 64)
    again = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).eval()
    assert torch.equal(again(x), net.eval()(x))
    convert_checkpoint(tmp_path / "folder" / "model.safetensors", tmp_path / "back.pth", official=True)
    back, first = (read_checkpoint(tmp_path / name)["model"] for name in ("back.pth", "shvit_s1.pth"))
    assert back.keys() == first.keys()
    assert all(torch.equal(back[name], first[name]) for name in first)


def test_timms_fusion_of_published_weights_gives_the_published_outputs():
    """Batch norms and residual convolutions folded into what they follow: the form for deployment."""
    path = Path(__file__).parents[1] / "parity" / "shvit" / "shvit_s2.safetensors"
    meta, stored = parity.load(path)
    net: Any = timm.create_model("shvit_s2")
    load_checkpoint(net, parity.state_dict(meta))
    with torch.inference_mode():
        logits = net.eval().fuse()(parity.example(meta))
    assert parity.error(logits, stored["logits"]) <= 1e-5
