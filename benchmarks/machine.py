"""The machine and the versions that a figure was measured with."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def machine() -> dict[str, str]:
    """Where and on what this ran."""
    model = (
        re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if os.name == "posix" else None
    )
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True
    )
    gmpy2 = "off" if os.environ.get("SYMPY_GROUND_TYPES") == "python" else metadata.version("gmpy2")
    return {
        "commit": commit.stdout.strip(),
        "cpu": f"{model.group(1) if model else platform.processor()} x {os.cpu_count()}",
        "load": f"{os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
        "math-verify": metadata.version("math-verify"),
        "gmpy2": gmpy2,
    }
