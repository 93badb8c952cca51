"""What all configuration classes share: strictness for pydantic, checks that name field and value, and a digest."""

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

STRICT = {"extra": "forbid", "strict": True, "allow_inf_nan": False}


def check_range(owner: object, name: str, low: float, high: float, *, open_low: bool = False) -> None:
    """Raises ValueError unless the field is in [low, high], or (low, high]."""
    value = getattr(owner, name)
    if not (low < value if open_low else low <= value) or value > high:
        bracket = "(" if open_low else "["
        raise ValueError(f"{name}={value} is out of range: allowed is {bracket}{low:g}, {high:g}]")


def check_labels(classes: Sequence[str], unseen: Sequence[str]) -> None:
    """Raises ValueError unless these can be a job's labels, trained and unseen: readable, 2..2000, none in both."""
    if not 2 <= len(classes) <= 2000:
        raise ValueError(f"classes has {len(classes)} entries: give 2 to 2000 labels")
    if len(classes) + len(unseen) > 2000 or set(unseen) & set(classes):
        raise ValueError("unseen_classes: give at most 2000 labels in all, none of them in classes too")
    bad = next((c for c in (*classes, *unseen) if not c.strip() or c != c.strip() or "|" in c or ";" in c), None)
    if bad is not None:
        raise ValueError(f"classes holds {bad!r}: a label may not be empty, hold '|' or ';', or start or end blank")


def check_unique(owner: object, name: str) -> None:
    """Raises ValueError when the field lists something twice."""
    values = getattr(owner, name)
    twice = sorted({v for v in values if list(values).count(v) > 1})
    if twice:
        raise ValueError(f"{name} lists {', '.join(map(repr, twice))} more than once: list each once")


def json_value(value: Any) -> Any:
    """The same in values that JSON has: text for keys, lists for tuples, None for numbers that are not finite."""
    match value:
        case dict():
            return {str(key): json_value(item) for key, item in value.items()}
        case list() | tuple():
            return [json_value(item) for item in value]
        case float() if not math.isfinite(value):
            return None
        case _:
            return value


def canonical_digest(value: Any) -> str:
    """SHA-256 hex of `value` as JSON with sorted keys, no blanks, ASCII only."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
