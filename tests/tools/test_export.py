"""Exports behave like the adapter and load without this package, or they are refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest
import torch
from fixture_recipe import write_recipe

from empg_lite.core.errors import CheckFailed, StorageError
from empg_lite.loop.learner import build_learner
from empg_lite.rewards import Grader
from empg_lite.run.rollouts import read_rollouts
from empg_lite.run.target import resolve_target
from empg_lite.tools.export import compare, gguf, hub, llama, merged
from empg_lite.tools.export.llama import PACKAGES

#: Loads an export with only transformers and peft; the probe rows and the output file are arguments.
OUTSIDE = """
import importlib.abc, json, sys, torch

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] == "empg_lite":
            raise ImportError("empg_lite is blocked")

sys.meta_path.insert(0, Absent())
kind, base, folder, rows, out = sys.argv[1:]
from transformers import AutoModelForCausalLM, AutoTokenizer
if kind == "adapter":
    from peft import PeftModel
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)
else:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(folder)
from safetensors.torch import save_file
rows = json.load(open(rows))
with torch.no_grad():
    logits = {str(i): model(torch.tensor([r["ids"]])).logits[0].contiguous() for i, r in enumerate(rows)}
save_file(logits, out)
assert all(tokenizer.encode(r["prompt"], add_special_tokens=False) == r["prompt_ids"] for r in rows)
assert "empg_lite" not in sys.modules
print(json.dumps(model.generation_config.eos_token_id))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    """A trained run of the fixture model whose adapter matters."""
    return _train(tmp_path_factory.mktemp("export"), model_dir)


@pytest.fixture(scope="module")
def run_nf4(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    return _train(tmp_path_factory.mktemp("export-nf4"), model_dir, **{"model.load_in_4bit": True})


def _train(folder: Path, model_dir: Path, **changes: Any) -> Path:
    from empg_lite import api

    recipe = write_recipe(folder, model_dir)
    overrides = {"optim.learning_rate": 0.05, "sampler.max_new_tokens": 40, **changes}
    return api.run(recipe, folder / "run", overrides=overrides).path


@pytest.fixture
def grader():  # type: ignore[no-untyped-def]
    with Grader() as made:
        yield made


def probe(run: Path, tmp_path: Path) -> tuple[Path, list[torch.Tensor]]:
    """A few rows of the run as a file, and the policy's logits on them."""
    learner = build_learner(resolve_target(str(run)).recipe)
    rows = compare.stored_answers(run)[:3]
    path = tmp_path / "rows.json"
    records = [
        {"ids": [*r.prompt_ids, *r.completion_ids], "prompt": r.prompt, "prompt_ids": list(r.prompt_ids)}
        for r in rows
    ]
    path.write_text(json.dumps(records), "utf-8")
    policy = learner.policy
    with policy.sampling():
        logits = [policy.causal(input_ids=torch.tensor([r["ids"]])).logits[0] for r in records]
        with policy.reference():
            base = policy.causal(input_ids=torch.tensor([records[0]["ids"]])).logits[0]
    assert (base - logits[0]).abs().max() > 0.1, "the adapter must matter"
    return path, logits


def outside_logits(
    kind: str, base: Path, folder: Path, rows: Path, tmp_path: Path, python: str = sys.executable
) -> tuple[list[torch.Tensor], str]:
    from safetensors.torch import load_file

    out = tmp_path / "logits.safetensors"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-c", OUTSIDE, kind, str(base), str(folder), str(rows), str(out)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**environment, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_file(out)
    return [found[str(i)] for i in range(len(found))], done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize("kind", ["adapter", pytest.param("merged", marks=pytest.mark.slow)])
def test_it_loads_without_this_package(cli, run: Path, model_dir: Path, tmp_path: Path, kind: str) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / kind
    code, said, _ = cli("export", run, "--to", kind, "--out", out, "--json")
    facts = json.loads(said.splitlines()[-1])
    assert code == 0 and facts["compared_tokens"] >= 100
    assert facts["argmax_agreement"] == facts["greedy_agreement"] == 1.0
    assert facts["reward"] == facts["reward_adapter"]
    rows, mine = probe(run, tmp_path)
    theirs, stops = outside_logits(kind, model_dir, out, rows, tmp_path)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(b, a, atol=2e-5, rtol=1e-5)
    if kind == "merged":  # the folder has its stop tokens; an adapter uses its base's
        assert sorted(json.loads(stops)) == [256, 258]
    card = (out / "README.md").read_text("utf-8")
    assert "library_name: " + {"adapter": "peft", "merged": "transformers"}[kind] in card
    assert f"| compared tokens | {facts['compared_tokens']} |" in card and "license: other" in card
    figures = json.loads((run / "eval" / "after" / "figures.json").read_text())
    low, high = figures["pass@1_ci95"]
    assert f"{figures['pass@1']:.1%} (95%: {low:.1%} to {high:.1%})" in card
    # An existing folder is not touched.
    stamp = (out / "README.md").stat().st_mtime_ns
    assert cli("export", run, "--to", kind, "--out", out)[0] == 2
    assert (out / "README.md").stat().st_mtime_ns == stamp


def test_an_nf4_run_merges_onto_its_dequantized_base(
    cli,  # type: ignore[no-untyped-def]
    run_nf4: Path,
    tmp_path: Path,
    model_dir: Path,
) -> None:
    code, said, _ = cli("export", run_nf4, "--to", "merged", "--out", tmp_path / "a", "--json")
    facts = json.loads(said.splitlines()[-1])
    assert code == 0 and facts["onto"] == "dequantized"
    assert facts["argmax_agreement"] == facts["agreement_dequantized"] >= 0.99 > facts["agreement_original"]
    rows, mine = probe(run_nf4, tmp_path)
    theirs, _ = outside_logits("merged", model_dir, tmp_path / "a", rows, tmp_path)
    worst = max(float((a - b).abs().max()) for a, b in zip(mine, theirs, strict=True))
    assert worst < 1e-4
    # Onto the original base it is a different model: the command refuses and leaves nothing.
    code, _, err = cli("export", run_nf4, "--to", "merged", "--onto", "original", "--out", tmp_path / "b")
    assert code == 1 and "nothing was written" in err.splitlines()[-1]
    assert [p.name for p in tmp_path.iterdir() if "b" in p.name.split("-")[0].lstrip(".")] == []


def test_onto_original_uses_the_base_on_disk(
    run_nf4: Path, model_dir: Path, tmp_path: Path, grader, monkeypatch
) -> None:  # type: ignore[no-untyped-def]
    """--onto original writes W + scale B A for the unquantized W, tensor by tensor."""
    from safetensors.torch import load_file

    monkeypatch.setattr(merged, "THRESHOLD", 0.0)
    target = resolve_target(str(run_nf4))
    merged.export(target, tmp_path / "o", grader, onto="original")
    written, base = (
        load_file(tmp_path / "o" / "model.safetensors"),
        load_file(model_dir / "model.safetensors"),
    )
    lora = load_file(run_nf4 / "adapter" / "adapter_model.safetensors")
    assert written.keys() == base.keys()
    changed = 0
    for name, tensor in base.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" in lora:
            changed += 1
            tensor = tensor + (8 / 4) * lora[f"{stem}.lora_B.weight"] @ lora[f"{stem}.lora_A.weight"]
        torch.testing.assert_close(written[name], tensor, atol=1e-6, rtol=1e-6)
    assert changed == 2 * 7


@pytest.mark.parametrize("sabotage", ["a layer without its delta", "another adapter", "a scaled head"])
def test_an_export_that_behaves_differently_is_refused(  # type: ignore[no-untyped-def]
    run: Path, tmp_path: Path, grader, monkeypatch, sabotage: str
) -> None:
    whole = merged.merged_tensors

    def wrong(policy, dtype):  # type: ignore[no-untyped-def]
        with torch.no_grad():
            for name, parameter in policy.trainable().items():
                if sabotage == "another adapter" or (sabotage[2:7] == "layer" and "layers.1" in name):
                    parameter.mul_(-1.0 if "lora_B" in name and sabotage == "another adapter" else 1.0)
                    if "lora_B" in name and sabotage[2:7] == "layer":
                        parameter.zero_()
        for name, tensor in whole(policy, dtype):
            yield name, -tensor if sabotage == "a scaled head" and name == "model.norm.weight" else tensor

    monkeypatch.setattr(merged, "merged_tensors", wrong)
    with pytest.raises(CheckFailed, match="nothing was written"):
        merged.export(resolve_target(str(run)), tmp_path / "m", grader)
    assert list(tmp_path.iterdir()) == []


def test_sizes_and_shards(run: Path, tmp_path: Path, grader, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    from safetensors.torch import load_file

    one = merged.export(resolve_target(str(run)), tmp_path / "one", grader)
    monkeypatch.setattr(merged, "SHARD", 40_000)
    many = merged.export(resolve_target(str(run)), tmp_path / "many", grader)
    shards = sorted((tmp_path / "many").glob("model-*.safetensors"))
    assert len(shards) > 3 and many["argmax_agreement"] == one["argmax_agreement"] == 1.0
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())["weight_map"]
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert index.keys() == whole.keys() and {p.name for p in shards} == set(index.values())
    for path in shards:
        for name, tensor in load_file(path).items():
            assert index[name] == path.name and torch.equal(tensor, whole[name])


def test_a_full_disk_is_reported_before_anything_is_written(
    run: Path, tmp_path: Path, grader, monkeypatch
) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("empg_lite.run.store._free_bytes", lambda path: 10_000)
    with pytest.raises(StorageError, match="not enough disk space"):
        merged.export(resolve_target(str(run)), tmp_path / "m", grader)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_in_half_precision(cli, run: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    from safetensors.torch import load_file

    step = run / "checkpoints" / "step-000003"
    code, said, _ = cli(
        "export", step, "--to", "merged", "--dtype", "float16", "--out", tmp_path / "m", "--json"
    )
    if code == 0:
        assert json.loads(said.splitlines()[-1])["dtype"] == "float16"
        assert {t.dtype for t in load_file(tmp_path / "m" / "model.safetensors").values()} == {torch.float16}
        assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == "float16"
    assert code in (0, 1)  # a random model has near ties: half precision may change over 1% of the tokens


def test_sft_dataset_holds_the_distinct_right_rationales(cli, run: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    from datasets import load_dataset

    out = tmp_path / "sft.jsonl"
    code, said, _ = cli("export", run, "--to", "sft-dataset", "--out", out, "--json")
    facts = json.loads(said.splitlines()[-1])
    stored = [
        r
        for step in (1, 2, 3)
        for s in read_rollouts(run / "rollouts" / f"step-{step:06d}.jsonl")
        for r in s.rationales
        if r.reward == 1 and r.finish_reason == "stop"
    ]
    distinct = {(r.problem_id, r.completion): r for r in stored}
    assert code == 0 and facts["rows"] == len(distinct) > 0
    assert facts["duplicates"] == len(stored) - len(distinct)
    rows = load_dataset("json", data_files=str(out), split="train", cache_dir=str(tmp_path / "cache"))
    assert {(r["problem_id"], r["completion"]) for r in rows} == distinct.keys()
    for row in rows:
        r = distinct[row["problem_id"], row["completion"]]
        assert (row["prompt"], row["gold"], row["tokens"]) == (r.prompt, r.gold, len(r.completion_ids))
    from trl.data_utils import is_conversational

    assert {"prompt", "completion"} <= set(rows.column_names) and not is_conversational(rows[0])
    assert cli("export", run, "--to", "sft-dataset", "--out", out)[0] == 0, "the same rows again"
    out.write_text("theirs")
    code, _, err = cli("export", run, "--to", "sft-dataset", "--out", out)
    assert code == 2 and "another file exists" in err and out.read_text() == "theirs"


class Hub:
    """A hub that records its calls, or refuses."""

    def __init__(self, refuse: bool = False) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.files: dict[str, int] = {}
        self.refuse = refuse

    def create_repo(self, repo: str, **options: Any) -> str:
        self.calls.append((repo, options))
        if self.refuse:
            raise ConnectionError("unreachable")
        return f"https://hub/{repo}"

    def upload_folder(self, *, repo_id: str, folder_path: Path, **options: Any) -> None:
        self.files = {p.name: p.stat().st_size for p in Path(folder_path).iterdir()}


def test_upload_sends_the_adapter_to_the_given_repo_only(cli, run: Path, grader) -> None:  # type: ignore[no-untyped-def]
    fake = Hub()
    facts = hub.export(resolve_target(str(run)), Path("unused"), grader, repo="me/mine", api=fake)
    assert (
        fake.calls == [("me/mine", {"private": True, "exist_ok": True})]
        and facts["export"] == "https://hub/me/mine"
    )
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md"} <= fake.files.keys()
    assert not any(name.startswith(("optimizer", "rng", "state")) for name in fake.files)
    with pytest.raises(Exception, match="unreachable"):
        hub.export(resolve_target(str(run)), Path("unused"), grader, repo="me/mine", api=Hub(refuse=True))
    for arguments in (("--to", "hub"), ("--to", "merged", "--repo", "me/mine")):
        code, _, err = cli("export", run, *arguments)
        assert code == 2 and "--repo" in err.splitlines()[-1]
    # The tests run offline: also a one-line error.
    code, _, err = cli("export", run, "--to", "hub", "--repo", "me/mine")
    assert code == 66 and err.splitlines()[-1].startswith("error: upload to the hub failed")


def test_what_cannot_be_exported(cli, tmp_path: Path, model_dir: Path) -> None:  # type: ignore[no-untyped-def]
    assert cli("export", tmp_path, "--to", "merged")[0] in (2, 66)
    assert cli("export", tmp_path / "none", "--to", "merged")[0] == 66
    assert cli("export", "--to", "onnx")[0] == 2


@pytest.mark.parametrize("missing", [{"gguf"}, {"llama_cpp", "xllamacpp"}])
def test_gguf_names_the_missing_packages(
    cli, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: set[str]
) -> None:  # type: ignore[no-untyped-def]
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in missing else find(name, *a)
    )
    code, _, err = cli("export", run, "--to", "gguf", "--out", tmp_path / "g")
    assert code == 2 and "pip install gguf xllamacpp" in err and not (tmp_path / "g").exists()


@pytest.mark.slow
@pytest.mark.gguf
@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
def test_llama_cpp_runs_the_gguf(tmp_path: Path, grader, kind: str, package: str, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """With the bundled model: llama.cpp rejects the fixture's tokenizer, which has no merges."""
    pytest.importorskip(package, reason=f"{package} is not installed (extra: gguf)")
    pytest.importorskip("gguf", reason="gguf is not installed (extra: gguf)")
    monkeypatch.setattr(llama, "installed_package", lambda: package)
    from empg_lite import api

    short = {"run.steps": 3, "run.eval_every": 0, "optim.learning_rate": 0.02}
    run = api.run("tiny", tmp_path / "run", overrides=short).path
    facts = gguf.export(resolve_target(str(run)), tmp_path / "g", grader, kind=kind)
    assert facts["compared_tokens"] >= 1000 and facts["argmax_agreement"] >= 0.95
    assert (tmp_path / "g" / f"model-{kind}.gguf").is_file()
    print(f"{kind}: {facts['argmax_agreement']:.2%} of {facts['compared_tokens']} tokens")
    if kind == "f32":
        assert facts["argmax_agreement"] >= 0.998
        write = gguf.write_gguf
        monkeypatch.setattr(gguf, "write_gguf", lambda p, f, k, name: _without_delta(write, p, f, k, name))
        with pytest.raises(CheckFailed, match="llama.cpp"):
            gguf.export(resolve_target(str(run)), tmp_path / "bad", grader, kind=kind)
        assert not (tmp_path / "bad").exists()


def _without_delta(write, policy, file, kind, name) -> None:  # type: ignore[no-untyped-def]
    with policy.reference():
        write(policy, file, kind, name=name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_it_loads_in_a_fresh_environment(cli, run: Path, model_dir: Path, tmp_path: Path, kind: str) -> None:  # type: ignore[no-untyped-def]
    """A new virtual environment with torch, transformers and peft, without this package."""
    assert cli("export", run, "--to", kind, "--out", tmp_path / kind)[0] == 0
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    constraints = Path(__file__).parents[2] / "constraints.txt"
    wanted = ["torch", "transformers", "peft", "safetensors", "numpy"]
    subprocess.run([python, "-m", "pip", "install", "-q", "-c", str(constraints), *wanted], check=True)
    listed = subprocess.run([python, "-m", "pip", "list"], capture_output=True, text=True, check=True).stdout
    assert "empg" not in listed
    rows, mine = probe(run, tmp_path)
    theirs, _ = outside_logits(kind, model_dir, tmp_path / kind, rows, tmp_path, python)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(b, a, atol=2e-5, rtol=1e-5)
