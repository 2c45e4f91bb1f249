"""What the GPU benchmark computes from its figures, and its rehearsal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import forced
import gpu_checks
import gpu_facts
import gpu_floor
import gpu_parts
import gpu_report
import pytest
import setting
from shapes import SHAPES, Shape

from empg_lite.sampler import Decoding, Prompt

FOLDER = Path(__file__).parents[2] / "benchmarks"
#: 2 layers, 4 hidden units, 2 heads of 2, one of them for keys and values; 10 tokens.
SMALL = Shape(hidden=4, intermediate=6, layers=2, heads=2, kv_heads=1, vocab=10)


@pytest.fixture(scope="module")
def learner() -> Any:
    return setting.tiny_learner("sampler.max_new_tokens=12")


def test_the_floor_of_decoding_by_hand() -> None:
    """A layer has 2 x 4 x 4 (q, o) + 2 x 4 x 2 (k, v) + 3 x 4 x 6 = 120 parameters, the head 40: 280."""
    assert SMALL.linear_parameters == 240 and SMALL.head_parameters == 40
    assert SMALL.cache_bytes(2) == 2 * 2 * 1 * 2 * 2 == 16
    lengths, prompt = [3, 1, 2], 5
    # Three positions with 3, 2, 1 living rows at contexts 5, 6, 7; memory is the limit.
    slow_memory = (3 * 560 + 16 * (3 * 5 + 2 * 6 + 1 * 7)) / 100.0
    assert gpu_floor.decode_floor(SMALL, lengths, prompt, 100.0, 1e12) == pytest.approx(slow_memory)
    # Products are the limit: 2 FLOP a parameter and living row.
    assert gpu_floor.decode_floor(SMALL, lengths, prompt, 1e12, 100.0) == pytest.approx(560 * 6 / 100.0)
    # In between, position by position: 560 bytes and more against 1680, 1120, 560 FLOP.
    mixed = max(560 + 240, 1680) + max(560 + 192, 1120) + max(560 + 112, 560)
    assert gpu_floor.decode_floor(SMALL, lengths, prompt, 1.0, 1.0) == pytest.approx(mixed)


def test_the_work_of_an_m_step_by_hand() -> None:
    """Two problems of two rows: prompts of 5 once each, 3 + 1 + 2 + 2 completion tokens."""
    assert gpu_floor.fit_flops(SMALL, [3, 1, 2, 2], 5, 2) == 4 * (240 * (8 + 10) + 40 * 8)


def test_the_floor_of_a_real_shape() -> None:
    """Half a billion parameters, 128 rows, 4.3 TB/s: about 0.14 s, as a spreadsheet had it."""
    lengths = forced.draw_lengths(128, mean=180, cap=512)
    assert 0.11 < gpu_floor.decode_floor(SHAPES["0.5B"], lengths, 150, 4.3e12, 7.8e14) < 0.18


def test_the_share_of_the_floor(tmp_path: Path) -> None:
    """A decode as quick as the floor has all of it; one twice as slow a half. Without rates there is none."""
    lengths, shape = forced.draw_lengths(8, mean=180, cap=512), SHAPES["tiny"]
    arguments = (shape, lengths, 150, 8, tmp_path)
    assert gpu_floor.of_floor("decode", 1.0, *arguments) == {}
    (tmp_path / gpu_floor.RATES).write_text(json.dumps({"bandwidth": 1e9, "matmul": 1e12}))
    least = gpu_floor.decode_floor(shape, lengths, 150, 1e9, 1e12)
    assert gpu_floor.of_floor("decode", 2 * least, *arguments)["of_floor"] == pytest.approx(0.5)
    flops = gpu_floor.fit_flops(shape, lengths, 150, 8)
    assert gpu_floor.of_floor("m-step", flops / 1e12, *arguments)["of_floor"] == pytest.approx(1.0)


def logprob_row(rival: str, **ways: float) -> dict[str, Any]:
    rows = {way: [[value], [1.0, 1.0]] for way, value in ways.items()}
    return {"part": "runs", "rival": rival, "shape": "s", "cap_gb": None, "figure": "logprobs", **rows}


def test_agreement_is_against_the_plain_paths_rows_alone() -> None:
    plain = logprob_row("empg", right=2.03, left=2.0, alone=2.0, packed=2.06)
    found = gpu_report.agreement([plain, logprob_row("empg-unsloth", right=2.0, left=3.5, alone=2.3)])
    most = {(r["rival"], r["way"]): r["most"] for r in found}
    assert most["empg-unsloth", "left"] == 1.5 and most["empg-unsloth", "alone"] == pytest.approx(0.3)
    assert ("empg", "alone") not in most and {r["mean"] for r in found} >= {0.5}
    holds = {(r["rival"], r["way"]): r["holds"] for r in found}
    assert holds == {
        ("empg", "right"): None,
        ("empg", "left"): True,
        ("empg", "packed"): True,
        ("empg-unsloth", "alone"): False,
        ("empg-unsloth", "right"): True,
        ("empg-unsloth", "left"): False,
    }
    assert gpu_report.agreement([logprob_row("empg-unsloth", alone=1.0)]) == []  # nothing to compare with


def test_kernels_are_told_apart_by_name() -> None:
    names = [
        "_rms_layernorm_forward",
        "_rope_embedding_QK",
        "_fg_kernel",
        "void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>(float*, unsigned char*)",
        "void pytorch_flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<64, 64>>",
        "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<>::Params)",
    ]
    found = gpu_checks.sorted_out(names)
    assert found["kinds"] == ["RMSNorm", "RoPE", "SwiGLU", "NF4 dequantization"]
    assert found["attention"] == ["flash", "efficient"]
    cudnn = "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_6_128x128x64"
    assert gpu_checks.sorted_out([cudnn])["attention"] == ["cudnn"]
    unfused = "void (anonymous namespace)::softmax_warp_forward<float, float, float, 7, false, false>"
    assert gpu_checks.sorted_out([unfused]) == {"kinds": [], "attention": ["math"]}
    plain = [
        "void at::native::vectorized_elementwise_kernel<4>",
        "ampere_bf16_s16816gemm",
        "triton_red_fused_0",
    ]
    assert gpu_checks.sorted_out(plain) == {"kinds": [], "attention": []}


def test_what_a_profile_has_to_show() -> None:
    def half(*attention: str, kinds: tuple[str, ...] = tuple(gpu_checks.KERNELS)) -> dict[str, Any]:
        return {"kinds": list(kinds), "attention": list(attention)}

    counts = {"engine": {"graphs_replayed": 9}, "replayed_before": {"graphs_replayed": 4}}
    said = {"kernels": ["add_norm", "rotate", "swiglu", "dequantize"], "fit": "unsloth, shared prefix"}
    good = {**counts, "sampling": half("flash", "efficient"), "fitting": half("flex")}
    good["policy"] = {**said, "notes": []}
    assert all(gpu_facts.kernel_checks(good, unsloth=True).values())

    def failed(**changed: Any) -> set[str]:
        checks = gpu_facts.kernel_checks({**good, **changed}, unsloth=True)
        return {what for what, holds in checks.items() if not holds}

    assert failed(replayed_before={"graphs_replayed": 9}) == {"graphs are replayed"}
    assert failed(sampling=half("flash", "cudnn")) == {"no cuDNN attention in sampling"}
    assert failed(fitting=half("math")) == {
        "attention of fitting is fused",
        "no unfused attention in fitting",
    }
    assert failed(sampling=half("flash", kinds=("RMSNorm", "RoPE"))) == {"Unsloth's SwiGLU in sampling"}
    assert failed(fitting=half("flex", kinds=("RoPE", "SwiGLU"))) == {"Unsloth's RMSNorm in fitting"}
    left_out = {"kernels": ["rotate", "swiglu"], "fit": "packed", "notes": ["add_norm: differs"]}
    assert failed(policy=left_out, fitting=half("flash", kinds=())) == {"nothing of Unsloth's is left out"}
    plain = {**good, "policy": {"kernels": ["plain torch"], "fit": "packed", "notes": []}}
    plain |= {"sampling": half("flash", kinds=("NF4 dequantization",)), "fitting": half("flash", kinds=())}
    assert all(gpu_facts.kernel_checks(plain, unsloth=False).values())


def test_greedy_tokens_may_part_at_ties_in_16_bits_only() -> None:
    tie, other = {"of": 8, "differ": 1, "gap": 2.0}, {"of": 8, "differ": 1, "gap": 40.0}
    assert gpu_facts.same_tokens({"eager": tie}) and not gpu_facts.same_tokens({"eager": tie}, exact=True)
    assert not gpu_facts.same_tokens({"eager": other}) and not gpu_facts.same_tokens({"x": {"error": "e"}})


def test_a_wrong_engine_is_seen_by_its_gap(learner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = [p.question for p in setting.load_splits(learner.recipe).train[:4]]
    assert gpu_facts.same_tokens(gpu_facts.compared(learner.policy, questions, 8), exact=True)
    real = gpu_checks.make_sampler

    class Wrong:
        def sample(self, prompts: list[Prompt], decoding: Decoding) -> Any:
            drawn = real(learner.policy, "generate").sample(prompts, decoding)
            return [[replace(c, ids=(5, *c.ids[1:])) for c in row] for row in drawn]

    monkeypatch.setattr(
        gpu_checks,
        "make_sampler",
        lambda p, engine, **k: Wrong() if engine == "generate" else real(p, engine, **k),
    )
    found = gpu_facts.compared(learner.policy, questions, 8)
    assert found["generate"]["differ"] == 4 and found["generate"]["gap"] > 8 and found["eager"]["differ"] == 0
    assert not gpu_facts.same_tokens(found)


def test_the_report_names_what_failed_and_what_was_not_measured() -> None:
    common = {"part": "rates", "shape": "0.5B", "cap_gb": None, "rows": 128}
    timed = {"seconds": 1.0, "least": 0.9, "most": 1.1, "repeats": 3, "tokens": 10, "tokens_per_second": 10.0}
    rows = [
        {**common, **timed, "figure": "decode", "rival": "empg", "checks": {"it runs": True}},
        {**common, **timed, "figure": "decode", "rival": "hf", "seconds": 4.0, "repeats": 0},
        {**common, "figure": "m-step", "rival": "hf", "error": "killed after 9 s"},
        {**common, "figure": "kernels", "rival": "empg", "checks": {"graphs are replayed": False}},
        {**common, "figure": "tests", "rival": "pytest", **gpu_facts.counted({"a": "passed"}), "skipped": 2},
    ]
    text = gpu_report.report(rows, [])
    assert "4.00x" in text and "first run only" in text and "1 passed, 2 skipped" in text
    assert "rates: hf 0.5B 128 rows, m-step: killed after 9 s" in text
    assert "| FAILED | empg 0.5B 128 rows | graphs are replayed |" in " ".join(text.split())
    assert [holds for _, _, holds in gpu_report.checks(rows)] == [True, False, True]


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    yield


@pytest.mark.slow
def test_the_rehearsal(tmp_path: Path, no_gpu: None) -> None:
    """Every job on a CPU with small models: all that needs neither a GPU nor Unsloth is measured."""
    out = tmp_path / "out"
    command = [sys.executable, str(FOLDER / "gpu.py"), "--rehearse", "--out", str(out)]
    command += ["--minutes", "27"]  # three times a card's, for a machine that is busy with other things
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    found = json.loads((out / "results.json").read_text())
    assert len(found["jobs"]) == len(gpu_parts.JOBS), done.stderr
    failed = [r for r in found["rows"] if "error" in r]
    assert all("unsloth" in r["rival"] for r in failed), failed
    measured = {(r["rival"], f"{r['figure']}") for r in found["rows"] if "error" not in r}
    assert measured >= {(j.rival, f) for j in gpu_parts.JOBS if "unsloth" not in j.rival for f in j.figures}
    assert all(holds for _, _, holds in gpu_report.checks(found["rows"])), done.stdout
    assert {p.name for p in out.iterdir()} == {"results.json", "results.txt", "log.txt"}
    caps = [r for r in found["rows"] if r["cap_gb"]]
    assert len(caps) == 7 and all(r["planned_gb"] < r["cap_gb"] for r in caps)
    assert done.stdout.startswith("runs ") and "Smaller cards" in (out / "results.txt").read_text()
