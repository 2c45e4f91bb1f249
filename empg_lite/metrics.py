"""One JSON object a step, and what a person sees meanwhile.

Names follow TRL where the quantity is the same; EM's own stand under ``em/``. Only ``step_time``, ``time/*``
and ``memory/*`` may differ between a straight and a resumed run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from empg_lite import store
from empg_lite.safe_text import without_passwords

#: Names whose values are wall-clock or machine facts.
VOLATILE = ("step_time", "time/", "memory/")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file; a torn last line is left out."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text("utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def stable(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without what may differ between a straight and a resumed run."""
    return {key: value for key, value in record.items() if not key.startswith(VOLATILE)}


class View:
    """What a person sees of a run. This one shows nothing (library use, ``--json`` without a terminal)."""

    def note(self, text: str) -> None:
        """Something worth one line."""

    def warn(self, text: str) -> None:
        """Something that needs a person's eye."""

    def step(self, record: Mapping[str, Any], total: int) -> None:
        """A step is done."""

    @contextmanager
    def phase(self, name: str, total: int) -> Iterator[Any]:
        """A stretch of work of ``total`` rows; yields a function to call with the rows that have ended."""
        yield lambda done: None


class ConsoleView(View):
    """Plain lines that read well in a log and a notebook; on a terminal also a bar for what is going on."""

    _COLUMNS = "   step   reward    mixed   length   loss      tokens/s   s/step   validation"
    _REUSE = "     ess      kl    age"

    def __init__(self, console: Console) -> None:
        self.console = console
        self._header_due = True
        self._reuse = False

    def note(self, text: str) -> None:
        self._line(text)
        self._header_due = True

    def warn(self, text: str) -> None:
        self._line(f"warning: {text}", style="yellow")
        self._header_due = True

    def _line(self, text: str, style: str | None = None) -> None:
        """Wrapped by words on a terminal, whole in a log."""
        soft = not self.console.is_terminal
        self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=soft)

    def step(self, record: Mapping[str, Any], total: int) -> None:
        if not self._reuse and _reuses(record):
            self._reuse = self._header_due = True
        if self._header_due:
            self._line(self._COLUMNS + (self._REUSE if self._reuse else ""), style="bold")
            self._header_due = False
        loss = f"{record['loss']:.4f}" if record["loss"] is not None else "no update"
        accuracy, speed = record.get("eval/accuracy"), record.get("time/tokens_per_second", 0.0)
        self._line(
            f"{record['step']:5d}/{total:<5d}{record['reward']:7.1%}{record['em/frac_mixed']:9.0%}"
            f"{record['completions/mean_length']:9.0f}   {loss:9s}{speed:9.0f}"
            f"{record['step_time']:9.2f}   {'' if accuracy is None else f'{accuracy:.1%}':10s}"
            f"{self._reuse_columns(record) if self._reuse else ''}".rstrip()
        )

    @staticmethod
    def _reuse_columns(record: Mapping[str, Any]) -> str:
        """Effective sample size, KL since the start of the fit, mean age in optimiser steps."""
        kl = record.get("em/kl_old")
        return f"{record['em/ess']:8.0%}{'' if kl is None else f'{kl:.4f}':>8s}{record['em/staleness']:7.1f}"

    @contextmanager
    def phase(self, name: str, total: int) -> Iterator[Any]:
        if not self.console.is_terminal:
            yield lambda done: None
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(name, total=total)
            yield lambda done: progress.advance(task, done)


def _reuses(record: Mapping[str, Any]) -> bool:
    """Whether the step fitted samples more than once, or samples of an older policy."""
    return record["em/updates"] > 1 or record["em/staleness"] > 0


#: Characters of a text in an event: what a user's function or a library says has no bound.
LONGEST = 4000


def _short(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return without_passwords(value if len(value) <= LONGEST else f"{value[:LONGEST]} ...")


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Journal:
    """The append-only logs of a run: ``metrics.jsonl`` and ``events.jsonl``."""

    def __init__(self, run: Path) -> None:
        self._paths = {name: run / name for name in ("metrics.jsonl", "events.jsonl")}

    def metrics(self, record: Mapping[str, Any]) -> None:
        """One object a step; a number that is not finite is null: JSON has no other name for it."""
        store.append_line(self._paths["metrics.jsonl"], {k: _finite(v) for k, v in record.items()})

    def event(self, event: str, **facts: Any) -> None:
        """Something that is not a step: a resume, a back-off, a skipped step, a warning."""
        record = {"event": event, **{k: _short(v) for k, v in facts.items()}}
        store.append_line(self._paths["events.jsonl"], record)

    def lengths(self) -> dict[str, int]:
        """Bytes of each log now; goes into the checkpoint."""
        return {name: store.size(path) for name, path in self._paths.items()}

    def cut_back(self, lengths: Mapping[str, int]) -> None:
        """Forget what was logged after a checkpoint: it is about to happen again."""
        for name, path in self._paths.items():
            store.truncate(path, lengths.get(name, 0))
