"""The miniatures of the networks stand with the tests of the networks; helpers stand here."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / "models"), str(Path(__file__).parent)]
