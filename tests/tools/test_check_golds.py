"""What ``check`` says of gold cells: which rule read them, and which cannot be read."""

from __future__ import annotations

import json
from pathlib import Path


def test_check_says_how_gold_cells_were_read(cli, recipe_file: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    data = tmp_path / "data.jsonl"
    golds = [str(n) for n in range(20)] + [
        "The answer is 14.",
        r"\frac{1}{",
        "we see that 5 of the 9 are left",
    ]
    data.write_text("".join(json.dumps({"question": f"q{g}", "answer": g}) + "\n" for g in golds), "utf-8")
    args = ("check", "--recipe", recipe_file, "--set", f"data.path={data}", "--set", "data.reward=math")
    code, out, _ = cli(*args, "--json")
    report = json.loads(out.splitlines()[-1])
    assert code == 1 and report["gold_rules"] == {"whole": 22, "answer_is": 1}
    assert report["gold_read"] == [["The answer is 14.", "14"]]
    failures = {f["gold"]: f["reason"] for f in report["gold_failures"]}
    assert set(failures) == set(golds[-2:])
    assert "braces" in failures[golds[-2]] and "'9' only stands in it" in failures[golds[-1]]
    data.write_text("".join(data.read_text("utf-8").splitlines(keepends=True)[:-2]), "utf-8")
    code, out, _ = cli(*args)
    assert code == 0 and "gold answers read: 20 by whole, 1 by answer_is" in out
    assert "'The answer is 14.' read as '14'" in out and "gold answers that score 1: 21 of 21" in out
