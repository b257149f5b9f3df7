"""What command lines ask of every task through its interface, and the mode of networks afterwards."""

from __future__ import annotations

from pathlib import Path

import families
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from visionattn import tasks
from visionattn.checkpoints import save_checkpoint
from visionattn.cli import convert, train
from visionattn.engine.network import evaluating
from visionattn.engine.task import NamedImages
from visionattn.errors import InputError


@pytest.fixture
def weights(tmp_path: Path) -> str:
    net = timm.create_model("test_vit", img_size=32, num_classes=10)
    save_file(net.state_dict(), tmp_path / "vit.safetensors")
    return str(tmp_path / "vit.safetensors")


OPTIONS = ["data.source=digits", "data.image_size=32", "model.kwargs={img_size: 32}"]


def test_named_images_are_options_of_the_task_that_takes_such(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_checkpoint(families.small("hat_s_x2"), file)
    named = NamedImages("truths", "inputs", "{}x2", self_ensemble=True)
    config = tasks.load_trained_config("hat_s_x2", ["data.eval_template='{}y'"], file, named)
    data = config.model_dump()["data"]
    assert (data["source"], data["eval_gt"], data["eval_lq"]) == ("folders", ["truths"], ["inputs"])
    assert data["eval_template"] == "{}y"  # what is given as an option wins
    assert config.model_dump()["self_ensemble"]
    plain = tasks.load_trained_config("hat_s_x2", [], file, NamedImages())
    assert plain.model_dump()["data"]["source"] == "photographs"


def test_other_tasks_refuse_named_images(weights: str) -> None:
    with pytest.raises(InputError, match="judges the images of its configuration alone"):
        tasks.load_trained_config("test_vit", OPTIONS, weights, NamedImages("truths"))


def test_a_classifier_shows_its_names_the_most_probable_first(weights: str) -> None:
    task = tasks.create_task(tasks.load_trained_config("test_vit", OPTIONS, weights))
    image = Image.new("RGB", (40, 30), "teal")
    shown = task.show(image)
    assert sorted(name for name, _ in shown) == list("0123456789")
    assert [share for _, share in shown] == sorted((share for _, share in shown), reverse=True)
    assert shown[:3] == task.predict([image])[0][:3]


def test_a_network_is_evaluated_and_left_as_it_was() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Dropout())

    def fail() -> None:
        with evaluating(network):
            assert not network[1].training
            assert not network(torch.ones(2)).requires_grad
            raise ZeroDivisionError

    for training in (True, False):
        network.train(training)
        with pytest.raises(ZeroDivisionError):
            fail()
        assert network[1].training is training


def test_options_stand_before_or_after_flags() -> None:
    parsed = convert.parse_arguments(["a.pth", "b.safetensors", "--model", "nat_mini", "kernel_size=5"])
    assert (parsed.target, parsed.model, parsed.overrides) == ("b.safetensors", "nat_mini", ["kernel_size=5"])
    parsed = train.parse_arguments(["a.yaml", "x=1", "--options", "y=2"])
    assert parsed.overrides == ["x=1", "y=2"]
