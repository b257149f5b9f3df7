"""Recognising, converting and exporting checkpoints, as users type it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from visionattn.checkpoints import read_checkpoint, save_official

Run = Callable[..., tuple[object, str, str]]
SIZES: dict[str, Any] = {"embed_dim": 8, "depths": (1,), "fused": True}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_official(timm.create_model("cfsr_x2", **SIZES), tmp_path / "CFSR_x2.pth")
    return tmp_path / "CFSR_x2.pth"


def test_what_a_checkpoint_is(run_tool: Run, checkpoint: Path):
    status, printed, _ = run_tool("convert.py", str(checkpoint))
    assert status == 0
    first, second = printed.splitlines()[:2]
    assert first == 'timm.create_model("cfsr_x2", embed_dim=8, depths=(1,), fused=True)'
    assert second == "weights in the authors' layout, under 'params'"
    found = json.loads(run_tool("convert.py", str(checkpoint), "--json")[1])
    assert (found["name"], found["arguments"]["depths"], found["official"]) == ("cfsr_x2", [1], True)


def test_there_and_back(run_tool: Run, checkpoint: Path, tmp_path: Path):
    ours, back = tmp_path / "ours.safetensors", tmp_path / "back.pth"
    assert run_tool("convert.py", str(checkpoint), str(ours))[0] == 0
    assert run_tool("convert.py", str(ours), str(back), "--to-official")[0] == 0
    first, last = read_checkpoint(checkpoint)["params"], read_checkpoint(back)["params"]
    assert first.keys() == last.keys()
    assert all(torch.equal(first[name], last[name]) for name in first)
    assert run_tool("convert.py", str(checkpoint), str(tmp_path / "folder"))[0] == 0
    net = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True)
    assert torch.equal(net.state_dict()["conv_first.bias"], first["conv_first.bias"])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["absent.pth"], "there is no checkpoint absent.pth"),
        (["{file}", "{folder}/a.pth"], "a.pth must end in .safetensors or nothing (a folder)"),
        (
            ["{file}", "{folder}/a.safetensors", "--model", "cfsr_x9"],
            "unknown network 'cfsr_x9': did you mean",
        ),
        (["{file}", "{folder}/a.safetensors", "--model", "cfsr_x3"], "does not fit CFSR"),
        (["{file}", "{folder}/a.safetensors", "depth"], "reads key=value, but 'depth' was given"),
        (["{file}", "{folder}/a.safetensors", "width=3"], "cannot build cfsr_x2 with"),
    ],
)
def test_wrong_input_gets_one_sentence(
    arguments: list[str], sentence: str, run_tool: Run, checkpoint: Path, tmp_path: Path
):
    given = [text.format(file=checkpoint, folder=tmp_path) for text in arguments]
    status, printed, error = run_tool("convert.py", *given)
    assert status == 2
    assert printed == ""
    assert sentence in error
    assert len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == [checkpoint]


def test_export(run_tool: Run, checkpoint: Path, tmp_path: Path):
    program = tmp_path / "net.pt2"
    status, printed, _ = run_tool("export.py", str(checkpoint), str(program), "--size", "16", "24")
    assert status == 0
    assert "1x16x24" in printed
    loaded = torch.export.load(program).module()
    assert loaded(torch.rand(1, 3, 16, 24)).shape == (1, 3, 32, 48)

    status, _, error = run_tool("export.py", str(checkpoint), str(tmp_path / "net.txt"))
    assert status == 2
    assert "end in .pt2, but net.txt was given" in error
    status, _, error = run_tool("export.py", str(tmp_path / "no.pth"), str(program))
    assert status == 2
    assert "there is no checkpoint" in error
    status, _, error = run_tool("export.py", str(checkpoint))
    assert status == 2
    assert "name a CHECKPOINT and a FILE, or --table" in error


def test_the_table_of_exports(run_tool: Run, tmp_path: Path):
    table = tmp_path / "export.md"
    given = ["--table", str(table), "--networks", "cfsr_x2"]
    assert run_tool("export.py", *given, "--format", "program")[0] == 0
    assert "| `cfsr_x2` | yes | yes |" in table.read_text()
    assert run_tool("export.py", "--table", str(table), "--networks", "cfsr_x9")[0] == 2
    status, _, errors = run_tool("export.py", *given, "--format", "onnx")
    assert status == 2
    assert "other formats" in errors
