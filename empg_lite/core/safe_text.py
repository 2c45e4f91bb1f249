"""Making text that a model wrote safe to show.

A model can emit anything: escape sequences that repaint or retitle a terminal, overrides that show text
in another order than it is stored, halves of surrogate pairs that cannot be encoded. ``safe`` replaces
each by a visible escape and leaves ordinary text, of any language, alone.

``safe`` does not touch rich's markup, which is harmless where it is not parsed: hand the result to
``rich.text.Text``, or print with ``markup=False, emoji=False``.
"""

from __future__ import annotations

import re

#: What must not reach a terminal as it is.
_UNSAFE = re.compile(
    "["
    "\x00-\x08\x0b-\x1f\x7f"  # C0 controls but newline and tab; ESC begins CSI and OSC sequences
    "\x80-\x9f"  # C1 controls: the one-byte CSI and OSC
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # bidirectional marks, overrides and isolates
    "\u00ad\u180e\u200b-\u200d\u2060-\u2065\ufeff"  # of no width: they hide in an answer
    "\u2028\u2029"  # line and paragraph separators
    "\ufff9-\ufffb"  # interlinear annotation
    "\ud800-\udfff"  # lone surrogates: no encoding has them
    "\U000e0000-\U000e007f"  # invisible tag characters
    "]"
)


def _escape(match: re.Match[str]) -> str:
    code = ord(match.group())
    if code <= 0xFF:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


_PASSWORD = re.compile(r"(:/{1,2})[^/@\s]+@")  # one slash is left of two where it was taken for a path


def without_passwords(text: str) -> str:
    """``text`` with what stands before the @ of an address taken out.

    >>> without_passwords("https://me:secret@host/x")
    'https://***@host/x'
    """
    return _PASSWORD.sub(r"\1***@", text)


def encodable(text: str) -> bool:
    """False where ``text`` holds half of a surrogate pair: no encoding has it, and no tokenizer."""
    return not any("\ud800" <= char <= "\udfff" for char in text)


def safe(text: str) -> str:
    r"""``text`` with control sequences, bidirectional overrides and lone surrogates as visible escapes.

    The result can be encoded, holds no control character but newline and tab, and is a fixed point.

    >>> safe("a\x1b[31mb")
    'a\\x1b[31mb'
    """
    return _UNSAFE.sub(_escape, text)
