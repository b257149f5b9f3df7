"""Bounds on metrics, as `tools/evaluate.py --require` states them."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from visionattn.cli.command import (
    check_requirements,
    check_target,
    exit_status,
    parse_requirements,
    report_files,
    write_rows,
)
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


def test_names_that_a_console_cannot_show_are_printed_with_escapes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="ascii"))
    results = [(Path("Gr\xf6\xdfe.png"), Path("\udcff.png"))]
    with pytest.raises(SystemExit) as ended, exit_status():
        sys.exit(report_files(results))
    assert not ended.value.code
    sys.stdout.flush()
    assert printed.getvalue() == b"Gr\\xf6\\xdfe.png -> \\udcff.png\n"


def test_names_that_are_too_long_are_wrong_input(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, exit_status():
        Path("n" * 300).lstat()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: [Errno 36] File name too long")


def test_memory_that_runs_out_names_the_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, exit_status("lower train.batch_size"):
        raise MemoryError("Unable to allocate 2.00 GiB")
    assert ended.value.code == 1
    expected = "stopped: memory ran out (Unable to allocate 2.00 GiB); lower train.batch_size\n"
    assert capsys.readouterr().err == expected


def test_tables_keep_names_that_are_no_text_and_replace_no_input(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.csv", [{"name": "\udcff", "psnr": 1.5}])
    assert (tmp_path / "a.csv").read_bytes() == b"name,psnr\n\xff,1.5\n"
    check_target(tmp_path / "b.csv", tmp_path / "a.csv", None)
    for target, reason in ((tmp_path / "a.csv", "would replace the input"), (tmp_path, "is a folder")):
        with pytest.raises(InputError, match=reason):
            check_target(target, tmp_path / "a.csv")
