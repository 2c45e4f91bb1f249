"""Optional sinks of the metric stream: TensorBoard, Trackio, Weights & Biases.

Names are those of ``metrics.jsonl``. A package is imported only if it is requested by name, and a tracker
never ends training: its first failure is reported and it is dropped.
"""

from __future__ import annotations

import importlib.util
import json
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from empg_lite.core.errors import UsageError
from empg_lite.run import store

if TYPE_CHECKING:
    from empg_lite.recipe.schema import Recipe

NAMES = ("tensorboard", "trackio", "wandb")
#: The run's name with each tracker, so that a resumed run continues there.
TRACKING = "tracking.json"
PROJECT = "empg-lite"

Sink = Callable[[Mapping[str, Any]], None]


def require(names: Sequence[str]) -> None:
    """Refuse trackers that are unknown or not installed, before any work.

    Raises:
        UsageError: names the tracker and what to type.
    """
    for name in names:
        if name not in NAMES:
            raise UsageError(f"unknown tracker {name!r}", "--track", f"one of {', '.join(NAMES)}")
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"{name} is not installed", "--track", f"pip install {name}")


@contextmanager
def tracked(
    names: Sequence[str], run: Path, recipe: Recipe, step: int, warn: Callable[[str], None]
) -> Iterator[list[Sink]]:
    """Sinks for a run's records, closed at the end.

    Args:
        step: the last completed step; a resumed run logs later ones again.
        warn: called once for each tracker that fails.
    """
    opened = [_Guarded(name, warn) for name in names]
    for tracker in opened:
        tracker.open(run, recipe, step)
    try:
        yield [tracker.log for tracker in opened]
    finally:
        for tracker in opened:
            tracker.close()


class _Guarded:
    """A tracker whose failures do not spread."""

    def __init__(self, name: str, warn: Callable[[str], None]) -> None:
        self.name, self._warn = name, warn
        self._tracker: Any = None

    def _safely(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:  # anything a third-party service raises: the run matters more
            self._tracker = None
            reason = " ".join(str(error).split())[:200]
            self._warn(f"{self.name} failed and is disabled for the rest of the run: {reason}")
            return None

    def open(self, run: Path, recipe: Recipe, step: int) -> None:
        kind = {"tensorboard": _Tensorboard, "trackio": _Trackio, "wandb": _Wandb}[self.name]
        self._tracker = self._safely(lambda: kind(run, recipe, step))

    def log(self, record: Mapping[str, Any]) -> None:
        if self._tracker is not None:
            scalars = {k: v for k, v in record.items() if isinstance(v, int | float) and k != "step"}
            self._safely(lambda: self._tracker.log(scalars, record["step"]))

    def close(self) -> None:
        if self._tracker is not None:
            self._safely(self._tracker.close)


class _Tensorboard:
    """Event files under ``RUN/tensorboard``; repeated steps replace the old ones."""

    def __init__(self, run: Path, recipe: Recipe, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1 if step else None)
        self.close = self._writer.close
        if not step:
            settings = json.dumps(recipe.model_dump(mode="json"), indent=1)
            self._writer.add_text("recipe", f"```json\n{settings}\n```")

    def log(self, scalars: dict[str, float], step: int) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()


class _Trackio:
    """Trackio's local database (``trackio show``); creates no Space and sends nothing."""

    def __init__(self, run: Path, recipe: Recipe, step: int) -> None:
        import trackio

        with redirect_stdout(StringIO()):  # it explains itself at length
            self._run = trackio.init(
                project=PROJECT,
                name=_remembered(run, "trackio"),
                config=recipe.model_dump(mode="json"),
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def log(self, scalars: dict[str, float], step: int) -> None:
        self._run.log(scalars, step=step)

    def close(self) -> None:
        import trackio

        with redirect_stdout(StringIO()):
            trackio.finish()


class _Wandb:
    """Weights & Biases, in the mode that the user's own settings select: online, offline or disabled."""

    def __init__(self, run: Path, recipe: Recipe, step: int) -> None:
        import wandb

        name = _remembered(run, "wandb")
        self._run = wandb.init(
            project=PROJECT,
            id=name,
            name=name,
            dir=str(run),
            config=recipe.model_dump(mode="json"),
            resume="allow",
            settings=wandb.Settings(silent=True, disable_git=True, disable_code=True, console="off"),
        )
        self.close = self._run.finish

    def log(self, scalars: dict[str, float], step: int) -> None:
        self._run.log(scalars, step=step)


def _remembered(run: Path, tracker: str) -> str:
    """The run's name with a tracker, kept across resumes.

    The folder's name and some hex digits: two machines may both have a ``tiny-001``.
    """
    path = run / TRACKING
    try:
        known = dict(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        known = {}
    if not isinstance(known.get(tracker), str):
        known[tracker] = f"{run.resolve().name}-{secrets.token_hex(4)}"
        store.write_file(path, json.dumps(known, indent=1))
    return str(known[tracker])
