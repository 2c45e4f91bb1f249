"""The report: its numbers match the run, its page loads nothing, and model text in it is harmless."""

from __future__ import annotations

import html.parser
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hostile import HOSTILE
from stored_runs import make_run, rationale, step_rows, turn_record

from empg_lite.core.behaviors import behavior_rates, spans
from empg_lite.core.safe_text import safe
from empg_lite.tools.report import write_report
from empg_lite.tools.report.build import ROOM_ANSWERS, ROOM_SAMPLES
from empg_lite.tools.report.charts import all_charts
from empg_lite.tools.report.drawing import inline_svg, picture
from empg_lite.tools.report.reading import arms_of, differences, read_run
from empg_lite.tools.report.samples import LONGEST, choose, pieces


def changed(section: str, **values: Any):  # type: ignore[no-untyped-def]
    """A recipe with some values of a section changed."""
    return lambda r: r.model_copy(update={section: getattr(r, section).model_copy(update=values)})


def page_data(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


@pytest.fixture
def answers() -> list[tuple[Any, Any]]:
    """Ten problems: base right on two, tuned on eight, both on one."""
    return [
        (
            rationale(f"Q{i}?", "7" if i in (0, 9) else "8", right=i in (0, 9)),
            rationale(f"Q{i}?", "3 + 4 = 7. #### 7" if i < 8 else "8", right=i < 8),
        )
        for i in range(10)
    ]


# --- numbers ------------------------------------------------------------------------------------------


def test_charts_of_a_run_show_what_was_recorded(tmp_path: Path, answers) -> None:  # type: ignore[no-untyped-def]
    run = read_run(make_run(tmp_path / "run", answers=answers))
    charts = {c.name: c for c in all_charts(arms_of([run]))}
    assert set(charts) == {"accuracy", "signal", "length", "behaviors", "time", "memory", "entropy", "loss"}
    held_out, tested, reward = charts["accuracy"].lines
    assert held_out.x == (2, 4) and held_out.y == pytest.approx((0.2, 0.4))
    # Wilson intervals for 8 and 16 right out of 40, computed independently.
    assert held_out.low == pytest.approx((0.1050, 0.2632), abs=5e-4)
    assert held_out.high == pytest.approx((0.3476, 0.5540), abs=5e-4)
    assert tested.marks and tested.x == (0, 4) and tested.y == (0.2, 0.8)
    assert reward.y == pytest.approx((6 / 16,) * 4)
    every, right, wrong = charts["length"].lines
    for i, step in enumerate((1, 2, 3, 4)):
        rows = step_rows(step)
        good = [len(r.completion_ids) for r in rows if r.right]
        bad = [len(r.completion_ids) for r in rows if not r.right]
        assert (right.y[i], wrong.y[i]) == pytest.approx((sum(good) / len(good), sum(bad) / len(bad)))
        assert every.y[i] * 16 == pytest.approx(sum(good) + sum(bad))
    (checks,) = charts["behaviors"].lines  # behaviors that never occur have no line
    assert checks.label == "verification"
    assert checks.y[0] == behavior_rates([r.completion for r in step_rows(1)])["verification"] == 6 / 16
    assert [sum(v) for v in zip(*(line.y for line in charts["signal"].lines), strict=True)] == [1.0] * 4


def test_seeds_of_a_recipe_form_one_band(tmp_path: Path) -> None:
    sizes = changed("sampler", batch_rows=7)  # as `auto` would choose on another machine
    runs = [
        make_run(tmp_path / "s" / f"seed-{s}", seed=s, change=sizes if s else lambda r: r) for s in range(3)
    ]
    faster = make_run(tmp_path / "fast", change=changed("optim", learning_rate=0.5))
    arms = arms_of([read_run(p) for p in (*runs, faster)])
    assert [(arm.label, len(arm.runs)) for arm in arms] == [("s (3 seeds)", 3), ("fast", 1)]
    assert differences(arms) == [("optim.learning_rate", ["0.002", "0.5"])]
    length = next(c for c in all_charts(arms) if c.name == "length")
    band, line = length.lines
    by_seed = [[r["completions/mean_length"] for r in read_run(p).steps] for p in runs]
    for i, values in enumerate(zip(*by_seed, strict=True)):
        assert (band.y[i], band.low[i], band.high[i]) == (
            pytest.approx(sum(values) / 3),
            min(values),
            max(values),
        )
    assert len({tuple(v) for v in by_seed}) == 3 and not line.low


def test_a_band_covers_the_steps_that_all_seeds_have(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"seed-{s}", seed=s, steps=4 - s) for s in range(2)]
    (line,) = next(c for c in all_charts(arms_of([read_run(p) for p in runs])) if c.name == "reward").lines
    assert line.x == (1, 2, 3)


def test_pictures_are_reproducible_and_ids_unique(tmp_path: Path) -> None:
    charts = all_charts(arms_of([read_run(make_run(tmp_path / "run"))]))
    assert picture(charts[0], "svg") == picture(charts[0], "svg")
    assert picture(charts[0], "png").startswith(b"\x89PNG")
    inline = [inline_svg(c) for c in charts]
    ids = Counter(i for svg in inline for i in re.findall(r'\bid="([^"]+)"', svg))
    assert ids and max(ids.values()) == 1
    for svg in inline:
        defined = set(re.findall(r'\bid="([^"]+)"', svg))
        assert {
            r for pair in re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', svg) for r in pair if r
        } <= defined
        assert "var(--ink)" in svg and "#010203" not in svg and "var(--c0)" in svg
    assert "var(--" not in picture(charts[0], "svg").decode()


def test_memory_on_a_gpu_is_the_memory_of_the_card(tmp_path: Path) -> None:
    """The plan is for the card there; the process's memory on the host is not comparable."""
    run = make_run(tmp_path / "run")
    metrics = run / "metrics.jsonl"
    records = [json.loads(line) for line in metrics.read_text("utf-8").splitlines()]
    for on_gpu, peak in ((False, 900.0), (True, 700.0)):
        gpu = {"memory/peak_gpu_mb": 700.0} if on_gpu else {}
        metrics.write_text("".join(json.dumps(r | gpu) + "\n" for r in records), "utf-8")
        memory = next(c for c in all_charts(arms_of([read_run(run)])) if c.name == "memory")
        assert [line.label for line in memory.lines] == ["peak", "planned"]
        assert [line.y for line in memory.lines] == [(peak,) * 4, (1000.0,) * 4]


def asked_until_right(folder: Path, seed: int = 0, **values: Any) -> Path:
    """A run under ``sampler.tries``; M = 4, K = 2: a problem may be given up in step 2, and not before."""
    change = changed("sampler", problems_per_step=8, samples_per_problem=2, tries=4)
    return make_run(folder, seed=seed, change=change, metrics=turn_record, **values)


def test_charts_of_tries(tmp_path: Path) -> None:
    charts = {c.name: c for c in all_charts(arms_of([read_run(asked_until_right(tmp_path / "run"))]))}
    fixed = {c.name: c for c in all_charts(arms_of([read_run(make_run(tmp_path / "fixed"))]))}
    assert set(charts) - set(fixed) == {"ended", "tries"} and set(fixed) - set(charts) == {"signal"}
    lines = {line.label: line for line in charts["accuracy"].lines}
    assert set(lines) == {"greedy, held-out rows", "right at first try", "solved within 4 tries"}
    assert (lines["right at first try"].x, lines["right at first try"].y) == ((1, 3, 4), (0.125, 0.375, 0.5))
    solved = lines["solved within 4 tries"]
    assert solved.x == (2, 3, 4) and solved.y == pytest.approx((0.0, 5 / 7, 6 / 9))
    assert [(line.label, line.y) for line in charts["ended"].lines] == [
        ("solved", (3, 0, 5, 6)),
        ("given up", (0, 1, 2, 3)),
    ]
    (tries,) = charts["tries"].lines
    assert (tries.x, tries.y) == ((1, 3, 4), (1.5, 1.5, 1.5))
    assert "reward" not in charts["accuracy"].caption and "reward" in fixed["accuracy"].caption


def test_tries_beside_fixed_groups(tmp_path: Path) -> None:
    """The rewards of all tries are not compared with those of fixed groups: first tries are."""
    both = [read_run(make_run(tmp_path / "fixed")), read_run(asked_until_right(tmp_path / "tries"))]
    charts = {c.name: c for c in all_charts(arms_of(both))}
    shown = {name: {line.label: line.y for line in chart.lines} for name, chart in charts.items()}
    assert shown["reward"] == {"fixed": (0.375,) * 4, "tries": (0.125, 0.375, 0.5)}
    assert set(shown["signal"]) == {"fixed"} and shown["ended"] == {"tries": (3, 1, 7, 9)}
    assert shown["given-up"] == {"tries": (0, 1, 2, 3)} and shown["tries"] == {"tries": (1.5,) * 3}
    assert "sampler.tries" in charts["reward"].caption and "first try" in charts["reward"].title
    alone = {c.name: c for c in all_charts(arms_of([both[0], read_run(make_run(tmp_path / "b"))]))}
    assert not any("tries" in c.caption for c in alone.values()) and alone["reward"].title == "Reward"


def test_the_page_of_tries_counts_problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("empg_lite.tools.report.build.all_charts", lambda arms: [])  # which take seconds
    rows = [rationale("Q?", f"no #### {k}", right=k == 7, k=k, position=9, tries=k - 5) for k in (6, 7)]
    write_report([asked_until_right(tmp_path / "run", rows=lambda step: rows)], tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text("utf-8")
    assert "asked until right, at most 4 times" in page and "14 solved, 6 given up" in page
    assert "5 a step; a solved one took 1.5 tries" in page
    assert [entry["try"] for entry in page_data(page)["samples"]] == [1] * 4 + [2] * 4


# --- rationales ---------------------------------------------------------------------------------------


def test_pieces_rejoin_to_the_text_with_marks() -> None:
    text = "First, find the total. 3 + 4 = 7. Let me check: 7 - 4 = 3. Wait, that is wrong. #### 7"
    found = pieces(rationale("Q", text, right=True))
    assert "".join(p[0] for p in found) == text
    assert found[-1] == ["7", "answer"]
    marked = {(p[0], m) for p in found if len(p) > 1 for m in p[1].split() if m != "answer"}
    assert marked == {(text[s.start : s.end], s.behavior) for s in spans(text)} and len(marked) >= 2
    nothing = rationale("Q", "no number", right=False, extracted=None)
    assert pieces(nothing) == [["no number"]]
    assert "".join(p[0] for p in pieces(rationale("Q", HOSTILE, right=True))) == safe(HOSTILE)
    long = pieces(rationale("Q", "word " * LONGEST + "#### 7", right=True))
    assert long[-1] == ["7", "answer"] and LONGEST < sum(len(p[0]) for p in long) < LONGEST + 100


def test_the_choice_is_balanced_and_fits() -> None:
    rows = [(run, r) for run in range(2) for step in range(1, 30) for r in step_rows(step, run)]
    assert sorted(map(id, (r for _, r in choose(rows, 10**9)))) == sorted(id(r) for _, r in rows)
    few = choose(rows, 300 * 200)
    assert few == choose(rows, 300 * 200) != choose(rows, 300 * 200, seed=1)
    assert 150 < len(few) < 200 and sum(300 + len(r.completion) for _, r in few) <= 300 * 200
    per = Counter((run, r.step, r.right) for run, r in few)
    assert len(per) == 2 * 29 * 2 and max(per.values()) - min(per.values()) <= 1
    assert choose(rows, 0) == []


@pytest.mark.slow
def test_a_huge_run_still_makes_a_small_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("empg_lite.tools.report.build.ROOM_SAMPLES", 100_000)

    def rows(step: int):  # type: ignore[no-untyped-def]
        return [
            rationale(f"Q{k % 8}?", "step " * 1100 + f"#### {k}", right=k == 7, step=step, k=k)
            for k in range(32)
        ]

    run = make_run(tmp_path / "run", steps=4, rows=rows)
    small = write_report([make_run(tmp_path / "small", steps=4)], tmp_path / "s.html")
    result = write_report([run], tmp_path / "r.html")
    assert 10 < result["rationales"] < result["rationales_stored"] == 4 * 32
    assert result["bytes"] - small["bytes"] < 100_000
    assert (
        2 * ROOM_SAMPLES + 2 * ROOM_ANSWERS < 3_000_000
    )  # JSON is larger than the text, but less than twice


# --- the page -----------------------------------------------------------------------------------------


class PageScan(html.parser.HTMLParser):
    """The elements of a page, and what it would load or run."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.addresses: list[str] = []
        self.handlers: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        for name, value in attrs:
            if name in ("src", "href", "action", "data", "xlink:href", "srcset"):
                self.addresses.append(value or "")
            if name.startswith("on"):
                self.handlers.append(name)


def test_the_page_is_self_contained_and_shows_the_figures(tmp_path: Path, answers) -> None:  # type: ignore[no-untyped-def]
    run = make_run(tmp_path / "run", answers=answers)
    result = write_report([run], run / "report.html")
    page = (run / "report.html").read_text("utf-8")
    assert result["bytes"] == (run / "report.html").stat().st_size and result["rationales"] == 4 * 16
    assert {Path(f).name for f in result["figures"]} == {p.name for p in (run / "figures").iterdir()}
    seen = PageScan()
    seen.feed(page)
    assert all(a.startswith("#") for a in seen.addresses) and not seen.handlers
    assert seen.tags["svg"] == 8 and seen.tags["script"] == 2 and not seen.tags["link"]
    assert "url(" not in page.replace("url(#", "")
    assert "given up" not in page and all("try" not in entry for entry in page_data(page)["samples"])
    assert "20.0% → 80.0%" in page and "7 are right only after training and 1 only before" in page
    data = page_data(page)
    assert len(data["samples"]) == 64 and len(data["answers"]) == 10
    # Changed outcomes come first.
    assert [a["sides"][0]["right"] != a["sides"][1]["right"] for a in data["answers"]] == [True] * 8 + [
        False
    ] * 2
    for entry in data["samples"]:
        (row,) = [
            r
            for r in step_rows(entry["step"])
            if r.question == data["questions"][entry["q"]]["text"] and r.sample_index == entry["k"]
        ]
        assert "".join(p[0] for p in entry["parts"]) == row.completion
        assert (entry["reward"], entry["answer"], entry["tokens"]) == (
            row.reward,
            row.extracted,
            len(row.completion_ids),
        )
    again = write_report([run], tmp_path / "again.html")
    assert again["bytes"] == result["bytes"] and (tmp_path / "again.html").read_text("utf-8") == page


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    rows = [rationale(HOSTILE, HOSTILE, right=k == 1, gold=HOSTILE, k=k) for k in range(2)]
    folder = make_run(tmp_path / "<b>{{ 1 }}", steps=1, rows=lambda step: rows)
    event = {"event": "warning", "what": HOSTILE.replace("\ud800", ""), "step": 1}
    (folder / "events.jsonl").write_text(json.dumps(event) + "\n", "utf-8")
    write_report([folder], tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text("utf-8")
    seen = PageScan()
    seen.feed(page)
    assert seen.tags["script"] == 2 and not seen.tags["img"] and not seen.tags["b"] and not seen.handlers
    assert "\u202e" not in page and "\x1b" not in page and "49" not in page_data(page)["questions"][0]["text"]
    assert page_data(page)["questions"][0]["text"] == safe(HOSTILE)


def test_interrupted_and_damaged_runs_have_a_page(tmp_path: Path, answers) -> None:  # type: ignore[no-untyped-def]
    young = make_run(tmp_path / "young", steps=2, answers=answers)
    (young / "eval" / "after" / "figures.json").write_text("{", "utf-8")
    metrics = (young / "metrics.jsonl").read_text("utf-8")
    (young / "metrics.jsonl").write_text(metrics[:-30], "utf-8")
    rollouts = young / "rollouts" / "step-000002.jsonl"
    rollouts.write_text(rollouts.read_text("utf-8")[:-40], "utf-8")
    (young / "rollouts" / "step-000003.jsonl").write_text("garbage\n", "utf-8")
    (young / "environment.json").unlink()
    result = write_report([young], tmp_path / "young.html")
    page = (tmp_path / "young.html").read_text("utf-8")
    assert "1 of 25" in page and "not evaluated after training yet" in page and result["rationales"] == 31
    bare = make_run(tmp_path / "bare", steps=1)
    (bare / "metrics.jsonl").unlink()
    (bare / "rollouts" / "step-000001.jsonl").unlink()
    result = write_report([bare], tmp_path / "bare.html")
    assert "No step is recorded yet." in (tmp_path / "bare.html").read_text("utf-8")
    assert result["figures"] == [] and result["rationales"] == 0
    write_report([young, bare], tmp_path / "both.html")


# --- the command --------------------------------------------------------------------------------------


def test_the_command(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    for seed in range(2):
        make_run(tmp_path / "runs" / "both" / f"seed-{seed}", seed=seed)
    other = make_run(tmp_path / "runs" / "other-001", change=changed("em", baseline=0.5))
    code, out, _ = cli("report", other, "--json")
    result = json.loads(out.splitlines()[-1])
    assert code == 0 and result["report"] == str(other / "report.html") and result["runs"] == 1
    code, out, _ = cli("report", "runs/both", "--json")
    result = json.loads(out.splitlines()[-1])
    assert code == 0 and result["report"] == "runs/both/report.html" and result["runs"] == 2
    assert "both (2 seeds)" in Path(result["report"]).read_text("utf-8")
    code, out, _ = cli("report", "runs/both", other)
    assert code == 0 and (tmp_path / "report.html").is_file() and "report.html" in out
    assert "em.baseline" in (tmp_path / "report.html").read_text("utf-8")
    for arguments, expected, said in (
        (("runs",), 66, "runs"),
        (("nothing",), 66, "nothing"),
        ((other, other), 2, "twice"),
        ((other, "--out", "page.pdf"), 2, ".html"),
    ):
        code, _, err = cli("report", *arguments)
        assert code == expected and said in err.splitlines()[-1] and err.count("\n") == 1
