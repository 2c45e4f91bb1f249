"""Write docs/recipes.md: the shipped recipes and every key, from the files and the code that own them.

python scripts/make_docs.py            # writes the page
python scripts/make_docs.py --check    # exit code 1 where it is not up to date
"""

from __future__ import annotations

import argparse
from pathlib import Path

from empg_lite.recipe.file import builtin_recipes
from empg_lite.recipe.schema import field_docs, sections

PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"
INTRO = """# Recipes and every key

*Made by `scripts/make_docs.py` from `recipes/` and `empg_lite/recipe/schema.py`: change those.*

A recipe is a YAML file in six sections. `empg-lite recipes` lists what ships, `empg-lite recipes show NAME`
prints one with every key, `--set SECTION.KEY=VALUE` changes a key for one command. Unknown keys, doubles and
wrong types are errors that name file, line and field. `auto` is settled once, at the start, and recorded.

## What ships
"""


def page() -> str:
    """The whole page."""
    parts = [INTRO]
    for name, path in sorted(builtin_recipes().items()):
        comments = []
        for line in path.read_text("utf-8").splitlines():
            if not line.startswith("#"):
                break
            comments.append(line.removeprefix("#").removeprefix(" "))
        title, *rest = comments
        body = "\n".join(rest).strip("\n")
        parts.append(f"### `{name}`\n\n{title}\n\n```text\n{body}\n```\n")
    parts.append("## Every key\n")
    docs = field_docs()
    for section, model in sections().items():
        parts.append(f"### `{section}`\n\n{model.__doc__}\n")
        rows = [d for d in docs if d.key.startswith(f"{section}.")]
        table = ["| key | type | default | |", "|---|---|---|---|"]
        table += [
            f"| `{d.key}` | {_cell(d.type)} | {_cell(d.default)} | {_cell(d.description)} |" for d in rows
        ]
        parts.append("\n".join(table) + "\n")
    return "\n".join(parts)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit code 1 where the page is old"
    )
    check = parser.parse_args().check
    text = page()
    if check:
        raise SystemExit(0 if PAGE.read_text("utf-8") == text else 1)
    PAGE.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
