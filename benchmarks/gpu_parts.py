"""What ``gpu.py`` does, in order of worth, and how long each job may take. Imports nothing heavy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

#: Seconds that all limits add up to: nine minutes of a call of ten.
TOTAL = 540.0
#: Models of Qwen2.5's shapes. A rehearsal cuts them down and keeps heads, key heads and tied embeddings.
MAIN_SHAPE = "0.5B"


@dataclass(frozen=True, slots=True)
class Job:
    """The task of one process, passed as JSON on its command line.

    Attributes:
        part: the part of the benchmark that it belongs to.
        rival: ``empg`` (this package over plain transformers), ``empg-unsloth`` (over Unsloth), ``hf`` (plain
            transformers by hand), ``unsloth-generate``, ``trl``, ``unsloth-trl``; ``learn`` and ``pytest``.
        figures: what it measures, in order.
        limit: seconds after which it is killed. Time that earlier jobs saved is added, see ``gpu.allowed``.
        shape: of the model with random weights, or the recipe that ``learn`` trains by.
        problems: numbers of problems that are decoded at once; a step takes the first one.
        prompt, mean, cap: prompt length, mean and limit of completion lengths, in tokens.
        repeats: timed runs after the one that warms up.
        cap_gb: memory of the emulated card in GB (1e9); None: the card as it is.
        small: a rehearsal on a CPU.
    """

    part: str
    rival: str
    figures: tuple[str, ...]
    limit: float
    shape: str = MAIN_SHAPE
    problems: tuple[int, ...] = (16,)
    samples: int = 8
    prompt: int = 150
    mean: float = 180.0
    cap: int = 512
    repeats: int = 3
    cap_gb: float | None = None
    small: bool = False

    @property
    def name(self) -> str:
        """For a person."""
        where = f" in {self.cap_gb:g} GB" if self.cap_gb else ""
        return f"{self.part}: {self.rival} {self.shape}{where}"

    def dump(self) -> str:
        """As JSON; ``load`` reads it."""
        return json.dumps(asdict(self))

    @staticmethod
    def load(text: str) -> Job:
        """What ``dump`` wrote."""
        return Job(**{k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(text).items()})


def _jobs() -> list[Job]:
    """All jobs, the most valuable first."""
    short = {"mean": 90.0, "cap": 192, "repeats": 1}  # rivals without graphs need many seconds a step
    return [
        # It runs: without this, nothing else means anything. The first process reads cold libraries.
        Job("runs", "empg", ("device", "train", "greedy", "logprobs"), 35),
        # Unsloth compiles for most of a minute, and again for its ``generate``.
        Job("runs", "empg-unsloth", ("train", "logprobs", "greedy"), 95),
        # Which kernels ran, and were graphs replayed?
        Job("profile", "empg-unsloth", ("kernels",), 65, **short),
        Job("profile", "empg", ("kernels",), 20, **short),
        # The tests that need a card: graphs, back-off, fp16, adapters switched off.
        Job("tests", "pytest", ("tests",), 35),
        # How fast.
        Job("rates", "empg", ("decode", "decode-eager", "m-step", "step"), 40, problems=(16, 64)),
        Job("rates", "empg-unsloth", ("decode", "m-step", "step"), 52, problems=(16, 64)),
        Job("rates", "hf", ("decode", "m-step"), 30, repeats=0),
        # Does it learn? A hundred steps of Reasoning Gym's sums, or thirty of word problems.
        Job("learn", "learn", ("learn",), 60, shape="real"),
        # The rivals' whole step beside ours, on shorter completions.
        Job("rivals", "empg", ("decode", "step"), 12, **short),
        Job("rivals", "unsloth-generate", ("decode",), 20, **short),
        Job("rivals", "trl", ("step",), 20, **short),
        Job("rivals", "unsloth-trl", ("step",), 25, **short),
        # Smaller cards.
        Job("caps", "empg", ("step",), 10, shape="1.5B", cap_gb=8.0, repeats=0),
        Job("caps", "empg", ("step",), 10, shape="3B", cap_gb=8.0, repeats=0),
        Job("caps", "empg", ("step",), 6, shape="7B", cap_gb=12.0, repeats=0),
        Job("caps", "empg", ("step",), 1, shape="0.5B", cap_gb=8.0, repeats=0),
        Job("caps", "empg", ("step",), 1, shape="7B", cap_gb=16.0, repeats=0),
        Job("caps", "empg", ("step",), 1, shape="3B", cap_gb=12.0, repeats=0),
        Job("caps", "empg", ("step",), 2, shape="7B", cap_gb=24.0, repeats=0),
    ]


JOBS = tuple(_jobs())
PARTS = tuple(dict.fromkeys(job.part for job in JOBS))
RIVALS = tuple(dict.fromkeys(job.rival for job in JOBS))
SHAPES_USED = tuple(dict.fromkeys(job.shape for job in JOBS if job.rival not in ("learn", "pytest")))


def chosen(parts: Sequence[str], rivals: Sequence[str], minutes: float, small: bool) -> list[Job]:
    """The jobs of some parts and rivals, their limits scaled from nine minutes to ``minutes``."""
    jobs = [job for job in JOBS if job.part in parts and job.rival in rivals]
    jobs = [replace(job, limit=job.limit * 60 * minutes / TOTAL) for job in jobs]
    return [cut(job) for job in jobs] if small else jobs


def cut(job: Job) -> Job:
    """The same job for a CPU: few short rows."""
    return replace(
        job,
        problems=tuple(max(2, n // 8) for n in job.problems),
        samples=4,
        prompt=40,
        mean=8.0,
        cap=16,
        repeats=min(job.repeats, 1),
        small=True,
    )
