from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import save_file

import visionattn  # noqa: F401  (registers the networks)
from visionattn import tasks
from visionattn.data.images import ImageError
from visionattn.engine.config import parse_config
from visionattn.engine.run_folder import RunFolder
from visionattn.errors import InputError
from visionattn.predict.files import predict_files
from visionattn.tasks.restoration.task import RestorationConfig

TOOL = Path(__file__).parents[2] / "tools/predict.py"
TINY = {
    "embed_dim": 12,
    "depths": [1],
    "num_heads": 2,
    "window_size": 8,
    "compress_ratio": 3,
    "squeeze_factor": 6,
}


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    config = parse_config(
        {
            "task": "restoration",
            "model": {"name": "hat_s_x2", "kwargs": TINY},
            "schedule": {"steps": 1},
            "output": str(tmp_path / "run"),
        },
        RestorationConfig,
    )
    folder = RunFolder(config.run_folder)
    folder.start(config, "cpu")
    folder.write_weights("best", tasks.create_task(config).model, None, {})
    return config.run_folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (20, 14), "teal").save(folder / "a.png")
    Image.new("L", (9, 9), 100).save(folder / "a.bmp")
    (folder / "broken.png").write_text("not an image")
    Image.new("RGB", (3, 3)).save(folder / "small.png")
    return folder


def test_a_folder_is_enlarged_and_what_cannot_be_is_named(run_folder: Path, images: Path, tmp_path: Path):
    done = run(run_folder, images, "--output", tmp_path / "out")
    assert done.returncode == 2
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["a.bmp_x2.png", "a.png_x2.png"]
    with Image.open(tmp_path / "out/a.png_x2.png") as enlarged:
        assert (enlarged.size, enlarged.mode) == ((40, 28), "RGB")
    assert "broken.png: not an image" in done.stderr
    assert "small.png: 3x3 pixels are too small: 5 per side are needed" in done.stderr
    assert "2 of 4 images could not be used" in done.stderr
    assert "Traceback" not in done.stderr


def test_one_image(run_folder: Path, images: Path, tmp_path: Path):
    ((file, written),) = predict_files(str(run_folder), images / "a.png", output=tmp_path / "out")
    assert file == images / "a.png"
    assert written == tmp_path / "out/a_x2.png"
    assert isinstance(written, Path)
    assert written.is_file()


def test_images_are_classified_by_a_network_and_its_checkpoint(images: Path, tmp_path: Path):
    import timm

    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "weights.safetensors")
    results = dict(predict_files("test_vit", images, checkpoint=str(tmp_path / "weights.safetensors"), top=3))
    assert isinstance(results[images / "broken.png"], ImageError)
    assert not (tmp_path / "predictions").exists()
    named = results[images / "a.png"]
    assert isinstance(named, list)
    assert len(named) == 3
    assert named[0][1] >= named[1][1] >= named[2][1] > 0
    assert not (tmp_path / "predictions").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nonsense_x2", "."), "unknown network 'nonsense_x2'"),
        (("hat_s_x2", "."), "hat_s_x2 has no weights that can be downloaded"),
        (("hat_s_x2", ".", "--checkpoint", "nowhere.pth"), "there is no checkpoint nowhere.pth"),
    ],
)
def test_wrong_input_is_one_sentence(arguments: tuple[str, ...], message: str, images: Path):
    source, _, *rest = arguments
    with pytest.raises(InputError, match=message):
        list(predict_files(source, images, checkpoint=rest[1] if rest else None))


def test_the_command_line_explains_itself_and_its_errors(images: Path):
    assert "examples:" in run("--help").stdout
    done = run("hat_s_x2", images / "missing")
    assert done.returncode == 2
    assert done.stderr == f"error: there is no image or folder {images / 'missing'}\n"
