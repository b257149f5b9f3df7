"""Exported files: equal to the network, whole, or not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pytest
import timm
import torch
from torch import Tensor, nn

from visionattn.integrations import export
from visionattn.integrations.export import ExportError, export_network
from visionattn.integrations.export_table import (
    NETWORKS,
    Row,
    read_table,
    shortened,
    try_exports,
    write_table,
)
from visionattn.models.registry.variants import ENTRIES

SMALL: dict[str, Any] = {"embed_dim": 8, "depths": (1,)}
# Tracing the others takes ten seconds and more, a minute with sizes that vary.
FAST = ("cfsr", "hsdt", "pmnet", "agent_deit")


def network(**kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("cfsr_x2", **{**SMALL, **kwargs}).eval()


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name.startswith(FAST) else [pytest.mark.slow])
        for name in families.FAMILIES
    ],
)
def test_every_family_as_a_program(name: str, tmp_path: Path):
    net = families.small(name)
    size = net.img_size if net.pretrained_cfg["fixed_input_size"] else (64, 64)
    done = export_network(net, tmp_path / "net.pt2", "program", size=size, batch=2)
    assert done.sizes == ((2, *size),)
    assert done.difference <= export.TOLERANCE
    assert list(tmp_path.iterdir()) == [tmp_path / "net.pt2"]
    image = torch.rand(2, net.pretrained_cfg["input_size"][0], *size)
    loaded = torch.export.load(tmp_path / "net.pt2").module()
    with torch.no_grad():
        torch.testing.assert_close(loaded(image), net.eval()(image), rtol=1e-4, atol=1e-5)


def test_sizes_that_vary(tmp_path: Path):
    net = families.small("cfsr_x2")
    done = export_network(net, tmp_path / "net.pt2", "program", size=(64, 64), dynamic=True)
    assert done.sizes == ((2, 64, 64), (1, 96, 128), (3, 75, 69), (2, 32, 32))
    loaded = torch.export.load(tmp_path / "net.pt2").module()
    image = torch.rand(5, 3, 80, 101)
    with torch.no_grad():
        torch.testing.assert_close(loaded(image), net.eval()(image), rtol=1e-4, atol=1e-5)


@pytest.mark.slow  # half a minute each
@pytest.mark.parametrize("name", families.FAMILIES)
def test_sizes_of_every_family_vary(name: str, tmp_path: Path):
    net = families.small(name)
    side = 48 if hasattr(net, "info") else 256
    if net.pretrained_cfg["fixed_input_size"]:
        with pytest.raises(ExportError, match="images of one size"):
            export_network(net, tmp_path / "net.pt2", "program", dynamic=True)
        return
    done = export_network(net, tmp_path / "net.pt2", "program", size=(side, side), dynamic=True)
    assert set(done.refused) <= {(2, side // 2, side // 2)}, done


@pytest.mark.parametrize("dynamic", [False, True])
def test_onnx(dynamic: bool, tmp_path: Path):
    pytest.importorskip("onnxscript")
    done = export_network(network(), tmp_path / "net.onnx", "onnx", size=(24, 40), dynamic=dynamic)
    assert done.difference <= export.TOLERANCE
    assert len(done.sizes) == (4 if dynamic else 1)
    from onnxruntime import InferenceSession

    session: Any = InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    image = torch.rand(2 if dynamic else 1, 3, 24, 40)
    (out,) = session.run(None, {"image": image.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(out), network()(image), rtol=1e-4, atol=1e-5)


@pytest.mark.slow  # a C++ compiler works for a minute
def test_aot_inductor(tmp_path: Path):
    done = export_network(network(), tmp_path / "net.pt2", "aoti", size=(24, 40))
    assert done.difference <= export.TOLERANCE
    assert list(tmp_path.iterdir()) == [tmp_path / "net.pt2"]


def test_a_file_that_computes_something_else_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "net.pt2"
    path.write_bytes(b"the old file")

    def write_another(program: Any, image: Tensor, file: Path) -> None:
        other = network()
        nn.init.ones_(other.get_parameter("conv_last.bias"))
        torch.export.save(torch.export.export(other, (image,)), file)

    monkeypatch.setitem(export._WRITERS, "program", write_another)
    with pytest.raises(ExportError, match=r"at 1x16x16 the outputs differ by \d\.\de[-+]\d+ of the largest"):
        export_network(network(), path, "program", size=(16, 16))
    assert path.read_bytes() == b"the old file"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fails_half_way(program: Any, image: Tensor, file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setitem(export._WRITERS, "program", fails_half_way)
    with pytest.raises(OSError, match="no space"):
        export_network(network(), tmp_path / "net.pt2", "program", size=(16, 16))
    assert not list(tmp_path.iterdir())


class Branches(nn.Module):
    """Decides by a number in the image, which no exported program can."""

    pretrained_cfg = {"input_size": (3, 8, 8)}  # noqa: RUF012

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum().item() > 0 else -x


class OneSize(nn.Module):
    """Takes another way at every size."""

    pretrained_cfg = {"input_size": (3, 8, 8)}  # noqa: RUF012

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.shape[2] == 8 else x * x.shape[2]


def test_networks_that_cannot_be_exported(tmp_path: Path):
    with pytest.raises(ExportError, match=r"torch\.export cannot trace Branches: ") as caught:
        export_network(Branches(), tmp_path / "net.pt2", "program")
    assert "\n" not in str(caught.value)
    with pytest.raises(ExportError):
        export_network(OneSize(), tmp_path / "net.pt2", "program", dynamic=True)
    assert not list(tmp_path.iterdir())


def test_bad_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match=r"files of the format onnx end in \.onnx, but net\.pt2 was given"):
        export_network(network(), tmp_path / "net.pt2", "onnx")
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"ONNX needs onnx and onnxscript and onnxruntime: pip install"):
        export_network(network(), tmp_path / "net.onnx", "onnx")


# The table


def test_networks_are_shortened_and_keep_their_parts():
    assert shortened("nat_base") == {"depths": (2, 2, 2, 2)}
    assert shortened("hat_l_x4") == {"depths": (2, 2)}
    assert shortened("hsdt_l") == {}
    assert shortened("agent_deit_tiny") == {"depth": 2}
    assert shortened("pmnet") == {"depth": 2, "deep_depth": 2}
    short = timm.create_model("catanet_x2", **shortened("catanet_x2"), device="meta")
    assert len(short.blocks) == 2


def test_every_class_has_a_row():
    rows = {ENTRIES[name].layout.model_cls for name in NETWORKS}
    assert rows == {ENTRIES[name].layout.model_cls for name in families.ALL}


def test_the_table(tmp_path: Path):
    (row,) = try_exports(["cfsr_x4"], ["program"])
    assert row == Row("cfsr_x4", {("program", False): "yes", ("program", True): "yes"})
    reason = "torch.export cannot trace X: because"
    other = Row("x", {("program", False): reason, ("program", True): "yes, not 8x9"})
    path = tmp_path / "docs" / "export.md"
    assert read_table(path) == []
    write_table([other, Row("x", {**other.results, ("program", True): "yes"}), row, other], path)
    text = path.read_text()
    assert "| network | program, fixed | program, dynamic |\n| --- | --- | --- |\n" in text
    assert "| `cfsr_x4` | yes | yes |\n| `x` | no [1] | yes, not 8x9 |\n" in text
    assert text.count(reason) == 1
    assert f"\n1. {reason}\n" in text
    assert read_table(path) == [row, other]
