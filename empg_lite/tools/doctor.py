"""Installed packages against the supported versions, and what this machine can do."""

from __future__ import annotations

import os
import platform
import re
import tomllib
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement


@dataclass(frozen=True, slots=True)
class Finding:
    """A required package: the installed version (None: missing) and the supported range."""

    name: str
    installed: str | None
    wanted: str
    optional: bool

    @property
    def ok(self) -> bool:
        """Whether the version is in range; an optional package may be missing."""
        if self.installed is None:
            return self.optional
        return Requirement(f"{self.name}{self.wanted}").specifier.contains(self.installed, prereleases=True)


def packages() -> list[Finding]:
    """This package's requirements and what is installed; extras are optional."""
    findings = []
    for text in _requirements():
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


def _requirements() -> list[str]:
    """From the installed package's metadata, or from ``pyproject.toml`` in an uninstalled checkout."""
    try:
        return requires("empg-lite") or []
    except PackageNotFoundError:
        source = Path(__file__).resolve().parents[2] / "pyproject.toml"
        if not source.is_file():
            return []
    project = tomllib.loads(source.read_text("utf-8"))["project"]
    extras = project["optional-dependencies"].items()
    return [*project["dependencies"], *(f"{t.split(';')[0]}; extra == '{x}'" for x, ts in extras for t in ts)]


def device() -> dict[str, Any]:
    """This machine as training would use it."""
    import torch

    from empg_lite.policy import resolve_dtype
    from empg_lite.policy.backends import choose_backend
    from empg_lite.policy.families import FAMILIES
    from empg_lite.policy.memory.machine import free_memory
    from empg_lite.recipe.schema import choose_engine

    cuda = torch.cuda.is_available()
    where = torch.device("cuda" if cuda else "cpu")
    return {
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "free_memory_gb": round(free_memory(where) / 1e9, 1),
        "cores": os.cpu_count(),
        "dtype": str(resolve_dtype("auto")).removeprefix("torch."),
        "backend": choose_backend("auto"),
        "engine": choose_engine("auto"),
        "models": ", ".join(family.models for family in FAMILIES.values()),
        **(trial() if cuda else {}),
    }


def trial() -> dict[str, Any]:
    """Load the bundled model on the GPU, sample from it, and report the kernels that were used."""
    from empg_lite.loop.learner import build_learner
    from empg_lite.recipe.file import load_recipe
    from empg_lite.sampler import Prompt

    try:
        learner = build_learner(load_recipe("tiny", ["model.dtype=auto", "model.load_in_4bit=true"]))
        sampler = learner.sampler()
        prompt = learner.policy.encode_prompt("Tom has 3 coins. He buys 4 more. How many does he have now?")[
            1
        ]
        sampler.sample([Prompt(prompt, tuple(range(16)))], learner.decoding)
    except Exception as error:  # any failure is reported, not raised
        return {"trial": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    work, facts = sampler.work, learner.engine_facts()
    return {
        "kernels": ", ".join(facts["kernels"]),
        "fit": facts["fit"],
        "attention": ", ".join(f"{where} {kernel}" for where, kernel in facts["attention"].items()),
        "graphs": sampler.graph_failure
        or f"{work.graphs_captured} captured, {work.graphs_replayed} replayed",
        **({"left out": "; ".join(facts["notes"])} if facts["notes"] else {}),
    }
