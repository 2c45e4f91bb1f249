"""Damaged checkpoints are skipped, hostile ones refused; neither executes anything."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import shutil
import signal
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from crash_harness import SETTINGS, Ended, Plant, digest, side_by_side
from fixture_recipe import write_recipe
from hostile import DEEP
from safetensors.torch import load, save

from empg_lite.core.errors import CheckpointError, RecipeError, StorageError
from empg_lite.core.slots import Slot
from empg_lite.loop.train import TrainOptions, train
from empg_lite.recipe.file import load_recipe
from empg_lite.run import store
from empg_lite.run.checkpoint import checkpoint_path, list_checkpoints, stored_state
from empg_lite.run.target import resolve_target


@pytest.fixture(scope="module")
def begun(plant: Plant, model_dir: Path) -> tuple[Plant, Path, str]:
    """A run killed after two checkpoints, and its uninterrupted result."""
    folder = plant.folder / "begun"
    folder.mkdir()
    settings = [s for s in SETTINGS if "steps" not in s and "keep" not in s]
    own = Plant(folder, model_dir, [*settings, "run.steps=3", "run.keep=2"])
    straight = own.fresh()
    calls = own.run(straight).calls
    at = next(
        n
        for n, (name, p) in enumerate(calls, 1)
        if name == "_rename" and "/checkpoints/.tmp-step-000003" in p
    )
    run = own.fresh()
    assert own.run(run, at=at).code == -signal.SIGKILL
    assert [p.name for p in list_checkpoints(run)] == ["step-000001", "step-000002"]
    return own, run, digest(straight)


# --- damage ------------------------------------------------------------------------------------------------


def damaged(own: Plant, source: Path, seed: int) -> list[Any]:
    """A file of the newest checkpoint truncated (odd seeds) or with a bit flipped, each file in turn.

    [the damage, exit code when named, exit code of the resumed run, warnings, whether it is kept, digest].
    """
    rng, run = random.Random(seed), own.fresh()
    shutil.copytree(source, run)
    newest = list_checkpoints(run)[-1]
    files = sorted(newest.iterdir())
    file = files[seed // 2 % len(files)]
    data = bytearray(file.read_bytes())
    if seed % 2:
        what = "cut"
        file.write_bytes(data[: rng.randrange(len(data))])
    else:
        what = "flipped"
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
    try:
        resolve_target(str(newest))
        named = 0
    except CheckpointError as error:
        named = error.exit_code
    ended = own.run(run)
    said = [text for _, text in ended.notes if "is damaged" in text]
    found = digest(run) if ended.code == 0 else ended.said
    kept = (run / "checkpoints" / ".corrupt-step-000002").is_dir()
    shutil.rmtree(run)
    return [f"{what} {file.name}", named, ended.code, said, kept, found]


@pytest.mark.parametrize("times", [12, pytest.param(60, marks=pytest.mark.slow)])
def test_a_damaged_newest_checkpoint_is_passed_over(begun: tuple[Plant, Path, str], times: int) -> None:
    own, source, expected = begun
    found = side_by_side(lambda s=s: damaged(own, source, s) for s in range(times))
    wrong = [f for f in found if (f[1], f[2], len(f[3]), f[4], f[5]) != (76, 0, 1, True, expected)]
    print(f"\nC1: {len(found)} damaged, {len(wrong)} mismatches")
    assert wrong == []
    assert len({what for what, *_ in found}) == 2 * len(list(list_checkpoints(source)[-1].iterdir()))
    for what, _, _, (said,), *_ in found:
        assert "step-000002 is damaged: " in said and ".corrupt-step-000002" in said
        # A name in the manifest may be what was damaged: then that name is said.
        assert what.split()[1] in said or "manifest" in said or "manifest" in what


# --- hostility ---------------------------------------------------------------------------------------------


class Canary:
    """Creates a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


Attack = Callable[[Path, Path], None]


def poisoned(name: str) -> Attack:
    return lambda step, canary: (step / name).write_bytes(pickle.dumps(Canary(canary)))


def written(name: str, data: bytes) -> Attack:
    return lambda step, canary: (step / name).write_bytes(data)


def tensors(name: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Attack:
    def attack(step: Path, canary: Path) -> None:
        found = load((step / name).read_bytes())
        changed = change(found)
        (step / name).write_bytes(save(found if changed is None else changed))

    return attack


def header(text: str, body: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text.encode() + body


def edited(change: Callable[[dict[str, Any]], Any]) -> Attack:
    def attack(step: Path, canary: Path) -> None:
        record = json.loads((step / "state.json").read_text("utf-8"))
        change(record)
        (step / "state.json").write_text(json.dumps(record), "utf-8")

    return attack


def replaced(name: str, make: Callable[[Path], Any]) -> Attack:
    def attack(step: Path, canary: Path) -> None:
        (step / name).unlink()
        make(step / name)

    return attack


def manifest(change: Callable[[dict[str, Any]], Any]) -> Attack:
    def attack(step: Path, canary: Path) -> None:
        found = json.loads((step / "manifest.json").read_text("utf-8"))
        change(found)
        (step / "manifest.json").write_text(json.dumps(found), "utf-8")

    return attack


def first(found: dict[str, torch.Tensor]) -> str:
    return next(name for name in sorted(found) if found[name].ndim > 1)


def filled(found: dict[str, torch.Tensor], value: str) -> dict[str, torch.Tensor]:
    return {first(found): torch.full_like(found[first(found)], float(value))}


WEIGHTS, MOMENTS, RNG = "adapter_model.safetensors", "optimizer.safetensors", "rng.safetensors"
OVERFLOW = '{"a":{"dtype":"F32","shape":[9223372036854775807,9223372036854775807],"data_offsets":[0,4]}}'
MANY = (
    "{" + ",".join(f'"t{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(300_000)) + "}"
)
SLOT = {"position": 3, "tries": 1, "credit": 0.1 + 0.2}
SLOTS: dict[str, Any] = {
    "are no list": SLOT,
    "are numbers": [3],
    "lie before the stream": [SLOT, SLOT | {"position": -1}],
    "have text for a number": [SLOT | {"tries": "1"}],
    "have a fraction of a try": [SLOT | {"tries": 1.5}],
    "were tried less than never": [SLOT | {"tries": -1}],
    "have a credit that is none": [SLOT | {"credit": float("nan")}],
    "were answered long ago": [SLOT | {"credit": 1.0}],
    "have no position": [{"tries": 1}],
}
ATTACKS: dict[str, Attack] = {
    **{f"pickle as {name}": poisoned(name) for name in (WEIGHTS, MOMENTS, RNG, "state.json")},
    "header of a terabyte": written(WEIGHTS, struct.pack("<Q", 1 << 40) + b"{}"),
    "300,000 tensors": written(WEIGHTS, header(MANY)),
    "5,000 tensors": written(WEIGHTS, header(MANY[: MANY.index('"t5000"') - 1] + "}")),
    "shape that overflows": written(WEIGHTS, header(OVERFLOW, b"abcd")),
    "deep header": written(WEIGHTS, header("[" * 100_000)),
    "empty file": written(WEIGHTS, b""),
    "NaN weights": tensors(WEIGHTS, lambda t: t.update(filled(t, "nan"))),
    "infinite moments": tensors(MOMENTS, lambda t: t.update(filled(t, "inf"))),
    "other rank": tensors(WEIGHTS, lambda t: {n: torch.cat([v, v]) for n, v in t.items()}),
    "missing tensor": tensors(WEIGHTS, lambda t: t.pop(first(t)) is None or None),
    "extra tensor": tensors(WEIGHTS, lambda t: t.update(evil=torch.zeros(1))),
    "moments of a stranger": tensors(MOMENTS, lambda t: t.update({"a.b/exp_avg": torch.zeros(1)})),
    "moments of another shape": tensors(MOMENTS, lambda t: t.update({first(t): torch.zeros(3, 3)})),
    "random state that is none": tensors(RNG, lambda t: t.update(torch=torch.zeros(3))),
    "deep JSON": written("state.json", DEEP),
    "JSON of another kind": written("state.json", b"[1]"),
    "not UTF-8": written("state.json", b"\xff\xfe\x00"),
    "state of another step": edited(lambda r: r["state"].update(step=7)),
    "negative position": edited(lambda r: r["state"].update(position=-5)),
    "text for a number": edited(lambda r: r["state"].update(num_tokens="9")),
    "unknown field": edited(lambda r: r["state"].update(evil=1)),
    **{
        f"slots that {what}": edited(lambda r, s=slots: r["state"].update(slots=s))
        for what, slots in SLOTS.items()
    },
    "logs that are no lengths": edited(lambda r: r.update(logs={"metrics.jsonl": "1"})),
    "link to another file": replaced("state.json", lambda p: p.symlink_to("/etc/passwd")),
    "link to the same content": lambda step, canary: (
        (step / WEIGHTS).rename(step.parent / "w"),
        (step / WEIGHTS).symlink_to(step.parent / "w"),
    )[0],
    "pipe": replaced(WEIGHTS, os.mkfifo),
    "folder": replaced(WEIGHTS, os.mkdir),
    "device": replaced(WEIGHTS, lambda p: p.symlink_to("/dev/zero")),
    "sparse giant": replaced(WEIGHTS, lambda p: (p.touch(), os.truncate(p, 1 << 40))),
    "name above the folder": manifest(lambda m: m.update({"../../x": {"bytes": 1, "sha256": ""}})),
    "absolute name": manifest(lambda m: m.update({"/etc/passwd": {"bytes": 1, "sha256": ""}})),
    "name with a NUL": manifest(lambda m: m.update({"a\0b": {"bytes": 1, "sha256": ""}})),
    "negative size": manifest(lambda m: m[WEIGHTS].update(bytes=-1)),
    "manifest of many": manifest(
        lambda m: m.update({f"f{i}": {"bytes": 0, "sha256": ""} for i in range(5000)})
    ),
    "deep manifest": written("manifest.json", DEEP),
    "manifest that is a list": written("manifest.json", b"[]"),
}
NOT_REMADE = ("manifest", "name", "size")


def remake(step: Path) -> None:
    """What an attacker would do: write a manifest that matches the current files, as far as readable."""
    found = {}
    for path in sorted(step.iterdir()):
        if path.name != "manifest.json" and path.is_file() and path.stat().st_size < 1 << 30:
            data = path.read_bytes()
            found[path.name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    for path in sorted(step.iterdir()):  # pipes and giants: their sizes, whatever they hold
        if path.name != "manifest.json" and path.name not in found:
            found[path.name] = {"bytes": path.lstat().st_size, "sha256": "0" * 64}
    (step / "manifest.json").write_text(json.dumps(found), "utf-8")


def attacked(own: Plant, source: Path, name: str) -> list[Any]:
    """[exit code, one line, memory growth in bytes, canary exists], with only the hostile checkpoint."""
    run, canary = own.fresh(), own.folder / f"canary-{os.getpid()}"
    shutil.copytree(source, run)
    one, step = list_checkpoints(run)
    shutil.rmtree(one)
    ATTACKS[name](step, canary)
    if not any(word in name for word in NOT_REMADE):
        remake(step)
    with own.measured() as memory:
        ended = own.run(run)
    there = canary.exists()
    shutil.rmtree(run)
    return [ended.code, "\n" not in ended.said and bool(ended.said), memory(), there]


def test_hostile_checkpoints_are_refused(begun: tuple[Plant, Path, str], tmp_path: Path) -> None:
    own, source, _ = begun
    pickle.loads(pickle.dumps(Canary(tmp_path / "sung"))).close()
    assert (tmp_path / "sung").exists(), "the control: the canary can sing"
    names = list(ATTACKS)
    found = dict(zip(names, side_by_side(lambda n=n: attacked(own, source, n) for n in names), strict=True))
    wrong = {n: f for n, f in found.items() if f[:2] != [76, True] or f[2] > 500 << 20 or f[3]}
    print(f"\nC2: {len(found)} hostile checkpoints, {len(wrong)} not refused, 0 ran code")
    assert wrong == {}


def test_slots_come_back_as_they_were(begun: tuple[Plant, Path, str], tmp_path: Path) -> None:
    """The control of the hostile ones: a sound slot is read, to the last digit of its credit."""
    step = Path(shutil.copytree(list_checkpoints(begun[1])[-1], tmp_path / "step-000002"))
    edited(lambda r: r["state"].update(slots=[SLOT, SLOT | {"position": 4}]))(step, tmp_path)
    remake(step)
    assert stored_state(step).slots == (Slot(3, 1, 0.1 + 0.2), Slot(4, 1, 0.1 + 0.2))


def no_pickle() -> None:
    def hook(event: str, arguments: Any) -> None:
        if event == "pickle.find_class":
            raise RuntimeError(f"unpickled {arguments}")

    sys.addaudithook(hook)


def no_pickle_then_one() -> None:
    no_pickle()
    pickle.loads(pickle.dumps(Path("/")))


def test_nothing_is_unpickled_in_a_run_or_its_resumption(begun: tuple[Plant, Path, str]) -> None:
    own, source, expected = begun
    run = own.fresh()
    shutil.copytree(source, run)
    ended = own.run(run, change=no_pickle)
    assert (ended.code, digest(run)) == (0, expected), ended.said
    fresh = own.fresh()
    assert own.run(fresh, change=no_pickle).code == 0
    control = own.run(own.fresh(), change=no_pickle_then_one)
    assert control.code == 70, "the hook sees a pickle"


# --- another run's ------------------------------------------------------------------------------------------


def test_what_may_not_change_is_named_and_what_may_is_recorded(tmp_path: Path, model_dir: Path) -> None:
    recipe_file, run = write_recipe(tmp_path, model_dir), tmp_path / "run"

    def go(*settings: str, **options: Any) -> None:
        recipe = load_recipe(str(recipe_file), ["run.eval_every=0", *settings])
        train(recipe, run, TrainOptions(resume=True, **options))

    go("run.steps=1")
    with pytest.raises(RecipeError, match=r"optim.learning_rate is 0.5, the run was started with 0.01"):
        go("run.steps=2", "optim.learning_rate=0.5")
    go("run.steps=2", "optim.learning_rate=0.5", allow_change=("optim.learning_rate",))
    log = [json.loads(line) for line in (run / "events.jsonl").read_text("utf-8").splitlines()]
    assert {"event": "changed", "field": "optim.learning_rate", "old": 0.01, "new": 0.5} in log

    kept = recipe_file.with_name("problems.jsonl").read_text("utf-8")
    recipe_file.with_name("problems.jsonl").write_text(kept.replace("2 + 2", "2 + 9"), "utf-8")
    with pytest.raises(RecipeError, match="the training data has changed since the run was started"):
        go("run.steps=3", "optim.learning_rate=0.5")
    recipe_file.with_name("problems.jsonl").write_text(kept, "utf-8")

    other = shutil.copytree(model_dir, tmp_path / "kept")
    weights = load((model_dir / "model.safetensors").read_bytes())
    name = next(n for n in weights if n.endswith("q_proj.weight"))
    try:
        weights[name] += 1.0
        (model_dir / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))
        with pytest.raises(RecipeError, match="the base model has changed since the run was started"):
            go("run.steps=3", "optim.learning_rate=0.5")
    finally:
        shutil.copy(other / "model.safetensors", model_dir / "model.safetensors")
    go("run.steps=3", "optim.learning_rate=0.5")


def test_another_torch_or_thread_count_is_reported(tmp_path: Path, model_dir: Path) -> None:
    recipe = load_recipe(str(write_recipe(tmp_path, model_dir)), ["run.eval_every=0", "run.steps=1"])
    run = tmp_path / "run"
    train(recipe, run)
    facts = json.loads((run / "environment.json").read_text("utf-8"))
    facts["versions"]["torch"], facts["threads"] = "1.0", 64
    (run / "environment.json").write_text(json.dumps(facts), "utf-8")
    longer = recipe.model_copy(update={"run": recipe.run.model_copy(update={"steps": 2})})
    train(longer, run, TrainOptions(resume=True))
    log = [json.loads(line) for line in (run / "events.jsonl").read_text("utf-8").splitlines()]
    changed = {e["what"]: (e["old"], e["new"]) for e in log if e["event"] == "environment_changed"}
    assert changed == {"torch": ("1.0", torch.__version__), "threads": (64, torch.get_num_threads())}


# --- room ---------------------------------------------------------------------------------------------------


def test_a_disk_that_is_too_small_is_found_before_the_first_step(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(str(write_recipe(tmp_path, model_dir)), ["run.keep=2"])
    one = 3 * sum(len(d) for d in _adapter_bytes(tmp_path, recipe))
    for room, fits in ((1.5 * one, False), (100 * one, True)):
        monkeypatch.setattr(store, "_free_bytes", lambda path, room=room: int(room))
        run = tmp_path / f"run-{fits}"
        if fits:
            assert train(recipe, run)["steps"] == 3
            continue
        with pytest.raises(
            StorageError, match=r"not enough disk space: [\d.]+ MB needed, [\d.]+ MB free"
        ) as raised:
            train(recipe, run)
        assert raised.value.exit_code == 74
        assert not (run / "rollouts").exists(), "nothing was sampled"


def _adapter_bytes(tmp_path: Path, recipe: Any) -> list[bytes]:
    train(recipe.model_copy(update={"run": recipe.run.model_copy(update={"steps": 1})}), tmp_path / "sized")
    step = checkpoint_path(tmp_path / "sized", 1)
    assert stored_state(step).step == 1
    return [(step / n).read_bytes() for n in (WEIGHTS, "adapter_config.json")]


def test_a_refused_save_is_never_reported_as_saved(plant: Plant, straight_child: tuple[Ended, str]) -> None:
    """The checkpoint directory refuses every save."""

    def refuse() -> None:
        real = store._mkdir

        def mkdir(path: Path) -> None:
            if path.name.startswith(".tmp-step-"):
                raise PermissionError(13, "Permission denied", str(path))
            real(path)

        store._mkdir = mkdir

    run = plant.fresh()
    ended = plant.run(run, change=refuse)
    assert ended.code == 74 and "Permission denied" in ended.said and "checkpoints" in ended.said
    assert not any("saved" in text for _, text in ended.notes) and list_checkpoints(run) == []
    assert plant.run(run).code == 0 and digest(run) == straight_child[1]
