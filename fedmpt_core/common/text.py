"""Text from strangers, made harmless to look at, on a terminal as on a page: whoever takes part in a run writes names.

Marking up is escaped where it is known what marks up. This is about what escaping leaves: control characters, marks
that turn the reading direction, invisible characters, towers of accents, and names without an end.
"""

import unicodedata
from typing import Any

MOST_TEXT = 600  # characters that are shown; chosen


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
