"""Prompt templates: how a question becomes a prompt, and which strings end an answer.

Stop strings belong to the template: a base model continues by inventing the next question, and only the
prompt's author knows what that looks like. A custom template is a YAML file::

    text: |-
      Problem: {question}
      Solution:
    stop: ["\\nProblem:"]
    end: "<|endoftext|>"

or a plain ``.txt`` whose content is ``text``.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TypeAlias

from empg_lite.core.errors import MissingInput, RecipeError

#: Examples in a prompt: questions and their answers.
Shots: TypeAlias = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Markers:
    """How chat models of one kind are told who speaks.

    Attributes:
        begin: what precedes the first turn.
        start: the token that begins a turn.
        head: what follows it, with ``{role}`` in it.
        end: the token that ends a turn.
        gap: what stands between turns.
    """

    begin: str
    start: str
    head: str
    end: str
    gap: str

    def chat(self, system: str, shots: Shots = ()) -> str:
        """A system message, answered examples, the user's ``{question}``, and the assistant's turn begun."""

        def turn(role: str) -> str:
            return self.start + self.head.replace("{role}", role)

        after = self.end + self.gap
        said = [self.begin, turn("system"), system, after]
        for question, answer in shots:
            said += [turn("user"), question, after, turn("assistant"), answer, after]
        return "".join((*said, turn("user"), "{question}", after, turn("assistant")))


CHATML = Markers("", "<|im_start|>", "{role}\n", "<|im_end|>", "\n")  # Qwen, SmolLM2
LLAMA3 = Markers("<|begin_of_text|>", "<|start_header_id|>", "{role}<|end_header_id|>\n\n", "<|eot_id|>", "")
MARKERS = (CHATML, LLAMA3)

#: Small models follow examples better than instructions.
_TWO_SHOTS = (
    ("Kim has 7 pens and 8 books. How many things does she have?", "7 + 8 = 15\n#### 15"),
    (
        "Joe has 20 plums. He eats 4 and shares the rest among 2 friends. How many does each friend get?",
        "20 - 4 = 16\n16 / 2 = 8\n#### 8",
    ),
)
_BOXED = "Please reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True, slots=True)
class Template:
    """A prompt with a placeholder for the question.

    Attributes:
        text: contains ``{question}`` once.
        stop: strings that end a completion, and are not part of its text.
        end: token appended to completions that come as text (``fit`` on written solutions).
        system, shots: the system message and the examples of a built-in chat; see ``in_markers``.
    """

    name: str
    text: str
    stop: tuple[str, ...] = ()
    end: str = "<|endoftext|>"
    system: str | None = None
    shots: Shots = ()

    def in_markers(self, markers: Markers) -> Template:
        """A built-in chat in these markers; any other prompt as it is."""
        return self if self.system is None else _chat(self.name, self.system, markers, self.shots)

    def render(self, question: str) -> str:
        """The prompt as the model sees it."""
        return self.text.replace("{question}", question)

    @property
    def sha256(self) -> str:
        """Identity of text, stops and end token."""
        return hashlib.sha256("\0".join((self.text, *self.stop, self.end)).encode()).hexdigest()


def _chat(name: str, system: str, markers: Markers = CHATML, shots: Shots = ()) -> Template:
    text = markers.chat(system, shots)
    return Template(name, text, stop=(markers.start,), end=markers.end, system=system, shots=shots)


TEMPLATES = {
    t.name: t
    for t in (
        _chat("qwen-boxed", _BOXED),
        _chat("two-shot", "Solve the problem step by step. End with #### and the number.", shots=_TWO_SHOTS),
        Template(
            "gsm8k",
            "Solve the problem step by step. On the last line write #### and then the final number.\n\n"
            "Question: {question}\nAnswer:",
            stop=("\nQuestion:", "\n\nSolve the problem"),
        ),
        Template("plain", "Question: {question}\nAnswer:", stop=("\nQuestion:",)),
    )
}


def load_template(name_or_file: str) -> Template:
    """A built-in template by name, or a custom one from a file.

    Raises:
        MissingInput: neither a built-in name nor a file.
        RecipeError: not a valid template file.
    """
    if name_or_file in TEMPLATES:
        return TEMPLATES[name_or_file]
    path = Path(name_or_file)
    try:
        found = path.is_file()
    except OSError:  # for example, a name too long for a file
        found = False
    if not found:
        close = get_close_matches(name_or_file, TEMPLATES, 1)
        hint = f"did you mean {close[0]}?" if close else f"built-in: {', '.join(TEMPLATES)}"
        raise MissingInput(f"no prompt template {name_or_file!r}", "data.prompt", hint)
    return (
        _from_yaml(path)
        if path.suffix in (".yaml", ".yml")
        else _checked(Template(path.stem, _text(path)), path)
    )


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        raise RecipeError(f"template cannot be read ({error})", str(path)) from error


def _from_yaml(path: Path) -> Template:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        fields = YAML(typ="safe", pure=True).load(_text(path))
    except YAMLError as error:
        raise RecipeError("template is not YAML", f"{path}: {' '.join(str(error).split())}") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("text"), str):
        raise RecipeError("a template needs a `text` that contains {question}", str(path))
    unknown = fields.keys() - {"text", "stop", "end"}
    if unknown:
        raise RecipeError("unknown key", f"{path}: {sorted(map(str, unknown))[0]}", "known: text, stop, end")
    stop = fields.get("stop", [])
    if not isinstance(stop, list) or not all(isinstance(s, str) and s for s in stop):
        raise RecipeError("`stop` must be a list of non-empty strings", f"{path}: stop")
    end = fields.get("end", "<|endoftext|>")
    if not isinstance(end, str):
        raise RecipeError("`end` must be the text of one token", f"{path}: end")
    return _checked(Template(path.stem, fields["text"], tuple(stop), end), path)


def _checked(template: Template, path: Path) -> Template:
    if template.text.count("{question}") != 1:
        raise RecipeError("the template must contain {question} exactly once", str(path))
    return template
