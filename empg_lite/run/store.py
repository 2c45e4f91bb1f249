"""The only calls that write to disk.

A reader of a run directory must find the old state or the new one, no matter when the process or the machine
died. So a file is written under a temporary name, synced, and published with one rename; a whole directory is
published the same way. All of the package's own output goes through this module (libraries write only into
staged folders and those of trackers), and every change to the disk is one of the eight calls below: the crash
tests replace them to die or fail at each one. Files are private to the user (0600, directories 0700), and
nothing is written through a symbolic link.
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
#: Limits of ``verify_dir``, in bytes and files. A manifest takes about 100 bytes per file; the optimizer
#: state of a rank-256 adapter of a 7B model takes 5 GB.
MAX_MANIFEST, MAX_FILES, MAX_FILE = 1 << 20, 1000, 1 << 33
_reading_only = False
P = ParamSpec("P")


# --- the eight calls that change the disk ----------------------------------------------------------------


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


# --- helpers ---------------------------------------------------------------------------------------------


@contextmanager
def reading_only(active: bool = True) -> Iterator[None]:
    """Within the block nothing here writes, locks or removes: another process of the launch does."""
    global _reading_only
    before, _reading_only = _reading_only, active
    try:
        yield
    finally:
        _reading_only = before


def _writes(call: Callable[P, None]) -> Callable[P, None]:
    """Make ``call`` a no-op under ``reading_only``."""

    @functools.wraps(call)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        if not _reading_only:
            call(*args, **kwargs)

    return guarded


@contextmanager
def _storage_errors(path: Path, needed: int = 0) -> Iterator[None]:
    """Turn an OSError into a StorageError that names the path and, on a full disk, bytes needed and free."""
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
    """The path, or its nearest existing parent."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _temporary(path: Path, kind: str = "") -> Path:
    """A name beside ``path`` that ``sweep`` removes if this process dies."""
    return path.with_name(f"{_TMP}{kind}{path.name}-{os.getpid()}")


@contextmanager
def _opened(path: Path, flags: int = 0) -> Iterator[int]:
    fd = _open(path, os.O_WRONLY | flags)
    try:
        yield fd
    finally:
        os.close(fd)


def _fsync_path(path: Path, flags: int) -> None:
    fd = os.open(path, os.O_RDONLY | flags)
    try:
        _fsync(fd)
    finally:
        os.close(fd)


def _fsync_dir(path: Path) -> None:
    _fsync_path(path, os.O_DIRECTORY)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:  # a write may be short
        view = view[_write(fd, view) :]


def _write_synced(path: Path, data: bytes, flags: int = os.O_TRUNC) -> None:
    with _opened(path, flags) as fd:
        _write_all(fd, data)
        _fsync(fd)


def _make_dirs(path: Path) -> None:
    """Create ``path`` and missing parents, syncing each new entry into its parent."""
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
    """Remove a directory tree; symbolic links are removed, never followed."""
    for entry in list(os.scandir(path)):
        if entry.is_dir(follow_symlinks=False):
            _remove_tree(Path(entry.path))
        else:
            _unlink(Path(entry.path))
    _rmdir(path)


def _discard(path: Path) -> None:
    """Remove what a failed write left, as far as possible; ``sweep`` removes the rest."""
    with suppress(OSError):
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        _remove_tree(path)
    else:
        _unlink(path)


def _stage(path: Path) -> Path:
    """A new empty temporary directory beside ``path``."""
    _make_dirs(path.parent)
    staged = _temporary(path)
    if staged.exists():  # left by a dead process with the same pid
        _remove_tree(staged)
    _mkdir(staged)
    return staged


# --- what the rest of the package calls ------------------------------------------------------------------


@_writes
def write_file(path: Path, data: bytes | str) -> None:
    """Replace ``path`` atomically: readers see the old content or the new, never a part.

    Raises:
        StorageError: nothing was replaced.
    """
    data = data.encode("utf-8") if isinstance(data, str) else data
    with _storage_errors(path, len(data)):
        _make_dirs(path.parent)
        staged = _temporary(path)
        try:
            _write_synced(staged, data)
            _rename(staged, path)
        except OSError:
            _discard(staged)
            raise
        _fsync_dir(path.parent)


@_writes
def write_dir(path: Path, files: Mapping[str, bytes]) -> None:
    """Publish a directory of ``files`` (flat names) at ``path`` with one rename, replacing an older one.

    ``manifest.json``, with the size and SHA-256 of each file, is written last.

    Raises:
        StorageError: nothing was published.
    """
    manifest = {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()
    }
    with _storage_errors(path, sum(map(len, files.values()))):
        staged = _stage(path)
        try:
            for name, data in files.items():
                _write_synced(staged / name, data)
            _write_synced(staged / "manifest.json", json.dumps(manifest, indent=1).encode())
            _fsync_dir(staged)
            aside = _temporary(path, "old-") if path.exists() else None
            if aside is not None:
                # rename() cannot replace a non-empty directory. Dying between the two renames leaves no
                # `path`, but never a partial one.
                _rename(path, aside)
            _rename(staged, path)
            _fsync_dir(path.parent)
            if aside is not None:
                _remove_tree(aside)
        except OSError:
            _discard(staged)
            raise


def verify_dir(path: Path) -> str | None:
    """What is wrong with a directory made by ``write_dir``, in words; None if it is intact.

    The directory is not trusted: no link is followed, and reads are bounded by the manifest and by the limits
    above.
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


def read_regular(path: Path, most: int) -> bytes:
    """The content of a regular file of at most ``most`` bytes, not a link, pipe or device.

    Raises:
        OSError: it is something else, is larger, or cannot be read.
    """
    with _regular(path, most) as file:
        return file.read(os.fstat(file.fileno()).st_size)


def _regular(path: Path, most: int) -> BufferedReader:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    facts = os.fstat(fd)
    why = "" if stat.S_ISREG(facts.st_mode) else "not a regular file"
    if facts.st_size > most:
        why = why or f"{facts.st_size:,} bytes, at most {most:,} expected"
    if why:
        os.close(fd)
        raise OSError(errno.EINVAL, why, str(path))
    return open(fd, "rb")


def file_digest(folder: Path, name: str) -> str | None:
    """SHA-256 of a file according to the folder's manifest; None without a manifest or an entry."""
    try:
        return str(json.loads((folder / "manifest.json").read_bytes())[name]["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def staged_dir(path: Path) -> Iterator[Path]:
    """A folder to fill; it becomes ``path`` with one rename when the block ends, or is discarded on an error.

    Raises:
        StorageError: it cannot be made, synced or renamed; ``path`` is unchanged.
    """
    with _storage_errors(path):
        staged = _stage(path)
    try:
        yield staged
        with _storage_errors(path):
            for file in staged.iterdir():  # libraries that wrote here do not sync
                _fsync_path(file, os.O_NOFOLLOW)
            _fsync_dir(staged)
            _rename(staged, path)
            _fsync_dir(path.parent)
    except BaseException:
        _discard(staged)
        raise


@_writes
def remove_dir(path: Path) -> None:
    """Remove a directory, renamed first so that a half-removed one is never mistaken for an intact one."""
    if not path.exists():
        return
    with _storage_errors(path):
        doomed = _temporary(path, "gone-")
        _rename(path, doomed)
        _fsync_dir(path.parent)
        _remove_tree(doomed)


def set_aside(path: Path) -> Path:
    """Rename a corrupt directory out of the way, keep it for inspection, and return its new path."""
    with _storage_errors(path):
        target = path.with_name(f".corrupt-{path.name}")
        n = 1
        while target.exists():
            n, target = n + 1, path.with_name(f".corrupt-{path.name}.{n}")
        _rename(path, target)
        _fsync_dir(path.parent)
    return target


@_writes
def sweep(folder: Path) -> None:
    """Remove the leftovers of interrupted writes from ``folder``."""
    if not folder.is_dir():
        return
    with _storage_errors(folder):
        for leftover in folder.glob(f"{_TMP}*"):
            _remove(leftover)


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append one JSON object as a line. An incomplete last line is cut on resume (see ``truncate``)."""
    append_text(path, json.dumps(record, ensure_ascii=False) + "\n")


@_writes
def append_text(path: Path, text: str, *, sync: bool = True) -> None:
    """Append text with one write and sync it. What is not synced survives the process, not a power cut."""
    data = text.encode("utf-8", "surrogatepass")
    with _storage_errors(path, len(data)):
        _make_dirs(path.parent)
        new = not path.exists()
        with _opened(path, os.O_APPEND) as fd:
            _write_all(fd, data)
            if sync:
                _fsync(fd)
        if new:
            _fsync_dir(path.parent)


def size(path: Path) -> int:
    """Bytes in ``path``; 0 if it does not exist."""
    return path.stat().st_size if path.exists() else 0


@_writes
def truncate(path: Path, length: int) -> None:
    """Cut a log back to ``length`` bytes: what was logged after the checkpoint is written again on resume."""
    if not path.exists():
        return
    with _storage_errors(path):
        found = path.stat().st_size
        if found < length:
            raise OSError(errno.EIO, f"log is shorter than the checkpoint says ({found} < {length})")
        if found > length:
            with _opened(path) as fd:
                _cut(fd, length)
                _fsync(fd)


def _size_text(size: int) -> str:
    return f"{size / 1e6:,.0f} MB" if size >= 10_000_000 else f"{size / 1e6:.1f} MB"


@_writes
def check_disk_space(folder: Path, trial: int, needed: int) -> None:
    """Check that ``needed`` bytes fit in ``folder``, and write and remove ``trial`` bytes there.

    Raises:
        StorageError: there is not enough space, or nothing can be written.
    """
    with _storage_errors(folder, trial):
        _make_dirs(folder)
    free = _free_bytes(folder)
    if free < needed:
        raise StorageError(
            f"not enough disk space: {_size_text(needed)} needed, {_size_text(free)} free",
            str(folder),
            "free some space, name another --output-dir, or lower run.keep",
        )
    path, chunk = _temporary(folder / "trial"), bytes(min(trial, 1 << 20))
    with _storage_errors(path, trial), _opened(path, os.O_TRUNC) as fd:
        try:
            for start in range(0, trial, len(chunk)):
                _write_all(fd, chunk[: trial - start])
            _fsync(fd)
        finally:
            _unlink(path)


@contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Hold ``RUN/LOCK`` while the block runs; the kernel releases it when the process dies.

    Raises:
        RunInUse: another process holds it.
    """
    if _reading_only:
        yield
        return
    path = run / "LOCK"
    with _storage_errors(run):
        _make_dirs(run)
    with _storage_errors(path):
        fd = _open(path, os.O_RDWR)
    try:
        _lock(fd, run)
        with _storage_errors(path):
            _cut(fd, 0)
            since = time.strftime("%Y-%m-%d %H:%M:%S %z")
            _write_all(fd, f"process {os.getpid()} on {socket.gethostname()} since {since}\n".encode())
        yield
        with _storage_errors(path):
            _cut(fd, 0)
    finally:
        os.close(fd)


def _lock(fd: int, run: Path) -> None:
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
            f"the file system does not support locks ({error.strerror})",
            str(run / "LOCK"),
            "put the run on another disk, and copy it when it has finished",
        ) from error


def _holder(fd: int) -> str:
    """The lock file's description of its holder, which may be just about to write it."""
    for _ in range(20):
        text = os.pread(fd, 400, 0).decode("utf-8", "replace")
        if text.endswith("\n"):
            return safe(text.strip())
        time.sleep(0.01)
    return "an unknown process"
