"""What the jobs of ``gpu.py`` work on: models with random weights, their tokenizer, problems and rows."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import random
import tempfile
from dataclasses import replace
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import torch
from gpu_parts import Job
from setting import Setting
from shapes import BYTES, Shape, write_model

from empg_lite.core.bundled import PACKAGED, gguf_file
from empg_lite.core.rationale import Rationale
from empg_lite.policy.policy import Policy

ROOT = Path(__file__).resolve().parents[1]
#: Standard deviation of the logits of single-byte tokens in a model with random weights. All others stay near
#: 0, so that what it samples is text; otherwise nearly every token would lie outside the tokenizer.
SPEAKS = 4.0
#: Recipe and model that ``learn`` trains where its file is at hand.
REAL = "smollm2-135m"
#: What ``gym_entries.py`` wrote: where it is there, ``learn`` trains on it.
GYM = ROOT / ".kit" / "gym"


def cut_shape(shape: Shape) -> Shape:
    """The same numbers of heads and tied embeddings; two layers, a thousand tokens, on a CPU heads of 8.

    On a GPU heads keep their size: attention kernels are made for some sizes only.
    """
    hidden = (shape.head_dim if torch.cuda.is_available() else 8) * shape.heads
    return replace(shape, hidden=hidden, intermediate=2 * hidden, layers=2, vocab=1024)


def write_speaking(folder: Path, shape: Shape) -> None:
    """A model of that shape with random weights that writes bytes; in 16 bits on a GPU.

    A folder is there whole or not at all: whoever writes it may be killed.
    """
    part = folder.with_name(folder.name + ".part")
    write_model(part, shape, dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    end = BYTES
    if (tokenizer := real_tokenizer()) is not None and shape.vocab > 151_643:
        end = 151_643  # Qwen2.5's <|endoftext|>; its first 256 tokens are the bytes, too
        use_tokenizer(part, tokenizer, end)
    if shape.head_parameters < 150_000_000:  # 0.5B, and all of a rehearsal's: larger ones sample no text
        speak(part / "model.safetensors", shape, end)
    os.replace(part, folder)
    gc.collect()  # the memory of what was written does not count in what follows


def speak(file: Path, shape: Shape, end: int) -> None:
    """Scale the embeddings of bytes and of the end token, so that their logits spread by ``SPEAKS``.

    With tied embeddings that alone would say the same token again and again: random signs in the last norm
    take the product of an embedding with itself away.
    """
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    embedding = tensors["model.embed_tokens.weight"]
    factor = SPEAKS / (0.02 * shape.hidden**0.5)  # 0.02: transformers' initializer_range
    embedding[:BYTES] *= factor
    embedding[end] *= factor
    norm = tensors["model.norm.weight"]
    norm *= torch.randint(0, 2, norm.shape, generator=torch.Generator().manual_seed(0)).mul(2).sub(1)
    save_file(tensors, file, metadata={"format": "pt"})


def real_tokenizer() -> Path | None:
    """Qwen2.5's tokenizer files in the real data beside the checkout (``EMPG_SHARED``), if they are there."""
    root = Path(os.environ.get("EMPG_SHARED", ROOT.parent / "shared"))
    folder = root / "data" / "tokenizer-qwen2.5"
    return folder if (folder / "tokenizer.json").is_file() else None


def use_tokenizer(folder: Path, tokenizer: Path, end: int) -> None:
    """Put these tokenizer files into a model folder, in the place of those that are there."""
    for name in ("vocab.json", "merges.txt", "tokenizer.json", "base/tokenizer_config.json"):
        (folder / Path(name).name).write_bytes((tokenizer / name).read_bytes())
    for name in ("config.json", "generation_config.json"):
        if (file := folder / name).is_file():
            config = json.loads(file.read_text("utf-8")) | {"eos_token_id": end, "pad_token_id": end}
            file.write_text(json.dumps(config), "utf-8")


def set_adapter(policy: Policy, scale: float = 0.01) -> None:
    """The same LoRA weights whoever loaded the model: ``scale`` times normal numbers, from a fixed seed."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def made_up_data(home: Path) -> list[str]:
    """Additions, a prompt template whose stops random bytes spell soon, and a reward that they often earn."""
    rows = [{"question": f"{a} + {b} = ?", "answer": str(a + b)} for a in range(12) for b in range(8)]
    (home / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    stops = json.dumps(list(ascii_uppercase[::2]))
    (home / "template.yaml").write_text(f'text: "{{question}}\\n"\nstop: {stops}\n', "utf-8")
    return [
        f"data.path={home / 'problems.jsonl'}",
        f"data.prompt={home / 'template.yaml'}",
        "data.reward=regex:[a-z0-9]",
        "data.validation=2",
    ]


def random_rows(policy: Policy, setting: Setting) -> list[Any]:
    """Rationales of the setting's prompts and lengths, their tokens random, the last one the stop."""
    r, k = random.Random(1), setting.samples
    rows = []
    for i, length in enumerate(setting.lengths):
        problem = setting.problems[i // k]
        text, ids = policy.encode_prompt(problem.question)
        tokens = (*(r.randrange(BYTES) for _ in range(length - 1)), policy.tokenizer.eos_token_id)
        rows.append(Rationale(problem.id, problem.question, "1", text, ids, "", tokens, "stop", 1, 0, i % k))
    return rows


def score_rows() -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Eight prompts of 20 to 90 tokens with 32 more tokens each, random and always the same."""
    r = random.Random(2)
    return [
        (
            tuple(r.randrange(BYTES) for _ in range(20 + 10 * n)),
            tuple(r.randrange(BYTES) for _ in range(32)),
        )
        for n in range(8)
    ]


def learning_recipe(job: Job, gym: Path = GYM) -> tuple[str, list[str]]:
    """The recipe that ``learn`` trains by, and its changes: a bundled model's, or a real one's where its file
    is here, on Reasoning Gym's sums where they are."""
    if job.small:  # on a CPU the real model takes minutes, too long for a rehearsal
        return "tiny-hard", ["run.steps=2", "run.eval_every=2", "run.eval_limit=16"]
    if smollm2_file() is None:
        return "tiny-hard", []
    train, test = gym / "train.jsonl", gym / "test.jsonl"
    if not (train.is_file() and test.is_file()):
        return REAL, []
    files = ["data.source=local", f"data.path={train}", f"data.eval_path={test}", "data.reward=gsm8k"]
    return f"{REAL}-gym", [*files, "run.steps=100", "run.eval_every=50"]


def smollm2_file(pieces: Path = ROOT / ".kit" / "smollm2") -> Path | None:
    """SmolLM2's GGUF file: named, installed, or joined from the pieces that ``gpu_kit.sh`` made.

    A joined file is named in the environment, where the package looks for it.
    """
    packaged = PACKAGED[REAL]
    if (found := gguf_file(packaged)) is not None:
        return found
    joined = Path(tempfile.gettempdir()) / "empg-lite-smollm2.gguf"
    if not joined.is_file():
        whole = b"".join(part.read_bytes() for part in sorted(pieces.glob("part-*")))
        expected = pieces / "SHA256"
        if not expected.is_file() or hashlib.sha256(whole).hexdigest() != expected.read_text().strip():
            return None  # not all pieces are here yet
        part = joined.with_name(f"{joined.name}.{os.getpid()}")
        part.write_bytes(whole)
        os.replace(part, joined)
    os.environ[packaged.variable] = str(joined)
    return joined
