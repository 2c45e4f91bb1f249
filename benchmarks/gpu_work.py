"""What one process of ``gpu.py`` measures: one rival at one shape, a line of JSON for each figure.

A rival has a process of its own because Unsloth patches transformers and TRL when it is imported, and because
memory is compared. A figure that fails says why in its line, and the next one is tried.
"""

from __future__ import annotations

import gc
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from forced import draw_lengths, forced_generate
from setting import OurStep, Setting, prompts_of, sample, tiny_recipe, weighed

from empg_lite.policy.policy import Policy, collate
from empg_lite.rationale import Problem

#: GB (1e9) that a CUDA context takes of a card beside what torch allocates.
CONTEXT_GB = 0.6


@dataclass(frozen=True, slots=True)
class Job:
    """One process's task, as JSON on its command line.

    Attributes:
        rival: ``empg``, ``hf`` (by hand), ``unsloth``, ``trl``, ``unsloth-trl``.
        figures: what is measured: ``decode``, ``m-step``, ``step``, ``logprobs``, ``floor``.
        problems: P of each measured decode; the first one is the step's.
        mean, cap: completion lengths in tokens.
        cap_gb: the card is made this small, in GB (1e9); None: as it is.
    """

    rival: str
    shape: str
    folder: str
    figures: tuple[str, ...]
    problems: tuple[int, ...] = (16, 64)
    samples: int = 8
    prompt: int = 150
    mean: float = 180.0
    cap: int = 512
    repeats: int = 3
    cap_gb: float | None = None
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """For a person."""
        return f"{self.rival} {self.shape}" + (f" in {self.cap_gb:g} GB" if self.cap_gb else "")


def work(job: Job) -> None:
    """Measure the job's figures and print each as a line."""
    if "floor" in job.figures:
        tell(job, "floor", probe)
        return
    if job.cap_gb is not None:
        shrink(job.cap_gb)
    learner = load(job)
    if "logprobs" in job.figures:
        tell(job, "logprobs", lambda: scores(learner.policy))
    for n, problems in enumerate(job.problems):
        setting = made_up(learner.policy, job, problems)
        if "decode" in job.figures:
            tell(job, "decode", lambda s=setting: decode(job, learner, s), rows=setting.rows)
        if n == 0 and "m-step" in job.figures:
            tell(job, "m-step", lambda s=setting: fit(job, learner, s), rows=setting.rows)
        if n == 0 and "step" in job.figures:
            tell(job, "step", lambda s=setting: whole(job, learner, s), rows=setting.rows)


def tell(job: Job, figure: str, measure: Callable[[], dict[str, Any]], **facts: Any) -> None:
    """Print what ``measure`` gives, or how it failed, with the peak of the device's memory."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        facts |= measure()
    except Exception as error:  # the row says so and the rest goes on
        facts["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if cuda:
        facts["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        facts["reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
    line = {"rival": job.rival, "shape": job.shape, "figure": figure, "cap_gb": job.cap_gb, **facts}
    print(json.dumps(line), flush=True)


# --- the rivals --------------------------------------------------------------------------------------


def load(job: Job) -> Any:
    """A learner over the job's model: NF4, LoRA of rank 16 with values from a fixed seed."""
    from empg_lite.learner import build_learner

    backend = "unsloth" if job.rival.startswith("unsloth") else "transformers"
    recipe = tiny_recipe(
        f"model.name={job.folder}",
        f"model.backend={backend}",
        "model.dtype=auto",
        "model.load_in_4bit=true",
        "sampler.engine=" + ("generate" if backend == "unsloth" else "native"),
        f"sampler.problems_per_step={job.problems[0]}",
        f"sampler.samples_per_problem={job.samples}",
        f"sampler.max_new_tokens={job.cap}",
        f"data.max_prompt_tokens={job.prompt}",
        "data.prompt=plain",
        *job.overrides,
    )
    learner = build_learner(recipe)
    set_adapter(learner.policy)
    return learner


def set_adapter(policy: Policy, scale: float = 0.01) -> None:
    """The same LoRA weights whoever loaded the model: ``scale`` times normal numbers, from a fixed seed."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def made_up(policy: Policy, job: Job, problems: int) -> Setting:
    """Problems of random letters whose prompts have ``job.prompt`` tokens; lengths from the table."""
    r = random.Random(0)
    around = len(policy.encode_prompt("")[1])
    letters = "abcdefghijklmnopqrstuvwxyz"
    questions = ["".join(r.choices(letters, k=max(1, job.prompt - around))) for _ in range(problems)]
    lengths = draw_lengths(problems * job.samples, mean=job.mean, cap=job.cap)
    plain_id = policy.tokenizer.encode("a", add_special_tokens=False)[0]
    rows = tuple(Problem(f"p{n}", q, "1", {}) for n, q in enumerate(questions))
    return Setting(rows, job.samples, job.cap, tuple(lengths), plain_id)


def shrink(gigabytes: float) -> None:
    """Make the card that small: allocations beyond fail, and ``auto`` counts with no more.

    Raises:
        RuntimeError: there is no GPU.
    """
    from empg_lite import plan

    if not torch.cuda.is_available():
        raise RuntimeError("a memory cap needs a GPU")
    usable = int((gigabytes - CONTEXT_GB) * 1e9)
    torch.cuda.set_per_process_memory_fraction(usable / torch.cuda.get_device_properties(0).total_memory)
    plan.free_memory = lambda device: usable - torch.cuda.memory_allocated(device)


# --- the figures -------------------------------------------------------------------------------------


def seconds(run: Callable[[], Any], repeats: int) -> dict[str, Any]:
    """Median, least and greatest seconds of ``repeats`` runs after one that warms up (named ``first``)."""
    taken = []
    for _ in range(1 + repeats):
        settle()
        started = time.perf_counter()
        run()
        settle()
        taken.append(time.perf_counter() - started)
    first, *rest = taken
    return {"seconds": median(rest), "least": min(rest), "most": max(rest), "first": first}


def settle() -> None:
    """Wait for the device's queue."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def decode(job: Job, learner: Any, setting: Setting) -> dict[str, Any]:
    """Tokens a second of sampling all rows at once, adapter on."""
    from empg_lite.sampler import make_sampler

    policy, drawn = learner.policy, list[int]()
    if job.rival == "empg":
        sampler = make_sampler(policy, "native", setting.rows)

        def run() -> None:
            drawn[:] = [len(r.completion_ids) for r in sample(learner, sampler, setting)]
    else:
        prompts = [p.ids for p in prompts_of(policy, setting) for _ in p.keys]
        stop, plain = policy.tokenizer.eos_token_id, policy.model.generate

        def run() -> None:
            from hand_loop import generate

            policy.model.generate = forced_generate(plain, setting.lengths, stop, setting.plain_id)
            try:
                rows = generate(
                    policy, prompts, do_sample=True, temperature=1.0, top_p=1.0, top_k=0,
                    repetition_penalty=1.0, max_new_tokens=setting.max_new_tokens,
                )  # fmt: skip
            finally:
                policy.model.generate = plain
            drawn[:] = [len(row) for row in rows]

    timed = seconds(run, job.repeats)
    assert drawn == list(setting.lengths), "lengths are not the table's"
    return {**timed, "tokens": setting.tokens, "tokens_per_second": setting.tokens / timed["seconds"]}


def fit(job: Job, learner: Any, setting: Setting) -> dict[str, Any]:
    """Seconds of one optimiser step on all rows, none of them at weight 0, the tokens random."""
    import trl_grpo
    from hand_loop import padded_step

    from empg_lite.mstep import m_step

    policy, optimizer = learner.policy, learner.optimizer
    rows = weighed(random_rows(policy, setting), setting.rewards(False))
    if job.rival in ("empg", "unsloth"):
        return seconds(lambda: m_step(policy, optimizer, rows, learner.fit_settings()), job.repeats)
    if job.rival == "hf":  # 4 rows: more logits do not fit a small card
        return seconds(lambda: padded_step(policy, optimizer, rows, rows=4, rate=1e-6), job.repeats)
    trainer = trainer_of(job, learner, setting, min(8, setting.rows))
    batch = min(8, setting.rows)
    return seconds(
        lambda: trl_grpo.loss_step(trainer, policy, optimizer, rows, rows=batch, rate=1e-6), job.repeats
    )


def whole(job: Job, learner: Any, setting: Setting) -> dict[str, Any]:
    """Seconds of one step, prompts to updated weights; rewards from a table, none of them 0."""
    import trl_grpo

    from empg_lite.rewards import Grader

    if job.rival in ("empg", "unsloth"):
        with Grader() as grader:
            ours = OurStep(learner, setting, grader, silent=False)
            timed = seconds(ours.step, job.repeats)
        return {**timed, "tokens": ours.tokens}
    trainer = trainer_of(job, learner, setting, min(8, setting.rows))
    steps = trl_grpo.Steps(trainer, learner.policy, setting.lengths, setting.plain_id)
    try:
        timed = seconds(steps.step, job.repeats)
    finally:
        steps.close()
    return {**timed, "tokens": steps.tokens}


def trainer_of(job: Job, learner: Any, setting: Setting, rows: int) -> Any:
    """TRL's trainer over the learner's policy; Unsloth's version of it where Unsloth loaded the policy."""
    import trl_grpo

    if job.rival == "unsloth-trl":
        from unsloth import FastLanguageModel, PatchFastRL

        PatchFastRL("GRPO", FastLanguageModel)
    prompts = [learner.policy.encode_prompt(p.question)[0] for p in setting.problems]
    return trl_grpo.build(
        learner.policy, prompts, samples=setting.samples, max_new_tokens=setting.max_new_tokens,
        rows=rows, rate=1e-6, rewards=setting.rewards(False),
    )  # fmt: skip


def random_rows(policy: Policy, setting: Setting) -> list[Any]:
    """Rationales of the setting's prompts and lengths, their tokens random, the last one the stop."""
    from empg_lite.rationale import Rationale

    r, k = random.Random(1), setting.samples
    rows = []
    for i, length in enumerate(setting.lengths):
        problem = setting.problems[i // k]
        text, ids = policy.encode_prompt(problem.question)
        tokens = (*(r.randrange(256) for _ in range(length - 1)), policy.tokenizer.eos_token_id)
        rows.append(Rationale(problem.id, problem.question, "1", text, ids, "", tokens, "stop", 1, 0, i % k))
    return rows


# --- log-probabilities -------------------------------------------------------------------------------


def score_rows() -> list[tuple[list[int], list[int]]]:
    """Eight prompts of 20 to 90 tokens with 32 more tokens each, random and always the same."""
    r = random.Random(2)
    return [
        ([r.randrange(256) for _ in range(20 + 10 * n)], [r.randrange(256) for _ in range(32)])
        for n in range(8)
    ]


def scores(policy: Policy) -> dict[str, Any]:
    """Log-probabilities (nats) of the same tokens three ways: rows padded right, padded left, one by one."""
    rows = score_rows()
    with policy.training(), torch.no_grad():
        logprobs, mask = policy.token_logprobs(collate(rows, policy.pad_id, policy.device))
        right = [x[m].tolist() for x, m in zip(logprobs, mask, strict=True)]
        alone = [next(_left(policy, [row])) for row in rows]
        left = list(_left(policy, rows))
    return {"right": right, "left": left, "alone": alone}


def _left(policy: Policy, rows: Sequence[tuple[list[int], list[int]]]) -> Iterator[list[float]]:
    from hand_loop import left_padded

    inputs = left_padded(policy, [[*prompt, *completion] for prompt, completion in rows])
    with policy.autocast():
        logits = policy.model(**inputs, use_cache=False).logits
    logprobs = logits[:, :-1].float().log_softmax(-1).gather(-1, inputs["input_ids"][:, 1:, None])
    for i, (_, completion) in enumerate(rows):
        yield logprobs[i, -len(completion) :, 0].tolist()


# --- the device --------------------------------------------------------------------------------------


def probe() -> dict[str, Any]:
    """What the device does at its best: bytes a second of a copy (read and written), FLOP/s of a matmul."""
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    side, length = (8192, 1 << 30) if cuda else (512, 1 << 24)
    source = torch.empty(length // 4, dtype=torch.float32, device=device).fill_(1.0)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    copying = seconds(lambda: target.copy_(source), 20)["least"]
    multiplying = seconds(lambda: a @ b, 20)["least"]
    name = torch.cuda.get_device_name(0) if cuda else "CPU"
    return {"device": name, "bandwidth": 2 * length / copying, "matmul": 2 * side**3 / multiplying}


def write(folder: Path, shape: str) -> None:
    """A model of that shape with random weights, in 16 bits on a GPU."""
    from shapes import SHAPES, write_model

    write_model(folder, SHAPES[shape], dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    gc.collect()  # the memory of what was written does not count in what follows
