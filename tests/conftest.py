"""Shared fixtures. Thread count is fixed so that floating-point sums do not depend on the machine's load."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fixture_model import build_model, load_fixture_policy
from fixture_recipe import write_recipe

if TYPE_CHECKING:
    from crash_harness import Ended, Plant

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A shell gives what it starts with `&` a SIGINT that is ignored, children included; Ctrl-C is tested here.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the checkout."""
    root = Path(os.environ.get("EMPG_SHARED", Path(__file__).parents[2] / "shared"))
    if not (root / "data").is_dir():
        pytest.skip(f"real data not found at {root} (set EMPG_SHARED)")
    return root / "data"


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fixture model, built once a session."""
    return build_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def recipe_file(tmp_path: Path, model_dir: Path) -> Path:
    """See ``write_recipe``."""
    return write_recipe(tmp_path, model_dir)


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]):
    """Run a command in this process: ``cli("train", ...) -> (exit code, stdout, stderr)``."""
    from empg_lite.cli import main

    def run(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([str(a) for a in arguments])
        out, err = capfd.readouterr()
        return int(stopped.value.code or 0), out, err

    return run


@pytest.fixture(scope="session")
def policy(model_dir: Path):
    """The fixture model with a LoRA that is not zero, plain prompt."""
    return load_fixture_policy(model_dir)


@pytest.fixture(scope="session")
def plant(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[Plant]:
    """Forked children that train; in memory where the machine has such a folder: a kill knows no disk."""
    from crash_harness import Plant

    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield Plant(tmp_path_factory.mktemp("crash"), model_dir)
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Plant(Path(folder), model_dir)


@pytest.fixture(scope="session")
def straight_child(plant: Plant) -> tuple[Ended, str]:
    """A child that nothing happens to: how it ended, and the digest of its run."""
    from crash_harness import CALLS, digest

    run = plant.fresh()
    ended = plant.run(run)
    assert ended.code == 0 and len(ended.calls) > 150
    assert {name for name, _ in ended.calls} >= set(CALLS) - {"_cut"}
    return ended, digest(run)


#: Tests that need what a bare machine has not; every other skip is a failure in CI.
MAY_SKIP = ("shared", "unsloth", "gym", "browser", "gguf", "mount", "smollm2")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    """In CI a mandatory test that skips is a failure: a skipped promise is none."""
    report = yield
    optional = any(item.get_closest_marker(name) for name in MAY_SKIP)
    if os.environ.get("CI") and report.skipped and not optional and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"mandatory test skipped in CI: {report.longrepr}"
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many optional tests did not run, and why."""
    reasons: dict[str, int] = {}
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reasons[reason] = reasons.get(reason, 0) + 1
    for reason, count in reasons.items():
        terminalreporter.write_line(f"{count} optional tests not run: {reason}")
