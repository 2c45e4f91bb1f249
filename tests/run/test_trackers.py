"""Trackers get the metric stream unchanged, continue on resume, and never end a run."""

from __future__ import annotations

import ast
import json
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from empg_lite.run import trackers
from empg_lite.run.journal import read_metrics


def scalars(run: Path) -> dict[int, dict[str, float]]:
    """What every tracker should contain: numbers by step, from metrics.jsonl."""
    return {
        r["step"]: {k: v for k, v in r.items() if isinstance(v, int | float) and k != "step"}
        for r in read_metrics(run / "metrics.jsonl")
    }


def tensorboard_scalars(folder: Path) -> dict[int, dict[str, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}, purge_orphaned_data=True).Reload()
    found: dict[int, dict[str, float]] = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            found.setdefault(event.step, {})[name] = event.value
    return found


def trackio_scalars(folder: Path) -> dict[int, dict[str, float]]:
    (database,) = folder.glob("*.db")
    rows = sqlite3.connect(database).execute("select step, metrics from metrics order by id").fetchall()
    return {step: json.loads(text) for step, text in rows}


def wandb_records(data: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: a LevelDB log in blocks of 32 KB, after a header of 7 bytes."""
    position, whole = 7, b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # the rest of a block is padding
            position += 32768 - position % 32768
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # full, or the last part
            yield whole
            whole = b""


def wandb_scalars(run: Path) -> dict[int, dict[str, float]]:
    from wandb.proto import wandb_internal_pb2

    found: dict[int, dict[str, float]] = {}
    for path in sorted((run / "wandb").glob("offline-run-*/*.wandb")):
        for data in wandb_records(path.read_bytes()):
            entry = wandb_internal_pb2.Record()
            entry.ParseFromString(data)
            if entry.WhichOneof("record_type") == "history":
                items = {
                    "/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in entry.history.item
                }
                step = int(items.pop("_step", entry.history.step.num))
                found[step] = {k: v for k, v in items.items() if not k.startswith("_")}
    return found


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing leaves the machine, and nothing remains outside the test folder."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    return tmp_path


def test_tensorboard_holds_the_metrics_also_of_a_resumed_run(cli, recipe_file: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("tensorboard")
    run = tmp_path / "run"
    arguments = ("train", "--recipe", recipe_file, "--output-dir", run, "--track", "tensorboard")
    assert cli(*arguments, "--set", "run.save_every=2", "--max-minutes", 0)[0] == 0
    assert cli(*arguments, "--set", "run.save_every=2", "--resume")[0] == 0
    kept, written = tensorboard_scalars(run / "tensorboard"), scalars(run)
    assert kept.keys() == written.keys() == {0, 1, 2, 3}
    for step, values in written.items():
        assert kept[step].keys() == values.keys()
        for name, value in values.items():
            assert kept[step][name] == pytest.approx(value, rel=1e-6), name  # float32


@pytest.mark.slow
def test_trackio_and_wandb_hold_the_metrics_and_the_recipe(recipe_file: Path, offline: Path) -> None:
    """In a separate process: both leave threads and handlers behind."""
    pytest.importorskip("trackio")
    pytest.importorskip("wandb")
    run = offline / "run"
    command = [
        sys.executable,
        "-m",
        "empg_lite",
        "train",
        "--recipe",
        str(recipe_file),
        "--output-dir",
        str(run),
    ]
    command += ["--track", "trackio", "--track", "wandb", "--resume"]
    for more in (["--max-minutes", "0"], []):
        done = subprocess.run([*command, *more], capture_output=True, text=True, env=os.environ, cwd=offline)
        assert done.returncode == 0 and "failed" not in done.stdout, done.stdout + done.stderr
        names = json.loads((run / "tracking.json").read_text())
    written = scalars(run)
    kept = trackio_scalars(offline / "trackio")
    assert kept == {step: pytest.approx(values) for step, values in written.items()}
    assert wandb_scalars(run) == {step: pytest.approx(values) for step, values in written.items()}
    folders = [p.name for p in (run / "wandb").glob("offline-run-*")]
    assert len(folders) == 2 and all(f.endswith(names["wandb"]) for f in folders)  # one run, in two parts


def test_a_failing_tracker_is_reported_once_and_disabled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing:
        def __init__(self, run: Path, recipe: Any, step: int) -> None:
            self.seen: list[int] = []

        def log(self, values: dict[str, float], step: int) -> None:
            self.seen.append(step)
            if step == 2:
                raise RuntimeError("the service\nis down")

        def close(self) -> None:
            raise AssertionError("a tracker that failed is not asked again")

    monkeypatch.setattr(trackers, "_Tensorboard", Failing)
    said: list[str] = []
    with trackers.tracked(["tensorboard"], tmp_path, None, 0, said.append) as (sink,):  # type: ignore[arg-type]
        for step in range(1, 5):
            sink({"step": step, "reward": 1.0, "health": [], "note": "x", "loss": None})
    assert said == ["tensorboard failed and is disabled for the rest of the run: the service is down"]


def test_only_numbers_are_logged_and_the_name_persists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, dict[str, float]]] = []

    class Recording:
        def __init__(self, run: Path, recipe: Any, step: int) -> None:
            self.name = trackers._remembered(run, "trackio")

        def log(self, values: dict[str, float], step: int) -> None:
            seen.append((step, values))

        def close(self) -> None:
            seen.append((-1, {}))

    monkeypatch.setattr(trackers, "_Trackio", Recording)
    names = []
    for _ in range(2):
        with trackers.tracked(["trackio"], tmp_path, None, 0, print) as (sink,):  # type: ignore[arg-type]
            sink({"step": 1, "reward": 0.5, "health": ["x"], "loss": None, "n": 3})
        names.append(json.loads((tmp_path / "tracking.json").read_text())["trackio"])
    assert names[0] == names[1] and names[0].startswith(tmp_path.name)
    assert seen == [(1, {"reward": 0.5, "n": 3}), (-1, {})] * 2
    (tmp_path / "tracking.json").write_text("garbage")
    assert trackers._remembered(tmp_path, "wandb").startswith(tmp_path.name)


def test_what_is_refused(cli, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    arguments = ("train", "--recipe", recipe_file, "--output-dir", tmp_path / "run", "--track")
    code, _, err = cli(*arguments, "mlflow")
    assert code == 2 and "tensorboard" in err.splitlines()[-1]
    find = trackers.importlib.util.find_spec
    monkeypatch.setattr(
        trackers.importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else find(name, *a)
    )
    code, _, err = cli(*arguments, "wandb")
    assert code == 2 and "pip install wandb" in err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_trackers_are_imported_only_on_request() -> None:
    """No module imports a tracker at the top; `test_security.py` checks the sockets."""
    package = Path(trackers.__file__).parent
    for path in package.rglob("*.py"):
        top = [
            n for n in ast.parse(path.read_text("utf-8")).body if isinstance(n, ast.Import | ast.ImportFrom)
        ]
        text = "\n".join(map(ast.unparse, top))
        assert not re.search(r"\b(wandb|trackio|tensorboard)\b", text), path.name
    assert trackers.require([]) is None
    with trackers.tracked([], package, None, 0, print) as sinks:  # type: ignore[arg-type]
        assert sinks == []
