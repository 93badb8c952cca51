"""The flat vector: round trips, and every damaged or foreign message is refused before any arithmetic."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmpt_core.model.vector import LayoutError, ParameterLayout

LAYOUT = ParameterLayout(("contexts.condition", "gate.out"), ((2, 3), (4,)))
VECTOR = np.arange(10, dtype=np.float32)


@given(st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=5), st.integers(0, 2**32 - 1))
def test_tensors_survive_flattening_and_the_wire(shapes: list[list[int]], seed: int) -> None:
    layout = ParameterLayout(tuple(f"t{i}" for i in range(len(shapes))), tuple(map(tuple, shapes)))
    rng = np.random.default_rng(seed)
    tensors = {n: rng.normal(size=s).astype(np.float32) for n, s in zip(layout.names, layout.shapes, strict=True)}
    again = layout.split(layout.decode(layout.encode(layout.flatten(tensors))))
    assert all(np.array_equal(again[n], tensors[n]) for n in layout.names)
    assert ParameterLayout.from_json(layout.to_json()) == layout


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (LAYOUT.encode(VECTOR)[:-1], "71 bytes, expected 72"),
        (LAYOUT.encode(VECTOR) + b"\0", "73 bytes, expected 72"),
        (b"", "0 bytes"),
        (b"\1" + LAYOUT.encode(VECTOR)[1:], "another layout"),
        (LAYOUT.encode(VECTOR)[:-4] + np.float32(np.nan).tobytes(), "NaN"),
        (LAYOUT.encode(VECTOR)[:-4] + np.float32(np.inf).tobytes(), "infinity"),
    ],
)
def test_bad_bytes_are_refused(data: bytes, says: str) -> None:
    with pytest.raises(LayoutError, match=says):
        LAYOUT.decode(data)


def test_a_layout_of_other_names_or_order_has_another_digest() -> None:
    swapped = ParameterLayout(("gate.out", "contexts.condition"), ((4,), (2, 3)))
    renamed = ParameterLayout(("contexts.condition", "gate.in"), ((2, 3), (4,)))
    assert len({LAYOUT.digest(), swapped.digest(), renamed.digest()}) == 3
    with pytest.raises(LayoutError, match="another layout"):
        swapped.decode(LAYOUT.encode(VECTOR))


def test_nan_is_not_sent() -> None:
    with pytest.raises(LayoutError, match="first at 3"):
        LAYOUT.encode(np.where(np.arange(10) == 3, np.nan, VECTOR).astype(np.float32))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        '{"names": ["a"], "shapes": [], "version": 1}',
        '{"names": [], "shapes": [], "version": 9}',
    ],
)
def test_a_damaged_layout_is_refused(text: str) -> None:
    with pytest.raises(LayoutError):
        ParameterLayout.from_json(text)


def test_a_tensor_of_the_wrong_shape_or_name_is_refused() -> None:
    tensors = LAYOUT.split(VECTOR)
    with pytest.raises(LayoutError, match=r"gate.out has shape \(5,\)"):
        LAYOUT.flatten({**tensors, "gate.out": np.zeros(5)})
    with pytest.raises(LayoutError, match="not the same"):
        LAYOUT.flatten({**tensors, "more": np.zeros(1)})
