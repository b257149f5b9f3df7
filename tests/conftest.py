"""What all tests share: random numbers that depend on no order, one thread, command lines in this process."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

TOOLS = Path(__file__).parents[1] / "tools"


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.manual_seed(0)
    # The tensors of the tests are small: threads would only wait for one another, and for other processes.
    torch.set_num_threads(1)


@pytest.fixture
def run_tool(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[object, str, str]]:
    """`run_tool("zoo.py", *arguments)` gives exit status, stdout and stderr.

    In this process, because importing the libraries anew would take most of the time.
    """

    def run(tool: str, *arguments: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", [f"tools/{tool}", *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(TOOLS / tool), run_name="__main__")
        printed = capsys.readouterr()
        return ended.value.code or 0, printed.out, printed.err

    return run
