"""The rollout file: JSON Lines, one rationale per line.

A header line says who sampled. A later header starts a new segment, sampled by another policy or for other
problems. A file without a header is external text: ``completion``, ``reward`` or ``gold``, and
``question`` or ``prompt`` are enough; ``fit`` tokenizes it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from empg_lite.core.errors import DataError, MissingInput
from empg_lite.core.rationale import FAILURES, ORIGINS, VERDICTS, Rationale, problem_id

FORMAT = "empg-lite/rollouts"
VERSION = 1


@dataclass(frozen=True, slots=True)
class RolloutHeader:
    """Who sampled, and how. Groups never cross headers.

    Hashes are SHA-256 hex; ``adapter`` is the hash of the adapter's tensors. ``sampler`` holds the decoding
    settings and, in a file made by ``sample``, the selection of problems.
    """

    model: str = "external"
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
    header, rows = RolloutHeader(), list[Rationale]()
    segments: list[Segment] = []
    seen: dict[str, int] = {}  # next sample_index of each problem, for lines without one
    for number, line in _numbered_lines(path):
        if torn_tail and not line.endswith("\n"):
            break
        where = f"{path}:{number}"
        record = _parse_object(line, where)
        if "format" in record:
            if number > 1:
                segments.append(Segment(header, tuple(rows)))
            header, rows, seen = _parse_header(record, where), [], {}
        else:
            rows.append(_parse_rationale(record, where, seen))
    return [*segments, Segment(header, tuple(rows))]


def _numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    if not path.is_file():
        raise MissingInput("no such rollout file", str(path))
    number = 0
    with open(path, encoding="utf-8", newline="\n") as file:
        try:
            for number, line in enumerate(file, 1):
                yield number, line
        except UnicodeDecodeError as error:
            raise DataError(
                f"not UTF-8 text ({error.reason})", f"{path}:{number + 1}", "rollout files are JSON Lines"
            ) from error
    if number == 0:
        raise DataError("empty rollout file", str(path), "sample it again")


def _parse_object(text: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON ({error})", where, "remove the line, or sample the file again") from error
    if not isinstance(record, dict):
        raise DataError("not a JSON object", where)
    return record


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
    given = {k: v for k, v in record.items() if k in _TYPES and (v is not None or k in _NOT_NULL)}
    values = _DEFAULTS | given
    if "completion" not in values:
        raise DataError("missing field", f"{where}: completion")
    if "problem_id" not in values:
        text = values["question"] or values["prompt"]
        if not text:
            raise DataError("missing field", f"{where}: question (or prompt)")
        values["problem_id"] = problem_id(str(text))
    values.setdefault("sample_index", seen.get(values["problem_id"], 0))
    for name, kinds in _TYPES.items():
        if name in values and (not isinstance(values[name], kinds) or isinstance(values[name], bool)):
            raise DataError(f"wrong type {type(values[name]).__name__}", f"{where}: {name}")
    seen[values["problem_id"]] = values["sample_index"] + 1
    for name in _IDS:
        if not all(type(i) is int and i >= 0 for i in values[name]):
            raise DataError("token ids must be integers >= 0", f"{where}: {name}")
        values[name] = tuple(values[name])
    rationale = Rationale(**values)
    _check_values(rationale, where)
    return rationale


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
    for number, line in _numbered_lines(path):
        where = f"{path}:{number}"
        record = _parse_object(line, where)
        for name in ("gold", "prediction"):
            if not isinstance(record.get(name), str):
                raise DataError("must be a string", f"{where}: {name}")
        yield record["gold"], record["prediction"]


def check_scored(rationales: Sequence[Rationale], where: str) -> None:
    """Refuse rationales without a reward.

    Raises:
        DataError: names the count and the command that grades them.
    """
    unscored = sum(r.reward is None for r in rationales)
    if unscored:
        raise DataError(
            f"{unscored} of {len(rationales)} rationales have no reward", where, f"empg-lite score {where}"
        )
