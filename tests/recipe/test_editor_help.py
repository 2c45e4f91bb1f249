"""Editor and shell support: the JSON schema of recipes, and shell completion."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from pydantic import ValidationError

from empg_lite.recipe.file import builtin_recipes, load_recipe
from empg_lite.recipe.schema import Recipe, field_docs, recipe_schema

SCHEMA = Draft202012Validator(recipe_schema())
TINY = load_recipe("tiny").model_dump(mode="json")


def accepted(values: dict[str, Any]) -> bool:
    try:
        Recipe.model_validate(values)
    except ValidationError:
        return False
    return True


def test_the_command_prints_the_schema(cli) -> None:  # type: ignore[no-untyped-def]
    code, out, _ = cli("recipes", "schema")
    assert code == 0 and json.loads(out) == recipe_schema()
    code, line, _ = cli("recipes", "schema", "--json")
    assert code == 0 and line.count("\n") == 1 and json.loads(line) == recipe_schema()
    Draft202012Validator.check_schema(recipe_schema())
    assert cli("recipes", "schema", "tiny")[0] == 2


@pytest.mark.parametrize("name", builtin_recipes())
def test_every_built_in_recipe_is_valid(name: str) -> None:
    SCHEMA.validate(load_recipe(name).model_dump(mode="json"))


def test_every_key_has_a_description() -> None:
    schema = recipe_schema()
    described = {
        f"{section}.{key}": facts["description"]
        for section, ref in schema["properties"].items()
        for key, facts in schema["$defs"][(ref.get("$ref") or ref["allOf"][0]["$ref"]).split("/")[-1]][
            "properties"
        ].items()
    }
    assert described == {d.key: d.description for d in field_docs()}


#: Not 1.0: JSON schema treats it as an integer.
VALUES = st.sampled_from(
    [None, True, False, -1, 0, 1, 3, 2**33, 0.5, 1.5, "", "auto", "tiny", "posterior", "1", [], {}, [1]]
)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from([d.key for d in field_docs()]), VALUES)
def test_schema_and_recipe_agree(key: str, value: Any) -> None:
    """Whatever the schema rejects, the recipe rejects. It may reject more: names, files, contradictions."""
    values = deepcopy(TINY)
    section, name = key.split(".")
    values[section][name] = value
    if not SCHEMA.is_valid(values):
        assert not accepted(values), (key, value)
    elif not isinstance(value, str):  # the schema cannot judge text values
        contradicts = {"data.path", "data.eval_path", "data.hub_config", "data.question_column"}
        contradicts |= {"em.baseline"}  # with tries, which `tiny` has
        contradicts |= {"optim.decay_after"}  # with its warmup steps
        assert accepted(values) or key in contradicts, (key, value)


def test_unknown_and_missing_keys() -> None:
    assert SCHEMA.is_valid(TINY)
    assert not SCHEMA.is_valid({**TINY, "trainer": {}})
    assert not SCHEMA.is_valid({**TINY, "run": {**TINY["run"], "stepz": 3}})
    assert not SCHEMA.is_valid({k: v for k, v in TINY.items() if k != "model"})


def complete(words: str, folder: Path) -> list[str]:
    """The completions bash would offer after ``words`` in ``folder``."""
    asked = {
        "_EMPG_LITE_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split())),
    }
    if not words.endswith(" "):
        asked["COMP_CWORD"] = str(len(words.split()) - 1)
    code = "import sys; sys.argv[0] = 'empg-lite'; from empg_lite.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **asked}, cwd=folder, capture_output=True, text=True
    )
    return done.stdout.split()


def test_the_shell_completes(tmp_path: Path) -> None:
    (tmp_path / "runs" / "mine-001").mkdir(parents=True)
    (tmp_path / "runs" / "mine-001" / "recipe.yaml").touch()
    (tmp_path / "runs" / "notes").mkdir()
    assert complete("empg-lite tra", tmp_path) == ["train"]
    assert set(complete("empg-lite train --recipe gsm8k-0", tmp_path)) == {"gsm8k-0.5b", "gsm8k-0.5b-t4"}
    assert complete("empg-lite recipes sh", tmp_path) == ["show"]
    assert complete("empg-lite eval runs/", tmp_path) == ["runs/mine-001"]
    assert complete("empg-lite train --recipe nothing", tmp_path) == []
