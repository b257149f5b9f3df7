"""Runs a command line in this process: importing the libraries anew would take most of the time."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def run_tool(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[object, str, str]]:
    """`run_tool("zoo.py", *arguments)` gives exit status, stdout and stderr."""

    def run(tool: str, *arguments: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", [f"tools/{tool}", *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(TOOLS / tool), run_name="__main__")
        printed = capsys.readouterr()
        return ended.value.code or 0, printed.out, printed.err

    return run
