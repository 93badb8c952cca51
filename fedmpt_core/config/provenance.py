"""Where a discovered list comes from: the form of `provenance` in schema 2, as `discover` writes it.

A list may come from anywhere and still have the right digest, so whoever shows it must be able to rely on its form.
Further keys are allowed: settings differ by method, and the digest covers them all.
"""

import json
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from fedmpt_core.config.checks import adapter


@dataclass(frozen=True)
class _Model:
    name: str
    weights: str
    library: str


@dataclass(frozen=True)
class _Settings:
    label_sets: int
    seed: int
    backbone: str


@dataclass(frozen=True)
class _Answers:
    form: Literal["plain", "zlib+base64", "left out"]
    sha256: str
    data: list[Any] | str | None


@dataclass(frozen=True)
class _Row:
    condition: str
    coverage: float
    visual: float | None
    closest: str
    cosine: float
    kept: bool


@dataclass(frozen=True)
class Provenance:
    """What a discovered list says of itself."""

    model: _Model
    method: Literal["generate", "score"]
    settings: _Settings
    prompts: dict[str, str]
    answers: _Answers
    ranking: list[_Row]
    counts: list[dict[str, Any]] | None
    note: str | None


@dataclass(frozen=True)
class Answered:
    """One raw answer as a list keeps it."""

    stage: str
    number: int
    answer: str
    cut: bool


def check_form(kind: Any, what: str, value: Any) -> None:
    """Raises ValueError, naming `what` and the key, unless the value has the form of `kind`."""
    try:
        adapter(kind).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise ValueError(
            f"{what}{f'.{key}' if key else ''}: {first['msg'].lower()}: this is not what `fedmpt conditions discover` "
            "writes; find the list again, or take the words alone: conditions = [...] in the job"
        ) from None
