"""What is installed, what was tested, what to type."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

from packaging.requirements import Requirement


@dataclass(frozen=True, slots=True)
class Finding:
    """One package: installed version (None: absent), the range asked for, and whether it is inside."""

    name: str
    installed: str | None
    wanted: str
    optional: bool

    @property
    def ok(self) -> bool:
        if self.installed is None:
            return self.optional
        return Requirement(f"{self.name}{self.wanted}").specifier.contains(self.installed, prereleases=True)


def packages() -> list[Finding]:
    """The package's own requirements against what is installed; extras are optional."""
    findings = []
    for text in requires("empg-lite") or []:
        requirement = Requirement(text)
        extra = re.search(r"extra == ['\"](\w+)['\"]", text)
        if extra and extra.group(1) in ("dev", "docs", "browser"):
            continue
        try:
            installed: str | None = version(requirement.name)
        except PackageNotFoundError:
            installed = None
        findings.append(Finding(requirement.name, installed, str(requirement.specifier), extra is not None))
    return findings


def device() -> dict[str, Any]:
    """The machine as training would use it."""
    import torch

    from empg_lite.plan import free_memory
    from empg_lite.policy import resolve_dtype
    from empg_lite.policy.backends import choose_backend
    from empg_lite.sampler import choose_engine

    cuda = torch.cuda.is_available()
    where = torch.device("cuda" if cuda else "cpu")
    return {
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "free_memory_gb": round(free_memory(where) / 1e9, 1),
        "cores": os.cpu_count(),
        "dtype": str(resolve_dtype("auto")).removeprefix("torch."),
        "backend": choose_backend("auto"),
        "engine": choose_engine("auto", choose_backend("auto"), where.type),
    }
