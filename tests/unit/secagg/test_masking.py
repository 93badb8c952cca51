"""Masks: AES-CTR against known answers, add and subtract cancel, and what is refused."""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import independent
import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedmpt_core.secagg import masking
from fedmpt_core.secagg.masking import Masker, add_all, uniform_words

ALL = json.loads((Path(__file__).parents[2] / "vectors" / "secagg_primitives.json").read_text())
PUBLISHED, VECTORS = ALL["published"], ALL["masking"]
KEY = bytes(range(32))
BLOCK = masking._BLOCK_WORDS
KEYS = st.lists(st.binary(min_size=32, max_size=32), max_size=4)


def mask(key: bytes, words: int) -> np.ndarray:
    """The mask of a key in one call of the cipher."""
    stream = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor().update(bytes(4 * words))
    return np.frombuffer(stream, dtype="<u4")


@pytest.mark.parametrize("case", VECTORS, ids=lambda case: case["key"][:8])
def test_known_answers(case: dict[str, Any]) -> None:
    key, words = bytes.fromhex(case["key"]), case["words"]
    assert independent.mask(key, len(words)) == words
    vector = np.zeros(len(words), dtype="<u4")
    Masker().add(vector, key)
    assert vector.tolist() == words


def test_the_frozen_first_words_of_the_suite() -> None:
    vector = np.zeros(4, dtype="<u4")
    Masker().add(vector, bytes.fromhex("af918d5b983bd805d935f5f9f451c77fa2f53dee9540aae721298fac1d2d1fdf"))
    assert vector.tolist() == [2184390086, 2250194595, 1827217994, 158864394]


@pytest.mark.parametrize("case", PUBLISHED["sp800-38a F.5.5"])
def test_sp_800_38a(case: dict[str, str]) -> None:
    key, counter, plain = (bytes.fromhex(case[name]) for name in ("key", "counter", "plaintext"))
    stream = bytes(a ^ b for a, b in zip(plain, bytes.fromhex(case["ciphertext"]), strict=True))
    assert independent.ctr(key, counter, len(plain)) == stream
    # the published counter is not zero; from zero on, masks are compared with the same independent cipher
    vector = np.zeros(len(plain) // 4, dtype="<u4")
    Masker().add(vector, key)
    assert vector.tobytes() == independent.ctr(key, bytes(16), len(plain))


@pytest.mark.parametrize("words", [0, 1, 3, 4, 5, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 3])
def test_every_length_around_a_block(words: int) -> None:
    start = np.random.default_rng(0).integers(0, 2**32, words, dtype=np.uint32)
    vector, masker = start.copy(), Masker()
    masker.add(vector, KEY)
    assert np.array_equal(vector, start + mask(KEY, words))
    masker.subtract(vector, KEY)
    assert np.array_equal(vector, start)


def test_sums_wrap_at_32_bits() -> None:
    word = int(mask(KEY, 1)[0])
    for value in (0, 2**32 - word - 1, 2**32 - word, 2**32 - 1):
        vector = np.array([value], dtype="<u4")
        Masker().add(vector, KEY)
        assert int(vector[0]) == (value + word) % 2**32


@given(st.lists(st.integers(0, 2**32 - 1), max_size=70), KEYS, KEYS)
def test_all_masks_at_once_are_a_plain_loop(values: list[int], plus: list[bytes], minus: list[bytes]) -> None:
    vector = np.array(values, dtype="<u4")
    expected = vector.copy()
    for key in plus:
        expected += mask(key, len(values))
    for key in minus:
        expected -= mask(key, len(values))
    add_all(vector, plus, minus)
    assert np.array_equal(vector, expected)
    add_all(vector, minus, plus)
    assert vector.tolist() == values


@settings(max_examples=15)
@given(st.integers(2 * BLOCK, 4 * BLOCK))
def test_vectors_longer_than_a_block(words: int) -> None:
    vector = np.zeros(words, dtype="<u4")
    add_all(vector, [KEY], [bytes(32)])
    assert np.array_equal(vector, mask(KEY, words) - mask(bytes(32), words))


def test_masks_cancel_in_the_sum_of_all_members() -> None:
    rng, members = np.random.default_rng(0), range(5)
    plain = rng.integers(0, 2**32, (5, 1001), dtype=np.uint32)
    edges = {(i, j): rng.bytes(32) for i in members for j in members if i < j}
    masked = plain.copy()
    for i in members:
        add_all(masked[i], [edges[i, j] for j in members if i < j], [edges[j, i] for j in members if j < i])
    assert np.array_equal(masked.sum(0, dtype=np.uint32), plain.sum(0, dtype=np.uint32))
    assert not np.any([np.array_equal(masked[i], plain[i]) for i in members])
    assert not np.array_equal(masked[1:].sum(0, dtype=np.uint32), plain[1:].sum(0, dtype=np.uint32))


@pytest.mark.parametrize("call", [lambda m, v, k: m.add(v, k), lambda m, v, k: m.subtract(v, k),
                                  lambda m, v, k: add_all(v, [k], []), lambda m, v, k: add_all(v, [], [k])],
                         ids=["add", "subtract", "plus", "minus"])  # fmt: skip
@pytest.mark.parametrize(
    ("vector", "key", "match"),
    [
        (np.zeros(4, np.int32), KEY, "the vector is int32"),
        (np.zeros(4, np.uint64), KEY, "the vector is uint64"),
        (np.zeros(4, ">u4"), KEY, "the vector is >u4"),
        (np.zeros(4, np.float32), KEY, "the vector is float32"),
        (np.zeros((2, 2), np.uint32), KEY, r"of shape \(2, 2\)"),
        (np.zeros((), np.uint32), KEY, r"of shape \(\)"),
        (np.zeros(8, np.uint32)[::2], KEY, "strided view"),
        (np.zeros(8, np.uint32)[::-1], KEY, "strided view"),
        (np.frombuffer(bytes(16), np.uint32), KEY, "read-only: give a copy"),
        (np.zeros(4, np.uint32), KEY[:31], "has 31 bytes"),
        (np.zeros(4, np.uint32), KEY[:16], "has 16 bytes"),
        (np.zeros(4, np.uint32), b"", "has 0 bytes"),
        (np.zeros(4, np.uint32), KEY + b"\0", "has 33 bytes"),
    ],
)
def test_what_is_refused_changes_nothing(
    vector: np.ndarray, key: bytes, match: str, call: Callable[[Masker, np.ndarray, bytes], None]
) -> None:
    with pytest.raises(ValueError, match=match):
        call(Masker(), vector, key)
    assert not vector.any()


def test_one_bad_key_among_good_ones_leaves_the_vector_as_it_was() -> None:
    vector = np.zeros(4, np.uint32)
    with pytest.raises(ValueError, match="has 3 bytes"):
        add_all(vector, [KEY], [KEY, b"abc"])
    assert not vector.any()


def test_no_keystream_is_left_behind() -> None:
    masker, vector = Masker(), np.zeros(BLOCK + 9, np.uint32)
    masker.add(vector, KEY)
    assert not any(masker._stream)
    masker.subtract(vector[:7], KEY)
    assert not any(masker._stream)


def test_a_mask_takes_no_memory_of_the_vector_s_size() -> None:
    vector, masker = np.zeros(3_000_000, np.uint32), Masker()
    for call in (lambda: masker.add(vector, KEY), lambda: add_all(vector, [KEY] * 3, [KEY])):
        tracemalloc.start()
        call()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1_000_000


def test_uniform_words_are_uniform_and_fresh() -> None:
    drawn = uniform_words(1 << 16)
    assert drawn.shape == (1 << 16,) and drawn.dtype == np.uint32
    assert not np.array_equal(drawn, uniform_words(1 << 16))
    for byte in range(4):
        counts = np.bincount((drawn >> np.uint32(8 * byte)) & np.uint32(255), minlength=256)
        assert stats.chisquare(counts).pvalue > 1e-6
    assert len(np.unique(drawn)) > 65_000  # 0.5 pairs are expected to meet
    assert uniform_words(0).shape == (0,)
    with pytest.raises(ValueError, match="negative"):
        uniform_words(-1)
