"""Make the bundled models: tokenizer, corpus and pre-training, from one seed.

    python scripts/make_tiny.py                   # writes empg_lite/data/tiny/model/
    python scripts/make_tiny.py --name tiny-hard  # writes model_hard/ next to it, starting from tiny

The shipped weights took 24 minutes on one core of a shared 2-core machine (0.5 s a step), with torch 2.13.0.
Base model on the 500 test problems: greedy 4.0%, mean length 5 tokens; T=1 31%, 17 tokens. ``tiny-hard``: 13
minutes with two threads on a busy machine; greedy 12.4%, 14 tokens; T=1 20%, 26 tokens.

The corpus is an endless stream of generated word problems with solutions in three styles: most blurt out an
answer, some work step by step carelessly, a minority work step by step correctly. The result is a base model
that can reason but usually does not. Phase one is mostly careful solutions and teaches the arithmetic; phase
two is the mix, with the learning rate decaying to zero. In the mix of ``tiny-hard`` the worked solutions get
some facts wrong, each in its own way. Training can unlearn them one by one, so there is still something to
learn once the model reasons.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny_solutions import blurted, careful, careless, habitual
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from empg_lite.core.bundled import BUNDLED, model_path
from empg_lite.data.tiny import DIFFICULTY, TINY, Difficulty, tiny_problems
from empg_lite.data.tiny.problems import Story, stories
from empg_lite.policy.templates import TEMPLATES

TEMPLATE = TEMPLATES["plain"]
END, SPECIALS = TEMPLATE.end, ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
#: What the vocabulary was trained on, for every difficulty. Must not change: the weights depend on it.
VOCABULARY = (TINY, Difficulty(steps=(4, 6), max_value=200, max_operand=50, max_factor=6))
SEED = 7
Pair = tuple[str, str]


@dataclass(frozen=True)
class Phase:
    """A phase of pre-training: optimizer steps, and the share of each style."""

    steps: int
    blurted: float = 0.0
    careless: float = 0.0
    habitual: float = 0.0
    careful: float = 0.0


@dataclass(frozen=True)
class Pretraining:
    """Everything that determines the weights besides the seed."""

    phases: tuple[Phase, ...]
    blurts_right: float = 0.4
    batch_size: int = 64
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    decay: float = 0.6
    weight_decay: float = 0.01
    tokens_per_row: int = 30
    vocab_size: int = 600

    @property
    def steps(self) -> int:
        return sum(phase.steps for phase in self.phases)


PRETRAINING = {
    "tiny": Pretraining(
        (Phase(1900, blurted=0.25, careful=0.75), Phase(1100, blurted=0.55, careless=0.15, careful=0.30))
    ),
    "tiny-hard": Pretraining(
        (Phase(900, blurted=0.2, careful=0.8), Phase(900, blurted=0.5, habitual=0.5)),
        blurts_right=0.15,
        tokens_per_row=45,
    ),
}


# ---- tokenizer -------------------------------------------------------------------------------------------


def tokenizer_texts(seed: int) -> list[str]:
    """Stories of both difficulties, so that they can share a vocabulary."""
    every_style = Pretraining((Phase(2000, blurted=1.0, careless=1.0, careful=1.0),), batch_size=1)
    return [
        prompt + answer
        for difficulty in VOCABULARY
        for prompt, answer in corpus(seed, difficulty, every_style)
    ]


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE that splits text exactly as ``Qwen2Tokenizer`` does.

    ``AutoTokenizer`` builds a ``Qwen2Tokenizer`` for a ``qwen2`` config, with its own normalizer and
    pre-tokenizer; merges learned under different ones would silently split wrongly. The special tokens follow
    the vocabulary, as in Qwen2.5.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(list(SPECIALS))
    return tokenizer


def end_id(tokenizer: Tokenizer) -> int:
    end = tokenizer.token_to_id(END)
    assert end is not None
    return end


def wrap_tokenizer(tokenizer: Tokenizer) -> Qwen2Tokenizer:
    """The same tokenizer as the class that ``AutoTokenizer`` loads."""
    state = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in state["merges"]]
    return Qwen2Tokenizer(
        vocab=state["vocab"],
        merges=merges,
        extra_special_tokens=list(SPECIALS[1:]),
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


# ---- corpus ----------------------------------------------------------------------------------------------


def corpus(seed: int, difficulty: Difficulty, how: Pretraining) -> Iterator[Pair]:
    """(prompt, completion) pairs for every step of the phases; excludes the questions of both splits."""
    kept_out = {p.question for split in ("train", "test") for p in tiny_problems(split, difficulty)}
    fresh = (story for story in stories(seed, difficulty) if story.question not in kept_out)
    rng = random.Random(seed + 1)
    styles: dict[str, Callable[[Story], str]] = {
        "blurted": lambda story: blurted(story, rng, how.blurts_right),
        "careless": lambda story: careless(story, rng),
        "habitual": lambda story: habitual(story, rng),
        "careful": careful,
    }
    for phase in how.phases:
        shares = {name: getattr(phase, name) for name in styles if getattr(phase, name)}
        for _ in range(phase.steps * how.batch_size):
            story = next(fresh)
            (style,) = rng.choices(tuple(shares), tuple(shares.values()))
            yield TEMPLATE.render(story.question), styles[style](story)


def batches(
    pairs: Iterator[Pair], tokenizer: Tokenizer, batch_size: int, seed: int, pool: int = 16
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(ids, labels), each (B, T), right-padded; labels are -100 outside the completion and its end token.

    ``pool`` batches at a time are sorted by length, to limit padding, and yielded in random order.
    """
    end, rng = end_id(tokenizer), random.Random(seed)
    while chunk := [pair for _, pair in zip(range(pool * batch_size), pairs, strict=False)]:
        prompts = [e.ids for e in tokenizer.encode_batch([prompt for prompt, _ in chunk])]
        answers = [[*e.ids, end] for e in tokenizer.encode_batch([answer for _, answer in chunk])]
        rows = sorted(zip(prompts, answers, strict=True), key=lambda row: len(row[0]) + len(row[1]))
        starts = list(range(0, len(rows), batch_size))
        rng.shuffle(starts)
        for start in starts:
            yield pad(rows[start : start + batch_size], end)


def pad(rows: list[tuple[list[int], list[int]]], end: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, labels) of prompt and answer ids, each (B, T)."""
    shape = len(rows), max(len(prompt) + len(answer) for prompt, answer in rows)
    ids, labels = torch.full(shape, end), torch.full(shape, -100)
    for i, (prompt, answer) in enumerate(rows):
        stop = len(prompt) + len(answer)
        ids[i, :stop] = torch.tensor(prompt + answer)
        labels[i, len(prompt) : stop] = torch.tensor(answer)
    return ids, labels


# ---- model -----------------------------------------------------------------------------------------------


def make_model(tokenizer: Tokenizer) -> Qwen2ForCausalLM:
    """A freshly initialized 0.9M-parameter Qwen2 with four layers."""
    end = end_id(tokenizer)
    config = Qwen2Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
        dtype="float32",
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=end)
    return model


def pretrain(model: Qwen2ForCausalLM, stream: Iterator[Any], how: Pretraining) -> None:
    """AdamW on the completions; the rate warms up, then falls to 0 over the last ``decay`` of the steps."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=how.weight_decay)
    started, falling = time.perf_counter(), how.decay * how.steps
    for step, (ids, labels) in enumerate(stream, start=1):
        rate = min(1.0, step / how.warmup_steps, (how.steps - step + 1) / falling)
        for group in optimizer.param_groups:
            group["lr"] = how.learning_rate * rate
        hidden = model.model(ids[:, :-1], use_cache=False).last_hidden_state
        wanted = labels[:, 1:] != -100
        logits = model.lm_head(hidden[wanted])
        loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:][wanted], reduction="sum")
        # Rows of a batch have similar lengths: its own mean would overweight the tokens of short answers.
        loss = loss / (how.batch_size * how.tokens_per_row)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == how.steps:
            seconds = time.perf_counter() - started
            print(f"step {step}/{how.steps}  loss {loss.item():.4f}  {seconds:.0f} s", flush=True)


@torch.no_grad()
def accuracy(model: Any, tokenizer: Any, difficulty: Difficulty, sample: bool) -> tuple[float, float]:
    """(accuracy, mean completion length in tokens including the end token) on the test problems."""
    problems, end, right, tokens = tiny_problems("test", difficulty), model.config.eos_token_id, 0, 0
    for start in range(0, len(problems), 125):
        part = problems[start : start + 125]
        prompts = [TEMPLATE.render(p.question) for p in part]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        flags = {"do_sample": True, "top_k": 0} if sample else {"do_sample": False}
        new = model.generate(**inputs, max_new_tokens=120, **flags)[:, inputs["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        answers = [text.rpartition("####")[2].strip() for text in texts]
        right += sum(answer == p.gold for answer, p in zip(answers, part, strict=True))
        ended_before = (new == end).cumsum(1) - (new == end).int()
        tokens += int((ended_before == 0).sum())
    return right / len(problems), tokens / len(problems)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder to write; default: the bundled one")
    parser.add_argument("--name", choices=BUNDLED, default="tiny")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    difficulty, how = DIFFICULTY[args.name], PRETRAINING[args.name]
    out = args.out or model_path(args.name)
    trained = train_tokenizer(tokenizer_texts(args.seed), how.vocab_size)
    model = make_model(trained)
    if args.name != "tiny":
        model.load_state_dict(Qwen2ForCausalLM.from_pretrained(model_path()).state_dict())
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {trained.get_vocab_size()} tokens")
    pairs = corpus(args.seed, difficulty, how)
    pretrain(model, batches(pairs, trained, how.batch_size, args.seed), how)

    model.eval().save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # save_pretrained writes it with mode 600
    tokenizer = wrap_tokenizer(trained)
    tokenizer.save_pretrained(out)
    for name, sampled in (("greedy", False), ("T=1", True)):
        right, length = accuracy(model, tokenizer, difficulty, sampled)
        print(f"{name}: accuracy {right:.3f}, mean length {length:.1f} tokens, 500 test problems")


if __name__ == "__main__":
    main()
