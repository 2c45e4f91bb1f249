"""Making model output safe to display.

A model can emit anything: escape sequences that repaint or retitle a terminal, overrides that reorder the
displayed text, unpaired surrogates that cannot be encoded. ``safe`` replaces each with a visible escape and
leaves ordinary text in any language unchanged.

``safe`` does not escape rich markup: pass the result to ``rich.text.Text``, or print with
``markup=False, emoji=False``.
"""

from __future__ import annotations

import re

#: Characters that must not reach a terminal.
_UNSAFE = re.compile(
    "["
    "\x00-\x08\x0b-\x1f\x7f"  # C0 controls except newline and tab; ESC starts CSI and OSC sequences
    "\x80-\x9f"  # C1 controls: the one-byte CSI and OSC
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # bidirectional marks, overrides and isolates
    "\u00ad\u180e\u200b-\u200d\u2060-\u2065\ufeff"  # zero width: invisible in an answer
    "\u2028\u2029"  # line and paragraph separators
    "\ufff9-\ufffb"  # interlinear annotation
    "\ud800-\udfff"  # unpaired surrogates: cannot be encoded
    "\U000e0000-\U000e007f"  # invisible tag characters
    "]"
)


def _escape(match: re.Match[str]) -> str:
    code = ord(match.group())
    if code <= 0xFF:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


_PASSWORD = re.compile(r"(:/{1,2})[^/@\s]+@")  # a Path keeps one slash of the two


def without_passwords(text: str) -> str:
    """Mask the credentials (before the @) in URLs.

    >>> without_passwords("https://me:secret@host/x")
    'https://***@host/x'
    """
    return _PASSWORD.sub(r"\1***@", text)


def encodable(text: str) -> bool:
    """Whether ``text`` contains no unpaired surrogate, which no encoding or tokenizer accepts."""
    return not any("\ud800" <= char <= "\udfff" for char in text)


def safe(text: str) -> str:
    r"""Show control characters, bidirectional overrides and unpaired surrogates as visible escapes.

    The result can be encoded, contains no control characters except newline and tab, and is a fixed point.

    >>> safe("a\x1b[31mb")
    'a\\x1b[31mb'
    """
    return _UNSAFE.sub(_escape, text)
