"""The bench that every job of ``gpu.py`` works at: its model, its rows of figures, its clock.

A figure that fails says why in its row, and the next one is tried. Rows go to a file of their own, because
libraries print to stdout. A row is written again as its figure grows and the last one counts: a process that
is killed leaves what it had.
"""

from __future__ import annotations

import json
import random
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from forced import draw_lengths
from gpu_floor import of_floor
from gpu_material import cut_shape, set_adapter, write_speaking
from gpu_parts import Job
from setting import Setting, tiny_recipe
from shapes import SHAPES, Shape
from timing import settle

from empg_lite.core.rationale import Problem

Facts = dict[str, Any]


class Bench:
    """One job, its model loaded once.

    Attributes:
        folder: what the jobs share: models, the device's rates.
        rows: the file of its rows.
    """

    def __init__(self, job: Job, folder: Path, rows: Path) -> None:
        self.job, self.folder, self.rows = job, folder, rows
        self._learner: Any = None

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

    def _timed(self, run: Callable[[], Any], repeats: int | None = None, **facts: Any) -> Facts:
        """Seconds of the first run, which warms up, then the median, least and greatest of ``repeats`` more.

        Written after every run: a process that is killed has told what it had.
        """
        taken: list[float] = []
        found: Facts = {}
        for _ in range(1 + (self.job.repeats if repeats is None else repeats)):
            settle()
            started = time.perf_counter()
            run()
            settle()
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
