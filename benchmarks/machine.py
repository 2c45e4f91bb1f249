"""The machine, the code and the versions that a figure was measured with."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_CARD = """import json, torch
facts = None
if torch.cuda.is_available():
    card = torch.cuda.get_device_properties(0)
    facts = {"name": card.name, "gpu_gib": card.total_memory / 2**30, "cuda": torch.version.cuda}
print(json.dumps(facts))"""


def machine() -> dict[str, str]:
    """Where and on what this ran."""
    gmpy2 = versions("gmpy2")["gmpy2"]
    return {
        "commit": describe_commit(),
        "cpu": cpu(),
        "load": f"{os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
        **versions("math-verify"),
        "gmpy2": "off" if os.environ.get("SYMPY_GROUND_TYPES") == "python" else gmpy2,
    }


def describe_commit() -> str:
    """``git describe`` of the checkout; empty without git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def versions(*packages: str) -> dict[str, str]:
    """Installed versions; "absent" for a package that is not."""

    def version(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return "absent"

    return {package: version(package) for package in packages}


def headline(facts: Mapping[str, Any]) -> str:
    """Facts of a machine on one line."""
    return " · ".join(f"{name} {value}" for name, value in facts.items())


def import_from(folder: Path = ROOT, **variables: str) -> dict[str, str]:
    """The environment of a child process that finds the package in ``folder`` first."""
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **variables}


def last_line(command: Sequence[str]) -> str:
    """The last line that a command prints; if it fails, its last error line ends this process."""
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        sys.exit(f"{' '.join(command)}: {said[-1]}")
    return done.stdout.splitlines()[-1]


def cpu() -> str:
    """Model and cores."""
    model = (
        re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if os.name == "posix" else None
    )
    return f"{model.group(1) if model else platform.processor()} x {os.cpu_count()}"


def card() -> dict[str, Any] | None:
    """``name``, ``gpu_gib`` and ``cuda`` of the card that torch uses; None without one.

    Asked in a process of its own: a CUDA context in this one would take memory from whoever trains.
    """
    done = subprocess.run([sys.executable, "-c", _CARD], capture_output=True, text=True, check=False)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def code_commit(code: Path, *folders: str) -> str | None:
    """The last commit that changed these folders of the checkout ``code``; ``-dirty`` where they differ.

    A commit of documents, such as one that adds a figure, leaves it as it is. None outside a checkout.
    """

    def git(*words: str) -> str:
        command = ["git", "-C", str(code), *words, "--", *folders]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    checkout = (code / ".git").exists() and shutil.which("git") is not None
    commit = git("log", "-1", "--format=%h") if checkout else ""
    return commit + ("-dirty" if git("status", "--porcelain") else "") if commit else None
