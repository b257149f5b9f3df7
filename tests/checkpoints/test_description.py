"""What files say of their network: every writer writes it, every reader uses it, guesses are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from visionattn.checkpoints import (
    CheckpointError,
    convert_checkpoint,
    identify,
    load_network,
    official_state_dict,
    save_checkpoint,
    save_folder,
    save_official,
)
from visionattn.checkpoints.description import Preprocessing, describe, parse_description, prepare
from visionattn.checkpoints.identify import check_guesses
from visionattn.checkpoints.reading import read_metadata

# Of every family, arguments that no weight tells, other than the published ones.
UNTOLD: dict[str, dict[str, Any]] = {
    "agent_deit": {"global_pool": "avg"},
    "agent_pvt": {"agent_shapes": ((2, 3),) * 4, "global_pool": "max"},
    "agent_swin": {"window_size": 4, "always_shift": True, "agent_shapes": ((2, 2),) * 4},
    "agent_cswin": {"stripe": 3, "num_heads": (2, 4, 4, 8)},
    "inline_deit": {"global_pool": "avg"},
    "inline_pvt": {"global_pool": "avgmax"},
    "inline_swin": {"global_pool": "max"},
    "inline_cswin": {"stripe": 3, "num_heads": (2, 2, 4, 8)},
    "biformer": {"n_win": 3, "topks": (1, 1, 2, -2), "head_dim": 16},
    "nat_isotropic": {"dilations": ((1, 2, 1, 2),), "kernel_size": 3},
    "dinat_isotropic": {"dilations": ((2, 2, 1, 2),), "kernel_size": 3},
    "nat": {"dilations": ((1,), (2, 1), (1,), (1,)), "kernel_size": 3},
    "dinat": {"dilations": ((2,), (2, 1), (1,), (1,)), "kernel_size": 3},
    "l2vit": {"window_size": 3},
    "ninformer": {"img_size": (32, 192)},
    "catanet": {"num_heads": 2, "patch_sizes": (6, 10), "group_sizes": (16, 24)},
    "cfsr": {"img_range": 2.0, "task": "super-resolution"},
    "craft": {"split_size": (4, 8), "img_range": 3.0},
    "hat": {"conv_scale": 0.5, "img_range": 2.0},
    "hsdt": {"query": "self"},
    "rgt": {"split_size": (4, 8), "img_range": 2.0},
}
WRITERS: dict[str, Callable[[nn.Module, Path], Path]] = {
    "ours": lambda net, folder: written(save_checkpoint, net, folder / "ours.safetensors"),
    "official": lambda net, folder: written(save_official, net, folder / "official.pth"),
    "official safetensors": lambda net, folder: written(save_official, net, folder / "official.safetensors"),
    "folder": lambda net, folder: written(save_folder, net, folder / "hub") / "model.safetensors",
}


def written(save: Callable[[nn.Module, Path], None], net: nn.Module, path: Path) -> Path:
    save(net, path)
    return path


def unusual(name: str) -> nn.Module:
    """A miniature with arguments that no weight tells, and weights that are not the initial ones."""
    key = next((key for key in UNTOLD if name.startswith(key)), "")
    net = families.small(name, **UNTOLD.get(key, {})).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in net.parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return net


def image(net: Any) -> torch.Tensor:
    channels, *size = net.pretrained_cfg["input_size"]
    fixed = net.pretrained_cfg["fixed_input_size"] or hasattr(net, "num_prefix_tokens")
    return torch.rand(1, channels, *(size if fixed else (64, 72)))


@pytest.mark.parametrize("name", families.FAMILIES)
def test_every_family_is_read_back_as_it_was_made(name: str, tmp_path: Path):
    net = unusual(name)
    x = image(net)
    with torch.no_grad():
        expected = net(x)
        for kind, write in WRITERS.items():
            again, found = load_network(write(net, tmp_path))
            assert type(again) is type(net)
            assert not found.guessed, kind
            # In the authors' layout weights are joined and cut, so that they lie elsewhere in memory.
            assert (again(x) - expected).norm() <= 1e-6 * expected.norm(), kind


@pytest.mark.parametrize("name", families.FAMILIES)
def test_what_files_without_a_description_do_not_tell_is_asked_for(name: str, tmp_path: Path):
    net = unusual(name)
    x = image(net)
    save_file(net.state_dict(), tmp_path / "weights.safetensors")
    found = identify(tmp_path / "weights.safetensors")
    made = {k: v for k, v in net.made_with.items() if v is not None}
    if not found.guessed:
        assert name.startswith("pmnet")  # whose weights tell everything
        return
    target = tmp_path / "converted.safetensors"
    with pytest.raises(
        CheckpointError, match="change the output: say what it was trained with; in"
    ) as caught:
        convert_checkpoint(tmp_path / "weights.safetensors", target)
    assert not target.exists()
    assert all(f"{argument}=" in str(caught.value) for argument in list(found.guessed)[:4])
    stated = {n: made.get(n, v) for n, v in found.guessed.items()}
    convert_checkpoint(tmp_path / "weights.safetensors", target, arguments=stated)
    with torch.no_grad():
        torch.testing.assert_close(load_network(target)[0](x), net(x), rtol=0, atol=0)


def test_every_file_says_the_same(tmp_path: Path):
    net: Any = families.small("nat_mini", num_classes=2, drop_path_rate=0.1, dilations="coco")
    names = ["cat", "dög"]
    prepare(net, Preprocessing(input_size=(3, 48, 64), mean=(0.5,) * 3, std=(0.25,) * 3, label_names=names))
    expected = describe(net)
    assert expected["architecture"] == "nat_mini"
    assert expected["made_by"].startswith("visionattn ")
    assert json.loads(expected["model_args"])["drop_path_rate"] == 0.1
    stated = ("input_size", "mean", "std", "class_names", "num_classes")
    assert [json.loads(expected[name]) for name in stated] == [[3, 48, 64], [0.5] * 3, [0.25] * 3, names, 2]
    for write in WRITERS.values():
        file = write(net, tmp_path)
        texts = read_metadata(file)
        assert {name: texts[name] for name in expected} == expected
        again: Any = load_network(file)[0]
        assert again.pretrained_cfg["input_size"] == (3, 48, 64)
        assert again.pretrained_cfg["label_names"] == names
        convert_checkpoint(file, tmp_path / "again.safetensors")
        with safe_open(str(tmp_path / "again.safetensors"), framework="pt") as opened:
            kept = {name: opened.metadata()[name] for name in expected if name != "model_args"}
        assert kept == {name: text for name, text in expected.items() if name != "model_args"}
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert (config["label_names"], config["made_by"]) == (names, expected["made_by"])
    assert config["pretrained_cfg"]["input_size"] == [3, 48, 64]
    # The authors' code loads its files as ever: nothing stands among the weights.
    content = torch.load(tmp_path / "official.pth", weights_only=True)
    assert {name: value.shape for name, value in content.items()} == {
        name: value.shape for name, value in official_state_dict(net).items()
    }


def test_folders_of_timm_are_read_by_their_configuration(tmp_path: Path):
    net = unusual("dinat_mini")
    timm.models.save_for_hf(
        net, str(tmp_path / "hub"), model_args=dict(net.made_with), safe_serialization="both"
    )
    for file in ("model.safetensors", "pytorch_model.bin"):
        found = identify(tmp_path / "hub" / file)
        assert found.name == "dinat_mini"
        assert found.arguments["dilations"] == UNTOLD["dinat"]["dilations"]
        assert not found.guessed


def test_a_network_is_described_as_it_is_now():
    net: Any = families.small("nat_mini", num_classes=5)
    prepare(net, Preprocessing(label_names=list("abcde")))
    net.reset_classifier(3, "max")
    texts = describe(net)
    arguments = json.loads(texts["model_args"])
    assert (arguments["num_classes"], arguments["global_pool"], texts["num_classes"]) == (3, "max", "3")
    assert "class_names" not in texts  # there were five
    assert describe(nn.Linear(2, 2)).keys() == {"made_by"}
    assert json.loads(describe(families.small("agent_deit_tiny", img_size=(64, 96)))["input_size"]) == [
        3,
        64,
        96,
    ]
    assert json.loads(describe(families.small("hsdt_ssr", in_chans=5))["input_size"])[0] == 5


def test_networks_of_timm_itself(tmp_path: Path):
    net = timm.create_model("test_vit", img_size=32, num_classes=3).eval()
    save_checkpoint(net, tmp_path / "vit.safetensors")
    again, found = load_network(tmp_path / "vit.safetensors")
    assert (found.name, found.arguments["img_size"], found.official) == ("test_vit", 32, False)
    x = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(again(x), net(x), rtol=0, atol=0)
    save_file(net.state_dict(), tmp_path / "bare.safetensors")
    with pytest.raises(CheckpointError, match="belongs to no network of this library"):
        identify(tmp_path / "bare.safetensors")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"depths": [10**9] * 4}, "a network that would fill the memory"),
        ({"kernel_size": 10**12}, "a window of any size"),
        ({"depths": [1] * 100_000}, "a list without end"),
        ({"depths": "abc", "embed_dim": None}, "other types"),
        ({"depths": [3, 4, 6, 5]}, "the sizes of another network"),
        ({"no_such_argument": 1}, "what no network takes"),
    ],
)
def test_strangers_descriptions_are_held_against_the_weights(
    arguments: dict[str, Any], why: str, tmp_path: Path
):
    net = families.small("nat_mini")
    texts = {"architecture": "nat_mini", "model_args": json.dumps(arguments)}
    save_checkpoint(net, tmp_path / "w.safetensors", texts)
    found = identify(tmp_path / "w.safetensors")
    assert found.name == "nat_mini", why
    assert found.arguments["depths"] == (1, 2, 1, 1)


def test_strangers_cannot_name_files(tmp_path: Path):
    texts = {
        "architecture": "test_vit",
        "model_args": json.dumps({"checkpoint_path": "/etc/passwd", "pretrained": True, "cache_dir": "/"}),
    }
    save_checkpoint(timm.create_model("test_vit"), tmp_path / "w.safetensors", texts)
    assert identify(tmp_path / "w.safetensors").arguments == {}


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        ({"model_args": "{"}, "the model_args in the metadata are no JSON"),
        ({"pretrained_cfg": "[]"}, "the pretrained_cfg in the metadata are no JSON object"),
        ({"input_size": "[3, -2, 4]"}, "the input_size.1 in the metadata cannot be used"),
        ({"mean": '["a"]'}, "the mean.0 in the metadata cannot be used"),
        ({"class_names": "3"}, "the label_names in the metadata cannot be used"),
    ],
)
def test_descriptions_are_checked(texts: dict[str, str], sentence: str):
    with pytest.raises(CheckpointError, match=sentence):
        parse_description(texts)


def test_the_question_can_be_answered_on_a_command_line(tmp_path: Path):
    save_file(unusual("biformer_tiny").state_dict(), tmp_path / "w.safetensors")
    found = identify(tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError) as caught:
        check_guesses(found, ["head_dim"], "w.safetensors", "model.kwargs.")
    assert "model.kwargs.n_win=7 'model.kwargs.topks=[1,4,16,-2]' model.kwargs.operator=nhwc" in str(
        caught.value
    )
    assert "head_dim" not in str(caught.value)
    # As published, nothing is asked.
    published = timm.create_model("nat_mini", device="meta")
    assert identify(published.state_dict()).guessed == {"dilations": None}  # dinat_mini has the same weights
    assert not identify(timm.create_model("hat_x4", device="meta").state_dict()).guessed
