"""Text from strangers does no harm to look at."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmpt_core.common.text import likeness, shown

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


@pytest.mark.parametrize(
    "written",
    [
        "MÜLLER 7",
        "Mu\u0308ller 7",
        " müller\u00a07\u200b",
        "mül\u00adler\t7",
        "\ufeffmüller 7",
        "mu\u0308l\u2060ler  7",
        "müller\ufe0f 7",
        "m\u034f\u00fcller\u3164 7\u0007",
        "\u202am\u00fcller 7\u202c",
        "müller-7",
        "MÜLLER_7",
        "müller \u2013 7",
        "müller\u20117",
        "\uff4d\u00fcller \u2466",
    ],
)
def test_names_that_people_take_for_one_have_one_likeness(written: str) -> None:
    assert likeness(written) == likeness("müller 7") == "müller 7"


def test_other_names_and_no_name_stay_what_they_are() -> None:
    assert len({likeness(name) for name in ("p1", "p 1", "p2", "p.1", "ß", "s")}) == 6
    assert likeness("STRASSE") == likeness("straße")
    assert likeness("\u200b\u2800 \u00ad") == ""


@given(st.text(max_size=40))
def test_a_likeness_is_its_own(name: str) -> None:
    assert likeness(likeness(name)) == likeness(name)
