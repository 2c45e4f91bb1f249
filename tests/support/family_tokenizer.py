"""Small tokenizers with the control tokens of each family, and with its way to split text."""

from __future__ import annotations

import json
from typing import Any

#: Control tokens of each family's tokenizer, as published, from id 256 on: (all, begin, end, pad).
QWEN = (("<|endoftext|>", "<|im_start|>", "<|im_end|>"), None, "<|im_end|>", "<|endoftext|>")
SMOLLM2 = (QWEN[0], "<|im_start|>", "<|im_end|>", "<|im_end|>")
LLAMA3 = (
    ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>",
     "<|eot_id|>"),
    "<|begin_of_text|>", "<|eot_id|>", None,
)  # fmt: skip
BARE = (("<s>", "</s>"), "<s>", "</s>", None)


def tokenizer_of(family: tuple[Any, ...], *, prepends: bool = False) -> Any:
    """A byte-level tokenizer with these control tokens; ``prepends``: every text begins with the first.

    It splits text as the family's does, which changes nothing where there are no merges.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

    special, begin, end, pad = family
    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    if family is SMOLLM2:
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(False)])
    if family in (QWEN, LLAMA3):
        text = json.loads(Qwen2Tokenizer().backend_tokenizer.to_str())
        split = text["pre_tokenizer"]["pretokenizers"][0]["pattern"]
        if family is LLAMA3:  # whose numbers come in up to three digits
            one, three = r"|\p{N}|", r"|\p{N}{1,3}|"
            assert split["Regex"].count(one) == 1
            split["Regex"] = split["Regex"].replace(one, three)
        tokenizer.pre_tokenizer = Tokenizer.from_str(json.dumps(text)).pre_tokenizer
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if prepends:
        ids = [(begin, tokenizer.token_to_id(begin))]
        tokenizer.post_processor = processors.TemplateProcessing(f"{begin} $A", special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=begin, eos_token=end, pad_token=pad)
