"""Rows of local data files, each with its location for error messages.

JSON Lines, a JSON list, CSV and Parquet. A location is ``file:line`` (the physical line on which the row
starts, even after quoted newlines), or ``file:row`` for Parquet.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from empg_lite.core.errors import DataError, MissingInput
from empg_lite.core.safe_text import safe

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


@dataclass(frozen=True, slots=True)
class Row:
    """One row, column -> value, or the error that prevents reading it."""

    fields: Mapping[str, Any]
    where: str
    error: DataError | None = None


def find_file(path: Path, split: str, source: str) -> Path:
    """The data file: ``path`` itself, or in a folder ``{split}.{ext}``, else ``{source}_{split}.{ext}``.

    Raises:
        MissingInput: no such file.
        DataError: two files match.
    """
    if not os.path.isdir(path):
        return path
    for stem in (split, f"{source}_{split}"):
        found = [file for suffix in SUFFIXES if (file := path / f"{stem}{suffix}").is_file()]
        if len(found) > 1:
            raise DataError(f"both {found[0].name} and {found[1].name} hold the split", str(path), "keep one")
        if found:
            return found[0]
    todo = f"put {split}.jsonl or {source}_{split}.jsonl (or {', '.join(SUFFIXES[1:])}) there"
    raise MissingInput(f"no file for split {split!r} in the folder", str(path), todo)


def read_rows(path: Path) -> list[Row]:
    """All rows of a file, in order.

    Raises:
        MissingInput: no such file, or it cannot be opened.
        DataError: naming ``file:line`` if the file is damaged, empty or of an unknown type. A broken line of
            a .jsonl file becomes a row with an error instead.
    """
    readers = {".jsonl": _jsonl_rows, ".json": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
    if path.suffix not in readers:
        raise DataError(f"unknown kind of data file {path.suffix!r}", f"{path}", f"use {', '.join(SUFFIXES)}")
    try:
        rows = list(readers[path.suffix](path))
    except FileNotFoundError:
        raise MissingInput("no such data file", str(path), "check data.path and data.eval_path") from None
    except OSError as error:
        raise MissingInput(f"data file cannot be read ({error.strerror})", str(path)) from error
    if not rows:
        raise DataError("no rows in the data file", f"{path}:1", "check that this is the right file")
    return rows


def _jsonl_rows(path: Path) -> Iterator[Row]:
    with open(path, "rb") as file:  # bytes: only \n ends a line, no other Unicode separator
        for number, raw in enumerate(file, 1):
            try:
                text = _decode(raw, path, number)
                if text.strip():
                    yield _row(_from_json(text.rstrip(), path, number), f"{path}:{number}")
            except DataError as error:  # only this line: the others may be fine
                yield Row({}, f"{path}:{number}", error)


def _json_rows(path: Path) -> Iterator[Row]:
    text = _decode(path.read_bytes(), path, 1)
    values = _from_json(text, path, 1)
    if not isinstance(values, list):
        raise DataError(
            "not a list of rows", f"{path}:1", "rename it to .jsonl if it has one object per line"
        )
    decoder, line, counted, at = json.JSONDecoder(), 1, 0, text.index("[") + 1
    for value in values:  # decoded again one by one to find where each starts
        start = _BETWEEN_ROWS.match(text, at).end()  # type: ignore[union-attr]
        line, counted = line + text.count("\n", counted, start), start
        yield _row(value, f"{path}:{line}")
        at = decoder.raw_decode(text, start)[1]


_BETWEEN_ROWS = re.compile(r"[\s,]*")


def _csv_rows(path: Path) -> Iterator[Row]:
    text = _decode(path.read_bytes(), path, 1)
    reader = csv.reader(StringIO(text, newline=""), strict=True)
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
            raise DataError(what, f"{path}:{line}", "quote cells that contain commas")
        else:
            yield Row(dict(zip(header, record, strict=True)), f"{path}:{line}")


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


def _from_json(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        reason, line = f"{error.msg}, column {error.colno}", first_line + error.lineno - 1
    except ValueError:
        reason, line = "a number with too many digits", first_line
    except RecursionError:
        reason, line = "nested too deep", first_line
    raise DataError(f"not JSON ({reason})", f"{path}:{line}", "repair the row")


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
