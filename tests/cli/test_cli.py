"""Every command as a person or a script would use it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from broken_inputs import BROKEN, write_case
from packaging.utils import canonicalize_name

COMMANDS = (
    "train",
    "sample",
    "score",
    "fit",
    "eval",
    "chat",
    "grade",
    "inspect",
    "recipes",
    "check",
    "plan",
    "doctor",
)


def last(out: str) -> dict:  # type: ignore[type-arg]
    """The result: the last line, compact ASCII JSON."""
    line = out.splitlines()[-1]
    assert line.isascii() and line == json.dumps(json.loads(line), separators=(",", ":"))
    return json.loads(line)


def test_help_names_every_command(cli) -> None:  # type: ignore[no-untyped-def]
    code, out, _ = cli("--help")
    assert code == 0 and all(f" {name} " in out for name in COMMANDS)
    for name in COMMANDS:
        code, out, _ = cli(name, "--help")
        assert code == 0 and "--json" in out and "--debug" in out


def test_commands_work_on_each_others_output(
    cli, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    """train, eval, chat, sample, score, fit, inspect: each takes what another wrote."""
    monkeypatch.chdir(tmp_path)
    code, out, err = cli("train", "--recipe", recipe_file, "--json")
    result = last(out)
    assert code == 0 and len(out.splitlines()) == 1 and "before training" in err
    assert result["run"] == "runs/fixture-001" and result["steps"] == 3
    assert {"seconds", "seconds_total", "accuracy_before", "accuracy_after"} <= result.keys()
    assert 0 <= result["accuracy_before"] <= 1 and result["seconds"] < result["seconds_total"]

    code, out, _ = cli("eval", "--json", "--k", 2, "--base")  # the newest run
    assert code == 0
    figures = last(out)
    keys = {"n", "pass@1", "pass@1_ci95", "mean_length", "pass@2", "maj@2", "t1_accuracy"}
    assert keys <= figures.keys() and keys <= figures["base"].keys()
    assert cli("eval", "runs/fixture-001/checkpoints/step-000003")[0] == 0

    code, out, _ = cli("chat", "--prompt", "1 + 1 = ?", "--gold", "2", "--compare", "--json")
    reply = last(out)
    assert code == 0 and reply["tuned"]["reward"] in (0.0, 1.0) and reply["tuned"]["tokens"] > 0
    assert "completion" in reply["base"]

    code, out, _ = cli("sample", "runs/fixture-001", "--out", "r.jsonl", "--problems", 3, "--json")
    assert code == 0 and last(out)["rationales"] == 24
    code, out, err = cli("fit", "r.jsonl", "--recipe", recipe_file, "--output-dir", "f", "--json")
    assert code == 65 and err.splitlines()[-1].startswith("error: 24 of 24 rationales have no reward")
    code, out, _ = cli("score", "r.jsonl", "--reward", "regex:[a-m]", "--json")
    assert code == 0 and last(out)["rationales"] == 24
    code, out, _ = cli("fit", "r.jsonl", "--from", "runs/fixture-001", "--output-dir", "f", "--json")
    assert code == 0 and last(out)["steps"] == 4

    code, out, _ = cli("sample", "runs/fixture-001/adapter", "--out", "a.jsonl", "--problems", 3, "--json")
    assert code == 0 and last(out)["rationales"] == 24

    code, out, _ = cli("inspect", "runs/fixture-001", "--step", 1, "--json", "--reward", 1)
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and all(r["reward"] == 1 and r["step"] == 1 for r in lines[:-1])
    assert lines[-1]["shown"] == len(lines) - 1
    code, out, _ = cli("inspect", "r.jsonl")
    assert code == 0 and "r.jsonl" in out


def test_results_in_text(cli, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    code, out, _ = cli("train", "--recipe", recipe_file, "--max-steps", 1)
    assert (
        code == 0
        and "greedy accuracy" in out
        and "T=1 accuracy" in out
        and "empg-lite chat runs/fixture-001" in out
    )
    assert "\r" not in out and "\x1b" not in out  # not a terminal: plain lines
    code, out, _ = cli("chat", "--prompt", "2 + 2 = ?", "--gold", "4")
    assert code == 0 and "tokens" in out and "reward" in out
    code, out, _ = cli("eval")
    assert code == 0 and "greedy accuracy" in out and "95% interval" in out and "every answer: " in out
    monkeypatch.setattr("sys.stdin", open(os.devnull))
    assert cli("chat")[0] == 0  # Ctrl-D at once


def test_a_run_in_use_is_refused(cli, recipe_file: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    from empg_lite.run import store

    with store.run_lock(tmp_path / "run"):
        code, out, err = cli("train", "--recipe", recipe_file, "-o", tmp_path / "run")
    assert code == 73 and f"in use by process {os.getpid()}" in err.splitlines()[-1]


def test_dry_run_prints_a_loadable_recipe(cli, recipe_file: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    from empg_lite.recipe.file import load_recipe

    code, out, _ = cli("train", "--recipe", recipe_file, "--dry-run", "--set", "em.passes=2", "--seed", 7)
    (tmp_path / "dry.yaml").write_text(out)
    recipe = load_recipe(str(tmp_path / "dry.yaml"))
    assert code == 0 and (recipe.em.passes, recipe.run.seed, recipe.data.reward) == (2, 7, "regex:[a-m]")
    code, out, _ = cli("train", "--recipe", recipe_file, "--dry-run", "--json", "--max-steps", 4)
    assert last(out)["run"]["steps"] == 4
    assert not (tmp_path / "runs").exists()


# --- grade --------------------------------------------------------------------------------------------


def test_grade_explains(cli) -> None:  # type: ignore[no-untyped-def]
    code, out, _ = cli("grade", "--gold", "1/2", "--prediction", "so \\boxed{0.5}")
    assert code == 0 and "reward 1" in out and "boxed" in out and "0.5" in out
    code, out, _ = cli("grade", "--gold", "18", "--prediction", "#### 17", "--reward", "gsm8k", "--json")
    verdict = last(out)
    assert verdict["reward"] == 0 and verdict["reason"] == "different" and verdict["extracted"] == "17"
    assert list(verdict) == ["reward", "reason", "extracted", "rule", "gold", "seconds"]


def test_grade_cases_prints_one_object_per_line(cli, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    rows = [
        {"gold": "4", "prediction": "\\boxed{4}", "extra": 1},
        {"gold": "4", "prediction": "\ud800 nul \x00 #### 5"},
        {"gold": "5", "prediction": "\\boxed{\\sum_{k=1}^{10^{9}} \\sin k}"},  # hangs: its worker is killed
        {"gold": "4", "prediction": "a" * 1_000_000},
        {"gold": "4", "prediction": "\\boxed{4}"},
    ]
    path = tmp_path / "cases.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    code, out, _ = cli("grade", "--cases", path)
    verdicts = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and len(verdicts) == 5
    assert [v["reward"] for v in verdicts] == [1.0, 0.0, 0.0, 0.0, 1.0]
    assert [v["reason"] for v in verdicts] == ["equal", "different", "timeout", "too_long", "equal"]


@pytest.mark.parametrize(
    ("arguments", "code", "what"),
    [
        (("nonsense",), 2, "No such command"),
        (("train", "--nonsense"), 2, "No such option"),
        (("train", "--max-steps", "0"), 2, "max-steps"),
        (("train", "--recipe", "tinny"), 66, "tiny"),
        (("train", "--recipe", "tiny", "--set", "em.pases=2"), 65, "passes"),
        (("eval", "nowhere"), 66, "no such run"),
        (("chat", "--prompt", "x"), 66, "no run found"),
        (("inspect",), 66, "no run found"),
        (("score", "absent.jsonl"), 66, "absent.jsonl"),
        (("grade", "--gold", "1"), 2, "--prediction"),
        (("grade", "--gold", "1", "--prediction", "1", "--reward", "gsm8"), 2, "gsm8k"),
        (("grade", "--gold", "1", "--prediction", "1", "--reward", "regex:("), 2, "regex"),
        (("recipes", "show"), 2, "recipes show NAME"),
        (("recipes", "show", "gsm8k-05b"), 66, "gsm8k-0.5b"),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(
    cli, arguments: tuple[str, ...], code: int, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    got, out, err = cli(*arguments)
    lines = err.strip().splitlines()
    assert got == code and out == ""
    assert len(lines) == 1 and lines[0].startswith("error: ") and what in lines[0]
    assert "Traceback" not in err


@pytest.mark.parametrize("case", BROKEN, ids=[case[0] for case in BROKEN])
def test_broken_inputs_are_one_line(cli, case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """One line, exit code 65, nothing on stdout."""
    _, files, overrides, fragments = case
    recipe = write_case(tmp_path, files)
    monkeypatch.chdir(tmp_path)
    changes = [part for text in overrides for part in ("--set", text)]
    code, out, err = cli("check", "--recipe", recipe, *changes)
    lines = err.strip().splitlines()
    assert (code, out, len(lines)) == (65, "", 1), err
    assert all(fragment in lines[0] for fragment in fragments), lines[0]


def test_internal_errors_are_named_and_debug_prints_a_traceback(cli, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    def broken() -> None:
        raise ZeroDivisionError("boom")

    monkeypatch.setattr("empg_lite.tools.doctor.packages", broken)
    code, _, err = cli("doctor")
    assert code == 70 and err.strip() == (
        "error: internal error: ZeroDivisionError: boom · repeat with --debug and report the traceback"
    )
    code, _, err = cli("doctor", "--debug")
    assert code == 70 and "Traceback" in err and err.strip().splitlines()[-1].startswith("error: internal")


def test_recipes_and_doctor(cli, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    code, out, _ = cli("recipes")
    assert code == 0 and all(name in out for name in ("tiny", "gsm8k-0.5b", "math-hard-3b", "custom-jsonl"))
    code, out, _ = cli("recipes", "show", "gsm8k-0.5b")
    assert code == 0 and "# optim.max_grad_norm" in out
    (tmp_path / "mine.yaml").write_text(out)
    assert cli("train", "--recipe", tmp_path / "mine.yaml", "--dry-run")[0] == 0
    code, out, _ = cli("doctor", "--json")
    assert json.loads(out)["models"] == "Qwen2.5, SmolLM2, Llama 3.2, Qwen3"
    found = last(out)
    assert found["packages"]["torch"]["installed"].startswith("2.") and found["device"]


def test_doctor_works_in_a_checkout_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the package on PYTHONPATH only, requirements are read from pyproject.toml."""
    from empg_lite.tools import doctor

    def names() -> set[tuple[str, bool]]:
        return {(canonicalize_name(f.name), f.optional) for f in doctor.packages()}

    installed = names()

    def absent(name: str) -> list[str]:
        raise doctor.PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "requires", absent)
    assert names() == installed >= {("torch", False), ("unsloth", True)}
    (torch,) = [f for f in doctor.packages() if f.name == "torch"]
    assert torch.ok and torch.wanted == "<2.15,>=2.10"


def test_check_exits_1_if_something_is_wrong(cli, recipe_file: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    code, out, _ = cli("check", "--recipe", recipe_file)
    assert (
        code == 0
        and "first prompt as the model sees it" in out
        and "16 train, 2 validation, 2 evaluation" in out
    )
    data = tmp_path / "bad.jsonl"
    data.write_text("".join(json.dumps({"question": f"q{i}", "answer": f"{i}"}) + "\n" for i in range(20)))
    args = ("check", "--recipe", recipe_file, "--set", f"data.path={data}", "--set", "data.reward=math")
    assert cli(*args)[0] == 0
    data.write_text(data.read_text() + json.dumps({"question": "empty?", "answer": "}"}) + "\n")
    code, out, _ = cli(*args, "--json")
    report = last(out)
    assert code == 1 and not report["ok"] and [f["gold"] for f in report["gold_failures"]] == ["}"]
    code, out, _ = cli(*args[:-1], "data.max_prompt_tokens=1", "--json")
    assert code == 1 and last(out)["too_long"] == last(out)["rows"]["train"]


def test_help_and_broken_recipes_do_not_import_torch(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom empg_lite.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as stopped:\n"
        "    heavy = ('torch', 'transformers', 'datasets', 'peft')\n"
        "    print(stopped.code, any(m in sys.modules for m in heavy))\n"
    )
    for arguments, expected in (
        (["--help"], "0 False"),
        (["train", "--recipe", "tiny", "--set", "em.passes=0"], "65 False"),
        (["grade", "--gold", "1", "--prediction", "1"], "0 False"),
        (["recipes"], "0 False"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines()[-1] == expected, arguments


def test_a_closed_pipe_is_not_an_error(recipe_file: Path) -> None:
    command = f"{sys.executable} -m empg_lite recipes show gsm8k-0.5b | head -1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True)
    assert "error" not in done.stderr and "Traceback" not in done.stderr


def test_a_command_to_copy_is_one_that_runs(cli, recipe_file: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """A path with a space is quoted; --resume where there is no run says that it begins one."""
    run = tmp_path / "a b"
    code, out, _ = cli(
        "train", "--recipe", recipe_file, "--max-steps", 1, "--set", "run.eval_every=0", "-o", run, "--resume"
    )
    assert code == 0 and f"empg-lite chat '{run}'" in " ".join(out.split())
    assert "there is no run to resume in" in out and "a new one starts" in out
    code, out, _ = cli(
        "train", "--recipe", recipe_file, "--max-steps", 1, "--set", "run.eval_every=0", "-o", run, "--resume"
    )
    assert code == 0 and "no run to resume" not in out


def test_odd_terminals_end_in_no_internal_error() -> None:
    """A closed standard input, an encoding without the characters, colors forced into a file."""
    code = (
        "import io, os, sys\n"
        "from empg_lite.cli import main\n"
        "from empg_lite.cli.output import Output\n"
        "def run(*arguments):\n"
        "    try: main([*arguments])\n"
        "    except SystemExit as stopped: return stopped.code\n"
        "sys.stdin = None\n"
        "assert run('grade', '--gold', '1', '--prediction', '-') == 2\n"
        "assert run('chat') == 2\n"
        "assert run('grade', '--gold', '\u00bd', '--prediction', 'It is \u00bd \u2713') == 0\n"
        "os.environ['FORCE_COLOR'] = '1'\n"
        "out = Output(False)\n"
        "assert not out.console.is_terminal and out.console.color_system == 'standard'\n"
        "out.say('red', style='red')\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("standard input is closed") == 2 and "internal error" not in done.stderr
    assert "\\xbd" in done.stdout and "\x1b[31mred" in done.stdout
