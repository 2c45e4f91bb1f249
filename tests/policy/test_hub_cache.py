"""A hub model missing from the cache, or incomplete there: one line, fast. Slow: a process for each case."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fixture_recipe import write_recipe
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.slow

REPOSITORY, REVISION = "someone/model", "0" * 40


def cached(home: Path, model_dir: Path, *, without: tuple[str, ...] = ()) -> Path:
    """The fixture model as the hub's library keeps one; its snapshot folder."""
    folder = home / "hub" / f"models--{REPOSITORY.replace('/', '--')}"
    snapshot = folder / "snapshots" / REVISION
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(model_dir, snapshot)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(REVISION, "utf-8")
    for name in without:
        (snapshot / name).unlink(missing_ok=True)
    return snapshot


def start(recipe: Path, home: Path, run: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """``train`` on the hub model, with a cache of its own."""
    command = [sys.executable, "-m", "empg_lite", "train", "--recipe", str(recipe), "--output-dir", str(run)]
    command += ["--set", f"model.name={REPOSITORY}", "--set", "run.steps=1", "--set", "run.eval_every=0"]
    given = {k: v for k, v in os.environ.items() if not k.lower().endswith("proxy") and k != "HF_HUB_OFFLINE"}
    given |= {"HF_HOME": str(home), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, env=given, capture_output=True, text=True, timeout=600, check=False)


def cut(snapshot: Path) -> None:
    data = (snapshot / "model.safetensors").read_bytes()
    (snapshot / "model.safetensors").write_bytes(data[:-100])


def in_two(snapshot: Path) -> Path:
    """The weights in two files with an index; the second file."""
    weights = load_file(snapshot / "model.safetensors")
    (snapshot / "model.safetensors").unlink()
    names, where = sorted(weights), {}
    for n, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{n}-of-00002.safetensors"
        save_file({k: weights[k] for k in part}, snapshot / file, {"format": "pt"})
        where |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": where}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    return snapshot / "model-00002-of-00002.safetensors"


def without_a_tensor(snapshot: Path) -> None:
    weights = load_file(snapshot / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, snapshot / "model.safetensors", {"format": "pt"})


TOKENIZER = ("vocab.json", "merges.txt", "tokenizer_config.json", "tokenizer.json")
WEIGHTS = ("model.safetensors",)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (None, f"hf download {REPOSITORY}"),
        (
            lambda h, m: cached(h, m, without=(*TOKENIZER, *WEIGHTS, "generation_config.json")),
            "weights",
        ),
        (lambda h, m: cached(h, m, without=WEIGHTS), "weights"),
        (lambda h, m: cached(h, m, without=TOKENIZER), "tokenizer"),
        (lambda h, m: cut(cached(h, m)), "damaged safetensors"),
        (lambda h, m: in_two(cached(h, m)).unlink(), "model-00002-of-00002.safetensors is missing"),
        (lambda h, m: without_a_tensor(cached(h, m)), "tensor model.norm.weight is missing"),
    ],
    ids=["empty", "config", "no weights", "no tokenizer", "cut off", "a shard missing", "a tensor missing"],
)
def test_offline(
    tmp_path: Path,
    model_dir: Path,
    make: Callable[[Path, Path], object] | None,
    said: str,
) -> None:
    home = tmp_path / "home"
    if make is not None:
        make(home, model_dir)
    done = start(write_recipe(tmp_path, model_dir), home, tmp_path / "run", HF_HUB_OFFLINE="1")
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 66 and last.startswith("error: ") and said in last, done.stderr[-800:]
    assert not (tmp_path / "run" / "rollouts").exists()


@pytest.mark.parametrize("shards", [1, 2])
def test_a_complete_cache_trains_offline(tmp_path: Path, model_dir: Path, shards: int) -> None:
    snapshot = cached(tmp_path / "home", model_dir)
    if shards == 2:
        in_two(snapshot)
    recipe = write_recipe(tmp_path, model_dir)
    done = start(recipe, tmp_path / "home", tmp_path / "run", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr[-800:]


def test_a_network_that_never_answers(tmp_path: Path, model_dir: Path) -> None:
    """A proxy that takes the connection and never answers."""
    with socket.socket() as hole:
        hole.bind(("127.0.0.1", 0))
        hole.listen(64)
        proxy = f"http://127.0.0.1:{hole.getsockname()[1]}"
        recipe = write_recipe(tmp_path, model_dir)
        done = start(recipe, tmp_path / "home", tmp_path / "run", HTTPS_PROXY=proxy, HTTP_PROXY=proxy)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 66 and REPOSITORY in last, done.stderr[-800:]
