"""The real command, killed at random and given again until it ends, beside a run that nothing happened to.

``python benchmarks/kills.py --loops 50`` trains the bundled model for four short steps. Each loop starts the
command in a session of its own, kills it after a random time, by turns the whole process group or the parent
alone, and gives the same command again until it ends by itself. It prints kills, loops whose result differs
(adapter, optimizer, metrics without clocks), and processes still there five seconds after a kill; any of the
last two is exit code 1.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from run_files import digest  # noqa: E402

SETTINGS = (
    "sampler.problems_per_step=4",
    "sampler.samples_per_problem=4",
    "run.eval_every=2",
    "run.eval_limit=16",
    "run.save_every=1",
)


def main() -> None:
    """Print one line a loop, and a last one for all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--loops", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = run(Path(folder), options.loops, options.seed, print)
    print(json.dumps(result))
    raise SystemExit(1 if result["mismatches"] or result["orphans"] else 0)


def run(folder: Path, loops: int, seed: int, say: Any) -> dict[str, int]:
    """Kills, mismatches and orphans of so many loops."""
    rng, (expected, seconds) = random.Random(seed), _straight(folder / "straight")
    total = {"loops": loops, "kills": 0, "mismatches": 0, "orphans": 0}
    for loop in range(loops):
        kills = orphans = 0
        while True:
            # Two fifths of the time are imports: the later half of a run is worth more kills.
            found = _until(folder / f"{loop}", rng.uniform(0.3, 1.0) * seconds, group=bool(kills % 2))
            if found is None:
                break
            kills, orphans = kills + 1, orphans + found
        wrong = digest(folder / f"{loop}") != expected
        say(f"loop {loop}: {kills} kills, {'DIFFERS' if wrong else 'identical'}, {orphans} orphans")
        total["kills"], total["orphans"] = total["kills"] + kills, total["orphans"] + orphans
        total["mismatches"] += wrong
    return total


def _command(run: Path) -> list[str]:
    sets = [part for setting in SETTINGS for part in ("--set", setting)]
    options = ["--recipe", "tiny", "--max-steps", "4", "--output-dir", str(run), "--resume", "--force", *sets]
    return [sys.executable, "-m", "empg_lite", "train", *options]


def _start(run: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        _command(run),
        env=environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _straight(run: Path) -> tuple[tuple[str, ...], float]:
    started = time.monotonic()
    assert _start(run).wait() == 0, "the command itself fails"
    return digest(run), time.monotonic() - started


def _until(run: Path, seconds: float, *, group: bool) -> int | None:
    """Kill the command after so long: its processes still there later; None where it ended by itself."""
    process = _start(run)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        if group:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        process.wait()
        return len(_left(process.pid, 5.0))
    assert code == 0, f"exit code {code}"
    return None


def _left(session: int, patience: float) -> Sequence[int]:
    """Processes of a session that are still there when patience ends."""
    deadline = time.monotonic() + patience
    while (found := _of_session(session)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def _of_session(session: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text("utf-8", "replace").rsplit(")", 1)[1].split()
        except OSError:
            continue  # it has just ended
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


if __name__ == "__main__":
    main()
