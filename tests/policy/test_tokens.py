"""Prompts in the model's own markers, and what ends an answer, over tokenizers of each family."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from family_tokenizer import BARE, LLAMA3, QWEN, SMOLLM2, tokenizer_of
from fixture_model import load_fixture_policy

from empg_lite.core.errors import ModelUnusable
from empg_lite.policy import load_tokenizer
from empg_lite.policy.templates import CHATML, TEMPLATES, Template
from empg_lite.policy.tokens import fit_template, mend_end, stop_ids


def ends_of(tokenizer: Any, template: Template, eos: int | list[int]) -> set[str]:
    """The tokens that end an answer, by name, of a model whose config names ``eos``."""
    model = SimpleNamespace(config=SimpleNamespace(eos_token_id=eos))
    return set(tokenizer.convert_ids_to_tokens(sorted(stop_ids(model, tokenizer, template))))


CHAT = TEMPLATES["qwen-boxed"]
BOXED = "Please reason step by step, and put your final answer within \\boxed{}."


def test_chatml_models_get_the_prompt_to_the_byte() -> None:
    """Qwen and SmolLM2: no character and no hash of the prompt depends on the tokenizer."""
    expected = (
        f"<|im_start|>system\n{BOXED}<|im_end|>\n<|im_start|>user\n{{question}}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    for family in (QWEN, SMOLLM2):
        for template in TEMPLATES.values():
            assert fit_template(template, tokenizer_of(family)) == (template, ())
    assert (CHAT.text, CHAT.stop, CHAT.end) == (expected, ("<|im_start|>",), "<|im_end|>")
    sha = "ef149309be2b16cd4891ad1d236586715a24dd31a5686218febd0c0251063008"  # as of the first recorded runs
    assert CHAT.sha256 == sha


def test_llama_3_gets_its_headers() -> None:
    """What its published chat template makes of the two messages, without the lines about dates."""
    tokenizer = tokenizer_of(LLAMA3, prepends=True)
    template, notes = fit_template(CHAT, tokenizer)
    assert template.render("2 + 2?") == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        f"{BOXED}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        "2 + 2?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert (template.name, template.stop, template.end) == (CHAT.name, ("<|start_header_id|>",), "<|eot_id|>")
    assert len(notes) == 1 and "own markers" in notes[0]
    ids = tokenizer.encode(template.render("2"), add_special_tokens=False)
    special = set(tokenizer.get_added_vocab().values())
    assert sum(i in special for i in ids) == 9, "every marker is one token"
    assert sum(i in special for i in tokenizer.encode(CHAT.render("2"), add_special_tokens=False)) == 0


def test_examples_are_turns_in_the_models_own_markers() -> None:
    """Two answered questions before the one that is asked, in ChatML and Llama 3; their answers are right."""
    two_shot = TEMPLATES["two-shot"]
    turns = two_shot.render("2 + 2?").split("<|im_start|>")[1:]
    roles = [turn.partition("\n")[0] for turn in turns]
    assert roles == ["system", *("user", "assistant") * 3]
    assert turns[-2:] == ["user\n2 + 2?<|im_end|>\n", "assistant\n"]
    answers = [turn.removeprefix("assistant\n").removesuffix("<|im_end|>\n") for turn in turns[2:-1:2]]
    for answer in answers:
        *steps, last = answer.splitlines()
        results = [step.split(" = ") for step in steps]
        assert all(eval(left) == int(right) for left, right in results) and last == f"#### {results[-1][1]}"
    llama, _ = fit_template(two_shot, tokenizer_of(LLAMA3, prepends=True))
    said = llama.render("2 + 2?").split("<|end_header_id|>\n\n")
    assert len(said) == 8 and said[-1] == "" and said[-2].startswith("2 + 2?<|eot_id|>")
    assert [text.partition("<|eot_id|>")[0] for text in said[3:-1:2]] == answers


def test_a_plain_prompt_begins_as_the_tokenizer_begins_a_text() -> None:
    """Llama 3 was trained behind <|begin_of_text|>; SmolLM2's begin token is a turn's, and not put first."""
    plain = TEMPLATES["plain"]
    template, notes = fit_template(plain, tokenizer_of(LLAMA3, prepends=True))
    assert template.text == "<|begin_of_text|>" + plain.text and template.stop == plain.stop
    assert template.end == "<|eot_id|>" and notes == (
        "prompt: no token <|endoftext|>; <|eot_id|> ends written solutions",
    )
    assert fit_template(template, tokenizer_of(LLAMA3, prepends=True))[0] == template, "once only"
    assert fit_template(plain, tokenizer_of(LLAMA3))[0].text == plain.text
    assert fit_template(plain, tokenizer_of(SMOLLM2, prepends=True))[0].text == plain.text


def test_a_model_without_markers_is_told() -> None:
    template, notes = fit_template(CHAT, tokenizer_of(BARE))
    assert template.text == CHAT.text and template.end == "</s>"
    assert "no chat markers" in notes[0] and "`plain`" in notes[0]


def test_a_prompt_of_ones_own_is_left_alone() -> None:
    own = Template("mine", "Q: {question}\nA:", ("\nQ:",), "<|eot_id|>")
    assert fit_template(own, tokenizer_of(LLAMA3)) == (own, ())
    assert own.in_markers(CHATML) is own


@pytest.mark.parametrize(
    ("family", "eos", "expected"),
    [
        (QWEN, 258, {"<|im_end|>", "<|endoftext|>"}),
        (SMOLLM2, 258, {"<|im_end|>", "<|endoftext|>"}),
        (SMOLLM2, 257, {"<|im_end|>", "<|endoftext|>"}),  # a config that names the wrong one as well
        (LLAMA3, 257, {"<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"}),
        (LLAMA3, [257, 260, 261], {"<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"}),
        (BARE, 257, {"</s>"}),
    ],
)
def test_what_ends_an_answer(family: tuple[Any, ...], eos: int | list[int], expected: set[str]) -> None:
    """In the base model and the tuned one alike; never a token that begins a turn."""
    tokenizer = tokenizer_of(family)
    for template in TEMPLATES.values():
        assert ends_of(tokenizer, fit_template(template, tokenizer)[0], eos) == expected


def test_an_end_token_that_begins_a_turn_is_mended() -> None:
    """As in SmolLM2's tokenizer read from GGUF: 1, <|im_start|>, where 2, <|im_end|>, is right."""
    wrong = tokenizer_of((SMOLLM2[0], "<|im_start|>", "<|im_start|>", None))
    (note,) = mend_end(wrong)
    assert note == "tokenizer: its end token <|im_start|> begins a turn; <|im_end|> is used"
    assert (wrong.eos_token, wrong.eos_token_id) == ("<|im_end|>", 258)
    for right in (wrong, tokenizer_of(QWEN), tokenizer_of(LLAMA3), tokenizer_of(BARE)):
        before = right.eos_token
        assert mend_end(right) == () and right.eos_token == before


def test_a_policy_records_what_was_mended(model_dir: Path, tmp_path: Path) -> None:
    """From the folder to ``environment.json``'s facts; the end token that it saves is the right one."""
    import shutil

    from empg_lite.policy.card import tokenizer_files

    folder = shutil.copytree(model_dir, tmp_path / "model")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "<|im_start|>"}))
    policy = load_fixture_policy(folder)
    assert policy.stop_ids == {256, 258} and policy.tokenizer.eos_token == "<|im_end|>"
    assert policy.facts()["notes"] == [
        "tokenizer: its end token <|im_start|> begins a turn; <|im_end|> is used"
    ]
    saved = json.loads(tokenizer_files(policy)["tokenizer_config.json"])
    assert saved["eos_token"] == "<|im_end|>"
    assert load_tokenizer(model_dir)[1] == () == load_fixture_policy(model_dir).notes


def test_a_model_that_never_ends_is_refused() -> None:
    tokenizer, template = tokenizer_of((("<s>",), "<s>", None, None)), TEMPLATES["plain"]
    with pytest.raises(ModelUnusable, match="no token that ends a text.*set eos_token"):
        ends_of(tokenizer, fit_template(template, tokenizer)[0], [])
    assert ends_of(tokenizer, template, 256) == {"<s>"}, "the config's will do"
