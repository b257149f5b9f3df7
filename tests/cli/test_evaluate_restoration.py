"""`tools/evaluate.py` on folders of images, by configuration and by the name of a network."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from scipy.io import savemat

import visionattn
from visionattn.data.degradations.resize import bicubic_low_resolution, modcrop
from visionattn.data.images import read_image, to_pil
from visionattn.tasks.restoration.metrics import psnr, ssim
from visionattn.tasks.restoration.task import restore

Run = Callable[..., tuple[object, str, str]]
CFSR = {"embed_dim": 8, "depths": [1], "kernel_size": 3}


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    tmp_path = tmp_path / "a: folder, [of] images"
    (tmp_path / "HR").mkdir(parents=True)
    (tmp_path / "LR").mkdir()
    for name, height, width in [("baby", 52, 41), ("bird", 48, 60)]:
        small = torch.rand(1, 3, 8, 8)
        large = torch.nn.functional.interpolate(small, (height, width), mode="bicubic")[0].clamp(0, 1)
        to_pil((large * 255).to(torch.uint8)).save(tmp_path / f"HR/{name}.png")
        truth = modcrop(read_image(tmp_path / f"HR/{name}.png"), 2)
        to_pil(bicubic_low_resolution(truth, 2)).save(tmp_path / f"LR/{name}x2.png")
    return tmp_path / "HR", tmp_path / "LR"


@pytest.fixture
def weights(tmp_path: Path) -> str:
    path = tmp_path / "cfsr.safetensors"
    save_file(timm.create_model("cfsr_x2", **CFSR).state_dict(), path)
    return str(path)


def figures(printed: str) -> dict[str, float]:
    return {name: float(value) for name, value in (line.split(": ") for line in printed.splitlines())}


def arguments(folders: tuple[Path, Path], weights: str) -> list[str]:
    kwargs = "model.kwargs={embed_dim: 8, depths: [1], kernel_size: 3}"
    pairs = ["--data", str(folders[0]), "--inputs", str(folders[1]), "--template", "{}x2"]
    return ["cfsr_x2", "--checkpoint", weights, *pairs, kwargs, "train.workers=0"]


def test_a_checkpoint_is_judged_on_a_pair_of_folders(
    run_tool: Run, folders: tuple[Path, Path], weights: str, tmp_path: Path
):
    table = tmp_path / "out/figures.csv"
    status, printed, errors = run_tool("evaluate.py", *arguments(folders, weights), "--csv", str(table))
    assert status == 0, errors
    means = figures(printed)
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["baby", "bird"]
    for name, mean in means.items():
        assert np.mean([float(row[name]) for row in rows]) == pytest.approx(mean, rel=1e-5)

    # The protocol by hand: restored, cropped by the scale, on luma.
    network = timm.create_model("cfsr_x2", **CFSR).eval()
    visionattn.load_checkpoint(network, weights)
    for row in rows:
        truth = modcrop(read_image(folders[0] / f"{row['name']}.png"), 2)
        restored = restore(network, to_pil(read_image(folders[1] / f"{row['name']}x2.png")))
        image = torch.from_numpy(np.array(restored)).permute(2, 0, 1)
        assert float(row["psnr_y"]) == pytest.approx(psnr(image, truth, border=2, luma=True))
        assert float(row["ssim_y"]) == pytest.approx(ssim(image, truth, border=2, luma=True))


def test_the_self_ensemble_and_rgb_are_other_numbers(run_tool: Run, folders: tuple[Path, Path], weights: str):
    plain = figures(run_tool("evaluate.py", *arguments(folders, weights))[1])
    mean_of_8 = figures(run_tool("evaluate.py", *arguments(folders, weights), "--self-ensemble")[1])
    assert mean_of_8.keys() == plain.keys()
    assert mean_of_8["psnr_y"] != plain["psnr_y"]
    status, printed, _ = run_tool(
        "evaluate.py", *arguments(folders, weights), "metric=rgb", "--require", "psnr_rgb>=90"
    )
    assert status == 1
    assert set(figures(printed)) == {"psnr_rgb", "ssim_rgb", "gain_over_bicubic"}


def test_inputs_are_made_where_none_are_given(run_tool: Run, folders: tuple[Path, Path], weights: str):
    stored = figures(run_tool("evaluate.py", *arguments(folders, weights))[1])
    made = [a for a in arguments(folders, weights) if a not in ("--inputs", str(folders[1]))]
    assert figures(run_tool("evaluate.py", *made)[1]) == stored


def test_jpeg_is_judged_with_its_blocks(run_tool: Run, folders: tuple[Path, Path], tmp_path: Path):
    path = tmp_path / "same.safetensors"
    options = {**CFSR, "upscale": 1, "task": "jpeg", "in_chans": 1}
    save_file(timm.create_model("cfsr_x2", **options).state_dict(), path)
    kwargs = "model.kwargs={embed_dim: 8, depths: [1], kernel_size: 3, upscale: 1, task: jpeg, in_chans: 1}"
    status, printed, errors = run_tool(
        "evaluate.py", "cfsr_x2", "--checkpoint", str(path), "--data", str(folders[0]), kwargs,
        "train.workers=0", "data.eval_degradations=[{name: jpeg, quality: 10}]",
    )  # fmt: skip
    assert status == 0, errors
    assert set(figures(printed)) == {"psnr_y", "ssim_y", "psnr_b_y", "gain_over_input"}


def test_cubes_are_judged_by_their_spectra(run_tool: Run, tmp_path: Path):
    network = timm.create_model("hsdt_s", embed_dim=4, in_chans=6)
    save_file(network.state_dict(), tmp_path / "hsdt.safetensors")
    (tmp_path / "icvl").mkdir()
    for name in ("a", "b"):
        truth = torch.rand(16, 20, 6).numpy()
        noisy = truth + 0.1 * torch.randn(16, 20, 6).numpy()
        savemat(tmp_path / f"icvl/{name}.mat", {"gt": truth, "input": noisy})
    status, printed, errors = run_tool(
        "evaluate.py", "hsdt_s", "--checkpoint", str(tmp_path / "hsdt.safetensors"), "train.workers=0",
        "--data", str(tmp_path / "icvl"), "--inputs", str(tmp_path / "icvl"),
        "model.kwargs={embed_dim: 4, in_chans: 6}",
    )  # fmt: skip
    assert status == 0, errors
    assert set(figures(printed)) == {"mpsnr", "mssim", "sam", "gain_over_input"}


def test_wrong_input_is_one_sentence(run_tool: Run, folders: tuple[Path, Path], weights: str, tmp_path: Path):
    given = arguments(folders, weights)

    def says(*changed: str) -> str:
        status, printed, errors = run_tool("evaluate.py", *changed)
        assert (status, printed) == (2, "")
        assert errors.count("\n") == 1
        return errors

    assert "hat_s_x4 has no weights that can be downloaded: give --checkpoint" in says("hat_s_x4")
    assert "there is no configuration file hat_x44" in says("hat_x44", "--checkpoint", weights)
    without = [a for a in given if a not in ("--template", "{}x2")]
    assert "2 of 2 images in" in says(*without)
    to_pil(torch.zeros(3, 5, 5, dtype=torch.uint8)).save(folders[1] / "birdx2.png")
    assert "48x60 pixels, which is not 2 times the 5x5 of its input" in says(*given)
    (folders[1] / "birdx2.png").write_text("not an image")
    assert "1 of 2 images cannot be used: " in says(*given)
    (folders[1] / "birdx2.png").unlink()
    assert "1 of 2 images in" in says(*given)


def test_a_task_without_figures_of_single_samples_says_so(run_tool: Run, tmp_path: Path):
    weights = tmp_path / "vit.safetensors"
    save_file(timm.create_model("test_vit", img_size=32, num_classes=10).state_dict(), weights)
    status, printed, errors = run_tool(
        "evaluate.py", "test_vit", "--checkpoint", str(weights), "--csv", str(tmp_path / "rows.csv"),
        "data.source=digits", "data.image_size=32", "model.kwargs={img_size: 32}", "train.workers=0",
    )  # fmt: skip
    assert status == 2
    assert "top1" in printed
    assert "there are no figures of single samples to write" in errors
    assert not (tmp_path / "rows.csv").exists()


def test_unknown_metrics_are_refused_before_the_evaluation(
    run_tool: Run, folders: tuple[Path, Path], weights: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("visionattn.engine.loop.evaluate", lambda task: pytest.fail("evaluated"))
    for text, sentence in (
        ("psnr>=30", "there is no metric 'psnr' to require: did you mean psnr_y"),
        ("top1>=30", "there is no metric 'top1' to require: valid are gain_over_bicubic, psnr_y and ssim_y"),
        ("psnr_y>30", "a requirement reads METRIC>=VALUE"),
    ):
        status, printed, errors = run_tool("evaluate.py", *arguments(folders, weights), "--require", text)
        assert (status, printed) == (2, "")
        assert sentence in errors
