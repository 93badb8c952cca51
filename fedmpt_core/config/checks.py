"""What all configuration classes share: types and bounds that hold however a class is made, problems as sentences.

Bounds and descriptions stand once, at the fields: pydantic checks them, and the JSON Schema shows them.
"""

import dataclasses
import difflib
import functools
import math
from typing import Annotated, Any, TypeVar, dataclass_transform

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic.json_schema import GenerateJsonSchema

from fedmpt_core.common.text import alike

T = TypeVar("T")

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field, Field))
def checked(kind: type[T]) -> type[T]:
    """A frozen dataclass that is held to its types and bounds, also in Python and by `dataclasses.replace`.

    Its fields are described by the docstrings behind them. What one field alone cannot say is checked in
    `__post_init__`. Making one raises ValueError, a sentence per problem.
    """
    made: Any = pydantic_dataclass(frozen=True, config=STRICT)(kind)
    check = made.__init__

    @functools.wraps(check)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            check(self, *args, **kwargs)
        except ValidationError as error:
            raise ValueError("\n".join(sentences(made, error))) from None

    made.__init__ = init
    return made


def pattern(regex: str, words: str) -> Any:
    """A field's text must match; `words` say how, to people and to editors."""
    return Field(pattern=regex, json_schema_extra={"patternErrorMessage": words})


def _once(values: T) -> T:
    given: Any = values
    if same := alike(given):
        raise ValueError(f"lists {same}: list each once")
    return values


_MOVED = {
    "micro_batch": "it changes no result, so each site sets it for its own machine now: remove it here, and put it at "
    "the top of a site's file, beside 'device'"
}
"""Keys that stood in a job once, and where they went."""

Name = Annotated[str, pattern("^[A-Za-z0-9_-]{1,64}$", "use 1 to 64 letters, digits, '_' or '-'")]
Once = Annotated[T, AfterValidator(_once), Field(json_schema_extra={"uniqueItems": True})]
"""A tuple of words that lists nothing twice, by what people take for one (`text.alike`)."""


class _Plain(GenerateJsonSchema):
    """Without titles; without null, which TOML has not: a key that is not given is left out; known keys by name."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def nullable_schema(self, schema: Any) -> dict[str, Any]:
        return self.generate_inner(schema["schema"])

    def dict_schema(self, schema: Any) -> dict[str, Any]:
        values = super().dict_schema(schema)
        keys = values.pop("propertyNames", {}).get("enum", ())
        known = {"properties": dict.fromkeys(keys, values.get("additionalProperties")), "additionalProperties": False}
        return values | known if keys else values

    def default_schema(self, schema: Any) -> dict[str, Any]:
        values = super().default_schema(schema)
        return values if values.get("default", "") is not None else self.generate_inner(schema["schema"])


@functools.cache
def adapter(kind: Any) -> TypeAdapter[Any]:
    """Making one takes longer than all checks, and a site's guard reads its files for every answer."""
    return TypeAdapter(kind)


def json_schema(kind: type) -> dict[str, Any]:
    """JSON Schema of a configuration class: every key with its type, bounds, default and description."""
    return adapter(kind).json_schema(schema_generator=_Plain)


def sentences(kind: type, error: ValidationError) -> list[str]:
    """What is wrong with the values of a class, a sentence per problem: section, key, value and what is allowed."""
    schema = json_schema(kind)
    return [_sentence(schema, problem) for problem in error.errors()]


def _sentence(schema: dict[str, Any], problem: Any) -> str:
    place = [part for part in problem["loc"] if part != "[key]"]
    *sections, key = _steps(place) or [""]
    section = f"[{'.'.join(sections)}] " if sections else ""
    given = f"{section}{key}={problem['input']!r}"
    node, owner = _node(schema, place), _node(schema, place[:-1]).get("properties", {})
    match problem["type"]:
        case "unexpected_keyword_argument" | "extra_forbidden":
            return section + _unknown(key, list(owner))
        case "literal_error" if "[key]" in problem["loc"]:
            return section + _unknown(key, list(owner))
        case "missing" | "missing_argument":
            return f"{section}'{key}' is missing: it has no default, so it must be given"
        case "value_error":
            where = f"[{'.'.join(_steps(place))}] " if place else ""
            return f"{where}{problem['ctx']['error']}"
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            low = f"[{node['minimum']:g}" if "minimum" in node else f"({node.get('exclusiveMinimum', -math.inf):g}"
            high = f"{node['maximum']:g}]" if "maximum" in node else f"{node.get('exclusiveMaximum', math.inf):g})"
            return f"{given} is out of range: allowed is {low}, {high}"
        case "too_short" | "too_long":
            most = f" to {node['maxItems']}" if "maxItems" in node else " or more"
            return f"{section}{key} has {problem['ctx']['actual_length']} entries: give {node['minItems']}{most}"
        case "string_pattern_mismatch":
            return f"{given}: {node['patternErrorMessage']}"
        case _:
            return f"{given}: {problem['msg'][:1].lower()}{problem['msg'][1:]}"


def _steps(place: list[Any]) -> list[str]:
    """Names on the way to a value; places in a list belong to the list's name."""
    steps: list[str] = []
    for part in place:
        if isinstance(part, int) and steps:
            steps[-1] += f"[{part}]"
        else:
            steps.append(str(part))
    return steps


def _node(schema: dict[str, Any], place: list[Any]) -> dict[str, Any]:
    """What a schema says of one place; empty where it says nothing."""
    node = schema
    for part in place:
        inner = node.get("items") if isinstance(part, int) else node.get("properties", {}).get(part)
        inner = inner or node.get("additionalProperties")
        node = inner if isinstance(inner, dict) else {}
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rpartition("/")[2]]
    return node


def _unknown(key: str, known: list[str]) -> str:
    if key in _MOVED and key not in known:
        return f"unknown key '{key}': {_MOVED[key]}"
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"known keys are {', '.join(known)}"
    return f"unknown key '{key}': {hint}"


def changed(config: Any) -> list[str]:
    """Names of the settings of a table that are not as they are when nothing is said."""
    return [
        setting.name
        for setting in dataclasses.fields(config)
        if getattr(config, setting.name)
        != (setting.default if setting.default_factory is dataclasses.MISSING else setting.default_factory())
    ]
