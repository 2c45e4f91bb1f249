"""Rationales from elsewhere, a server or written solutions: what the scripts write, score and fit take."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from empg_lite.core.rationale import Rationale
from empg_lite.run.journal import read_metrics
from empg_lite.run.rollouts import read_rollouts

SCRIPTS = Path(__file__).parents[1] / "scripts"
Cli = Callable[..., tuple[int, str, str]]
REWARD = "regex:[a-m]"
NO_EVAL = ("--set", "run.eval_every=0")


def script(name: str) -> ModuleType:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


server_script, solutions_script = script("sample_from_server"), script("solutions_to_rollouts")


class StandIn:
    """A completions server in a thread; ``answer`` gives (status, body) for the n-th request."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.answer: Callable[[int, dict[str, Any]], tuple[int, Any]] = lambda n, request: (
            200,
            good(request),
        )
        stand_in, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    n = len(stand_in.requests)
                    stand_in.requests.append({"path": self.path, **request})
                    stand_in.keys.append(self.headers.get("Authorization"))
                status, body = stand_in.answer(n, request)
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


def good(request: dict[str, Any]) -> dict[str, Any]:
    """n choices that depend on the seed; every third is cut off, every fourth runs on past its stop."""
    choices = []
    for i in range(request["n"]):
        k = request["seed"] + i
        text = f" {'abcnop'[k % 6]} {k}" + ("Zand more" if k % 4 == 0 else "")
        reason = "length" if k % 3 == 0 and k % 4 else "stop"
        choices.append({"index": i, "text": text, "finish_reason": reason, "logprobs": None})
    return {"object": "text_completion", "choices": choices}


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = StandIn()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def ask(recipe_file: Path, tmp_path: Path, stand_in: StandIn, capfd: pytest.CaptureFixture[str]):
    """Run the script: ``ask(*more) -> (exit code, stdout, stderr)``."""

    def run(*more: object) -> tuple[int, str, str]:
        common = ("--recipe", recipe_file, "--server", stand_in.url, "--out", tmp_path / "r.jsonl")
        code = server_script.main([str(a) for a in (*common, *more)])
        return (code, *capfd.readouterr())

    return run


def expected(text: str) -> tuple[str, str | None]:
    """What is stored of a text of ``good``, and its finish reason where the text alone decides it."""
    head, stop, _ = text.partition("Z")
    return head, "stop" if stop else None


def test_a_server_s_completions_become_rows(ask: Any, stand_in: StandIn, tmp_path: Path) -> None:
    code, out, err = ask("--problems", 5)
    assert code == 0 and out == f"40 rationales in {tmp_path}/r.jsonl (40 new)\n" and not err
    (segment,) = read_rollouts(tmp_path / "r.jsonl")
    rows = segment.rationales
    assert [r.step for r in rows[::8]] == [1, 1, 1, 2, 2]
    assert [r.sample_index for r in rows[:8]] == list(range(8)) and len({r.problem_id for r in rows}) == 5
    assert all(not r.completion_ids and r.policy_step == -1 and r.reward is None for r in rows)

    by_prompt = {request["prompt"]: request for request in stand_in.requests}
    assert len(by_prompt) == len(stand_in.requests) == 5
    for at in range(0, 40, 8):
        request = by_prompt[rows[at].prompt]
        assert rows[at].prompt == rows[at].question  # the fixture's template is the bare question
        told = good(request)["choices"]
        for row, choice in zip(rows[at : at + 8], told, strict=True):
            text, reason = expected(choice["text"])
            assert (row.completion, row.finish_reason) == (text, reason or choice["finish_reason"])
        assert request["path"] == "/v1/completions" and request["n"] == 8
        assert (request["temperature"], request["top_p"], request["top_k"]) == (1, 1, -1)
        assert request["max_tokens"] == 12 and {"A", "Z", "<|endoftext|>"} <= set(request["stop"])
    assert len({request["seed"] for request in stand_in.requests}) == 5
    assert stand_in.keys == [None] * 5
    assert {r.finish_reason for r in rows} == {"stop", "length"}


def test_asking_again_completes_the_file_and_then_changes_nothing(
    ask: Any, stand_in: StandIn, tmp_path: Path
) -> None:
    file = tmp_path / "r.jsonl"
    assert ask("--problems", 4)[0] == 0
    whole, seen = file.read_bytes(), len(stand_in.requests)
    assert ask("--problems", 4)[1].endswith("(0 new)\n") and len(stand_in.requests) == seen
    for length in (0, 40, whole.index(b"\n") + 1, len(whole) // 3, len(whole) - 3):
        file.write_bytes(whole[:length])  # a kill may cut anywhere
        assert ask("--problems", 4)[0] == 0 and file.read_bytes() == whole
    for other in (("--problems", 3), ("--problems", 4, "--seed", 1), ("--problems", 4, "--model", "x")):
        code, _, err = ask(*other)
        assert code == 2 and "sampled with other arguments" in err and file.read_bytes() == whole
    file.write_text("my notes")
    assert ask("--problems", 4)[0] == 2 and file.read_text() == "my notes"
    file.unlink()
    assert ask("--problems", 4, "--seed", 1)[0] == 0 and file.read_bytes() != whole  # control


def test_a_server_that_gives_fewer_at_once_is_asked_again(
    ask: Any, stand_in: StandIn, tmp_path: Path
) -> None:
    assert ask("--problems", 2)[0] == 0
    file = tmp_path / "r.jsonl"
    at_once = file.read_bytes()
    file.unlink()
    stand_in.requests.clear()
    stand_in.answer = lambda n, request: (200, good({**request, "n": 3}))
    assert ask("--problems", 2)[0] == 0
    assert sorted(request["n"] for request in stand_in.requests) == [2, 2, 5, 5, 8, 8]
    assert file.read_bytes() == at_once  # 3 + 3 + 2, seeds count on


def test_a_busy_server_is_asked_again_and_a_key_is_sent(
    ask: Any, stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(server_script.time, "sleep", waited.append)
    monkeypatch.setenv("THEIR_KEY", "s3cret")
    stand_in.answer = lambda n, request: (503, b"loading") if n in (0, 1) else (200, good(request))
    code, out, _ = ask("--problems", 1, "--api-key-env", "THEIR_KEY", "--retries", 2)
    assert code == 0 and waited == [1.0, 2.0] and stand_in.keys == ["Bearer s3cret"] * 3
    assert b"s3cret" not in (tmp_path / "r.jsonl").read_bytes()

    stand_in.answer = lambda n, request: (500, b"no\x1b[2J luck")
    code, _, err = ask("--problems", 1, "--seed", 3, "--retries", 1, "--out", tmp_path / "s.jsonl")
    assert (
        code == 66 and "no answer from the server after 2 requests (HTTP 500 no" in err and "\x1b" not in err
    )
    stand_in.answer = lambda n, request: (200, good(request))
    assert (
        ask("--problems", 1, "--seed", 3, "--out", tmp_path / "s.jsonl")[0] == 0
    )  # what was kept is completed
    assert len(read_rollouts(tmp_path / "s.jsonl")[0].rationales) == 8


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (404, b"no such model", "the server refuses: HTTP 404 no such model"),
        (200, b"<html>hello", "no list of completions: '<html>hello'"),
        (200, {"choices": []}, "holds no completion"),
        (200, {"choices": [{"text": 3, "finish_reason": "stop"}]}, "a completion with text int"),
        (200, {"choices": [{"text": "x", "finish_reason": "abort"}]}, "finish_reason 'abort'"),
        (200, {"choices": [{"message": {"content": "x"}}]}, "no list of completions"),
        (200, [1], "no list of completions"),
    ],
)
def test_nonsense_is_one_line(ask: Any, stand_in: StandIn, status: int, body: object, said: str) -> None:
    stand_in.answer = lambda n, request: (status, body)
    code, out, err = ask("--problems", 2, "--parallel", 1)
    assert code == 65 and not out and said in err and err.startswith("error: ") and err.count("\n") == 1
    assert len(stand_in.requests) <= 2  # it is no use asking that again


def test_an_absent_server_and_bad_options(
    ask: Any, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_script.time, "sleep", lambda seconds: None)
    stand_in.http.server_close()
    code, _, err = ask("--problems", 1, "--retries", 1)
    assert code == 66 and "no answer from the server after 2 requests" in err and "refused" in err
    for options, said in (
        (("--server", "ftp://x"), "begins with http"),
        (("--problems", 0), "--problems 0"),
        (("--extra", "[1]"), "not a JSON object"),
        (("--api-key-env", "NO_SUCH_NAME"), "no such environment variable"),
        (("--retries", -1), "retries are 0 or more"),
    ):
        code, _, err = ask(*options)
        assert code == 2 and said in err and err.count("\n") == 1
    code, _, err = ask("--set", "sampler.temperature=0.7")
    assert code == 65 and "temperature" in err


def test_rows_of_a_server_are_scored_and_fitted(
    ask: Any, cli: Cli, recipe_file: Path, tmp_path: Path, stand_in: StandIn
) -> None:
    assert ask("--problems", 6)[0] == 0
    file, run = tmp_path / "r.jsonl", tmp_path / "run"
    code, out, _ = cli("score", file, "--json")  # the header names the recipe's reward
    assert code == 0
    reasons, rows = json.loads(out)["reasons"], rows_of(file)
    right = [r for r in rows if r.finish_reason == "stop" and r.completion[1] in "abc"]
    assert reasons["equal"] == len(right) and 0 < len(right) < 48
    assert reasons["truncated"] == sum(r.finish_reason == "length" for r in rows) > 0
    code, _, err = cli("fit", file, "--recipe", recipe_file, *NO_EVAL, "--output-dir", run, "--json")
    assert code == 0, err
    records = read_metrics(run / "metrics.jsonl")
    assert len(records) == 2 and all(r["em/frac_text"] == 1 and r["em/staleness"] == 0 for r in records)
    stored = read_rollouts(run / "rollouts" / "step-000001.jsonl")[0]
    assert stored.header.sampler["engine"] == "server" and stored.header.reward_name == REWARD
    for r in stored.rationales:
        assert r.origin == "text" and r.prompt_ids == byte_ids(r.prompt)
        end = (256,) if r.finish_reason == "stop" else ()  # what was cut off did not end
        assert r.completion_ids == (*byte_ids(r.completion), *end)


def byte_ids(text: str) -> tuple[int, ...]:
    """The fixture tokenizer's ids of ASCII text: its vocabulary is the sorted byte alphabet."""
    from tokenizers.pre_tokenizers import ByteLevel

    vocab = {char: i for i, char in enumerate(sorted(ByteLevel.alphabet()))}
    return tuple(vocab[char] for char in text.replace(" ", "Ġ"))


def test_the_server_script_needs_no_torch() -> None:
    code = f"import sys; sys.path.insert(0, {str(SCRIPTS)!r})\n"
    code += "import sample_from_server, solutions_to_rollouts\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "print('torch' in sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "False"
    for name in ("sample_from_server", "solutions_to_rollouts"):
        shown = subprocess.run(
            [sys.executable, SCRIPTS / f"{name}.py", "--help"], capture_output=True, text=True
        )
        assert shown.returncode == 0 and "--recipe" in shown.stdout and "empg-lite score" in shown.stdout


# --- written solutions ----------------------------------------------------------------------------


def solved(n: int) -> dict[str, str]:
    """A problem with a solution in GSM8K's manner."""
    text = (
        f"There are {n}+2=<<{n}+2={n + 2}>>{n + 2} of them.\nThat is {n + 2}/1=<<{n + 2}/1={n + 2}>>{n + 2}."
    )
    return {"question": f"What is {n} + 2?", "answer": f"{text}\n#### {n + 2}"}


@pytest.fixture
def convert(recipe_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """Write problems and run the script: ``convert(rows, *more) -> (exit code, stdout, stderr)``."""

    def run(rows: list[dict[str, str]], *more: object) -> tuple[int, str, str]:
        data = tmp_path / "solved.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = (f"data.path={data}", "data.reward=gsm8k", "data.validation=2", "data.prompt=gsm8k")
        common = ["--recipe", recipe_file, *(x for s in settings for x in ("--set", s))]
        code = solutions_script.main([str(a) for a in (*common, "--out", tmp_path / "s.jsonl", *more)])
        return (code, *capfd.readouterr())

    return run


def rows_of(path: Path) -> tuple[Rationale, ...]:
    return read_rollouts(path)[0].rationales


def test_solutions_become_rows_that_are_right(
    convert: Any, cli: Cli, recipe_file: Path, tmp_path: Path
) -> None:
    file = tmp_path / "s.jsonl"
    code, out, _ = convert([solved(n) for n in range(20)])
    assert code == 0 and out.startswith("16 rationales")  # 2 are evaluation rows, 2 validation rows
    rows = rows_of(file)
    n = int(rows[0].gold) - 2
    assert (
        rows[0].completion == f" There are {n}+2={n + 2} of them.\nThat is {n + 2}/1={n + 2}.\n#### {n + 2}"
    )
    assert rows[0].prompt.endswith(f"What is {n} + 2?\nAnswer:") and all(r.reward is None for r in rows)
    assert [r.gold for r in rows] != sorted((r.gold for r in rows), key=int)  # in the seed's order
    before = file.read_bytes()
    assert convert([solved(n) for n in range(20)])[0] == 0 and file.read_bytes() == before
    code, _, err = convert([solved(n) for n in range(20)], "--seed", 1)
    assert code == 2 and "another file exists" in err and file.read_bytes() == before

    code, out, _ = cli("score", file, "--json")
    assert code == 0 and json.loads(out)["reasons"] == {"equal": 16}
    run = tmp_path / "run"
    code, out, err = cli("fit", file, "--recipe", recipe_file, *NO_EVAL, "-o", run, "--json")
    assert code == 0 and json.loads(out)["steps"] == 6, err
    assert all(r.weight == 1 and r.origin == "text" for r in rows_of(run / "rollouts" / "step-000006.jsonl"))


def test_a_wrong_solution_earns_nothing(convert: Any, cli: Cli, tmp_path: Path) -> None:
    rows = [{**solved(n), "gold": str(n + 2), "solution": f"It is {n + 3}.\n#### {n + 3}"} for n in range(20)]
    assert convert(rows)[0] == 0 and rows_of(tmp_path / "s.jsonl")[0].completion.startswith(" It is ")
    code, out, _ = cli("score", tmp_path / "s.jsonl", "--json")
    assert code == 0 and json.loads(out)["reasons"] == {"different": 16}


def test_bare_answers_are_no_solutions(convert: Any, recipe_file: Path, tmp_path: Path) -> None:
    bare = [{"question": f"{n}?", "answer": str(n)} for n in range(20)]
    code, _, err = convert(bare)
    assert code == 65 and "none of 16 rows contains more than its answer" in err and "--column" in err
    assert not (tmp_path / "s.jsonl").exists()
    code, out, _ = convert([{**row, "why": f"Because {row['answer']}."} for row in bare], "--column", "why")
    assert code == 0 and rows_of(tmp_path / "s.jsonl")[0].completion.startswith(" Because ")
    assert convert(bare, "--column", "absent", "--out", tmp_path / "t.jsonl")[0] == 65
    code, _, err = convert(bare, "--set", "data.source=tiny", "--set", "data.path=null")
    assert code == 66 and "have no written solutions" in err


@pytest.mark.shared
def test_every_written_solution_of_gsm8k_is_right(
    shared: Path, cli: Cli, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "s.jsonl"
    settings = ("--set", f"data.path={shared}", "--set", "data.validation=0")
    assert solutions_script.main(["--recipe", "gsm8k-0.5b", *settings, "--out", str(file)]) == 0
    assert "<<" not in file.read_text()
    code, out, _ = cli("score", file, "--json")
    assert code == 0 and json.loads(out)["reasons"] == {"equal": 7473}
