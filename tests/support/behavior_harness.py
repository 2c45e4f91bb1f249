"""Precision and recall of a detector on labeled sentences; ``benchmarks/behaviors.py`` prints them."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from empg_lite.core.behaviors import BEHAVIORS, sentences

SENTENCES = Path(__file__).with_name("behavior_sentences.toml")
REFERENCES = Path(__file__).with_name("behavior_references.jsonl")
Detector = Callable[[str], frozenset[str]]
Labeled = tuple[str, frozenset[str]]


@dataclass(frozen=True)
class Score:
    """Sentences of one behavior: found correctly, found wrongly, missed."""

    right: int
    wrong: int
    missed: int

    @property
    def precision(self) -> float:
        return self.right / max(1, self.right + self.wrong)

    @property
    def recall(self) -> float:
        return self.right / max(1, self.right + self.missed)


def own_sentences(part: str) -> list[Labeled]:
    """``dev``, ``test`` or ``fresh`` of ``behavior_sentences.toml``."""
    blocks: dict[str, str] = tomllib.loads(SENTENCES.read_text("utf-8"))[part]
    return [
        (line, frozenset(labels.split()))
        for labels, text in blocks.items()
        for line in text.strip().split("\n")
    ]


def real_sentences(part: str, data: Path) -> list[Labeled]:
    """The sentences that the references name, looked up in the folder of real data.

    Raises:
        AssertionError: the data or the sentence splitter changed: a hash does not fit.
    """
    files: dict[str, list[dict]] = {}
    found = []
    for line in REFERENCES.read_text("utf-8").splitlines():
        row = json.loads(line)
        if row["part"] != part:
            continue
        if row["file"] not in files:
            files[row["file"]] = [json.loads(text) for text in open(data / row["file"], encoding="utf-8")]
        value = files[row["file"]][row["row"]][row["field"]]
        text = sentences(value if isinstance(value, str) else value["solution"])[row["sentence"]]
        assert hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12] == row["sha256"], row
        found.append((text, frozenset(row["labels"])))
    return found


def score(detector: Detector, labeled: Iterable[Labeled]) -> dict[str, Score]:
    """The score of each behavior."""
    judged = [(detector(text), labels) for text, labels in labeled]
    return {
        name: Score(
            right=sum(name in found and name in labels for found, labels in judged),
            wrong=sum(name in found and name not in labels for found, labels in judged),
            missed=sum(name not in found and name in labels for found, labels in judged),
        )
        for name in BEHAVIORS
    }


_KEYWORDS = {
    "decomposition": r"\b(?:first|step|part|case|then|next)",
    "verification": r"check|verif|satisf|works|substitut|indeed",
    "backtracking": r"\bwait|wrong|mistake|actually|instead|back\b|try|error",
    "backward_chaining": r"\bneed|must|in order|\bto find|goal|want",
}


def keywords(sentence: str) -> frozenset[str]:
    """Negative control: the obvious words, wherever they occur."""
    return frozenset(name for name, words in _KEYWORDS.items() if re.search(words, sentence, re.IGNORECASE))


def always(sentence: str) -> frozenset[str]:
    """Negative control: every behavior in every sentence."""
    return frozenset(BEHAVIORS)
