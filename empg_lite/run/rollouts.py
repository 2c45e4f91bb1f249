"""The rollout file: JSON Lines, one rationale per line.

A header line says who sampled. A later header starts a new segment, sampled by another policy or for other
problems. A file without a header is external text: ``completion``, ``reward`` or a gold answer, and
``question`` or ``prompt`` are enough; ``fit`` tokenizes it. The question and the gold answer are found as in
training data. Columns that are not ours become part of ``meta``; in the file they stay as they are.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from empg_lite.core.errors import DataError, MissingInput
from empg_lite.core.rationale import FAILURES, ORIGINS, VERDICTS, Rationale, problem_id
from empg_lite.core.safe_text import encodable

FORMAT = "empg-lite/rollouts"
#: The model of a header that was not in the file.
EXTERNAL = "external"
VERSION = 1


@dataclass(frozen=True, slots=True)
class RolloutHeader:
    """Who sampled, and how. Groups never cross headers.

    Hashes are SHA-256 hex; ``adapter`` is the hash of the adapter's tensors. ``sampler`` holds the decoding
    settings and, in a file made by ``sample``, the selection of problems.
    """

    model: str = EXTERNAL
    revision: str | None = None
    adapter: str | None = None
    tokenizer: str = ""
    template: str = ""
    sampler: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    reward_name: str | None = None
    format: str = FORMAT
    version: int = VERSION


@dataclass(frozen=True, slots=True)
class Segment:
    """A header and the rationales below it."""

    header: RolloutHeader
    rationales: tuple[Rationale, ...]


_FIELDS = tuple(f.name for f in dataclasses.fields(Rationale))
_IDS = ("prompt_ids", "completion_ids")
#: Defaults beyond the dataclass's own; empty ids mean "text only".
_DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(("question", "gold", "prompt"), ""),
    **dict.fromkeys(_IDS, ()),
    "finish_reason": "stop",
    "step": 0,
    "policy_step": -1,
}
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("problem_id", "question", "gold", "prompt", "completion"), (str,)),
    **dict.fromkeys(("finish_reason", "origin", "reason", "extracted", "rule"), (str,)),
    **dict.fromkeys(("step", "policy_step", "sample_index", "position", "tries"), (int,)),
    **dict.fromkeys(_IDS, (list, tuple)),
    **dict.fromkeys(("reward", "weight"), (int, float)),
    **dict.fromkeys(("terms", "meta"), (dict,)),
}
#: In every other field null means "not given".
_NOT_NULL = ("problem_id", "completion", "sample_index")


def header_line(header: RolloutHeader) -> str:
    """The header as one JSON line."""
    return json.dumps(dataclasses.asdict(header))


def rationale_record(rationale: Rationale) -> dict[str, Any]:
    """A rationale as plain JSON types."""
    record = {name: getattr(rationale, name) for name in _FIELDS}
    if rationale.position is None:  # not drawn in turns
        del record["position"], record["tries"]
    return record


def rationale_line(rationale: Rationale) -> str:
    """One ASCII-escaped JSON line; lone surrogates and line separators survive."""
    return json.dumps(rationale_record(rationale))


def encode_rollouts(header: RolloutHeader, rationales: Iterable[Rationale]) -> str:
    """The text of a segment."""
    return "\n".join([header_line(header), *map(rationale_line, rationales)]) + "\n"


def read_rollouts(path: Path, *, torn_tail: bool = False) -> list[Segment]:
    """Read a whole rollout file.

    Args:
        torn_tail: drop an incomplete last line (the writer was killed) instead of refusing the file.

    Raises:
        MissingInput: the file does not exist.
        DataError: an unusable line; names ``file:line: field``.
    """
    header, rows, begun = RolloutHeader(), list[Rationale](), False
    segments: list[Segment] = []
    seen: dict[str, int] = {}  # next sample_index of each problem, for lines without one
    for where, line in _lines(path):
        if torn_tail and is_torn(line):
            break
        record = _parse_object(line, where)
        if _is_header(record):
            if begun:
                segments.append(Segment(header, tuple(rows)))
            header, rows, seen = _parse_header(record, where), [], {}
        else:
            rows.append(_parse_rationale(record, where, seen))
        begun = True
    return [*segments, Segment(header, tuple(rows))]


def amended_rollouts(
    path: Path, headers: Sequence[Mapping[str, Any]], rows: Iterable[Mapping[str, Any]]
) -> str:
    """The text of a rollout file with some values changed; all else stays, keys and their order included.

    Args:
        headers: what changes in the header of each segment, in order; a missing first header is added.
        rows: what changes in each row, in order.

    Raises:
        MissingInput, DataError: see ``read_rollouts``; or the file has changed since it was read.
    """
    changed, lines = iter(rows), list[str]()
    heads = iter(headers)
    for where, line in _lines(path):
        record = _parse_object(line, where)
        is_header = _is_header(record)
        if not lines and not is_header:
            lines.append(json.dumps(dataclasses.asdict(RolloutHeader()) | dict(next(heads))))
        change = next(heads if is_header else changed, None)
        if change is None:
            raise DataError("the file has changed while it was read", where, "repeat the command")
        lines.append(_as_line(record | dict(change), line))
    return "\n".join(lines) + "\n"


def raw_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """``file:line`` and the columns of each row of a rollout file, as the user wrote them."""
    for where, line in _lines(path):
        if not _is_header(record := _parse_object(line, where)):
            yield where, record


def _as_line(record: Mapping[str, Any], before: str) -> str:
    """A row as JSON; what was written in other scripts than ASCII stays readable."""
    if before.isascii():
        return json.dumps(record)
    text = json.dumps(record, ensure_ascii=False)
    return text if encodable(text) else json.dumps(record)


def kept_length(path: Path, drop: int) -> int:
    """Bytes of a rollout file without its last ``drop`` whole rows, and without a torn line."""
    with open(path, "rb") as file:
        kept = [line for line in file if not is_torn(line.decode("utf-8", "replace"))]
    while drop:
        drop -= bool(kept.pop().strip())
    return sum(map(len, kept))


def is_torn(line: str) -> bool:
    """Whether the writer of a last line died in it: it lacks its end, and is no whole object."""
    if line.endswith("\n"):
        return False
    try:
        return not isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return True


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """The lines that are not blank, each with its ``file:line``."""
    if not path.is_file():
        raise MissingInput("no such rollout file", str(path))
    number = 0
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}:{number}", line
        except UnicodeDecodeError as error:
            raise DataError(
                f"not UTF-8 text ({error.reason})", f"{path}:{number + 1}", "rollout files are JSON Lines"
            ) from error
    if number == 0:
        raise DataError("empty rollout file", str(path), "check that this is the right file")


def _parse_object(text: str, where: str) -> dict[str, Any]:
    from empg_lite.core.cells import NotKept, distinct_keys, finite  # lazy: a run writes rows, and reads none

    try:
        record = json.loads(text, object_pairs_hook=distinct_keys, parse_float=finite)
    except NotKept as error:
        raise DataError(str(error), where, "repair the row") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON ({error})", where, "repair the row: one object on one line") from error
    if not isinstance(record, dict):
        raise DataError("not a JSON object", where, "write one row per line, without [ and ]")
    return record


def _is_header(record: Mapping[str, Any]) -> bool:
    """A row of the user's may have a column ``format``, too."""
    return "format" in record and (record["format"] == FORMAT or "completion" not in record)


def _parse_header(record: dict[str, Any], where: str) -> RolloutHeader:
    if record["format"] != FORMAT:
        raise DataError(f"unknown format {record['format']!r} (expected {FORMAT!r})", where)
    if record.get("version", VERSION) != VERSION:
        raise DataError(f"unsupported rollout version {record['version']!r} (expected {VERSION})", where)
    if not isinstance(record.get("sampler", {}), dict):
        raise DataError("must be a JSON object", f"{where}: sampler")
    names = {f.name for f in dataclasses.fields(RolloutHeader)}
    return RolloutHeader(**{name: value for name, value in record.items() if name in names})


def _parse_rationale(record: dict[str, Any], where: str, seen: dict[str, int]) -> Rationale:
    values = _DEFAULTS | _given(record, where)
    if "completion" not in values:
        here = ", ".join(map(repr, list(record)[:8])) or "none"
        todo = f"columns here: {here}; call the model's text `completion`"
        raise DataError("missing field", f"{where}: completion", todo)
    if "problem_id" not in values:
        text = values["question"] or values["prompt"]
        if not text:
            raise DataError("missing field", f"{where}: question (or prompt)")
        values["problem_id"] = problem_id(str(text))
    values.setdefault("sample_index", seen.get(values["problem_id"], 0))
    for name, kinds in _TYPES.items():
        if name in values and (not isinstance(values[name], kinds) or isinstance(values[name], bool)):
            todo = "docs/files.md says what stands there; rename a column of your own"
            raise DataError(f"wrong type {type(values[name]).__name__}", f"{where}: {name}", todo)
    seen[values["problem_id"]] = values["sample_index"] + 1
    for name in _IDS:
        if not all(type(i) is int and i >= 0 for i in values[name]):
            raise DataError("token ids must be integers >= 0", f"{where}: {name}")
        values[name] = tuple(values[name])
    rationale = Rationale(**values)
    _check_values(rationale, where)
    return rationale


def _given(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A record as fields of a rationale: question and gold answer as training data has them, and ``meta``."""
    from empg_lite.core.cells import CHATS, completion_text, find_column, question_text

    found = {k: v for k, v in record.items() if k in _TYPES and (v is not None or k in _NOT_NULL)}
    if "completion" in found:
        found["completion"] = completion_text(found["completion"])
    if not found.get("question"):
        chat = isinstance(record.get("prompt"), list)  # as text, it is the whole prompt
        asked = find_column(record, ("problem", "prompt", *CHATS) if chat else ("problem", *CHATS))
        if asked and record[asked] is not None:
            found["question"] = question_text(record[asked], f"{where}: {asked}")
    if isinstance(found.get("prompt"), list):  # messages: the question is known, the prompt is not
        del found["prompt"]
    ours = "problem_id" in record and isinstance(found.get("gold"), str) and found["gold"]
    if not ours:  # else it is an answer that was found once
        try:
            found["gold"] = read_gold(record, where)
        except DataError:  # only grading needs one
            found.pop("gold", None)
    others = {k: v for k, v in record.items() if k not in _TYPES}
    if others and isinstance(found.get("meta", {}), dict):
        found["meta"] = others | found.get("meta", {})
    return found


def read_gold(record: Mapping[str, Any], where: str) -> str:
    """The gold answer of a row, under the names that training data may use.

    Raises:
        DataError: there is none.
    """
    from empg_lite.core.cells import ANSWER_COLUMNS, cell, find_column, gold_text

    column = find_column(record, ANSWER_COLUMNS, answer=True)
    todo = "write the right answer under `gold`"
    if column is None or cell(record, column) in (None, ""):
        raise DataError(f"no gold answer under {', '.join(ANSWER_COLUMNS)}", where, todo)
    gold = gold_text(cell(record, column), column, f"{where}: {column}")
    if not gold:
        raise DataError("the box of the gold answer is empty", f"{where}: {column}", todo)
    return gold


def _check_values(row: Rationale, where: str) -> None:
    if row.finish_reason not in ("stop", "length"):
        raise DataError(f"must be stop or length, not {row.finish_reason!r}", f"{where}: finish_reason")
    if row.reward is not None and not 0 <= row.reward <= 1:
        raise DataError(f"reward {row.reward} is outside [0, 1]", f"{where}: reward")
    for term, value in row.terms.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise DataError(f"{value!r} is not a number in [0, 1]", f"{where}: terms.{term}")
    if row.reason is not None and row.reason not in VERDICTS | FAILURES:
        raise DataError(f"unknown reason {row.reason!r}", f"{where}: reason")
    if row.origin not in ORIGINS:
        known = ", ".join(sorted(ORIGINS))
        raise DataError(f"unknown origin {row.origin!r}", f"{where}: origin", f"known: {known}")


def read_cases(path: Path) -> Iterator[tuple[str, str]]:
    """(gold, prediction) of each line of a JSON Lines file; other keys are ignored.

    Raises:
        MissingInput: the file does not exist.
        DataError: an unusable line; names ``file:line: field``.
    """
    for where, line in _lines(path):
        record = _parse_object(line, where)
        for name in ("gold", "prediction"):
            if not isinstance(record.get(name), str):
                raise DataError("must be a string", f"{where}: {name}")
        yield record["gold"], record["prediction"]


def check_scored(segments: Sequence[Segment], path: Path) -> None:
    """Refuse rationales without a reward.

    Raises:
        DataError: names the count and the command that grades them.
    """
    rationales = [r for segment in segments for r in segment.rationales]
    unscored = [s for s in segments if any(r.reward is None for r in s.rationales)]
    if unscored:
        count = sum(r.reward is None for r in rationales)
        named = all(segment.header.reward_name for segment in unscored)
        command = f"empg-lite score {shlex.quote(str(path))}" + ("" if named else " --reward NAME")
        raise DataError(f"{count} of {len(rationales)} rationales have no reward", str(path), command)
