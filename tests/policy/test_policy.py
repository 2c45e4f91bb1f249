"""The policy against plain transformers, and what it refuses to load."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from fixture_model import load_fixture_policy

from empg_lite.core.errors import DataError, MissingInput, ModelUnusable, RecipeError, UsageError
from empg_lite.core.sizes import LOGIT_CHUNK
from empg_lite.policy import load_template
from empg_lite.policy.adapter import adapter_files, load_adapter
from empg_lite.policy.integrity import check_config, check_weights, resolve_model
from empg_lite.policy.logprobs import chosen_logprobs
from empg_lite.policy.policy import Batch, collate
from empg_lite.policy.templates import TEMPLATES

ROWS = [((1, 2, 3), (4, 5, 6, 256)), ((9,), (8, 7)), ((20, 21, 22, 23, 24), (25,)), ((5, 5), ())]


def reference_logprobs(policy, prompt, completion):  # type: ignore[no-untyped-def]
    """log softmax of the whole model's logits on one unpadded row."""
    ids = torch.tensor([[*prompt, *completion]])
    with torch.no_grad():
        logits = policy.model(input_ids=ids).logits.double()
    logprobs = logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
    return logprobs.gather(-1, torch.tensor(completion, dtype=torch.long)[:, None]).squeeze(-1)


# --- log-probabilities --------------------------------------------------------------------------------


def test_token_logprobs_equal_the_unpadded_forward(policy) -> None:  # type: ignore[no-untyped-def]
    with torch.no_grad():
        logprobs, mask = policy.token_logprobs(collate(ROWS, policy.pad_id))
    assert logprobs.dtype == torch.float32 and logprobs.shape == mask.shape == (4, 6)
    for row, (prompt, completion) in enumerate(ROWS):
        assert mask[row].sum() == len(completion)
        if completion:
            expected = reference_logprobs(policy, prompt, completion)
            torch.testing.assert_close(logprobs[row][mask[row]].double(), expected, rtol=1e-5, atol=1e-5)
    assert (logprobs[~mask] == 0).all()


def test_the_adapter_matters_and_reference_switches_it_off(model_dir: Path) -> None:
    policy = load_fixture_policy(model_dir)
    bare = load_fixture_policy(model_dir, perturb=False)
    batch = collate(ROWS[:3], policy.pad_id)
    with torch.no_grad():
        tuned, mask = policy.token_logprobs(batch)
        with policy.reference():
            reference, _ = policy.token_logprobs(batch)
        base, _ = bare.token_logprobs(batch)
        again, _ = policy.token_logprobs(batch)
    assert torch.equal(reference, base)
    assert torch.equal(tuned, again)
    assert (tuned - base)[mask].abs().max() > 1e-2


def test_padding_does_not_leak(policy) -> None:  # type: ignore[no-untyped-def]
    narrow = collate(ROWS[:2], policy.pad_id)
    wide_ids = torch.nn.functional.pad(narrow.input_ids, (0, 9), value=123)
    wide = Batch(wide_ids, torch.nn.functional.pad(narrow.completion_mask, (0, 9)))
    with torch.no_grad():
        (a, mask), (b, wide_mask) = policy.token_logprobs(narrow), policy.token_logprobs(wide)
    torch.testing.assert_close(a[mask], b[wide_mask], rtol=1e-6, atol=1e-6)


def test_collate_masks_by_length_not_by_id() -> None:
    batch = collate([((0, 0), (0, 0, 0)), ((1,), (0,))], pad_id=0)
    assert batch.completion_mask.tolist() == [
        [False, False, True, True, True],
        [False, True, False, False, False],
    ]
    with pytest.raises(AssertionError, match="prompt needs at least one token"):
        collate([((), (1,))], pad_id=0)


@pytest.mark.parametrize("chunk", [1 << 24, 700, 1])
def test_chunked_head_value_and_gradient(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setitem(LOGIT_CHUNK, "cpu", chunk)
    torch.manual_seed(0)
    hidden = torch.randn(37, 16, requires_grad=True)
    weight, targets, grad = torch.randn(301, 16), torch.randint(0, 301, (37,)), torch.randn(37)
    chosen = chosen_logprobs(hidden, weight, targets)
    chosen.backward(grad)
    reference = hidden.detach().double().requires_grad_()
    full = (reference @ weight.double().T).log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    full.backward(grad.double())
    torch.testing.assert_close(chosen.double(), full, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden.grad.double(), reference.grad, rtol=1e-4, atol=1e-5)


def test_no_full_logits_ever_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor made at V = 151,936 stays at a chunk, forward and backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    hidden = torch.randn(512, 8, requires_grad=True)
    weight, targets = torch.randn(151_936, 8), torch.randint(0, 151_936, (512,))
    with Watch():
        chosen_logprobs(hidden, weight, targets).sum().backward()
    assert 151_936 <= largest <= LOGIT_CHUNK["cpu"] < 512 * 151_936


def test_gradient_reaches_every_lora_matrix(model_dir: Path) -> None:
    policy = load_fixture_policy(model_dir)
    with policy.training():
        logprobs, _ = policy.token_logprobs(collate(ROWS[:3], policy.pad_id))
        logprobs.sum().backward()
    parameters = policy.trainable()
    assert len(parameters) == 2 * 7 * 2  # layers x linears x (A, B)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters.values())
    assert not any(p.requires_grad for n, p in policy.model.named_parameters() if "lora_" not in n)


def test_gradient_checkpointing_changes_no_gradient(model_dir: Path) -> None:
    from empg_lite.policy import load_policy
    from empg_lite.recipe.schema import ModelSection

    section = ModelSection(
        name=str(model_dir), backend="transformers", load_in_4bit=False, lora_r=4, lora_alpha=8
    )
    grads = []
    for checkpointing in (False, True):
        policy = load_policy(section, "plain", seed=0, gradient_checkpointing=checkpointing)
        with policy.training():
            policy.token_logprobs(collate(ROWS[:3], policy.pad_id))[0].sum().backward()
        grads.append({n: p.grad for n, p in policy.trainable().items()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-5, atol=1e-7)
    assert any(g.abs().max() > 0 for g in grads[0].values())


@pytest.mark.parametrize("left", [True, False])
def test_an_nf4_base_does_not_keep_its_file_mapped(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: bool
) -> None:
    """Its 16-bit weights would stay resident beside the quantised ones; the control is without the copy."""
    from empg_lite.policy import backends

    if not left:
        monkeypatch.setattr(backends, "copy_out_of_file", lambda model: None)
    own = shutil.copytree(model_dir, tmp_path / "own")  # other tests hold the shared one
    held = load_fixture_policy(own, load_in_4bit=True)
    maps = Path("/proc/self/maps").read_text("utf-8")
    assert (str(own / "model.safetensors") in maps) is not left
    assert held.model is not None


def test_nf4_base_trains_and_stays_unchanged(model_dir: Path) -> None:
    policy = load_fixture_policy(model_dir, load_in_4bit=True)
    frozen = {n: p.detach().clone() for n, p in policy.model.named_parameters() if not p.requires_grad}
    assert any(p.dtype == torch.uint8 for p in frozen.values()), "the linears are NF4"
    batch = collate(ROWS[:3], policy.pad_id)
    gradients = []
    for _ in range(2):  # sampling in between must not repack the weights
        with policy.sampling():
            policy.backbone(batch.input_ids, use_cache=False)
        with policy.training():
            logprobs, _ = policy.token_logprobs(batch)
            logprobs.sum().backward()
        gradients.append({n: p.grad.clone() for n, p in policy.trainable().items()})
        policy.model.zero_grad()
    assert all(torch.equal(g, gradients[1][n]) for n, g in gradients[0].items())
    for name, parameter in policy.model.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter, frozen[name]), name


def test_seed_initializes_the_adapter(model_dir: Path) -> None:
    from empg_lite.policy import load_policy
    from empg_lite.recipe.schema import ModelSection

    section = ModelSection(
        name=str(model_dir), backend="transformers", load_in_4bit=False, lora_r=4, lora_alpha=8
    )
    hashes = [load_policy(section, "plain", seed=s).adapter_sha256() for s in (0, 0, 1)]
    assert hashes[0] == hashes[1] != hashes[2]


# --- adapter files ------------------------------------------------------------------------------------


def test_adapter_round_trip_and_plain_peft(model_dir: Path, tmp_path: Path) -> None:
    policy = load_fixture_policy(model_dir)
    for name, data in adapter_files(policy).items():
        (tmp_path / name).write_bytes(data)
    other = load_fixture_policy(model_dir, perturb=False)
    assert other.adapter_sha256() != policy.adapter_sha256()
    load_adapter(other, tmp_path)
    assert other.adapter_sha256() == policy.adapter_sha256()

    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32), tmp_path
    )
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, policy.model(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("damage", "error", "what"),
    [
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\x00" * 100), DataError, "damaged"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), MissingInput, "not an adapter"),
        (lambda f: (f / "adapter_config.json").write_text("{"), DataError, "cannot be read"),
        (
            lambda f: (f / "adapter_config.json").write_text('{"peft_type": "IA3", "r": 4, "lora_alpha": 1}'),
            DataError,
            "IA3",
        ),
    ],
)
def test_broken_adapters_are_named(model_dir: Path, tmp_path: Path, damage, error, what: str) -> None:  # type: ignore[no-untyped-def]
    policy = load_fixture_policy(model_dir)
    for name, data in adapter_files(policy).items():
        (tmp_path / name).write_bytes(data)
    damage(tmp_path)
    with pytest.raises(error, match=what):
        load_adapter(policy, tmp_path)


def test_a_nan_adapter_is_refused(model_dir: Path, tmp_path: Path) -> None:
    policy = load_fixture_policy(model_dir)
    with torch.no_grad():
        next(iter(policy.trainable().values()))[0, 0] = float("nan")
    for name, data in adapter_files(policy).items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match="NaN"):
        load_adapter(load_fixture_policy(model_dir), tmp_path)


# --- prompts and stops --------------------------------------------------------------------------------


def test_stop_tokens_are_the_union_of_all_sources(policy) -> None:  # type: ignore[no-untyped-def]
    assert policy.stop_ids == {256, 258}  # <|endoftext|> of model and tokenizer, <|im_end|> of ChatML
    assert policy.encode_completion("a")[-1] == 256


@pytest.mark.shared
def test_qwen_prompt_is_the_models_own_chat_template(shared: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizer-qwen2.5")
    template = TEMPLATES["qwen-boxed"]
    system = template.text.split("<|im_end|>")[0].removeprefix("<|im_start|>system\n")
    messages = [{"role": "system", "content": system}, {"role": "user", "content": "What is 2 + 2?"}]
    own = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert template.render("What is 2 + 2?") == own
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert tokenizer.encode(own, add_special_tokens=False) == ids


@pytest.mark.shared
@pytest.mark.parametrize("folder", ["tokenizer-qwen2.5", "tokenizer-qwen2.5/base"])
def test_qwen_stops_on_both_of_its_end_tokens(shared: Path, tmp_path: Path, folder: str) -> None:
    """Base says <|endoftext|>, Instruct <|im_end|>; whatever one of them says, either ends a completion."""
    from types import SimpleNamespace

    from transformers import AutoTokenizer

    from empg_lite.policy.tokens import stop_ids

    for name in ("vocab.json", "merges.txt", "tokenizer.json"):
        (tmp_path / name).symlink_to(shared / "tokenizer-qwen2.5" / name)
    (tmp_path / "tokenizer_config.json").symlink_to(shared / folder / "tokenizer_config.json")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = SimpleNamespace(config=SimpleNamespace(eos_token_id=tokenizer.eos_token_id))
    assert stop_ids(model, tokenizer, TEMPLATES["qwen-boxed"]) == {151643, 151645}


def test_a_template_file_brings_its_stops(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text('text: "Q: {question}\\nA:"\nstop: ["\\nQ:"]\nend: "<|im_end|>"\n')
    template = load_template(str(path))
    assert template.render("{x}?") == "Q: {x}?\nA:"
    assert (template.stop, template.end, template.name) == (("\nQ:",), "<|im_end|>", "mine")
    (tmp_path / "bare.txt").write_text("{question} =")
    assert load_template(str(tmp_path / "bare.txt")).render("1") == "1 ="


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("text: no hole", "{question} exactly once"),
        ("text: '{question} {question}'", "exactly once"),
        ("stop: []", "needs a `text`"),
        ("text: '{question}'\nstops: []", "unknown key.*stops"),
        ("text: '{question}'\nstop: x", "list of non-empty strings"),
        ("text: '{question}'\nstop: ['']", "list of non-empty strings"),
        ("text: ['", "not YAML"),
    ],
)
def test_broken_templates_are_named(tmp_path: Path, text: str, what: str) -> None:
    path = tmp_path / "t.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=what):
        load_template(str(path))
    with pytest.raises(MissingInput, match="did you mean plain"):
        load_template("plian")


# --- integrity ----------------------------------------------------------------------------------------


def rewrite(folder: Path, change) -> None:  # type: ignore[no-untyped-def]
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def drop_a_tensor(folder: Path) -> None:
    rewrite(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))


def reshape_a_tensor(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"model.norm.weight": torch.ones(3)}))


def truncate_weights(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])


def huge_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 40) + b"{}")


def set_config(**values: object):  # type: ignore[no-untyped-def]
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def drop_tokenizer(folder: Path) -> None:
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "tokenizer.json"):
        (folder / name).unlink(missing_ok=True)


def wrong_tokenizer_json(folder: Path) -> None:
    """A tokenizer.json that splits otherwise than the class that transformers builds."""
    from tokenizers import Tokenizer, pre_tokenizers
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=False), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize(
    ("damage", "error", "what"),
    [
        (drop_a_tensor, ModelUnusable, "tensor model.layers.1.mlp.up_proj.weight is missing"),
        (reshape_a_tensor, ModelUnusable, r"model.norm.weight has shape \(3,\)"),
        (truncate_weights, ModelUnusable, "damaged safetensors"),
        (huge_header, ModelUnusable, "damaged safetensors"),
        (lambda f: (f / "model.safetensors").unlink(), MissingInput, "no \\*.safetensors"),
        (lambda f: (f / "config.json").unlink(), MissingInput, "not a model folder"),
        (lambda f: (f / "config.json").write_text("["), ModelUnusable, "not JSON"),
        (set_config(model_type="gemma2"), ModelUnusable, "'gemma2' is not supported"),
        (set_config(auto_map={"AutoModel": "x.y"}), ModelUnusable, "remote code"),
        (set_config(vocab_size=100), ModelUnusable, "tokenizer has|shape"),
        (drop_tokenizer, ModelUnusable, "tokenizer"),
        (wrong_tokenizer_json, ModelUnusable, "tokenizer splits text differently|does not round-trip"),
    ],
)
def test_a_damaged_model_is_refused(model_dir: Path, tmp_path: Path, damage, error, what: str) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path / "model"
    shutil.copytree(model_dir, folder)
    damage(folder)
    with pytest.raises(error, match=what) as raised:
        load_fixture_policy(folder)
    assert raised.value.exit_code == 66


def test_an_absent_model_is_missing_input(tmp_path: Path) -> None:
    for name in ("nobody/no-such-model", str(tmp_path / "absent"), "not a name"):
        with pytest.raises(MissingInput) as raised:
            resolve_model(name, None)
        assert raised.value.exit_code == 66


def test_intact_models_pass(model_dir: Path) -> None:
    check_weights(model_dir)
    assert check_config(model_dir)["model_type"] == "qwen2"


def test_unsloth_by_name_needs_unsloth(monkeypatch: pytest.MonkeyPatch) -> None:
    from empg_lite.policy import backends

    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="not installed"):
        backends.choose_backend("unsloth")
    assert backends.choose_backend("auto") == "transformers"
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: object())
    assert backends.choose_backend("auto") == "unsloth"
    assert backends.choose_backend("transformers") == "transformers"
