"""The published weights of every network from its own address, by a server on this machine."""

from __future__ import annotations

import argparse
import io
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import families
import pytest
import timm
import torch
from torch import Tensor, nn

from visionattn.checkpoints import official_state_dict
from visionattn.checkpoints.identify import layout_of
from visionattn.engine.config import ModelConfig
from visionattn.engine.network import create_network
from visionattn.errors import InputError
from visionattn.models.registry.variants import ENTRIES

TAGS = [tag for tag in timm.list_models(pretrained=True) if tag.partition(".")[0] in ENTRIES]


class Server(ThreadingHTTPServer):
    """Gives one file under whatever address is asked for, and remembers the addresses."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = b""
        self.asked: list[str] = []


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self.send_response(200 if self.server.content else 404)
        self.send_header("Content-Length", str(len(self.server.content)))
        self.end_headers()
        self.wfile.write(self.server.content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is printed."""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))


def published(net: nn.Module) -> bytes:
    """A file as the authors share it: wrapped, with the options of the training beside the weights."""
    weights: Any = official_state_dict(net)
    wrapper = layout_of(net).wrapper
    content = weights if wrapper is None else {wrapper: weights, "args": argparse.Namespace(lr=0.1)}
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def unnamed(tag: str) -> bool:
    """Whether an address does not end in the name of a file."""
    return urlsplit(timm.get_pretrained_cfg(tag).url).path.endswith("/")


def on_this_machine(server: Server, tag: str) -> str:
    url = urlsplit(timm.get_pretrained_cfg(tag).url)
    return url._replace(scheme="http", netloc=f"127.0.0.1:{server.server_port}").geturl()


def disturbed(tag: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """The miniature of a network with other weights than the initial ones."""
    net = families.small(tag)
    for value in net.parameters():
        nn.init.uniform_(value, 0.1, 0.9)
    return net, net.state_dict()


def test_there_are_addresses_of_every_family_that_shares_weights():
    assert len(TAGS) >= 75
    assert sum(unnamed(tag) for tag in TAGS) >= 31


@pytest.mark.parametrize("tag", TAGS)
def test_every_address(tag: str, server: Server, tmp_path: Path):
    net, weights = disturbed(tag)
    server.content = published(net)
    server.asked.clear()
    overlay = {"url": on_this_machine(server, tag)}
    for _ in range(2 if unnamed(tag) else 1):
        again = families.small(tag, pretrained=True, pretrained_cfg_overlay=overlay)
        for name, value in again.state_dict().items():
            assert torch.equal(value, weights[name]), name
    # Asked for once, as the address says, and kept under a name of its own.
    address = urlsplit(timm.get_pretrained_cfg(tag).url)
    assert server.asked == [address.path + (f"?{address.query}" if address.query else "")]
    (file,) = (tmp_path / "hub" / "checkpoints").iterdir()
    assert file.suffix == ".pth"


def test_no_two_addresses_share_a_file(server: Server, tmp_path: Path):
    names = ["agent_deit_tiny", "agent_deit_small", "catanet_x2", "catanet_x3", "biformer_tiny"]
    for name in names:
        server.content = published(families.small(name))
        tag = next(tag for tag in TAGS if tag.startswith(f"{name}."))
        overlay = {"url": on_this_machine(server, tag)}
        families.small(tag, pretrained=True, pretrained_cfg_overlay=overlay)
    files = sorted(file.name for file in (tmp_path / "hub" / "checkpoints").iterdir())
    assert [file.partition(".")[0] for file in files] == sorted(names)


def test_another_address_is_another_file(server: Server, tmp_path: Path):
    for value in (1.0, 2.0):
        net = families.small("agent_deit_tiny")
        nn.init.constant_(net.get_parameter("norm.weight"), value)
        server.content = published(net)
        overlay = {"url": f"http://127.0.0.1:{server.server_port}/f/{value}/?dl=1"}
        found = families.small("agent_deit_tiny", pretrained=True, pretrained_cfg_overlay=overlay)
        assert found.get_parameter("norm.weight")[0] == value


def test_an_address_that_is_gone_is_one_sentence(server: Server, monkeypatch: pytest.MonkeyPatch):
    server.content = b""
    name, overlay = "agent_deit_tiny", {"url": f"http://127.0.0.1:{server.server_port}/f/gone/?dl=1"}
    kwargs = {**families.SMALL["agent_deit"], "pretrained_cfg_overlay": overlay}
    with pytest.raises(InputError, match=f"cannot get the published weights of {name}: HTTP Error 404"):
        create_network(ModelConfig(name=name, pretrained=True, kwargs=kwargs))
