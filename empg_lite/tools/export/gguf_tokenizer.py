"""A tokenizer in a GGUF file: vocabulary, merges, special tokens, and how text is split before them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from empg_lite.core.errors import DataError
from empg_lite.policy.card import tokenizer_files
from empg_lite.policy.tokens import first_token

if TYPE_CHECKING:
    from empg_lite.policy.policy import Policy


def splitter_name(tokenizer: Any) -> str:
    """llama.cpp's name for how a tokenizer splits text before its merges.

    Raises:
        DataError: as none of those that are mapped here.
    """
    found = _splits(tokenizer.backend_tokenizer.to_str())
    for name, known in _known_splitters().items():
        if found == known:
            return name
    raise DataError(
        "the tokenizer splits text unlike Qwen2's, Llama 3's and SmolLM2's: llama.cpp would split it wrongly",
        "--to gguf",
        "use --to merged",
    )


def _known_splitters() -> dict[str, Any]:
    """Pre-tokenizers by llama.cpp's name for them."""
    from transformers import Qwen2Tokenizer

    qwen2 = Qwen2Tokenizer().backend_tokenizer.to_str()
    llama3 = qwen2.replace(r"|\\p{N}|", r"|\\p{N}{1,3}|")  # up to three digits together, else as Qwen2
    digits = {"type": "Digits", "individual_digits": True}
    words = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    smollm = {"type": "Sequence", "pretokenizers": [digits, words]}
    return {"qwen2": _splits(qwen2), "llama-bpe": _splits(llama3), "smollm": smollm}


def _splits(backend: str) -> Any:
    """The pre-tokenizer of a tokenizer's JSON, without the setting that changes offsets only."""

    def relevant(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: relevant(value) for key, value in part.items() if key != "trim_offsets"}
        return [relevant(item) for item in part] if isinstance(part, list) else part

    return relevant(json.loads(backend)["pre_tokenizer"])


def add_tokenizer(writer: Any, policy: Policy, splitter: str) -> None:
    """Vocabulary with token types, merges and special tokens; rows of the head beyond it are unused."""
    import gguf

    tokenizer = policy.tokenizer
    added = tokenizer.added_tokens_decoder
    by_id = {i: text for text, i in tokenizer.get_vocab().items()}
    tokens, kinds = [], []
    for i in range(policy.head_weight.shape[0]):
        tokens.append(by_id.get(i, f"[PAD{i}]"))
        special = i in added and added[i].special
        kind = gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED if i in added else None
        kinds.append(kind or (gguf.TokenType.NORMAL if i in by_id else gguf.TokenType.UNUSED))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitter)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(m) if isinstance(m, list) else m for m in merges])
    end = policy.template.end
    eos = tokenizer.convert_tokens_to_ids(end) if end in tokenizer.get_vocab() else min(policy.stop_ids)
    writer.add_eos_token_id(eos)
    writer.add_pad_token_id(policy.pad_id)
    first = first_token(tokenizer)
    if first is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_add_bos_token(first is not None)
    chat = tokenizer_files(policy).get("chat_template.jinja")
    if chat:
        writer.add_chat_template(chat.decode("utf-8"))
