"""Chat: the stream shows the sampled text, the commands work, and model output is never interpreted."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import HANGS
from stored_runs import rationale

from empg_lite.cli.marks import MARKS, legend, marked
from empg_lite.core.behaviors import BEHAVIORS
from empg_lite.core.errors import DataError
from empg_lite.core.rationale import Problem
from empg_lite.rewards import Grader
from empg_lite.run.rollouts import read_rollouts
from empg_lite.run.target import resolve_target
from empg_lite.sampler import Decoding, TextStream
from empg_lite.tools import chat as chatting
from empg_lite.tools.chat import Chat, vote


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    from fixture_recipe import write_recipe

    from empg_lite import api

    folder = tmp_path_factory.mktemp("chat")
    recipe = write_recipe(folder, model_dir)
    return api.run(
        recipe, folder / "run", overrides={"optim.learning_rate": 0.05, "sampler.max_new_tokens": 30}
    ).path


@pytest.fixture(scope="module")
def talk(run: Path) -> Chat:
    return Chat(resolve_target(str(run)))


@pytest.fixture
def grader():  # type: ignore[no-untyped-def]
    with Grader() as made:
        yield made


# --- streaming ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["native", "generate"])
def test_streamed_text_is_a_prefix_of_the_sample(run: Path, grader: Grader, engine: str) -> None:
    watched = Chat(resolve_target(str(run), None, [f"sampler.engine={engine}"]))
    alone = Chat(resolve_target(str(run), None, [f"sampler.engine={engine}"]))
    seen: dict[str, list[str]] = {"base": [], "tuned": []}
    replies = watched.ask(
        Problem.asked("7 + 8 = ?"), grader, compare=True, on_text=lambda who, text: seen[who].append(text)
    )
    same = alone.ask(Problem.asked("7 + 8 = ?"), grader, compare=True)
    assert [r.rationale.completion_ids for r in replies] == [r.rationale.completion_ids for r in same]
    for reply in replies:
        texts, r = seen[reply.speaker], reply.rationale
        # One call per token, except the stop token.
        assert len(texts) == len(r.completion_ids) - 1
        assert all(r.completion.startswith(text) for text in texts)
        assert all(b.startswith(a) for a, b in zip(texts, texts[1:], strict=False))
    assert replies[0].rationale.completion != replies[1].rationale.completion


class Bytes:
    """A tokenizer of single bytes."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return bytes(ids).decode("utf-8", "replace")


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40), st.sampled_from([(), ("\nQ:",), ("##", "\nQuestion:"), ("é",)]))
def test_a_stream_only_grows_and_never_splits_a_character(text: str, stops: tuple[str, ...]) -> None:
    text = text.replace("\ufffd", "?")
    for stop in stops:
        text = text.replace(stop, "")
    if any(stop in text for stop in stops):  # removing one has formed another
        return
    ids, stream, given_before = list(text.encode()), TextStream(Bytes(), stops), ""
    for n in range(1, len(ids) + 1):
        now = stream.grow(ids[:n])
        assert now.startswith(given_before) and text.startswith(now) and "\ufffd" not in now
        given_before = now
    # Only the start of a stop string may be held back at the end.
    held = text[len(given_before) :]
    assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)


# --- votes and marks ----------------------------------------------------------------------------------


def test_votes_computed_by_hand() -> None:
    rows = [
        rationale("Q", "so 0.5", right=True, extracted="0.5"),
        rationale("Q", "so 1/2", right=True, extracted="1/2"),
        rationale("Q", "so 3", right=False, extracted="3"),
        rationale("Q", "so 3 and", right=False, extracted="3", finish_reason="length"),
        rationale("Q", "hm", right=False, extracted=None),
    ]
    found = vote(rows)
    assert (found.answer, found.votes, found.right) == ("0.5", 2, 2 / 5)
    ungraded = vote([rationale("Q", "hm", right=False, extracted=None, reward=None)])
    assert (ungraded.answer, ungraded.votes, ungraded.right) == (None, 0, None)


def test_marks_are_readable_without_color() -> None:
    text = "First, find the total. 3 + 4 = 7. Let me check: 7 - 4 = 3. Wait, that is wrong. #### 7"
    shown, found = marked(text, "7")
    assert shown.plain.replace("▸ ", "").replace("✓ ", "").replace("↶ ", "") == text
    assert "✓ Let me check" in shown.plain and "↶ Wait" in shown.plain
    assert {"verification", "backtracking"} <= set(found) <= set(BEHAVIORS) == set(MARKS)
    assert "✓ checks" in legend(found) and "↶ turns back" in legend(found)
    last = shown.plain.rindex("7")
    assert any(s.start == last and "underline" in str(s.style) for s in shown.spans)
    assert marked("plain 3", None)[0].plain == "plain 3" and marked("", "x")[1] == []


def test_marked_text_is_safe_and_markup_stays_text() -> None:
    shown, _ = marked("[bold red]x[/] \x1b[2J\u202e #### 7", "7")
    assert shown.plain == "[bold red]x[/] \\x1b[2J\\u202e #### 7"


# --- a session ----------------------------------------------------------------------------------------


def test_again_problem_and_save(talk: Chat, grader: Grader, tmp_path: Path) -> None:
    replies, found = talk.again(Problem.asked("1 + 2 = ?", "3"), grader, 6)
    assert len(replies) == 6 and len({r.rationale.completion for r in replies}) > 1
    assert found.right == sum(r.rationale.right for r in replies) / 6
    problem = talk.draw_problem()
    assert talk.draw_problem(problem.id[:8]) == problem
    with pytest.raises(DataError, match="id"):
        talk.draw_problem("nothing")

    talk.replies.clear()
    talk.ask(problem, grader, compare=True)
    talk.ask(Problem.asked(problem.question), grader)
    talk.again(Problem.asked("1 + 2 = ?"), grader, 3)
    path = tmp_path / "said.jsonl"
    assert talk.save(path) == talk.save(path) == 6
    segments = read_rollouts(path)
    assert [len(s.rationales) for s in segments] == [1, 1, 1, 3]  # greedy replies have segments of their own
    assert [s.header.adapter is None for s in segments] == [True, False, False, False]
    assert [s.header.sampler["temperature"] for s in segments] == [0.0, 0.0, 0.0, 1.0]
    asked = [s.header.seed for s in segments]
    assert asked[0] == asked[1] and len(set(asked)) == 3
    assert [r.rationale for r in talk.replies] == [r for s in segments for r in s.rationales]
    assert [r.reward is None for s in segments for r in s.rationales] == [False, False] + [True] * 4

    other = tmp_path / "other.jsonl"
    other.write_text("mine", "utf-8")
    with pytest.raises(DataError, match="already exists"):
        talk.save(other)
    assert other.read_text("utf-8") == "mine"


def test_again_samples_at_temperature_1_regardless_of_settings(talk: Chat, grader: Grader) -> None:
    """The same seed gives the same samples, whatever the temperature of the conversation."""
    found = []
    for temperature in (0.0, 0.3, 1.0):
        talk.decoding, talk._asked = Decoding(12, temperature), 50
        found.append(
            [r.rationale.completion_ids for r in talk.again(Problem.asked("1 + 2 = ?"), grader, 8)[0]]
        )
    talk.decoding = Decoding(30, 0.0)
    assert found[0] == found[1] == found[2] and len(set(found[0])) > 1


def test_the_reward_sees_the_columns_of_a_drawn_problem(talk: Chat, grader: Grader) -> None:
    seen: list[dict[str, Any]] = []

    class Watched:
        def submit(self, spec: str, case: Any) -> Any:
            seen.append(dict(case.meta))
            return grader.submit(spec, case)

    problem = replace(talk.draw_problem(), meta={"unit": "cm"})
    for temperature in range(8):  # truncated replies are not graded
        talk.decoding = Decoding(60, temperature / 4)
        talk.ask(problem, Watched())  # type: ignore[arg-type]
        talk.again(problem, Watched(), 4)  # type: ignore[arg-type]
    talk.decoding = Decoding(30, 0.0)
    assert seen and all(meta == {"unit": "cm"} for meta in seen)


def test_draw_problem_by_split(talk: Chat) -> None:
    from empg_lite.data.sources import load_problems

    data = talk.recipe.data
    train, held = (load_problems(data, split) for split in (data.split, data.eval_split))
    assert talk.draw_problem() in held and talk.draw_problem(data.eval_split) in held
    assert talk.draw_problem(data.split) in train
    assert talk.draw_problem(train[0].id[:10]) == train[0]


def test_a_script_reports_which_lines_failed(typed, capfd: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    code, out, err = typed("1 + 1 = ?\n" + "9 " * 900 + "\ncaf\udce9\n2 + 2 = ?\n", "--json")
    records = [json.loads(line) for line in out.splitlines()]
    assert code == 65 and ["tuned" in r for r in records] == [True, False, False, True]
    assert "context" in records[1]["error"] and "not UTF-8" in records[2]["error"]
    lines = err.strip().splitlines()
    assert [line.startswith("error: ") for line in lines[-2:]] == [True, True]


def test_ctrl_c_ends_a_script(cli, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    real = Chat.ask

    def ask(self: Chat, problem: Problem, *rest: Any, **options: Any) -> Any:
        if problem.question == "slow":
            raise KeyboardInterrupt
        return real(self, problem, *rest, **options)

    monkeypatch.setattr(Chat, "ask", ask)
    monkeypatch.setattr(sys, "stdin", io.StringIO("1 + 1 = ?\nslow\n2 + 2 = ?\n"))
    code, out, _ = cli("chat", run, "--json")
    assert code == 130 and len(out.splitlines()) == 1


@pytest.fixture
def typed(cli, run: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Pipe lines into the command."""

    def send(lines: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        return cli("chat", run, *arguments)

    return send


def test_questions_from_a_pipe(typed, cli, run: Path) -> None:  # type: ignore[no-untyped-def]
    code, out, err = typed("1 + 1 = ? => 2\n\n2 + 2 = ?\n/again 3\n/quit\n5 + 5 = ?\n", "--json")
    records = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and len(records) == 3 and "you>" not in out + err
    assert [r["question"] for r in records] == ["1 + 1 = ?", "2 + 2 = ?", "2 + 2 = ?"]
    assert records[0]["gold"] == "2" and records[0]["tuned"]["reward"] in (0.0, 1.0)
    assert records[1]["gold"] is None and records[1]["tuned"]["reward"] is None
    assert len(records[2]["samples"]) == 3 and set(records[2]["vote"]) == {"answer", "votes", "right"}
    code, out, _ = cli("chat", run, "--prompt", "1 + 1 = ?", "--gold", "2", "--json")
    assert json.loads(out)["tuned"] == records[0]["tuned"]


def test_commands(typed, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    saved = tmp_path / "said.jsonl"
    lines = [
        "/again 3",  # before any question
        "/show",
        "/nothing",
        "1 + 1 = ?",
        "/compare on",
        "1 + 1 = ?",
        "/temperature 0.5",
        "/temperature hot",
        "/max 3",
        "/max 0",
        "/again many",
        "/problem zzz",
        "9 " * 900,
        "/problem",
        f"/save {saved}",
        "/help",
    ]
    code, out, err = typed("\n".join(lines) + "\n")
    assert code == 65  # that of the first line that failed
    out += err
    for said in (
        "ask something first",
        "no replies yet",
        "no command /nothing; /help lists them",
        "compare is on",
        "temperature is 0.5",
        "at most 3 tokens",
        "how many samples?",
        "no problem id starts like this",
        "the model's context is",
        "/again [K]",
    ):
        assert said in out, said
    assert out.count("temperature is 0.5") == out.count("at most 3 tokens") == 2
    assert "base" in out and f"replies in {saved}" in " ".join(out.split())
    assert len([r for s in read_rollouts(saved) for r in s.rationales]) == 1 + 2 + 2


def test_ctrl_c_on_a_terminal_stops_only_the_answer(run: Path, tmp_path: Path) -> None:
    """On a pseudo-terminal, during a slow answer."""
    slow = (
        "import sys, time\n"
        "from empg_lite.cli import main\n"
        "import empg_lite.tools.chat as c; real = c.Chat._reply\n"
        "def reply(self, speaker, problem, *rest):\n"
        "    if problem.question == 'slow': print('thinking', flush=True); time.sleep(600)\n"
        "    return real(self, speaker, problem, *rest)\n"
        "c.Chat._reply = reply; main(sys.argv[1:])\n"
    )
    child, fd = pty.fork()
    if child == 0:
        os.environ["TERM"] = "xterm"
        os.execv(sys.executable, [sys.executable, "-c", slow, "chat", str(run)])
    screen = Screen(fd)
    try:
        screen.until("you>")
        os.write(fd, b"slow\n")
        screen.until("thinking")
        os.kill(child, signal.SIGINT)
        screen.until("stopped")
        screen.until("you>")
        os.write(fd, b"1 + 1 = ? => 2\n")
        assert "reward" in screen.until("you>")
        os.write(fd, b"\x04")
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        child = 0
    finally:
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        os.close(fd)


class Screen:
    """The output of a terminal, read up to a given text; the rest is kept for the next read."""

    def __init__(self, fd: int) -> None:
        self.fd, self.rest = fd, ""

    def until(self, wanted: str, seconds: float = HANGS) -> str:
        found, end = self.rest, time.monotonic() + seconds
        while wanted not in found:
            assert time.monotonic() < end, found
            if select.select([self.fd], [], [], 0.1)[0]:
                read = os.read(self.fd, 65536).decode("utf-8", "replace")
                found += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", read)
        before, _, self.rest = found.partition(wanted)
        return before


def test_chat_never_reuses_the_random_numbers_of_training() -> None:
    from empg_lite.loop import evaluate, preflight
    from empg_lite.tools.export import compare

    steps: list[Any] = [chatting.CHAT_STEP, evaluate.EVAL_STEP, compare.EXPORT_STEP, preflight.PREFLIGHT_STEP]
    assert len(set(steps)) == 4 and max(steps) <= 0  # training begins at 1
