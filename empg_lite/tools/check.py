"""Is this recipe's data sound, before any model is loaded?

The gold answer, written as a model would write it, must earn reward 1: a test of data, reading and comparing
on every row. Where it does not, that problem can never be solved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from empg_lite.core.errors import EmpgError
from empg_lite.core.rationale import Problem
from empg_lite.core.view import View
from empg_lite.data.sources import find_overlap, load_splits
from empg_lite.policy import Template, load_template, load_tokenizer
from empg_lite.policy.integrity import check_config, resolve_model
from empg_lite.recipe.schema import Recipe
from empg_lite.rewards import Case, Grader
from empg_lite.rewards.spec import parse_spec

#: Rows graded at once; only the progress bar sees it.
_CHUNK = 256
#: Context of a model whose config does not say.
QWEN2_CONTEXT = 32_768


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
        too_long: prompts over ``data.max_prompt_tokens``: left out of training. None where the tokenizer is
            not at hand.
        over_context: rows of all splits whose prompt and ``sampler.max_new_tokens`` together exceed the
            model's ``context``: their answers run out of room. None likewise.
        overlap: training questions that stand among the evaluation rows too, but for case and spacing.
        longest: tokens of the longest prompt.
        prompt: the first prompt as the model sees it, and ``stops``, what ends an answer to it.
        notes: what could not be checked, and why.
    """

    rows: dict[str, int]
    dropped: dict[str, int]
    gold_failures: tuple[GoldFailure, ...] | None
    too_long: int | None
    over_context: int | None
    context: int | None
    longest: int | None
    overlap: int
    prompt: str
    stops: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Every gold answer earned 1 and something is left to train on."""
        fits = self.too_long != self.rows["train"] and not self.over_context
        return not self.gold_failures and self.rows["train"] > 0 and fits


def written_gold(gold: str, reward: str) -> str | None:
    """The gold answer as the end of a solution, as ``reward`` reads it; None for a pattern or a function."""
    boxed = f"\\boxed{{{gold}}}"
    written = {"gsm8k": f"#### {gold}", "math": boxed, "choice": boxed, "gym": boxed, "exact": gold}
    return written.get(parse_spec(reward).correctness.name)


def check(recipe: Recipe, grader: Grader, view: View | None = None) -> CheckReport:
    """Load the data of a recipe and look for what would waste a run.

    Raises:
        MissingInput, DataError: the data cannot be read.
        GraderUnusable: the grader cannot start.
    """
    view = view or View()
    recipe = recipe.resolved()
    # Without the reward: golds that it cannot read are for the report, all of them, not for one error.
    bare = recipe.data.model_copy(update={"reward": None})
    splits = load_splits(recipe.model_copy(update={"data": bare}))
    template = load_template(str(recipe.data.prompt))
    parts = {"train": splits.train, "validation": splits.validation, "evaluation": splits.evaluation}
    notes: list[str] = []
    reward = str(recipe.data.reward)
    grader.self_test(reward)
    failures = _gold_failures(grader, [p for part in parts.values() for p in part], reward, view)
    if failures is None:
        notes.append("gold answers are not checked: only the reward knows how a right answer is written")
    too_long = over_context = context = longest = None
    try:
        tokenizer, context = tokenizer_of(recipe)
        limit = int(recipe.data.max_prompt_tokens or 0)
        lengths = {name: prompt_lengths(tokenizer, template, part) for name, part in parts.items()}
        too_long = sum(n > limit for n in lengths["train"])
        asked = [n for n in lengths["train"] if n <= limit] + lengths["validation"] + lengths["evaluation"]
        over_context = sum(n + recipe.sampler.max_new_tokens > context for n in asked)
        longest = max(map(max, filter(None, lengths.values())))
    except EmpgError as error:
        notes.append(f"prompt lengths are not checked: {error.what}")
    return CheckReport(
        rows={name: len(part) for name, part in parts.items()},
        dropped=dict(splits.dropped),
        gold_failures=failures,
        too_long=too_long,
        over_context=over_context,
        context=context,
        longest=longest,
        overlap=len(find_overlap([*splits.train, *splits.validation], splits.evaluation)),
        prompt=template.render(splits.train[0].question),
        stops=(*template.stop, template.end),
        notes=tuple(notes),
    )


def tokenizer_of(recipe: Recipe) -> tuple[Any, int]:
    """The recipe's tokenizer, without the weights, and the model's context in tokens.

    Raises:
        MissingInput, DataError: it is not at hand, or broken.
    """
    folder, _ = resolve_model(recipe.model.name, recipe.model.revision, weights=False)
    context = int(check_config(folder).get("max_position_embeddings", QWEN2_CONTEXT))
    return load_tokenizer(folder), context


def prompt_lengths(tokenizer: Any, template: Template, problems: Sequence[Problem]) -> list[int]:
    """Tokens of each problem's prompt."""
    prompts = [template.render(p.question) for p in problems]
    return [len(ids) for ids in tokenizer(prompts, add_special_tokens=False)["input_ids"]] if prompts else []


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
