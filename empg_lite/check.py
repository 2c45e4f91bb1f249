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
from empg_lite.rewards import Case, Grader, UserCode
from empg_lite.rewards.spec import parse_spec

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
        gold_failures: None where the reward cannot be asked that way (a pattern, your own function).
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
    """The gold answer as the end of a solution, as ``reward`` reads it; None for a pattern or a function."""
    boxed = f"\\boxed{{{gold}}}"
    written = {"gsm8k": f"#### {gold}", "math": boxed, "choice": boxed, "gym": boxed, "exact": gold}
    return written.get(parse_spec(reward).correctness.name)


def check(recipe: Recipe, view: View | None = None, code: UserCode | None = None) -> CheckReport:
    """Load the data of a recipe and look for what would waste a run.

    Args:
        code: the user's reward function, where it may run.

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
    with Grader(code=code) as grader:
        grader.self_test(str(recipe.data.reward))
        everything = [p for part in parts.values() for p in part]
        failures = _gold_failures(grader, everything, str(recipe.data.reward), view)
    if failures is None:
        notes.append("gold answers are not checked: only the reward knows how a right answer is written")
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


def _gold_failures(
    grader: Grader, problems: Sequence[Problem], reward: str, view: View
) -> tuple[GoldFailure, ...] | None:
    if written_gold("", reward) is None:
        return None
    failures = []
    with view.phase("grading gold answers", len(problems)) as on_done:
        for start in range(0, len(problems), _CHUNK):
            chunk = problems[start : start + _CHUNK]
            cases = [Case(p.gold, str(written_gold(p.gold, reward)), p.question, p.meta) for p in chunk]
            for problem, verdict in zip(chunk, grader.grade_many(reward, cases), strict=True):
                if verdict.reason != "equal":
                    failures.append(GoldFailure(problem.id, problem.gold, verdict.reason, verdict.extracted))
            on_done(len(chunk))
    return tuple(failures)
