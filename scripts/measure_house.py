"""Print the size and the structure of the package, beside the goals that tests/test_house.py asserts.

python scripts/measure_house.py
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "empg_lite"
Edges = set[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Measure:
    """One row of the table.

    Attributes:
        before: what it was before the package was put into folders.
        now: what it is.
        goal: the most it should be; None is for measures that are only printed.
        detail: what to look at when it is too large.
    """

    name: str
    before: str
    now: float
    goal: float | None = None
    detail: str = ""

    @property
    def limit(self) -> float | None:
        """The most that the test allows: the goal, or a ceiling above it."""
        return CEILINGS[self.name][0] if self.name in CEILINGS else self.goal


#: name -> (the most it may be, why the goal is not met yet). A ceiling is only ever lowered.
CEILINGS: dict[str, tuple[float, str]] = {}


# --- read from the source ----------------------------------------------------------------------------------


@cache
def trees() -> dict[Path, ast.Module]:
    """Every Python file of the package, parsed."""
    return {path: ast.parse(path.read_text("utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


def entry(path: Path) -> str:
    """The folder or module directly below the package that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def entries() -> set[str]:
    """Folders and modules directly below the package."""
    return {entry(path) for path in trees()} - {"__init__", "__main__"}


def imports(tree: ast.Module) -> list[str]:
    """Every dotted name a file imports, inside functions too, ``TYPE_CHECKING`` blocks excepted."""
    for_types = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    found: list[str] = []
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def edges() -> Edges:
    """(importer, imported) among the entries."""
    names = entries()
    return {
        (entry(path), target)
        for path, tree in trees().items()
        for target in (name.split(".")[1] for name in imports(tree) if name.startswith("empg_lite."))
        if entry(path) in names and target in names and target != entry(path)
    }


def find_circle(edges: Edges) -> list[str] | None:
    """A circle among the edges, or None."""

    def visit(node: str, path: list[str]) -> list[str] | None:
        if node in path:
            return [*path[path.index(node) :], node]
        return next((c for a, b in sorted(edges) if a == node and (c := visit(b, [*path, node]))), None)

    return next((c for node, _ in sorted(edges) if (c := visit(node, []))), None)


def longest_chain(edges: Edges) -> list[str]:
    """The longest chain of imports; there must be no circle."""
    below: dict[str, list[str]] = {}

    def chain(node: str) -> list[str]:
        if node not in below:
            deeper = [chain(b) for a, b in sorted(edges) if a == node]
            below[node] = [node, *max(deeper, key=len, default=[])]
        return below[node]

    return max((chain(a) for a, _ in sorted(edges)), key=len, default=[])


def functions() -> Iterator[tuple[int, str]]:
    """(lines, file:name) of every function, without decorators."""
    for path, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                yield lines, f"{path.relative_to(PACKAGE)}:{node.name}"


# --- found by running --------------------------------------------------------------------------------------


def python(code: str, cwd: Path = ROOT) -> str:
    """What a fresh interpreter prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, env=environment
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return done.stdout


def modules_of(*modules: str) -> list[list[str]]:
    """Our modules that are loaded after importing each in turn, in one fresh interpreter."""
    code = ["import json, sys"]
    for module in modules:
        code += [f"import {module}", "print(json.dumps(sorted(sys.modules)))"]
    return [
        [name for name in json.loads(line) if name.split(".")[0] == "empg_lite"]
        for line in python("; ".join(code)).splitlines()
    ]


def frames_to_loss() -> list[str]:
    """Our frames between ``train`` and ``m_step_loss`` in a training step of the bundled model."""
    from empg_lite import em
    from empg_lite.loop import mstep  # noqa: F401  train() imports it late, by this name or that
    from empg_lite.loop.train import train
    from empg_lite.recipe.file import load_recipe

    real, stacks = em.m_step_loss, []

    def traced(*args: Any, **kwargs: Any) -> Any:
        frame, names = sys._getframe(1), []
        while frame.f_code is not train.__code__:
            module = frame.f_globals.get("__name__", "")
            if module.split(".")[0] == "empg_lite":
                names.append(f"{module.removeprefix('empg_lite.')}:{frame.f_code.co_qualname}")
            assert frame.f_back is not None
            frame = frame.f_back
        stacks.append(names[::-1])
        return real(*args, **kwargs)

    users = [m for m in list(sys.modules.values()) if getattr(m, "__dict__", {}).get("m_step_loss") is real]
    for module in users:
        module.m_step_loss = traced  # type: ignore[attr-defined]
    try:
        with tempfile.TemporaryDirectory() as folder:
            train(load_recipe("tiny", ["run.steps=1", "run.eval_every=0"]), Path(folder) / "run")
    finally:
        for module in users:
            module.m_step_loss = real  # type: ignore[attr-defined]
    return stacks[-1]  # the first ones are the preflight's


def seconds(*words: str) -> float:
    """Best of three: a fresh interpreter with these arguments."""
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run([sys.executable, *words], check=True, capture_output=True, cwd=ROOT)
        best = min(best, time.perf_counter() - started)
    return best


# --- the table ---------------------------------------------------------------------------------------------


def from_source() -> list[Measure]:
    """Measures that need no run."""
    names, arrows = entries(), edges()
    circle = find_circle(arrows) or []
    chain = [] if circle else longest_chain(arrows)
    lengths = {name: lines for lines, name in sorted(functions(), reverse=True)}
    long = [f"{name} {lines}" for name, lines in lengths.items() if lines > 50]
    over_60 = sum(lines > 60 for lines in lengths.values())
    step = (PACKAGE / "loop" / "train.py").read_text("utf-8").splitlines()
    sizes = [len(path.read_text("utf-8").splitlines()) for path in trees()]
    return [
        Measure("Python lines in the package", "20,826", sum(sizes)),
        Measure("Python files in the package", "118", len(sizes)),
        Measure("entries at the top level", "52", len(names), 12, ", ".join(sorted(names))),
        Measure("circles of imports", "0", int(bool(circle)), 0, " -> ".join(circle)),
        Measure("floors of imports", "13", len(chain), 8, " -> ".join(chain)),
        Measure("functions over 60 lines", "5", over_60, 0, ", ".join(long)),
        Measure("functions over 50 lines", "13", len(long)),
        Measure("lines of train()", "98", lengths["loop/train.py:train"], 50),
        Measure("lines of loop/train.py, which has the step", "1,032", len(step), 150),
    ]


def from_runs() -> list[Measure]:
    """Measures that need a run: some seconds."""
    modules, begun = modules_of("empg_lite.loop.train", "empg_lite.loop.begin")
    frames = frames_to_loss()
    return [
        Measure("our modules that loop.train imports", "80", len(modules), 45, ", ".join(modules)),
        Measure("the same with what train() imports when it begins", "80", len(begun)),
        Measure("frames from train() to m_step_loss", "14", len(frames), 6, " > ".join(frames)),
    ]


def timings() -> list[Measure]:
    """Printed, never asserted: a busy machine must fail no test."""
    return [
        Measure("seconds to import empg_lite.api", "", round(seconds("-c", "import empg_lite.api"), 2)),
        Measure("seconds of --help", "", round(seconds("-m", "empg_lite", "--help"), 2)),
    ]


def main() -> None:
    """Print the table, and below it what is over its goal."""
    sys.path.insert(0, str(ROOT))
    measures = [*from_source(), *from_runs(), *timings()]
    print("| measure | before | now | goal |\n|---|---|---|---|")
    for m in measures:
        print(f"| {m.name} | {m.before} | {m.now:,} | {'' if m.goal is None else f'<= {m.goal:g}'} |")
    for m in measures:
        if m.goal is not None and m.now > m.goal:
            print(f"\n{m.name}: {m.detail or 'over its goal'}")
            if m.name in CEILINGS:
                print(f"At most {CEILINGS[m.name][0]:g} until: {CEILINGS[m.name][1]}")


if __name__ == "__main__":
    main()
