from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest


@pytest.mark.skipif(importlib.util.find_spec("mmengine") is not None, reason="mmengine is installed")
def test_the_command_that_installs_it_is_named() -> None:
    with pytest.raises(ImportError, match=r'onedl-mmengine is not installed: pip install "visionattn\['):
        importlib.import_module("visionattn.integrations.openmmlab")


@pytest.mark.skipif(importlib.util.find_spec("mmengine") is not None, reason="mmengine is installed")
@pytest.mark.parametrize(
    "command", [["train", "c.py"], ["evaluate", "c.py", "f.pth"], ["predict", "c.py", "f.pth", "i"]]
)
def test_the_tool_says_it_in_one_sentence(
    command: list[str], run_tool: Callable[..., tuple[object, str, str]]
) -> None:
    status, printed, errors = run_tool("openmmlab.py", *command)
    assert (status, printed) == (2, "")
    assert errors == (
        f"error: cannot {command[0]} with OpenMMLab: onedl-mmengine is not installed: "
        'pip install "visionattn[openmmlab]"\n'
    )


def test_bounds_are_read_before_anything_is_imported(
    run_tool: Callable[..., tuple[object, str, str]],
) -> None:
    status, _, errors = run_tool("openmmlab.py", "evaluate", "c.py", "f.pth", "--require", "mIoU>0.5")
    assert status == 2
    assert "a requirement reads METRIC>=VALUE" in errors
