"""These tests need an environment of their own: `make test-mm`."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "models"))
collect_ignore_glob = [] if find_spec("mmengine") else ["test_*.py"]
