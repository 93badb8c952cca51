"""The bytes on the wire: known answers, one byte string for one message, and nothing else is read."""

import json
import random
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmpt_core.secagg import messages as wire
from fedmpt_core.secagg.errors import Abort, SecAggError
from fedmpt_core.secagg.wire import kind_of

VECTORS = json.loads((Path(__file__).parents[2] / "vectors" / "secagg_messages.json").read_text())
GOOD = {kind: bytes.fromhex(text) for kind, text in VECTORS["good"].items()}
BOUNDS = VECTORS["bounds"]
DECODE: dict[str, Callable[[bytes], Any]] = {
    "ADQ1": lambda data: wire.AdvertiseRequest.decode(data, BOUNDS["max_sites"]),
    "ADV1": wire.Advertisement.decode,
    "DRC1": lambda data: wire.Directory.decode(data, BOUNDS["max_sites"]),
    "CFM1": wire.Confirm.decode,
    "RND1": lambda data: wire.RoundRequest.decode(data, BOUNDS["max_sites"]),
    "MSK1": lambda data: wire.Masked.decode(data, cohort=BOUNDS["cohort"], words=BOUNDS["words"]),
    "CSY1": lambda data: wire.ConsistencyRequest.decode(data, BOUNDS["max_sites"]),
    "CNS1": wire.Consistent.decode,
    "UNQ1": lambda data: wire.UnmaskRequest.decode(data, cohort=BOUNDS["cohort"], max_sites=BOUNDS["max_sites"]),
    "UNM1": lambda data: wire.Unmasked.decode(data, survivors=BOUNDS["survivors"], dropped=BOUNDS["dropped"]),
    "ABR1": wire.AbortMessage.decode,
}


def fill(count: int, start: int) -> bytes:
    return bytes((start + i) % 256 for i in range(count))


def read(data: bytes) -> None:
    """Every reader refuses the bytes with its own error, or reads the one message that they are."""
    for decode in DECODE.values():
        try:
            message = decode(data)
        except SecAggError as error:
            assert error.code == Abort.MALFORMED
        else:
            assert message.encode() == data


@pytest.mark.parametrize("kind", list(DECODE))
def test_known_messages_are_read_and_written_back(kind: str) -> None:
    assert DECODE[kind](GOOD[kind]).encode() == GOOD[kind]
    assert kind_of(GOOD[kind]) == kind


def test_every_field_is_where_the_layout_says() -> None:
    """Packed again with struct alone."""
    job, roster, model, context = (fill(32, s) for s in (0, 32, 64, 96))
    signature = fill(64, 7)
    request = DECODE["ADQ1"](GOOD["ADQ1"])
    assert (request.job_digest, request.epoch, request.names) == (job, 3, ("höpital", "site-1"))
    advert = DECODE["ADV1"](GOOD["ADV1"])
    assert len(advert.body) == 170
    assert advert.body == struct.pack(
        ">5sB32s32sHH32s32s32s", b"\xffADV1", 1, job, roster, 5, 3, fill(32, 1), fill(32, 2), fill(32, 3)
    )
    assert (advert.session, advert.session_signature, advert.chain) == (b"session", fill(256, 9), b"-----BEGIN")
    opened = DECODE["RND1"](GOOD["RND1"])
    assert (opened.round, opened.attempt, opened.epoch, opened.model_digest) == (7, 1, 3, model)
    assert (opened.cohort, opened.confirms) == ((0, 2, 5), ((0, signature), (5, fill(64, 8))))
    masked = DECODE["MSK1"](GOOD["MSK1"])
    assert (masked.context, masked.member, masked.digest) == (context, 2, fill(32, 20))
    assert (masked.self_commitment, masked.edge_commitments) == (fill(32, 21), (fill(32, 22), fill(32, 23)))
    assert masked.sealed == (fill(115, 11), fill(115, 12))
    assert masked.vector.tolist() == [1, 2**31, 2**32 - 1, 0]
    assert not masked.vector.flags.writeable
    assert GOOD["MSK1"].startswith(masked.text + signature)
    shares = DECODE["UNM1"](GOOD["UNM1"])
    assert shares.self_shares == (fill(33, 40), fill(33, 41))
    assert shares.edge_shares == ((fill(33, 42),), (fill(33, 43),))
    left = DECODE["ABR1"](GOOD["ABR1"])
    assert (left.code, left.culprit, len(GOOD["ABR1"])) == (Abort.BAD_SHARE, wire.NOBODY, 106)
    survivors, directory = (0, 2, 5), fill(32, 128)
    texts = {k: bytes.fromhex(v) for k, v in VECTORS["texts"].items()}
    assert wire.confirm_text(job, directory) == texts["DIR1"]
    assert wire.consistency_text(context, directory, survivors) == texts["CON1"]
    assert wire.result_text(context, survivors, fill(32, 50)) == texts["RES1"]


@pytest.mark.parametrize("name", list(VECTORS["bad"]))
def test_known_bad_messages_are_refused(name: str) -> None:
    bad = VECTORS["bad"][name]
    with pytest.raises(SecAggError) as error:
        DECODE[bad["kind"]](bytes.fromhex(bad["hex"]))
    assert error.value.code == Abort.MALFORMED
    assert bad["kind"] in str(error.value)


@pytest.mark.parametrize("kind", list(DECODE))
def test_a_message_cut_or_extended_anywhere_is_refused(kind: str) -> None:
    data = GOOD[kind]
    for length in range(len(data)):
        with pytest.raises(SecAggError):
            DECODE[kind](data[:length])
    for extra in (b"\0", b"\xff", data, bytes(1000)):
        with pytest.raises(SecAggError):
            DECODE[kind](data + extra)


def test_ten_thousand_mutated_messages_are_refused_or_are_another_message() -> None:
    generator = random.Random(0)
    kinds = list(GOOD)
    for _ in range(10_000):
        data = bytearray(GOOD[generator.choice(kinds)])
        for _ in range(generator.randint(1, 4)):
            place = generator.randrange(len(data)) if data else 0
            match generator.randrange(5):
                case 0:
                    data[place : place + 1] = bytes([generator.randrange(256)])
                case 1:
                    del data[place : place + generator.randint(1, 40)]
                case 2:
                    data[place:place] = generator.randbytes(generator.randint(1, 40))
                case 3:
                    data[place:] = GOOD[generator.choice(kinds)][place:]
                case _:
                    data[place : place + 4] = b"\xff\xff\xff\xff"
        read(bytes(data))


@given(st.binary(max_size=300))
def test_any_bytes_have_a_kind_and_no_reader_fails_on_them(data: bytes) -> None:
    assert kind_of(data) == "unknown" or data[1:5] == kind_of(data).encode()
    read(data)


@given(st.sampled_from(list(DECODE)), st.binary(max_size=200))
def test_any_bytes_after_a_tag(kind: str, rest: bytes) -> None:
    read(b"\xff" + kind.encode() + rest)


@pytest.mark.parametrize("kind", list(DECODE))
def test_no_count_or_length_makes_a_reader_allocate(kind: str) -> None:
    tracemalloc.start()
    try:
        for place in range(5, len(GOOD[kind]) - 4):
            data = GOOD[kind][:place] + b"\xff\xff\xff\xff" + GOOD[kind][place + 4 :]
            read(data)
        assert tracemalloc.get_traced_memory()[1] < 1 << 18
    finally:
        tracemalloc.stop()


def test_other_kinds_of_bytes_are_refused() -> None:
    for data in (bytearray(GOOD["CFM1"]), memoryview(GOOD["CFM1"]), GOOD["CFM1"].hex()):
        with pytest.raises(SecAggError):
            wire.Confirm.decode(data)  # type: ignore[arg-type]


def test_a_message_without_its_vector_keeps_the_shares_only() -> None:
    masked = DECODE["MSK1"](GOOD["MSK1"]).without_vector()
    assert masked.vector.size == 0
    assert masked.sealed == (fill(115, 11), fill(115, 12))


def test_a_round_trip_of_a_large_message_shares_its_bytes() -> None:
    words = np.arange(1_000_000, dtype="<u4")
    rows = tuple(bytes(33 * 3 + 16) for _ in range(2))
    message = wire.Masked(bytes(32), 1, bytes(32), bytes(32), (bytes(32),) * 2, rows, bytes(64), words)
    data = message.encode()
    again = wire.Masked.decode(data, cohort=3, words=len(words))
    assert np.array_equal(again.vector, words)
    assert np.shares_memory(again.vector, np.frombuffer(data, np.uint8))
