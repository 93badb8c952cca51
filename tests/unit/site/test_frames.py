"""Frames between executor and trainer: what goes in comes out, anything else is an error and allocates nothing."""

import io
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmpt_flare.site.frames import MAX_BLOCK, MAX_JSON, read_frame, write_frame

FIELDS = st.dictionaries(st.text(max_size=8), st.integers() | st.text(max_size=20) | st.booleans(), max_size=5)


@given(st.lists(st.tuples(FIELDS, st.binary(max_size=200)), min_size=1, max_size=4))
def test_frames_come_out_as_they_went_in(messages: list[tuple[dict, bytes]]) -> None:
    stream = io.BytesIO()
    for fields, block in messages:
        write_frame(stream, fields, block)
    stream.seek(0)
    assert [read_frame(stream) for _ in messages] == messages
    with pytest.raises(EOFError):
        read_frame(stream)


@given(st.integers(0, 60))
def test_a_cut_frame_is_the_end_of_the_stream(keep: int) -> None:
    stream = io.BytesIO()
    write_frame(stream, {"order": "train"}, b"x" * 40)
    whole = stream.getvalue()
    with pytest.raises(EOFError):
        read_frame(io.BytesIO(whole[: min(keep, len(whole) - 1)]))


@pytest.mark.parametrize("head", [(b"FMP2", 2, 0), (b"FMP1", MAX_JSON + 1, 0), (b"FMP1", 2, MAX_BLOCK + 1)])
def test_a_foreign_or_oversized_head_is_refused_before_reading_on(head: tuple[bytes, int, int]) -> None:
    with pytest.raises(ValueError, match="not a trainer frame"):
        read_frame(io.BytesIO(struct.pack(">4sIQ", *head)))
