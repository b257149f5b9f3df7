"""Bounds on metrics, as `tools/evaluate.py --require` states them."""

from __future__ import annotations

import pytest

from visionattn.cli.command import check_requirements, parse_requirements
from visionattn.errors import InputError, RunError

METRICS = {"top1": 98.5, "loss": 0.1}


@pytest.mark.parametrize("requirements", [[], ["top1>=98.5"], ["top1 >= 97", "loss<=1e-1"]])
def test_met(requirements: list[str]) -> None:
    check_requirements(METRICS, parse_requirements(requirements, METRICS))


@pytest.mark.parametrize("requirement", ["top1>=99", "loss<=0.09"])
def test_missed(requirement: str) -> None:
    with pytest.raises(RunError, match="required is"):
        check_requirements(METRICS, parse_requirements([requirement]))


def test_what_has_no_value_meets_nothing() -> None:
    for requirement in ("top1>=0", "top1<=100"):
        for metrics in ({"top1": float("nan")}, {}):
            with pytest.raises(RunError, match="top1 has no value, required is"):
                check_requirements(metrics, parse_requirements([requirement]))


@pytest.mark.parametrize("requirement", ["top1", "top1>97", "top2>=97", "top1>=many"])
def test_unreadable(requirement: str) -> None:
    with pytest.raises(InputError, match=r"METRIC>=VALUE|no metric 'top2' to require: did you mean top1"):
        parse_requirements([requirement], METRICS)


def test_where_the_metrics_are_not_known_before_any_name_is_read() -> None:
    assert parse_requirements(["bbox_mAP_50 >= 0.5"])[0] == ("bbox_mAP_50", ">=", 0.5)
