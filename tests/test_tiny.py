"""The bundled demo: problems, tokenizer and model."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import subprocess
import sys
import unicodedata
from collections import Counter
from itertools import islice
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from empg_lite.rationale import Problem, problem_id
from empg_lite.tiny import HARD, TINY, Difficulty, model_path, tiny_problems
from empg_lite.tiny.problems import Story, blurted, careful, careless, stories

PROMPT = "Question: {question}\nAnswer:"
STEP = re.compile(r" (\d+) ([-+*/]) (\d+) = (\d+)\.")


# ---- problems --------------------------------------------------------------------------------------------


def test_problems_are_the_same_everywhere() -> None:
    rows = [f"{p.id}\t{p.question}\t{p.gold}\n" for split in ("train", "test") for p in tiny_problems(split)]
    assert len(rows) == 4500
    # Golden: whoever changes it must make the bundled model again.
    assert hashlib.sha256("".join(rows).encode()).hexdigest()[:16] == "GOLDEN"
    assert tiny_problems("test")[0] == Problem(
        id="FIRST_ID",
        question="FIRST_Q",
        gold="FIRST_G",
        meta={"steps": "FIRST_S"},
    )


def test_splits_are_disjoint_by_text_and_ids_come_from_the_text() -> None:
    train, test = tiny_problems("train"), tiny_problems("test")
    assert (len(train), len(test)) == (4000, 500)
    texts = {p.question for p in train} | {p.question for p in test}
    assert len(texts) == 4500
    assert all(p.id == problem_id(p.question) for p in train + test)


def test_an_unknown_split_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'validation'.*test, train"):
        tiny_problems("validation")


def numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


@pytest.mark.parametrize("difficulty", [TINY, HARD], ids=["tiny", "hard"])
def test_gold_is_what_the_story_says(difficulty: Difficulty) -> None:
    """An independent reader: each sentence of the story is parsed by its words and applied to the count."""
    for story in islice(stories(3, difficulty), 1500):
        assert read_and_solve(story.question) == story.answer, story.question
        assert story.problem().gold == str(story.answer)
        assert difficulty.steps[0] <= len(story.steps) <= difficulty.steps[1]
        assert max(numbers(story.question) + numbers(careful(story))) <= difficulty.max_value
        assert min(numbers(story.question) + numbers(careful(story))) >= 2


def read_and_solve(question: str) -> int:
    """Solve a story from its English alone."""
    opening, *rest = re.split(r"(?<=[.?]) ", question)
    first = numbers(opening)
    count = first[0] if len(first) == 1 else first[0] + first[1]
    if len(first) == 2 and re.search(r"boxes|bags|jars|trays", opening):
        count = first[0] * first[1]
    for sentence in rest:
        if sentence.startswith("How many"):
            continue
        times = re.search(r"(twice|\d+ times) as many", sentence)
        part = re.search(r"a (third|quarter|fifth|sixth)|(half)", sentence)
        if times:
            count *= 2 if times[1] == "twice" else numbers(times[1])[0]
        elif part:
            size = {"half": 2, "third": 3, "quarter": 4, "fifth": 5, "sixth": 6}[part[1] or part[2]]
            assert count % size == 0
            count //= size
        elif re.search(r"equal", sentence):
            assert count % numbers(sentence)[0] == 0
            count //= numbers(sentence)[0]
        elif re.search(r"loses|gives \d|sells|break|fewer", sentence):
            count -= numbers(sentence)[0]
        else:
            assert re.search(r"buys|gives (him|her)|finds|wins|more", sentence), sentence
            count += numbers(sentence)[0]
    return count


def test_the_careful_solution_recomputes_to_the_gold() -> None:
    value = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}
    for story in islice(stories(4), 1000):
        body, _, answer = careful(story).partition(" #### ")
        steps = STEP.findall(body)
        assert "".join(f" {a} {op} {b} = {c}." for a, op, b, c in steps) == body
        assert all(value[op](int(a), int(b)) == int(c) for a, op, b, c in steps)
        assert all(left[3] == right[0] for left, right in zip(steps, steps[1:], strict=False))
        assert answer == steps[-1][3] == str(story.answer)


def test_careless_and_blurted_solutions_are_usually_wrong_and_look_the_part() -> None:
    drawn: list[Story] = list(islice(stories(5), 2000))
    rng = Random(0)
    slipped = [careless(story, rng) for story in drawn]
    guessed = [blurted(story, rng) for story in drawn]

    def share_right(texts: list[str]) -> float:
        right = [t.rpartition("#### ")[2] == str(s.answer) for t, s in zip(texts, drawn, strict=True)]
        return sum(right) / len(right)

    # Careless: 0.6 per step over 2 or 3 steps gives (0.36 + 0.216) / 2 = 0.29, and a slip may be undone by / or by
    # another slip. Blurted: 0.15 by construction, the guesses exclude the answer. Three standard errors of 2000.
    assert 0.26 < share_right(slipped) < 0.37
    assert 0.126 < share_right(guessed) < 0.174
    assert all(len(STEP.findall(t)) == len(s.steps) for t, s in zip(slipped, drawn, strict=True))
    assert not any(STEP.search(t) for t in guessed)
    assert [careless(s, rng, slip=0.0) for s in drawn] == [careful(s) for s in drawn]


def test_answers_are_not_degenerate() -> None:
    golds = Counter(p.gold for p in tiny_problems("train"))
    assert len(golds) >= 45
    assert golds.most_common(1)[0][1] / 4000 < 0.06
    assert Counter(p.meta["steps"] for p in tiny_problems("test")).keys() == {"2", "3"}


# ---- package ---------------------------------------------------------------------------------------------


def test_neither_torch_nor_transformers_is_imported() -> None:
    code = (
        "import sys, empg_lite.tiny as t; t.model_path(); t.tiny_problems('test');"
        "print([m for m in ('torch', 'transformers', 'tokenizers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_model_folder_is_complete_and_small() -> None:
    sizes = {path.name: path.stat().st_size for path in model_path().iterdir()}
    assert set(sizes) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(sizes.values()) < 4_000_000
