"""What one process of ``gpu.py`` measures: a job's figures one after another, a row of JSON for each.

A figure that fails says why in its row, and the next one is tried. Rows go to a file of their own, because
libraries print to stdout. A row is written again as its figure grows and the last one counts: a process that
is killed leaves what it had.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import random
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from forced import draw_lengths, forced_generate
from gpu_checks import (
    engine_facts,
    greedy_gap,
    logprob_ways,
    partings,
    profiled,
    shrink,
    sorted_out,
    three_ways,
    without_graphs,
)
from gpu_floor import RATES, of_floor
from gpu_material import (
    cut_shape,
    learning_recipe,
    made_up_data,
    random_rows,
    score_rows,
    set_adapter,
    write_speaking,
)
from gpu_parts import Job
from setting import OurStep, Setting, prompts_of, sample, tiny_recipe, weighed
from shapes import SHAPES, Shape

from empg_lite.core.rationale import Problem
from empg_lite.core.view import View
from empg_lite.policy.policy import Policy
from empg_lite.sampler import Decoding, Prompt

ROOT = Path(__file__).resolve().parents[1]
Facts = dict[str, Any]


class Work:
    """One job being done.

    Attributes:
        folder: what the jobs share: models, the device's rates.
        rows: the file of its rows.
    """

    def __init__(self, job: Job, folder: Path, rows: Path) -> None:
        self.job, self.folder, self.rows = job, folder, rows
        self._learner: Any = None

    def do(self) -> None:
        """Measure the job's figures."""
        if self.job.cap_gb is not None:
            self.model()  # the model is made on the card as it is
            shrink(self.job.cap_gb)
        for figure in self.job.figures:
            measure = getattr(self, figure.replace("-", "_"))
            sizes = self.job.problems if figure == "decode" else self.job.problems[:1]
            if figure in ("decode", "decode-eager", "m-step", "step"):
                for problems in sizes:
                    rows = problems * self.job.samples
                    self.tell(figure, lambda m=measure, p=problems: m(p), rows=rows)
            else:
                self.tell(figure, measure)

    def tell(self, figure: str, measure: Callable[[], Facts], **facts: Any) -> None:
        """Write what ``measure`` gives, or how it failed, with the peak of the device's memory."""
        self._facts = {"figure": figure, **facts}
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        try:
            found = measure()
        except Exception as error:  # the row says so and the rest goes on
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}
        found["took"] = time.perf_counter() - started
        if cuda:
            found["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
            found["reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
        self.write(**found)

    def write(self, **found: Any) -> None:
        """A row of the figure at hand; replaces the one written before."""
        job = self.job
        row = {"part": job.part, "rival": job.rival, "shape": job.shape, "cap_gb": job.cap_gb}
        line = json.dumps({**row, **self._facts, **found})
        with self.rows.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    # --- models -----------------------------------------------------------------------------------

    @property
    def unsloth(self) -> bool:
        """Whether Unsloth loads the model."""
        return "unsloth" in self.job.rival

    @property
    def shape(self) -> Shape:
        """Of the job's model; cut down in a rehearsal."""
        return cut_shape(SHAPES[self.job.shape]) if self.job.small else SHAPES[self.job.shape]

    def model(self) -> Path:
        """The folder of the job's model; the first job that needs it writes it."""
        folder = self.folder / self.job.shape
        if not folder.exists():
            write_speaking(folder, self.shape)
        return folder

    def overrides(self) -> list[str]:
        """The recipe's model, and the sizes of a step."""
        job = self.job
        return [
            f"model.name={self.model()}",
            "model.backend=" + ("unsloth" if self.unsloth else "transformers"),
            "model.dtype=auto",
            "model.load_in_4bit=true",
            f"sampler.problems_per_step={max(job.problems)}",
            f"sampler.samples_per_problem={job.samples}",
            f"sampler.max_new_tokens={job.cap}",
            f"data.max_prompt_tokens={job.prompt}",
        ]

    def learner(self) -> Any:
        """A learner over the job's model, NF4, its LoRA of rank 16 filled from a fixed seed; loaded once."""
        from empg_lite.loop.learner import build_learner

        if self._learner is None:
            self._learner = build_learner(tiny_recipe(*self.overrides(), "data.prompt=plain"))
            set_adapter(self._learner.policy)
        return self._learner

    def setting(self, problems: int) -> Setting:
        """Problems of random letters whose prompts have ``job.prompt`` tokens; lengths from the table."""
        policy, job, r = self.learner().policy, self.job, random.Random(0)
        letters = [c for c in "abcdefghijklmnopqrstuvwxyz" if len(policy.tokenizer.encode(c)) == 1]
        around = len(policy.encode_prompt("")[1])
        # A space between the letters keeps a real tokenizer from merging them: two tokens for each.
        merges = len(policy.tokenizer.encode("abcdefgh", add_special_tokens=False)) != 8
        width = max(1, job.prompt - around)
        texts = [
            " ".join(r.choices(letters, k=width)) if merges else "".join(r.choices(letters, k=width))
            for _ in range(problems)
        ]
        rows = tuple(Problem(f"p{n}", text, "1", {}) for n, text in enumerate(texts))
        lengths = draw_lengths(problems * job.samples, mean=job.mean, cap=job.cap)
        plain_id = policy.tokenizer.encode("a", add_special_tokens=False)[0]
        return Setting(rows, job.samples, job.cap, tuple(lengths), plain_id)

    # --- it runs ----------------------------------------------------------------------------------

    def device(self) -> Facts:
        """The card, the versions, and what the card reaches in a copy and in a matrix product."""
        found = probe()
        (self.folder / RATES).write_text(json.dumps(found), "utf-8")
        return {**found, "machine": machine()}

    def train(self) -> Facts:
        """Two steps of ``train`` with the package's own settings, from an empty run directory."""
        from empg_lite.loop.train import TrainOptions, train
        from empg_lite.recipe.file import load_recipe

        home = self.folder / f"{self.job.rival}-{self.job.shape}"
        home.mkdir()
        short = ["sampler.max_new_tokens=128", "run.steps=2", "run.eval_every=0"]
        recipe = load_recipe("custom-jsonl", [*self.overrides(), *made_up_data(home), *short])
        run, view = home / "run", Told(self)
        train(recipe, run, TrainOptions(force=True), view)
        return view.facts | run_facts(run)

    def greedy(self) -> Facts:
        """Greedy tokens by captured graphs, step by step, and by ``generate``.

        Of the bundled model in float32, where they are equal, and of the job's in 16 bits, where rounding
        may part them.
        """
        found: Facts = {"checks": {}}
        if not self.unsloth:
            from setting import tiny_learner

            tiny = tiny_learner()
            questions = ["Tom has 3 apples and buys 4 more. How many?", "What is 2 + 2?"] * 8
            found["float32"] = compared(tiny.policy, questions, 24 if self.job.small else 72)
            found["checks"]["greedy tokens equal, float32"] = same_tokens(found["float32"], exact=True)
            del tiny
            gc.collect()
        questions = [p.question for p in self.setting(8).problems]
        found["job"] = compared(self.learner().policy, questions, 12 if self.job.small else 48)
        found["checks"]["greedy tokens equal but for rounding, 16 bits"] = same_tokens(found["job"])
        return found

    def logprobs(self) -> Facts:
        """Log-probabilities of the same tokens by every path; ``gpu.agreement`` compares them."""
        policy = self.learner().policy
        return {"dtype": str(policy.dtype).removeprefix("torch."), **logprob_ways(policy, score_rows())}

    # --- which kernels ----------------------------------------------------------------------------

    def kernels(self) -> Facts:
        """The kernels of a step's two halves, and whether graphs were replayed."""
        from empg_lite.rewards import Grader

        learner = self.learner()
        setting = self.setting(self.job.problems[0])
        with Grader() as grader:
            ours = OurStep(learner, setting, grader, silent=False)
            ours.step()  # kernels are compiled, graphs captured
            before = engine_facts(ours.sampler)
            sampling, rows = profiled(ours.sample)
            after = engine_facts(ours.sampler)
            fitting, _ = profiled(lambda: ours.fit(rows))
        found: Facts = {"engine": after, "replayed_before": before, "policy": learner.engine_facts()}
        for name, profile in (("sampling", sampling), ("fitting", fitting)):
            kinds = sorted_out(profile.kernels)
            found[name] = {**kinds, "wall": profile.wall, "busy": profile.busy, "top": profile.top(12)}
        found["checks"] = kernel_checks(found, unsloth=self.unsloth) if torch.cuda.is_available() else {}
        return found

    # --- how fast ---------------------------------------------------------------------------------

    def decode(self, problems: int) -> Facts:
        """Tokens a second of sampling all rows at once, adapter on."""
        setting = self.setting(problems)
        ours = self.job.rival.startswith("empg")
        run, drawn = self._ours(setting) if ours else self._generate(setting)
        timed = self._timed(run, tokens=setting.tokens)
        assert drawn == list(setting.lengths), "lengths are not the table's"
        return self._with_floor("decode", timed, setting)

    def decode_eager(self, problems: int) -> Facts:
        """The same without graphs."""
        setting = self.setting(problems)
        with without_graphs():
            run, _ = self._ours(setting)
            return self._timed(run, tokens=setting.tokens, repeats=1)

    def _ours(self, setting: Setting) -> tuple[Callable[[], None], list[int]]:
        learner, drawn = self.learner(), list[int]()
        sampler = learner.sampler()

        def run() -> None:
            drawn[:] = [len(r.completion_ids) for r in sample(learner, sampler, setting)]
            self._facts["engine"] = {**engine_facts(sampler), "batch_rows": sampler.batch_rows}

        return run, drawn

    def _generate(self, setting: Setting) -> tuple[Callable[[], None], list[int]]:
        from hand_loop import generate

        policy, drawn = self.learner().policy, list[int]()
        prompts = [p.ids for p in prompts_of(policy, setting) for _ in p.keys]
        stop, plain = policy.tokenizer.eos_token_id, policy.model.generate

        def run() -> None:
            policy.model.generate = forced_generate(
                plain, setting.lengths, stop, setting.plain_id, policy.stop_ids
            )
            try:
                rows = generate(
                    policy, prompts, do_sample=True, temperature=1.0, top_p=1.0, top_k=0,
                    repetition_penalty=1.0, max_new_tokens=setting.max_new_tokens,
                )  # fmt: skip
            finally:
                policy.model.generate = plain
            drawn[:] = [len(row) for row in rows]

        return run, drawn

    def m_step(self, problems: int) -> Facts:
        """Seconds of one optimiser step on all rows, none of them at weight 0, the tokens random."""
        from hand_loop import padded_step

        learner, setting = self.learner(), self.setting(problems)
        policy = learner.policy
        rows = weighed(random_rows(policy, setting), setting.rewards(False))
        if self.job.rival == "hf":  # 4 rows: more logits do not fit a small card
            timed = self._timed(lambda: padded_step(policy, learner.optimizer, rows, rows=4, rate=1e-6))
        else:
            timed = self._timed(lambda: learner.fit(rows))
        return self._with_floor("m-step", timed, setting)

    def step(self, problems: int) -> Facts:
        """Seconds of one step, prompts to updated weights; rewards from a table, none of them 0."""
        setting = self.setting(problems)
        if not self.job.rival.startswith("empg"):
            return self._rival_step(setting)
        from empg_lite.rewards import Grader

        learner = self.learner()
        with Grader() as grader:
            ours = OurStep(learner, setting, grader, silent=False)
            facts = {**plan_facts(learner), "policy": learner.engine_facts()}
            timed = self._timed(ours.step, tokens=setting.tokens, **facts)
        assert ours.tokens == setting.tokens, "lengths are not the table's"
        state = learner.state
        shrunk = {"batch_rows_after": ours.sampler.batch_rows, "budget_after": state.micro_batch_tokens}
        return {**timed, **shrunk, "engine": engine_facts(ours.sampler)}

    def _rival_step(self, setting: Setting) -> Facts:
        import trl_grpo

        learner = self.learner()
        if self.job.rival == "unsloth-trl":
            if not torch.cuda.is_available():
                return {"left_out": "Unsloth patches TRL's trainer on a GPU only"}
            from unsloth import FastLanguageModel, PatchFastRL

            PatchFastRL("GRPO", FastLanguageModel)
        prompts = [learner.policy.encode_prompt(p.question)[0] for p in setting.problems]
        trainer = trl_grpo.build(
            learner.policy, prompts, samples=setting.samples, max_new_tokens=setting.max_new_tokens,
            rows=min(8, setting.rows), rate=1e-6, rewards=setting.rewards(False),
        )  # fmt: skip
        steps = trl_grpo.Steps(trainer, learner.policy, setting.lengths, setting.plain_id)
        try:
            timed = self._timed(steps.step, tokens=setting.tokens)
        finally:
            steps.close()
        assert steps.tokens == setting.tokens, "lengths are not the table's"
        return timed

    def _timed(self, run: Callable[[], Any], repeats: int | None = None, **facts: Any) -> Facts:
        """Seconds of the first run, which warms up, then the median, least and greatest of ``repeats`` more.

        Written after every run: a process that is killed has told what it had.
        """
        taken: list[float] = []
        found: Facts = {}
        for _ in range(1 + (self.job.repeats if repeats is None else repeats)):
            _settle()
            started = time.perf_counter()
            run()
            _settle()
            taken.append(time.perf_counter() - started)
            rest = taken[1:] or taken
            found = {
                **facts, "first": taken[0], "repeats": len(taken) - 1,
                "seconds": median(rest), "least": min(rest), "most": max(rest),
            }  # fmt: skip
            if "tokens" in facts:
                found["tokens_per_second"] = facts["tokens"] / found["seconds"]
            self.write(**found)
        return found

    def _with_floor(self, figure: str, timed: Facts, setting: Setting) -> Facts:
        job = self.job
        share = of_floor(
            figure, timed["seconds"], self.shape, setting.lengths, job.prompt, job.samples, self.folder
        )
        return timed | share

    # --- does it learn ----------------------------------------------------------------------------

    def learn(self) -> Facts:
        """A training run to its end, evaluated before and after; the rewards so far where it is cut off."""
        from empg_lite.loop.train import TrainOptions, train
        from empg_lite.recipe.file import load_recipe

        name, settings = learning_recipe(self.job)
        run = self.folder / f"learn-{name}"
        self._facts["recipe"] = name
        view = Told(self)
        result = train(load_recipe(name, settings), run, TrainOptions(), view)
        before, after = result["accuracy_before"], result["accuracy_after"]
        checks = {} if self.job.small else {f"{name} learns": bool(after and after > (before or 0.0))}
        wanted = ("steps", "seconds", "seconds_total", "accuracy_before", "accuracy_after")
        figures = {key: result[key] for key in (*wanted, "t1_accuracy_before", "t1_accuracy_after")}
        return {**view.facts, **figures, **run_facts(run), "checks": checks}

    # --- the tests --------------------------------------------------------------------------------

    def tests(self) -> Facts:
        """The tests marked ``gpu``: how each ended, written as they end."""
        if importlib.util.find_spec("pytest") is None:
            return {"error": "pytest is not installed here: the tests marked gpu did not run"}
        # Tests in processes of their own do what the parts ``runs`` and ``profile`` have done.
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/test_gpu.py", "-vv", "-rfEs"]
        command += ["-k", "not in_a_process"]
        command += ["-p", "no:cacheprovider", "--color=no", f"--basetemp={self.folder / 'pytest'}"]
        ended: dict[str, str] = {}
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                if (result := test_result(line)) is not None:
                    ended.update([result])
                    self.write(**counted(ended))
        return counted(ended) | ({"error": "no test ran"} if not ended else {})


class Told(View):
    """A run's steps as they end, in the row of the figure at hand."""

    def __init__(self, work: Work) -> None:
        self.work, self.facts = work, Facts()
        self._rewards: list[float] = []

    def step(self, record: Mapping[str, Any], total: int) -> None:
        self._rewards.append(round(record["reward"], 4))
        names = ("step_time", "time/tokens_per_second", "completions/mean_length")
        self.facts = {"rewards": self._rewards, "of_steps": total, **{n: record.get(n) for n in names}}
        self.work.write(**self.facts)

    def note(self, text: str) -> None:
        print(text, flush=True)

    def warn(self, text: str) -> None:
        print(f"warning: {text}", flush=True)


# --- what was found ----------------------------------------------------------------------------------


def compared(policy: Policy, questions: Sequence[str], tokens: int) -> Facts:
    """How many greedy completions of each way differ from those by graphs, and by how much at the most.

    ``gap``: between the logits of the two tokens where the samples part, in spacings of the computing type.
    """
    prompts = [Prompt(policy.encode_prompt(q)[1], (n,)) for n, q in enumerate(questions)]
    ways = three_ways(policy, prompts, Decoding(tokens, temperature=0.0))
    first = ways.pop("graphs")
    if isinstance(first, str):
        return {"graphs": {"error": first}}
    found: Facts = {}
    for name, drawn in ways.items():
        if isinstance(drawn, str):
            found[name] = {"error": drawn}
            continue
        parted = partings(prompts, first, drawn)
        gaps = [gap / spacing for gap, spacing in (greedy_gap(policy, p) for p in parted)]
        found[name] = {"of": len(prompts), "differ": len(parted), "gap": max(gaps, default=0.0)}
    return found


def same_tokens(ways: Mapping[str, Facts], exact: bool = False) -> bool:
    """Whether all ways drew the same, in 16 bits but for ties: gaps of a few spacings."""
    if any("error" in facts for facts in ways.values()):
        return False
    return all(not facts["differ"] if exact else facts["gap"] <= 8 for facts in ways.values())


def run_facts(run: Path) -> Facts:
    """What a run directory says of how it was computed, and that it learned something finite."""
    lines = (run / "metrics.jsonl").read_text("utf-8").splitlines()
    records = [r for r in map(json.loads, lines) if "step_time" in r]
    environment = json.loads((run / "environment.json").read_text("utf-8"))
    last = records[-1]
    shown = {k: v for k, v in last.items() if k.split("/")[0] in ("engine", "kernels", "attention", "time")}
    finite = all(r["em/updates"] and r["grad_norm"] is not None for r in records)
    return {
        "last_step": shown | {"step_time": last["step_time"]},
        "environment": {k: environment[k] for k in environment if k not in ("inputs", "platform")},
        "checks": {f"{len(records)} steps moved the weights": finite},
    }


def plan_facts(learner: Any) -> Facts:
    """The memory that the plan expects, and the settings it chose."""
    planned, recipe = learner.planned, learner.recipe
    return {
        "planned_gb": planned.peak / 1e9,
        "keeps_sampler": planned.keeps_sampler,
        "merged": recipe.sampler.merged,
        "batch_rows": recipe.sampler.batch_rows,
        "budget": recipe.optim.micro_batch_tokens,
        "checkpointing": recipe.optim.gradient_checkpointing,
    }


#: What Unsloth lends, by the package's name for it, and the kind of kernel that has to be seen then.
LENT = {"add_norm": "RMSNorm", "rotate": "RoPE", "swiglu": "SwiGLU"}


def kernel_checks(found: Mapping[str, Any], *, unsloth: bool) -> dict[str, bool]:
    """What has to be seen in a profile: the kernels that the policy names, graphs, a fused attention."""
    sampling, fitting = found["sampling"], found["fitting"]
    replayed = found["engine"]["graphs_replayed"] - found["replayed_before"]["graphs_replayed"]
    checks = {
        "graphs are replayed": replayed > 0,
        "NF4 is dequantised by a kernel": "NF4 dequantisation" in sampling["kinds"] + fitting["kinds"],
    }
    for name, half in (("sampling", sampling), ("fitting", fitting)):
        seen = set(half["attention"])
        checks[f"attention of {name} is fused"] = bool({"flash", "efficient", "flex"} & seen)
        checks[f"no unfused attention in {name}"] = "math" not in seen
        checks[f"no cuDNN attention in {name}"] = "cudnn" not in seen
    said = found["policy"]
    if unsloth:
        checks["nothing of Unsloth's is left out"] = not said["notes"]
    for name in set(said["kernels"]) & set(LENT):
        checks[f"Unsloth's {LENT[name]} in sampling"] = LENT[name] in sampling["kinds"]
    for kind in LENT.values() if said["fit"].startswith("unsloth") else ():
        checks[f"Unsloth's {kind} in fitting"] = kind in fitting["kinds"]
    return checks


def test_result(line: str) -> tuple[str, str] | None:
    """The test's name and how it ended, from a line of ``pytest -v``."""
    found = re.match(r"\S+?\.py::(.+?) (PASSED|FAILED|SKIPPED|ERROR)\b", line)
    return (found[1], found[2].lower()) if found else None


def counted(ended: Mapping[str, str]) -> Facts:
    """How many tests ended in which way, and the names of those that failed."""
    failed = [name for name, how in ended.items() if how in ("failed", "error")]
    passed, skipped = (sum(h == how for h in ended.values()) for how in ("passed", "skipped"))
    counts = {"passed": passed, "failed": len(failed), "skipped": skipped}
    return {**counts, "failures": failed, "checks": {"tests marked gpu": not failed}}


# --- the device --------------------------------------------------------------------------------------


def probe() -> Facts:
    """What the device does at its best: bytes a second of a copy (read and written), FLOP/s of a matmul."""
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    side, length = (8192, 1 << 30) if cuda else (512, 1 << 24)
    source = torch.empty(length // 4, dtype=torch.float32, device=device).fill_(1.0)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    copying = _fastest(lambda: target.copy_(source))
    multiplying = _fastest(lambda: a @ b)
    name = torch.cuda.get_device_name(0) if cuda else "CPU"
    return {"device": name, "bandwidth": 2 * length / copying, "matmul": 2 * side**3 / multiplying}


def _fastest(run: Callable[[], Any], repeats: int = 20) -> float:
    run()
    best = float("inf")
    for _ in range(repeats):
        _settle()
        started = time.perf_counter()
        run()
        _settle()
        best = min(best, time.perf_counter() - started)
    return best


def _settle() -> None:
    """Wait for the device's queue."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def machine() -> Facts:
    """Versions, card and commit; whatever cannot be found is left out."""
    import platform
    from importlib import metadata

    facts: Facts = {"python": platform.python_version(), "cores": os.cpu_count()}
    for name in ("torch", "triton", "transformers", "peft", "bitsandbytes", "unsloth", "unsloth_zoo", "trl"):
        try:
            facts[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            facts[name] = "absent"
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        facts |= {"card": card.name, "gb": round(card.total_memory / 1e9, 1), "cuda": torch.version.cuda}
        facts |= {"capability": f"{card.major}.{card.minor}", "cudnn": torch.backends.cudnn.version()}
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        facts["commit"] = done.stdout.strip() or "unknown"
    except (OSError, subprocess.TimeoutExpired):
        facts["commit"] = "unknown"
    return facts
