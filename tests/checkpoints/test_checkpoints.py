"""Reading, converting, refusing and writing weights."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import visionattn
from visionattn import checkpoints, load_checkpoint, save_checkpoint
from visionattn.models import biformer, hat

BIFORMER: dict[str, Any] = {"depths": (1, 1, 1, 1), "embed_dims": (32, 32, 32, 64), "n_win": 2}
HAT: dict[str, Any] = {
    "depths": (2,),
    "embed_dim": 12,
    "num_heads": 2,
    "window_size": 8,
    "compress_ratio": 3,
    "squeeze_factor": 3,
}


def backbone(seed: int = 0, **kwargs: Any) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("biformer_tiny", **{**BIFORMER, **kwargs})


def restorer(seed: int = 0, **kwargs: Any) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("hat_x2", **{**HAT, **kwargs})


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


@pytest.fixture
def weights() -> dict[str, Tensor]:
    return backbone(seed=1).state_dict()


# What training code wraps around weights


@pytest.mark.parametrize(
    "key", ["params_ema", "params", "model_ema", "model", "state_dict", "state_dict_ema"]
)
def test_wrappers(key: str, weights: dict[str, Tensor]):
    net = backbone()
    report = load_checkpoint(net, {key: weights, "epoch": 3, "optimizer": {"lr": 0.1}})
    assert not report
    assert same(net, backbone(seed=1))


@pytest.mark.parametrize(
    ("averaged", "plain"),
    [
        ("params_ema", "params"),
        ("model_ema", "model"),
        ("state_dict_ema", "state_dict"),
        ("model_ema", "state_dict"),
    ],
)
def test_averaged_weights_come_first(averaged: str, plain: str, weights: dict[str, Tensor]):
    net = backbone()
    load_checkpoint(net, {plain: backbone(seed=2).state_dict(), averaged: weights})
    assert same(net, backbone(seed=1))


def test_wrappers_in_wrappers_and_the_prefix_of_parallel_training(weights: dict[str, Tensor]):
    net = backbone()
    prefixed = {f"module.module.{name}": value for name, value in weights.items()}
    load_checkpoint(net, {"model": {"state_dict": prefixed}, "args": "none"})
    assert same(net, backbone(seed=1))


def test_entries_that_are_no_weights_are_ignored(weights: dict[str, Tensor]):
    net = backbone()
    assert not load_checkpoint(net, {**weights, "epoch": 7, "version": "1.0"})
    assert same(net, backbone(seed=1))


def test_a_wrapped_model_is_loaded_inside():
    net = nn.DataParallel(backbone())
    load_checkpoint(net, backbone(seed=1).state_dict())
    assert same(net.module, backbone(seed=1))


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, {"model": {"epoch": 3}}])
def test_no_weights_at_all(content: dict[str, Any]):
    with pytest.raises(ValueError, match="holds no weights"):
        load_checkpoint(backbone(), content)


# The names of the families


def test_index_buffers_are_dropped():
    official = restorer(seed=1).state_dict()
    official["relative_position_index_SA"] = torch.zeros(64, 64, dtype=torch.int64)
    official["layers.0.blocks.1.attn.attn_mask"] = torch.zeros(4, 64, 64)
    net = restorer()
    assert not load_checkpoint(net, official)
    assert same(net, restorer(seed=1))


@pytest.mark.parametrize(("family", "build"), [(biformer, backbone), (hat, restorer)])
def test_conversion_leaves_our_names_alone(family: Any, build: Any):
    net = build()
    own = net.state_dict()
    once = family.LAYOUT.checkpoint_filter_fn(own, net)
    twice = family.LAYOUT.checkpoint_filter_fn(once, net)
    for converted in (once, twice):
        assert list(converted) == list(own)
        assert all(torch.equal(converted[name], own[name]) for name in own)


# Networks that lack parts of the checkpoint's


@pytest.mark.parametrize(
    "kwargs", [{"num_classes": 0}, {"features_only": True}, {"features_only": True, "out_indices": (0, 2)}]
)
def test_parts_that_were_left_out_need_no_weights(kwargs: dict[str, Any], weights: dict[str, Tensor]):
    net = backbone(**kwargs)
    assert not load_checkpoint(net, {"model": weights})
    network = net.model if "features_only" in kwargs else net
    for name, value in network.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_a_pruned_network(weights: dict[str, Tensor]):
    net = backbone()
    net.prune_intermediate_layers([1])
    with pytest.raises(ValueError, match="unexpected"):
        load_checkpoint(
            net, weights
        )  # a network of other depth is no pruned one, as far as a plain model tells
    report = load_checkpoint(net, weights, strict=False)
    assert report.unexpected
    assert not report.missing
    for name, value in net.state_dict().items():
        assert torch.equal(value, weights[name]), name


# What does not fit


def test_another_network_is_refused_and_nothing_is_changed():
    net = backbone()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"the state dict does not fit BiFormer: .* missing \(.*unexpected \("
    ):
        load_checkpoint(net, restorer().state_dict())
    with pytest.raises(ValueError, match=r"1 of another shape \(head.fc"):
        load_checkpoint(net, {**backbone(seed=1).state_dict(), "head.fc.bias": torch.zeros(7)})
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_what_is_missing_is_named(weights: dict[str, Tensor]):
    del weights["stem.0.weight"], weights["head.fc.bias"]
    weights["head.extra"] = torch.zeros(1)
    with pytest.raises(
        ValueError, match=r"2 missing \(stem.0.weight, head.fc.bias\); 1 unexpected \(head.extra\)"
    ):
        load_checkpoint(backbone(), weights)


def test_long_lists_of_names_are_cut(weights: dict[str, Tensor]):
    with pytest.raises(ValueError, match=r"\d+ missing \(.*, \.\.\. \d+ more\)") as caught:
        load_checkpoint(backbone(), dict(list(weights.items())[:5]))
    assert len(str(caught.value)) < 400


def test_what_fits_is_loaded_when_not_strict(weights: dict[str, Tensor]):
    net, before = backbone(), backbone()
    weights["head.fc.weight"] = torch.zeros(7, 64)
    del weights["head.fc.bias"]
    weights["other.weight"] = torch.zeros(3)
    report = load_checkpoint(net, weights, strict=False)
    assert report.missing == ("head.fc.bias",)
    assert report.unexpected == ("other.weight",)
    assert report.mismatched == ("head.fc.weight: (7, 64), (1000, 64)",)
    assert torch.equal(net.head.fc.weight, before.head.fc.weight)
    assert torch.equal(net.stem[0].weight, weights["stem.0.weight"])


def test_counters_of_batch_norm_may_be_missing(weights: dict[str, Tensor]):
    # Some exporters leave them out; no output depends on them.
    without = {name: value for name, value in weights.items() if not name.endswith("num_batches_tracked")}
    assert not load_checkpoint(backbone(), without)


# Files


@pytest.mark.parametrize("suffix", ["pth", "pt", "bin", "safetensors"])
@pytest.mark.parametrize("as_text", [False, True])
def test_files(suffix: str, as_text: bool, tmp_path: Path, weights: dict[str, Tensor]):
    path = tmp_path / f"weights.{suffix}"
    if suffix == "safetensors":
        save_file(weights, path)
    else:
        torch.save({"params_ema": weights, "iteration": 5}, path)
    net = backbone()
    load_checkpoint(net, str(path) if as_text else path)
    assert same(net, backbone(seed=1))


def test_the_old_file_format_of_pytorch(tmp_path: Path, weights: dict[str, Tensor]):
    torch.save(weights, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    net = backbone()
    load_checkpoint(net, tmp_path / "old.pth")
    assert same(net, backbone(seed=1))


def test_no_file(tmp_path: Path):
    for path in (tmp_path / "absent.pth", tmp_path):
        with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
            load_checkpoint(backbone(), path)


def damaged_files(folder: Path, weights: dict[str, Tensor]) -> list[Path]:
    whole, safe = folder / "whole.pth", folder / "whole.safetensors"
    torch.save(weights, whole)
    save_file(weights, safe)
    contents = {
        "empty.pth": b"",
        "empty.safetensors": b"",
        "text.pth": b"<html>Sign in to download</html>",
        "text.safetensors": b"<html>Sign in to download</html>",
        "truncated.pth": whole.read_bytes()[: whole.stat().st_size // 2],
        "truncated.safetensors": safe.read_bytes()[: safe.stat().st_size // 2],
        "head.safetensors": safe.read_bytes()[:20],
        "misnamed.safetensors": whole.read_bytes(),
        "misnamed.pth": safe.read_bytes(),
        "zeros.pth": bytes(1000),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    with zipfile.ZipFile(folder / "archive.pth", "w") as archive:
        archive.writestr("readme.txt", "no weights")
    return [*(folder / name for name in contents), folder / "archive.pth"]


def test_damaged_files_are_refused_in_one_sentence(tmp_path: Path, weights: dict[str, Tensor]):
    net = backbone()
    for path in damaged_files(tmp_path, weights):
        with pytest.raises(ValueError, match=r"is no readable checkpoint|is damaged") as caught:
            load_checkpoint(net, path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value), path.name
    assert same(net, backbone())


class RunsCode:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("form", ["zip", "old", "plain"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
def test_files_that_would_run_code_are_refused(form: str, tmp_path: Path, weights: dict[str, Tensor]):
    path, trace = tmp_path / "evil.pth", tmp_path / "it_ran"
    content = {**weights, "config": RunsCode(trace)}
    if form == "plain":
        path.write_bytes(pickle.dumps(RunsCode(trace)))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(ValueError, match="could run code, so it is refused"):
        load_checkpoint(backbone(), path)
    assert not trace.exists()


def test_a_file_of_something_else(tmp_path: Path):
    torch.save([torch.zeros(3)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds a list, not a state dict"):
        load_checkpoint(backbone(), tmp_path / "list.pth")


# Saving


@pytest.mark.parametrize("build", [backbone, restorer])
def test_saved_weights_load_strictly(build: Any, tmp_path: Path):
    path = tmp_path / "new" / "folder" / "weights.safetensors"
    save_checkpoint(build(seed=1), path, metadata={"epoch": "3"})
    with safe_open(str(path), framework="pt") as file:
        found = file.metadata()
    assert (found["format"], found["epoch"]) == ("pt", "3")
    assert found["architecture"] == build(seed=1).pretrained_cfg["architecture"]
    net = build()
    assert not load_checkpoint(net, path)
    assert same(net, build(seed=1))


def test_tied_and_strided_weights_are_saved(tmp_path: Path):
    net = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    net[1].weight = net[0].weight
    net[0].bias = nn.Parameter(torch.arange(6.0)[::2])
    save_checkpoint(net, tmp_path / "weights.safetensors")
    saved = checkpoints.read_checkpoint(tmp_path / "weights.safetensors")
    for name, value in net.state_dict().items():
        assert torch.equal(saved[name], value), name


def test_a_saved_file_has_no_prefix_of_parallel_training(tmp_path: Path):
    save_checkpoint(nn.DataParallel(backbone(seed=1)), tmp_path / "weights.safetensors")
    assert set(checkpoints.read_checkpoint(tmp_path / "weights.safetensors")) == set(backbone().state_dict())


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "weights.safetensors"
    save_checkpoint(backbone(seed=1), path)
    before = path.read_bytes()

    def fails_half_way(file: Path, content: bytes) -> None:
        with file.open("wb") as opened:
            opened.write(content[:100])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", fails_half_way)
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(backbone(seed=2), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# Through timm


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize(("name", "kwargs"), [("biformer_tiny", BIFORMER), ("hat_x4", HAT)])
def test_pretrained_from_a_local_file(name: str, kwargs: dict[str, Any], suffix: str, tmp_path: Path):
    torch.manual_seed(1)
    source = timm.create_model(name, **kwargs)
    path = tmp_path / f"weights.{suffix}"
    if suffix == "safetensors":
        save_checkpoint(source, path)
    else:
        wrapper = "model" if name == "biformer_tiny" else "params_ema"
        torch.save({wrapper: source.state_dict()}, path)
    net = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(path)}, **kwargs)
    assert same(net, source)


def test_pretrained_with_another_head(tmp_path: Path):
    save_checkpoint(backbone(seed=1), tmp_path / "weights.safetensors")
    overlay = {"file": str(tmp_path / "weights.safetensors")}
    net = backbone(pretrained=True, pretrained_cfg_overlay=overlay, num_classes=5)
    assert torch.equal(net.stem[0].weight, backbone(seed=1).stem[0].weight)
    assert net.head.fc.weight.shape == (5, 64)
    features = backbone(pretrained=True, pretrained_cfg_overlay=overlay, features_only=True)
    assert torch.equal(features.model.stem[0].weight, backbone(seed=1).stem[0].weight)


def test_public_names():
    assert visionattn.load_checkpoint is load_checkpoint
    assert visionattn.save_checkpoint is save_checkpoint
