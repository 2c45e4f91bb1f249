"""The documentation is true: commands parse and run, code is the code, tests exist, links lead somewhere."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main

from empg_lite.cli import app
from empg_lite.recipe.file import builtin_recipes

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
#: Pages whose commands run on any machine, top to bottom, with the tiny model.
RUN = ("quickstart", "your-own-data", "report", "export", "chat", "python", "off-policy")


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """Every empg-lite command of a page's shell blocks, as words; comments and continued lines understood."""
    found = []
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            match = re.match(r"(?:\S*bin/)?empg-lite (.*)$", line.strip().rpartition("&& ")[2])
            if match:
                text = re.split(r"\s>\s", match[1])[0]
                found.append(shlex.split(text, comments=True))
    return found


def test_there_are_commands_to_look_at() -> None:
    assert sum(len(commands(page)) for page in PAGES) > 40
    assert {p.stem for p in PAGES} >= set(RUN)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_every_command_parses(page: Path) -> None:
    """With the types and ranges of its options; nothing is run."""
    group: Any = typer.main.get_command(app)
    for words in commands(page):
        command = group.commands.get(words[0])
        if words[0].startswith("--"):
            assert words[0] in ("--help", "--install-completion"), words
            continue
        assert command is not None, words
        context = command.make_context(words[0], words[1:])
        recipe = context.params.get("recipe")
        assert recipe is None or recipe in builtin_recipes() or recipe.endswith(".yaml"), words


def test_a_wrong_command_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    for wrong in ("train --recipe tiny --steps 3", "train --recipe tinny", "eval --k many", "fly"):
        page.write_text(f"```bash\nempg-lite {wrong}\n```\n", "utf-8")
        with pytest.raises(BaseException):  # noqa: B017 (click's and ours)
            test_every_command_parses(page)


def test_recipes_page_is_made_of_the_code() -> None:
    done = subprocess.run([sys.executable, ROOT / "scripts" / "make_docs.py", "--check"], check=False)
    assert done.returncode == 0, "run scripts/make_docs.py"


def test_code_in_how_it_works_is_the_code() -> None:
    source = "".join((ROOT / "empg_lite" / name).read_text("utf-8") for name in ("em.py", "loop/train.py"))
    found = blocks(ROOT / "docs" / "how-it-works.md", "python")
    assert len(found) >= 3
    for block in found:
        assert block.rstrip("\n") in source, block


def test_tests_named_in_the_comparison_exist() -> None:
    """And every one of the 25 pains has one."""
    page = (ROOT / "docs" / "comparison.md").read_text("utf-8")
    rows = re.findall(r"^\| (\d+) \| .*$", page, re.MULTILINE)
    assert rows == [str(n) for n in range(1, 26)]
    for line in page.splitlines():
        if re.match(r"\| \d+ \|", line):
            named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", line.split("|")[4])
            assert named, line
            for file, test in named:
                assert f"def {test}(" in next((ROOT / "tests").rglob(file)).read_text("utf-8"), (file, test)


def test_links_of_the_readme_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)", (ROOT / "README.md").read_text("utf-8"))
    assert len(links) > 10
    for link in links:
        assert link.startswith("https://") or (ROOT / link).exists(), link


def test_the_site_builds_in_strict_mode_and_asks_for_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "DISABLE_MKDOCS_2_WARNING": "true"}
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path / "site")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    pages = list((tmp_path / "site").glob("*.html"))
    assert {p.stem for p in pages} >= {p.stem for p in PAGES} - {"README"}
    for page in pages:
        text = page.read_text("utf-8")
        loaded = re.findall(r"<(?:script|img|iframe)[^>]*\ssrc=\"?([^\s\">]+)", text)
        loaded += re.findall(r"<link[^>]*rel=\"?stylesheet\"?[^>]*href=\"?([^\s\">]+)", text)
        loaded += re.findall(r"<link[^>]*href=\"?([^\s\">]+)[^>]*rel=\"?(?:stylesheet|preconnect)", text)
        assert loaded and not [a for a in loaded if a.startswith(("http", "//"))], page.name


SHIM = """#!/bin/bash
# Shortens what the page trains, and passes over what needs a hub or a card.
case "$*" in *gsm8k-*|*runs/gsm8k*|*--repo*) exit 0 ;; esac
if [ "$1" = train ]; then exec {python} -m empg_lite "$@" --max-steps 3 --set run.eval_limit=20; fi
if [ "$1" = eval ]; then exec {python} -m empg_lite "$@" --limit 20; fi
exec {python} -m empg_lite "$@"
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN)
def test_the_page_runs_from_top_to_bottom(name: str, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    shim = tmp_path / "bin" / "empg-lite"
    shim.write_text(SHIM.format(python=sys.executable), "utf-8")
    shim.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    environment.pop("EMPG_TRY", None)

    def run(command: list[str], text: str) -> str:
        done = subprocess.run(
            command, input=text, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        return done.stdout

    page = ROOT / "docs" / f"{name}.md"
    if name in ("report", "export", "chat"):  # they look at the runs of the quickstart
        first = "empg-lite train --recipe tiny --output-dir runs/first"
        run(
            ["bash", "-e", "-s"],
            f"{first}\nempg-lite train --recipe tiny --seeds 0,1 --output-dir runs/seeds\n",
        )
    for block in blocks(page, "bash"):
        if not re.search(r"^(pip|vllm|python scripts/)", block, re.MULTILINE):
            run(["bash", "-e", "-s"], block)
    if name == "python":
        for block in blocks(page, "python"):
            run([sys.executable, "-"], block)
    if name == "quickstart":
        assert (tmp_path / "runs" / "first" / "report.html").is_file()
        assert (tmp_path / "runs" / "seeds" / "report.html").is_file()
