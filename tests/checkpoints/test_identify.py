"""Which network a checkpoint belongs to: published ones, others of their families, and none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import families
import parity
import pytest
import timm
import torch
from published import fixtures
from torch import Tensor, nn

from visionattn.checkpoints import CheckpointError, Identity, identify, load_network, save_checkpoint
from visionattn.checkpoints.identify import layout_of

Weights = dict[str, Tensor]


def official(name: str, **kwargs: Any) -> Weights:
    """Weights without memory, as the authors' code would store them."""
    net = timm.create_model(name, device="meta", **kwargs)
    net = getattr(net, "model", net)
    return layout_of(net).to_official(net.state_dict(), net)


# Networks of full size have thousands of modules, a second each; miniatures stand for the others.
QUICK = (
    "biformer_tiny",
    "biformer_stl_nchw",
    "nat_mini",
    "cfsr_x4",
    "hsdt_m",
    "hsdt_ssr",
    "pmnet",
    "l2vit_t",
)
EVERY = [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in families.ALL]


def same_weights(found: Identity, net: nn.Module) -> bool:
    """Whether the network that was found has the weights of `net`, name by name and shape by shape."""
    again = timm.create_model(found.name, **found.arguments, device="meta")
    shapes = ({name: value.shape for name, value in n.state_dict().items()} for n in (again, net))
    return type(again) is type(net) and next(shapes) == next(shapes)


# Networks whose weights are those of another one too, and what they differ in.
TWINS = {
    "agent_swin_tiny": (),
    "nat_mini": ("dinat_mini",),
    "nat_tiny": ("dinat_tiny",),
    "dinat_mini": ("nat_mini",),
    "dinat_large": ("dinat_large_384",),
    "dinat_s_large_384": ("dinat_s_large",),
    "nat_isotropic_base": ("dinat_isotropic_base",),
    "l2vit_b_384": ("l2vit_b",),
    "inline_cswin_base": ("inline_cswin_base_384",),
    "biformer_stl_nchw": (),
}


@pytest.mark.parametrize("name", EVERY)
def test_every_published_network(name: str):
    weights = official(name)
    found = identify(weights)
    assert name in (found.name, *found.alternatives)
    assert found.official is not name.startswith("pmnet")
    if found.name == name:
        assert found.arguments == {}
    if name in TWINS:
        assert set(TWINS[name]) | {name} == {found.name, *found.alternatives}
    for other in found.alternatives:
        # The reader learns what to choose by.
        assert any(note.startswith(f"{other} has the same weights and differs in ") for note in found.notes)


@pytest.mark.parametrize("name", families.ALL)
def test_every_network_in_miniature(name: str):
    net = families.small(name, device="meta")
    found = identify(layout_of(net).to_official(net.state_dict(), net))
    assert found.official is not name.startswith("pmnet")
    assert same_weights(found, net)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_without_index_buffers_and_in_our_own_names(name: str):
    net = families.small(name, device="meta")
    found = identify(net.state_dict())
    assert not found.official
    assert same_weights(found, net)


@pytest.mark.parametrize("path", fixtures())
def test_published_names(path: Path):
    meta, _ = parity.load(path)
    table = path.with_name("arguments.json")
    arguments = json.loads(table.read_text()) if table.exists() else {}
    expected = arguments.get(path.stem, {"model_name": meta["variant"]})
    found = identify({"params": parity.state_dict(meta)})
    assert found.name == expected.pop("model_name")
    assert found.wrapper == "params"
    # Not learned: the regions and agents of dense backbones, and what bands are compared with.
    unlearned = {"n_win", "always_shift", "agent_shapes", "query"}
    assert found.arguments == {k: v for k, v in expected.items() if k not in unlearned}


COMMUNITY: list[tuple[str, dict[str, Any]]] = [
    ("hat_x2", {"embed_dim": 60, "depths": (4, 2), "window_size": 8, "in_chans": 1, "mlp_ratio": 4.0}),
    ("hat_s_x1", {"embed_dim": 96, "depths": (2, 2, 2), "num_heads": 4, "qkv_bias": False}),
    ("hat_x4", {"upscale": 8, "compress_ratio": 12, "squeeze_factor": 10, "overlap_ratio": 0.25}),
    ("rgt_x4", {"embed_dim": 96, "depths": (4, 4), "num_heads": 8, "c_ratio": 0.25, "mlp_ratio": 4.0}),
    ("rgt_x3", {"depths": (2, 2), "split_size": (8, 16)}),
    ("craft_x3", {"embed_dim": 64, "depths": (3, 1), "num_heads": 4, "split_size": (8, 16), "in_chans": 4}),
    ("catanet_x3", {"embed_dim": 32, "num_heads": 4, "qk_dim": 24, "mlp_dim": 64, "num_centres": (8,) * 8}),
    ("cfsr_x4", {"embed_dim": 32, "depths": (4, 4, 4), "kernel_size": 7, "fused": True}),
    ("hsdt_m", {"in_chans": 20, "embed_dim": 12, "depth": 4, "downsample": (2,)}),
    ("hsdt_ssr", {"bands": 12, "in_chans": 4}),
    ("pmnet", {"embed_dim": 64, "depth": 3, "deep_depth": 2, "in_chans": 1}),
    ("biformer_tiny", {"embed_dims": (32, 64, 96, 128), "depths": (1, 2, 3, 1), "num_classes": 5}),
    ("nat_mini", {"embed_dim": 48, "num_heads": (3, 6, 12, 24), "kernel_size": 9, "num_classes": 21841}),
    ("l2vit_t", {"embed_dims": (64, 96, 128, 160), "num_heads": (2, 3, 4, 5), "mlp_ratio": 2.0}),
    (
        "smt_s",
        {"embed_dims": (32, 48, 64, 96), "depths": (1, 1, 3, 1), "num_heads": (0, 0, 2, 4), "num_classes": 9},
    ),
    ("smt_l", {"depths": (1, 1, 2, 1), "mlp_ratios": (2, 2, 3, 3), "expand_ratio": 3, "qkv_bias": False}),
    ("efficientmod_xs", {"depths": (1, 1, 3, 1), "embed_dims": (32, 48, 64, 80), "ratios": (1, 2, 3)}),
    ("efficientmod_s_conv", {"attention_depths": (0, 0, 0, 2), "mlp_ratios": (4, 4, 4, 3), "in_chans": 1}),
    ("agent_pvt_tiny", {"img_size": 128, "embed_dims": (32, 64, 96, 128), "num_classes": 0}),
    ("agent_swin_tiny", {"img_size": 448, "window_size": 14, "agents": (5, 6, 7, 7)}),
    ("agent_deit_tiny", {"img_size": 288, "depth": 14, "global_blocks": 3}),
    ("inline_deit_tiny", {"img_size": 384, "embed_dim": 96, "num_heads": 3, "in_chans": 1}),
    ("inline_cswin_tiny", {"depths": (1, 2, 9, 1), "global_blocks": (1, 2, 0, 0), "embed_dim": 32}),
]


@pytest.mark.parametrize(("name", "arguments"), COMMUNITY)
def test_networks_of_other_sizes(name: str, arguments: dict[str, Any]):
    net = timm.create_model(name, **arguments, device="meta")
    found = identify(official(name, **arguments))
    assert same_weights(found, net)
    again = timm.create_model(found.name, **found.arguments, device="meta")
    assert getattr(again, "info", None) == getattr(net, "info", None)


def test_what_no_weight_tells_is_said():
    weights = official("rgt_x3", depths=(2, 2))
    told = identify(weights)
    assert not any("split_size" in note for note in told.notes)  # the stored index tells
    bare = {name: value for name, value in weights.items() if "attns" not in name or "pos." in name}
    found = identify(bare)
    assert found.arguments == {"depths": (2, 2)}
    assert any(
        "no weight tells split_size=(8, 32), img_range=1.0: as in rgt_" in note for note in found.notes
    )


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("weights.pth", "nat_mini"),
        ("dinat_mini.pth", "dinat_mini"),
        ("dinat_mini_in1k_224.pth", "dinat_mini"),
        ("my-DiNAT_mini-epoch300.pth", "dinat_mini"),
        ("nat_mini_best.pth", "nat_mini"),
    ],
)
def test_the_name_of_the_file_decides_between_twins(file: str, expected: str, tmp_path: Path):
    sizes: dict[str, Any] = families.SMALL["nat"]
    net = timm.create_model("nat_mini", **sizes)
    torch.save({"state_dict": net.state_dict()}, tmp_path / file)
    found = identify(tmp_path / file)
    assert found.name == expected
    assert found.alternatives
    chosen = f"{expected} was chosen by the name of the file"
    assert (chosen in found.notes) is (file != "weights.pth")


def test_our_metadata_decide_what_weights_cannot(tmp_path: Path):
    net = families.small("dinat_mini", dilations="ade20k")
    metadata = {
        "architecture": "dinat_mini",
        "model_args": json.dumps({"dilations": "ade20k", "depths": [9]}),
    }
    save_checkpoint(net, tmp_path / "weights.safetensors", metadata)
    found = identify(tmp_path / "weights.safetensors")
    assert found.name == "dinat_mini"
    assert not found.alternatives
    assert found.arguments["dilations"] == "ade20k"
    assert found.arguments["depths"] == (1, 2, 1, 1)  # what the weights tell, they tell


@pytest.mark.parametrize("text", ["no json", "[1, 2]"])
def test_metadata_of_strangers(text: str, tmp_path: Path):
    save_checkpoint(families.small("nat_mini"), tmp_path / "w.safetensors", {"model_args": text})
    with pytest.raises(CheckpointError, match="the model_args in the metadata are no JSON"):
        identify(tmp_path / "w.safetensors")


def test_the_backbone_of_a_detector():
    weights = official("nat_mini", features_only=True, extra_norms=True)
    detector = {f"backbone.{name}": value for name, value in weights.items()}
    detector["decode_head.conv_seg.weight"] = torch.zeros(150, 64)
    found = identify({"meta": {"epoch": 1}, "state_dict": detector})
    assert found.name == "nat_mini"
    assert found.arguments == {"extra_norms": True, "features_only": True}
    assert found.notes[0] == "the weights of the backbone in it; 1 others are left out"


def test_load_network():
    net = families.small("hat_x2").eval()
    weights = layout_of(net).to_official(net.state_dict(), net)
    again, found = load_network({"params_ema": weights, "params": {n: v + 1 for n, v in weights.items()}})
    assert (found.name, found.wrapper) == ("hat_x2", "params_ema")
    assert not again.training
    x = torch.rand(1, 3, 16, 24)
    with torch.no_grad():
        torch.testing.assert_close(again(x), net(x), rtol=0, atol=0)


def test_other_networks_are_refused():
    with pytest.raises(CheckpointError, match="belongs to no network of this library: its weights are conv1"):
        identify(timm.create_model("resnet18", device="meta").state_dict())
    broken = official("hat_x2", **families.SMALL["hat"])
    del broken["conv_last.weight"]
    with pytest.raises(CheckpointError, match=r"it resembles hat_x2, but 1 missing \(conv_last"):
        identify(broken)
    with pytest.raises(CheckpointError, match="ResNet is no network of visionattn"):
        layout_of(timm.create_model("resnet18", device="meta"))
