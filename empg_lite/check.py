"""Is this recipe's data sound, before any model is loaded?

The gold answer, written as a model would write it, must earn reward 1: a test of data, reading and comparing
on every row. Where it does not, that problem can never be solved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from empg_lite.data import find_overlap, load_splits
from empg_lite.errors import EmpgError
from empg_lite.metrics import View
from empg_lite.policy import load_template, load_tokenizer
from empg_lite.policy.integrity import check_config, resolve_model
from empg_lite.rationale import Problem
from empg_lite.recipe import Recipe
from empg_lite.rewards import Grader

#: Rows graded at once; only the progress bar sees it.
_CHUNK = 256


@dataclass(frozen=True, slots=True)
class GoldFailure:
    """A gold answer that its own reward refuses."""

    problem_id: str
    gold: str
    reason: str
    extracted: str | None


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What was found.

    Attributes:
        rows: problems by split.
        dropped: rows left out on loading, by cause.
        gold_failures: None where the reward cannot be asked that way (a regex).
        too_long: prompts over ``data.max_prompt_tokens``; None where the tokenizer is not at hand.
        overlap: training questions that stand among the evaluation rows too, but for case and spacing.
        prompt: the first prompt as the model sees it.
        notes: what could not be checked, and why.
    """

    rows: dict[str, int]
    dropped: dict[str, int]
    gold_failures: tuple[GoldFailure, ...] | None
    too_long: int | None
    overlap: int
    prompt: str
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Every gold answer earned 1 and something is left to train on."""
        return not self.gold_failures and self.rows["train"] > 0 and self.too_long != self.rows["train"]


def written_gold(gold: str, reward: str) -> str | None:
    """The gold answer as the end of a solution, as ``reward`` expects it; None for a pattern."""
    return {"gsm8k": f"#### {gold}", "math": f"\\boxed{{{gold}}}", "exact": gold}.get(reward)


def check(recipe: Recipe, view: View | None = None) -> CheckReport:
    """Load the data of a recipe and look for what would waste a run.

    Raises:
        MissingInput, DataError: the data cannot be read.
        GraderUnusable: the grader cannot start.
    """
    view = view or View()
    recipe = recipe.resolved()
    splits = load_splits(recipe)
    template = load_template(str(recipe.data.prompt))
    parts = {"train": splits.train, "validation": splits.validation, "evaluation": splits.evaluation}
    notes: list[str] = []
    failures = _gold_failures([p for part in parts.values() for p in part], str(recipe.data.reward), view)
    if failures is None:
        notes.append("gold answers are not checked under a regex reward")
    too_long = None
    try:
        tokenizer = tokenizer_of(recipe)
        limit = int(recipe.data.max_prompt_tokens or 0)
        prompts = [template.render(p.question) for p in splits.train]
        too_long = sum(len(ids) > limit for ids in tokenizer(prompts, add_special_tokens=False)["input_ids"])
    except EmpgError as error:
        notes.append(f"prompt lengths are not checked: {error.what}")
    return CheckReport(
        rows={name: len(part) for name, part in parts.items()},
        dropped=dict(splits.dropped),
        gold_failures=failures,
        too_long=too_long,
        overlap=len(find_overlap([*splits.train, *splits.validation], splits.evaluation)),
        prompt=template.render(splits.train[0].question),
        notes=tuple(notes),
    )


def tokenizer_of(recipe: Recipe) -> Any:
    """The recipe's tokenizer, without the weights.

    Raises:
        MissingInput, DataError: it is not at hand, or broken.
    """
    folder, _ = resolve_model(recipe.model.name, recipe.model.revision, weights=False)
    check_config(folder)
    return load_tokenizer(folder)


def _gold_failures(problems: Sequence[Problem], reward: str, view: View) -> tuple[GoldFailure, ...] | None:
    if written_gold("", reward) is None:
        return None
    failures = []
    with Grader() as grader, view.phase("grading gold answers", len(problems)) as on_done:
        for start in range(0, len(problems), _CHUNK):
            chunk = problems[start : start + _CHUNK]
            items = [(p.gold, str(written_gold(p.gold, reward)), p.question) for p in chunk]
            for problem, verdict in zip(chunk, grader.grade_many(reward, items), strict=True):
                if verdict.reward != 1.0:
                    failures.append(GoldFailure(problem.id, problem.gold, verdict.reason, verdict.extracted))
            on_done(len(chunk))
    return tuple(failures)
