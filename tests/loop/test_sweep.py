"""``train --seeds``: each seed is the run that ``train --seed`` makes, and the summary is of those runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from run_files import stable

from empg_lite.core.errors import MissingInput
from empg_lite.run.journal import read_metrics
from empg_lite.run.layout import newest_run, runs_of

WEIGHTS = "adapter/adapter_model.safetensors"


def train(cli, recipe: Path, folder: Path, *more: object) -> tuple[int, str, str]:  # type: ignore[no-untyped-def]
    return cli("train", "--recipe", recipe, "--output-dir", folder, "--set", "run.eval_every=3", *more)


def test_each_seed_is_a_run_of_its_own(
    cli,  # type: ignore[no-untyped-def]
    recipe_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "both"
    code, out, _ = train(cli, recipe_file, folder, "--seeds", "4, 2", "--json")
    result = json.loads(out.splitlines()[-1])
    assert code == 0 and result["seeds"] == [4, 2] and result["sweep"] == str(folder)
    assert runs_of(folder) == [folder / "seed-2", folder / "seed-4"]
    assert newest_run().resolve() == folder / "seed-2"  # the last one trained
    code, _, _ = train(cli, recipe_file, tmp_path / "alone", "--seed", 2)
    assert code == 0
    assert (folder / "seed-2" / WEIGHTS).read_bytes() == (tmp_path / "alone" / WEIGHTS).read_bytes()
    assert (folder / "seed-4" / WEIGHTS).read_bytes() != (tmp_path / "alone" / WEIGHTS).read_bytes()
    alone, swept = (read_metrics(p / "metrics.jsonl") for p in (tmp_path / "alone", folder / "seed-2"))
    assert [stable(r) for r in alone] == [stable(r) for r in swept]
    after = [run["accuracy_after"] for run in result["runs"]]
    assert result["accuracy_after"] == {"mean": sum(after) / 2, "min": min(after), "max": max(after)}

    assert result["report"] == str(folder / "report.html") and (folder / "report.html").is_file()

    # Again without --resume: refused before anything. With it: nothing to do, and the same figures.
    code, _, err = train(cli, recipe_file, folder, "--seeds", "9,2")
    assert code == 2 and "seed-2" in err.splitlines()[-1] and "--resume" in err
    assert not (folder / "seed-9").exists()
    stamps = {p: p.stat().st_mtime_ns for p in folder.rglob("*.safetensors")}
    code, out, _ = train(cli, recipe_file, folder, "--seeds", "4,2", "--resume")
    assert code == 0 and stamps == {p: p.stat().st_mtime_ns for p in folder.rglob("*.safetensors")}
    for seed, value in zip((4, 2), after, strict=True):
        (row,) = [line for line in out.splitlines() if line.startswith(f"│ {seed} ")]
        assert f"{value:.1%}" in row
    code, _, _ = train(cli, recipe_file, folder, "--seeds", "4,2,1", "--resume")
    assert code == 0 and [p.name for p in runs_of(folder)] == ["seed-1", "seed-2", "seed-4"]


def test_time_is_that_of_all_together(cli, recipe_file: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path / "short"
    code, out, _ = train(cli, recipe_file, folder, "--seeds", "0,1", "--max-minutes", 0, "--json")
    result = json.loads(out.splitlines()[-1])
    assert code == 0 and result["seeds"] == [0] and result["runs"][0]["steps"] == 1
    assert result["accuracy_after"] is None and result["accuracy_before"] is not None
    assert not (folder / "seed-1").exists()


@pytest.mark.parametrize(
    ("seeds", "more", "said"),
    [
        ("0,x", (), "0,1,2"),
        ("", (), "0,1,2"),
        ("1,01", (), "duplicate"),
        ("-1", (), "0,1,2"),
        (f"0,{2**32}", (), "2**32"),
        ("0,1", ("--seed", 3), "one of them"),
    ],
)
def test_what_is_no_list_of_seeds(cli, tmp_path: Path, seeds: str, more: tuple[str, ...], said: str) -> None:  # type: ignore[no-untyped-def]
    code, _, err = cli("train", "--output-dir", tmp_path / "r", "--seeds", seeds, *more)
    assert code == 2 and said in err.splitlines()[-1] and not (tmp_path / "r").exists()


def test_a_folder_without_runs_is_no_sweep(tmp_path: Path) -> None:
    (tmp_path / "seed-0").mkdir()
    with pytest.raises(MissingInput):
        runs_of(tmp_path)
