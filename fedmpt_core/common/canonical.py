"""The one text of a value, for digests and signatures: JSON in ASCII with sorted keys and no blanks.

Standard library alone, so that an auditor can run the ledger that stands on this. The form is fixed: digests,
signatures and ledgers of every release hold it.
"""

import hashlib
import json
import math
from collections.abc import Callable
from typing import Any


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


def canonical(value: Any, default: Callable[[Any], Any] | None = None) -> bytes:
    """The bytes of a value.

    Args:
        value: what JSON can hold; keys are text.
        default: gives a plain value for any other.

    Raises:
        ValueError: NaN or an infinity; TypeError: what JSON cannot hold.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=default).encode()


def canonical_digest(value: Any) -> str:
    """SHA-256 of the bytes of a value, hex. Raises as `canonical` does."""
    return hashlib.sha256(canonical(value)).hexdigest()
