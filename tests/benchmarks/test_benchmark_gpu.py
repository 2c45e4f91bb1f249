"""The GPU benchmark: its limits, what a hanging job costs, and what it computes from its figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(FOLDER))

import forced  # noqa: E402
import gpu  # noqa: E402
import gpu_checks  # noqa: E402
import gpu_floor  # noqa: E402
import gpu_parts  # noqa: E402
import gpu_report  # noqa: E402
import gpu_work  # noqa: E402
import setting  # noqa: E402
from gpu_parts import Job  # noqa: E402
from shapes import SHAPES, Shape  # noqa: E402

from empg_lite.loop.learner import plan_here  # noqa: E402
from empg_lite.policy.memory import machine  # noqa: E402
from empg_lite.sampler import Decoding, Prompt, make_sampler  # noqa: E402
from empg_lite.sampler import decoder as decoder_module  # noqa: E402

#: 2 layers, 4 hidden units, 2 heads of 2, one of them for keys and values; 10 tokens.
SMALL = Shape(hidden=4, intermediate=6, layers=2, heads=2, kv_heads=1, vocab=10)


# --- the plan ----------------------------------------------------------------------------------------


def test_the_parts_are_in_order_of_worth_and_end_within_nine_minutes() -> None:
    assert gpu_parts.PARTS == ("runs", "profile", "tests", "rates", "learn", "rivals", "caps")
    assert sum(job.limit for job in gpu_parts.JOBS) <= 540
    for small in (False, True):  # what a rehearsal prints is what a card gets
        *parts, whole = gpu.plan_text(gpu_parts.chosen(gpu_parts.PARTS, 9.0, small)).splitlines()
        assert [line.split()[0] for line in parts] == list(gpu_parts.PARTS)
        assert whole.split() == ["all", "540", "s"]
    order = [gpu_parts.PARTS.index(job.part) for job in gpu_parts.JOBS]
    assert order == sorted(order)
    assert {(j.cap_gb, j.shape) for j in gpu_parts.JOBS if j.cap_gb} >= {
        (8.0, "3B"),
        (12.0, "7B"),
        (24.0, "7B"),
    }
    assert all(len(range(0, j.problems[0] * j.samples)) <= 128 for j in gpu_parts.JOBS if j.part == "rivals")
    assert {j.rival for j in gpu_parts.JOBS if j.part == "runs"} == {"empg", "empg-unsloth"}


def test_limits_scale_and_parts_are_picked() -> None:
    jobs = gpu_parts.chosen(["runs", "caps"], 4.5, False)
    whole = [j for j in gpu_parts.JOBS if j.part in ("runs", "caps")]
    assert [j.limit for j in jobs] == [j.limit / 2 for j in whole]
    assert [j.shape for j in jobs] == [j.shape for j in whole] and not any(j.small for j in jobs)
    assert all(j.small and j.cap <= 16 for j in gpu_parts.chosen(gpu_parts.PARTS, 9, True))


def test_what_earlier_jobs_saved_is_for_later_ones_but_no_limit_is_taken_from() -> None:
    job = Job("caps", "empg", ("step",), 20.0)
    assert gpu.allowed(job, 0.0, 1.0) == 20 and gpu.allowed(job, 15.0, 1.0) == 35
    assert gpu.allowed(job, 500.0, 1.0) == 60 and gpu.allowed(replace(job, limit=50.0), 500.0, 1.0) == 100


def test_a_job_survives_its_command_line() -> None:
    for job in gpu_parts.JOBS:
        assert Job.load(job.dump()) == job


def test_the_parent_imports_no_torch() -> None:
    """It would take memory of the card and seconds of the nine minutes."""
    code = "import sys, gpu; assert 'torch' not in sys.modules and 'empg_lite' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=FOLDER, check=True)


# --- jobs that hang, die, or tell nothing --------------------------------------------------------------


#: Stands for ``gpu.py --job``. Its job's rival says how it behaves; each leaves its own and its child's id.
FAKE = """
import json, os, subprocess, sys, time
job, folder, rows = json.loads(sys.argv[2]), sys.argv[3], sys.argv[4]
if not sys.stdin.readline():
    sys.exit()
def tell(figure, **facts):
    row = {name: job[name] for name in ("part", "rival", "shape", "cap_gb")} | {"figure": figure}
    with open(rows, "a") as file:
        file.write(json.dumps(row | facts) + "\\n")
print("noise {", flush=True)
if job["rival"] == "hangs":
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    children = [subprocess.Popen(sleep), subprocess.Popen(sleep, start_new_session=True)]
    tell("decode", pids=[os.getpid(), *(child.pid for child in children)])
    time.sleep(600)
if job["rival"] == "dies":
    tell("decode", rows=8, seconds=2.0)
    tell("decode", rows=8, seconds=1.0)
    sys.exit("broken\\n")
tell("decode", seconds=3.0)
"""


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    monkeypatch.setattr(gpu, "__file__", str(script))
    return tmp_path / "out"


def fake(rival: str, *figures: str, limit: float = 60.0) -> Job:
    return Job("rates", rival, figures, limit, shape="tiny")


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_job_that_hangs_is_cut_off_with_its_children_and_the_next_one_runs(
    faked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child in a session of its own is ended too. What the job had told stays, what not is an error."""
    monkeypatch.setattr(gpu, "LEAST", 0.0)
    monkeypatch.setattr(gpu, "MOST", 0.0)
    for limit in (2.0, 10.0, 60.0):  # a busy machine may take long to start two processes
        results = gpu.Results(faked)
        hanging = fake("hangs", "decode", "m-step", limit=limit)
        gpu.measure([hanging, fake("fine", "decode", limit=600.0)], results)
        found = {(r["rival"], r["figure"]): r for r in results.rows}
        if "pids" in found["hangs", "decode"]:
            break
    pids = found["hangs", "decode"]["pids"]
    until = time.monotonic() + 60
    while any(map(alive, pids)) and time.monotonic() < until:  # what was not our child is ended by init
        time.sleep(0.05)
    assert len(pids) == 3 and not any(map(alive, pids))
    assert found["hangs", "m-step"]["error"] == (killed := f"killed after {limit:.0f} s")
    assert found["fine", "decode"]["seconds"] == 3.0
    assert [job["ended"] for job in results.jobs] == [killed, None]


def test_results_are_on_disk_after_each_job_and_while_one_runs(
    faked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: list[dict[str, Any]] = []
    real = gpu.Results.write

    def write(self: gpu.Results) -> None:
        real(self)
        states.append(json.loads((faked / "results.json").read_text()))

    monkeypatch.setattr(gpu.Results, "write", write)
    jobs = [fake("dies", "decode", "m-step"), fake("fine", "decode")]
    gpu.measure(jobs, gpu.Results(faked))
    assert any(not s["jobs"] and s["rows"] for s in states), "rows come before the job has ended"
    first = next(s for s in states if len(s["jobs"]) == 1)
    told, unheard = first["rows"]
    assert told["seconds"] == 1.0, "the last row of a figure counts"
    assert unheard["figure"] == "m-step" and unheard["error"] == "exit code 1: broken"
    assert len(states[-1]["jobs"]) == 2 and len(states[-1]["rows"]) == 3
    text, log = ((faked / name).read_text() for name in ("results.txt", "log.txt"))
    assert "exit code 1: broken" in text and "noise {" in log and "=== [2/2]" in log
    assert sorted(p.name for p in faked.iterdir()) == ["log.txt", "results.json", "results.txt"]


def test_a_job_without_time_is_not_begun_and_said_so(faked: Path) -> None:
    results = gpu.Results(faked)
    gpu.measure([fake("hangs", "decode", "m-step", limit=0.0), fake("fine", "decode")], results)
    assert [r.get("error") for r in results.rows] == ["not begun: 0 s left"] * 2 + [None]


def test_interrupting_leaves_no_process_behind(faked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[gpu.Child] = []
    real = gpu.Child.__init__
    monkeypatch.setattr(gpu.Child, "__init__", lambda self, *a: made.append(self) or real(self, *a))

    def interrupted(self: gpu.Results, child: gpu.Child) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu.Results, "look", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gpu.measure([fake("hangs", "decode"), fake("fine", "decode")], gpu.Results(faked))
    assert len(made) == 2 and not any(alive(child.process.pid) for child in made)


def test_a_figure_that_fails_is_a_row(tmp_path: Path) -> None:
    def breaks() -> dict[str, object]:
        raise ValueError("two\nlines")

    work = gpu_work.Work(Job("rates", "hf", ("decode",), 1.0, shape="tiny"), tmp_path, tmp_path / "rows")
    work.tell("decode", breaks, rows=8)
    work.tell("m-step", lambda: {"seconds": 2.0})
    first, second = gpu.told(tmp_path / "rows")
    assert first["error"] == "ValueError: two lines" and first["rows"] == 8
    assert second["seconds"] == 2.0 and "error" not in second


def test_every_run_of_a_timed_figure_is_told(tmp_path: Path) -> None:
    """A process that is killed in its second run has told the first."""
    work = gpu_work.Work(Job("rates", "hf", ("decode",), 1.0, repeats=3), tmp_path, tmp_path / "rows")
    runs = 0

    def run() -> None:
        nonlocal runs
        runs += 1
        if runs == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work.tell("decode", lambda: work._timed(run, tokens=7))
    (row,) = gpu.told(tmp_path / "rows")
    assert row["repeats"] == 1 and row["tokens"] == 7 and row["least"] == row["most"] == row["seconds"]


def test_results_of_pytest_are_counted() -> None:
    lines = (
        "tests/test_gpu.py::test_a PASSED [ 33%]",
        "tests/test_gpu.py::test_b[x y] FAILED",
        "noise",
        "tests/test_gpu.py::test_c SKIPPED (no NVIDIA GPU here)",
        "FAILED tests/test_gpu.py::test_b - assert 0",
    )
    ended = dict(filter(None, map(gpu_work.test_result, lines)))
    assert ended == {"test_a": "passed", "test_c": "skipped", "test_b[x y]": "failed"}
    found = gpu_work.counted(ended)
    assert found["failures"] == ["test_b[x y]"] and found["checks"] == {"tests marked gpu": False}
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 1, 1) and "error" not in found


# --- the work of a step --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learner() -> Any:
    return setting.tiny_learner("sampler.max_new_tokens=12")


@pytest.fixture
def given(learner: Any) -> setting.Setting:
    return setting.tiny_setting(learner, problems=3, samples=4, mean=6.0)


def test_forced_lengths_lie_where_a_captured_graph_finds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph replays what it recorded: the same addresses, whatever is forced later."""
    right = decoder_module.draw
    logits, keys = torch.zeros(3, 5), torch.tensor([7, 5, 9])
    read: list[tuple[int, ...]] = []
    real = torch.searchsorted

    def searched(table: torch.Tensor, *args: Any, **more: Any) -> torch.Tensor:
        read.append((table.data_ptr(), len(table)))
        return real(table, *args, **more)

    with forced.forced_draws({5: 1, 7: 2, 9: 3}, 4, 0):
        captured = decoder_module.draw
        monkeypatch.setattr(torch, "searchsorted", searched)
        first = [captured(logits, keys, at, Decoding(9, 0.0))[0].tolist() for at in range(3)]
    with forced.forced_draws({5: 3, 7: 1, 9: 2, 11: 4}, 4, 0):
        second = [captured(logits, keys, at, Decoding(9, 0.0))[0].tolist() for at in range(3)]
    assert first == [[0, 4, 0], [4, 0, 0], [0, 0, 4]]
    assert second == [[4, 0, 0], [0, 0, 4], [0, 4, 0]]
    tables = {place for place in read if place[1] == forced.ROWS}
    assert len(tables) == 1 and decoder_module.draw is right


def test_no_other_stop_token_ends_a_row_early() -> None:
    """A model has several: Qwen2.5's end of text and end of turn. One in a thousand rows would be short."""
    logits, keys = torch.full((2, 6), -1.0), torch.tensor([7, 5])
    logits[:, 3] = 5.0
    with forced.forced_draws({5: 1, 7: 2}, 4, 0, others=(3, 4)):
        drawn = [decoder_module.draw(logits, keys, at, Decoding(9, 0.0))[0].tolist() for at in range(2)]
    assert drawn == [[0, 4], [4, 0]]
    rows = torch.tensor([[3, 3, 1], [2, 4, 3]])
    assert forced.end_rows(rows, [2, 3], 4, 0, (3,)).tolist() == [[0, 4, 4], [2, 0, 4]]


def test_a_key_that_has_no_length_is_never_ended() -> None:
    """An idle place of a decoder keeps a key of before: no index is beyond the table's end."""
    table = forced.Table(torch.device("cpu"))
    table.write({5: 1, 7: 1})
    keys = torch.tensor([torch.iinfo(torch.int64).max, 6, 7, torch.iinfo(torch.int64).min])
    assert table.ended(keys, 0).tolist() == [False, False, True, False]
    with pytest.raises(AssertionError):
        table.write(dict.fromkeys(range(forced.ROWS), 1))


@pytest.mark.parametrize("keeps", [True, False])
def test_our_step_is_the_learners_and_gives_memory_back_as_train_does(
    learner: Any, given: setting.Setting, monkeypatch: pytest.MonkeyPatch, keeps: bool
) -> None:
    from empg_lite.rewards import Grader

    order: list[str] = []
    monkeypatch.setattr(type(learner.planned), "keeps_sampler", property(lambda _: keeps))
    monkeypatch.setattr(
        type(learner), "sampler", lambda self: order.append("made") or make_sampler(self.policy)
    )
    with Grader() as grader:
        ours = setting.OurStep(learner, given, grader, silent=False)
        real, fit = ours.sampler.release, type(learner).fit
        monkeypatch.setattr(ours.sampler, "release", lambda: order.append("released") or real())
        monkeypatch.setattr(type(learner), "fit", lambda *a, **k: order.append("fit") or fit(*a, **k))
        before = learner.policy.adapter_sha256()
        ours.step()
    # Without graphs the engine releases after every draw by itself; what counts is that fitting comes after.
    assert order[0] == "made" and order[-1] == "fit"
    assert order.count("released") == 2 - keeps and ours.tokens == given.tokens
    assert learner.policy.adapter_sha256() != before


def test_a_smaller_card_is_what_the_plan_sees(learner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_memory", machine.free_memory)  # put back afterwards
    recipe = learner.recipe.model_copy(
        update={"sampler": learner.recipe.sampler.model_copy(update={"batch_rows": "auto"})}
    )
    gpu_checks.shrink(8.0)
    large = plan_here(recipe, refuse=False)
    gpu_checks.shrink(0.66)
    small = plan_here(recipe, refuse=False)
    assert small.settings != large.settings and small.peak < large.peak


@pytest.mark.slow
def test_a_model_with_random_weights_writes_text(tmp_path: Path) -> None:
    """Else every reward of the two training steps would be 0, and nothing would be fitted."""
    job = gpu_parts.cut(Job("runs", "empg", ("train",), 60.0))
    work = gpu_work.Work(job, tmp_path, tmp_path / "rows")
    work.do()
    (row,) = gpu.told(tmp_path / "rows")
    assert row["checks"] == {"2 steps moved the weights": True}, row
    assert len(row["rewards"]) == 2 and min(row["rewards"]) > 0
    assert row["environment"]["engine"]["engine"] == "native" and "time/graphs_replayed" in row["last_step"]


# --- what is computed from figures ---------------------------------------------------------------------


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
    assert found["kinds"] == ["RMSNorm", "RoPE", "SwiGLU", "NF4 dequantisation"]
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
    assert all(gpu_work.kernel_checks(good, unsloth=True).values())

    def failed(**changed: Any) -> set[str]:
        checks = gpu_work.kernel_checks({**good, **changed}, unsloth=True)
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
    plain |= {"sampling": half("flash", kinds=("NF4 dequantisation",)), "fitting": half("flash", kinds=())}
    assert all(gpu_work.kernel_checks(plain, unsloth=False).values())


def test_greedy_tokens_may_part_at_ties_in_16_bits_only() -> None:
    tie, other = {"of": 8, "differ": 1, "gap": 2.0}, {"of": 8, "differ": 1, "gap": 40.0}
    assert gpu_work.same_tokens({"eager": tie}) and not gpu_work.same_tokens({"eager": tie}, exact=True)
    assert not gpu_work.same_tokens({"eager": other}) and not gpu_work.same_tokens({"x": {"error": "e"}})


def test_a_wrong_engine_is_seen_by_its_gap(learner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = [p.question for p in setting.load_splits(learner.recipe).train[:4]]
    assert gpu_work.same_tokens(gpu_work.compared(learner.policy, questions, 8), exact=True)
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
    found = gpu_work.compared(learner.policy, questions, 8)
    assert found["generate"]["differ"] == 4 and found["generate"]["gap"] > 8 and found["eager"]["differ"] == 0
    assert not gpu_work.same_tokens(found)


def test_the_report_names_what_failed_and_what_was_not_measured() -> None:
    common = {"part": "rates", "shape": "0.5B", "cap_gb": None, "rows": 128}
    timed = {"seconds": 1.0, "least": 0.9, "most": 1.1, "repeats": 3, "tokens": 10, "tokens_per_second": 10.0}
    rows = [
        {**common, **timed, "figure": "decode", "rival": "empg", "checks": {"it runs": True}},
        {**common, **timed, "figure": "decode", "rival": "hf", "seconds": 4.0, "repeats": 0},
        {**common, "figure": "m-step", "rival": "hf", "error": "killed after 9 s"},
        {**common, "figure": "kernels", "rival": "empg", "checks": {"graphs are replayed": False}},
        {**common, "figure": "tests", "rival": "pytest", **gpu_work.counted({"a": "passed"}), "skipped": 2},
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
