"""The only calls that write to disk.

A reader of a run directory must find either the old state or the new one, whatever instant the
process or the machine died at. So files are written under a temporary name, synced, and published by
one rename; a whole directory is published the same way. Everything that persists goes through here.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec

from empg_lite.errors import RunInUse, StorageError

_TMP = ".tmp-"
_reading_only = False
P = ParamSpec("P")


@contextmanager
def reading_only(active: bool = True) -> Iterator[None]:
    """Within the block nothing here writes, locks or removes: another process of a launch does it."""
    global _reading_only
    before, _reading_only = _reading_only, active
    try:
        yield
    finally:
        _reading_only = before


def _writes(call: Callable[P, None]) -> Callable[P, None]:
    """What ``reading_only`` switches off."""

    @functools.wraps(call)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        if not _reading_only:
            call(*args, **kwargs)

    return guarded


@contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    """Turn an OSError into one line that names the path and, on a full disk, the room left."""
    try:
        yield
    except OSError as error:
        todo = "check the folder's permissions and disk"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            left = _free_bytes(path) / 1e6
            todo = f"free some space ({left:.0f} MB left) and repeat the command with --resume"
        raise StorageError(error.strerror or str(error), str(path), todo) from error


def _free_bytes(path: Path) -> int:
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def _fsync_dir(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_all(fd: int, data: bytes) -> None:
    """``os.write`` may take less than it was given."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _write_synced(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        _write_all(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)


@_writes
def make_dirs(path: Path) -> None:
    """Create ``path`` and its parents where they are missing."""
    with _storage_errors(path):
        path.mkdir(parents=True, exist_ok=True)


@_writes
def write_file(path: Path, data: bytes | str) -> None:
    """Replace ``path`` by ``data`` in one step: old content or new, never a part.

    Raises:
        StorageError: nothing was replaced.
    """
    data = data.encode("utf-8") if isinstance(data, str) else data
    with _storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_name(f"{_TMP}{path.name}-{os.getpid()}")
        try:
            _write_synced(staged, data)
            os.replace(staged, path)
        except OSError:
            staged.unlink(missing_ok=True)
            raise
        _fsync_dir(path.parent)


@_writes
def write_dir(path: Path, files: Mapping[str, bytes]) -> None:
    """Publish a directory of ``files`` (flat names) at ``path`` in one rename, replacing an older one.

    A ``manifest.json`` with each file's size and SHA-256 is written last.

    Raises:
        StorageError: nothing was published.
    """
    manifest = {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()
    }
    with _storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_name(f"{_TMP}{path.name}-{os.getpid()}")
        shutil.rmtree(staged, ignore_errors=True)
        try:
            staged.mkdir()
            for name, data in files.items():
                _write_synced(staged / name, data)
            _write_synced(staged / "manifest.json", json.dumps(manifest, indent=1).encode())
            _fsync_dir(staged)
            if path.exists():
                # rename() cannot replace a full directory: the old one steps aside first. Dying between
                # the two renames leaves no `path`, but never a partial one.
                aside = path.with_name(f"{_TMP}old-{path.name}-{os.getpid()}")
                os.rename(path, aside)
                os.rename(staged, path)
                shutil.rmtree(aside, ignore_errors=True)
            else:
                os.rename(staged, path)
        except OSError:
            shutil.rmtree(staged, ignore_errors=True)
            raise
        _fsync_dir(path.parent)


def verify_dir(path: Path) -> str | None:
    """What is wrong with a directory made by ``write_dir``, in words; None where it is whole."""
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        for name, expected in manifest.items():
            if "/" in name or name.startswith("."):
                return f"manifest.json names a file outside the folder: {name!r}"
            data = (path / name).read_bytes()
            if len(data) != expected["bytes"]:
                return f"{name} has {len(data)} bytes, manifest.json says {expected['bytes']}"
            if hashlib.sha256(data).hexdigest() != expected["sha256"]:
                return f"{name} does not match its sha256 in manifest.json"
    except OSError as error:
        return (
            f"{Path(error.filename).name if error.filename else path.name} cannot be read ({error.strerror})"
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"manifest.json is not a manifest ({error})"
    return None


def file_digest(folder: Path, name: str) -> str | None:
    """SHA-256 that the folder's manifest gives for a file; None where there is no such manifest or entry."""
    try:
        return str(json.loads((folder / "manifest.json").read_bytes())[name]["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


@_writes
def remove_dir(path: Path) -> None:
    """Remove a directory; a half-removed one is never taken for a whole one (it is renamed first)."""
    if not path.exists():
        return
    with _storage_errors(path):
        doomed = path.with_name(f"{_TMP}gone-{path.name}-{os.getpid()}")
        os.rename(path, doomed)
        shutil.rmtree(doomed)


def set_aside(path: Path, prefix: str = ".corrupt-") -> Path:
    """Rename a directory out of the way (kept for inspection) and return its new path."""
    with _storage_errors(path):
        target = path.with_name(f"{prefix}{path.name}")
        n = 1
        while target.exists():
            n, target = n + 1, path.with_name(f"{prefix}{path.name}.{n}")
        os.rename(path, target)
        _fsync_dir(path.parent)
    return target


@_writes
def sweep(folder: Path) -> None:
    """Remove what interrupted writes left behind in ``folder``."""
    if not folder.is_dir():
        return
    with _storage_errors(folder):
        for leftover in folder.glob(f"{_TMP}*"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append one JSON object as a line. A torn last line is cut on resume (see ``truncate``)."""
    append_text(path, json.dumps(record, ensure_ascii=False) + "\n")


@_writes
def append_text(path: Path, text: str) -> None:
    """Append text in one write and sync it."""
    with _storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            _write_all(fd, text.encode("utf-8", "surrogatepass"))
            os.fsync(fd)
        finally:
            os.close(fd)


def size(path: Path) -> int:
    """Bytes in ``path``; 0 where it does not exist."""
    return path.stat().st_size if path.exists() else 0


@_writes
def truncate(path: Path, length: int) -> None:
    """Cut a log back to ``length`` bytes: what came after the checkpoint is written again on resume."""
    if not path.exists():
        return
    with _storage_errors(path):
        if path.stat().st_size < length:
            raise OSError(
                errno.EIO, f"log is shorter than the checkpoint says ({path.stat().st_size} < {length})"
            )
        with open(path, "r+b") as file:
            file.truncate(length)
            os.fsync(file.fileno())


@contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Hold ``RUN/LOCK`` while the block runs; the kernel frees it when the process dies.

    Raises:
        RunInUse: another process holds it.
    """
    if _reading_only:
        yield
        return
    make_dirs(run)
    path = run / "LOCK"
    with _storage_errors(path):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(fd, 64, 0).decode("ascii", "replace").strip() or "unknown"
            raise RunInUse(
                f"run directory in use by process {holder}",
                str(run),
                "wait for it, or choose another --output-dir",
            ) from error
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        yield
        os.ftruncate(fd, 0)
    finally:
        os.close(fd)
