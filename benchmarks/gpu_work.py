"""What one process of ``gpu.py`` measures: a job's figures one after another, a row of JSON for each."""

from __future__ import annotations

import gc
import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from gpu_bench import Facts
from gpu_checks import engine_facts, logprob_ways, profiled, shrink, sorted_out
from gpu_device import machine, probe
from gpu_facts import compared, counted, kernel_checks, run_facts, same_tokens, test_result
from gpu_floor import RATES
from gpu_material import learning_recipe, made_up_data, score_rows
from gpu_speed import Speed
from setting import OurStep

from empg_lite.core.view import View

ROOT = Path(__file__).resolve().parents[1]


class Work(Speed):
    """A job being done: every figure is a method of its name."""

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
