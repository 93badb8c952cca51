"""Text from strangers, made harmless to look at, on a terminal as on a page: whoever takes part in a run writes names.

Marking up is escaped where it is known what marks up. This is about what escaping leaves: control characters, marks
that turn the reading direction, invisible characters, towers of accents, and names without an end.
"""

import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

MOST_TEXT = 600  # characters that are shown; chosen
MOST_DRAWN = 60  # characters in a drawing; chosen
# what Unicode shows as nothing beside control and format characters (Default_Ignorable_Code_Point, Unicode 15)
_BLANK = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0000-\U000e0fff]")


@lru_cache(8192)
def likeness(name: str) -> str:
    """The form in which names are compared that people write and take for one: of labels, conditions, groups and sites.

    Example: "Ärztin 7", in capitals, with a combining accent, a no-break space, a hyphen or a zero-width mark, is one
    name.

    Returns:
        NFKC and case-folded (Unicode 15, chapter 3.13), without control, format and other invisible characters; blanks,
        underscores, hyphens and dashes are one blank, and none is at the ends. Possibly empty.
    """
    folded = _folded("".join(map(_apart, _folded(name))))
    return " ".join("".join(map(_apart, folded)).split())


def _folded(name: str) -> str:
    form = unicodedata.normalize
    return form("NFKC", form("NFKC", form("NFD", name).casefold()).casefold())


def _apart(character: str) -> str:
    """What of a character tells names apart."""
    kind = unicodedata.category(character)
    if character.isspace() or kind in ("Pd", "Pc"):
        return " "
    return "" if kind in ("Cc", "Cf", "Cs") or _BLANK.match(character) else character


def alike(names: Iterable[str]) -> str:
    """The first names that are one by their likeness, as part of a sentence behind "lists"; empty where all differ."""
    first: dict[str, str] = {}
    for name in names:
        likely = likeness(name)
        if likely in first:
            other, same_letters = first[likely], _composed(first[likely]) == _composed(name)
            if other == name:
                return f"{name!r} more than once"
            pair = " and ".join(map(ascii if same_letters else repr, (other, name)))
            return f"{pair}, which are one name but for capitals, blanks, hyphens or how letters are stored"
        first[likely] = name
    return ""


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def shown(text: Any, most: int = MOST_TEXT) -> str:
    """Text as it may be shown.

    Args:
        text: anything; what is no string is written as one.
        most: characters to keep; the last becomes an ellipsis where some are cut.

    Guarantees: no control, format, surrogate, private or unassigned character (each becomes U+FFFD), no line break, no
        more than three combining marks in a row, at most `most` characters.
    """
    kept: list[str] = []
    marks = 0
    for c in str(text)[: 4 * most]:
        marks = marks + 1 if unicodedata.combining(c) else 0
        if marks <= 3:
            kept.append(c if c.isprintable() else " " if c.isspace() else "\ufffd")
    cut = "".join(kept)
    return cut if len(cut) <= most and len(str(text)) <= 4 * most else cut[: most - 1] + "…"


def drawn(text: Any) -> str:
    """The same for matplotlib, which sets what is between dollar signs as mathematics and keeps labels with a leading
    underscore out of a legend.
    """
    plain = shown(text, MOST_DRAWN).replace("$", r"\$")
    return f" {plain}" if plain.startswith("_") else plain
