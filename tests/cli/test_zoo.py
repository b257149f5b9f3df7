"""The list of networks, as users read it."""

from __future__ import annotations

import json

import pytest

from visionattn.errors import InputError
from visionattn.models.registry import zoo


def test_facts_of_a_backbone():
    facts = zoo.model_facts("biformer_tiny")
    assert facts == zoo.ModelFacts(
        name="biformer_tiny",
        task="classification",
        params=13_142_760,
        gmacs=pytest.approx(2.2, abs=0.05),
        input=(3, 224, 224),
        license="mit",
        result="ImageNet-1k top-1 81.4",
    )


def test_facts_of_a_restoration_network():
    facts = zoo.model_facts("hat_s_x4")
    assert (facts.task, facts.input, facts.license) == ("super-resolution", (3, 64, 64), "apache-2.0")
    # 54.6 is published; shifted windows that the border cuts are counted for what is left of them.
    assert facts.gmacs == pytest.approx(54.6, rel=0.03)
    assert facts.result.startswith("PSNR-Y Set5 32.92")


def test_filters():
    assert zoo.model_names("biformer_stl*") == ["biformer_stl", "biformer_stl_nchw"]
    assert zoo.model_names("hat_s") == ["hat_s_x1", "hat_s_x2", "hat_s_x3", "hat_s_x4"]
    assert set(zoo.model_names()) > {"biformer_tiny", "hat_x4"}
    assert not any(name.startswith("resnet") for name in zoo.model_names())


def test_order():
    rows = zoo.list_models("biformer_[ts]*", sort="params")
    assert [row.params for row in rows] == sorted(row.params for row in rows)
    with pytest.raises(InputError, match="cannot sort by 'param': did you mean params"):
        zoo.list_models("biformer_tiny", sort="param")


def test_unknown_names_get_near_ones():
    with pytest.raises(InputError, match="no network matches 'bifomer_tiny': did you mean biformer_tiny"):
        zoo.model_names("bifomer_tiny")


def test_command_line(run_tool):
    status, printed, _ = run_tool("zoo.py", "biformer_tiny")
    assert status == 0
    head, line = printed.splitlines()
    assert head.split()[:2] == ["network", "task"]
    assert line.split()[:3] == ["biformer_tiny", "classification", "13.1"]

    (facts,) = json.loads(run_tool("zoo.py", "biformer_tiny", "--json")[1])
    assert facts["name"] == "biformer_tiny"
    assert facts["params"] == 13_142_760

    status, printed, error = run_tool("zoo.py", "bifomer")
    assert status == 2
    assert printed == ""
    assert error.startswith("error: no network matches 'bifomer': did you mean biformer_")
    assert len(error.splitlines()) == 1

    status, printed, _ = run_tool("zoo.py", "--help")
    assert status == 0
    assert "examples:" in printed
