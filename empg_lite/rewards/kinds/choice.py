r"""``choice``: the gold letter of a multiple-choice question.

A letter is read from "B", "(B)", "B) 42", "Option B", ``\text{(B)}``; an answer without a letter counts as
the letter of the only option in the question whose text it equals. Two letters are no answer.
"""

from __future__ import annotations

import re

from empg_lite.rewards.kind import Case, Kind, Outcome
from empg_lite.rewards.math import Answer, Pair, announced, extract, quoted, visible

#: Rules by which the text itself announces its answer; the others guess at the last value.
_POINTED = frozenset({"boxed", "boxed_unclosed", "hash", "answer_is", "final_answer_is"})
_MAX = 2_000

_LABEL = re.compile(r"(?<!\w)(?:\(([A-J])\)|([A-J])[.):](?=\s))\s*")
_WRAPPER = re.compile(r"\\(?:text|textbf|textit|mathbf|mathrm|textrm|mathsf|operatorname)\s*\{([^{}]*)\}")
_CALLED = r"(?:(?:the\s+)?(?:correct\s+)?(?:option|choice|letter|answer)\s*:?\s*)?"
_LETTER = r"[(\[]?([A-Ja-j])[)\]]?"
_ALONE = re.compile(rf"{_CALLED}{_LETTER}[.:!]*", re.IGNORECASE)
_LABELED = re.compile(
    rf"{_CALLED}(?:[(\[]([A-J])[)\]]|([A-J])(?:\s*[).:]|\s[-–—]\s))[.:]?\s*(.*)", re.IGNORECASE | re.DOTALL
)
_SEVERAL = re.compile(
    rf"{_CALLED}{_LETTER}(?:\s*(?:,|;|/|&|\band\b|\bor\b|\s)\s*{_CALLED}{_LETTER})+[.:]?", re.IGNORECASE
)
#: "the correct option is" announces as "the answer is" does.
_OPTION_IS = re.compile(
    r"\b(?:option|choice|letter)(?: (?:that|which) [^.,:\n]{1,40}?)?(?=\s*(?:is\b|:))", re.IGNORECASE
)
_IS_CORRECT = re.compile(
    r"(?<![\w.])\(?([A-J])\)? (?:is|must be) (?:the )?(?:(?:only )?(?:correct|right|best)|answer)(?: one)?\b"
)
_DENIED = re.compile(
    r"\b(?:not|cannot|incorrect|wrong|false|eliminated?|excluded?|ruled? out)\b|n['’]t\b", re.IGNORECASE
)
_MENTION = re.compile(
    r"(?<!\w)\(([A-J])\)|\b(?:option|choice)\s+\(?([A-J])\b"
    r"|\b(?:choose|pick|select|go with|must be|it is|it['’]s|therefore|thus|hence|so)[,:]?\s+"
    r"\(?(?-i:([A-J]))\b(?!['’\w]| (?!because|since)\w)"
    r"|(?<!不)选[项择]?\s*[:：]?\s*([A-J])(?![A-Za-z])",
    re.IGNORECASE,
)


def options_of(question: str) -> dict[str, str]:
    """Letter -> text of the options that a question lists, in order from A; empty where it lists none.

    >>> options_of("Which is prime? (A) 4 (B) 7")
    {'A': '4', 'B': '7'}
    """
    found: list[re.Match[str]] = []
    for label in _LABEL.finditer(question):
        letter = label[1] or label[2]
        if letter == "A":
            found = [label]  # the list starts over: the earlier A was a word of the question
        elif found and letter == chr(ord("A") + len(found)):
            found.append(label)
    if len(found) < 2:
        return {}
    ends = [label.start() for label in found[1:]] + [len(question)]
    texts = [question[label.end() : end].strip().rstrip(",;") for label, end in zip(found, ends, strict=True)]
    texts[-1] = texts[-1].partition("\n")[0].strip()
    return {label[1] or label[2]: text for label, text in zip(found, texts, strict=True)}


def read_letter(text: str, options: dict[str, str]) -> str | None:
    """The one letter that an answer's text means, or None.

    >>> read_letter("(B)", {}), read_letter("B or C", {}), read_letter("7", {"A": "4", "B": "7"})
    ('B', None, 'B')
    """
    text = _unwrapped(text)
    alone = _ALONE.fullmatch(text)
    if alone:
        return alone[1].upper()
    if _SEVERAL.fullmatch(text):
        letters = {letter.upper() for letter in re.findall(r"(?<![A-Za-z])[A-Ja-j](?![A-Za-z])", text)}
        return letters.pop() if len(letters) == 1 else None
    labeled = _LABELED.fullmatch(text)
    if labeled:
        letter, rest = (labeled[1] or labeled[2]).upper(), labeled[3].strip()
        others = {(m[1] or m[2]).upper() for m in _LABEL.finditer(rest + " ")} - {letter}
        alone = _ALONE.fullmatch(re.sub(r"^(?:or|and|,|/|&)\s*", "", rest, flags=re.IGNORECASE))
        if rest == options.get(letter) or not (others or (alone and alone[1].upper() != letter)):
            return letter
        return None
    return _by_text(text, options)


def read_choice(prediction: str, options: dict[str, str]) -> Answer | None:
    """The letter that a prediction settles on, and the rule that found it."""
    prediction = _OPTION_IS.sub("answer", prediction)
    answer = extract(prediction)
    if answer is not None and answer.rule in _POINTED:
        after = prediction if answer.rule.endswith("answer_is") else prediction[prediction.rfind("boxed") :]
        phrase = announced(after)
        letter = read_letter(answer.text, options) or (phrase and read_letter(phrase, options))
        return Answer(letter, answer.rule) if letter else None
    if answer is None and ("boxed" in prediction or "fbox" in prediction):
        return None  # the box does not commit to one answer
    whole = visible(prediction).strip()
    letter = read_letter(whole, options) if 0 < len(whole) <= _MAX else None
    if letter is not None:
        return Answer(letter, "whole")
    # Not announced: what the last sentence mentions, before any number in it.
    sentences = [part for part in re.split(r"\n|(?<=[.!?])\s+", whole[-_MAX:]) if part.strip()]
    last = sentences[-1] if sentences else ""
    correct = {match[1] for match in _IS_CORRECT.finditer(last)}
    mentioned = correct or {next(filter(None, m.groups())).upper() for m in _MENTION.finditer(last)}
    if mentioned:
        if not correct and _DENIED.search(last):
            return None
        return Answer(mentioned.pop(), "last_letter") if len(mentioned) == 1 else None
    letter = _by_text(_unwrapped(answer.text), options) if answer else None
    return Answer(letter, answer.rule) if letter and answer else None


def _unwrapped(text: str) -> str:
    previous = None
    while previous != text:
        previous = text
        text = (
            _WRAPPER.sub(r"\1", text)
            .strip()
            .strip("*_`$\"“”' ✅✓✔☑\ufe0f")
            .removeprefix(r"\(")
            .removesuffix(r"\)")
            .strip()
        )
    return text


def _by_text(text: str, options: dict[str, str]) -> str | None:
    """The option that the text equals, where exactly one does."""
    if not text or len(text) > _MAX:
        return None
    same = [
        letter
        for letter, option in options.items()
        if option and len(option) <= _MAX and Pair.of(_unwrapped(option), text).equal()
    ]
    return same[0] if len(same) == 1 else None


class Choice(Kind):
    """Compares letters."""

    name = "choice"
    written = r"\boxed{{{}}}"
    known_answers = (
        ("B", "The answer is (B).", "equal"),
        ("(B)", r"\boxed{B}", "equal"),
        ("B", r"\boxed{C}", "different"),
        ("B", r"\boxed{B \text{ or } C}", "no_answer"),
    )

    def grade(self, case: Case, argument: str) -> Outcome:
        options = options_of(case.question or "")
        gold = read_letter(case.gold, options)
        if gold is None:
            error = f"the gold answer {case.gold!r} is neither a letter A-J nor an option"
            return Outcome("crash", error=error)
        answer = read_choice(case.prediction, options)
        if answer is None:
            return Outcome("no_answer")
        return Outcome("equal" if answer.text == gold else "different", answer)

    def explain(self, case: Case, argument: str) -> list[str]:
        options = options_of(case.question or "")
        steps = [f"the question lists the options {', '.join(options)}"] if options else []
        answer = read_choice(case.prediction, options)
        if answer is None:
            return [
                *steps,
                "no answer: the text settles neither on one letter nor on the text of one option",
            ]
        return [
            *steps,
            f"read the letter {answer.text} (rule {answer.rule})",
            f"the gold answer is {quoted(case.gold)}",
        ]

    def unreadable_gold(self, gold: str, question: str) -> str | None:
        outcome = self.grade(Case(gold, gold, question), "")
        if outcome.reason == "no_answer":
            return f"the choice reward reads no answer in {gold[:80]!r}"
        return outcome.error


KIND = Choice()
