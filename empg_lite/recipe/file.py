"""Recipe files: lookup by name, reading with line numbers, ``--set`` overrides, writing.

``strict_yaml.py`` decides what YAML is accepted, ``schema.py`` what a recipe may say. Every error is one
line, ``what · file:line: field · what to do``; an override is located by its own text, ``--set KEY=VALUE``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from io import StringIO
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML

from empg_lite.core.errors import MissingInput, RecipeError
from empg_lite.recipe.schema import Recipe, absolute_path, field_docs, sections, type_text
from empg_lite.recipe.strict_yaml import YamlFault, parse_yaml, read_text

#: What other libraries call some of these keys.
_PEER_NAMES = {
    "lr": "optim.learning_rate",
    "num_generations": "sampler.samples_per_problem",
    "max_completion_length": "sampler.max_new_tokens",
    "batch_size": "sampler.problems_per_step",
    "max_steps": "run.steps",
    "rank": "model.lora_r",
}


# --- lookup ---------------------------------------------------------------------------------------


def builtin_recipes() -> dict[str, Path]:
    """Name -> file of every built-in recipe: next to the package in a checkout, inside it in a wheel."""
    package = Path(__file__).resolve().parents[1]
    shipped = package / "recipes"
    folder = shipped if shipped.is_dir() else package.parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def recipe_summary(path: Path) -> str:
    """The first line of a recipe file if it is a comment, else empty."""
    first = path.read_text("utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def find_recipe(name_or_file: str) -> Path:
    """The file of a recipe, given its built-in name or a path.

    Raises:
        MissingInput: neither a built-in name nor a file.
    """
    known = builtin_recipes()
    if name_or_file in known:
        return known[name_or_file]
    path = Path(os.path.expanduser(name_or_file))
    if os.path.isfile(path):
        return path
    if path.suffix in (".yaml", ".yml") or os.sep in name_or_file:
        raise MissingInput("no such recipe file", name_or_file, "check the path, or see `empg-lite recipes`")
    close = get_close_matches(name_or_file, known, 1)
    hint = f"did you mean {close[0]}?" if close else f"built-in: {', '.join(known)}"
    raise MissingInput(f"no recipe named {name_or_file!r}", "recipe", hint)


# --- reading --------------------------------------------------------------------------------------


def load_recipe(name_or_file: str, overrides: Sequence[str] = (), seed: int | None = None) -> Recipe:
    """Read a recipe, apply overrides and validate the result.

    Relative paths become absolute: against the file's folder in the file, against the working directory in
    an override.

    Args:
        name_or_file: a built-in name or a YAML file.
        overrides: ``SECTION.KEY=VALUE`` strings; the last one for a key wins. VALUE is YAML, except that a
            text key takes an unquoted value literally.
        seed: overrides ``run.seed``.

    Raises:
        MissingInput: no such recipe.
        RecipeError: naming ``file:line: field`` or the override.
    """
    draft = _read_draft(find_recipe(name_or_file))
    for text in overrides:
        _override(draft, text)
    if seed is not None:
        draft.set("run.seed", seed, f"--seed {seed}")
    try:
        return Recipe.model_validate(draft.values)
    except ValidationError as error:
        raise _recipe_error(error, draft) from None


@dataclass
class _Draft:
    """Unvalidated values, and where each one was written."""

    file: str
    values: dict[str, dict[str, Any]]
    lines: Mapping[str, int]
    overrides: dict[str, str] = field(default_factory=dict)

    def set(self, key: str, value: Any, origin: str) -> None:
        section, _, name = key.partition(".")
        self.values.setdefault(section, {})[name] = value
        self.overrides[key] = origin

    def where(self, key: str) -> str:
        """The override, or ``file:line: field``; a missing key points to its section."""
        section = key.partition(".")[0]
        line = self.lines.get(key, self.lines.get(section, 1))
        return self.overrides.get(key, f"{self.file}:{line}: {_printable(key)}")


def _read_draft(path: Path) -> _Draft:
    try:
        values, lines = parse_yaml(read_text(path))
    except YamlFault as fault:
        where = f"{path}:{fault.line}" + (f": {_printable(fault.key)}" if fault.key else "")
        raise RecipeError(fault.what, where, fault.todo) from None
    except OSError as error:
        raise MissingInput(f"recipe cannot be read ({error.strerror})", str(path)) from error
    if not isinstance(values, dict):
        what = "the recipe is empty" if values is None else "a recipe consists of sections of keys"
        raise RecipeError(what, f"{path}:1", "start from `empg-lite recipes show custom-jsonl`")
    draft = _Draft(str(path), values, lines)
    for section in sections():
        given = values.get(section, {})
        if given is not None and not isinstance(given, dict):
            what = f"{section} is a section, got {_shown(given)}"
            raise RecipeError(what, draft.where(section), f"write {section}: and its keys below, indented")
        if section in values:  # None: every key of it is commented out
            folder = path.resolve().parent
            values[section] = {k: absolute_path(section, k, v, folder) for k, v in (given or {}).items()}
    return draft


def _override(draft: _Draft, text: str) -> None:
    key, equals, value = text.partition("=")
    section, dot, name = key.partition(".")
    origin = f"--set {_printable(text)}"
    if not equals:
        raise RecipeError("no = in the override", origin, "write --set SECTION.KEY=VALUE")
    if not dot or not name or "." in name or section not in sections():
        raise RecipeError(f"no key named {_printable(key)}", origin, _suggest(key.rpartition(".")[2]))
    # Literal text: YAML would read `regex:answer: (\d+)` as a mapping and an all-digit commit as a number.
    parsed: Any = value
    if not _takes_text(section, name) or value.strip() in ("", "~", "null") or value[:1] in ("'", '"'):
        try:
            parsed, _ = parse_yaml(value)
        except YamlFault as fault:
            raise RecipeError(fault.what, origin, fault.todo or "write a number or a word") from None
    draft.set(key, absolute_path(section, name, parsed, Path.cwd()), origin)


def _takes_text(section: str, name: str) -> bool:
    return name in sections()[section].model_fields and type_text(section, name).startswith("text")


# --- one line per error ---------------------------------------------------------------------------


def _recipe_error(error: ValidationError, draft: _Draft) -> RecipeError:
    """The first error pydantic found, in file order, with overrides last."""
    faults: dict[str, RecipeError] = {}
    for detail in error.errors(include_url=False):
        key = (detail.get("ctx") or {}).get("field") or ".".join(str(part) for part in detail["loc"][:2])
        faults.setdefault(key, _describe(key, detail, draft))
    first = min(faults, key=lambda k: (k in draft.overrides, draft.lines.get(k, 0)))
    fault = faults[first]
    if len(faults) > 1:
        fault = RecipeError(f"{fault.what} (and {len(faults) - 1} more)", fault.where, fault.todo)
    return fault


def _describe(key: str, detail: Mapping[str, Any], draft: _Draft) -> RecipeError:
    section, _, name = key.partition(".")
    where, ctx = draft.where(key), detail.get("ctx") or {}
    if detail["type"] == "refused":
        return RecipeError(_printable(ctx["what"]), where, ctx["todo"])
    if detail["type"] == "extra_forbidden":
        flat = name and len(detail["loc"]) == 1
        what = f"no {'key' if name and not flat else 'section'} named {_printable(key)}"
        todo = _printable(f"nest it: {section}: {{{name}: ...}}") if flat else _suggest(name or key)
        return RecipeError(what, where, todo)
    docs = next((doc for doc in field_docs() if doc.key == key), None)
    if detail["type"] == "missing" or docs is None:
        return RecipeError(f"{key} is missing", where, f"add it: {docs.description if docs else 'a section'}")
    value = detail["input"]
    todo = docs.description if docs.default == "required" else f"the default is {docs.default}"
    expected = type_text(section, name)
    if isinstance(value, str):
        words = get_close_matches(value, re.findall(r"\w+", expected), 1)
        todo = f"did you mean {words[0]}?" if words else todo
        todo = "write the number without quotes" if "number" in expected and _is_number(value) else todo
    return RecipeError(f"expected {expected}, got {_shown(value)}", where, todo)


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", text) is not None


def _suggest(name: str) -> str:
    """A hint with the dotted key that was probably meant."""
    keys = {doc.key.partition(".")[2]: doc.key for doc in field_docs()} | _PEER_NAMES
    keys |= {section: section for section in sections()}
    close = get_close_matches(name.lower(), keys, 1)
    return f"did you mean {keys[close[0]]}?" if close else "see `empg-lite recipes show` for all keys"


def _shown(value: Any) -> str:
    """A short printable form of a value."""
    if isinstance(value, dict | list):
        return "a list" if isinstance(value, list) else "a mapping"
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _printable(text: str, limit: int = 200) -> str:
    """Text fit for one line: no control characters, at most ``limit`` characters."""
    clean = "".join(c if c.isprintable() else "?" for c in text)
    return clean if len(clean) <= limit else f"{clean[: limit - 3]}..."


# --- writing --------------------------------------------------------------------------------------


def dump_recipe(recipe: Recipe, header: str = "") -> str:
    """A recipe as YAML with every value written out, below ``header`` as comment lines.

    ``load_recipe`` reads the same recipe back.
    """
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.width = 10_000
    out = StringIO()
    yaml.dump(recipe.model_dump(), out)
    comments = [f"# {_printable(line, 10_000)}".rstrip() for line in header.splitlines()]
    return "\n".join([*comments, out.getvalue()])
