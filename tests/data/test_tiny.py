"""The bundled problems, tokenizer and models."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import unicodedata
from collections import Counter
from itertools import islice
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_solutions import blurted, careful, careless, habit, habitual

from empg_lite.core.bundled import BUNDLED, model_path
from empg_lite.core.errors import MissingInput
from empg_lite.core.rationale import Problem, problem_id
from empg_lite.data.tiny import DIFFICULTY, EASY, HARD, TINY, Difficulty, tiny_problems
from empg_lite.data.tiny.problems import Story, compute, stories
from empg_lite.policy.templates import TEMPLATES

STEP = re.compile(r" (-?\d+) ([-+*/]) (\d+) = (-?\d+)\.")


# ---- problems --------------------------------------------------------------------------------------------


def test_problems_are_reproducible() -> None:
    rows = [f"{p.id}\t{p.question}\t{p.gold}\n" for split in ("train", "test") for p in tiny_problems(split)]
    assert len(rows) == 4500
    # A change here requires retraining the bundled model.
    assert hashlib.sha256("".join(rows).encode()).hexdigest()[:16] == "f6de9a5b55eed267"
    assert tiny_problems("test")[0] == Problem(
        id="60a266f9224b13f4",
        question="There are 3 beads on Eva's desk. Soon she has 4 times as many. She gives 5 beads to Mia. "
        "How many beads does Eva have now?",
        gold="7",
        meta={"steps": "2"},
    )


def test_harder_problems_are_reproducible() -> None:
    rows = [
        f"{p.id}\t{p.question}\t{p.gold}\n"
        for split in ("train", "test")
        for p in tiny_problems(split, DIFFICULTY["tiny-hard"])
    ]
    assert len(rows) == 4500
    assert hashlib.sha256("".join(rows).encode()).hexdigest()[:16] == "75cf20af5c1f2b30"


def test_easier_problems_are_reproducible_and_of_one_step() -> None:
    train, test = (tiny_problems(split, EASY) for split in ("train", "test"))
    rows = [f"{p.id}\t{p.question}\t{p.gold}\n" for p in train + test]
    assert hashlib.sha256("".join(rows).encode()).hexdigest()[:16] == "177ce8990bbf1ea0"
    assert len({p.question for p in train + test}) == 4500, "disjoint by text"
    assert {p.meta["steps"] for p in train + test} == {"1"}
    assert max(Counter(p.gold for p in test).values()) < 30, "no answer is right by habit"
    assert all(p.question.count("?") == 1 and p.question.endswith("?") for p in train + test)


def test_splits_are_disjoint_and_ids_are_text_hashes() -> None:
    train, test = tiny_problems("train"), tiny_problems("test")
    assert (len(train), len(test)) == (4000, 500)
    texts = {p.question for p in train} | {p.question for p in test}
    assert len(texts) == 4500
    assert all(p.id == problem_id(p.question) for p in train + test)


def test_an_unknown_split_lists_the_known_ones() -> None:
    with pytest.raises(MissingInput, match="'validation'.*test or train"):
        tiny_problems("validation")


bundled = pytest.mark.parametrize("name", BUNDLED)


def numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


@pytest.mark.parametrize("difficulty", [TINY, HARD, EASY], ids=["tiny", "hard", "easy"])
def test_gold_matches_an_independent_reading(difficulty: Difficulty) -> None:
    """An independent solver parses each sentence and applies it to the count."""
    for story in islice(stories(3, difficulty), 1500):
        assert read_and_solve(story.question) == story.answer, story.question
        assert story.problem().gold == str(story.answer)
        assert difficulty.steps[0] <= len(story.steps) <= difficulty.steps[1]
        assert max(numbers(story.question) + numbers(careful(story))) <= difficulty.max_value
        assert min(numbers(story.question) + numbers(careful(story))) >= 2


def read_and_solve(question: str) -> int:
    """Solve a story from its text alone."""
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


def test_careful_solutions_are_correct() -> None:
    value = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}
    for story in islice(stories(4), 1000):
        body, _, answer = careful(story).partition(" #### ")
        steps = STEP.findall(body)
        assert "".join(f" {a} {op} {b} = {c}." for a, op, b, c in steps) == body
        assert all(value[op](int(a), int(b)) == int(c) for a, op, b, c in steps)
        assert all(left[3] == right[0] for left, right in zip(steps, steps[1:], strict=False))
        assert answer == steps[-1][3] == str(story.answer)


def test_careless_and_blurted_solutions_are_mostly_wrong() -> None:
    drawn: list[Story] = list(islice(stories(5), 2000))
    rng = Random(0)
    slipped = [careless(story, rng) for story in drawn]
    guessed = [blurted(story, rng) for story in drawn]

    def share_correct(texts: list[str]) -> float:
        right = [t.rpartition("#### ")[2] == str(s.answer) for t, s in zip(texts, drawn, strict=True)]
        return sum(right) / len(right)

    # Careless: 0.6 a step over 2 or 3 steps gives (0.36 + 0.216) / 2 = 0.29, more where a division or another
    # slip undoes one. Blurted: 0.4, the guesses exclude the answer. Three standard errors are 0.033.
    assert 0.26 < share_correct(slipped) < 0.37
    assert 0.367 < share_correct(guessed) < 0.433
    assert all(len(STEP.findall(t)) == len(s.steps) for t, s in zip(slipped, drawn, strict=True))
    assert not any(STEP.search(t) for t in guessed)
    assert [careless(s, rng, slip=0.0) for s in drawn] == [careful(s) for s in drawn]


def test_habits_err_at_their_rate_and_always_the_same_way() -> None:
    drawn, rng = list(islice(stories(5, HARD), 3000)), Random(0)
    expected = variance = 0.0
    slips, all_right = 0, 0
    for story in drawn:
        text = habitual(story, rng)
        steps = [(int(a), op, int(b), int(c)) for a, op, b, c in STEP.findall(text)]
        assert len(steps) == len(story.steps)
        assert text.rpartition("#### ")[2] == str(steps[-1][3])
        assert all(one[3] == two[0] for one, two in zip(steps, steps[1:], strict=False)), "errors carry over"
        for left, op, right, result in steps:
            true = compute(left, op, right).result
            slip, by = habit(op, left % 10, right % 10)
            assert result in (true, max(true + by, 1)) and (slip or result == true)
            if max(true + by, 1) != true:
                expected, variance = expected + slip, variance + slip * (1 - slip)
                slips += result != true
        all_right += text.endswith(f"#### {story.answer}")
    assert abs(slips - expected) < 4 * variance**0.5
    assert 0.3 < all_right / 3000 < 0.6
    facts = [habit(op, a, b)[0] for op in "+-*/" for a in range(10) for b in range(10)]
    assert 0.35 < sum(p > 0 for p in facts) / 400 < 0.55, "most facts are known well"


def test_gold_answers_vary() -> None:
    golds = Counter(p.gold for p in tiny_problems("train"))
    assert len(golds) >= 45
    assert golds.most_common(1)[0][1] / 4000 < 0.06
    assert Counter(p.meta["steps"] for p in tiny_problems("test")).keys() == {"2", "3"}


# ---- package ---------------------------------------------------------------------------------------------


def test_problems_need_no_torch() -> None:
    code = (
        "import sys, empg_lite.core.bundled as b, empg_lite.data.tiny as t;"
        "b.model_path(); t.tiny_problems('test');"
        "print([m for m in ('torch', 'transformers', 'tokenizers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@bundled
def test_the_model_folder_is_complete_and_small(name: str) -> None:
    sizes = {path.name: path.stat().st_size for path in model_path(name).iterdir()}
    assert set(sizes) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(sizes.values()) < 4_000_000


# ---- tokenizer -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained() -> Any:
    """The `tokenizers` object, trained again with the defaults of the script."""
    import make_tiny

    vocab_size = make_tiny.PRETRAINING["tiny"].vocab_size
    return make_tiny.train_tokenizer(make_tiny.tokenizer_texts(make_tiny.SEED), vocab_size)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_path(), local_files_only=True)


def test_the_loaded_tokenizer_splits_like_the_trained_one(trained: Any, tokenizer: Any) -> None:
    from tokenizers import Tokenizer

    shipped = Tokenizer.from_file(str(model_path() / "tokenizer.json"))
    texts = [
        TEMPLATES["plain"].render(s.question) + write(s)
        for s in islice(stories(6, HARD), 300)
        for write in (careful, lambda s: blurted(s, Random(0)))
    ]
    texts += [
        "",
        " ",
        "it's 1234.50\n\n  x",
        "<|im_start|>user\nHi<|im_end|>",
        "na\u00efve \u4f60\u597d \U0001f600",
    ]
    for text in texts:
        assert tokenizer(text).input_ids == trained.encode(text).ids == shipped.encode(text).ids
    assert tokenizer.get_vocab() == trained.get_vocab() == shipped.get_vocab()


def test_a_different_pre_tokenizer_would_be_detected(trained: Any, tokenizer: Any) -> None:
    """Negative control of the test above: the same merges with plain byte-level splitting."""
    from tokenizers import Tokenizer, pre_tokenizers

    wrong = Tokenizer.from_str(trained.to_str())
    wrong.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    text = "it'she 'them she'does 'some"  # Qwen2 splits after 's, 't, 'd, 'm; plain merges do not
    assert wrong.encode(text).ids != tokenizer(text).input_ids == trained.encode(text).ids


def test_special_tokens_follow_the_vocabulary_as_in_qwen(tokenizer: Any) -> None:
    vocabulary = tokenizer.get_vocab()
    assert len(tokenizer) == len(vocabulary) == 530
    assert sorted(vocabulary.values()) == list(range(530))
    assert [vocabulary[t] for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")] == [527, 528, 529]
    assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.bos_token is None and tokenizer("x").input_ids == tokenizer.encode(
        "x", add_special_tokens=False
    )
    assert set(pre_tokenizers_alphabet()) <= set(vocabulary)


def pre_tokenizers_alphabet() -> list[str]:
    from tokenizers import pre_tokenizers

    alphabet: list[str] = pre_tokenizers.ByteLevel.alphabet()
    assert len(alphabet) == 256
    return alphabet


@settings(max_examples=300, deadline=None)
@given(text=st.text())
def test_any_text_round_trips(tokenizer: Any, text: str) -> None:
    """Up to NFC, which Qwen2's normalizer applies first."""
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == unicodedata.normalize("NFC", text)


def test_completions_fit_the_recipe(tokenizer: Any) -> None:
    written = [careful(s) for s in islice(stories(8), 500)]
    assert max(len(tokenizer(text).input_ids) + 1 for text in written) <= 60
    prompts = [TEMPLATES["plain"].render(p.question) for p in tiny_problems("train")]
    assert max(map(len, tokenizer(prompts).input_ids)) <= 64
    # The completion starts at a token boundary: prompt and completion tokenize the same apart and together.
    for prompt, text in zip(prompts, written, strict=False):
        assert tokenizer(prompt).input_ids + tokenizer(text).input_ids == tokenizer(prompt + text).input_ids


# ---- model -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["tiny", pytest.param("tiny-hard", marks=pytest.mark.slow)])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(name: str) -> Any:
    from transformers import AutoModelForCausalLM

    loaded, report = AutoModelForCausalLM.from_pretrained(
        model_path(name), local_files_only=True, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return loaded.eval()


def test_the_model_is_a_small_qwen2(model: Any, tokenizer: Any) -> None:
    import torch

    assert model.config.model_type == "qwen2"
    assert sum(p.numel() for p in model.parameters()) == 856_448
    assert model.dtype == torch.float32
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    for config in (model.config, model.generation_config):
        assert config.eos_token_id == config.pad_token_id == tokenizer.eos_token_id
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.slow
def test_the_base_model_can_reason_but_usually_does_not(model: Any, name: str, tokenizer: Any) -> None:
    import torch

    problems = tiny_problems("test", DIFFICULTY[name])[:60]
    prompts = [TEMPLATES["plain"].render(p.question) for p in problems]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")

    def completions(**flags: Any) -> list[str]:
        out = model.generate(**inputs, max_new_tokens=72, **flags)[:, inputs["input_ids"].shape[1] :]
        return [text.rstrip() for text in tokenizer.batch_decode(out, skip_special_tokens=True)]

    def right(texts: list[str], copies: int) -> list[bool]:
        golds = [p.gold for p in problems for _ in range(copies)]
        return [t.rpartition("####")[2].strip() == gold for t, gold in zip(texts, golds, strict=True)]

    greedy = completions(do_sample=False)
    assert sum(right(greedy, 1)) / 60 < 0.35
    assert sum(text.startswith(" ####") for text in greedy) / 60 >= {"tiny": 1.0, "tiny-hard": 0.7}[name]

    torch.manual_seed(0)
    samples = completions(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=8)
    verdicts = right(samples, 8)
    assert sum(any(verdicts[8 * i : 8 * i + 8]) for i in range(60)) / 60 > 0.6
    worked = [bool(STEP.search(text)) for text in samples]
    assert 0.3 < sum(worked) / 480 < 0.6
    # Reasoning pays: worked solutions are correct far more often than blurted ones.
    by_work = {w: [v for v, u in zip(verdicts, worked, strict=True) if u == w] for w in (True, False)}
    assert sum(by_work[True]) / len(by_work[True]) > 2 * sum(by_work[False]) / len(by_work[False])
