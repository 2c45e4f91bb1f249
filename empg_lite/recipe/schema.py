"""The recipe schema: six frozen sections that reject unknown keys.

Plain data validated by pydantic, without torch; ``file.py`` reads and writes the YAML. Adding a key means
adding a field here: ``recipes show``, the JSON schema and the docs print its description from this file. A
key must be set by a built-in recipe, a benchmark or a documented task.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, Self, get_args, get_origin, get_type_hints

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from empg_lite.core.bundled import BUNDLED, PACKAGED, PROBLEMS
from empg_lite.core.safe_text import encodable, without_passwords
from empg_lite.core.slots import Tries
from empg_lite.policy.templates import TEMPLATES
from empg_lite.rewards.registry import REWARDS

SOURCES = ("gsm8k", "math", "math-hard", *PROBLEMS, "local")
#: Prefix of a Reasoning Gym source: gym:TASK?PARAMETER=VALUE&...
GYM = "gym:"
#: prompt, reward and max_prompt_tokens where the recipe leaves them null.
_DEFAULTS_BY_SOURCE = {
    "gsm8k": ("qwen-boxed", "gsm8k", 512),
    "math": ("qwen-boxed", "math", 1024),
    "math-hard": ("qwen-boxed", "math", 1024),
    **dict.fromkeys(BUNDLED, ("plain", "gsm8k", 128)),
    "word-problems": ("two-shot", "gsm8k", 256),
    GYM: ("qwen-boxed", "gym", 1024),
}
_OTHER_DEFAULTS = ("qwen-boxed", "math", 1024)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_DATA_FILE = re.compile(r"\.(jsonl?|csv|parquet)$")


def refusal(what: str, todo: str, field: str | None = None) -> PydanticCustomError:
    """A validation error with its fix; ``field`` is the dotted key where pydantic cannot know it."""
    return PydanticCustomError("refused", "{what}: {todo}", {"what": what, "todo": todo, "field": field})


def _unknown(kind: str, value: str, known: tuple[str, ...], other: str) -> PydanticCustomError:
    close = get_close_matches(value, known, 1)
    hint = f"did you mean {close[0]}?" if close else f"use one of {', '.join(known)}, or {other}"
    return refusal(f"unknown {kind} {value!r}", hint)


def _clean_text(text: str) -> str:
    if not text.strip():
        raise refusal("empty text", "write a value, or null for none")
    if text.strip() == "None":
        raise refusal("None is read as a word", "write null for none")
    if any(c < " " or c == "\x7f" for c in text) or not encodable(text):
        raise refusal("control characters in the text", "write it on one line, without escapes")
    if without_passwords(text) != text:
        raise refusal("a URL with a user name or password", "remove it: recipes are shown and published")
    return text


Text = Annotated[str, AfterValidator(_clean_text)]
LocalPath = Text  # ``absolute_path`` looks for this name in the annotation
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Tokens = Annotated[int, Field(ge=1, le=32_768)]  # Qwen2.5's context
Share = Annotated[float, Field(ge=0, le=1)]
PositiveNumber = Annotated[float, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Auto = Literal["auto"]


def key(default: Any = ..., description: str = "") -> Any:
    """A recipe key; it is required if it has no default."""
    return Field(default, description=description)


class Section(BaseModel):
    """A frozen section: rejects unknown keys, wrong types, NaN and infinity; coerces nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelSection(Section):
    """The base model and the LoRA adapter trained on it."""

    name: Text = key(
        description="hub ID or folder of the base model; `tiny`, `tiny-hard` bundled; `smollm2-135m` packaged"
    )
    revision: Text | None = key(None, "branch, tag or commit of the hub repository")
    adapter: LocalPath | None = key(None, "folder of a LoRA adapter to start from")
    backend: Literal["auto", "unsloth", "transformers"] = key("auto", "auto: unsloth if installed")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = key(
        "auto", "compute dtype; auto: float32 on a CPU"
    )
    load_in_4bit: bool = key(True, "keep the base model in NF4 (QLoRA); false: in dtype")
    lora_r: Annotated[int, Field(ge=1, le=1024)] = key(32, "LoRA rank, on all linear layers")
    lora_alpha: Count = key(64, "LoRA scale: the update is multiplied by lora_alpha / lora_r")


class DataSection(Section):
    """The problems, the prompt and the reward."""

    source: Text = key(description=f"{', '.join(SOURCES)}, gym:TASK, or a hub dataset ID")
    path: LocalPath | None = key(
        None, "file or folder to read instead of the hub (jsonl, json, csv, parquet)"
    )
    split: Text = key("train", "split to train on")
    eval_path: LocalPath | None = key(None, "file or folder of evaluation rows; null: same place as training")
    eval_split: Text = key("test", "split to report accuracy on")
    validation: CountOrZero | None = key(None, "training rows to hold out; null: 10%, at most 100")
    prompt: Text | None = key(None, f"template: {', '.join(TEMPLATES)}, or a file; null: by source")
    reward: Text | None = key(None, f"reward: {', '.join(REWARDS)}; null: by source")
    max_prompt_tokens: Tokens | None = key(None, "longer prompts are dropped and counted; null: by source")
    hub_config: Text | None = key(None, "configuration (subset) of a hub dataset")
    question_column: Text | None = key(None, "question column; null: question, problem, prompt, chat")
    answer_column: Text | None = key(None, "answer column; null: gold, answer, solution, ground_truth, chat")
    skip_bad_rows: bool = key(False, "skip and count unusable rows instead of rejecting the file")

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
        raise _unknown("source", source, SOURCES, "a hub ID like owner/name")

    @field_validator("prompt")
    @classmethod
    def _known_prompt(cls, prompt: str | None) -> str | None:
        if prompt is None or prompt in TEMPLATES or _is_template_file(prompt):
            return prompt
        raise _unknown("prompt template", prompt, tuple(TEMPLATES), "a file like my.yaml")

    @field_validator("reward")
    @classmethod
    def _known_reward(cls, reward: str | None) -> str | None:
        from empg_lite.rewards import check_reward  # lazy: only needed when a reward is named

        if reward is not None:
            try:
                check_reward(reward)
            except ValueError as error:
                raise refusal(str(error), f"known: {', '.join(REWARDS)}") from error
        return reward


def choose_engine(asked: str) -> str:
    """Resolve ``sampler.engine``: ``auto`` is ``native``, on either backend and every device.

    Based on CPU measurements (``benchmarks/speed.py``); not yet measured on a GPU.
    """
    return "native" if asked == "auto" else asked


class SamplerSection(Section):
    """How the E-step samples rationales."""

    engine: Literal["auto", "native", "generate", "unsloth"] = key(
        "auto", "native: built in, with Unsloth's kernels where verified; others: the backend's own"
    )
    problems_per_step: Annotated[int, Field(ge=1, le=65_536)] = key(32, "P: problems per step")
    samples_per_problem: Annotated[int, Field(ge=1, le=4096)] = key(8, "K: rationales sampled per problem")
    max_new_tokens: Tokens = key(512, "maximum length; a truncated rationale gets reward 0")
    temperature: PositiveNumber = key(1.0, "training requires 1 unless --force is given")
    top_p: Annotated[float, Field(gt=0, le=1)] = key(1.0, "1 is off; training with less requires --force")
    top_k: CountOrZero = key(0, "0 is off; training with more requires --force")
    tries: Count | None = key(
        None, "ask each problem until it is right, at most this often; null: K times, right or wrong"
    )
    batch_rows: Count | Auto = key("auto", "rows sampled at once; does not affect the samples")
    merged: bool | Auto = key("auto", "native: decode with a merged copy of the weights; auto: if it fits")

    @model_validator(mode="before")
    @classmethod
    def _refill_is_gone(cls, values: Any) -> Any:
        """Recipes of runs begun before ``tries`` name it; off, it meant nothing."""
        if isinstance(values, dict) and "refill" in values:
            if values["refill"] != 0:
                raise refusal("refill was removed", "set sampler.tries instead", "sampler.refill")
            values = {name: value for name, value in values.items() if name != "refill"}
        return values


class EmSection(Section):
    """How rewards become weights, and how many passes the weighted fit makes."""

    weighting: Literal["posterior", "centered", "loo", "standardized", "raw"] = key(
        "posterior", "posterior: reward / the problem's mean reward; the others are for comparison"
    )
    baseline: Share = key(0.0, "fraction of the mean posterior weight to subtract")
    normalization: Literal["tokens", "max_length"] = key(
        "tokens", "loss denominator: all sampled tokens, or a constant"
    )
    passes: Annotated[int, Field(ge=1, le=64)] = key(1, "optimizer steps on one set of samples")
    kl_stop: PositiveNumber = key(0.005, "KL from the start of the fit that stops the passes, nats per token")
    max_age: Count | None = key(None, "fit: weight 0 for rationales older than this, in optimizer steps")

    @field_validator("normalization", mode="before")
    @classmethod
    def _no_sequence_mean(cls, value: object) -> object:
        if value == "sequence_mean":
            raise refusal(
                "sequence_mean is not supported: with non-negative weights it collapses to short guesses",
                "use tokens or max_length",
            )
        return value


class OptimSection(Section):
    """The M-step's optimizer (AdamW; its rate rises, stays, and may fall)."""

    learning_rate: Annotated[float, Field(gt=0, le=1)] = key(2e-5, "learning rate after warmup")
    warmup_steps: CountOrZero = key(5, "linear warmup steps")
    decay_after: Count | None = key(None, "step from which the rate falls as 1/step; null: constant")
    max_grad_norm: PositiveNumber = key(1.0, "clip gradients to this norm")
    micro_batch_tokens: Count | Auto = key("auto", "token budget per micro-batch; does not affect the math")
    adam_8bit: bool = key(False, "keep Adam's moments in 8 bits: a quarter of the memory, no faster")
    gradient_checkpointing: bool | Auto = key("auto", "recompute activations: less memory, a third slower")


class RunSection(Section):
    """Length, seed, evaluations and checkpoints."""

    steps: Count = key(100, "training steps (E-step + M-step)")
    seed: Seed = key(0, "seed for sampling, problem order and adapter initialization")
    eval_every: CountOrZero = key(20, "steps between evaluations; 0: none, not even before and after")
    eval_limit: Count | None = key(None, "evaluate at most this many rows, always the same ones; null: all")
    save_every: Count = key(20, "steps between checkpoints; the last step is always saved")
    keep: Count = key(2, "checkpoints to keep")


class Recipe(Section):
    """All settings of a run."""

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

    @property
    def tries(self) -> Tries | None:
        """The rule of ``sampler.tries``; None for fixed groups."""
        s = self.sampler
        return Tries(s.problems_per_step, s.samples_per_problem, s.tries) if s.tries else None

    def resolved(self) -> Recipe:
        """The recipe with the keys that depend on the data source filled in."""
        kind = GYM if self.data.source.startswith(GYM) else self.data.source
        prompt, reward, tokens = _DEFAULTS_BY_SOURCE.get(kind, _OTHER_DEFAULTS)
        filled = {
            "prompt": self.data.prompt or prompt,
            "reward": self.data.reward or reward,
            "max_prompt_tokens": self.data.max_prompt_tokens or tokens,
        }
        return self.model_copy(update={"data": self.data.model_copy(update=filled)})


def _is_template_file(prompt: str) -> bool:
    return prompt not in TEMPLATES and bool(re.search(r"[/\\]|\.(txt|ya?ml)$", prompt))


def absolute_path(section: str, name: str, value: Any, base: Path) -> Any:
    """A key's value, with a relative local path in it resolved against ``base``."""
    if not isinstance(value, str) or value.strip() in ("", "None") or "\0" in value:
        return value
    key = f"{section}.{name}"
    if key == "data.reward" and "python:" in value:
        from empg_lite.rewards import with_absolute_file

        return with_absolute_file(value, base)
    if key == "model.name":
        explicit = value.startswith((".", "/", "~"))
        local = value not in (*BUNDLED, *PACKAGED) and (explicit or os.path.isdir(base / value))
    elif key == "data.prompt":
        local = _is_template_file(value)
    else:
        local = "LocalPath" in sections()[section].__annotations__.get(name, "")
    return os.path.abspath(base / os.path.expanduser(value)) if local else value


def _contradictions(recipe: Recipe) -> Iterator[tuple[str, str, str]]:
    """(field, what, what to do) for settings that are valid alone but contradict each other."""
    data, em, optim = recipe.data, recipe.em, recipe.optim
    if recipe.sampler.tries and (em.weighting != "posterior" or em.baseline):
        what = "tries stop at a right answer, which biases every weight that compares samples"
        yield "sampler.tries", what, "set em.weighting to posterior and em.baseline to 0, or tries to null"
    if recipe.sampler.samples_per_problem == 1 and em.weighting in ("centered", "loo", "standardized"):
        what = f"{em.weighting} compares the samples of a problem, but there is only one"
        yield "em.weighting", what, "raise sampler.samples_per_problem"
    if em.baseline and em.weighting != "posterior":
        what = f"a baseline applies to posterior weights only, not to {em.weighting}"
        yield "em.baseline", what, "set em.baseline to 0, or em.weighting to posterior"
    if optim.decay_after and optim.decay_after < optim.warmup_steps:
        what = f"the rate would fall within its {optim.warmup_steps} warmup steps"
        yield "optim.decay_after", what, f"set it to at least {optim.warmup_steps}, or to null"
    if data.source == "local" and not data.path:
        yield "data.path", "source local has no path", "set data.path to a file or a folder"
    made = "bundled" if data.source in PROBLEMS else "generated" if data.source.startswith(GYM) else None
    if made and (data.path or data.eval_path):
        field = "data.path" if data.path else "data.eval_path"
        yield field, f"{data.source} problems are {made}, not read from files", "set data.source to local"
    if data.hub_config and (made or "/" not in data.source):
        what = f"source {data.source} has no configurations"
        yield "data.hub_config", what, "remove it, or set data.source to a hub dataset ID"
    if data.reward and made != "generated" and _correctness(data.reward) == "gym":
        what = "reward gym needs the scorer of a Reasoning Gym task"
        yield "data.reward", what, "set data.source to gym:TASK, or choose another reward"
    if data.split == data.eval_split and not data.eval_path:
        yield "data.eval_split", "training and evaluation rows would be the same", "choose another split"
    if data.question_column and data.question_column == data.answer_column:
        yield "data.answer_column", "question and answer are the same column", "choose another column"


def _correctness(reward: str) -> str:
    from empg_lite.rewards.spec import parse_spec

    return parse_spec(reward).correctness.name


def refused_sampling(recipe: Recipe) -> str | None:
    """Why training would not sample from the policy itself, or None. The caller handles ``--force``."""
    sampler = recipe.sampler
    for name, neutral in (("temperature", 1.0), ("top_p", 1.0), ("top_k", 0)):
        if getattr(sampler, name) != neutral:
            return (
                f"sampler.{name} {getattr(sampler, name)} does not sample from the policy itself; "
                f"the EM gradient requires {neutral}"
            )
    return None


@dataclass(frozen=True, slots=True)
class FieldDoc:
    """One key as documented; ``default`` is ``required`` if it has none."""

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
    """The recipe as a JSON schema (draft 2020-12) for editors: keys, types, bounds, descriptions.

    A recipe that satisfies it may still be invalid: it does not check files, names or contradictions.
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
