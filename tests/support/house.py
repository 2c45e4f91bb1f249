"""``scripts/measure_house.py``, importable."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from measure_house import *  # noqa: E402, F403
