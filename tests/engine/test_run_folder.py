"""Files of a run: whole at any moment, safe to read, with the rows of a killed run dropped."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from visionattn.checkpoints import save_checkpoint, save_folder
from visionattn.engine.config import RunConfig
from visionattn.engine.recorder import CsvLog
from visionattn.engine.run_folder import RunFolder, find_weights, read_state, run_of, trained_weights
from visionattn.errors import InputError


class Interrupted(Exception):
    pass


def test_training_state_is_data_only(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_state({"step": 3, "x": torch.ones(2), "best": {"value": 1.0}})
    state = folder.find_state("auto")
    assert state is not None
    assert read_state(state)["step"] == 3
    torch.save(Interrupted(), state)
    with pytest.raises(InputError, match="cannot read the training state"):
        read_state(state)


def test_resume_choices(tmp_path: Path) -> None:
    run, other = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "other")
    assert run.find_state(None) is None
    assert run.find_state("auto") is None
    with pytest.raises(InputError, match="cannot resume from"):
        run.find_state(str(other.path))
    other.write_state({"step": 1})
    assert run.find_state(str(other.path)) == other.find_state("auto")
    with pytest.raises(InputError, match="already holds a run: continue it with resume=auto"):
        other.find_state(None)


def test_weights_load_anywhere_also_tied_ones(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    folder = RunFolder(tmp_path)
    with pytest.raises(InputError, match="no trained weights"):
        trained_weights(tmp_path)
    folder.write_weights("last", model, None, {"step": 1})
    assert trained_weights(tmp_path).name == "last.safetensors"
    folder.write_weights("best", model, None, {"step": 1})
    torch.testing.assert_close(load_file(trained_weights(tmp_path)), dict(model.state_dict()))


def test_table_grows_and_drops_what_a_killed_run_wrote(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    log = CsvLog(path, step=0)
    for step in (1, 2, 3):
        log.append({"step": step, "split": "train", "loss": 1 / step})
    log.append({"step": 3, "split": "eval", "top1": 50.0})
    with path.open("a") as file:
        file.write("1")  # killed within a line
    CsvLog(path, step=2).append({"step": 3, "split": "train", "loss": 0.25})
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = [(row["step"], row["loss"], row["top1"]) for row in rows]
    assert columns == [("1", "1.0", ""), ("2", "0.5", ""), ("3", "0.25", "")]


def test_the_evaluation_that_is_to_come_again_is_dropped_from_the_table(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    log = CsvLog(path, step=0)
    for step in (1, 2):
        log.append({"step": step, "split": "train", "loss": 1.0})
        log.append({"step": step, "split": "eval", "top1": 50.0})
    CsvLog(path, step=2, unjudged=True)
    with path.open(newline="") as file:
        assert [(row["step"], row["split"]) for row in csv.DictReader(file)] == [
            ("1", "train"), ("1", "eval"), ("2", "train"),
        ]  # fmt: skip


def test_weights_are_found_in_files_and_folders(tmp_path: Path) -> None:
    network = timm.create_model("test_vit", num_classes=3)
    RunFolder(tmp_path / "run").write_weights("last", network, None, {"step": 1})
    save_folder(network, tmp_path / "hub")
    for source, file in (
        ("run", "run/checkpoints/last.safetensors"),
        ("run/checkpoints/last.safetensors", "run/checkpoints/last.safetensors"),
        ("hub", "hub/model.safetensors"),
    ):
        found, texts = find_weights(tmp_path / source)
        assert found == tmp_path / file
        assert (texts["architecture"], texts["model_args"]) == ("test_vit", '{"num_classes": 3}')
    with pytest.raises(InputError, match=r"there is no checkpoint .*absent.pth"):
        find_weights(tmp_path / "absent.pth")


def test_a_damaged_description_is_one_sentence(tmp_path: Path) -> None:
    save_checkpoint(nn.Linear(2, 2), tmp_path / "w.safetensors", {"config": "{"})
    with pytest.raises(InputError, match=r"cannot use .*w.safetensors: Expecting property name"):
        run_of(tmp_path / "w.safetensors")
    save_checkpoint(nn.Linear(2, 2), tmp_path / "w.safetensors", {"config": "[1]"})
    with pytest.raises(InputError, match="must hold `key: value` pairs, but is a list"):
        run_of(tmp_path / "w.safetensors")


def test_a_configuration_of_the_users_own_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("# mine")
    config = RunConfig.model_validate({"task": "a", "model": {"name": "b"}, "schedule": {"steps": 1}})
    with pytest.raises(InputError, match=r"holds a config\.yaml that no run wrote"):
        RunFolder(tmp_path).start(config, "cpu")
    assert (tmp_path / "config.yaml").read_text() == "# mine"
    RunFolder(tmp_path / "run").start(config, "cpu")
    RunFolder(tmp_path / "run").start(config, "cpu")  # killed before it saved anything


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("environment.json", "{", r"cannot read .*environment\.json, which is none of a run"),
        ("environment.json", "5", "it holds a int"),
        ("metrics.csv", "a,b\n1,2\n", r"metrics\.csv is not the table of a run"),
        ("metrics.csv", "step,epoch\nx,2\n", r"metrics\.csv is not the table of a run"),
    ],
)
def test_files_of_others_in_the_folder_are_named(
    tmp_path: Path, name: str, content: str, sentence: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=sentence):
        CsvLog(tmp_path / name, 9) if name == "metrics.csv" else RunFolder(tmp_path)._starts()
