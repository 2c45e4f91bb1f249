"""Real small, full or read-only disks: a tmpfs of a given size, a user without permissions."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fixture_recipe import write_recipe
from run_files import stable

from empg_lite import api
from empg_lite.cli import main
from empg_lite.core.errors import StorageError
from empg_lite.loop import begin
from empg_lite.run.checkpoint import newest_valid
from empg_lite.run.journal import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.mount]
WEIGHTS = "adapter/adapter_model.safetensors"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """``disk(kb)`` mounts an empty file system of that size."""
    mounted: list[Path] = []

    def mount(kb: int) -> Path:
        place = tmp_path / f"disk-{len(mounted)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kb}k", "none", str(place)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"mount is refused here: {done.stderr.strip()}")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", str(place)], check=True)


def used_kb(place: Path) -> float:
    facts = os.statvfs(place)
    return (facts.f_blocks - facts.f_bfree) * facts.f_frsize / 1024


def test_too_small_a_disk_is_found_before_the_first_step_and_never_later(  # type: ignore[no-untyped-def]
    disk, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D3: above some size every run finishes; below it every run is refused before sampling."""
    recipe = write_recipe(tmp_path, model_dir)
    large = disk(8000)
    api.run(recipe, large / "run")
    needed = used_kb(large)
    sizes = [
        int(needed * share) for share in (0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.7, 2.0, 3.0)
    ]
    ended = {}
    for size in sizes:
        place = disk(size)
        try:
            api.run(recipe, place / "run")
            ended[size] = True
        except StorageError as error:
            ended[size] = False
            assert "not enough disk space" in str(error) and "needed" in str(error), (size, error)
            assert not list((place / "run").glob("rollouts/*")), "something was sampled"
    outcome = list(ended.values())
    assert outcome == sorted(outcome) and outcome.count(False) >= 3 and outcome.count(True) >= 3, ended
    print(
        f"a run that takes {needed:.0f} KB is refused up to {max(s for s, ok in ended.items() if not ok)} KB"
    )

    # The control: without the question a disk that is a little too small is found out half-way.
    monkeypatch.setattr(begin, "check_disk_space", lambda *args: None)
    place = disk(int(0.9 * needed))
    with pytest.raises(StorageError, match="No space left"):
        api.run(recipe, place / "run")
    assert read_metrics(place / "run" / "metrics.jsonl")[-1]["step"] >= 1


def test_a_disk_that_fills_up_costs_nothing(disk, model_dir: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """D2: the disk fills up during a checkpoint; once space is freed the run resumes identically."""
    recipe = write_recipe(tmp_path, model_dir)
    straight = api.run(recipe, tmp_path / "straight")
    for left in (0, 20, 60, 100):
        run = disk(4000) / "run"
        api.run(recipe, run, max_minutes=0)
        before = newest_valid(run)
        filler = run.parent / "filler"
        facts = os.statvfs(run)
        filler.write_bytes(bytes(max(0, facts.f_bavail * facts.f_frsize - 1024 * left)))
        with pytest.raises(StorageError, match="No space left") as raised:
            api.run(recipe, run, resume=True)
        assert raised.value.exit_code == 74 and "free" in str(raised.value)
        found = newest_valid(run)
        assert found is not None and before is not None and found.name >= before.name
        filler.unlink()
        after = api.run(recipe, run, resume=True)
        assert [stable(r) for r in after.metrics()] == [stable(r) for r in straight.metrics()], left
        assert (run / WEIGHTS).read_bytes() == (straight.path / WEIGHTS).read_bytes()


def test_a_folder_that_may_not_be_written(model_dir: Path) -> None:
    """D4: a user without permissions gets one line naming the folder, before anything is sampled.

    A fork switches to another user: everything is already imported, and the model is world-readable.
    """
    if os.geteuid():
        pytest.skip("only root can become somebody else")
    home = Path(tempfile.mkdtemp(dir="/tmp", prefix="empg-closed-"))
    try:
        home.chmod(0o755)
        shutil.copytree(model_dir, home / "model")
        recipe = write_recipe(home, home / "model")
        for path in [home / "model", *home.rglob("*")]:
            path.chmod(0o755)
        api.run(recipe, home / "warm")
        closed = home / "closed"
        closed.mkdir(mode=0o555)
        for folder in (closed / "run", closed / "deeper" / "run"):
            with tempfile.TemporaryFile() as said:
                pid = os.fork()
                if not pid:
                    os.setgid(65534)
                    os.setuid(65534)
                    os.dup2(said.fileno(), 1)
                    os.dup2(said.fileno(), 2)
                    sys.stdout, sys.stderr = (
                        os.fdopen(1, "w", closefd=False),
                        os.fdopen(2, "w", closefd=False),
                    )
                    code = 70
                    try:
                        main(["train", "--recipe", str(recipe), "--output-dir", str(folder)])
                    except SystemExit as stopped:
                        code = int(stopped.code or 0)
                    sys.stderr.flush()
                    os._exit(code)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                said.seek(0)
                text = said.read().decode()
            last = text.strip().splitlines()[-1]
            assert code == 74 and last.startswith("error: Permission denied"), text
            assert str(closed) in last and "preflight" not in text
        assert list(closed.iterdir()) == []
    finally:
        shutil.rmtree(home)
