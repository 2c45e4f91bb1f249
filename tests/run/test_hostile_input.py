"""Oversized, broken and arbitrary input: caps, rows, fuzzed recipes and manifests."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hostile import DEEP
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import wait_until

from empg_lite.core.errors import DataError, EmpgError, RecipeError
from empg_lite.loop import recorder as session_module
from empg_lite.loop.train import train
from empg_lite.recipe.file import load_recipe
from empg_lite.rewards.math import extract
from empg_lite.run import store
from empg_lite.run.journal import Journal, read_metrics

CANARY = "s3cr3t-c4n4ry"


# --- limits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting",
    ["sampler.max_new_tokens=32769", "sampler.samples_per_problem=4097", "sampler.problems_per_step=65537",
     "data.max_prompt_tokens=32769", "em.passes=65", "model.lora_r=1025"],
)  # fmt: skip
def test_caps(recipe_file: Path, setting: str) -> None:
    with pytest.raises(RecipeError, match="<= "):
        load_recipe(str(recipe_file), [setting])


def test_event_texts_are_bounded(tmp_path: Path) -> None:
    Journal(tmp_path).event("grader_error", error="x" * 10_000_000, note=f"see https://a:{CANARY}@b")
    line = (tmp_path / "events.jsonl").read_text("utf-8")
    assert len(line) < 64_000 and json.loads(line)["error"].endswith(" ...") and CANARY not in line


def test_a_stuck_step_is_reported_and_the_run_continues(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from empg_lite.loop import train as module

    monkeypatch.setattr(session_module, "SURELY_STUCK", 0.3)
    monkeypatch.setattr(session_module, "STUCK", 0)
    real, calls, said = module.e_step, 0, ""

    def heard() -> bool:
        nonlocal said
        said += capfd.readouterr().err
        return " in slow" in said

    def slow(*args: Any) -> Any:
        """The fourth step hangs until that is reported, and twice as long again: it is reported once."""
        nonlocal calls
        calls += 1
        if calls == 4:
            wait_until(heard)
            time.sleep(0.6)
            heard()
        return real(*args)

    monkeypatch.setattr(module, "e_step", slow)
    recipe = load_recipe(str(recipe_file), ["run.steps=5", "run.eval_every=0"])
    assert train(recipe, tmp_path / "run")["steps"] == 5
    assert "Timeout (0:00:00.300000)!" in said and said.count(" in slow") == 1


# --- rows --------------------------------------------------------------------------------------------------


def test_all_bad_rows_are_named_or_skipped_and_counted(recipe_file: Path, tmp_path: Path, cli: Any) -> None:
    from empg_lite.data.sources import load_splits

    file = recipe_file.with_name("problems.jsonl")
    sound = file.read_text("utf-8")
    bad = '\n\n{"question": "x", "answer": }\n["a"]\n{"question": "y"}\n{"question": "z", "answer": null}\n'
    file.write_text(sound + bad, "utf-8")
    with pytest.raises(DataError) as raised:
        load_splits(load_recipe(str(recipe_file)))
    said = str(raised.value)
    assert f"{file}:23" in said and "also unusable: lines 24, 25, 26" in said and "\n" not in said
    splits = load_splits(load_recipe(str(recipe_file), ["data.skip_bad_rows=true"]))
    assert splits.dropped["bad"] == 4
    assert len(splits.train) + len(splits.validation) + len(splits.evaluation) == 20
    code, out, _ = cli("check", "--recipe", recipe_file, "--set", "data.skip_bad_rows=true")
    assert "4 bad" in out, (code, out)
    file.write_text(sound + '{"question": 1}\n' * 30, "utf-8")
    with pytest.raises(DataError, match="lines 22, 23.*, 40, and 10 more"):
        load_splits(load_recipe(str(recipe_file)))


def test_a_row_of_fifty_megabytes(recipe_file: Path) -> None:
    from empg_lite.data.sources import load_splits

    file = recipe_file.with_name("problems.jsonl")
    with open(file, "a", encoding="utf-8") as out:
        out.write(json.dumps({"question": "x" * 50_000_000, "answer": ["no"]}) + "\n")
    with pytest.raises(DataError, match=":21: answer"):
        load_splits(load_recipe(str(recipe_file)))


# --- anything at all ---------------------------------------------------------------------------------------

FUZZ = settings(max_examples=300, deadline=None)


@FUZZ
@given(st.binary(max_size=400))
def test_any_bytes_as_a_recipe(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = Path(tmp_path_factory.getbasetemp()) / "fuzz.yaml"
    path.write_bytes(data)
    with pytest.raises(EmpgError) as raised:
        load_recipe(str(path))
    assert raised.value.exit_code == 65 and "\n" not in str(raised.value)


KEYS = st.sampled_from(["model", "data", "sampler", "em", "optim", "run", "name", "source", "steps", "x"])
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=3)),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(KEYS, VALUES, max_size=6))
def test_any_values_as_a_recipe(tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]) -> None:
    path = Path(tmp_path_factory.getbasetemp()) / "fuzz-values.yaml"
    path.write_text(json.dumps(values), "utf-8")
    try:
        load_recipe(str(path))
    except EmpgError as error:
        assert error.exit_code in (65, 66) and "\n" not in str(error)


@FUZZ
@given(
    st.lists(st.sampled_from([*"\\{}$#0123456789ab ,.%-=\n答", "\\boxed{", "####", "\\frac"])).map("".join)
)
def test_any_text_is_read_for_an_answer(text: str) -> None:
    found = extract(text)
    assert found is None or (isinstance(found.text, str) and len(found.text) <= len(text))


@FUZZ
@given(st.one_of(st.binary(max_size=300), VALUES.map(lambda v: json.dumps(v).encode())))
def test_any_manifest(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = Path(tmp_path_factory.getbasetemp()) / "fuzz-manifest"
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_bytes(data)
    found = store.verify_dir(folder)
    assert (found is None) == (data.strip() == b"{}")
    assert found is None or "\n" not in found


def test_a_deep_manifest_is_no_crash(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(DEEP[:900_000])
    assert store.verify_dir(tmp_path) is not None
    assert read_metrics(tmp_path / "absent") == []
