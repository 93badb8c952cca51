"""Context digests: known answers that a second implementation gives too, and no two inputs alike."""

import json
from pathlib import Path
from typing import Any

import independent
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmpt_core.secagg import context as contexts
from fedmpt_core.secagg.errors import Abort, SecAggError

VECTORS = json.loads((Path(__file__).parents[2] / "vectors" / "secagg_primitives.json").read_text())["context"]
DIGEST = st.binary(min_size=32, max_size=32)


def unhex(value: Any) -> Any:
    """Strings of arguments as the bytes that they spell; names stay."""
    if isinstance(value, list):
        return [[one[0], bytes.fromhex(one[1])] if isinstance(one, list) else unhex(one) for one in value]
    return bytes.fromhex(value) if isinstance(value, str) and len(value) > 8 else value


@pytest.mark.parametrize("case", VECTORS["job_digest"])
def test_job_digest(case: dict[str, Any]) -> None:
    assert contexts.job_digest(case["terms"]).hex() == independent.job_digest(case["terms"]).hex() == case["digest"]


@pytest.mark.parametrize("case", VECTORS["roster_digest"])
def test_roster_digest(case: dict[str, Any]) -> None:
    members = [(name, bytes.fromhex(spki)) for name, spki in case["members"]]
    assert contexts.roster_digest(members).hex() == independent.roster_digest(members).hex() == case["digest"]
    assert contexts.roster_digest(iter(reversed(members))).hex() == case["digest"]


@pytest.mark.parametrize("case", VECTORS["model_digest"])
def test_model_digest(case: dict[str, Any]) -> None:
    raw = [(name, dtype, shape, bytes.fromhex(text)) for name, dtype, shape, text in case["tensors"]]
    assert independent.model_digest(raw).hex() == case["digest"]
    tensors = {name: np.frombuffer(text, dtype).reshape(shape) for name, dtype, shape, text in raw}
    assert contexts.model_digest(tensors).hex() == case["digest"]
    other_layout = {n: np.asfortranarray(t.astype(t.dtype.newbyteorder(">"))) for n, t in reversed(tensors.items())}
    other_layout = {n: t.reshape(tensors[n].shape) for n, t in other_layout.items()}
    assert contexts.model_digest(other_layout).hex() == case["digest"]


@pytest.mark.parametrize("case", VECTORS["directory_digest"])
def test_directory_digest(case: dict[str, Any]) -> None:
    entries = [(bytes.fromhex(body), bytes.fromhex(session)) for body, session in case["entries"]]
    assert contexts.directory_digest(entries).hex() == independent.directory_digest(entries).hex() == case["digest"]


@pytest.mark.parametrize("case", VECTORS["epoch_digest"])
def test_epoch_digest(case: dict[str, Any]) -> None:
    arguments = bytes.fromhex(case["directory"]), [bytes.fromhex(text) for text in case["dealings"]]
    assert contexts.epoch_digest(*arguments).hex() == independent.epoch_digest(*arguments).hex() == case["digest"]


@pytest.mark.parametrize("case", VECTORS["context"])
def test_context(case: dict[str, Any]) -> None:
    numbers = case["job_id"], case["round"], case["attempt"], case["slot"]
    bound = {"epoch": bytes.fromhex(case["epoch"]), "cohort": case["cohort"], "model": bytes.fromhex(case["model"])}
    one, other = contexts.context(*numbers, **bound), independent.context(*numbers, **bound)
    assert one.hex() == other.hex() == case["digest"]


@pytest.mark.parametrize("case", VECTORS["bad"], ids=lambda case: case["what"])
def test_refused(case: dict[str, Any]) -> None:
    named = {"round_number" if key == "round" else key: unhex(value) for key, value in case["arguments"].items()}
    with pytest.raises(ValueError) as refusal:
        getattr(contexts, case["call"])(**named)
    code = refusal.value.code.name if isinstance(refusal.value, SecAggError) else type(refusal.value).__name__
    assert code == case["expect"]


U16 = st.integers(0, 2**16 - 1)
COHORT = st.lists(U16, max_size=4, unique=True).map(sorted)
FIELDS = st.tuples(st.text(max_size=4), st.integers(0, 2**32 - 1), U16, U16, DIGEST, COHORT, DIGEST)


def context_of(fields: tuple) -> bytes:
    """The context of all its fields."""
    *numbers, epoch, cohort, model = fields
    return contexts.context(*numbers, epoch=epoch, cohort=cohort, model=model)


@given(FIELDS, FIELDS, st.integers(0, 6))
def test_a_changed_field_changes_the_context(one: tuple, other: tuple, field: int) -> None:
    changed = (*one[:field], other[field], *one[field + 1 :])
    assert (context_of(one) == context_of(changed)) == (one == changed)


@given(st.lists(st.binary(max_size=3), max_size=3), st.data())
def test_no_bytes_can_move_between_the_dealings_of_an_epoch(dealings: list[bytes], data: Any) -> None:
    flat = b"".join(dealings)
    cut = data.draw(st.integers(0, len(flat)))
    moved = [flat[:cut], flat[cut:]]
    same = contexts.epoch_digest(bytes(32), dealings) == contexts.epoch_digest(bytes(32), moved)
    assert same == (dealings == moved)


@given(st.lists(st.tuples(st.binary(max_size=3), st.binary(max_size=3)), max_size=3), st.data())
def test_no_bytes_can_move_between_the_fields_of_a_directory(entries: list[tuple[bytes, bytes]], data: Any) -> None:
    flat = b"".join(body + session for body, session in entries)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(flat)), min_size=3, max_size=3)))
    a, b, c, d = (flat[i:j] for i, j in zip([0, *cuts], [*cuts, len(flat)], strict=True))
    moved = [(a, b), (c, d)]
    assert (contexts.directory_digest(entries) == contexts.directory_digest(moved)) == (entries == moved)


def test_no_bytes_can_move_between_the_fields_of_a_model() -> None:
    ones = np.ones(4, np.float32)
    alike = [
        {"a": ones},
        {"b": ones},
        {"a": ones.reshape(2, 2)},
        {"a": ones.reshape(1, 4)},
        {"a": ones.view(np.int32)},
        {"a": ones.view(np.uint8)},
        {"a": ones[:2], "b": ones[2:]},
        {"a": ones[:3], "b": ones[3:]},
        {"a": ones, "b": ones[:0]},
        {"a": np.negative(ones)},
        {},
    ]
    assert len({contexts.model_digest(m) for m in alike}) == len(alike)
    assert contexts.model_digest({"a": np.zeros(1, np.float32)}) != contexts.model_digest(
        {"a": -np.zeros(1, np.float32)}
    )


def test_a_strided_view_counts_as_what_it_shows() -> None:
    base = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert contexts.model_digest({"a": base[:, ::2]}) == contexts.model_digest({"a": base[:, ::2].copy()})
    assert contexts.model_digest({"a": base.T}) == contexts.model_digest({"a": base.T.copy()})
    assert contexts.model_digest({"a": base.T}) != contexts.model_digest({"a": base})


@pytest.mark.parametrize("dtype", [object, "<U3", "V4", "M8[s]", "c8"])
def test_a_tensor_whose_bytes_do_not_say_what_it_holds_is_refused(dtype: str) -> None:
    with pytest.raises(ValueError, match="tensor 'a' is"):
        contexts.model_digest({"a": np.zeros(2, dtype)})


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": 1}, {"a": 1.0}),
        ({"a": 1}, {"a": True}),
        ({"a": None}, {"a": "null"}),
        ({"a": [1, 2]}, {"a": [[1, 2]]}),
        ({"a": "1"}, {"a": 1}),
        ({"a": 0.1}, {"a": 0.1 + 2**-56}),
        ({"a": {"b": 1}}, {"a.b": 1}),
        ({"a": "ü"}, {"a": "\\u00fc"}),
    ],
)
def test_terms_that_differ_have_another_digest(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert contexts.job_digest(one) != contexts.job_digest(other)


def test_terms_are_alike_in_any_order_and_as_tuples() -> None:
    one = {"b": (1, 2), "a": {"y": 0.5, "x": None}}
    assert contexts.job_digest(one) == contexts.job_digest({"a": {"x": None, "y": 0.5}, "b": [1, 2]})


@pytest.mark.parametrize(
    ("terms", "error"),
    [
        ({"a": float("nan")}, ValueError),
        ({"a": float("-inf")}, ValueError),
        ({1: "a"}, ValueError),
        ({"a": [{2: "b"}]}, ValueError),
        ({"a": b"bytes"}, TypeError),
        ({"a": {1, 2}}, TypeError),
        ({"a": np.float32(1)}, TypeError),
    ],
)
def test_terms_that_json_would_bend_are_refused(terms: dict[Any, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        contexts.job_digest(terms)


def test_the_refusals_say_what_and_where() -> None:
    with pytest.raises(ValueError, match=r"^round is 4294967296, it must be from 0 to 4294967295$"):
        contexts.context("job", 2**32, 0, 1, epoch=bytes(32), cohort=[0], model=bytes(32))
    with pytest.raises(SecAggError, match="'site-1' twice: remove one") as refusal:
        contexts.roster_digest([("site-1", bytes(32)), ("site-1", bytes(32))])
    assert refusal.value.code is Abort.ROSTER
    with pytest.raises(ValueError, match="number of entries is 65536"):
        contexts.directory_digest([(b"", b"")] * 65536)
    with pytest.raises(ValueError, match="number of dealings is 65536"):
        contexts.epoch_digest(bytes(32), [b""] * 65536)


def test_a_length_goes_before_the_data() -> None:
    assert contexts.lp(b"") == bytes(4)
    assert contexts.lp(b"a" * 258) == bytes([0, 0, 1, 2]) + b"a" * 258
