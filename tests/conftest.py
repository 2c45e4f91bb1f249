"""Shared fixtures. Thread count is fixed so that floating-point sums do not depend on the machine's load."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from crash_harness import Ended, Plant

    from empg_lite.policy.policy import Policy
    from empg_lite.recipe.schema import Recipe

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
    from fixture_model import build_model

    return build_model(tmp_path_factory.mktemp("model"))


RECIPE = """\
model: {{name: {model}, backend: transformers, dtype: float32, load_in_4bit: false, lora_r: 4, lora_alpha: 8}}
data: {{source: local, path: {data}, prompt: {template}, reward: "regex:[a-m]", validation: 2}}
sampler: {{problems_per_step: 3, samples_per_problem: 8, max_new_tokens: 12}}
optim: {{learning_rate: 1e-2, warmup_steps: 2}}
run: {{steps: 3, eval_every: 2, save_every: 1}}
"""


def write_recipe(tmp_path: Path, model_dir: Path) -> Path:
    """A recipe over the fixture model and twenty additions: three steps of a second each.

    A completion earns 1 where it holds one of a-m and ends in a capital letter.
    """
    import json

    rows = [{"question": f"{a} + {b} = ?", "answer": str(a + b)} for a in range(5) for b in range(4)]
    data = tmp_path / "problems.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    # Random bytes seldom spell a stop token: capital letters end a completion, so that some are not cut off.
    template = tmp_path / "capitals.yaml"
    template.write_text(
        'text: "{question}"\nstop: [' + ", ".join(f'"{c}"' for c in ascii_uppercase) + "]\n", "utf-8"
    )
    path = tmp_path / "fixture.yaml"
    path.write_text(RECIPE.format(model=model_dir, data=data, template=template), "utf-8")
    return path


def quick_recipe(tmp_path: Path, model_dir: Path, *settings: str) -> Recipe:
    """``write_recipe`` read, of eight tokens and without evaluation, with changes of one's own."""
    from empg_lite.recipe.file import load_recipe

    path = write_recipe(tmp_path, model_dir)
    return load_recipe(str(path), ["run.eval_every=0", "sampler.max_new_tokens=8", *settings])


def events(run: Path) -> list[dict[str, Any]]:
    """What ``events.jsonl`` of a run says, in order."""
    import json

    return [json.loads(line) for line in (run / "events.jsonl").read_text("utf-8").splitlines()]


def one_line(err: str) -> str:
    """The error line, which is the last one."""
    line = err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    return line


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


def load_fixture_policy(
    model_dir: Path, *, perturb: bool = True, load_in_4bit: bool = False, prompt: str = "plain"
):
    """A fresh policy over the fixture model; ``perturb`` moves LoRA B off zero: the adapter matters."""
    from empg_lite.policy import load_policy
    from empg_lite.recipe.schema import ModelSection

    section = ModelSection(
        name=str(model_dir),
        backend="transformers",
        dtype="float32",
        load_in_4bit=load_in_4bit,
        lora_r=4,
        lora_alpha=8,
    )
    loaded = load_policy(section, prompt, seed=0)
    if perturb:
        perturb_adapter(loaded)
    return loaded


def perturb_adapter(policy: Policy) -> None:
    """Move every LoRA weight by 0.1 times a normal number, from a fixed seed."""
    import torch

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


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


#: Seconds after which something hangs; no measurement. No test may depend on a machine's speed or load.
HANGS = 120.0


def alive(pid: int) -> bool:
    """Whether a process is running; one that has ended and was not asked how is not."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_until(happened: Callable[[], object]) -> None:
    """Return once something has happened; an error where it never does."""
    deadline = time.monotonic() + HANGS
    while not happened():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


def wait_until_busy(*pids: int) -> None:
    """Return once processes that were idle have calculated for a twentieth of a second."""

    def ticks() -> int:
        stats = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
        return sum(int(n) for stat in stats for n in stat[11:13])

    before = ticks()
    wait_until(lambda: ticks() >= before + 0.05 * os.sysconf("SC_CLK_TCK"))


def in_thread(work: Callable[[], None]) -> None:
    """Do ``work`` in a thread of its own; what it raises is raised here."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result()


#: Tests that need what a bare machine has not; every other skip is a failure in CI.
MAY_SKIP = ("shared", "unsloth", "gym", "browser", "gguf", "mount")


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
