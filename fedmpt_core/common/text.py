"""Text from strangers, made harmless to look at, on a terminal as on a page: whoever takes part in a run writes names.

Marking up is escaped where it is known what marks up. This is about what escaping leaves: control characters, marks
that turn the reading direction, invisible characters, towers of accents, and names without an end.
"""

import re
import unicodedata
from typing import Any

MOST_TEXT = 600  # characters that are shown; chosen
MOST_DRAWN = 60  # characters in a drawing; chosen
# what Unicode shows as nothing beside control and format characters (Default_Ignorable_Code_Point, Unicode 15)
_BLANK = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0000-\U000e0fff]")


def likeness(name: str) -> str:
    """The form in which names are compared that people write and take for one.

    Example: "Ärztin 7", in capitals, with a combining accent, a no-break space or a zero-width mark, is one name.

    Returns:
        NFC and case-folded (Unicode 15, chapter 3.13), without control, format and other invisible characters; blanks
        are single, and none is at the ends. Possibly empty.
    """
    seen = "".join(c for c in _BLANK.sub("", name) if c.isspace() or unicodedata.category(c) not in ("Cc", "Cf", "Cs"))
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFD", seen).casefold())
    return " ".join(folded.split())


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
