"""Versioned condition lists: the abstract words r of the front-door sum, fixed before training.

A list is a JSON file with its words, where they come from (prompts, raw answers and model of a discovery, or
a note for lists taken by hand) and a digest over all of it, so that a run can name exactly the list it used.
Presets lie beside this module; anyone may give a file of the same form. It must never call a language model
and never repair a damaged list.
"""

import json
import os
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmpt_core.schema import canonical_digest

if TYPE_CHECKING:
    from fedmpt_core.backbone.base import Backbone

SCHEMA_VERSION = 1
_KEYS = {"schema", "name", "conditions", "provenance", "digest"}
_PROVENANCE_KEYS = {"model", "prompts", "answers", "note"}


@dataclass(frozen=True)
class ConditionSet:
    """N condition words.

    Attributes:
        name: name of the list.
        conditions: N words or phrases such as `scene type`, no two alike.
        digest: SHA-256 hex over name, words and provenance.
    """

    name: str
    conditions: tuple[str, ...]
    digest: str


def preset_names() -> tuple[str, ...]:
    """Names of the lists that come with the package, sorted."""
    return tuple(sorted(f.name.removesuffix(".json") for f in _folder().iterdir() if f.name.endswith(".json")))


def load_conditions(name_or_path: str | os.PathLike[str], backbone: "Backbone | None" = None) -> ConditionSet:
    """A condition list by the name of a preset, or from a file.

    Args:
        name_or_path: a preset's name, or a path (a `Path`, or a string that ends in `.json` or holds a
            separator).
        backbone: if given, every condition must have word pieces in its vocabulary.

    Returns:
        The checked list.

    Raises:
        ValueError: unknown preset, missing or damaged file, later schema, empty list, empty or double
            condition, wrong digest, or a condition that the backbone cannot tokenise.
    """
    origin, text = _read(name_or_path)
    content = _parse(origin, text)
    conditions = _words(origin, content["conditions"])
    found = content_digest(content)
    if found != content["digest"]:
        raise ValueError(
            f"{origin}: digest={str(content['digest'])[:12]}... but the content has {found[:12]}...: the list was "
            "changed after it was made; restore it, or give the changed list its own name and digest"
        )
    if backbone is not None:
        for condition in conditions:
            backbone.tokenize(condition)
    return ConditionSet(content["name"], conditions, found)


def content_digest(content: dict[str, Any]) -> str:
    """SHA-256 hex of a list's JSON content without its `digest` key."""
    return canonical_digest({k: v for k, v in content.items() if k != "digest"})


def _folder() -> Any:
    return files("fedmpt_core.conditions")


def _read(name_or_path: str | os.PathLike[str]) -> tuple[str, str]:
    """What to call the list in errors, and its text."""
    if isinstance(name_or_path, str) and name_or_path in preset_names():
        preset = _folder() / f"{name_or_path}.json"
        return f"conditions '{name_or_path}'", preset.read_text(encoding="utf-8")
    path = Path(name_or_path)
    if isinstance(name_or_path, str) and path.suffix != ".json" and path.name == name_or_path:
        raise ValueError(
            f"conditions={name_or_path!r} is not known: use one of {', '.join(preset_names())}, "
            "or the path of a .json file"
        )
    try:
        return str(path), path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file: give a condition list or one of {', '.join(preset_names())}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as text ({type(error).__name__})") from None


def _parse(origin: str, text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{origin}: is not JSON ({error}): a condition list is a JSON object") from None
    if not isinstance(content, dict) or not isinstance(content.get("schema"), int):
        raise ValueError(f"{origin}: is not a condition list: it needs a whole number 'schema'")
    if content["schema"] != SCHEMA_VERSION:
        raise ValueError(f"{origin}: schema={content['schema']} is not supported: this release reads {SCHEMA_VERSION}")
    if set(content) != _KEYS:
        odd = ", ".join(sorted(set(content) ^ _KEYS))
        raise ValueError(f"{origin}: missing or unknown keys {odd}: a list has exactly {', '.join(sorted(_KEYS))}")
    if not isinstance(content["name"], str) or not content["name"]:
        raise ValueError(f"{origin}: name={content['name']!r}: give the list a name")
    provenance = content["provenance"]
    if not isinstance(provenance, dict) or set(provenance) != _PROVENANCE_KEYS:
        raise ValueError(
            f"{origin}: provenance must have exactly {', '.join(sorted(_PROVENANCE_KEYS))}; use null for none"
        )
    return content


def _words(origin: str, conditions: Any) -> tuple[str, ...]:
    if not isinstance(conditions, list) or not conditions:
        raise ValueError(f"{origin}: conditions={conditions!r}: give a list of at least one condition")
    for condition in conditions:
        if not isinstance(condition, str) or not condition.strip() or condition != condition.strip():
            raise ValueError(f"{origin}: condition {condition!r}: give words that do not start or end blank")
    folded = [c.casefold() for c in conditions]
    double = next((c for c, f in zip(conditions, folded, strict=True) if folded.count(f) > 1), None)
    if double is not None:
        raise ValueError(f"{origin}: condition {double!r} is listed more than once: conditions must differ")
    return tuple(conditions)
