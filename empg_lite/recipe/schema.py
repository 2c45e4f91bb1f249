"""What a run is told: six frozen sections that refuse what they do not know.

Everything here is plain data, checked by pydantic; no torch, no files. ``recipe_file.py`` reads and writes
the YAML. A key exists only where a shipped recipe, a benchmark or a documented task sets it; its description
here is the one that ``recipes show``, the JSON schema and the docs print.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from types import NoneType
from typing import Annotated, Any, Literal, Self, get_args, get_origin, get_type_hints

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from empg_lite.core.bundled import BUNDLED
from empg_lite.core.safe_text import encodable, without_passwords

SOURCES = ("gsm8k", "math", "math-hard", *BUNDLED, "local")
#: A Reasoning Gym task is a source of its own: gym:TASK, with its parameters as a query.
GYM = "gym:"
PROMPTS = ("qwen-boxed", "gsm8k", "plain")
REWARDS = "gsm8k, math, exact, choice, gym, python:FILE.py, regex:PATTERN"
#: prompt, reward, max_prompt_tokens where the recipe leaves them open.
_DEFAULTS_BY_SOURCE = {
    "gsm8k": ("qwen-boxed", "gsm8k", 512),
    "math": ("qwen-boxed", "math", 1024),
    "math-hard": ("qwen-boxed", "math", 1024),
    **dict.fromkeys(BUNDLED, ("plain", "gsm8k", 128)),
    GYM: ("qwen-boxed", "gym", 1024),
}
_OTHER_DEFAULTS = ("qwen-boxed", "math", 1024)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_DATA_FILE = re.compile(r"\.(jsonl?|csv|parquet)$")


def refusal(what: str, todo: str, field: str | None = None) -> PydanticCustomError:
    """A validation error that says what to do; ``field`` (dotted) where pydantic cannot know it."""
    return PydanticCustomError("refused", "{what}: {todo}", {"what": what, "todo": todo, "field": field})


def _unknown(kind: str, value: str, known: tuple[str, ...], other: str) -> PydanticCustomError:
    close = get_close_matches(value, known, 1)
    hint = f"did you mean {close[0]}?" if close else f"use one of {', '.join(known)}, or {other}"
    return refusal(f"unknown {kind} {value!r}", hint)


def _clean_text(text: str) -> str:
    if not text.strip():
        raise refusal("empty text", "write a value, or null where none is wanted")
    if any(c < " " or c == "\x7f" for c in text) or not encodable(text):
        raise refusal("control characters in the text", "write it on one line, without escapes")
    if without_passwords(text) != text:
        raise refusal("an address with a name or password", "take it out: a recipe is shown and published")
    return text


Text = Annotated[str, AfterValidator(_clean_text)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Tokens = Annotated[int, Field(ge=1, le=32_768)]  # Qwen2.5's context
Share = Annotated[float, Field(ge=0, le=1)]
PositiveNumber = Annotated[float, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Auto = Literal["auto"]


def key(default: Any = ..., description: str = "") -> Any:
    """One recipe key; without a default it has to be written."""
    return Field(default, description=description)


class Section(BaseModel):
    """A frozen section: unknown keys, wrong types, NaN and infinities are refused, nothing is coerced."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelSection(Section):
    """Which weights, and what is trained on top of them."""

    name: Text = key(description="hub id or folder of the base model; `tiny` and `tiny-hard` are bundled")
    revision: Text | None = key(None, "branch, tag or commit of the hub repository")
    adapter: Text | None = key(None, "folder of a LoRA adapter to start from")
    backend: Literal["auto", "unsloth", "transformers"] = key("auto", "auto: unsloth where it is installed")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = key("auto", "type of the computation")
    load_in_4bit: bool = key(True, "hold the base in NF4 (QLoRA); false: in dtype")
    lora_r: Annotated[int, Field(ge=1, le=1024)] = key(32, "rank of the LoRA matrices on all linear layers")
    lora_alpha: Count = key(64, "LoRA scale; the update is multiplied by lora_alpha / lora_r")


class DataSection(Section):
    """Which problems, how they are asked and how answers are graded."""

    source: Text = key(description=f"{', '.join(SOURCES)}, gym:TASK, or a hub dataset id with a slash")
    path: Text | None = key(None, "file or folder read instead of the hub (.jsonl, .json, .csv, .parquet)")
    split: Text = key("train", "split to train on")
    eval_path: Text | None = key(None, "file or folder of the evaluation rows; null: as the training rows")
    eval_split: Text = key("test", "split that accuracy is reported on")
    validation: CountOrZero | None = key(None, "rows held out of the training rows; null: min(100, 10%)")
    prompt: Text | None = key(None, f"template: {', '.join(PROMPTS)}, or a file; null: by source")
    reward: Text | None = key(None, f"reward: {REWARDS}; null: by source")
    max_prompt_tokens: Tokens | None = key(None, "longer prompts are dropped and counted; null: by source")
    hub_config: Text | None = key(None, "configuration (subset) of a hub dataset")
    question_column: Text | None = key(None, "column of the question; null: question, problem or prompt")
    answer_column: Text | None = key(None, "column of the answer; null: gold, answer or solution")
    skip_bad_rows: bool = key(False, "leave unusable rows of a file out, counted, instead of refusing it")

    @field_validator("source")
    @classmethod
    def _known_source(cls, source: str) -> str:
        if (
            source in SOURCES
            or source.startswith(GYM)
            or (_HUB_ID.fullmatch(source) and not _DATA_FILE.search(source))
        ):
            return source
        if "/" in source or _DATA_FILE.search(source):
            what = f"{source!r} is a path, not a source"
            raise refusal(what, "write `source: local` and put the path under data.path")
        raise _unknown("source", source, SOURCES, "a hub id like owner/name")

    @field_validator("prompt")
    @classmethod
    def _known_prompt(cls, prompt: str | None) -> str | None:
        if prompt is None or prompt in PROMPTS or is_template_file(prompt):
            return prompt
        raise _unknown("prompt template", prompt, PROMPTS, "a file like my.yaml")

    @field_validator("reward")
    @classmethod
    def _known_reward(cls, reward: str | None) -> str | None:
        from empg_lite.rewards import check_reward  # here: a recipe without a reward needs no grader

        if reward is not None:
            try:
                check_reward(reward)
            except ValueError as error:
                raise refusal(str(error), f"known: {REWARDS}") from error
        return reward


def choose_engine(asked: str) -> str:
    """``sampler.engine``: ``auto`` is our own, over either backend and on every device.

    Measured on a CPU (``benchmarks/speed.py``), not yet on a GPU.
    """
    return "native" if asked == "auto" else asked


class SamplerSection(Section):
    """How rationales are drawn in the E-step."""

    engine: Literal["auto", "native", "generate", "unsloth"] = key(
        "auto",
        "native: ours, with Unsloth's kernels where they prove right; generate, unsloth: the backend's own",
    )
    problems_per_step: Annotated[int, Field(ge=1, le=65_536)] = key(32, "P: problems of one step")
    samples_per_problem: Annotated[int, Field(ge=1, le=4096)] = key(8, "K: rationales drawn for each problem")
    max_new_tokens: Tokens = key(512, "a rationale cut off here has reward 0")
    temperature: PositiveNumber = key(1.0, "training samples at 1; another value needs --force")
    top_p: Annotated[float, Field(gt=0, le=1)] = key(1.0, "1 is off; training with less needs --force")
    top_k: CountOrZero = key(0, "0 is off; training with more needs --force")
    refill: CountOrZero = key(0, "most further problems drawn in a step while fewer than P teach anything")
    batch_rows: Count | Auto = key("auto", "rows sampled at once; never changes what is drawn")
    merged: bool | Auto = key("auto", "native: decode over a merged copy of the weights; auto: where it fits")


class EmSection(Section):
    """How rewards become weights, and how often the weighted fit is repeated."""

    weighting: Literal["posterior", "centered", "loo", "standardized", "raw"] = key(
        "posterior", "posterior: reward / mean reward of the problem; the others are for comparison"
    )
    baseline: Share = key(0.0, "share of the posterior weights' mean that is subtracted")
    normalization: Literal["tokens", "max_length"] = key(
        "tokens", "denominator: all sampled tokens, or constant"
    )
    passes: Annotated[int, Field(ge=1, le=64)] = key(1, "optimiser steps on one set of samples")
    kl_stop: PositiveNumber = key(0.005, "passes stop at this KL from the start of the fit, nats per token")
    max_age: Count | None = key(None, "fit: older rationales weigh 0, in optimiser steps; null: no limit")

    @field_validator("normalization", mode="before")
    @classmethod
    def _no_sequence_mean(cls, value: object) -> object:
        if value == "sequence_mean":
            raise refusal(
                "sequence_mean is not offered: with non-negative weights it collapses to short guesses",
                "use tokens or max_length",
            )
        return value


class OptimSection(Section):
    """The M-step's optimiser (AdamW, constant rate after warm-up)."""

    learning_rate: Annotated[float, Field(gt=0, le=1)] = key(2e-5, "rate after warm-up")
    warmup_steps: CountOrZero = key(5, "steps of linear warm-up")
    max_grad_norm: PositiveNumber = key(1.0, "gradients are clipped to this norm")
    micro_batch_tokens: Count | Auto = key("auto", "token budget of a micro-batch; never changes the maths")
    adam_8bit: bool = key(False, "hold Adam's moments in 8 bits: a quarter of their memory, no speed")
    gradient_checkpointing: bool | Auto = key("auto", "recompute activations: less memory, a third more time")


class RunSection(Section):
    """How long, how often, and from which seed."""

    steps: Count = key(100, "training steps (E-step + M-step)")
    seed: Seed = key(0, "seed of sampling, order and adapter initialisation")
    eval_every: CountOrZero = key(20, "steps between evaluations; 0: none at all, before and after included")
    eval_limit: Count | None = key(None, "evaluate on so many rows, always the same ones; null: all")
    save_every: Count = key(20, "steps between checkpoints; one always follows the last step")
    keep: Count = key(2, "checkpoints kept")


class Recipe(Section):
    """Everything a run needs to know."""

    model: ModelSection
    data: DataSection
    sampler: SamplerSection = SamplerSection()
    em: EmSection = EmSection()
    optim: OptimSection = OptimSection()
    run: RunSection = RunSection()

    @model_validator(mode="after")
    def _no_contradiction(self) -> Self:
        for field, what, todo in _contradictions(self):
            raise refusal(what, todo, field)
        return self

    def resolved(self) -> Recipe:
        """The recipe with everything filled in that depends on the data source."""
        kind = GYM if self.data.source.startswith(GYM) else self.data.source
        prompt, reward, tokens = _DEFAULTS_BY_SOURCE.get(kind, _OTHER_DEFAULTS)
        filled = {
            "prompt": self.data.prompt or prompt,
            "reward": self.data.reward or reward,
            "max_prompt_tokens": self.data.max_prompt_tokens or tokens,
        }
        return self.model_copy(update={"data": self.data.model_copy(update=filled)})


def is_template_file(prompt: str) -> bool:
    """Whether ``data.prompt`` names a file: it is no built-in template and looks like a path."""
    return prompt not in PROMPTS and bool(re.search(r"[/\\]|\.(txt|ya?ml)$", prompt))


def _contradictions(recipe: Recipe) -> Iterator[tuple[str, str, str]]:
    """(field, what, what to do) of settings that are fine alone and wrong together."""
    data, em = recipe.data, recipe.em
    if recipe.sampler.samples_per_problem == 1 and em.weighting in ("centered", "loo", "standardized"):
        what = f"{em.weighting} compares the samples of a problem, and there is one"
        yield "em.weighting", what, "raise sampler.samples_per_problem"
    if em.baseline and em.weighting != "posterior":
        what = f"the baseline is taken off posterior weights only, not off {em.weighting}"
        yield "em.baseline", what, "set em.baseline to 0, or em.weighting to posterior"
    if data.source == "local" and not data.path:
        yield "data.path", "source local has no path", "set data.path to a file or a folder"
    made = "bundled" if data.source in BUNDLED else "generated" if data.source.startswith(GYM) else None
    if made and (data.path or data.eval_path):
        field = "data.path" if data.path else "data.eval_path"
        yield field, f"the {data.source} problems are {made}, no file is read", "set data.source to local"
    if data.hub_config and (made or "/" not in data.source):
        what = f"source {data.source} has no configurations"
        yield "data.hub_config", what, "remove it, or name a hub dataset id"
    if data.reward and _correctness(data.reward) == "gym" and not data.source.startswith(GYM):
        what = "reward gym asks the scorer of a Reasoning Gym task"
        yield "data.reward", what, "set data.source to gym:TASK, or name another reward"
    if data.split == data.eval_split and not data.eval_path:
        yield "data.eval_split", "training and evaluation rows would be the same", "name another split"
    if data.question_column and data.question_column == data.answer_column:
        yield "data.answer_column", "question and answer are the same column", "name another column"


def _correctness(reward: str) -> str:
    from empg_lite.rewards.spec import parse_spec

    return parse_spec(reward).correctness.name


def refused_sampling(recipe: Recipe) -> str | None:
    """Why training would not sample from the policy itself, or None: the caller applies ``--force``."""
    sampler = recipe.sampler
    for name, neutral in (("temperature", 1.0), ("top_p", 1.0), ("top_k", 0)):
        if getattr(sampler, name) != neutral:
            return (
                f"sampler.{name} {getattr(sampler, name)} trains on another distribution than the policy's; "
                f"the EM gradient holds at {neutral}"
            )
    return None


@dataclass(frozen=True, slots=True)
class FieldDoc:
    """One key as the documentation prints it; ``default`` is ``required`` where there is none."""

    key: str
    type: str
    default: str
    description: str


def field_docs() -> list[FieldDoc]:
    """Every key in order, with its type, default and description."""
    return [
        FieldDoc(f"{section}.{name}", type_text(section, name), _default_text(info), info.description or "")
        for section, model in sections().items()
        for name, info in model.model_fields.items()
    ]


def recipe_schema() -> dict[str, Any]:
    """The recipe as a JSON schema (draft 2020-12), for editors: keys, types, bounds, descriptions.

    What it accepts may still be refused: it knows nothing of files, names and contradictions.
    """
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Recipe.model_json_schema(),
        "title": "empg-lite recipe",
    }


def sections() -> dict[str, type[Section]]:
    """Section name -> its model, in order."""
    return {name: model for name, model in get_type_hints(Recipe).items() if name in Recipe.model_fields}


def type_text(section: str, name: str) -> str:
    """The type of a key in words: ``whole number >= 1 | auto``."""
    return _type_text(get_type_hints(sections()[section], include_extras=True)[name])


_TYPE_WORDS = {int: "whole number", float: "number", str: "text", bool: "true | false", NoneType: "null"}
_SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def _type_text(annotation: Any) -> str:
    if annotation in _TYPE_WORDS:
        return _TYPE_WORDS[annotation]
    if get_origin(annotation) is Literal:
        return " | ".join(get_args(annotation))
    if get_origin(annotation) is Annotated:
        base, *extras = get_args(annotation)
        bounds = [bound for extra in extras if isinstance(extra, FieldInfo) for bound in extra.metadata]
        words = [f"{_SIGNS[s]} {getattr(b, s)}" for b in bounds for s in _SIGNS if hasattr(b, s)]
        return " ".join((_type_text(base), " and ".join(words))).strip()
    return " | ".join(_type_text(part) for part in get_args(annotation))


def _default_text(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    return info.default if isinstance(info.default, str) else json.dumps(info.default)


def changed_fields(old: Recipe, new: Recipe) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (old, new) of every value that differs."""
    return {
        f"{section}.{name}": (before, after)
        for section, model in sections().items()
        for name in model.model_fields
        if (before := getattr(getattr(old, section), name)) != (after := getattr(getattr(new, section), name))
    }
