"""What the memory plan chooses, refuses and advises, and the command that prints it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_settings import BASE, CPU, FIXTURE

from empg_lite.core.errors import DataError, MissingInput, OutOfMemory, UsageError
from empg_lite.loop import plan as choose
from empg_lite.loop.plan import KEYS, SHARE, advise, plan_recipe, predict, refuse_unfit, with_sizes
from empg_lite.policy.memory import machine
from empg_lite.policy.memory import terms as t
from empg_lite.policy.memory.machine import LIBRARIES, Machine, card, this_machine
from empg_lite.policy.memory.shape import KNOWN, Shape, read_shape, shape_of
from empg_lite.policy.memory.terms import Settings
from empg_lite.recipe.file import builtin_recipes, load_recipe
from empg_lite.recipe.schema import Recipe

# --- properties -----------------------------------------------------------------------------------

SHAPES = st.sampled_from([FIXTURE, *KNOWN.values()])
SETTINGS = st.builds(
    Settings,
    itemsize=st.sampled_from([2, 4]),
    four_bit=st.booleans(),
    lora_r=st.integers(1, 64),
    problems=st.integers(1, 64),
    samples=st.integers(1, 16),
    prompt_tokens=st.integers(1, 2048),
    new_tokens=st.integers(1, 2048),
    batch_rows=st.integers(1, 512),
    merged=st.booleans(),
    micro_batch_tokens=st.integers(1, 20_000),
    checkpointing=st.booleans(),
    evaluates=st.booleans(),
    device=st.sampled_from(["cpu", "cuda"]),
    engine=st.sampled_from(["native", "native", "generate", "unsloth"]),
    expands_keys=st.booleans(),
)


@given(SHAPES, SETTINGS)
@settings(max_examples=60, deadline=None)
def test_more_work_never_takes_less(shape: Shape, s: Settings) -> None:
    peak = predict(shape, s, CPU).peak
    for name in ("lora_r", "prompt_tokens", "new_tokens", "batch_rows", "micro_batch_tokens", "problems"):
        assert predict(shape, replace(s, **{name: 2 * getattr(s, name)}), CPU).peak >= peak, name
    assert predict(shape, replace(s, merged=True, four_bit=True), CPU).peak >= 0
    assert predict(shape, replace(s, evaluates=True), CPU).peak >= peak
    assert predict(replace(shape, layers=shape.layers + 1), s, CPU).peak > peak


def test_a_merged_copy_is_written_beside_the_graphs() -> None:
    """Cache and pool are there then, on a GPU. (The larger moment is chosen with them on both sides.)"""
    s = replace(BASE, itemsize=2, merged=True, evaluates=True, device="cuda")
    for rows in (8, 56, 112, 224):
        terms = dict(t.phases(KNOWN["7B"], replace(s, batch_rows=rows)))["evaluation"]
        assert {"KV cache", "graph pool", "merged copy"} < set(terms)
        assert sum(terms.values()) >= t.held_by_sampler(KNOWN["7B"], replace(s, batch_rows=rows)) + max(
            t.merged_linear(KNOWN["7B"], s), t.drawing(KNOWN["7B"], s, rows)
        )


@given(SHAPES, SETTINGS)
@settings(max_examples=60, deadline=None)
def test_a_peak_is_what_stays_and_the_largest_phase(shape: Shape, s: Settings) -> None:
    plan = predict(shape, s, CPU)
    kept = sum(plan.stays.values())
    assert plan.peak - kept == max(sum(terms.values()) for terms in plan.phases.values())
    phase, term = plan.largest
    everything = plan.stays | plan.phases[phase]
    assert plan.totals[phase] == plan.peak and everything[term] == max(everything.values())
    assert ("evaluation" in plan.phases) == s.evaluates


@given(SHAPES, SETTINGS, st.integers(10**6, 3 * 10**10))
@settings(max_examples=150, deadline=None)
def test_the_advice_really_fits_and_is_not_larger_than_it_must_be(
    shape: Shape, s: Settings, free: int
) -> None:
    plan = predict(shape, s, Machine("cuda", free))
    change = advise(plan)
    if plan.fits:
        assert change == {}
        return
    if change is None:  # then the least of everything does not fit either
        least = dict(batch_rows=8, micro_batch_tokens=256, new_tokens=128, prompt_tokens=128)
        least = {name: min(value, getattr(s, name)) for name, value in least.items()}
        s = replace(s, merged=False, checkpointing=True, four_bit=True, **least)
        assert not predict(shape, s, plan.machine).fits
        return
    assert change and predict(shape, replace(s, **change), plan.machine).fits
    for name in change:  # each part of it is needed
        rest = {k: v for k, v in change.items() if k != name}
        assert not predict(shape, replace(s, **rest), plan.machine).fits, (name, change)


# --- recipes --------------------------------------------------------------------------------------


def header_card(path: Path) -> str | None:
    """The smallest card that a recipe's header names."""
    found = re.search(r"^# Card:\s+(\d+)(?:-\d+)? GB", path.read_text("utf-8"), re.MULTILINE)
    return f"{found[1]}GB" if found else None


@pytest.mark.parametrize("name", sorted(builtin_recipes()))
def test_a_shipped_recipe_fits_the_card_its_header_names(name: str) -> None:
    recipe = load_recipe(name)
    size = header_card(builtin_recipes()[name])
    machine = card(size) if size else Machine("cpu", 4 * 10**9)
    assert size or name.startswith(("tiny", "smollm2"))
    plan = plan_recipe(recipe, read_shape(recipe.model.name), machine)
    assert plan.fits and plan.peak <= SHARE * machine.free
    assert (
        plan.settings.micro_batch_tokens >= plan.settings.row_tokens or not size
    )  # rows are not fitted one by one


def test_auto_takes_what_the_card_gives() -> None:
    """More memory: more rows and tokens, and activations kept instead of computed again."""
    recipe, shape = load_recipe("gsm8k-1.5b"), KNOWN["1.5B"]
    small, large = (plan_recipe(recipe, shape, card(size)).settings for size in ("6GB", "40GB"))
    assert small.checkpointing and not large.checkpointing
    assert small.batch_rows < large.batch_rows
    fixed = load_recipe("gsm8k-1.5b", ["sampler.batch_rows=24", "optim.micro_batch_tokens=1000"])
    kept = plan_recipe(fixed, shape, card("40GB")).settings
    assert (kept.batch_rows, kept.micro_batch_tokens) == (24, 1000)


def test_a_micro_batch_stops_growing_where_it_gains_nothing() -> None:
    """On a CPU much earlier than on a card (docs/LOG.md), whatever the memory; below that it is what fits."""
    recipe, shape = load_recipe("gsm8k-0.5b"), KNOWN["0.5B"]
    for device, most in (("cpu", 1024), ("cuda", 16_384)):
        assert plan_recipe(recipe, shape, Machine(device, 10**12)).settings.micro_batch_tokens == most
        short = plan_recipe(recipe, shape, Machine(device, 3 * 10**9))
        assert 256 < short.settings.micro_batch_tokens <= most and short.fits


@pytest.mark.parametrize(
    ("device", "problems", "rows"),
    [
        ("cpu", 1, 64),
        ("cpu", 8, 64),
        ("cpu", 9, 128),
        ("cpu", 999, 512),
        ("cuda", 1, 512),
        ("cuda", 999, 512),
    ],
)
def test_rows_stop_growing_where_they_gain_little(device: str, problems: int, rows: int) -> None:
    """On a CPU beyond 64, unless a step has more samples; below that it is what fits."""
    groups = [f"sampler.problems_per_step={problems}", "sampler.samples_per_problem=8", "sampler.tries=null"]
    recipe, shape = load_recipe("gsm8k-0.5b", groups), KNOWN["0.5B"]
    assert plan_recipe(recipe, shape, Machine(device, 10**12)).settings.batch_rows == rows
    short = plan_recipe(recipe, shape, Machine(device, 3 * 10**9))
    assert 8 <= short.settings.batch_rows < rows and short.fits


@pytest.mark.parametrize("merged", [True, False])
def test_the_sampler_stays_where_the_m_step_fits_beside_it(merged: bool) -> None:
    """From one byte of room on; the plan fits either way, and neither a CPU nor ``generate`` keeps
    anything."""
    shape, s = KNOWN["0.5B"], replace(BASE, device="cuda", itemsize=2, merged=merged, evaluates=True)
    s = replace(s, batch_rows=64, micro_batch_tokens=16_384, problems=64)
    held = t.held_by_sampler(shape, s)
    roomy = predict(shape, s, Machine("cuda", 10**12))
    alone = predict(shape, s, Machine("cuda", 1))
    assert roomy.keeps_sampler and roomy.totals["M-step"] == alone.totals["M-step"] + held
    enough = -(-roomy.peak * 10 // 9)  # SHARE of it may be used
    assert predict(shape, s, Machine("cuda", enough)).keeps_sampler
    tight = predict(shape, s, Machine("cuda", enough - 2))
    assert tight.fits and not tight.keeps_sampler and tight.totals == alone.totals
    assert not alone.keeps_sampler and not predict(shape, replace(s, device="cpu"), CPU).keeps_sampler
    other = replace(s, engine="generate", merged=False)
    assert not predict(shape, other, Machine("cuda", 10**12)).keeps_sampler


def test_rows_beyond_a_step_are_given_up_to_keep_activations() -> None:
    """They would serve the evaluation only."""
    recipe, machine = load_recipe("gsm8k-0.5b"), card("16GB")
    s = plan_recipe(recipe, KNOWN["0.5B"], machine).settings
    assert s.batch_rows == s.problems * s.samples == 256 and not s.checkpointing
    more = load_recipe("gsm8k-0.5b", ["sampler.batch_rows=512"])
    plan = plan_recipe(more, KNOWN["0.5B"], machine)
    assert plan.keeps_sampler and plan.settings.checkpointing


@pytest.mark.parametrize("name", ["gsm8k-0.5b", "gsm8k-1.5b", "gsm8k-3b", "gsm8k-7b", "math-hard-3b"])
def test_auto_prefers_sizes_with_which_the_sampler_stays(name: str) -> None:
    """On all cards where it can at half of the rows or more; there micro-batches are large enough all the
    same."""
    recipe = load_recipe(name)
    shape, needed, kept = read_shape(recipe.model.name), 256, set[bool]()
    for size in range(5, 81, 3):
        plan = plan_recipe(recipe, shape, card(f"{size}GB"))
        s = plan.settings
        if plan.fits:
            kept.add(plan.keeps_sampler)
        if plan.keeps_sampler:
            larger = replace(s, micro_batch_tokens=choose.ENOUGH_TOKENS)
            assert (
                s.micro_batch_tokens >= choose.ENOUGH_TOKENS or not predict(shape, larger, plan.machine).fits
            )
            more = replace(s, batch_rows=4 * s.batch_rows, micro_batch_tokens=256, checkpointing=True)
            assert s.batch_rows >= needed or not predict(shape, more, plan.machine).fits
    assert kept == {True} or kept == {True, False}


def test_each_phase_takes_the_whole_card_where_the_sampler_cannot_stay() -> None:
    """No larger micro-batch fits, nor do twice the rows."""
    plan = plan_recipe(load_recipe("gsm8k-1.5b"), KNOWN["1.5B"], card("4GB"))
    s = plan.settings
    assert plan.fits and not plan.keeps_sampler and s.micro_batch_tokens >= choose.ENOUGH_TOKENS
    for name in ("micro_batch_tokens", "batch_rows"):
        assert not predict(KNOWN["1.5B"], replace(s, **{name: 2 * getattr(s, name)}), plan.machine).fits


def test_a_t4_writes_keys_out() -> None:
    """Known by its generation; a card given by its size, by the recipe's type."""

    def expands(dtype: str, machine: Machine) -> bool:
        recipe = load_recipe("gsm8k-0.5b-t4", [f"model.dtype={dtype}"])
        return plan_recipe(recipe, KNOWN["0.5B"], machine).settings.expands_keys

    assert expands("float16", card("15GB")) and not expands("auto", card("15GB"))
    old, new = (Machine("cuda", 10**10, sm80) for sm80 in (False, True))
    assert expands("auto", old) and expands("float32", old)
    assert not expands("float16", new) and not expands("float16", CPU)
    s = replace(BASE, device="cuda", itemsize=2, prompt_tokens=512, micro_batch_tokens=4096)
    wide, shape = replace(s, expands_keys=True), KNOWN["0.5B"]
    assert t.kept_block(shape, wide) - t.kept_block(shape, s) == 4 * 512 * 2 * (896 - 128) * 2


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("15000, 7.5", Machine("cuda", 15_000 * 2**20 - LIBRARIES, False)),
        ("80000, 9.0", Machine("cuda", 80_000 * 2**20 - LIBRARIES, True)),
        ("80000, 12.0", Machine("cuda", 80_000 * 2**20 - LIBRARIES, True)),
        ("100, [N/A]", Machine("cuda", 0, None)),
        ("No devices were found", None),
    ],
)
def test_the_driver_tells_memory_and_generation(
    answer: str, expected: Machine | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(machine.shutil, "which", lambda tool: tool)
    monkeypatch.setattr(machine.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=answer + "\n"))
    assert this_machine() == expected or (expected is None and this_machine().device == "cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert this_machine().device == "cpu"


def test_another_engine_has_a_plan_of_its_own() -> None:
    """It samples from the policy's own modules, keeps nothing, and holds the logits of all rows at once."""
    shape, plans = KNOWN["0.5B"], {}
    for engine in ("native", "generate", "unsloth"):
        recipe = load_recipe("gsm8k-0.5b", [f"sampler.engine={engine}", "sampler.batch_rows=128"])
        plans[engine] = plan_recipe(recipe, shape, card("24GB"))
        assert plans[engine].settings.engine == engine
    auto = load_recipe("gsm8k-0.5b", ["sampler.engine=auto", "sampler.batch_rows=128"])
    assert plan_recipe(auto, shape, card("24GB")) == plans["native"]
    assert plans["native"].settings.merged and plans["native"].keeps_sampler
    for engine in ("generate", "unsloth"):
        assert not plans[engine].settings.merged and not plans[engine].keeps_sampler
        assert plans[engine].totals["E-step"] > plans["native"].totals["E-step"]
    assert t.generated_cache(shape, plans["unsloth"].settings, 8) > t.generated_cache(
        shape, plans["generate"].settings, 8
    )
    forced = load_recipe("gsm8k-0.5b", ["sampler.engine=generate", "sampler.merged=true"])
    assert not plan_recipe(forced, shape, card("24GB")).settings.merged


def test_plan_and_run_agree(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same free memory: the same sizes, written into the recipe that a run keeps."""
    from empg_lite.loop import learner

    tight: list[int] = []
    for free in (4 * 10**6, 12 * 10**6, 10**12, 10**9):
        monkeypatch.setattr(learner.machine, "return_freed_blocks", lambda free=free: tight.append(free))
        monkeypatch.setattr(learner.machine, "free_memory", lambda device, free=free: free)
        recipe = load_recipe(str(recipe_file), ["sampler.problems_per_step=64", "sampler.max_new_tokens=200"])
        built = learner.build_learner(recipe)
        plan = plan_recipe(recipe, read_shape(recipe.model.name), Machine("cpu", free))
        assert built.recipe.sampler.batch_rows == plan.settings.batch_rows
        assert built.recipe.optim == with_sizes(recipe, plan.settings).optim
        assert built.planned == plan and 10**8 < built.held < 4 * 10**9  # of the process, before
    assert (plan.settings.batch_rows, plan.settings.micro_batch_tokens) == (512, 1024)  # the roomy case
    assert tight == [4 * 10**6, 12 * 10**6]  # where the peak is more than half of what is free


def test_the_libraries_are_held_before_the_model(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``memory/predicted_mb`` is the plan and what the process held: without them it was below every peak."""
    from empg_lite.loop import learner

    order: list[str] = []

    def noted(owner: Any, name: str) -> None:
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, **k: order.append(name) or real(*a, **k))

    noted(learner, "import_libraries")
    noted(learner.machine, "resident_memory")
    noted(learner, "load_policy")
    learner.build_learner(load_recipe(str(recipe_file)))
    assert order == ["import_libraries", "resident_memory", "load_policy"]


def test_memory_is_kept_to_where_it_is_scarce() -> None:
    plan = plan_recipe(load_recipe("tiny", ["sampler.batch_rows=8"]), read_shape("tiny"), CPU)

    def tight(peak: int, machine: Machine) -> bool:
        return replace(plan, stays={"weights": peak}, phases={"M-step": {}}, machine=machine).is_tight

    for peak in (10**6, 10**10):
        machine = Machine("cpu", 2 * peak)
        assert not tight(peak, machine) and tight(peak + 1, machine)
    assert not tight(10**10, Machine("cuda", 1))


@pytest.mark.parametrize("asked", [True, False])
def test_freed_blocks_go_back_where_memory_is_tight(asked: bool) -> None:
    """Blocks of 8 MB, freed below one that is kept: glibc's own limit has been raised by a block of 31 MB."""
    code = (
        "import ctypes, sys\nfrom empg_lite.policy.memory import machine\n"
        "if sys.argv[1] == 'True': machine.return_freed_blocks()\n"
        "c = ctypes.CDLL(None); c.malloc.restype = ctypes.c_void_p; c.free.argtypes = [ctypes.c_void_p]\n"
        "def make(mb):\n"
        "    p = c.malloc(mb << 20); ctypes.memset(p, 1, mb << 20); return p\n"
        "c.free(make(31)); rows = [make(8) for _ in range(20)]; kept = make(8)\n"
        "before = machine.resident_memory(); [c.free(p) for p in rows]\n"
        "print(before - machine.resident_memory())"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", code, str(asked)], env=environment, capture_output=True, text=True, check=True
    )
    assert (int(done.stdout) > 150 * 2**20) is asked


def test_what_cannot_fit_is_refused_before_loading(
    recipe_file: Path, tmp_path: Path, cli, monkeypatch
) -> None:  # type: ignore[no-untyped-def]
    from empg_lite.loop import learner

    monkeypatch.setattr(learner.machine, "free_memory", lambda device: 100_000)
    code, _, err = cli("train", "-r", recipe_file, "-o", tmp_path / "run")
    assert code == 71 and "memory plan" in err and "--force" in err and len(err.strip().splitlines()) == 1
    quick = ("--set", "run.steps=1", "--set", "run.eval_every=0")
    code, _, _ = cli("train", "-r", recipe_file, "-o", tmp_path / "run", "--force", *quick)
    assert code == 0
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["memory/predicted_mb"] > 100 and record["memory/peak_rss_mb"] > 100


def test_a_refusal_names_phase_term_and_setting() -> None:
    recipe = load_recipe("gsm8k-3b", ["sampler.batch_rows=512"])
    shape, machine = KNOWN["3B"], card("12GB")
    with pytest.raises(OutOfMemory, match=r"E-step .* KV cache .*--set sampler.batch_rows=128"):
        refuse_unfit(plan_recipe(recipe, shape, machine))
    fixed = load_recipe("gsm8k-3b", ["sampler.batch_rows=128"])
    refuse_unfit(plan_recipe(fixed, shape, machine))


# --- the command ----------------------------------------------------------------------------------


def test_the_command_answers_offline_without_torch(tmp_path: Path) -> None:
    """A fresh process with an empty model cache: no torch, no transformers, no socket."""
    code = (
        "import socket, sys\n"
        "def no(*a, **k): raise AssertionError('network')\n"
        "socket.socket.connect = no\n"
        "from empg_lite.cli import main\n"
        "try: main(['plan', '-r', 'gsm8k-7b', '--gpu-memory', '24GB', '--json'])\n"
        "except SystemExit as end: print(end.code, {'torch', 'transformers', 'peft'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "HF_HOME": str(tmp_path)},
    )
    result, end = done.stdout.splitlines()
    assert end == "0 set()"
    facts = json.loads(result)
    assert facts["fits"] and not facts["change"] and facts["peak"] <= facts["usable"] < 24e9


def test_the_command_says_no_and_what_to_set(cli) -> None:  # type: ignore[no-untyped-def]
    words = ("plan", "-r", "gsm8k-7b", "--gpu-memory", "12GB", "--set", "sampler.batch_rows=256")
    code, out, _ = cli(*words, "--json")
    facts = json.loads(out.splitlines()[-1])
    assert code == 1 and not facts["fits"] and facts["change"]
    code, out, _ = cli(*words)
    assert code == 1 and "does not fit" in out and facts["change"][0] in out
    changes = [word for change in facts["change"] for word in ("--set", change)]
    code, out, _ = cli(*words, *changes)
    assert code == 0 and "does not fit" not in out


def test_bad_input_is_one_line(cli, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for size in ("lots", "0.2GB", "-8GB", "8 XB"):
        code, _, err = cli("plan", "--gpu-memory", size)
        assert code == 2 and "--gpu-memory" in err
    code, _, err = cli("plan", "--set", "model.name=nobody/nothing")
    assert code == 66 and "config.json" in err
    (tmp_path / "config.json").write_text('{"model_type": "qwen2", "hidden_size": 64}')
    code, _, err = cli("plan", "--set", f"model.name={tmp_path}")
    assert code == 65 and "num_attention_heads" in err


def test_sizes_of_memory() -> None:
    assert card("8GB").free == card("8").free == card(" 8000 MB").free == 8 * 10**9 - 600_000_000
    assert card("8GiB").free - card("8GB").free == 8 * (2**30 - 10**9)
    with pytest.raises(UsageError):
        card("8TB")


def test_shapes_from_configs() -> None:
    config = {
        "model_type": "qwen2",
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 259,
    }
    assert shape_of(config, "here") == replace(FIXTURE, tied=False)
    assert shape_of(config | {"head_dim": 32}, "here").head_dim == 32
    for bad in (None, 0, "64"):
        with pytest.raises(DataError, match="hidden_size"):
            shape_of(config | {"hidden_size": bad}, "here")
    assert read_shape("Qwen/Qwen2.5-3B-Instruct") == KNOWN["3B"]
    with pytest.raises(MissingInput):
        read_shape("Qwen/Qwen2.5-14B")


def test_every_setting_that_advice_may_name_is_a_recipe_key() -> None:
    for name, key in KEYS.items():
        section, _, field = key.partition(".")
        known = field in Recipe.model_fields[section].annotation.model_fields  # type: ignore[union-attr]
        assert known or name == "merged", key
