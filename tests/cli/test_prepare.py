from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from visionattn.data.degradations.resize import bicubic_low_resolution
from visionattn.data.files import pair_files
from visionattn.data.images import read_image, to_pil
from visionattn.data.paired import PairedImages

Run = Callable[..., tuple[object, str, str]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "HR").mkdir()
    (tmp_path / "X2").mkdir()
    image = torch.randint(0, 256, (3, 50, 64), dtype=torch.uint8)
    to_pil(image).save(tmp_path / "HR/0001.png")
    to_pil(bicubic_low_resolution(image, 2)).save(tmp_path / "X2/0001x2.png")
    return tmp_path


def test_pieces_of_truths_and_inputs_are_pairs(run_tool: Run, folder: Path):
    assert run_tool(
        "prepare.py", "pieces", f"{folder}/HR", f"{folder}/HR_sub", "--size", "32", "--step", "16"
    ) == (
        0,
        f"9 images in {folder}/HR_sub\n",
        "",
    )
    run_tool("prepare.py", "pieces", f"{folder}/X2", f"{folder}/X2_sub", "--size", "16", "--step", "8")
    truths, inputs = pair_files(folder / "HR_sub", folder / "X2_sub")
    assert list(truths) == [f"0001_s{number:03d}" for number in range(1, 10)]
    whole = read_image(folder / "HR/0001.png")
    small = read_image(folder / "X2/0001x2.png")
    pairs = PairedImages(truths, 2, inputs)
    corners = [(top, left) for top in (0, 16, 18) for left in (0, 16, 32)]  # the last rows end at the border
    for (top, left), pair in zip(corners, pairs, strict=True):  # type: ignore[call-overload]
        assert torch.equal(pair["gt"], whole[:, top : top + 32, left : left + 32] / 255)
        y, x = min(top // 2, 9), left // 2
        assert torch.equal(pair["lq"], small[:, y : y + 16, x : x + 16] / 255)


def test_pieces_of_images_whose_sizes_stand_in_their_names(run_tool: Run, tmp_path: Path):
    (tmp_path / "in").mkdir()
    names = ("wall_64x48", "wall_64x40", "door_x4")
    for name in names:
        to_pil(torch.randint(0, 256, (3, 48, 64), dtype=torch.uint8)).save(tmp_path / f"in/{name}.png")
    arguments = ("pieces", f"{tmp_path}/in", f"{tmp_path}/out", "--size", "32", "--step", "16")
    assert run_tool("prepare.py", *arguments)[1] == f"18 images in {tmp_path}/out\n"
    expected = {f"{name}_s{number:03d}.png" for name in names for number in range(1, 7)}
    assert {file.name for file in (tmp_path / "out").iterdir()} == expected


def test_lmdb(run_tool: Run, folder: Path):
    pytest.importorskip("lmdb")
    status, printed, _ = run_tool("prepare.py", "lmdb", f"{folder}/HR", f"{folder}/HR.lmdb")
    assert (status, printed) == (0, f"1 images in {folder}/HR.lmdb\n")
    pair = PairedImages(*pair_files(folder / "HR.lmdb")[:1], 2)[0]
    assert torch.equal(pair["gt"], read_image(folder / "HR/0001.png") / 255)


def test_wrong_input_is_one_sentence_and_leaves_nothing(run_tool: Run, folder: Path):
    def says(*arguments: str) -> str:
        status, printed, errors = run_tool("prepare.py", *arguments)
        assert (status, printed, errors.count("\n")) == (2, "", 1)
        return errors

    assert "there is no folder nowhere" in says("pieces", "nowhere", f"{folder}/out")
    assert "50x64 pixels are less than 480" in says("pieces", f"{folder}/HR", f"{folder}/out")
    assert "something at" in says("pieces", f"{folder}/HR", f"{folder}/X2", "--size", "8")
    assert "at least 1, got 8 and 0" in says("pieces", f"{folder}/HR", "out", "--size", "8", "--step", "0")
    assert "must be called *.lmdb" in says("lmdb", f"{folder}/HR", f"{folder}/out")
    (folder / "HR/0002.png").write_text("not an image")
    assert "0002.png: not an image" in says("pieces", f"{folder}/HR", f"{folder}/out", "--size", "8")
    assert sorted(path.name for path in folder.iterdir()) == ["HR", "X2"]


def test_help(run_tool: Run):
    assert "examples:" in run_tool("prepare.py", "--help")[1]
