"""The secret generator: AES-CTR against a known answer, streams that never repeat, tails, and what it refuses."""

import copy
import os
import pickle

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from scipy import stats

from fedmpt_core.privacy.mechanism.keystream import Keystream, KeystreamError

KEY = bytes(range(32))


def test_words_are_the_aes_ctr_stream_of_the_purpose_s_key() -> None:
    secret = HKDFExpand(SHA256(), 32, b"fedmpt/1/noise").derive(KEY)
    stream = Cipher(algorithms.AES256(secret), modes.CTR(bytes(16))).encryptor().update(bytes(80))
    keystream = Keystream(KEY)
    drawn = np.concatenate((keystream.words("noise", 3), keystream.words("noise", 0), keystream.words("noise", 7)))
    assert drawn.tobytes() == stream


def test_purposes_and_keystreams_differ() -> None:
    one, other = Keystream(), Keystream()
    draws = [k.words(p, 4).tobytes() for k in (one, other) for p in ("noise", "sampling")]
    draws += [one.words("noise", 4).tobytes()]
    assert len(set(draws)) == 5
    assert one.key_id != other.key_id
    assert Keystream(KEY).key_id == Keystream(KEY).key_id


@pytest.mark.parametrize("count", [0, 1, 2, 999])
def test_as_many_normals_as_asked_for(count: int) -> None:
    assert Keystream().normals("noise", count).shape == (count,)


def test_normals_are_normal_and_independent_of_each_other() -> None:
    drawn = Keystream(KEY).normals("noise", 200_000)
    assert stats.kstest(drawn, "norm").pvalue > 1e-3
    assert abs(np.corrcoef(drawn[:100_000], drawn[100_000:])[0, 1]) < 0.015
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.01
    # the radius and angle of a pair come from different words
    assert stats.kstest(np.square(drawn[:100_000]) + np.square(drawn[100_000:]), "expon", args=(0, 2)).pvalue > 1e-3


class Scripted(Keystream):
    """A keystream that gives chosen words."""

    def __init__(self, *words: int) -> None:
        super().__init__()
        self.chosen = np.array(words, dtype="<u8")

    def words(self, purpose: str, count: int) -> np.ndarray:
        assert count == len(self.chosen)
        return self.chosen


@pytest.mark.parametrize(
    ("words", "radius"),
    [
        ((0, 0, 0), np.sqrt(2 * 106 * np.log(2))),  # the least uniform is 2^-106: 12.1 standard deviations
        ((2**64 - 1, 2**64 - 1, 0), 0.0),  # the largest is 1
        ((1 << 63, 0, 0), np.sqrt(2 * np.log(2))),
    ],
)
def test_the_radius_at_the_ends_of_the_uniform(words: tuple[int, int, int], radius: float) -> None:
    assert Scripted(*words).normals("noise", 1)[0] == pytest.approx(radius, abs=1e-7)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forks beside threads; this child starts none
def test_a_forked_child_may_not_go_on_with_the_parent_s_stream() -> None:
    keystream = Keystream()
    keystream.words("noise", 1)
    child = os.fork()
    if child == 0:
        try:
            keystream.words("noise", 1)
            os._exit(0)
        except KeystreamError as error:
            os._exit(7 if "draw a new Keystream" in str(error) else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert len(keystream.words("noise", 1)) == 1


def test_the_key_shows_nowhere_and_cannot_be_copied() -> None:
    keystream = Keystream(KEY)
    assert KEY.hex() not in repr(keystream) + keystream.key_id
    for copies in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(KeystreamError, match="copied or stored"):
            copies(keystream)
    with pytest.raises(ValueError, match="the key has 3 bytes"):
        Keystream(b"abc")
