"""When a completion ends, and which part of it is text."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any


class StopRule:
    """Stop tokens by id, stop strings by text.

    A stop string may straddle tokens, so the tail of the completion is decoded after each token: as many
    tokens as the string has bytes. Tokens that do not contain a string's last character cannot complete it,
    which avoids almost all of the decoding.
    """

    def __init__(self, tokenizer: Any, stop_ids: Collection[int], stop_strings: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stop_ids = frozenset(stop_ids)
        self._strings = tuple(stop_strings)
        self._window = max((len(s.encode()) for s in self._strings), default=0) + 1
        self._last_chars = frozenset(s[-1] for s in self._strings)
        self._can_complete: dict[int, bool] = {}

    def stopped(self, ids: Sequence[int]) -> bool:
        """Whether the last token of ``ids`` ends the completion; called after each token."""
        last = ids[-1]
        if last in self._stop_ids:
            return True
        if not self._strings or not self._completes(last):
            return False
        tail = self._decode(ids[-self._window :])
        return any(s in tail for s in self._strings)

    def text(self, ids: Sequence[int]) -> str:
        """The completion as text, ending before its stop token or string."""
        if ids and ids[-1] in self._stop_ids:
            ids = ids[:-1]
        text = self._decode(ids)
        cut = min((at for at in (text.find(s) for s in self._strings) if at >= 0), default=len(text))
        return text[:cut]

    def _completes(self, token: int) -> bool:
        if token not in self._can_complete:
            piece = self._decode([token])
            # A token inside a multi-byte character decodes to U+FFFD on its own: decode its context.
            self._can_complete[token] = "\ufffd" in piece or not self._last_chars.isdisjoint(piece)
        return self._can_complete[token]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)


class TextStream:
    """The text of a growing completion; text once returned is never retracted.

    Incomplete characters and possible beginnings of a stop string are held back. The text returned is a
    prefix of the final ``StopRule.text``: this holds for byte-level tokenizers, where the text of two pieces
    that meet between characters is the concatenation of their texts.
    """

    def __init__(self, tokenizer: Any, stop_strings: Sequence[str]) -> None:
        self._tokenizer, self._strings = tokenizer, tuple(stop_strings)
        self._text = ""  # of the tokens before _at
        self._at = 0

    def grow(self, ids: Sequence[int]) -> str:
        """The text that is certain so far.

        Args:
            ids: the completion's tokens so far, an extension of the last call's; none of them ends it.
        """
        piece = self._tokenizer.decode(list(ids[self._at :]), skip_special_tokens=False)
        if not piece.endswith("\ufffd"):
            self._text, self._at, piece = self._text + piece, max(self._at, len(ids)), ""
        known = self._text + piece.rstrip("\ufffd")
        return known[: len(known) - self._held(known)]

    def _held(self, text: str) -> int:
        """Number of trailing characters that may begin a stop string."""
        longest = max(map(len, self._strings), default=1) - 1
        for n in range(min(longest, len(text)), 0, -1):
            if any(s.startswith(text[-n:]) for s in self._strings):
                return n
        return 0
