"""The bytes on the wire: known answers, one byte string for one message, and nothing else is read."""

import json
import random
import struct
import tracemalloc
from collections.abc import Callable
from hashlib import sha256
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
SIZES = {"members": BOUNDS["members"], "threshold": BOUNDS["threshold"]}
DECODE: dict[str, Callable[[bytes], Any]] = {
    "ADQ1": wire.AdvertiseRequest.decode,
    "ADV1": wire.Advertisement.decode,
    "DRC1": lambda data: wire.Directory.decode(data, BOUNDS["max_sites"]),
    "DEA1": lambda data: wire.Deal.decode(data, **SIZES),
    "DLS1": lambda data: wire.Deals.decode(data, **SIZES),
    "CFM1": wire.Confirm.decode,
    "SHW1": lambda data: wire.ShowRequest.decode(data, BOUNDS["max_sites"]),
    "SHO1": lambda data: wire.Show.decode(data, BOUNDS["rows"]),
    "RND1": lambda data: wire.RoundRequest.decode(data, BOUNDS["max_sites"]),
    "RDY1": wire.Ready.decode,
    "MRQ1": lambda data: wire.MaskRequest.decode(data, BOUNDS["max_sites"]),
    "MSK1": lambda data: wire.Masked.decode(data, BOUNDS["words"]),
    "OPQ1": wire.OpenRequest.decode,
    "OPN1": lambda data: wire.Opened.decode(data, BOUNDS["cohort"]),
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
    job, roster, model, context, epoch = (fill(32, s) for s in (0, 32, 64, 96, 128))
    signature = fill(64, 7)
    request = DECODE["ADQ1"](GOOD["ADQ1"])
    assert (request.job_digest, request.epoch, request.round) == (job, 3, 9)
    advert = DECODE["ADV1"](GOOD["ADV1"])
    assert len(advert.body) == 172
    assert advert.body == struct.pack(
        ">5sB32s32sHI32s32s32s", b"\xffADV1", 2, job, roster, 3, 9, fill(32, 1), fill(32, 2), fill(32, 3)
    )
    assert (advert.session, advert.session_signature, advert.chain) == (b"session", fill(256, 9), b"-----BEGIN")
    assert DECODE["DRC1"](GOOD["DRC1"]).adverts == (b"one", GOOD["ADV1"])
    opened = DECODE["RND1"](GOOD["RND1"])
    assert (opened.epoch, opened.round, opened.attempt, opened.model_digest) == (epoch, 7, 1, model)
    assert opened.confirms == ((0, signature), (5, fill(64, 8)))
    ready = DECODE["RDY1"](GOOD["RDY1"])
    assert (ready.epoch, ready.round, ready.attempt, ready.member, ready.signature) == (epoch, 7, 1, 2, signature)
    asked = DECODE["MRQ1"](GOOD["MRQ1"])
    assert (asked.epoch, asked.round, asked.attempt, asked.slot, asked.cohort) == (epoch, 7, 1, 4, (0, 2, 5))
    masked = DECODE["MSK1"](GOOD["MSK1"])
    assert (masked.context, masked.member, masked.digest) == (context, 2, fill(32, 20))
    assert masked.vector.tolist() == [1, 2**31, 2**32 - 1, 0]
    assert not masked.vector.flags.writeable
    assert GOOD["MSK1"].startswith(masked.text + signature)
    assert DECODE["OPQ1"](GOOD["OPQ1"]).context == context
    shares = DECODE["OPN1"](GOOD["OPN1"])
    assert (shares.context, shares.member) == (context, 2)
    assert shares.shares == (fill(33, 40), fill(33, 41), fill(33, 42))
    left = DECODE["ABR1"](GOOD["ABR1"])
    assert (left.code, left.culprit, len(GOOD["ABR1"])) == (Abort.BAD_SHARE, wire.NOBODY, 106)
    texts = {k: bytes.fromhex(v) for k, v in VECTORS["texts"].items()}
    assert wire.confirm_text(epoch) == texts["EPO1"]
    assert wire.result_text(context, (0, 2, 5), fill(32, 50)) == texts["RES1"]


def test_every_field_of_a_dealing_is_where_the_layout_says() -> None:
    context, signature = fill(32, 96), fill(64, 7)
    deal = DECODE["DEA1"](GOOD["DEA1"])
    assert (deal.member, deal.directory, deal.signature) == (2, context, signature)
    assert deal.dealing.label == context + b"\0\2"
    assert deal.dealing.combination == (fill(33, 60), fill(33, 61))
    assert deal.sealed == (fill(wire.SEALED_BYTES, 11), fill(wire.SEALED_BYTES, 12))
    assert deal.seals == tuple(sha256(row).digest() for row in deal.sealed)
    assert deal.leaves == tuple(fill(32 * 33, 5 * place) for place in range(3))
    assert deal.dealing.rows == tuple(sha256(b"FLARE-SA/2/row\0" + line).digest() for line in deal.leaves)
    assert deal.leaf(1, 2) == fill(32, 5 + 64)
    assert GOOD["DEA1"].startswith(deal.text + signature)
    assert len(deal.text) == wire.Deal.text_bytes(3, 2)
    deals = DECODE["DLS1"](GOOD["DLS1"])
    assert [one.member for one in deals.deals] == [0, 2]
    assert deals.sealed == (fill(wire.SEALED_BYTES, 13),)
    one = deals.deals[1]
    assert one.text == b"\xffDEA1\0\2" + context + fill(96, 80) + fill(66, 81) + fill(64, 82)
    assert one.signature == fill(64, 83)
    shown = DECODE["SHO1"](GOOD["SHO1"])
    assert (shown.directory, shown.member, shown.rows) == (context, 2, (fill(33 * 33, 14),))
    assert wire.shown(shown.rows[0]) == shown.rows[0] + bytes(16)
    assert DECODE["SHW1"](GOOD["SHW1"]).complaints == (GOOD["ABR1"], fill(106, 4))


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
    for length in {*range(min(len(data), 200)), *range(0, len(data), 97), len(data) - 1}:
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
        for place in {*range(5, min(len(GOOD[kind]) - 4, 300)), *range(5, len(GOOD[kind]) - 4, 97)}:
            data = GOOD[kind][:place] + b"\xff\xff\xff\xff" + GOOD[kind][place + 4 :]
            read(data)
        assert tracemalloc.get_traced_memory()[1] < 1 << 18
    finally:
        tracemalloc.stop()


def test_other_kinds_of_bytes_are_refused() -> None:
    for data in (bytearray(GOOD["CFM1"]), memoryview(GOOD["CFM1"]), GOOD["CFM1"].hex()):
        with pytest.raises(SecAggError):
            wire.Confirm.decode(data)  # type: ignore[arg-type]


def test_a_round_trip_of_a_large_message_shares_its_bytes() -> None:
    words = np.arange(1_000_000, dtype="<u4")
    data = wire.Masked(bytes(32), 1, bytes(32), bytes(64), words).encode()
    again = wire.Masked.decode(data, len(words))
    assert np.array_equal(again.vector, words)
    assert np.shares_memory(again.vector, np.frombuffer(data, np.uint8))
