"""Versioned condition lists: the abstract words r of the front-door sum, fixed before training.

A list is a JSON file with its words, where they come from (prompts, raw answers and model of a discovery, or
a note for lists taken by hand) and a digest over all of it, so that a run can name exactly the list it used.
Presets lie beside this module; anyone may give a file of the same form. It must never call a language model
and never repair a damaged list.

| schema | what it adds |
|---|---|
| 1 | words, provenance with `model`, `prompts`, `answers`, `note` |
| 2 | `classes`: the labels for which the words were found; provenance of a discovery, see `provenance` |
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from fedmpt_core.common.canonical import canonical_digest
from fedmpt_core.common.text import alike
from fedmpt_core.config.provenance import Provenance, check_form

SCHEMA_VERSION = 2
_LEXICON = "lexicon.json"  # lies in the same folder and is no list
_KEYS = {"schema", "name", "conditions", "provenance", "digest"}
_KEYS_OF = {1: _KEYS, 2: {*_KEYS, "classes"}}
_PROVENANCE_OF = {
    1: {"model", "prompts", "answers", "note"},
    2: {"model", "method", "settings", "prompts", "answers", "ranking", "counts", "note"},
}


@dataclass(frozen=True)
class ConditionSet:
    """N condition words.

    Attributes:
        name: name of the list.
        conditions: N words or phrases such as `scene type`, no two alike.
        digest: SHA-256 hex over name, words, classes and provenance.
        classes: the labels for which the words were found; empty when they are for any labels.
    """

    name: str
    conditions: tuple[str, ...]
    digest: str
    classes: tuple[str, ...] = ()

    def check_classes(self, classes: Sequence[str]) -> None:
        """That the words may be used with these labels: any of those for which they were found, in any order.

        Raises:
            ValueError: the list was found for other labels.
        """
        strange = [c for c in classes if c not in self.classes] if self.classes else []
        if strange:
            more = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
            raise ValueError(
                f"the conditions '{self.name}' were found for {len(self.classes)} other classes, among which "
                f"{', '.join(map(repr, strange[:3]))}{more} is not: find conditions for these classes with "
                f"`fedmpt conditions discover`, or write the words themselves into the job: "
                f"conditions = {json.dumps(list(self.conditions))}"
            )


def preset_names() -> tuple[str, ...]:
    """Names of the lists that come with the package, sorted."""
    names = (f.name for f in _folder().iterdir() if f.name.endswith(".json") and f.name != _LEXICON)
    return tuple(sorted(name.removesuffix(".json") for name in names))


def load_conditions(name_or_path: str | os.PathLike[str]) -> ConditionSet:
    """A condition list by the name of a preset, or from a file.

    Args:
        name_or_path: a preset's name, or a path (a `Path`, or a string that ends in `.json` or holds a
            separator).

    Returns:
        The checked list.

    Raises:
        ValueError: unknown preset, missing or damaged file, later schema, empty list, empty or double
            condition, provenance of another form, or wrong digest.
    """
    content = read_content(name_or_path)
    classes = tuple(content.get("classes") or ())
    return ConditionSet(content["name"], tuple(content["conditions"]), content["digest"], classes)


def read_content(name_or_path: str | os.PathLike[str]) -> dict[str, Any]:
    """The checked JSON content of a list, provenance included; arguments and errors as in `load_conditions`."""
    origin, text = _read(name_or_path)
    content = _parse(origin, text)
    check_words(origin, "condition", content["conditions"])
    if content.get("classes") is not None:
        check_words(origin, "class", content["classes"])
    actual = content_digest(content)
    if actual != content["digest"]:
        raise ValueError(
            f"{origin}: digest={str(content['digest'])[:12]}... but the content has {actual[:12]}...: the list was "
            "changed after it was made; restore it, or give the changed list its own name and digest"
        )
    return content


def content_digest(content: dict[str, Any]) -> str:
    """SHA-256 hex of a list's JSON content without its `digest` key."""
    return canonical_digest({k: v for k, v in content.items() if k != "digest"})


def _folder() -> Any:
    return files("fedmpt_core.config").joinpath("lists")


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
    if not isinstance(content, dict) or type(content.get("schema")) is not int:
        raise ValueError(f"{origin}: is not a condition list: it needs a whole number 'schema'")
    schema = content["schema"]
    if schema not in _KEYS_OF:
        raise ValueError(f"{origin}: schema={schema} is not supported: this release reads 1 to {SCHEMA_VERSION}")
    if set(content) != _KEYS_OF[schema]:
        odd = ", ".join(sorted(set(content) ^ _KEYS_OF[schema]))
        expected = ", ".join(sorted(_KEYS_OF[schema]))
        raise ValueError(f"{origin}: missing or unknown keys {odd}: a list has exactly {expected}")
    if not isinstance(content["name"], str) or not content["name"]:
        raise ValueError(f"{origin}: name={content['name']!r}: give the list a name")
    provenance = content["provenance"]
    if not isinstance(provenance, dict) or set(provenance) != _PROVENANCE_OF[schema]:
        expected = ", ".join(sorted(_PROVENANCE_OF[schema]))
        raise ValueError(f"{origin}: provenance must have exactly {expected}; use null for none")
    if schema > 1:
        check_form(Provenance, f"{origin}: provenance", provenance)
    elif not isinstance(provenance["note"], str | None):
        raise ValueError(f"{origin}: provenance.note={provenance['note']!r}: give words, or null for none")
    return content


def check_words(origin: str, what: str, words: Any) -> None:
    """Raises ValueError unless it is a list of different words; `what` one of them is, ends the sentence."""
    plural = "classes" if what == "class" else f"{what}s"
    if not isinstance(words, list) or not words:
        raise ValueError(f"{origin}: {plural}={words!r}: give a list of at least one {what}")
    for word in words:
        if not isinstance(word, str) or not word.strip() or word != word.strip():
            raise ValueError(f"{origin}: {what} {word!r}: give words that do not start or end blank")
    if same := alike(words):
        raise ValueError(f"{origin}: {plural} lists {same}: {plural} must differ")
