"""These tests need an environment of their own: `make test-mm`."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("mmengine") else ["test_*.py"]
