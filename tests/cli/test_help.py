"""Help is there at once: no tool waits for PyTorch to say how it is used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = sorted((Path(__file__).parents[2] / "tools").glob("*.py"))
COMMANDS = {
    "explain.py": ["lam"],
    "openmmlab.py": ["train", "evaluate", "predict", "scenes"],
    "prepare.py": ["pieces", "lmdb"],
    "benchmark.py": ["models", "kernels"],
}
HEAVY = ("torch", "timm", "numpy", "PIL", "pydantic", "triton")
CODE = """
import runpy, sys
tool, *arguments = sys.argv[1:]
sys.argv = [tool, *arguments, "--help"]
try:
    runpy.run_path(tool, run_name="__main__")
except SystemExit as ended:
    print(ended.code, *sys.modules, file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("tool", "command"),
    [(tool, command) for tool in TOOLS for command in ("", *COMMANDS.get(tool.name, ()))],
    ids=lambda value: value.name if isinstance(value, Path) else value,
)
def test_help_imports_no_library(tool: Path, command: str):
    arguments = [command] if command else []
    code = [sys.executable, "-c", CODE, str(tool), *arguments]
    done = subprocess.run(code, capture_output=True, text=True, check=True)
    status, *modules = done.stderr.split()
    assert status == "0"
    assert done.stdout.startswith("usage: ")
    assert not {name for name in modules if name.partition(".")[0] in HEAVY}
