"""Canonical JSON: one text for equal values, another for others, and the bytes that every release wrote."""

import json
import math
from hashlib import sha256
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmpt_core.common.canonical import canonical, canonical_digest, json_value

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


def test_the_form_is_pinned() -> None:
    value = {"b": [1, 2.5, 1e-05, True, None], "a": {"ü": 'é\n"\\/', "A": ""}, "10": [], "9": {}}
    text = rb'{"10":[],"9":{},"a":{"A":"","\u00fc":"\u00e9\n\"\\/"},"b":[1,2.5,1e-05,true,null]}'
    assert canonical(value) == text
    assert canonical_digest(value) == sha256(text).hexdigest()


@given(VALUES)
def test_it_is_read_back_as_the_same_value_and_written_as_the_same_bytes(value: Any) -> None:
    assert json.loads(canonical(value)) == value
    assert canonical(json.loads(canonical(value))) == canonical(value)


@given(st.dictionaries(st.text(max_size=5), st.integers(), min_size=2))
def test_the_order_of_keys_does_not_matter(value: dict[str, int]) -> None:
    assert canonical(value) == canonical(dict(reversed(value.items())))


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_are_refused(number: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical({"epsilon": [number]})


def test_other_values_are_refused_unless_a_plain_one_is_given_for_them() -> None:
    with pytest.raises(TypeError):
        canonical({1j})
    assert canonical([1j], default=str) == b'["1j"]'


def test_values_that_json_lacks_become_ones_that_it_has() -> None:
    assert json_value({1: (math.nan, [math.inf, 1.5])}) == {"1": [None, [None, 1.5]]}
