"""The Python API matches the commands: the same files, figures and errors."""

from __future__ import annotations

import ast
import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer.main
from run_files import stable

import empg_lite
from empg_lite import api
from empg_lite.api import LoadedPolicy
from empg_lite.cli import app
from empg_lite.core.errors import DataError, EmpgError, MissingInput, RecipeError, UsageError
from empg_lite.core.rationale import Problem
from empg_lite.core.view import View


class Watcher(View):
    def __init__(self) -> None:
        self.steps: list[int] = []

    def step(self, record, total) -> None:  # type: ignore[no-untyped-def]
        self.steps.append(record["step"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> tuple[api.Run, Path, Watcher]:
    """A run of three steps through the API, its recipe, and the view that watched it."""
    from fixture_recipe import write_recipe

    folder = tmp_path_factory.mktemp("api")
    recipe, watcher = write_recipe(folder, model_dir), Watcher()
    return api.run(recipe, folder / "run", seed=5, view=watcher), recipe, watcher


def test_run_is_train(cli, trained: tuple[api.Run, Path, Watcher], tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    run, recipe, watcher = trained
    code, _, _ = cli("train", "--recipe", recipe, "--seed", 5, "--output-dir", tmp_path / "by-command")
    assert code == 0
    other = api.load_run(tmp_path / "by-command")
    assert [stable(r) for r in run.metrics()] == [stable(r) for r in other.metrics()]
    weights = "adapter/adapter_model.safetensors"
    assert (run.path / weights).read_bytes() == (other.path / weights).read_bytes()
    assert watcher.steps == [1, 2, 3] == [r["step"] for r in run.metrics()][1:]  # 0 is the evaluation before
    assert run.summary["steps"] == 3 and run.summary["run"] == str(run.path) and not other.summary
    assert run.recipe.run.seed == 5 and run.recipe == other.recipe


def test_run_reads_what_was_stored(trained: tuple[api.Run, Path, Watcher]) -> None:
    run = trained[0]
    rows = run.rationales(2)
    assert len(rows) == 24 and {r.step for r in rows} == {2}
    assert run.rationales() == run.rationales(3) != rows
    mean = sum(r.reward for r in rows if not r.failed) / len(rows)
    assert run.metrics()[2]["reward"] == pytest.approx(mean, abs=1e-12)
    assert all("event" in e for e in run.events())
    with pytest.raises(MissingInput):
        run.rationales(9)


def test_evaluate_model_is_eval(cli, trained: tuple[api.Run, Path, Watcher]) -> None:  # type: ignore[no-untyped-def]
    run, _, _ = trained
    figures = api.evaluate_model(run, k=2, base=True)
    code, out, _ = cli("eval", run.path, "--k", 2, "--base", "--json")
    assert code == 0 and json.loads(out.splitlines()[-1]) == json.loads(json.dumps(figures))
    assert figures["pass@1"] == run.summary["accuracy_after"]


def test_loaded_policy_answers_as_in_chat(cli, trained: tuple[api.Run, Path, Watcher]) -> None:  # type: ignore[no-untyped-def]
    run, _, _ = trained
    policy = api.load_policy(run)
    answer = policy.answer("3 + 4 = ?")
    code, out, _ = cli("chat", run.path, "--prompt", "3 + 4 = ?", "--compare", "--json")
    said = json.loads(out.splitlines()[-1])
    assert code == 0 and answer.completion == said["tuned"]["completion"]
    with policy.as_base():
        base = policy.answer("3 + 4 = ?")
    assert base.completion == said["base"]["completion"] != answer.completion
    assert answer.reward is None

    group = policy.sample("3 + 4 = ?", 6)
    texts = [r.completion for r in group.rationales]
    assert len(texts) == 6 and len(set(texts)) > 1
    assert [r.completion for r in policy.sample("3 + 4 = ?", 6).rationales] == texts
    assert [r.completion for r in policy.sample("3 + 4 = ?", 6, seed=1).rationales] != texts
    with pytest.raises(DataError, match="context"):
        policy.answer("1 + " * 5000)


def test_sample_score_fit_is_a_step_of_train(trained: tuple[api.Run, Path, Watcher], tmp_path: Path) -> None:
    run, recipe, _ = trained
    out = tmp_path / "rollouts.jsonl"
    said = api.sample_rationales(recipe, out, problems=3, overrides={"run.seed": 5})
    assert said["rationales"] == 24
    scored = api.score_rationales(out, "regex:[a-m]")
    assert scored["rationales"] == 24 and 0 < scored["reward"] < 1
    fitted = api.fit_rationales(
        [out], recipe, tmp_path / "fit", overrides={"run.seed": 5, "run.eval_every": 0}
    )
    (record,) = fitted.metrics()
    first = run.metrics()[1]
    # The first step of the run sampled, scored and fitted the same rationales.
    assert (record["reward"], record["loss"], record["grad_norm"]) == (
        first["reward"],
        first["loss"],
        first["grad_norm"],
    )


def test_grading_planning_and_problems(trained: tuple[api.Run, Path, Watcher]) -> None:
    assert api.grade_answer(r"so it is \boxed{0.5}", "1/2").reward == 1
    assert api.grade_answer("#### 7", "8", "gsm8k").reason == "different"
    assert api.plan_memory("tiny", "2GB").fits
    huge = {
        "sampler.problems_per_step": 4096,
        "sampler.samples_per_problem": 64,
        "sampler.batch_rows": 200_000,
    }
    assert not api.plan_memory("tiny", "2GB", overrides=huge).fits
    problems = api.load_problems(trained[1], "train")
    assert {p.gold for p in problems} <= {str(n) for n in range(9)}
    assert len(api.load_problems("tiny")) == 500


@pytest.mark.slow
def test_report_and_export(trained: tuple[api.Run, Path, Watcher], tmp_path: Path) -> None:
    run = trained[0]
    made = api.write_report(run, tmp_path / "r.html")
    assert made["runs"] == 1 and (tmp_path / "r.html").is_file()
    shutil.copytree(run.path, tmp_path / "copy")
    assert api.write_report([run, str(tmp_path / "copy")], tmp_path / "two.html")["runs"] == 2
    with pytest.raises(UsageError, match="twice"):
        api.write_report([run, str(run.path)], tmp_path / "two.html")
    merged = api.export_run(run, "merged", tmp_path / "m", dtype="float32")
    assert merged["dtype"] == "float32" and merged["argmax_agreement"] == 1.0
    assert api.export_run(run, "sft-dataset", tmp_path / "s.jsonl")["rows"] > 0
    with pytest.raises(UsageError, match="sft-dataset"):
        api.export_run(run, "onnx", tmp_path / "x")


def test_errors_match_the_command(trained: tuple[api.Run, Path, Watcher], tmp_path: Path) -> None:
    run, recipe, _ = trained
    with pytest.raises(RecipeError, match="learning_rate"):
        api.run(recipe, tmp_path / "a", overrides={"optim.learning_rate": "fast"})
    with pytest.raises(UsageError, match="--resume"):
        api.run(recipe, run.path)
    with pytest.raises(UsageError, match="read_recipe"):
        api.run(api.read_recipe(recipe), tmp_path / "b", seed=1)
    with pytest.raises(MissingInput):
        api.load_run(tmp_path)
    with pytest.raises(MissingInput):
        api.load_policy(str(tmp_path / "nothing" / "here"))
    (tmp_path / "mine.py").write_text("def reward(completion, gold, question, meta):\n    return 1.0\n")
    mine = f"python:{tmp_path / 'mine.py'}"
    with pytest.raises(UsageError, match="allow-code"):
        api.grade_answer("x", "y", mine)
    assert api.grade_answer("x", "y", mine, allow_code=True).reward == 1
    for seeds, more in (((1, 1), {}), ((0, 1), {"seed": 3}), ((0, -1), {})):
        with pytest.raises(UsageError, match="--seeds"):
            api.run(recipe, tmp_path / "a", seeds=seeds, **more)
    assert not list(tmp_path.glob("[ab]")), "a refused run leaves nothing behind"


def test_overrides_take_python_values() -> None:
    recipe = api.read_recipe("tiny", overrides={"run.eval_limit": None, "model.load_in_4bit": True})
    assert recipe.run.eval_limit is None and recipe.model.load_in_4bit is True
    assert api.read_recipe("tiny", overrides={"optim.learning_rate": 1e-5}).optim.learning_rate == 1e-5
    assert api.read_recipe("tiny", overrides={"data.eval_split": "007"}).data.eval_split == "007"


#: Options whose parameter has another name, or that only matter for what is printed.
RENAMED = {"set": "overrides", "track": "trackers", "from": "source", "cases": "file"}
PRINTING = {"help", "json", "debug", "dry-run"}


@pytest.mark.parametrize(
    ("command", "functions"),
    [
        ("train", [api.run]),
        ("sample", [api.sample_rationales]),
        ("score", [api.score_rationales]),
        ("fit", [api.fit_rationales]),
        ("eval", [api.find_model, api.evaluate_model]),
        ("chat", [api.find_model, api.open_chat, LoadedPolicy.answer]),
        ("check", [api.check_recipe]),
        ("plan", [api.plan_memory]),
        ("grade", [api.grade_answer, api.grade_cases]),
        ("report", [api.write_report]),
    ],
)
def test_every_option_of_a_command_is_a_parameter(command: str, functions: list[Any]) -> None:
    """What the command line can do, Python can: ``--max-steps`` and ``--seed`` are overrides, too."""
    known = {name for function in functions for name in inspect.signature(function).parameters}
    group: Any = typer.main.get_command(app)
    options = {o[2:] for p in group.commands[command].params for o in p.opts if o.startswith("--")}
    wanted = {RENAMED.get(o, o.replace("-", "_")) for o in options - PRINTING}
    if "overrides" in known:
        wanted -= {"seed", "max_steps"}
    if command == "chat":  # what the conversation asks
        wanted -= {"prompt", "gold", "compare", "file"}
    assert wanted <= known, wanted - known


def test_the_small_functions_match_their_commands(cli, trained: tuple[api.Run, Path, Watcher]) -> None:  # type: ignore[no-untyped-def]
    run, recipe, _ = trained

    def printed(*words: object) -> dict[str, Any]:
        return json.loads(cli(*words, "--json")[1].splitlines()[-1])

    assert api.resolve_recipe(recipe, seed=3).model_dump(mode="json") == printed(
        "train", "--recipe", recipe, "--seed", 3, "--dry-run"
    )
    assert api.resolve_recipe(None, run.path, resume=True) == run.recipe
    assert json.loads(json.dumps(api.check_recipe(recipe).facts())) == printed("check", "--recipe", recipe)
    assert {"recipes": api.list_recipes()} == printed("recipes")
    path, rows = api.read_rationales(run, 2)
    assert path.name == "step-000002.jsonl" and rows == run.rationales(2)
    plan = api.plan_memory("gsm8k-7b", "12GB", overrides=["sampler.batch_rows=256"])
    advice = api.advise_memory(plan)
    assert advice and api.plan_memory("gsm8k-7b", "12GB", overrides=["sampler.batch_rows=256", *advice]).fits
    verdict = api.grade_answer("#### 7", "8", "gsm8k")
    assert api.explain_grade(verdict, "#### 7", "gsm8k")[-1] == "reward 0: different"
    with api.open_chat(run) as (chat, grader):
        (reply,) = chat.ask(Problem.asked("3 + 4 = ?", "7"), grader)
    assert reply.rationale.completion == api.load_policy(run).answer("3 + 4 = ?").completion


def test_every_public_name_is_typed_documented_and_listed() -> None:
    nodes = [
        n for n in ast.parse(inspect.getsource(api)).body if isinstance(n, ast.FunctionDef | ast.ClassDef)
    ]
    public = {n.name for n in nodes if not n.name.startswith("_")}
    # A function that is also a module would hide it; the folder ``run`` is of no use by itself.
    assert not public & ({p.stem for p in Path(empg_lite.__file__).parent.iterdir()} - {"run"})
    assert (Path(empg_lite.__file__).parent / "py.typed").is_file()
    page = (Path(__file__).parents[1] / "docs" / "python.md").read_text("utf-8")
    for name in public:
        thing = getattr(api, name)
        assert inspect.getdoc(thing) and (f"`{name}`" in page or f"api.{name}(" in page), name
        if inspect.isfunction(thing):
            assert all(p.annotation is not p.empty for p in inspect.signature(thing).parameters.values()), (
                name
            )
    assert len(public) > 25 and issubclass(MissingInput, EmpgError)
