"""The report in a real browser. Needs Chromium (Debian: chromium) and the `browser` extra."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hostile import HOSTILE
from stored_runs import make_run, rationale, step_rows

from empg_lite.core.behaviors import spans
from empg_lite.tools.report import write_report

pytestmark = [pytest.mark.slow, pytest.mark.browser]

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed (extra: browser)"
    )
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three evaluated seeds of four steps: the page of all, and the page of the first."""
    folder = tmp_path_factory.mktemp("sweep")
    answers = [
        (rationale(f"Q{i}?", "8", right=i == 9), rationale(f"Q{i}?", "3 + 4 = 7. #### 7", right=i < 8))
        for i in range(10)
    ]
    runs = [make_run(folder / f"seed-{s}", seed=s, answers=answers) for s in range(3)]
    write_report([runs[0]], runs[0] / "report.html")
    write_report(runs, folder / "report.html")
    return folder / "report.html"


class Opened:
    """A page opened offline from a file, with its console messages and requests."""

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.context.set_offline(True)
        self.page = self.context.new_page()
        self.console: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda m: self.console.append(m.text))
        self.page.on("pageerror", lambda e: self.console.append(str(e)))
        self.page.on("request", lambda r: self.requests.append(r.url))
        self.page.goto(path.as_uri())

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.context.close()

    def count(self, name: str) -> int:
        """The number of matching entries that the page shows."""
        return int(self.page.inner_text(f"#{name}-count").split()[0])

    def choose(self, name: str, control: str, value: str) -> None:
        self.page.select_option(f"#{name}-filters [name={control}]", value)


def test_no_errors_and_no_requests(browser: Any, report: Path) -> None:
    for path in (report, report.parent / "seed-0" / "report.html"):
        with Opened(browser, path) as opened:
            assert opened.console == [] and opened.requests == [path.as_uri()]


def test_filters_show_what_the_rollouts_hold(browser: Any, report: Path) -> None:
    rows = [(s, r) for s in range(3) for step in range(1, 5) for r in step_rows(step, s)]
    checks = [r for _, r in rows if any(s.behavior == "verification" for s in spans(r.completion))]
    with Opened(browser, report) as opened:
        assert opened.count("samples") == len(rows) == 192
        assert opened.page.locator("#samples-list > li").count() == 20
        opened.page.click("#samples-more")
        assert opened.page.locator("#samples-list > li").count() == 40
        opened.choose("samples", "reward", "1")
        assert opened.count("samples") == sum(r.right for _, r in rows)
        assert opened.page.locator("#samples-list > li.wrong").count() == 0
        opened.choose("samples", "step", "3")
        assert opened.count("samples") == sum(r.right and r.step == 3 for _, r in rows)
        opened.choose("samples", "run", "2")
        chosen = [r for s, r in rows if r.right and r.step == 3 and s == 2]
        assert opened.count("samples") == len(chosen)
        texts = opened.page.locator("#samples-list .rationale").all_inner_texts()
        assert sorted(t.strip() for t in texts) == sorted(r.completion for r in chosen)
        for control in ("reward", "step", "run"):
            opened.choose("samples", control, "")
        opened.choose("samples", "behavior", "verification")
        assert opened.count("samples") == len(checks) > 0
        marks = opened.page.locator("#samples-list mark.verification")
        assert marks.count() >= 20 and "check" in marks.first.inner_text()
        opened.choose("samples", "behavior", "backtracking")
        assert opened.count("samples") == 0
        opened.choose("samples", "behavior", "")
        opened.page.fill("#samples-filters [name=problem]", "problem 2 of STEP 4")
        assert opened.count("samples") == 12
        assert opened.page.locator("#samples-list mark.answer").first.inner_text() in ("7", "8")

        opened.choose("answers", "outcome", "wr")
        assert opened.count("answers") == 3 * 8
        opened.choose("answers", "outcome", "rw")
        assert opened.count("answers") == 3
        assert "Q9?" in opened.page.inner_text("#answers-list")
        assert opened.console == []


def test_hostile_text_runs_nothing(browser: Any, tmp_path: Path) -> None:
    rows = [rationale(HOSTILE, HOSTILE, right=k == 1, gold=HOSTILE, k=k) for k in range(2)]
    write_report([make_run(tmp_path / "run", steps=1, rows=lambda s: rows)], tmp_path / "r.html")
    with Opened(browser, tmp_path / "r.html") as opened:
        assert opened.page.evaluate("window.hacked") is None
        assert opened.console == [] and opened.requests == [(tmp_path / "r.html").as_uri()]
        assert "<img src=x onerror" in opened.page.inner_text("#samples-list")
        assert opened.page.locator("img").count() == 0


def test_the_content_policy_blocks_injected_scripts(browser: Any, report: Path, tmp_path: Path) -> None:
    """Negative control: even an injected script does not run."""
    page = report.read_text("utf-8").replace("<main>", "<main><script>window.hacked = 1</script>", 1)
    (tmp_path / "worse.html").write_text(page, "utf-8")
    with Opened(browser, tmp_path / "worse.html") as opened:
        assert opened.page.evaluate("window.hacked") is None
        assert any("Content Security Policy" in text for text in opened.console)


@pytest.mark.parametrize(("width", "height"), [(390, 800), (1280, 900)])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_accessible(browser: Any, report: Path, width: int, height: int, scheme: str) -> None:
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="axe is not installed (extra: browser)"
    )
    for path in (report, report.parent / "seed-0" / "report.html"):
        with Opened(
            browser, path, viewport={"width": width, "height": height}, color_scheme=scheme
        ) as opened:
            for details in opened.page.locator("details").all():
                details.evaluate("d => { d.open = true }")
            assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
            found = axe.Axe().run(opened.page).response["violations"]
            serious = [v for v in found if v["impact"] in ("serious", "critical")]
            assert not serious, [(v["id"], [n["html"][:200] for n in v["nodes"]][:3]) for v in serious]


def test_the_theme_button_toggles(browser: Any, report: Path) -> None:
    with Opened(browser, report, color_scheme="light") as opened:
        ground = "getComputedStyle(document.body).backgroundColor"
        light = opened.page.evaluate(ground)
        opened.page.click("#theme")
        dark = opened.page.evaluate(ground)
        opened.page.click("#theme")
        assert opened.page.evaluate(ground) == light != dark
    with Opened(browser, report, color_scheme="dark") as opened:
        assert opened.page.evaluate(ground) == dark
