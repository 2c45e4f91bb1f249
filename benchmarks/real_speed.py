"""A real model's step on a CPU beside ``generate``, a plain loop and llama.cpp's server, with equal threads.

    python benchmarks/real_speed.py [--repeats N] [--rows 16x4] [--threads 1] 2>/dev/null

SmolLM2-135M (docs/quickstart.md installs it; llama.cpp is the wheel ``xllamacpp``), problems and prompt of
the recipe ``smollm2-135m``, every completion ``TOKENS`` tokens long. llama.cpp reads the same weights in
float16, with a place for every row. Its cache is on, and every round asks other problems, as training does:
what the prompts share need not be computed again.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from forced import forced_generate
from hand_loop import generate, padded_step
from machine import headline
from setting import Setting, prompts_of, sample, weighed
from timing import Spread, circumstances, in_turn, ratios, table

from empg_lite.data.sources import load_splits
from empg_lite.loop.learner import Learner, build_learner
from empg_lite.loop.mstep import m_step
from empg_lite.recipe.file import load_recipe
from empg_lite.sampler import make_sampler

#: Length of every completion: about what the recipe's are before they are learned.
TOKENS = 24
#: Rows of the plain loop's micro-batch.
MICRO_BATCH = 4
#: Sampling from the model's own distribution.
PLAIN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def real_setting(learner: Learner, problems: int, samples: int) -> Setting:
    """The recipe's first problems; completions of one length."""
    rows = load_splits(learner.recipe).train[:problems]
    plain = learner.policy.tokenizer.encode(" is", add_special_tokens=False)[0]
    return Setting(tuple(rows), samples, TOKENS, (TOKENS,) * (problems * samples), plain_id=plain)


def by_hand(learner: Learner, setting: Setting) -> Callable[[], None]:
    """``generate`` on all rows at once, prompts repeated."""
    policy, plain = learner.policy, learner.policy.model.generate
    repeated = [p.ids for p in prompts_of(policy, setting) for _ in p.keys]

    def work() -> None:
        stop = policy.tokenizer.eos_token_id
        policy.model.generate = forced_generate(plain, setting.lengths, stop, setting.plain_id)
        rows = generate(
            policy, repeated, do_sample=True, temperature=1.0, top_p=1.0, top_k=0,
            repetition_penalty=1.0, max_new_tokens=TOKENS,
        )  # fmt: skip
        policy.model.generate = plain
        assert [len(row) for row in rows] == list(setting.lengths)

    return work


def llama_cpp(learner: Learner, setting: Setting, folder: Path, threads: int) -> Callable[[], None] | None:
    """The same rows from llama.cpp's server in this process; None without the wheel."""
    try:
        import xllamacpp
    except ImportError:
        return None
    from empg_lite.tools.export.gguf import write_gguf

    file, policy, size = folder / "model.gguf", learner.policy, len(setting.problems)
    write_gguf(policy, file, "f16", name="smollm2")
    prompts = [policy.encode_prompt(p.question)[1] for p in load_splits(learner.recipe).train]
    rounds = iter(range(0, len(prompts) - size, size))
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_parallel = str(file), setting.rows
    settings.n_ctx = setting.rows * (max(map(len, prompts)) + TOKENS + 8)
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(settings)

    def one(ids: Sequence[int]) -> int:
        ask = {"prompt": list(ids), "max_tokens": TOKENS, "ignore_eos": True, **PLAIN}
        answer: Any = server.handle_completions(ask)
        answer = json.loads(answer) if isinstance(answer, str) else answer
        return int(answer["usage"]["completion_tokens"])

    def work() -> None:
        at = next(rounds)
        asked = [ids for ids in prompts[at : at + size] for _ in range(setting.samples)]
        with ThreadPoolExecutor(setting.rows) as pool:  # they wait; the server computes
            assert set(pool.map(one, asked)) == {TOKENS}

    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--repeats", type=int, default=2, metavar="N", help="timed rounds (one more warms up)"
    )
    parser.add_argument("--rows", default="16x4", metavar="PxK", help="problems and samples of each")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="that each may use")
    arguments = parser.parse_args()
    problems, samples = map(int, arguments.rows.split("x"))
    torch.set_num_threads(arguments.threads)
    learner = build_learner(load_recipe("smollm2-135m", [f"sampler.max_new_tokens={TOKENS}"]).resolved())
    setting, policy = real_setting(learner, problems, samples), learner.policy
    print(headline(circumstances("transformers", "peft", "xllamacpp")), flush=True)
    behind = len(prompts_of(policy, setting)[0].ids)
    print(f"{problems} x {samples} rows of {TOKENS} tokens behind {behind}; threads: {arguments.threads}")
    rationales = sample(learner, make_sampler(policy, "native"), setting)
    given = weighed(rationales, setting.rewards(False))
    half = [replace(r, weight=0.0) if i % 2 else r for i, r in enumerate(given)]
    parameters, found = list(policy.trainable().values()), []
    loop, ours = (torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0) for _ in range(2))
    fit = learner.fit_settings()
    with tempfile.TemporaryDirectory() as folder:
        engine = make_sampler(policy, "native", int(learner.recipe.sampler.batch_rows))
        server = llama_cpp(learner, setting, Path(folder), arguments.threads)
        e_step = {"ours": lambda: sample(learner, engine, setting), "generate": by_hand(learner, setting)}
        e_step |= {"llama.cpp": server} if server else {}
        jobs: dict[str, dict[str, Callable[[], Any]]] = {
            "E-step": e_step,
            "M-step": {
                "ours": lambda: m_step(policy, ours, given, fit),
                "padded loop": lambda: padded_step(policy, loop, given, rows=MICRO_BATCH, rate=1e-9),
            },
            "M-step, half of weight 0": {
                "ours": lambda: m_step(policy, ours, half, fit),
                "padded loop": lambda: padded_step(policy, loop, half, rows=MICRO_BATCH, rate=1e-9),
            },
        }
        for what, rivals in jobs.items():
            spent = in_turn(rivals, repeats=arguments.repeats, warmups=1)
            for name, times in spent.items():
                wall, cpu = ratios(times, spent["ours"])
                rate = setting.tokens / Spread.of([t.wall for t in times]).median
                seconds = [Spread.of([getattr(t, kind) for t in times]) for kind in ("wall", "cpu")]
                found.append((what, name, *map(str, seconds), f"{rate:.0f}", str(wall), str(cpu)))
    head = ("what", "by", "s, wall", "s, CPU", "tokens/s", "times ours, wall", "times ours, CPU")
    print(table(head, found))


if __name__ == "__main__":
    main()
