"""Recipes: defaults, built-in files, YAML round trips, overrides. Errors are in ``test_broken_inputs.py``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from empg_lite.core.errors import MissingInput, RecipeError
from empg_lite.core.slots import Tries
from empg_lite.recipe import file as recipe_file
from empg_lite.recipe.file import builtin_recipes, dump_recipe, find_recipe, load_recipe, recipe_summary
from empg_lite.recipe.schema import (
    DataSection,
    EmSection,
    ModelSection,
    Recipe,
    changed_fields,
    field_docs,
    refused_sampling,
    sections,
)

SHIPPED = {
    "tiny": ("tiny", "tiny"),
    "tiny-hard": ("tiny-hard", "tiny-hard"),
    "smollm2-135m": ("smollm2-135m", "word-problems"),
    "smollm2-135m-gym": (
        "smollm2-135m",
        "gym:chain_sum?min_terms=2&max_terms=3&min_digits=1&max_digits=2",
    ),
    "gsm8k-0.5b": ("Qwen/Qwen2.5-0.5B", "gsm8k"),
    "gsm8k-1.5b": ("Qwen/Qwen2.5-1.5B", "gsm8k"),
    "gsm8k-3b": ("Qwen/Qwen2.5-3B", "gsm8k"),
    "gsm8k-7b": ("Qwen/Qwen2.5-7B", "gsm8k"),
    "gsm8k-0.5b-t4": ("Qwen/Qwen2.5-0.5B", "gsm8k"),
    "math-hard-1.5b": ("Qwen/Qwen2.5-1.5B", "math-hard"),
    "math-hard-3b": ("Qwen/Qwen2.5-3B", "math-hard"),
    "custom-jsonl": ("Qwen/Qwen2.5-0.5B", "local"),
}
#: The documented default of every optional key.
DEFAULTS = {
    "model.revision": None, "model.adapter": None, "model.backend": "auto", "model.dtype": "auto",
    "model.load_in_4bit": True, "model.lora_r": 32, "model.lora_alpha": 64,
    "data.path": None, "data.split": "train", "data.eval_path": None, "data.eval_split": "test",
    "data.validation": None, "data.prompt": None, "data.reward": None, "data.max_prompt_tokens": None,
    "data.hub_config": None, "data.question_column": None, "data.answer_column": None,
    "data.skip_bad_rows": False,
    "sampler.engine": "auto", "sampler.problems_per_step": 32, "sampler.samples_per_problem": 8,
    "sampler.max_new_tokens": 512, "sampler.temperature": 1.0, "sampler.top_p": 1.0, "sampler.top_k": 0,
    "sampler.tries": None, "sampler.batch_rows": "auto", "sampler.merged": "auto",
    "em.weighting": "posterior", "em.baseline": 0.0, "em.normalization": "tokens", "em.passes": 1,
    "em.kl_stop": 0.005, "em.max_age": None,
    "optim.learning_rate": 2e-5, "optim.warmup_steps": 5, "optim.decay_after": None,
    "optim.max_grad_norm": 1.0, "optim.micro_batch_tokens": "auto",
    "optim.adam_8bit": False, "optim.gradient_checkpointing": "auto",
    "run.steps": 100, "run.seed": 0, "run.eval_every": 20, "run.eval_limit": None, "run.save_every": 20,
    "run.keep": 2,
}  # fmt: skip


def a_recipe(**data: object) -> Recipe:
    return Recipe(model=ModelSection(name="m"), data=DataSection(**({"source": "gsm8k"} | data)))  # type: ignore[arg-type]


def write(folder: Path, text: str, name: str = "r.yaml") -> str:
    (folder / name).write_text(text, "utf-8")
    return str(folder / name)


# --- the models -----------------------------------------------------------------------------------


def test_defaults() -> None:
    dumped = a_recipe().model_dump()
    flat = {f"{s}.{k}": v for s, values in dumped.items() for k, v in values.items()}
    assert {k: v for k, v in flat.items() if k not in ("model.name", "data.source")} == DEFAULTS


def test_recipes_are_frozen() -> None:
    with pytest.raises(ValidationError):
        a_recipe().run.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("gsm8k", ("qwen-boxed", "gsm8k", 512)),
        ("math", ("qwen-boxed", "math", 1024)),
        ("math-hard", ("qwen-boxed", "math", 1024)),
        ("tiny", ("plain", "gsm8k", 128)),
        ("word-problems", ("two-shot", "gsm8k", 256)),
        ("owner/set", ("qwen-boxed", "math", 1024)),
    ],
)
def test_resolved_fills_in_defaults_by_source(source: str, expected: tuple[str, str, int]) -> None:
    data = a_recipe(source=source).resolved().data
    assert (data.prompt, data.reward, data.max_prompt_tokens) == expected
    assert data.validation is None
    again = a_recipe(source=source).resolved()
    assert again.resolved() == again


def test_resolved_keeps_explicit_values() -> None:
    data = a_recipe(prompt="gsm8k", reward="exact", max_prompt_tokens=7).resolved().data
    assert (data.prompt, data.reward, data.max_prompt_tokens) == ("gsm8k", "exact", 7)


@pytest.mark.parametrize(("key", "value"), [("temperature", 0.7), ("top_p", 0.95), ("top_k", 20)])
def test_refused_sampling_names_the_key(key: str, value: float) -> None:
    sampler = a_recipe().sampler.model_copy(update={key: value})
    message = refused_sampling(a_recipe().model_copy(update={"sampler": sampler}))
    assert message is not None and f"sampler.{key} {value}" in message
    assert refused_sampling(a_recipe()) is None


def test_changed_fields() -> None:
    old = a_recipe()
    new = old.model_copy(update={"em": EmSection(passes=2, kl_stop=0.01)})
    assert changed_fields(old, new) == {"em.passes": (1, 2), "em.kl_stop": (0.005, 0.01)}
    assert changed_fields(old, a_recipe()) == {}


def test_every_key_is_documented() -> None:
    docs = field_docs()
    assert [doc.key for doc in docs if doc.default != "required"] == list(DEFAULTS)
    assert [doc.key for doc in docs if doc.default == "required"] == ["model.name", "data.source"]
    for doc in docs:
        assert doc.description and doc.description.isprintable() and len(doc.description) <= 100
        section, _, name = doc.key.partition(".")
        assert sections()[section].model_json_schema()["properties"][name]["description"] == doc.description
    types = {doc.key: doc.type for doc in docs}
    assert types["optim.micro_batch_tokens"] == "whole number >= 1 | auto"
    assert types["em.baseline"] == "number >= 0 and <= 1"
    assert types["data.path"] == "text | null"
    assert types["optim.gradient_checkpointing"] == "true | false | auto"


def test_tries_make_the_rule(tmp_path: Path) -> None:
    recipe = load_recipe("tiny", ["sampler.tries=8", "sampler.problems_per_step=5"])
    assert recipe.tries == Tries(5, recipe.sampler.samples_per_problem, 8)
    assert load_recipe("tiny", ["sampler.tries=1"]).tries is not None
    assert load_recipe("tiny", ["sampler.tries=null"]).tries is None is a_recipe().tries


def test_recipes_of_older_runs_may_name_the_refill_that_they_did_not_use(tmp_path: Path) -> None:
    """``recipe.yaml`` of a run lists every key, so a run begun before ``tries`` resumes."""
    older = dump_recipe(a_recipe()).replace("  tries: null", "  refill: 0")
    assert "refill: 0" in older
    assert load_recipe(write(tmp_path, older)) == a_recipe()
    assert "refill" not in dump_recipe(load_recipe(write(tmp_path, older)))


def test_choices_match_the_modules_that_implement_them() -> None:
    from empg_lite.em import NORMALIZATIONS, WEIGHTINGS

    types = {doc.key: doc.type for doc in field_docs()}
    assert types["em.weighting"] == " | ".join(WEIGHTINGS)
    assert types["em.normalization"] == " | ".join(NORMALIZATIONS)


def test_recipes_need_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from empg_lite.recipe.file import load_recipe\n"
        "load_recipe('tiny', ['data.reward=math'])\n"
        "print([m for m in ('torch', 'transformers', 'datasets', 'pyarrow', 'sympy') if m in sys.modules])"
    )
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env
    )
    assert result.stdout.strip() == "[]", result.stderr


# --- built-in recipes -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipe(name: str) -> None:
    path = builtin_recipes()[name]
    recipe = load_recipe(name)
    assert (recipe.model.name, recipe.data.source) == SHIPPED[name]
    assert refused_sampling(recipe) is None
    if not name.startswith(("tiny", "smollm2")):
        floor = 1024 if "math" in name else 512
        assert recipe.sampler.max_new_tokens >= floor
        assert recipe.model.load_in_4bit
    text = path.read_text("utf-8")
    comments = [line for line in text.splitlines() if line.startswith("#")]
    assert text.startswith("# ") and recipe_summary(path) == comments[0][2:]
    assert "empg-lite train --recipe " in text
    for word in ("Card:", "Memory:", "Time:", "Score:"):
        assert sum(word in line for line in comments) == 1, word
    assert any("stimated" in line or "measured" in line.lower() for line in comments)
    assert max(map(len, text.splitlines())) <= 110


def test_the_list_of_built_in_recipes_is_complete() -> None:
    assert set(builtin_recipes()) == set(SHIPPED)


def test_tiny_recipe() -> None:
    recipe = load_recipe("tiny")
    assert recipe.data.source == "tiny"
    assert not recipe.model.load_in_4bit and recipe.model.dtype == "float32"
    assert (recipe.sampler.problems_per_step, recipe.sampler.samples_per_problem) == (64, 1)
    assert recipe.tries is not None and recipe.tries.tries == 8


def test_found_from_any_folder_and_from_a_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_recipe("tiny").model.name == "tiny"
    wheel = tmp_path / "site" / "empg_lite"
    (wheel / "recipes").mkdir(parents=True)
    write(wheel / "recipes", "# packed\nmodel: {name: packed}\ndata: {source: math}\n", "tiny.yaml")
    monkeypatch.setattr(recipe_file, "__file__", str(wheel / "recipe" / "file.py"))
    assert builtin_recipes() == {"tiny": wheel / "recipes" / "tiny.yaml"}
    assert load_recipe("tiny").model.name == "packed"
    assert recipe_summary(builtin_recipes()["tiny"]) == "packed"


@pytest.mark.parametrize(
    ("name", "fragment"),
    [
        ("gsm8k-0.5", "did you mean gsm8k-0.5b"),
        ("xyzzy", "built-in: custom-jsonl, gsm8k-0.5b"),
        ("no/such.yaml", "no such recipe file"),
        ("such.yml", "no such recipe file"),
        (".", "no recipe named '.'"),
        ("~nobody/x.yaml", "no such recipe file"),
        ("x" * 5000, "no recipe named"),
    ],
)
def test_unknown_recipe(name: str, fragment: str) -> None:
    with pytest.raises(MissingInput, match="recipe") as caught:
        find_recipe(name)
    assert fragment in str(caught.value) and caught.value.exit_code == 66


# --- YAML -----------------------------------------------------------------------------------------

MINIMAL = "model: {name: m}\ndata: {source: gsm8k}\n"


@pytest.mark.parametrize("spelled", ["1e-5", "1E-5", "0.00001", "1.0e-05", "+1e-5"])
def test_exponents_are_numbers(spelled: str, tmp_path: Path) -> None:
    """PyYAML reads the first as text."""
    path = write(tmp_path, MINIMAL + f"optim:\n  learning_rate: {spelled}\n")
    assert load_recipe(path).optim.learning_rate == 1e-5


@pytest.mark.parametrize("word", ["no", "on", "yes", "off", "y", "12:30:45", "2024-01-02"])
def test_words_of_yaml_1_1_are_text(word: str, tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL.replace("{name: m}", f"{{name: m, revision: {word}}}"))
    assert load_recipe(path).model.revision == word


def test_integers_are_valid_floats(tmp_path: Path) -> None:
    norm = load_recipe(write(tmp_path, MINIMAL + "optim: {max_grad_norm: 2}\n")).optim.max_grad_norm
    assert norm == 2.0 and isinstance(norm, float)


def test_byte_order_mark_crlf_and_commented_out_sections(tmp_path: Path) -> None:
    text = "\ufeff" + MINIMAL.replace("\n", "\r\n") + "run:\r\n  # steps: 3\r\nem:\r\n"
    (tmp_path / "r.yaml").write_bytes(text.encode())
    assert load_recipe(str(tmp_path / "r.yaml")) == a_recipe()


def test_built_in_recipes_survive_a_round_trip(tmp_path: Path) -> None:
    for name in SHIPPED:
        for recipe in (load_recipe(name), load_recipe(name).resolved()):
            text = dump_recipe(
                recipe, f"empg-lite train --recipe {name}\nsecond\x1b[0m\u2028line\n\nmore: &x ["
            )
            assert load_recipe(write(tmp_path, text)) == recipe
            assert text.startswith(f"# empg-lite train --recipe {name}\n# second?[0m\n# line\n#\n# more")
            assert all(f"  {key.partition('.')[2]}:" in text for key in DEFAULTS), (
                "every value is written out"
            )


texts = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=40).filter(str.strip)


@settings(max_examples=80, deadline=None)
@given(texts, texts, st.floats(1e-300, 1), st.floats(1e-6, 1e300), st.integers(0, 2**32 - 1), st.booleans())
def test_any_recipe_survives_a_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    revision: str,
    column: str,
    rate: float,
    norm: float,
    seed: int,
    flag: bool,
) -> None:
    values = {
        "model": {"name": "m", "revision": revision, "load_in_4bit": flag},
        "data": {"source": "local", "path": "/" + column.replace("/", ""), "question_column": column},
        "optim": {"learning_rate": rate, "max_grad_norm": norm, "gradient_checkpointing": flag},
        "run": {"seed": seed},
    }
    recipe = Recipe.model_validate(values)
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(dump_recipe(recipe), "utf-8", newline="")
    loaded = load_recipe(str(path))
    assert loaded == recipe.model_copy(
        update={"data": recipe.data.model_copy(update={"path": os.path.abspath(recipe.data.path or "")})}
    )


# --- overrides and paths --------------------------------------------------------------------------


def test_overrides_are_type_checked() -> None:
    overrides = ["run.steps=3", "run.steps=4", "run.eval_limit=null", "model.load_in_4bit=false"]
    overrides += ["optim.learning_rate=1e-4", "optim.micro_batch_tokens=4096", "em.baseline=1"]
    recipe = load_recipe("gsm8k-0.5b", ["sampler.tries=null", *overrides], seed=7)
    assert (recipe.run.steps, recipe.run.seed, recipe.run.eval_limit) == (4, 7, None)
    assert (recipe.optim.learning_rate, recipe.optim.micro_batch_tokens) == (1e-4, 4096)
    assert recipe.em.baseline == 1.0 and recipe.model.load_in_4bit is False


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        (r"regex:answer: (\d+) #", r"regex:answer: (\d+) #"),
        (r"'regex:(a)'", "regex:(a)"),
        ("exact", "exact"),
        ("null", None),
        ("", None),
    ],
)
def test_text_overrides_are_literal(typed: str, value: str | None) -> None:
    assert load_recipe("tiny", [f"data.reward={typed}"]).data.reward == value


def test_an_all_digit_commit_is_text() -> None:
    assert load_recipe("tiny", ["model.revision=0012e3"]).model.revision == "0012e3"


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seed_range(seed: int) -> None:
    with pytest.raises(RecipeError, match=f"--seed {seed}"):
        load_recipe("tiny", seed=seed)


def test_paths_resolve_against_the_file_or_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    (there / "weights").mkdir(parents=True)
    here.mkdir()
    monkeypatch.chdir(here)
    path = write(
        there, "model: {name: weights, adapter: a}\ndata: {source: local, path: d.csv, prompt: p.txt}\n"
    )
    recipe = load_recipe(os.path.relpath(path))
    assert recipe.model.name == str(there / "weights") and recipe.model.adapter == str(there / "a")
    assert recipe.data.path == str(there / "d.csv") and recipe.data.prompt == str(there / "p.txt")
    sets = [
        "data.path=../d.csv",
        "data.eval_path=e",
        "data.prompt=plain",
        "model.name=weights",
        "model.adapter=~/a",
    ]
    recipe = load_recipe(path, sets)
    assert recipe.data.path == str(tmp_path / "d.csv") and recipe.data.eval_path == str(here / "e")
    assert recipe.data.prompt == "plain"
    assert recipe.model.name == "weights", "no such folder here, so a hub ID"
    assert recipe.model.adapter == str(Path("~/a").expanduser())
    assert load_recipe(path, ["model.name=./weights"]).model.name == str(here / "weights")


def test_an_override_does_not_affect_other_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, MINIMAL)
    (tmp_path / "elsewhere" / "m").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")  # a folder here has the same name as the hub ID
    assert load_recipe(path, ["model.lora_r=4"]).model.name == "m"


def test_tiny_and_hub_ids_are_not_turned_into_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_recipe("tiny", ["model.name=tiny"]).model.name == "tiny"
    (tmp_path / "smollm2-135m").mkdir()
    assert load_recipe("tiny", ["model.name=smollm2-135m"]).model.name == "smollm2-135m"
    assert load_recipe("gsm8k-0.5b", ["model.name=Qwen/Qwen2.5-1.5B"]).model.name == "Qwen/Qwen2.5-1.5B"


def test_the_json_schema_is_valid_json() -> None:
    assert json.loads(json.dumps(Recipe.model_json_schema()))["additionalProperties"] is False
