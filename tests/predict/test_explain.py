"""`tools/explain.py lam`: its files, its numbers, its errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import visionattn  # noqa: F401  (registers the networks)
from visionattn.errors import InputError
from visionattn.predict.explain import explain_image


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("cfsr_x2", depths=(1,), embed_dim=8).eval()


def test_a_photograph_and_a_place(tmp_path: Path):
    explained = explain_image(network(), "coffee", tmp_path, place=(3, 190), window=8, context=24)
    numbers = json.loads(explained.numbers.read_text())
    assert numbers["input"] == {"top": 0, "left": 178, "side": 24}
    assert numbers["window"] == {"top": 3, "left": 21, "side": 8}
    assert 0 < numbers["diffusion_index"] < 100
    assert explained.attribution.map.shape == (24, 24)
    with Image.open(explained.picture) as picture:
        assert picture.format == "PNG"
    assert sorted(f.name for f in tmp_path.iterdir()) == ["coffee_lam.json", "coffee_lam.png"]


def test_by_default_the_window_stands_where_detail_is(tmp_path: Path):
    image = torch.full((60, 80, 3), 128, dtype=torch.uint8)
    image[40:48, 20:28] = torch.randint(0, 255, (8, 8, 3), dtype=torch.uint8)
    Image.fromarray(image.numpy()).save(tmp_path / "a.png")
    explained = explain_image(network(), str(tmp_path / "a.png"), tmp_path, window=8, context=32)
    numbers = json.loads(explained.numbers.read_text())
    row = numbers["input"]["top"] + numbers["window"]["top"] / 2
    column = numbers["input"]["left"] + numbers["window"]["left"] / 2
    assert 38 <= row <= 46
    assert 18 <= column <= 26


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": "cofee"}, "no photograph 'cofee': did you mean coffee"),
        ({"image": "coffee", "place": (999, 0)}, "row 999, column 0 are not in the input"),
        ({"image": "coffee", "window": 100, "context": 20}, "a window of 100 pixels of the output must lie"),
    ],
)
def test_wrong_input_is_one_sentence(arguments: dict, message: str, tmp_path: Path):
    with pytest.raises(InputError, match=message):
        explain_image(network(), output=tmp_path, **arguments)


def test_other_networks_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match="for super-resolution networks"):
        explain_image(timm.create_model("pmnet_small"), "coffee", tmp_path)


def test_the_command_line(tmp_path: Path, run_tool):
    save_file(timm.create_model("cfsr_x2").state_dict(), tmp_path / "cfsr.safetensors")
    weights = ["--model", "cfsr_x2", "--checkpoint", str(tmp_path / "cfsr.safetensors")]
    sizes = ["--window", "4", "--context", "8", "--output", str(tmp_path)]
    status, printed, _ = run_tool("explain.py", "lam", "chelsea", *weights, *sizes)
    assert status == 0
    assert printed.startswith("diffusion index ")
    assert (tmp_path / "chelsea_lam.png").is_file()
    status, _, errors = run_tool("explain.py", "lam", "nobody", *weights)
    assert (status, len(errors.splitlines())) == (2, 1)
    assert run_tool("explain.py", "lam", "coffee", *weights, "--window", "1")[0] == 2
