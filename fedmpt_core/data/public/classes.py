"""The classes of the data sets out of `classes.toml`: names as their files spell them, words as labels take them."""

import tomllib
from collections.abc import Callable
from importlib.resources import files
from typing import Any

from fedmpt_core.config.datasets import PublicName

LISTED: dict[str, dict[str, Any]] = tomllib.loads(
    files("fedmpt_core.data.public").joinpath("classes.toml").read_text(encoding="utf-8")
)


def names_and_words(kind: PublicName, otherwise: Callable[[str], str] = str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """C names of a data set in its official order, and their C words; `otherwise` makes those that the file has not."""
    names, words = LISTED[kind]["names"], LISTED[kind].get("words", {})
    return tuple(names), tuple(words.get(name) or otherwise(name) for name in names)
