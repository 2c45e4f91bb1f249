"""What a model writes must not steer a terminal."""

from __future__ import annotations

import io
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.text import Text

from empg_lite.core.safe_text import safe

ANY = st.text(alphabet=st.characters(exclude_categories=()))  # lone surrogates included


@given(ANY)
def test_nothing_dangerous_is_left(text: str) -> None:
    shown = safe(text)
    shown.encode("utf-8")
    for char in shown:
        category = unicodedata.category(char)
        assert char in "\n\t" or category not in {"Cc", "Cs", "Zl", "Zp"}
        assert unicodedata.bidirectional(char) not in {
            "LRE",
            "RLE",
            "LRO",
            "RLO",
            "PDF",
            "LRI",
            "RLI",
            "FSI",
            "PDI",
        }


@given(ANY)
def test_idempotent(text: str) -> None:
    assert safe(safe(text)) == safe(text)


@given(st.text(alphabet=st.characters(categories=["L", "M", "N", "P", "S", "Zs"])))
def test_ordinary_text_is_left_alone(text: str) -> None:
    assert safe(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("\x9b2J", r"\x9b2J"),
        ("a\rb\x08\x00", r"a\x0db\x08\x00"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("\ud83d", r"\ud83d"),
        ("a\tb\nc", "a\tb\nc"),
        ("1 < 2 [bold] 😀 é שלום", "1 < 2 [bold] 😀 é שלום"),
    ],
)
def test_escapes_are_visible(text: str, shown: str) -> None:
    assert safe(text) == shown


@given(ANY)
def test_rich_text_shows_it_without_controls(text: str) -> None:
    out = io.StringIO()
    Console(file=out, width=10_000, force_terminal=False).print(Text(safe(text)), soft_wrap=True)
    assert "\x1b" not in out.getvalue()
