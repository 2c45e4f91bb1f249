"""Kills and syncs of the real command in separate processes. Slow; one test needs strace."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from crash_harness import violations
from fixture_recipe import write_recipe

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import kills

pytestmark = pytest.mark.slow


def test_the_command_killed_and_repeated(tmp_path: Path) -> None:
    found = kills.run(tmp_path, 4, 1, print)
    print(f"\nK3: {found}")
    assert found["kills"] >= 4 and found["mismatches"] == found["orphans"] == 0


_CALL = re.compile(r"^\d+ +(\w+)\((.*)\) += (-?\d+)")
_RESUMED = re.compile(r"^(\d+) +<\.\.\. \w+ resumed>(.*)")
_PATH = re.compile(r'^(?:AT_FDCWD(?:<[^>]*>)?, )?"([^"]*)"')
_DESCRIPTOR = re.compile(r"^(\d+)<([^>]*)>")
_NAMES = {
    "write": "_write",
    "pwrite64": "_write",
    "ftruncate": "_cut",
    "fsync": "_fsync",
    "rename": "_rename",
    "mkdir": "_mkdir",
    "unlink": "_unlink",
    "rmdir": "_rmdir",
}


def read_strace(lines: Iterable[str], run: Path) -> tuple[list[tuple[str, str]], list[int]]:
    """Disk changes of the run in ``store``'s terms, and the positions at which something was printed."""
    calls: list[tuple[str, str]] = []
    told: list[int] = []
    begun: dict[str, str] = {}  # by process: a call that another one's came in between
    for line in lines:
        if line.endswith(" <unfinished ...>"):
            begun[line.split(" ", 1)[0]] = line.removesuffix(" <unfinished ...>")
            continue
        if resumed := _RESUMED.match(line):
            line = begun.pop(resumed[1], "") + resumed[2]
        found = _CALL.match(line)
        if not found or int(found[3]) < 0:
            continue
        name, arguments = found[1], found[2]
        descriptor, path = _DESCRIPTOR.match(arguments), _PATH.match(arguments)
        if name == "write" and descriptor and descriptor[1] in "12":
            told.append(len(calls))
            continue
        where = descriptor[2] if descriptor else path[1] if path else ""
        if where.startswith(str(run)) and not where.endswith("/LOCK"):
            calls.append((_NAMES[name], where))
    return calls, told


def test_calls_in_two_pieces_are_read_as_one() -> None:
    log = [
        "7 fsync(5</r/a> <unfinished ...>",
        '8 write(2</dev/tty>, "x", 1) = 1',
        "7 <... fsync resumed>) = 0",
    ]
    assert read_strace(log, Path("/r")) == ([("_fsync", "/r/a")], [0])


UNSYNCED = (
    "import os\nfrom empg_lite.run import store\n"
    "store._fsync = lambda fd: None\n"
    "from empg_lite.cli import main\nimport sys\nmain(sys.argv[1:])\n"
)


def test_the_kernel_sees_the_same_order(tmp_path: Path, model_dir: Path) -> None:
    """Every call of the command and its threads, as strace sees them; the control has no fsync."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed (apt install strace)")
    recipe = write_recipe(tmp_path, model_dir)
    for entry, sound in ((["-m", "empg_lite"], True), (["-c", UNSYNCED], False)):
        run, log = tmp_path / f"run-{sound}", tmp_path / "strace.log"
        command = ["strace", "-f", "-y", "-s", "16", "-e", f"trace={','.join(_NAMES)}", "-o", str(log)]
        command += [sys.executable, *entry, "train", "--recipe", str(recipe), "--output-dir", str(run)]
        done = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        calls, told = read_strace(log.read_text("utf-8", "replace").splitlines(), run)
        renames, found = sum(name == "_rename" for name, _ in calls), violations(calls, told)
        print(f"\nK5: {renames} renames, {len(found)} violations (fsync {'kept' if sound else 'removed'})")
        assert renames >= 15 and len(told) > 3
        assert found == [] if sound else len(found) >= renames


def test_no_state_of_the_disk_after_a_power_cut_is_lost(tmp_path: Path, model_dir: Path) -> None:
    """After a power failure what was synced is kept; anything else may or may not be there.

    The files are built again from the log of a run: after each call, with everything that no fsync covers
    dropped. From every such tree ``train --resume`` ends as the straight run does.
    """
    import crash_harness as harness
    from crash_harness import Plant, digest, side_by_side

    plant = Plant(tmp_path, model_dir)
    source = plant.fresh()
    trees = tmp_path / "trees"
    trees.mkdir()
    plant.run(source, change=lambda: harness.record_durable(source, trees))
    expected = digest(source)
    states = sorted(trees.iterdir(), key=lambda p: int(p.name))

    def resumed(tree: Path) -> str:
        run = plant.fresh()
        shutil.copytree(tree, run, symlinks=True)
        ended = plant.run(run)
        found = digest(run) if ended.code == 0 else f"exit {ended.code}: {ended.said}"
        shutil.rmtree(run)
        return found

    found = side_by_side(lambda tree=tree: resumed(tree) for tree in states)
    wrong = [(tree.name, f) for tree, f in zip(states, found, strict=True) if f != expected]
    print(f"\nK6: {len(states)} states of the disk, {len(wrong)} mismatches")
    assert len(states) > 20 and wrong == [], json.dumps(wrong[:3])
