"""Grade a rollout file, or regrade it. Needs neither a model nor torch, so any machine will do."""

from __future__ import annotations

import resource
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from empg_lite.core.errors import DataError, UsageError
from empg_lite.core.rationale import Rationale
from empg_lite.core.view import View
from empg_lite.data.rows import combined
from empg_lite.rewards import Grader, UserCode, pin, refuse_code
from empg_lite.rewards.scorer import Scorer
from empg_lite.rewards.spec import parse_spec
from empg_lite.run import store
from empg_lite.run.rollouts import (
    EXTERNAL,
    RolloutHeader,
    Segment,
    amended_rollouts,
    raw_rows,
    read_gold,
    read_rollouts,
)


def score_file(
    path: Path, reward: str | None, view: View | None = None, *, allow_code: bool = False
) -> dict[str, Any]:
    """Grade a rollout file in place, possibly under another reward. The file is replaced atomically.

    Only what a verdict says changes: the user's own columns stay as they are.

    Args:
        reward: None: the reward in the file's header.
        allow_code: permission to run the file of a ``python:FILE.py`` reward.

    Returns:
        ``file``, ``rationales``, ``reward`` (mean over the rows that could be graded; None if none could),
        ``reasons`` (counts), ``seconds``, ``peak_rss_mb`` of this process and, if workers ran,
        ``peak_rss_mb_workers`` of the largest. Of rows drawn under ``sampler.tries``, whose mean reward is no
        accuracy, also ``right_first``: the share right at the first try.

    Raises:
        UsageError: neither the file nor the caller names a reward, or the file names several functions.
        DataError: the reward runs a file that was not allowed, or a row has no gold answer.
    """
    started = time.monotonic()
    view = view or View()
    segments = read_rollouts(path)
    names, code = _rewards_of(segments, reward, path, allow_code)
    _check_golds(path, segments, names, view)
    graded, changes, reasons = list[Rationale](), list[dict[str, Any]](), Counter[str]()
    with (
        Grader(code=code) as grader,
        view.phase("grading", sum(len(s.rationales) for s in segments)) as on_done,
    ):
        for segment, name in zip(segments, names, strict=True):
            rows = Scorer(grader, name, on_done=on_done).scored(segment.rationales)
            reasons.update(str(r.reason) for r in rows)
            graded += rows
            changes += [_verdict(r, segment.header) for r in rows]
        workers = [_peak_rss_mb(str(pid)) for pid in grader.worker_pids()]
    store.write_file(path, amended_rollouts(path, [{"reward_name": name} for name in names], changes))
    valid = [r for r in graded if not r.failed]
    first = [r.correct for r in valid if r.tries == 1]
    return {
        "file": str(path),
        "rationales": sum(reasons.values()),
        "reward": sum(r.reward or 0.0 for r in valid) / len(valid) if valid else None,
        "reasons": dict(sorted(reasons.items())),
        **({"right_first": sum(first) / len(first)} if first else {}),
        "seconds": round(time.monotonic() - started, 3),
        "peak_rss_mb": _peak_rss_mb("self"),
        **({"peak_rss_mb_workers": max(workers)} if workers else {}),
    }


def _verdict(r: Rationale, header: RolloutHeader) -> dict[str, Any]:
    """What grading changes in a row. A weight was for another reward; in external text it is the user's."""
    found = {name: getattr(r, name) for name in ("reward", "reason", "extracted", "rule", "terms")}
    return found if r.weight is None or header.model == EXTERNAL else found | {"weight": None}


def _check_golds(path: Path, segments: Sequence[Segment], names: Sequence[str], view: View) -> None:
    """Refuse rows without a gold answer, and count those that no answer can match.

    Raises:
        DataError: naming the rows.
    """
    kinds = [parse_spec(name).kind for name in names]
    pairs = [(r, kind) for s, kind in zip(segments, kinds, strict=True) for r in s.rationales]
    missing = [not r.gold and kind.written_gold("") is not None for r, kind in pairs]
    if any(missing):
        raise combined([_why(*row) for row, none in zip(raw_rows(path), missing, strict=True) if none])
    golds = {(r.gold, r.question, kind) for r, kind in pairs}
    unreadable = [gold for gold, question, kind in golds if kind.unreadable_gold(gold, question)]
    if unreadable:
        view.note(f"{len(unreadable)} gold answers cannot be read, such as {unreadable[0]!r}: none earns 1")


def _why(where: str, record: dict[str, Any]) -> DataError:
    try:
        read_gold(record, where)
    except DataError as error:
        return error
    raise AssertionError("the row has a gold answer")


def _peak_rss_mb(process: str) -> float:
    """Peak resident memory of a process, ``self`` or an id, in MB of 2**20 bytes.

    Linux keeps a figure for the current program. The fallback, ``getrusage``, also counts the process before
    exec, which is as large as its parent.
    """
    try:
        lines = Path(f"/proc/{process}/status").read_text("ascii", "replace").splitlines()
        return round(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024, 1)
    except (OSError, StopIteration):
        who = resource.RUSAGE_SELF if process == "self" else resource.RUSAGE_CHILDREN
        return round(resource.getrusage(who).ru_maxrss / 1024, 1)


def _rewards_of(
    segments: Sequence[Segment], reward: str | None, path: Path, allow_code: bool
) -> tuple[list[str], UserCode | None]:
    """The reward of each segment, pinned, and the file they run, if any."""
    names, codes = [], dict[str, UserCode]()
    for segment in segments:
        name = reward or segment.header.reward_name
        if name is None:
            raise UsageError("the file names no reward", str(path), "add --reward NAME")
        name, code = pin(name)
        if code is not None and not allow_code:
            raise refuse_code(code.ref, str(path))
        if code is not None:
            codes[str(code.ref)] = code
        names.append(name)
    if len(codes) > 1:
        raise UsageError(
            "its segments name different reward functions", str(path), "choose one with --reward"
        )
    return names, next(iter(codes.values()), None)
