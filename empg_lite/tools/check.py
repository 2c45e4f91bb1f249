"""Check a recipe's data before any model is loaded.

Every gold answer, written as a model would write it, must earn reward 1: this tests loading, extraction and
comparison on every row. A problem whose gold answer fails can never be solved.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from empg_lite.core.errors import EmpgError
from empg_lite.core.view import View
from empg_lite.data.sources import find_overlap, load_splits
from empg_lite.policy import Template, load_template, load_tokenizer
from empg_lite.policy.integrity import check_config, resolve_model
from empg_lite.policy.tokens import fit_template
from empg_lite.rewards import Case, Grader
from empg_lite.rewards.spec import parse_spec
from empg_lite.run.unpack import unpack_model

if TYPE_CHECKING:
    from empg_lite.core.rationale import Problem
    from empg_lite.recipe.schema import Recipe

#: Rows graded per progress update.
_CHUNK = 256
#: Gold cells shown beside what was read in them.
_SHOWN = 3
#: Context of a model whose config does not state one (Qwen2's).
_DEFAULT_CONTEXT = 32_768


@dataclass(frozen=True, slots=True)
class GoldFailure:
    """A gold answer that its own reward rejects."""

    problem_id: str
    gold: str
    reason: str
    extracted: str | None


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What ``check`` found. The four token counts are None where the tokenizer is not available.

    Attributes:
        rows: problems by split.
        dropped: rows dropped on loading, by cause.
        gold_failures: None where the reward has no written form for a gold answer (a pattern, a function).
        gold_rules: gold answers by the rule that read them; "whole" where the cell is the answer.
        gold_read: the first (cell, answer) that differ.
        too_long: training prompts over ``data.max_prompt_tokens``; training drops them.
        over_context: rows of all splits whose prompt and ``sampler.max_new_tokens`` exceed ``context``.
        context: of the model, in tokens.
        longest: tokens of the longest prompt.
        overlap: training questions that are also evaluation rows, up to case and spacing.
        prompt: the first prompt as the model sees it; ``stops``: what ends an answer to it.
        notes: what could not be checked, and why.
    """

    rows: dict[str, int]
    dropped: dict[str, int]
    gold_failures: tuple[GoldFailure, ...] | None
    gold_rules: dict[str, int]
    gold_read: tuple[tuple[str, str], ...]
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
        """Every gold answer earned 1, every prompt fits, and something is left to train on."""
        fits = self.too_long != self.rows["train"] and not self.over_context
        return not self.gold_failures and self.rows["train"] > 0 and fits


def check(recipe: Recipe, grader: Grader, view: View | None = None) -> CheckReport:
    """Load the data of a recipe and look for anything that would waste a run.

    Raises:
        MissingInput, DataError: the data cannot be read.
        GraderUnusable: the grader cannot start.
    """
    recipe = recipe.resolved()
    # Load without the reward: gold answers that it cannot read belong in the report, not in one error.
    bare = recipe.data.model_copy(update={"reward": None})
    splits = load_splits(recipe.model_copy(update={"data": bare}))
    template = load_template(str(recipe.data.prompt))
    parts = {"train": splits.train, "validation": splits.validation, "evaluation": splits.evaluation}
    notes = list(splits.notes)
    reward = str(recipe.data.reward)
    grader.self_test(reward)
    problems = [p for part in parts.values() for p in part]
    failures = _gold_failures(grader, problems, reward, view or View())
    readings = [(p.gold.strip(), *parse_spec(reward).kind.read_gold(p.gold)) for p in problems]
    if failures is None:
        notes.append("gold answers not checked: only the reward knows how a right answer is written")
    try:
        tokenizer, context, mended = _open_tokenizer(recipe)
        template, fitted = fit_template(template, tokenizer)
        notes += [*mended, *fitted]
        lengths = _prompt_lengths(recipe, template, parts, tokenizer, context)
    except EmpgError as error:
        lengths = dict.fromkeys(("too_long", "over_context", "context", "longest"))
        notes.append(f"prompt lengths not checked: {error.what}")
    return CheckReport(
        rows={name: len(part) for name, part in parts.items()},
        dropped=dict(splits.dropped),
        gold_failures=failures,
        gold_rules=dict(Counter(rule for _, _, rule in readings)),
        gold_read=tuple((cell, text) for cell, text, _ in readings if text != cell)[:_SHOWN],
        **lengths,
        overlap=len(find_overlap([*splits.train, *splits.validation], splits.evaluation)),
        prompt=template.render(splits.train[0].question),
        stops=(*template.stop, template.end),
        notes=tuple(notes),
    )


def _open_tokenizer(recipe: Recipe) -> tuple[Any, int, tuple[str, ...]]:
    """The model's tokenizer, its context in tokens, and notes; loads no weights.

    Raises:
        MissingInput, DataError: the tokenizer is missing or broken.
    """
    unpack_model(recipe.model.name)
    folder, _ = resolve_model(recipe.model.name, recipe.model.revision, weights=False)
    context = int(check_config(folder).get("max_position_embeddings", _DEFAULT_CONTEXT))
    tokenizer, mended = load_tokenizer(folder)
    return tokenizer, context, mended


def _prompt_lengths(
    recipe: Recipe,
    template: Template,
    parts: Mapping[str, Sequence[Problem]],
    tokenizer: Any,
    context: int,
) -> dict[str, int | None]:
    """The token counts of a ``CheckReport``."""

    def lengths(problems: Sequence[Problem]) -> list[int]:
        prompts = [template.render(p.question) for p in problems]
        return (
            [len(ids) for ids in tokenizer(prompts, add_special_tokens=False)["input_ids"]] if prompts else []
        )

    found = {name: lengths(part) for name, part in parts.items()}
    limit = int(recipe.data.max_prompt_tokens or 0)
    used = [n for n in found["train"] if n <= limit] + found["validation"] + found["evaluation"]
    return {
        "too_long": sum(n > limit for n in found["train"]),
        "over_context": sum(n + recipe.sampler.max_new_tokens > context for n in used),
        "context": context,
        "longest": max(n for part in found.values() for n in part),
    }


def _gold_failures(
    grader: Grader, problems: Sequence[Problem], reward: str, view: View
) -> tuple[GoldFailure, ...] | None:
    kind = parse_spec(reward).kind
    if kind.written_gold("") is None:
        return None
    failures = []
    with view.phase("grading gold answers", len(problems)) as on_done:
        for start in range(0, len(problems), _CHUNK):
            chunk = problems[start : start + _CHUNK]
            answers = [kind.read_gold(p.gold)[0] for p in chunk]
            cases = [
                Case(p.gold, str(kind.written_gold(answer)), p.question, p.meta)
                for p, answer in zip(chunk, answers, strict=True)
            ]
            for problem, verdict in zip(chunk, grader.grade_many(reward, cases), strict=True):
                why = kind.unreadable_gold(problem.gold, problem.question)
                if why or verdict.reason != "equal":
                    reason = why or verdict.reason
                    failures.append(GoldFailure(problem.id, problem.gold, reason, verdict.extracted))
            on_done(len(chunk))
    return tuple(failures)
