"""A GGUF file becomes a model folder: the model that it was made of, and that transformers reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_model import SPECIAL, small_llama, vocabulary, write_gguf

from empg_lite.core.bundled import PACKAGED, gguf_file
from empg_lite.core.errors import ModelUnusable
from empg_lite.policy import from_gguf, load_tokenizer
from empg_lite.policy.from_gguf import model_files
from empg_lite.policy.integrity import check_config, check_weights
from empg_lite.policy.memory.shape import read_shape, shape_of

IDS = torch.tensor([[5, 40, 77, 3, 90, 41, 41, 200, 17, 6, 120, 33]])


@pytest.fixture(scope="module")
def model() -> Any:
    return small_llama()


@pytest.fixture(scope="module", params=["F32", "Q8_0", "Q4_1"])
def file(request: pytest.FixtureRequest, model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / f"{request.param}.gguf", model, request.param)


def unpacked(file: Path, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for name, data in model_files(file).items():
        (folder / name).write_bytes(data)
    return folder


def load(folder: Path, **flags: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **flags).eval()


def test_the_model_is_the_one_that_transformers_reads(file: Path, model: Any, tmp_path: Path) -> None:
    """Every tensor but for rounding to float16, and the logits; unquantized, also those of the original."""
    folder = unpacked(file, tmp_path / "folder")
    check_config(folder)
    check_weights(folder)
    ours, theirs = load(folder), load(file.parent, gguf_file=file.name)
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    for name, tensor in ours.state_dict().items():
        rounded = expected[name].half().float() if tensor.ndim == 2 else expected[name]
        assert torch.equal(tensor, rounded), name
    with torch.no_grad():
        logits = ours(IDS).logits
        torch.testing.assert_close(logits, theirs(IDS).logits, rtol=0, atol=0.03)
        assert logits.std() > 1, "logits that would show a difference"
        if file.stem == "F32":
            torch.testing.assert_close(logits, model(IDS).logits, rtol=0, atol=0.03)
    config = json.loads((folder / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5 and config["rope_parameters"]["rope_theta"] == 1e4
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)


def test_rows_in_llama_cpps_order_would_show(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: rotating the wrong pairs of rows changes the logits by more than the tolerance."""
    file = write_gguf(tmp_path / "f.gguf", model)
    monkeypatch.setattr(from_gguf, "_halves", lambda weight, heads: weight)
    with torch.no_grad():
        wrong = load(unpacked(file, tmp_path / "folder"))(IDS).logits
        assert (wrong - model(IDS).logits).abs().max() > 0.3


def test_the_tokenizer(model: Any, tmp_path: Path) -> None:
    folder = unpacked(write_gguf(tmp_path / "f.gguf", model), tmp_path / "folder")
    tokenizer = load_tokenizer(folder)[0]
    tokens, _ = vocabulary()
    assert [tokenizer.convert_ids_to_tokens(i) for i in range(len(tokenizer))] == tokens
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == SPECIAL[1:] + SPECIAL[2:]
    assert tokenizer.tokenize("in the 120") == ["in", "Ġthe", "Ġ", "1", "2", "0"]
    assert tokenizer.encode("<|im_start|>in<|im_end|>") == [1, tokens.index("in"), 2], "nothing is added"
    text = "Zoë paid €3.50\n\n  4 · 你好 ١٢ \U0001f600"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert load_tokenizer(folder)[1] == (), "no note: nothing had to be mended"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("cut", r"damaged GGUF file .* install or fetch it again"),
        ("text", r"damaged GGUF file"),
        ("architecture", r"a GGUF file of qwen2/gpt2/smollm, not llama"),
    ],
)
def test_a_file_that_is_no_smollm2_is_refused(damage: str, message: str, model: Any, tmp_path: Path) -> None:
    file = write_gguf(
        tmp_path / "f.gguf", model, architecture="qwen2" if damage == "architecture" else "llama"
    )
    data = file.read_bytes()
    file.write_bytes({"cut": data[:-200_000], "text": b"hello" * 9}.get(damage, data))
    with pytest.raises(ModelUnusable, match=message) as refused:
        model_files(file)
    assert "\n" not in str(refused.value) and str(file) in str(refused.value)


def test_a_tensor_that_llama_lacks_is_named(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gguf(tmp_path / "f.gguf", model)
    monkeypatch.delitem(from_gguf._LAYER, "ffn_gate")
    with pytest.raises(ModelUnusable, match=r"a tensor that a Llama model does not have \('ffn_gate'\)"):
        model_files(file)


# --- the real file ----------------------------------------------------------------------------------------

#: Ids by llama.cpp (its server's /tokenize, build 11549) of the packaged file.
BY_LLAMA_CPP = {
    "What is 17 + 25?\nStep 1: 17 + 25 = 42. #### 42": [
        1780, 314, 216, 33, 39, 1232, 216, 34, 37, 47, 198, 3512, 216, 33, 42, 216, 33, 39, 1232, 216, 34, 37,
        446, 216, 36, 34, 30, 32713, 216, 36, 34],
    "Zoë paid €3.50 — half of 7½ · \\boxed{\\frac{1}{2}}": [
        74, 95, 26547, 5940, 24927, 35, 30, 37, 32, 1841, 2745, 282, 216, 39, 16738, 13559, 3814, 4810, 277,
        26754, 18169, 107, 33, 15009, 34, 17859],
    "  x\n\n\ty's it'll": [216, 1792, 1116, 197, 105, 506, 357, 3060],
    "你好 ١٢٣ \U0001f600": [18645, 250, 48392, 138, 216, 164, 111, 164, 112, 164, 113, 40303, 218],
    "a\n\n4 b  5": [81, 1116, 36, 278, 256, 37],
}  # fmt: skip


@pytest.mark.smollm2
@pytest.mark.slow
def test_smollm2_itself(tmp_path: Path) -> None:
    """Its sizes, its tokens as llama.cpp splits them, and that it knows some English."""
    packaged = PACKAGED["smollm2-135m"]
    if (file := gguf_file(packaged)) is None:
        pytest.skip(f"{packaged.package} is not installed (extra: {packaged.extra})")
    folder = unpacked(file, tmp_path / "folder")
    assert shape_of(check_config(folder), "") == read_shape("smollm2-135m")
    check_weights(folder)
    tokenizer, notes = load_tokenizer(folder)
    assert not notes and tokenizer.eos_token == "<|im_end|>"
    for text, ids in BY_LLAMA_CPP.items():
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == text
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        best = load(folder)(**prompt).logits[0, -1].argmax()
    assert tokenizer.decode(best) == " Paris"
