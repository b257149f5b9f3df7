"""Tables of variants: what is registered behaves as functions that a family's file writes out."""

from __future__ import annotations

import importlib
import inspect
import pickle
import re
import subprocess
import sys
from typing import Any

import families
import pytest
import timm
import torch
from torch import Tensor

from visionattn.checkpoints import CheckpointError, identify
from visionattn.models.hat import hat_x4  # pyright: ignore[reportAttributeAccessIssue]
from visionattn.models.registry.names import Names
from visionattn.models.registry.shapes import Shapes
from visionattn.models.registry.variants import ENTRIES, layout_of


@pytest.mark.parametrize("name", families.ALL)
def test_entrypoints_are_functions_of_their_module(name: str):
    function = timm.model_entrypoint(name)
    module = importlib.import_module(function.__module__)
    assert getattr(module, name) is function
    assert name in module.__all__
    assert (function.__name__, function.__qualname__) == (name, name)
    assert function.__module__.startswith("visionattn.models.")
    assert function.__doc__
    assert function.__doc__.endswith(".")
    assert str(inspect.signature(function)).startswith("(pretrained: 'bool' = False, **kwargs: 'Any') -> ")
    assert pickle.loads(pickle.dumps(function)) is function


def test_every_entry_is_registered_and_its_arguments_build_it():
    assert set(ENTRIES) == set(families.ALL)
    for name in families.FAMILIES:
        entry = ENTRIES[name]
        given = {k: v for k, v in entry.arguments.items() if v is not None}
        net = timm.create_model(name, **{**given, **families.SMALL[families.prefix(name)]}, device="meta")
        assert type(net) is entry.layout.model_cls
        assert layout_of(net) is entry.layout
        assert not {"guest", "device", "dtype", "pretrained", "kwargs"} & set(entry.arguments)


def test_importing_a_variant_from_its_file():
    assert hat_x4 is timm.model_entrypoint("hat_x4")
    assert "HAT x4" in (hat_x4.__doc__ or "")
    code = "from visionattn.models.nat import nat_mini; print(nat_mini.__doc__)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.startswith("NAT-Mini: 20.0 M parameters")


def test_arguments_that_nobody_has_are_refused():
    for name in ("agent_swin_tiny", "nat_mini", "hat_x2"):
        with pytest.raises(TypeError, match="no_such_argument"):
            timm.create_model(name, no_such_argument=1, device="meta")


def test_options_of_a_guest_reach_its_attention():
    net = timm.create_model("agent_swin_tiny", agents=(2, 2, 2, 2), device="meta")
    assert net.stages[0].blocks[0].attn.an_bias.shape[1] == 4
    assert ENTRIES["agent_swin_tiny"].arguments["agents"] == (3, 4, 7, 7)


def test_names_go_both_ways():
    names = Names(("^a.#.b.#.", "^x.#.#."), (".w$", ".weight$"))
    assert names.to_ours("a.3.b.4.w") == "x.3.4.weight"
    assert names.to_official("x.3.4.weight") == "a.3.b.4.w"
    assert names.to_ours("other.w.a") == "other.w.a"
    assert list(names.official_weights({"x.1.2.weight": torch.ones(1)})) == ["a.1.b.2.w"]


def test_what_is_lacking():
    shapes = Shapes({"a.0.w": torch.ones(2, 3), "a.1.w": torch.ones(2), "b": torch.ones(1, 0)})
    assert shapes.lacking({"a.0.w": 2}) == ""
    assert shapes.lacking({"a.#.w": 2}) == "a.1.w has the shape (2,)"
    assert shapes.lacking({"c.#.w": 1}) == "it has no c.0.w"
    assert shapes.lacking({"b": 2}) == "b has the shape (1, 0)"


def damaged(weights: dict[str, Tensor], name: str) -> list[dict[str, Tensor]]:
    """Weights without one of them, and with one of other dimensions."""
    forms = [torch.empty(1, *weights[name].shape, device="meta"), torch.empty((), device="meta")]
    return [{n: v for n, v in weights.items() if n != name}, *({**weights, name: form} for form in forms)]


@pytest.mark.parametrize("name", [*families.FAMILIES, "hsdt_ssr"])
def test_damaged_weights_are_refused_in_one_sentence(name: str, monkeypatch: pytest.MonkeyPatch):
    """Whatever parameter is missing or misshapen, nothing but CheckpointError arrives."""
    net: Any = families.small(name, device="meta")
    weights = ENTRIES[name].layout.to_official(net.state_dict(), net)
    # Building every network that is asked for takes long, and is not what is tested.
    module = sys.modules["visionattn.checkpoints.identify"]
    monkeypatch.setattr(module, "_fit", lambda *args: "it was not tried")
    # Of modules with the same parameters the first is enough.
    first = {re.sub(r"\d+", "#", n): n for n in reversed(weights)}
    for parameter in first.values():
        for broken in damaged(weights, parameter):
            with pytest.raises(CheckpointError):
                identify(broken)
