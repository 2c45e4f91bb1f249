"""The only calls that write to disk.

A reader of a run directory must find either the old state or the new one, whatever instant the
process or the machine died at. So files are written under a temporary name, synced, and published by
one rename; a whole directory is published the same way. Everything that persists goes through here, and
every change to the disk is one of the eight calls below: the crash tests replace them, to die or to fail at
each. Files are the user's alone (0600, folders 0700), and a symbolic link is never written through.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import json
import os
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any, ParamSpec

from empg_lite.core.errors import RunInUse, StorageError
from empg_lite.core.safe_text import safe

_TMP = ".tmp-"
_reading_only = False
P = ParamSpec("P")


# --- the calls that change the disk ----------------------------------------------------------------------


def _open(path: Path, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _write(fd: int, data: memoryview) -> int:
    return os.write(fd, data)


def _fsync(fd: int) -> None:
    os.fsync(fd)


def _rename(old: Path, new: Path) -> None:
    os.rename(old, new)


def _unlink(path: Path) -> None:
    os.unlink(path)


def _mkdir(path: Path) -> None:
    os.mkdir(path, 0o700)


def _rmdir(path: Path) -> None:
    os.rmdir(path)


def _cut(fd: int, length: int) -> None:
    os.ftruncate(fd, length)


# --- what is made of them --------------------------------------------------------------------------------


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
def _storage_errors(path: Path, needed: int = 0) -> Iterator[None]:
    """Turn an OSError into one line that names the path and, on a full disk, the bytes needed and left."""
    try:
        yield
    except OSError as error:
        todo = "check the folder's permissions and disk"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            room = f"{needed:,} bytes needed, {_free_bytes(path):,} free"
            todo = f"free some space ({room}) and repeat the command with --resume"
        elif error.errno == errno.ELOOP:
            todo = "symbolic links are not written through: name the file itself"
        raise StorageError(error.strerror or str(error), str(path), todo) from error


def _free_bytes(path: Path) -> int:
    return shutil.disk_usage(_existing(path)).free


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _fsync_dir(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _fsync(fd)
    finally:
        os.close(fd)


def _write_all(fd: int, data: bytes) -> None:
    """A write may take less than it was given."""
    view = memoryview(data)
    while view:
        view = view[_write(fd, view) :]


def _write_synced(path: Path, data: bytes, flags: int = os.O_TRUNC) -> None:
    fd = _open(path, os.O_WRONLY | flags)
    try:
        _write_all(fd, data)
        _fsync(fd)
    finally:
        os.close(fd)


def _make_dirs(path: Path) -> None:
    """What is missing of a folder and its parents, each entry synced into the folder above it."""
    above = _existing(path)
    for name in path.relative_to(above).parts:
        try:
            _mkdir(above / name)
        except FileExistsError:
            if not (above / name).is_dir():
                raise
        _fsync_dir(above)
        above = above / name


def _remove_tree(path: Path) -> None:
    """A folder and all in it; symbolic links are removed, never followed."""
    for entry in list(os.scandir(path)):
        if entry.is_dir(follow_symlinks=False):
            _remove_tree(Path(entry.path))
        else:
            _unlink(Path(entry.path))
    _rmdir(path)


def _discard(path: Path) -> None:
    """Remove what a failed write left, as far as that goes: ``sweep`` removes the rest."""
    with suppress(OSError):
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        _remove_tree(path)
    else:
        _unlink(path)


@_writes
def make_dirs(path: Path) -> None:
    """Create ``path`` and its parents where they are missing."""
    with _storage_errors(path):
        _make_dirs(path)


@_writes
def write_file(path: Path, data: bytes | str) -> None:
    """Replace ``path`` by ``data`` in one step: old content or new, never a part.

    Raises:
        StorageError: nothing was replaced.
    """
    data = data.encode("utf-8") if isinstance(data, str) else data
    with _storage_errors(path, len(data)):
        _make_dirs(path.parent)
        staged = path.with_name(f"{_TMP}{path.name}-{os.getpid()}")
        try:
            _write_synced(staged, data)
            _rename(staged, path)
        except OSError:
            _discard(staged)
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
    with _storage_errors(path, sum(map(len, files.values()))):
        _make_dirs(path.parent)
        staged = path.with_name(f"{_TMP}{path.name}-{os.getpid()}")
        if staged.exists():  # of a process that died and had our number
            _remove_tree(staged)
        try:
            _mkdir(staged)
            for name, data in files.items():
                _write_synced(staged / name, data)
            _write_synced(staged / "manifest.json", json.dumps(manifest, indent=1).encode())
            _fsync_dir(staged)
            if path.exists():
                # rename() cannot replace a full directory: the old one steps aside first. Dying between
                # the two renames leaves no `path`, but never a partial one.
                aside = path.with_name(f"{_TMP}old-{path.name}-{os.getpid()}")
                _rename(path, aside)
                _rename(staged, path)
                _fsync_dir(path.parent)
                _remove_tree(aside)
            else:
                _rename(staged, path)
                _fsync_dir(path.parent)
        except OSError:
            _discard(staged)
            raise


def verify_dir(path: Path) -> str | None:
    """What is wrong with a directory made by ``write_dir``, in words; None where it is whole.

    It may be anybody's: nothing is followed, no more is read than the manifest says, and that is small.
    """
    try:
        manifest = json.loads(read_regular(path / "manifest.json", MAX_MANIFEST))
        if len(manifest) > MAX_FILES:
            return f"manifest.json names {len(manifest)} files"
        for name, expected in manifest.items():
            if "/" in name or name.startswith(".") or "\0" in name:
                return f"manifest.json names a file outside the folder: {name!r}"
            length = int(expected["bytes"])
            with _regular(path / name, min(length, MAX_FILE)) as file:
                if (found := os.fstat(file.fileno()).st_size) != length:
                    return f"{name} has {found} bytes, manifest.json says {length}"
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != expected["sha256"]:
                return f"{name} does not match its sha256 in manifest.json"
    except OSError as error:
        name = Path(error.filename).name if error.filename else path.name
        return f"{name} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"manifest.json is not a manifest ({str(error)[:200]})"
    return None


#: A manifest of ours has some 100 bytes a file; the optimiser of a 7B model's adapter of rank 256 has 5 GB.
MAX_MANIFEST, MAX_FILES, MAX_FILE = 1 << 20, 1000, 1 << 33


def read_regular(path: Path, most: int) -> bytes:
    """The content of a regular file of at most ``most`` bytes; a link, a pipe or a device is none.

    Raises:
        OSError: it is something else, larger, or cannot be read.
    """
    with _regular(path, most) as file:
        return file.read(os.fstat(file.fileno()).st_size)


def _regular(path: Path, most: int) -> BufferedReader:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    facts = os.fstat(fd)
    why = "it is no regular file" if not stat.S_ISREG(facts.st_mode) else None
    if facts.st_size > most:
        why = why or f"{facts.st_size:,} bytes where at most {most:,} belong"
    if why:
        os.close(fd)
        raise OSError(errno.EINVAL, why, str(path))
    return open(fd, "rb")


def file_digest(folder: Path, name: str) -> str | None:
    """SHA-256 that the folder's manifest gives for a file; None where there is no such manifest or entry."""
    try:
        return str(json.loads((folder / "manifest.json").read_bytes())[name]["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def staged_dir(path: Path) -> Iterator[Path]:
    """A folder to fill, which becomes ``path`` in one rename when the block ends; an exception discards it.

    Raises:
        StorageError: it cannot be made, synced or renamed; ``path`` is as it was.
    """
    staged = path.with_name(f"{_TMP}{path.name}-{os.getpid()}")
    with _storage_errors(path):
        _make_dirs(path.parent)
        if staged.exists():  # of a process that died and had our number
            _remove_tree(staged)
        _mkdir(staged)
    try:
        yield staged
        with _storage_errors(path):
            for file in staged.iterdir():  # libraries that wrote here do not sync
                fd = os.open(file, os.O_RDONLY | os.O_NOFOLLOW)
                try:
                    _fsync(fd)
                finally:
                    os.close(fd)
            _fsync_dir(staged)
            _rename(staged, path)
            _fsync_dir(path.parent)
    except BaseException:
        _discard(staged)
        raise


@_writes
def remove_dir(path: Path) -> None:
    """Remove a directory; a half-removed one is never taken for a whole one (it is renamed first)."""
    if not path.exists():
        return
    with _storage_errors(path):
        doomed = path.with_name(f"{_TMP}gone-{path.name}-{os.getpid()}")
        _rename(path, doomed)
        _fsync_dir(path.parent)
        _remove_tree(doomed)


def set_aside(path: Path, prefix: str = ".corrupt-") -> Path:
    """Rename a directory out of the way (kept for inspection) and return its new path."""
    with _storage_errors(path):
        target = path.with_name(f"{prefix}{path.name}")
        n = 1
        while target.exists():
            n, target = n + 1, path.with_name(f"{prefix}{path.name}.{n}")
        _rename(path, target)
        _fsync_dir(path.parent)
    return target


@_writes
def sweep(folder: Path) -> None:
    """Remove what interrupted writes left behind in ``folder``."""
    if not folder.is_dir():
        return
    with _storage_errors(folder):
        for leftover in folder.glob(f"{_TMP}*"):
            _remove(leftover)


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append one JSON object as a line. A torn last line is cut on resume (see ``truncate``)."""
    append_text(path, json.dumps(record, ensure_ascii=False) + "\n")


@_writes
def append_text(path: Path, text: str) -> None:
    """Append text in one write and sync it."""
    data = text.encode("utf-8", "surrogatepass")
    with _storage_errors(path, len(data)):
        _make_dirs(path.parent)
        new = not path.exists()
        _write_synced(path, data, os.O_APPEND)
        if new:
            _fsync_dir(path.parent)


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
        if path.stat().st_size == length:
            return
        fd = _open(path, os.O_WRONLY)
        try:
            _cut(fd, length)
            _fsync(fd)
        finally:
            os.close(fd)


def _size_text(size: int) -> str:
    return f"{size / 1e6:,.0f} MB" if size >= 10_000_000 else f"{size / 1e6:.1f} MB"


@_writes
def check_disk_space(folder: Path, trial: int, needed: int) -> None:
    """Write and remove ``trial`` bytes in ``folder``, where ``needed`` are to come.

    Raises:
        StorageError: there is no room for ``needed``, or nothing can be written.
    """
    with _storage_errors(folder, trial):
        _make_dirs(folder)
    free = _free_bytes(folder)
    if free < needed:
        raise StorageError(
            f"the disk is too full: {_size_text(needed)} needed, {_size_text(free)} free",
            str(folder),
            "free some space, name another --output-dir, or lower run.keep",
        )
    path, chunk = folder / f"{_TMP}trial-{os.getpid()}", bytes(min(trial, 1 << 20))
    with _storage_errors(path, trial):
        fd = _open(path, os.O_WRONLY | os.O_TRUNC)
        try:
            for start in range(0, trial, len(chunk)):
                _write_all(fd, chunk[: trial - start])
            _fsync(fd)
        finally:
            os.close(fd)
            _unlink(path)


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
        fd = _open(path, os.O_RDWR)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunInUse(
                f"run directory in use by {_holder(fd)}",
                str(run),
                "wait for it, or choose another --output-dir",
            ) from error
        except OSError as error:
            raise StorageError(
                f"the file system takes no locks ({error.strerror})",
                str(path),
                "put the run on another disk, and copy it when it has ended",
            ) from error
        with _storage_errors(path):
            _cut(fd, 0)
            _write_all(fd, f"process {os.getpid()} on {socket.gethostname()} since {_now()}\n".encode())
        yield
        with _storage_errors(path):
            _cut(fd, 0)
    finally:
        os.close(fd)


def _holder(fd: int) -> str:
    """What the holder of a lock says of itself; it may be about to say it."""
    for _ in range(20):
        said = os.pread(fd, 400, 0).decode("utf-8", "replace")
        if said.endswith("\n"):
            return safe(said.strip())
        time.sleep(0.01)
    return "a process that has not said which"


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %z")
