"""Checkpoints written anew: for timm, and back in the layout of the authors' code."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import families
import parity
import pytest
import timm
import timm.models._hub
import torch
from published import fixtures
from safetensors import safe_open
from spandrel import ModelLoader
from torch import Tensor, nn

from visionattn.checkpoints import (
    CheckpointError,
    convert_checkpoint,
    identify,
    load_checkpoint,
    official_state_dict,
    read_checkpoint,
    save_folder,
    save_official,
)
from visionattn.errors import RunError

# What the fixtures hold no values of: offsets and masks, which their outputs do not depend on.
DERIVED = ("rpe_biases", "attn_mask_0", "attn_mask_1", "biases_h", "biases_v")


def randomised(net: nn.Module) -> nn.Module:
    for parameter in net.parameters():
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    return net


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


# Back to the authors' layout


@pytest.mark.parametrize("path", fixtures())
def test_published_weights_come_back_bit_by_bit(path: Path):
    meta, _ = parity.load(path)
    weights = parity.state_dict(meta)
    found = identify(weights)
    net = timm.create_model(found.name, **found.arguments)
    load_checkpoint(net, weights)
    back = official_state_dict(getattr(net, "model", net))
    published = {name: (tuple(shape), dtype) for name, shape, dtype in meta["keys"]}
    stored = {name: (tuple(v.shape), str(v.dtype).removeprefix("torch.")) for name, v in back.items()}
    # The fixture takes the edge operators of the training form for constants, the authors' code stores them.
    assert {n: v for n, v in stored.items() if ".mlp.mask_" not in n} == published
    for name, value in weights.items():
        assert name.endswith(DERIVED) or torch.equal(back[name], value), name


@pytest.mark.parametrize("name", families.FAMILIES)
def test_both_ways(name: str):
    net = randomised(families.small(name))
    again = families.small(name)
    assert not load_checkpoint(again, official_state_dict(net))
    assert equal(again.state_dict(), net.state_dict())


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        (
            "hat_x2",
            {"depths": (2, 2), "embed_dim": 24, "num_heads": 2, "window_size": 8, "squeeze_factor": 6},
        ),
        ("hat_s_x4", {"depths": (2,), "embed_dim": 48}),
        ("rgt_x3", {"depths": (3, 2), "embed_dim": 96}),
        ("rgt_x4", {"depths": (2,), "embed_dim": 48, "split_size": (8, 16), "c_ratio": 0.25}),
        ("craft_x4", {"depths": (1, 2), "pad": "always"}),
        ("craft_x2", {"depths": (1,), "embed_dim": 96, "split_size": (8, 16), "pad": "always"}),
    ],
)
@pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning")
def test_spandrel_reads_what_is_written_for_the_authors(name: str, sizes: dict[str, Any], tmp_path: Path):
    net = timm.create_model(name, **sizes).eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    save_official(net, tmp_path / "weights.pth")
    theirs: Any = ModelLoader().load_from_file(str(tmp_path / "weights.pth"))
    assert theirs.scale == net.info.upscale
    # Every index and mask is theirs: a state dict of their network loads without a difference.
    own, written = theirs.model.state_dict(), official_state_dict(net)
    assert equal({n: own[n] for n in sorted(own)}, {n: written[n] for n in sorted(written)})
    image = torch.rand(1, 3, 32, 48)
    with torch.no_grad():
        expected = theirs.model.eval()(image)
        assert (net(image) - expected).norm() <= 1e-5 * expected.norm()


def test_the_index_of_the_baseline_with_full_attention():
    net = families.small("vitrpb_small")
    index = official_state_dict(net)["layers.0.attn.relative_position_index"]
    side, table = 14, net.stages[0].blocks[0].attn.rpb
    # Its bias is that of key minus query.
    gathered = table.flatten(1)[:, index.flatten()].unflatten(1, (side**2, side**2))
    q, k = 3 * side + 5, 7 * side + 2
    assert torch.equal(gathered[:, q, k], table[:, 7 - 3 + 13, 2 - 5 + 13])


def test_masks_of_swin_as_its_code_makes_them():
    net = timm.create_model("inline_swin_tiny", **families.SMALL["inline_swin"], global_blocks=(0, 0, 0, 0))
    mask = official_state_dict(net)["layers.2.blocks.1.attn_mask"]
    assert mask.shape == (4, 49, 49)
    assert not mask[0].any()  # the first window touches no border
    # In the last one, rows and columns from the fourth on come from the other side.
    apart = torch.tensor([[(y >= 4) * 2 + (x >= 4) for x in range(7)] for y in range(7)]).flatten()
    assert torch.equal(mask[3] == -100, apart[:, None] != apart)
    assert "layers.3.blocks.1.attn_mask" not in official_state_dict(net)  # a map of one window


def test_official_files_are_wrapped_as_the_authors_do(tmp_path: Path):
    net = families.small("hat_x2")
    save_official(net, tmp_path / "a.pth")
    assert list(read_checkpoint(tmp_path / "a.pth")) == ["params_ema"]
    save_official(net, tmp_path / "a.safetensors")
    assert equal(read_checkpoint(tmp_path / "a.safetensors"), official_state_dict(net))
    # Views of a packed projection are no larger than what they show.
    pvt = families.small("inline_pvt_tiny")
    save_official(pvt, tmp_path / "pvt.pth")
    numbers = sum(v.numel() for v in pvt.state_dict().values())
    assert (tmp_path / "pvt.pth").stat().st_size < 4 * numbers + 200_000


# For timm


@pytest.fixture
def official_file(tmp_path: Path) -> Path:
    net = randomised(families.small("dinat_mini", num_classes=7))
    save_official(net, tmp_path / "dinat_mini.pth")
    return tmp_path / "dinat_mini.pth"


def test_a_file_with_metadata(official_file: Path, tmp_path: Path):
    found = convert_checkpoint(official_file, tmp_path / "ours.safetensors")
    with safe_open(str(tmp_path / "ours.safetensors"), framework="pt") as file:
        metadata = file.metadata()
    assert metadata["architecture"] == found.name == "dinat_mini"
    assert json.loads(metadata["model_args"])["num_classes"] == 7
    assert json.loads(metadata["pretrained_cfg"])["num_classes"] == 7
    again = identify(tmp_path / "ours.safetensors")
    assert (again.name, again.arguments, again.alternatives) == (found.name, found.arguments, ())
    assert not again.official

    overlay = {"file": str(tmp_path / "ours.safetensors"), "num_classes": 7}
    net = timm.create_model(again.name, pretrained=True, pretrained_cfg_overlay=overlay, **again.arguments)
    assert equal(net.state_dict(), read_checkpoint(tmp_path / "ours.safetensors"))

    convert_checkpoint(tmp_path / "ours.safetensors", tmp_path / "back.pth", official=True)
    assert equal(read_checkpoint(tmp_path / "back.pth"), read_checkpoint(official_file))


@pytest.mark.parametrize("name", families.FAMILIES)
def test_local_folders_and_the_hub(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    net = randomised(families.small(name))
    save_folder(net, tmp_path / "folder")
    local = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True)
    assert type(local) is type(net)
    assert equal(local.state_dict(), net.state_dict())

    def download(repo_id: str, filename: str, **kwargs: Any) -> str:
        assert repo_id == "someone/network"
        return str(tmp_path / "folder" / filename)

    monkeypatch.setattr(timm.models._hub, "hf_hub_download", download)
    hub = timm.create_model("hf-hub:someone/network", pretrained=True)
    assert equal(hub.state_dict(), net.state_dict())


def test_the_local_half_of_timms_push(tmp_path: Path):
    net = randomised(families.small("agent_swin_tiny", num_classes=3))
    timm.models.save_for_hf(net, str(tmp_path / "hub"), safe_serialization="both")
    assert {p.name for p in (tmp_path / "hub").iterdir()} == {
        "config.json",
        "model.safetensors",
        "pytorch_model.bin",
    }
    again = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True)
    assert equal(again.state_dict(), net.state_dict())
    assert identify(tmp_path / "hub" / "pytorch_model.bin").name.startswith("agent_swin")


def test_folders_are_never_overwritten(official_file: Path, tmp_path: Path):
    convert_checkpoint(official_file, tmp_path / "folder")
    with pytest.raises(CheckpointError, match="folder exists and is no empty folder"):
        convert_checkpoint(official_file, tmp_path / "folder")
    assert {p.name for p in (tmp_path / "folder").iterdir()} == {"config.json", "model.safetensors"}


# First convolution, classifier, and the position tables of another size


@pytest.mark.parametrize(
    "name", ["biformer_tiny", "nat_mini", "l2vit_t", "inline_cswin_tiny", "agent_deit_tiny"]
)
@pytest.mark.parametrize("in_chans", [1, 6])
def test_other_channels_and_classes_while_loading(name: str, in_chans: int, tmp_path: Path):
    source = randomised(families.small(name))
    save_official(source, tmp_path / "weights.pth")
    net = families.small(
        name,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "weights.pth")},
        in_chans=in_chans,
        num_classes=5,
    )
    first = f"{source.pretrained_cfg['first_conv']}.weight"
    classifier = source.pretrained_cfg["classifier"]
    ours, theirs = net.state_dict(), source.state_dict()
    repeated = theirs[first].repeat(1, 2, 1, 1)[:, :in_chans] * 3 / in_chans
    expected = theirs[first].sum(1, keepdim=True) if in_chans == 1 else repeated
    torch.testing.assert_close(ours[first], expected)
    assert ours[f"{classifier}.weight"].shape[0] == 5
    rest = [n for n in ours if n != first and not n.startswith(classifier)]
    assert all(torch.equal(ours[n], theirs[n]) for n in rest)


@pytest.mark.parametrize("name", ["agent_deit_tiny", "agent_pvt_tiny", "agent_swin_tiny", "inline_deit_tiny"])
def test_another_input_size_while_loading(name: str, tmp_path: Path):
    source = randomised(families.small(name)).eval()
    save_official(source, tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth")}
    net = families.small(name, pretrained=True, pretrained_cfg_overlay=overlay, img_size=288)
    table = "pos_embed" if "deit" in name else "stages.0.blocks.0.attn.ah_bias"
    assert net.state_dict()[table].shape != source.state_dict()[table].shape
    unsized = [n for n, v in net.state_dict().items() if v.shape == source.state_dict()[n].shape]
    assert all(torch.equal(net.state_dict()[n], source.state_dict()[n]) for n in unsized)


@pytest.mark.parametrize("name", families.RESTORATION)
def test_other_channels_of_a_restoration_network_are_refused(name: str, tmp_path: Path):
    source = families.small(name)
    save_official(source, tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth")}
    same = families.small(name, pretrained=True, pretrained_cfg_overlay=overlay)
    assert equal(same.state_dict(), source.state_dict())
    if name == "hsdt_ssr":  # what comes out are bands, whatever comes in
        net = families.small(name, pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1)
        gray = source.get_parameter("proj.weight").sum(1, keepdim=True)
        torch.testing.assert_close(net.get_parameter("proj.weight"), gray)
        return
    sentence = f"the weights of {name} are for {source.in_chans} channels and cannot be adapted to in_chans=1"
    with pytest.raises(ValueError, match=sentence):
        families.small(name, pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1)


def test_a_network_of_other_channels_keeps_them(tmp_path: Path):
    source = families.small("cfsr_x2", in_chans=1)
    timm.models.save_for_hf(source, tmp_path / "gray", model_args={**families.SMALL["cfsr"], "in_chans": 1})
    assert equal(
        timm.create_model(f"local-dir:{tmp_path}/gray", pretrained=True).state_dict(), source.state_dict()
    )


# What cannot be written


def test_half_precision_stays(tmp_path: Path):
    net = randomised(families.small("cfsr_x2")).half()
    torch.save({"params": net.state_dict()}, tmp_path / "half.pth")
    convert_checkpoint(tmp_path / "half.pth", tmp_path / "half.safetensors", arguments={"img_range": 1.0})
    assert equal(read_checkpoint(tmp_path / "half.safetensors"), net.state_dict())


def test_a_named_network_instead_of_the_found_one(official_file: Path, tmp_path: Path):
    sizes = {**families.SMALL["nat"], "num_classes": 7}
    found = convert_checkpoint(official_file, tmp_path / "a.safetensors", name="nat_mini", arguments=sizes)
    assert found.name == identify(tmp_path / "a.safetensors").name == "nat_mini"
    found = convert_checkpoint(official_file, tmp_path / "b.safetensors", arguments={"dilations": "coco"})
    assert identify(tmp_path / "b.safetensors").arguments["dilations"] == "coco"
    with pytest.raises(CheckpointError, match=r"cannot build dinat_mini with .*'dilations': 'cocoa'"):
        convert_checkpoint(official_file, tmp_path / "c.safetensors", arguments={"dilations": "cocoa"})
    with pytest.raises(CheckpointError, match="does not fit HAT"):
        convert_checkpoint(
            official_file, tmp_path / "c.safetensors", name="hat_x2", arguments=families.SMALL["hat"]
        )
    assert not (tmp_path / "c.safetensors").exists()


@pytest.mark.parametrize(("target", "official"), [("a.bin", False), ("a.pth", False), ("folder", True)])
def test_targets_of_unknown_kinds(target: str, official: bool, official_file: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match=f"{target} must end in "):
        convert_checkpoint(official_file, tmp_path / target, official=official)
    assert not (tmp_path / target).exists()


def test_networks_of_other_libraries_have_no_layout():
    with pytest.raises(CheckpointError, match="Linear is no network of visionattn"):
        official_state_dict(nn.Linear(2, 2))


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    net = families.small("hat_x2")
    opened = Path.open

    class Full:
        """A file on a disk without room; PyTorch's writer goes through `write` as everybody does."""

        def __init__(self, path: Path) -> None:
            self.file = opened(path, "wb")

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def write(self, data: bytes) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def flush(self) -> None:
            """Nothing was written."""

    monkeypatch.setattr(
        Path, "open", lambda self, mode="r", **_: Full(self) if mode == "wb" else opened(self, mode)
    )
    with pytest.raises(RunError, match=r"cannot write .*net.pth: no space left on device"):
        save_official(net, tmp_path / "net.pth")
    assert not list(tmp_path.iterdir())
