"""Prompt and tokenizer fitted to each other: chat markers, the token that begins a text, those that end one.

Which markers a model knows is read off its vocabulary. Its Jinja chat template, which is code, is never run.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from empg_lite.core.errors import ModelUnusable
from empg_lite.policy.templates import CHATML, MARKERS, Template

#: Tokens that end a turn or a text, in any family: a model may emit one that its files do not name. Qwen2.5
#: base ends with <|endoftext|>, Instruct with <|im_end|>; Llama 3's base and Instruct differ likewise.
ENDS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<|eom_id|>")


def mend_end(tokenizer: Any) -> tuple[str, ...]:
    """Correct an end token that begins a turn, in place: some conversions of SmolLM2's tokenizer have it so.

    Returns:
        A note if there was one.
    """
    wrong = tokenizer.eos_token
    for markers in MARKERS:
        if wrong == markers.start and markers.end in tokenizer.get_vocab():
            tokenizer.eos_token = markers.end
            return (f"tokenizer: its end token {wrong} begins a turn; {markers.end} is used",)
    return ()


def fit_template(template: Template, tokenizer: Any) -> tuple[Template, tuple[str, ...]]:
    """The prompt as this tokenizer's model expects it, and notes on what was changed.

    A built-in chat is written in the markers that the vocabulary has; a text that the tokenizer would begin
    with a token of its own (Llama 3's <|begin_of_text|>) begins with it; an end token that it lacks is
    replaced by its own. For Qwen nothing changes.
    """
    vocab, notes = tokenizer.get_vocab(), tuple[str, ...]()
    known = [m for m in MARKERS if m.start in vocab and m.end in vocab]
    if template.system is not None and known and known[0] is not CHATML:
        template = template.in_markers(known[0])
        notes += (f"prompt: {template.name} in the model's own markers, {known[0].start} and {known[0].end}",)
    elif template.system is not None and not known:
        notes += (f"prompt: the model has no chat markers, {template.name} is plain text to it; see `plain`",)
    first = first_token(tokenizer)
    if first and not template.text.startswith(first):
        template = replace(template, text=first + template.text)
    if template.end not in vocab and tokenizer.eos_token is not None:
        notes += (f"prompt: no token {template.end}; {tokenizer.eos_token} ends written solutions",)
        template = replace(template, end=tokenizer.eos_token)
    return template, notes


def first_token(tokenizer: Any) -> str | None:
    """What the tokenizer puts in front of every text, unless that begins a turn."""
    token = tokenizer.bos_token
    added = tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]
    return token if added and token not in {m.start for m in MARKERS} else None


def stop_ids(model: Any, tokenizer: Any, template: Template) -> frozenset[int]:
    """All end tokens of the model, the tokenizer and the template, and those of ``ENDS`` that exist.

    Raises:
        ModelUnusable: there is none.
    """
    ids: set[int] = set()
    for source in (model.config, getattr(model, "generation_config", None), tokenizer):
        value = getattr(source, "eos_token_id", None)
        if value is not None:
            ids.update(value if isinstance(value, (list, tuple)) else [value])
    vocab = tokenizer.get_vocab()
    ids.update(vocab[token] for token in (template.end, *ENDS) if token in vocab)
    ids -= {vocab[m.start] for m in MARKERS if m.start in vocab and m.end in vocab}
    if not ids:
        raise ModelUnusable(
            "no token that ends a text: neither config.json nor the tokenizer names one",
            str(tokenizer.name_or_path),
            "set eos_token in tokenizer_config.json",
        )
    return frozenset(ids)
