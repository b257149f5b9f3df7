"""Bounds on metrics, as `tools/evaluate.py --require` states them."""

from __future__ import annotations

import pytest

from visionattn.cli.command import check_requirements
from visionattn.errors import InputError, RunError

METRICS = {"top1": 98.5, "loss": 0.1}


@pytest.mark.parametrize("requirements", [[], ["top1>=98.5"], ["top1 >= 97", "loss<=1e-1"]])
def test_met(requirements: list[str]) -> None:
    check_requirements(METRICS, requirements)


@pytest.mark.parametrize("requirement", ["top1>=99", "loss<=0.09"])
def test_missed(requirement: str) -> None:
    with pytest.raises(RunError, match="required is"):
        check_requirements(METRICS, [requirement])


def test_not_a_number_meets_nothing() -> None:
    for requirement in ("top1>=0", "top1<=100"):
        with pytest.raises(RunError):
            check_requirements({"top1": float("nan")}, [requirement])


@pytest.mark.parametrize("requirement", ["top1", "top1>97", "top2>=97", "top1>=many"])
def test_unreadable(requirement: str) -> None:
    with pytest.raises((InputError, RunError), match=r"METRIC>=VALUE|no metric"):
        check_requirements(METRICS, [requirement])
