"""Text from strangers does no harm to look at."""

from hypothesis import given
from hypothesis import strategies as st

from fedmpt_core.common.text import shown

HOSTILE = "\x1b[31mred\x1b[0m \u202egnp.exe\u200d\r\n" + "z" + "\u0301" * 40


@given(st.text(max_size=400), st.integers(1, 80))
def test_shown_text_is_printable_and_short(text: str, most: int) -> None:
    harmless = shown(text, most)
    assert len(harmless) <= most
    assert all(c.isprintable() for c in harmless)
    if text.isprintable() and text.isascii() and len(text) <= most:
        assert harmless == text


def test_what_drives_a_terminal_is_replaced_and_towers_of_accents_end() -> None:
    assert shown(HOSTILE) == "\ufffd[31mred\ufffd[0m \ufffdgnp.exe\ufffd  z" + "\u0301" * 3


def test_what_is_cut_ends_in_an_ellipsis() -> None:
    assert shown("a" * 10, 10) == "a" * 10
    assert shown("a" * 11, 10) == "a" * 9 + "…"
    assert shown("\u0301" * 1000, 80).endswith("…")


def test_what_is_no_text_is_written_as_it() -> None:
    assert shown(None) == "None" and shown(3) == "3"
