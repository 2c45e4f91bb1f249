"""A row of docs/results.md: only from a run that ended well, with the figures of that run, once."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from fixture_recipe import write_recipe

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "real_models.py"
LIMIT, STEPS = "--limit=4", 20


@pytest.fixture
def real_models(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("real_models")


@pytest.fixture
def results_page(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("results_page")


def empty_docs(folder: Path) -> Path:
    """A folder with a results page that has no rows yet."""
    folder.mkdir()
    text = "# Results\n\n<!-- rows: real -->\n<!-- end: real -->\n\nand\n\n"
    (folder / "results.md").write_text(f"{text}<!-- rows: rehearsal -->\n<!-- end: rehearsal -->\nend\n")
    return folder


def rows(docs: Path, table: str = "real") -> list[dict[str, str]]:
    """The rows of a table of the page, column -> cell; read without the code that wrote them."""
    text = (docs / "results.md").read_text("utf-8")
    part = text.split(f"<!-- rows: {table} -->")[1].split(f"<!-- end: {table} -->")[0]
    lines = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("|")]
    return [dict(zip(lines[0], cells, strict=True)) for cells in lines[2:]]


def share(value: float) -> str:
    return f"{100 * value:.1f}%"


def in_this_process(words: list[str], *, cpu: bool, beat: Callable[[], None]) -> Any:
    """``child.run_command`` without a child: libraries that are here already are not loaded once more."""
    from empg_lite.cli import main

    assert cpu
    beat()
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as ended:
        main(words)
    return importlib.import_module("child").Ended(int(ended.value.code or 0), out.getvalue(), None)


def command(arguments: list[str]) -> dict[str, Any]:
    """The script as a process of its own, for ``subprocess``."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return {"args": [sys.executable, str(SCRIPT), *arguments], "text": True, "env": environment}


def stopped_in_the_middle(arguments: list[str], runs: Path, docs: Path) -> dict[str, Any]:
    """Start the script, interrupt it after two steps; what it said and left.

    Where the machine is busy it may have trained to its end by then: from the beginning.
    """
    victim = subprocess.Popen(**command(arguments), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 600
    while not (found := list(runs.glob("*/metrics.jsonl"))) or found[0].read_bytes().count(b"\n") < 2:
        assert victim.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    victim.send_signal(signal.SIGINT)
    _, err = victim.communicate(timeout=600)
    if found[0].read_bytes().count(b"\n") == STEPS:
        shutil.rmtree(runs)
        shutil.rmtree(docs)
        return stopped_in_the_middle(arguments, runs, empty_docs(docs))
    return {
        "code": victim.returncode,
        "err": err,
        "rows": rows(docs),
        "raw": (docs / "results").exists(),
        "steps": found[0].read_bytes().count(b"\n"),
        "state": json.loads((found[0].parent / "row.json").read_text()),
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> dict[str, Any]:
    """A row of the fixture model: stopped by a signal in the middle of training, repeated to the end."""
    folder = tmp_path_factory.mktemp("real")
    recipe, docs, runs = write_recipe(folder, model_dir), empty_docs(folder / "docs"), folder / "runs"
    pairs = [(a, b) for a in range(8) for b in range(8)]  # enough for an evaluation of six
    sums = [json.dumps({"question": f"{a} + {b} = ?", "answer": str(a + b)}) for a, b in pairs]
    (folder / "problems.jsonl").write_text("\n".join(sums))
    arguments = ["--recipe", str(recipe), "--cpu", LIMIT, "--set", f"run.steps={STEPS}"]
    arguments += ["--set", "run.eval_every=0", "--runs", str(runs), "--docs", str(docs)]
    stopped = stopped_in_the_middle(arguments, runs, docs)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        script = importlib.import_module("real_models")
        patch.setattr(script, "run_command", in_this_process)
        assert script.main(arguments) == 0
    (run,) = runs.iterdir()
    return {"docs": docs, "run": run, "arguments": arguments, "stopped": stopped}


@pytest.mark.slow
def test_an_interrupted_training_fills_no_row(made: dict[str, Any]) -> None:
    stopped = made["stopped"]
    assert stopped["code"] == 130 and 1 < stopped["steps"] < STEPS, "it was in the middle"
    assert stopped["err"].splitlines()[-1].startswith("error: stopped after step ")
    assert stopped["rows"] == [] and not stopped["raw"]
    assert set(stopped["state"]["seconds"]) == {"train"} and "train" not in stopped["state"]


@pytest.mark.slow
def test_repeated_it_goes_on_and_gives_one_row(made: dict[str, Any]) -> None:
    events = [json.loads(line) for line in (made["run"] / "events.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e["event"] == "resumed"] == [made["stopped"]["steps"]]
    (row,) = rows(made["docs"])
    assert row["steps"] == str(STEPS) and row["seed"] == "0" and f"--limit={row['n']}" == LIMIT
    assert rows(made["docs"], "rehearsal") == []
    assert "No row is filled without a run." in (made["docs"] / "results.md").read_text()
    (raw,) = (made["docs"] / "results").iterdir()
    record = json.loads(raw.read_text())
    assert row["raw"] == f"[json](results/{raw.name})" and raw.stem == record["name"] == made["run"].name
    first = made["stopped"]["state"]["seconds"]["train"]
    assert record["seconds"]["train"] > first > 0, "the time of the attempt that was stopped counts"
    assert str(made["run"]) not in json.dumps(record["evaluation"]), "no folder of this machine"


@pytest.mark.slow
def test_the_figures_are_those_of_the_evaluation(made: dict[str, Any]) -> None:
    """Against the files that ``eval`` wrote itself."""
    (row,) = rows(made["docs"])
    sides = []
    for label in ("base", "adapter"):
        (path,) = (made["run"] / "eval").glob(f"{label}-test-*/figures.json")
        sides.append(json.loads(path.read_text()))
    base, tuned = sides
    for column, name in (
        ("T=1", "t1_accuracy"),
        ("pass@8", "pass@8"),
        ("maj@8", "maj@8"),
        ("cut off", "truncated"),
    ):
        assert row[column] == f"{share(base[name])} → {share(tuned[name])}", column
    assert row["length"] == f"{base['mean_length']:.1f} → {tuned['mean_length']:.1f}"
    greedy = [f"{share(s['pass@1'])} [{', '.join(map(share, s['pass@1_ci95']))}]" for s in sides]
    assert row["greedy, 95% interval"] == " → ".join(greedy)
    assert base["t1_accuracy"] < tuned["t1_accuracy"], "the two sides differ: exchanged ones would be seen"
    points = 100 * (tuned["pass@1"] - base["pass@1"])
    assert row["gain"].startswith(f"{points:+.1f} points, p")
    (raw,) = (made["docs"] / "results").iterdir()
    evaluation = json.loads(raw.read_text())["evaluation"]
    assert evaluation["base"] == {k: v for k, v in base.items() if k != "split"}
    assert {k: evaluation[k] for k in tuned} == tuned
    metrics = [json.loads(line) for line in (made["run"] / "metrics.jsonl").read_text().splitlines()]
    peak = max(m["memory/peak_rss_mb"] for m in metrics if m["step"])
    assert row["peak memory"] == f"process {peak / 1024:.2f} GiB"


@pytest.mark.slow
def test_in_one_piece_the_figures_are_the_same(made: dict[str, Any], tmp_path: Path) -> None:
    """The script with its two processes, never stopped: the same evaluation to the last digit."""
    docs = empty_docs(tmp_path / "docs")
    arguments = [*made["arguments"], "--runs", str(tmp_path / "runs"), "--docs", str(docs)]
    done = subprocess.run(**command(arguments), capture_output=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith(made["run"].name), done.stderr
    (one,), (other,) = ((d / "results").iterdir() for d in (docs, made["docs"]))
    assert one.name == other.name and len(rows(docs)) == 1
    straight, repeated = (json.loads(path.read_text()) for path in (one, other))
    assert straight["evaluation"] == repeated["evaluation"]
    assert straight["machines"] == repeated["machines"] and straight["versions"] == repeated["versions"]


@pytest.mark.slow
def test_once_more_changes_nothing(
    made: dict[str, Any], real_models: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has ended is not run again, and the row is the same to the byte."""
    monkeypatch.setattr(real_models, "run_command", None)
    before = {p: p.read_bytes() for p in made["docs"].rglob("*") if p.is_file()}
    (made["docs"] / "results.md").write_text((empty_docs(tmp_path / "docs") / "results.md").read_text())
    assert real_models.main(made["arguments"]) == 0
    assert {p: p.read_bytes() for p in made["docs"].rglob("*") if p.is_file()} == before


@pytest.mark.slow
def test_what_is_another_row(
    made: dict[str, Any], real_models: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another seed, setting, limit or commit is another run; more time or another folder is not."""

    def name(*more: str) -> str:
        return real_models.plan(real_models.arguments([*made["arguments"], *more])).run.name

    same = {name(), name("--max-minutes", "5"), name("--docs", "elsewhere"), name("--seed", "0")}
    assert same == {made["run"].name}
    others = [name("--seed", "1"), name("--set", "optim.learning_rate=1e-3"), name("--limit", "5")]
    monkeypatch.setattr(real_models, "code_commit", lambda *_: "0123abc")
    others.append(name())
    assert len({*same, *others}) == 5


# --- failures -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (["--recipe", "gsm8k-9b", "--cpu"], 66, "error: no recipe named 'gsm8k-9b' · recipe · "),
        (["--recipe", "tiny", "--set", "run.stepz=3"], 65, "error: no key named run.stepz"),
        (["--recipe", "tiny", "--limit", "0"], 2, "error: --limit 0 leaves no problem"),
        (["--recipe", "gsm8k-0.5b"], 2, "error: torch finds no GPU · --recipe gsm8k-0.5b · say --cpu"),
        (["--recipe", "tiny", "--docs", "absent"], 66, "error: no results page · absent/results.md"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(
    real_models: ModuleType,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    more: list[str],
    code: int,
    said: str,
) -> None:
    """Nothing is started and nothing is written."""
    monkeypatch.setattr(real_models, "run_command", None)
    monkeypatch.setattr(real_models, "card", lambda: None)
    docs = empty_docs(tmp_path / "docs")
    before = (docs / "results.md").read_bytes()
    assert real_models.main(["--docs", str(docs), "--runs", str(tmp_path / "runs"), *more]) == code
    out, err = capfd.readouterr()
    assert out == "" and err.startswith(said) and err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["docs"] and (docs / "results.md").read_bytes() == before


def test_a_training_that_fails_fills_no_row(
    real_models: ModuleType,
    recipe_file: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Missing data: the line and the code are those of ``train``."""
    monkeypatch.setattr(real_models, "run_command", in_this_process)
    docs = empty_docs(tmp_path / "docs")
    (tmp_path / "problems.jsonl").unlink()
    options = ["--recipe", str(recipe_file), "--cpu", "--docs", str(docs), "--runs", str(tmp_path / "runs")]
    assert real_models.main(options) == 66
    out, err = capfd.readouterr()
    assert out == "" and err.splitlines()[-1].startswith("error: no such data file · ")
    assert rows(docs) == [] and not (docs / "results").exists()


def test_a_card_is_used_unless_told_otherwise(
    real_models: ModuleType, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bundled model stays on the CPU: its table says so."""
    child, used = importlib.import_module("child"), []

    def run(words: list[str], *, cpu: bool, beat: Any) -> Any:
        used.append(cpu)
        return child.Ended(71, "", None)

    monkeypatch.setattr(real_models, "run_command", run)
    monkeypatch.setattr(real_models, "card", lambda: {"name": "Card A", "gpu_gib": 8.0, "cuda": "12.8"})
    folders = ["--docs", str(empty_docs(tmp_path / "docs")), "--runs", str(tmp_path / "runs")]
    for more in (
        ["--recipe", str(recipe_file)],
        ["--recipe", str(recipe_file), "--cpu"],
        ["--recipe", "tiny"],
    ):
        assert real_models.main([*more, *folders]) == 71
    assert used == [False, True, True]


@pytest.mark.parametrize("fails", ["train", "eval", "time"])
@pytest.mark.slow
def test_only_two_commands_that_ended_well_make_a_row(
    made: dict[str, Any],
    real_models: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fails: str,
) -> None:
    """Killed in training or evaluation, or out of time: no row; the next attempt fills it."""
    child = importlib.import_module("child")
    state = json.loads((made["run"] / "row.json").read_text())
    asked: list[str] = []

    def run(words: list[str], *, cpu: bool, beat: Any) -> Any:
        assert cpu and words[-1] == "--json"
        asked.append(words[0])
        if words[0] == fails:
            return child.Ended(-9, "", None)
        result = state[words[0]] | ({"steps": 7} if fails == "time" and words[0] == "train" else {})
        return child.Ended(0, json.dumps(result) + "\n", None)

    docs, runs = empty_docs(tmp_path / "docs"), tmp_path / "runs"
    shutil.copytree(made["run"], runs / made["run"].name)
    (runs / made["run"].name / "row.json").unlink()
    monkeypatch.setattr(real_models, "run_command", run)
    options = [*made["arguments"], "--docs", str(docs), "--runs", str(runs)]
    assert real_models.main(options) == {"train": 137, "eval": 137, "time": 0}[fails]
    assert rows(docs) == [] and not (docs / "results").exists()
    assert asked == (["train", "eval"] if fails == "eval" else ["train"])
    expected = ["eval"] if fails == "eval" else ["train", "eval"]
    fails, asked[:] = "", []
    assert real_models.main(options) == 0 and len(rows(docs)) == 1
    assert asked == expected, "what had ended is not asked for again"


# --- the page -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_rows_are_appended_and_replaced(
    made: dict[str, Any], results_page: ModuleType, tmp_path: Path
) -> None:
    (raw,) = (made["docs"] / "results").iterdir()
    record, docs = json.loads(raw.read_text()), empty_docs(tmp_path / "docs")
    results_page.add_record(docs, record)
    other = copy.deepcopy(record) | {"name": "other", "seed": 1, "finished": "2999-01-01T00:00:00+00:00"}
    other |= {"command": "python benchmarks/real_models.py --set 'data.reward=regex:a|b'"}
    card = {"name": "Card A", "gpu_gib": 7.996, "cuda": "12.8"}
    other |= {"machines": [card, card | {"name": "Card B"}], "peak_mib": {"gpu": 2560.0, "rss": 512.0}}
    results_page.add_record(docs, other)
    assert [r["seed"] for r in rows(docs)] == ["0", "1"]
    assert r"regex:a\|b" in rows(docs)[1]["command"], "a bar does not end the cell"
    assert rows(docs)[1]["machine"] == "Card A, 8.0 GiB, then Card B, 8.0 GiB"
    assert rows(docs)[1]["peak memory"] == "GPU 2.50 GiB, process 0.50 GiB"
    again = copy.deepcopy(record)
    again["evaluation"]["pass@8"] = 0.125
    results_page.add_record(docs, again)
    assert [r["pass@8"].split(" → ")[1] == "12.5%" for r in rows(docs)] == [True, False]
    results_page.add_record(docs, other | {"name": "third", "rehearsal": True})
    assert len(rows(docs)) == 2 and len(rows(docs, "rehearsal")) == 1
    text = (docs / "results.md").read_text()
    assert text.startswith("# Results\n\n<!-- rows") and text.endswith("-->\nend\n") and "\n\nand\n\n" in text


@pytest.mark.parametrize("name", ["real", "rehearsal"])
def test_a_page_without_its_markers_is_refused(results_page: ModuleType, tmp_path: Path, name: str) -> None:
    docs = empty_docs(tmp_path / "docs")
    page = docs / "results.md"
    good = page.read_text()
    assert results_page.check_page(docs) == good
    begin, end = f"<!-- rows: {name} -->", f"<!-- end: {name} -->"
    for bad in (
        good.replace(begin, ""),
        good + end,
        good.replace(begin, "x").replace(end, begin).replace("x", end),
    ):
        page.write_text(bad)
        with pytest.raises(results_page.DataError, match=f"no place for the {name} rows"):
            results_page.check_page(docs)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"name": "broken", "evaluation": null}'])
def test_broken_raw_figures_are_named(results_page: ModuleType, tmp_path: Path, text: str) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "broken.json").write_text(text)
    with pytest.raises(results_page.DataError, match="not the raw figures of a row .*broken.json"):
        results_page.read_records(tmp_path)


def test_the_committed_page_is_what_its_raw_figures_say(results_page: ModuleType) -> None:
    """No row was written by hand, and the bundled models are rehearsals."""
    text, records = results_page.check_page(ROOT / "docs"), results_page.read_records(ROOT / "docs")
    assert results_page.render(text, records) == text
    assert len(records) == len(rows(ROOT / "docs")) + len(rows(ROOT / "docs", "rehearsal")) > 0
    assert text != results_page.render(text, records[:-1]), "a row without figures would be seen"
    assert all(r["rehearsal"] == (r["model"] in ("tiny", "tiny-hard")) for r in records)


def test_the_commit_is_that_of_the_code(real_models: ModuleType, tmp_path: Path) -> None:
    """Documents do not change it, code does, and what is not committed is said."""

    def git(*words: str) -> str:
        who = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *who, *words], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    def committed(name: str) -> str:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
        git("add", ".")
        git("commit", "-qm", name)
        return git("log", "-1", "--format=%h")

    assert real_models.code_commit(tmp_path, "code") is None
    git("init", "-q")
    first = committed("code/a")
    assert committed("docs/b") != first == real_models.code_commit(tmp_path, "code")
    (tmp_path / "docs" / "b").write_text("changed")
    assert real_models.code_commit(tmp_path, "code") == first
    (tmp_path / "code" / "new").write_text("not committed")
    assert real_models.code_commit(tmp_path, "code") == f"{first}-dirty"
    second = committed("code/new")
    assert second != first and real_models.code_commit(tmp_path, "code") == second
