"""Whenever a writer dies, a reader finds the old state or the new one."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from empg_lite.core.errors import RunInUse, StorageError
from empg_lite.run import store


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a" / "file.json"
    store.write_file(path, "old")

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(StorageError, match="No space left.*file.json.*free some space") as raised:
        store.write_file(path, "new")
    monkeypatch.undo()
    assert raised.value.exit_code == 74
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]


@pytest.mark.parametrize("fail_at", [1, 2, 3])
def test_a_failed_directory_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail_at: int
) -> None:
    path = tmp_path / "step-000001"
    store.write_dir(path, {"a.bin": b"old", "b.bin": b"old"})
    real, calls = os.write, 0

    def full(fd: int, data: bytes) -> int:
        nonlocal calls
        calls += 1
        if calls == fail_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(StorageError):
        store.write_dir(path, {"a.bin": b"new", "b.bin": b"new"})
    monkeypatch.undo()
    assert store.verify_dir(path) is None
    assert (path / "a.bin").read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]


def test_write_dir_replaces_a_whole_directory(tmp_path: Path) -> None:
    path = tmp_path / "adapter"
    store.write_dir(path, {"a": b"1", "gone": b"2"})
    store.write_dir(path, {"a": b"3"})
    assert sorted(p.name for p in path.iterdir()) == ["a", "manifest.json"]
    assert store.verify_dir(path) is None


def test_short_writes_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, bytes(data[:3])))
    store.write_file(tmp_path / "f", b"0123456789")
    store.append_text(tmp_path / "log", "abcdefgh\n")
    monkeypatch.undo()
    assert (tmp_path / "f").read_bytes() == b"0123456789"
    assert (tmp_path / "log").read_text() == "abcdefgh\n"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda d: (d / "w.bin").write_bytes(b"weightz"), "w.bin does not match its sha256"),
        (lambda d: (d / "w.bin").write_bytes(b"weigh"), "w.bin has 5 bytes, manifest.json says 7"),
        (lambda d: (d / "w.bin").unlink(), "w.bin cannot be read"),
        (lambda d: (d / "manifest.json").unlink(), "manifest.json cannot be read"),
        (lambda d: (d / "manifest.json").write_text("[1, 2]"), "manifest.json is not a manifest"),
        (lambda d: (d / "manifest.json").write_text('{"../w": {}}'), "outside the folder"),
        (lambda d: (d / "manifest.json").write_text('{"w.bin": {}}'), "not a manifest"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage, reason: str) -> None:  # type: ignore[no-untyped-def]
    store.write_dir(tmp_path / "d", {"w.bin": b"weights"})
    assert store.verify_dir(tmp_path / "d") is None
    damage(tmp_path / "d")
    assert reason in str(store.verify_dir(tmp_path / "d"))


def test_truncate_cuts_back_and_refuses_a_short_log(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    store.append_line(log, {"step": 1})
    length = store.size(log)
    store.append_line(log, {"step": 2})
    store.truncate(log, length)
    assert log.read_text() == '{"step": 1}\n'
    with pytest.raises(StorageError, match="shorter than the checkpoint says"):
        store.truncate(log, length + 1)
    store.truncate(tmp_path / "absent", 0)


def test_sweep_removes_leftovers_only(tmp_path: Path) -> None:
    (tmp_path / ".tmp-x").mkdir()
    (tmp_path / ".tmp-y").write_text("")
    (tmp_path / "kept").write_text("")
    store.sweep(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]


def test_set_aside_never_overwrites(tmp_path: Path) -> None:
    names = []
    for _ in range(3):
        (tmp_path / "step-1").mkdir()
        names.append(store.set_aside(tmp_path / "step-1").name)
    assert names == [".corrupt-step-1", ".corrupt-step-1.1", ".corrupt-step-1.2"]


def test_a_run_is_held_by_one_process_and_freed_by_its_death(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib\nfrom empg_lite.run import store\n"
        "with store.run_lock(pathlib.Path(sys.argv[1])):\n"
        "    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(RunInUse, match=f"process {holder.pid}") as raised, store.run_lock(tmp_path):
        pass
    assert raised.value.exit_code == 73
    holder.kill()
    holder.wait()
    with store.run_lock(tmp_path):
        pass
    with store.run_lock(tmp_path):
        pass


def test_a_file_system_without_locks_is_not_reported_as_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some network file systems refuse flock altogether."""

    def refuse(fd: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(store.fcntl, "flock", refuse)
    with pytest.raises(StorageError, match="does not support locks .No locks available.") as raised:
        with store.run_lock(tmp_path / "run"):
            raise AssertionError("entered")
    assert raised.value.exit_code == 74
