"""What all configuration classes share: strictness for pydantic, checks that name field and value, and a digest."""

import hashlib
import json
import math
from typing import Any

STRICT = {"extra": "forbid", "strict": True, "allow_inf_nan": False}


def check_range(owner: object, name: str, low: float, high: float, *, open_low: bool = False) -> None:
    """Raises ValueError unless the field is in [low, high], or (low, high]."""
    value = getattr(owner, name)
    if not (low < value if open_low else low <= value) or value > high:
        bracket = "(" if open_low else "["
        raise ValueError(f"{name}={value} is out of range: allowed is {bracket}{low:g}, {high:g}]")


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
