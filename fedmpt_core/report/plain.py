"""Names, figures and times of a run as people read them.

Text is made harmless by `common.text.shown`; HTML is escaped by jinja2, Markdown by `markdown`.
"""

import re
from datetime import UTC, datetime
from math import ceil, floor, isfinite, log10
from typing import Any

from fedmpt_core.common.text import shown

MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
MOST_NAME = 80  # characters that are shown; chosen
MOST_NAMES = 8  # in a sentence
_MARKS = re.compile(r"[\\`*_\[\]<>#|~&$@]|:(?=//)|(?<=www)\.")  # what marks up, and what becomes a link by itself


def name(text: Any) -> str:
    """The name of a site, a label, a file: as `shown`, cut to 80 characters."""
    return shown(text, MOST_NAME)


def names(texts: Any) -> str:
    """Some names for a sentence: a, b and c."""
    listed = [name(n) for n in texts]
    if len(listed) > MOST_NAMES:
        listed = [*listed[:MOST_NAMES], f"{len(listed) - MOST_NAMES} more"]
    return " and ".join(filter(None, [", ".join(listed[:-1]), listed[-1]])) if listed else "none"


def markdown(text: Any) -> str:
    """The same for Markdown: every character that could mark something up is escaped."""
    return _MARKS.sub(lambda m: "\\" + m[0], shown(text))


def count(number: int, thing: str) -> str:
    """`1 site`, `2 sites`."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def up(value: float, digits: int = 2) -> str:
    """A bound, rounded up: what is shown is never less than what is meant."""
    scale = 10**digits
    return f"{ceil(value * scale - 1e-9) / scale:,.{digits}f}" if isfinite(value) else "unbounded"


def number(value: float | None, digits: int = 3) -> str:
    """A figure; a dash where there is none."""
    if value is None:
        return "–"
    return f"{value:,.{digits}f}" if isfinite(value) else "unbounded"


def signed(value: float | None) -> str:
    """A difference, with a true minus."""
    return "–" if value is None else f"{value:+.1f}".replace("-", "−")


def small(value: float | None) -> str:
    """A probability such as delta: `1e-5`, `0.19`."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    if value >= 1e-3:
        return f"{value:.3g}"
    power = floor(log10(value))
    digits = f"{value / 10.0**power:.2f}".rstrip("0").rstrip(".")
    return f"1e{power + 1}" if digits == "10" else f"{digits}e{power}"


def moment(text: Any) -> str:
    """A time in ISO 8601 as people write it; what is none stays as it is."""
    try:
        time = datetime.fromisoformat(str(text))
        time = time.astimezone(UTC) if time.tzinfo else time
    except (ValueError, OverflowError):
        return name(text)
    return f"{time.day} {MONTHS[time.month - 1]} {time.year}, {time:%H:%M} UTC"


def one_in(probability: float) -> str:
    """`1 in 100,000`."""
    return f"1 in {round(1 / probability):,}" if 0 < probability < 1 else "always"
