"""A trained network is the same wherever it is used: in its run, as a file alone, converted, exported."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from visionattn import tasks
from visionattn.checkpoints import convert_checkpoint, load_network
from visionattn.engine.config import parse_config
from visionattn.engine.loop import evaluate
from visionattn.engine.network import identify_weights
from visionattn.engine.run_folder import RunFolder, describe_run, find_weights
from visionattn.engine.task import Task
from visionattn.errors import InputError
from visionattn.predict.files import open_restorer, predict_files
from visionattn.tasks.dense.segmentation import SegmentationTask

Run = Callable[..., tuple[object, str, str]]
# Arguments that no weight tells, other than the published ones; the more of them, the better.
UNTOLD: dict[str, dict[str, Any]] = {
    "agent_deit": {"img_size": 64, "global_pool": "avg"},
    "agent_swin": {"window_size": 4, "always_shift": True},
    "agent_cswin": {"stripe": 3, "num_heads": (2, 4, 4, 8)},
    "inline_deit": {"img_size": 64, "global_pool": "avg"},
    "inline_cswin": {"stripe": 3},
    "biformer": {"n_win": 3, "topks": (1, 1, 2, -2), "head_dim": 16},
    "nat_isotropic": {"kernel_size": 3, "dilations": ((1, 2, 1, 2),)},
    "nat": {"kernel_size": 3, "dilations": ((1,), (2, 1), (1,), (1,)), "global_pool": "max"},
    "l2vit": {"window_size": 3},
    "ninformer": {"img_size": (32, 192), "patch_size": 16},
    "catanet": {"num_heads": 2},
    "cfsr": {"img_range": 2.0},
    "craft": {"split_size": (4, 8)},
    "hat": {"conv_scale": 0.5},
    "hsdt": {"query": "self", "in_chans": 3},
    "rgt": {"split_size": (4, 8)},
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of two small training and held-out images each."""
    folder, generator = tmp_path_factory.mktemp("pictures"), torch.Generator().manual_seed(0)
    for split in ("train", "val"):
        for name in ("a", "b"):
            (folder / split / name).mkdir(parents=True)
            for index in range(2):
                pixels = torch.randint(0, 256, (40, 48, 3), dtype=torch.uint8, generator=generator)
                Image.fromarray(pixels.numpy()).save(folder / split / name / f"{index}.png")
    return folder


def make_task(name: str, pictures: Path, output: Path) -> Task:
    """A task with a miniature whose weights are not the initial ones."""
    key = families.prefix(name)
    kwargs = {**families.SMALL[key], **next((v for k, v in UNTOLD.items() if name.startswith(k)), {})}
    base: dict[str, Any] = {
        "model": {"name": name, "kwargs": kwargs},
        "schedule": {"steps": 1},
        "train": {"batch_size": 2, "workers": 0},
        "output": str(output),
    }
    net: Any = families.small(name, device="meta")
    info = getattr(net, "info", None)
    if info is not None:
        places = {"train_gt": str(pictures / "train/a"), "eval_gt": str(pictures / "val/a")}
        steps = [] if info.upscale > 1 else [{"name": "gaussian_noise", "sigma": 25}]
        base |= {"task": "restoration", "data": {"source": "folders", **places, "degradations": steps}}
    else:
        fixed = net.pretrained_cfg["fixed_input_size"] and net.pretrained_cfg["input_size"][1]
        size = kwargs.get("img_size", fixed or 48)
        data = {"root": str(pictures), "image_size": list(size) if isinstance(size, tuple) else size}
        base |= {
            "task": "classification",
            "data": {**data, "mean": [0.4] * 3, "std": [0.2] * 3, "crop_pct": 1.0},
        }
    task = tasks.create_task(parse_config(base, tasks.config_class(base)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in task.model.parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return task


def finish(task: Task) -> Path:
    """Leave the run folder of a task as its training would."""
    folder = RunFolder(task.config.run_folder)
    folder.start(task.config, "cpu")
    facts = {**task.description(), **describe_run(task.config), "step": 1}
    return task.config.run_folder / folder.write_weights("best", task.model, None, facts)


def judged(source: Path | str, *overrides: str) -> dict[str, float]:
    config = tasks.load_trained_config(source, ["train.workers=0", *overrides])
    return evaluate(tasks.create_task(config))


@pytest.mark.parametrize("name", families.FAMILIES)
def test_a_run_its_file_and_what_is_converted_have_one_metric(name: str, pictures: Path, tmp_path: Path):
    task = make_task(name, pictures, tmp_path / "run")
    expected = evaluate(task)
    file = finish(task)
    alone = tmp_path / "alone.safetensors"
    shutil.copy(file, alone)
    assert judged(tmp_path / "run") == expected
    assert judged(alone) == expected

    # Converted, the network is known and the run is not: its data is named anew, its preprocessing is not.
    restores = task.config.task == "restoration"
    places = {"data.root": pictures} if not restores else {"data.eval_gt": pictures / "val/a"}
    data = [f"{key}={value}" for key, value in places.items()]
    data += ["data.source=folders", *degraded(task)] if restores else []
    converted = tmp_path / "converted.safetensors"
    convert_checkpoint(file, converted)
    assert judged(converted, *data) == pytest.approx(expected, rel=1e-6)

    # Files of former versions say nothing; their run folder does.
    save_file(load_file(file), file)
    assert judged(file) == expected
    _, texts = find_weights(tmp_path / "run")
    convert_checkpoint(file, tmp_path / "old.safetensors", metadata=texts)
    assert equal(load_network(tmp_path / "old.safetensors")[0], load_network(converted)[0], task)


def degraded(task: Any) -> list[str]:
    return ["data.degradations=[{name: gaussian_noise, sigma: 25}]"] if task.config.data.degradations else []


def equal(a: torch.nn.Module, b: torch.nn.Module, task: Any) -> bool:
    size = (
        task.preprocessing["input_size"] if hasattr(task, "preprocessing") else (task.info.channels, 24, 24)
    )
    x = torch.rand(1, *size)
    with torch.no_grad():
        return torch.equal(a(x), b(x))


def test_tools_take_run_folders_and_files_alike(run_tool: Run, pictures: Path, tmp_path: Path):
    task: Any = make_task("cfsr_x2", pictures, tmp_path / "run")
    file = finish(task)
    photo = pictures / "val/a/0.png"
    written = []
    for index, source in enumerate((tmp_path / "run", file)):
        out = tmp_path / f"out{index}"
        restored = run_tool("restore.py", str(photo), "--model", str(source), "--output", str(out / "r"))
        predicted = run_tool("predict.py", str(source), str(photo), "--output", str(out / "p"))
        explained = run_tool(
            "explain.py",
            "lam",
            str(photo),
            "--model",
            str(source),
            "--context",
            "16",
            "--output",
            str(out / "e"),
        )
        exported = run_tool("export.py", str(source), str(out / "net.pt2"), "--size", "24", "24")
        converted = run_tool("convert.py", str(source), str(out / "net.safetensors"))
        judging = run_tool("evaluate.py", str(source), "train.workers=0")
        for status, _, errors in (restored, predicted, explained, exported, converted, judging):
            assert status == 0, errors
        pictures_there = [out / "r/0_x2.png", out / "p/0_x2.png", out / "e/0_lam.json"]
        written.append([judging[1], *(path.read_bytes() for path in pictures_there)])
        program = torch.export.load(out / "net.pt2").module()
        x = torch.rand(1, 3, 24, 24)
        with torch.no_grad():
            torch.testing.assert_close(program(x), task.model.eval()(x))
            torch.testing.assert_close(load_network(out / "net.safetensors")[0](x), task.model(x))
    assert written[0] == written[1]


def test_a_segmenter_is_used_by_its_file_alone(tmp_path: Path):
    few = {"train": 2, "validation": 1}
    model = {"name": "nat_mini", "kwargs": {**families.SMALL["nat"], "kernel_size": 3}}
    base = {
        "task": "segmentation",
        "model": model,
        "data": {"root": str(tmp_path / "scenes"), "scenes": few, "mean": [0.4] * 3, "std": [0.3] * 3},
        "segmenter": {"channels": 8, "auxiliary_channels": 8},
        "schedule": {"steps": 1},
        "train": {"batch_size": 2, "workers": 0},
        "output": str(tmp_path / "run"),
    }
    task = tasks.create_task(parse_config(base, tasks.config_class(base)))
    assert isinstance(task, SegmentationTask)
    shutil.copy(finish(task), tmp_path / "alone.safetensors")
    picture = next((tmp_path / "scenes/images/validation").iterdir()) if evaluate(task) else tmp_path
    ((_, ours),) = predict_files(str(tmp_path / "run"), picture, output=tmp_path / "a")
    ((_, theirs),) = predict_files(str(tmp_path / "alone.safetensors"), picture, output=tmp_path / "b")
    assert isinstance(ours, Path)
    assert isinstance(theirs, Path)
    assert ours.read_bytes() == theirs.read_bytes()
    # For export and conversion it is the backbone.
    network, found = load_network(tmp_path / "alone.safetensors")
    assert (found.name, found.arguments["kernel_size"]) == ("nat_mini", 3)
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        for got, wanted in zip(network(x), task.model.eval().backbone.body(x), strict=True):
            assert torch.equal(got, wanted)


def test_names_of_classes_travel_with_the_weights(pictures: Path, tmp_path: Path):
    file = finish(make_task("l2vit_t", pictures, tmp_path / "run"))
    convert_checkpoint(file, tmp_path / "converted.safetensors")
    photo = pictures / "val/b/1.png"
    answers = [
        list(predict_files(str(source), photo))
        for source in (tmp_path / "run", tmp_path / "converted.safetensors")
    ]
    assert answers[0] == answers[1]
    assert {name for name, _ in answers[0][0][1]} == {"a", "b"}  # type: ignore[union-attr]


def test_what_no_weight_tells_is_asked_for_by_every_tool(run_tool: Run, pictures: Path, tmp_path: Path):
    task: Any = make_task("hat_x2", pictures, tmp_path / "run")
    bare, photo = tmp_path / "bare.safetensors", str(pictures / "val/a/0.png")
    save_file(load_file(finish(task)), bare)
    asking = {
        "restore.py": [photo, "--model", str(bare), "--output", str(tmp_path / "r")],
        "predict.py": [str(bare), photo, "--output", str(tmp_path / "p")],
        "explain.py": [
            "lam",
            photo,
            "--model",
            str(bare),
            "--context",
            "16",
            "--output",
            str(tmp_path / "e"),
        ],
        "export.py": [str(bare), str(tmp_path / "net.pt2"), "--size", "24", "24"],
        "convert.py": [str(bare), str(tmp_path / "net.safetensors")],
        "evaluate.py": [
            str(bare),
            "data.source=folders",
            f"data.eval_gt={pictures / 'val/a'}",
            "train.workers=0",
        ],
    }
    for tool, arguments in asking.items():
        status, _, errors = run_tool(tool, *arguments)
        prefix = "model.kwargs." if tool == "evaluate.py" else ""
        assert status == 2, tool
        assert f"it is {prefix}conv_scale=0.01 {prefix}img_range=1.0" in errors, tool
        assert errors.count("\n") == 1
    answer = ["conv_scale=0.5", "img_range=1.0"]
    status, printed, errors = run_tool("restore.py", *asking["restore.py"], *answer)
    assert status == 0, errors
    assert run_tool("convert.py", *asking["convert.py"], *answer)[0] == 0
    status, printed, _ = run_tool(
        "evaluate.py", *asking["evaluate.py"], *(f"model.kwargs.{a}" for a in answer)
    )
    assert status == 0
    figures = dict(line.split(": ") for line in printed.splitlines())
    assert float(figures["psnr_y"]) == pytest.approx(evaluate(task)["psnr_y"], rel=1e-5)
    with torch.no_grad():
        x = torch.rand(1, 3, 24, 24)
        theirs = load_network(tmp_path / "net.safetensors")[0](x)
        torch.testing.assert_close(theirs, task.model.eval()(x))


def test_a_name_beside_weights_takes_their_arguments_and_contradicts_no_other(pictures: Path, tmp_path: Path):
    file = finish(make_task("hat_x2", pictures, tmp_path / "run"))
    alone = str(shutil.copy(file, tmp_path / "alone.safetensors"))
    assert identify_weights(alone, "hat_x2").kwargs["conv_scale"] == 0.5
    assert open_restorer("hat_x2", alone).made_with["conv_scale"] == 0.5  # type: ignore[index]
    with pytest.raises(InputError, match=r"alone.safetensors holds weights of hat_x2, not of hat_s_x2"):
        open_restorer("hat_s_x2", alone)
    with pytest.raises(InputError, match="are both weights: give one of them"):
        open_restorer(alone, alone)
    with pytest.raises(InputError, match="states the arguments of its network: conv_scale is too much"):
        open_restorer(str(tmp_path / "run"), None, {"conv_scale": 1.0})


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("hello world\n", r"is no readable checkpoint: .*\(it begins with the text 'hello world'\)"),
        ("", "is no readable checkpoint"),
    ],
)
def test_a_text_in_place_of_weights(
    run_tool: Run, content: str, sentence: str, pictures: Path, tmp_path: Path
):
    (tmp_path / "HAT.pth").write_text(content)
    photo = str(pictures / "val/a/0.png")
    for tool, arguments in (
        ("restore.py", [photo, "--model", str(tmp_path / "HAT.pth")]),
        ("predict.py", ["cfsr_x2", photo, "--checkpoint", str(tmp_path / "HAT.pth")]),
        ("convert.py", [str(tmp_path / "HAT.pth")]),
        ("evaluate.py", [str(tmp_path / "HAT.pth")]),
    ):
        status, _, errors = run_tool(tool, *arguments)
        assert status == 2, tool
        assert errors.count("\n") == 1, errors
        import re

        assert re.search(sentence, errors), errors
