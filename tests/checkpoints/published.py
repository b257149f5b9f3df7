"""The fixtures of published networks, as parameters of a test."""

from __future__ import annotations

from pathlib import Path

import pytest
from _pytest.mark.structures import ParameterSet
from safetensors import safe_open


def fixtures() -> list[ParameterSet]:
    """Files that hold a published network's parameter names; of a family's several, all but one are slow."""
    found, families = [], set()
    for path in sorted((Path(__file__).parents[1] / "parity").glob("*/*.safetensors")):
        with safe_open(str(path), framework="pt") as file:
            if "parity" not in file.metadata():
                continue
        # Other forms of a family, which have names of their own.
        form = path.stem if path.stem.endswith(("_stl", "_unmerged", "264")) else path.parent.name
        marks = [pytest.mark.slow] if form in families else []  # seconds each, and the same names again
        families.add(form)
        found.append(pytest.param(path, marks=marks, id=path.stem))
    return found
