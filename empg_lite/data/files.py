"""Rows of local data files, each with its location for error messages.

JSON Lines, a JSON list, CSV and Parquet; text also compressed with gzip; and the shards of a hub snapshot. A
location is ``file:line`` (the physical line on which the row starts, even after quoted newlines), or
``file:row`` for Parquet.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader, StringIO
from pathlib import Path
from typing import Any

from empg_lite.core.cells import NotKept, as_messages, distinct_keys
from empg_lite.core.errors import DataError, MissingInput
from empg_lite.core.safe_text import safe

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_KINDS = "|".join(suffix[1:] for suffix in SUFFIXES[:-1])
#: ``train.jsonl``, ``train.CSV.gz``, ``train-00000-of-00002.parquet``, as the hub names shards.
_NAME = re.compile(
    rf"(?P<stem>.+?)(-(?P<shard>\d{{5}})-of-(?P<of>\d{{5}})(-[0-9a-f]+)?)?"
    rf"\.(({_KINDS})(\.gz)?|parquet)",
    re.IGNORECASE,
)
#: Folders of a data set in which its files may be: itself, and where the hub keeps them.
_FOLDERS = (".", "data")
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}


@dataclass(frozen=True, slots=True)
class Row:
    """One row, column -> value, or the error that prevents reading it."""

    fields: Mapping[str, Any]
    where: str
    error: DataError | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """The rows of a split in order, and what was noticed about its files."""

    rows: list[Row]
    notes: tuple[str, ...] = ()


# --- which files ----------------------------------------------------------------------------------


def find_files(path: Path, split: str, source: str) -> list[Path]:
    """The data files: ``path`` itself, or in a folder ``{split}.{ext}`` or its shards, else
    ``{source}_{split}.{ext}``; also in the folder's ``data/``.

    Raises:
        MissingInput: no such file.
        DataError: two files match, or a shard is missing.
    """
    if not os.path.isdir(path):
        return [path]
    stems: dict[str, list[Path]] = {}
    for folder in _FOLDERS:
        there = path / folder
        for file in sorted(there.iterdir()) if there.is_dir() else ():
            if (name := _NAME.fullmatch(file.name)) and file.is_file():
                stems.setdefault(name["stem"], []).append(file)
    for stem in (split, f"{source}_{split}"):
        if stem in stems:
            return _one_version(stems[stem], path)
    todo = f"put {split}.jsonl or {source}_{split}.jsonl (or {', '.join(SUFFIXES[1:])}) there"
    if stems:
        todo += f", or set data.split or data.eval_split to what is there: {', '.join(sorted(stems)[:8])}"
    raise MissingInput(f"no file for split {split!r} in the folder", str(path), todo)


def _one_version(files: Sequence[Path], folder: Path) -> list[Path]:
    """One file, or all shards of one set, in order."""
    names = [_NAME.fullmatch(file.name) for file in files]
    pairs = zip(files, names, strict=True)
    versions = {(file.parent, n["of"]) if n["of"] else file: file for file, n in pairs if n}
    if len(versions) > 1:
        one, other = sorted(versions.values(), key=_order)[:2]
        what = f"both {one.name} and {other.name} hold the split"
        raise DataError(what, str(folder), "move one of them elsewhere")
    count = names[0] and names[0]["of"]
    if count is None:
        return list(files)
    there = {int(n["shard"]) for n in names if n}
    missing = next((shard for shard in range(int(count)) if shard not in there), None)
    if missing is not None or len(files) != int(count):
        what = f"shard {missing:05d}" if missing is not None else "one name for each shard"
        raise DataError(f"{what} of {count} is missing", str(folder), "download the data set again")
    return list(files)


def _order(file: Path) -> tuple[int, str]:
    return SUFFIXES.index(_kind(file)) if _kind(file) in SUFFIXES else len(SUFFIXES), file.name


def _kind(path: Path) -> str:
    """The suffix that names the format, in lower case, without ``.gz``."""
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


# --- reading --------------------------------------------------------------------------------------


def read_files(paths: Sequence[Path]) -> Table:
    """All rows of some files, in order.

    Raises:
        MissingInput: no such file, or it cannot be opened.
        DataError: naming ``file:line`` if a file is damaged, empty or of an unknown type. A broken line of
            JSON Lines becomes a row with an error instead.
    """
    tables = [_read_file(path) for path in paths]
    return Table([row for t in tables for row in t.rows], tuple(note for t in tables for note in t.notes))


def _read_file(path: Path) -> Table:
    kind, notes = _kind(path), list[str]()
    if kind not in SUFFIXES or path.name.lower().endswith(".parquet.gz"):
        known = f"{', '.join(SUFFIXES)}; all but Parquet also with .gz"
        raise DataError(f"unknown kind of data file {path.suffix!r}", f"{path}", f"use {known}")
    try:
        if kind == ".parquet":
            rows = list(_parquet_rows(path))
        elif kind in (".csv", ".tsv"):
            rows = list(_csv_rows(path, notes))
        else:
            rows = list(_json_rows(path))
    except FileNotFoundError:
        raise MissingInput("no such data file", str(path), "check data.path and data.eval_path") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"not gzip ({error})", f"{path}:1", "compress it again, or remove .gz") from None
    except OSError as error:
        raise MissingInput(f"data file cannot be read ({error.strerror})", str(path)) from error
    if not rows:
        raise DataError("no rows in the data file", f"{path}:1", "check that this is the right file")
    return Table(rows, tuple(notes))


def _open(path: Path) -> gzip.GzipFile | BufferedReader:
    return gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb")


def _json_rows(path: Path) -> Iterator[Row]:
    """A list of rows, or one row per line: what the file holds counts, not how it is called."""
    with _open(path) as file:
        first = next((line for line in file if line.strip()), b"").removeprefix(b"\xef\xbb\xbf").strip()
    if first.startswith(b"[") or (_kind(path) == ".json" and not _is_row(first)):
        return _list_rows(path)
    return _line_rows(path)


def _is_row(line: bytes) -> bool:
    """True for an object of columns; False also for lists of rows, or of cells, under names."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return False
    if not isinstance(value, dict):
        return False
    return not value or any(not isinstance(each, list) or as_messages(each) for each in value.values())


def _line_rows(path: Path) -> Iterator[Row]:
    with _open(path) as file:  # bytes: only \n ends a line, no other Unicode separator
        for number, raw in enumerate(file, 1):
            try:
                text = _decode(raw, path, number)
                if text.strip():
                    yield _row(_from_json(text.rstrip(), path, number), f"{path}:{number}")
            except DataError as error:  # only this line: the others may be fine
                yield Row({}, f"{path}:{number}", error)


def _list_rows(path: Path) -> Iterator[Row]:
    with _open(path) as file:
        text = _decode(file.read(), path, 1)
    values = _from_json(text, path, 1, "repair the list there")
    if not isinstance(values, list):
        todo = "write a list of rows, or one row per line"
        if isinstance(values, dict):
            named = [name for name, rows in values.items() if isinstance(rows, list) and _all_rows(rows)]
            todo = f"write the list under {named[0]!r} alone" if named else todo
        raise DataError("not a list of rows", f"{path}:1", todo)
    decoder, line, counted, at = json.JSONDecoder(), 1, 0, text.index("[") + 1
    for value in values:  # decoded again one by one to find where each starts
        start = _BETWEEN_ROWS.match(text, at).end()  # type: ignore[union-attr]
        line, counted = line + text.count("\n", counted, start), start
        yield _row(value, f"{path}:{line}")
        at = decoder.raw_decode(text, start)[1]


def _all_rows(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(value, dict) for value in values)


_BETWEEN_ROWS = re.compile(r"[\s,]*")


def _csv_rows(path: Path, notes: list[str]) -> Iterator[Row]:
    with _open(path) as file:
        text = _decode(file.read(), path, 1)
    separator = "\t" if _kind(path) == ".tsv" else _separator(text)
    if _kind(path) == ".csv" and separator != ",":
        notes.append(f"{path.name}: {_SEPARATORS[separator]} separate its columns")
    reader = csv.reader(StringIO(text, newline=""), strict=True, delimiter=separator)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1  # where the record starts; quoted newlines may end it later
        try:
            record = next(reader, None)
        except csv.Error as error:
            raise DataError(f"not CSV ({error})", f"{path}:{line}", "check the quotes of this row") from None
        if record is None:
            return
        if not record:
            continue
        if header is None:
            header = _checked_header(record, f"{path}:{line}")
        elif len(record) != len(header):
            what = f"{len(record)} cells where the header has {len(header)}"
            todo = f"quote cells that contain {_SEPARATORS[separator]}"
            raise DataError(what, f"{path}:{line}", todo)
        else:
            yield Row(dict(zip(header, record, strict=True)), f"{path}:{line}")


def _separator(text: str) -> str:
    """What separates the most columns in the header; a comma where none does."""

    def columns(separator: str) -> int:
        try:
            return max(len(next(csv.reader(StringIO(text.lstrip(), newline=""), delimiter=separator), [])), 1)
        except csv.Error:
            return 1

    return max(_SEPARATORS, key=columns)


def _checked_header(record: list[str], where: str) -> list[str]:
    header = [name.strip() for name in record]
    for name in header:
        if header.count(name) > 1:
            shown = safe(" ".join(name.split())) or "header"
            raise DataError("two columns with one name", f"{where}: {shown}", "rename one")
    return header


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    with open(path, "rb") as file:
        try:
            for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(fields, f"{path}:{number}")
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:  # a damaged file can raise any
            reason = safe(" ".join(str(error).split()))[:100]
            raise DataError(f"not Parquet ({reason})", f"{path}:{number + 1}", "export it again") from None


def _from_json(
    text: str, path: Path, first_line: int, todo: str = "repair the row: one object on one line"
) -> Any:
    try:
        return json.loads(text, object_pairs_hook=distinct_keys)
    except json.JSONDecodeError as error:
        reason, line = f"{error.msg}, column {error.colno}", first_line + error.lineno - 1
    except NotKept as error:
        raise DataError(str(error), f"{path}:{first_line}", "rename one of the two") from None
    except ValueError:
        reason, line = "a number with too many digits", first_line
    except RecursionError:
        reason, line = "nested too deep", first_line
    raise DataError(f"not JSON ({reason})", f"{path}:{line}", todo)


def _row(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise DataError("a row is an object of columns", where, 'write {"question": ..., "answer": ...}')
    return Row(value, where)


def _decode(raw: bytes, path: Path, first_line: int) -> str:
    try:
        return raw.decode("utf-8-sig" if first_line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line = first_line + raw.count(b"\n", 0, error.start)
        raise DataError("not UTF-8 text", f"{path}:{line}", "save the file as UTF-8") from None
