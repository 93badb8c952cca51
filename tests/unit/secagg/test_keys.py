"""Keys of an edge: known answers, both ends alike, a ratchet that goes forward, rows that open only where meant."""

import copy
import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import permutations
from pathlib import Path
from typing import Any

import independent
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from fedmpt_core.secagg import keys
from fedmpt_core.secagg.errors import Abort, SecAggError
from fedmpt_core.secagg.keys import PairwiseKeys, self_mask_key, usable

ALL = json.loads((Path(__file__).parents[2] / "vectors" / "secagg_primitives.json").read_text())
PUBLISHED, VECTORS = ALL["published"], ALL["keys"]
CTX, JOB, DIRECTORY = (bytes.fromhex(VECTORS[name]) for name in ("context", "job", "directory"))
PRIVATE = {int(member): bytes.fromhex(key) for member, key in VECTORS["private"].items()}
PUBLIC = {int(member): bytes.fromhex(key) for member, key in VECTORS["public"].items()}
DIGEST = st.binary(min_size=32, max_size=32)


def member(own: int, *, slot: int = VECTORS["slot"], directory: bytes = DIRECTORY) -> PairwiseKeys:
    """A member of the vectors' directory."""
    private = X25519PrivateKey.from_private_bytes(PRIVATE[own])
    pairs = PairwiseKeys(own, private, {i: p for i, p in PUBLIC.items() if i != own}, JOB, directory)
    pairs.advance(slot)
    return pairs


@contextmanager
def refused(code: Abort, culprit: int | None = None) -> Iterator[None]:
    """Expects a SecAggError of this code and culprit."""
    with pytest.raises(SecAggError) as refusal:
        yield
    assert (refusal.value.code, refusal.value.culprit) == (code, culprit)


def test_the_labels_reproduce_the_frozen_answers_of_the_suite() -> None:
    assert CTX.hex() == "6fad50b76bd5459c6c7474954292139958e896138ae4271bd6914e37a00b5225"
    assert member(0).edge_seed(1, CTX).hex() == "cfdbad3c1716293826da21df2200feecc2b1ab14241c2973009f8e3782ba9f47"
    own = self_mask_key(bytes(33), CTX)
    assert own.hex() == "0a8e574df8f8346538e62ddb0c06b4ecb5e5b1fc3c6fb4d04d0375f6ea1b69d8"


@pytest.mark.parametrize("edge", VECTORS["edges"], ids=lambda e: f"{e['one']}-{e['other']}")
def test_an_edge_at_both_ends(edge: dict[str, Any]) -> None:
    for own, peer in ((edge["one"], edge["other"]), (edge["other"], edge["one"])):
        assert member(own).edge_seed(peer, CTX).hex() == edge["edge_seed"]
    for one in edge["rows"]:
        row, sealed = bytes.fromhex(one["row"]), bytes.fromhex(one["sealed"])
        assert member(one["from"]).seal(one["to"], row) == sealed
        assert member(one["to"]).open(one["from"], sealed) == row


@pytest.mark.parametrize("edge", VECTORS["edges"], ids=lambda e: f"{e['one']}-{e['other']}")
def test_the_second_implementation_gives_the_same_edge(edge: dict[str, Any]) -> None:
    one, other = edge["one"], edge["other"]
    assert independent.x25519(PRIVATE[one], PUBLIC[other]).hex() == edge["shared"]
    root = independent.root(PRIVATE[other], PUBLIC[one], JOB, DIRECTORY, other, one)
    masks = independent.chain(root[:32], VECTORS["slot"])
    assert (root.hex(), masks.hex()) == (edge["root"], edge["mask_chain"])
    assert independent.edge_seed(masks, CTX).hex() == edge["edge_seed"]
    for sent in edge["rows"]:
        info = independent.row_info(sent["from"], sent["to"])
        key = independent.derive(root[32:], info)
        assert key.hex() == sent["key"]
        assert independent.gcm(key, bytes(12), bytes.fromhex(sent["row"]), info).hex() == sent["sealed"]


@pytest.mark.parametrize("case", VECTORS["self"])
def test_the_self_mask(case: dict[str, str]) -> None:
    seed = bytes.fromhex(case["seed"])
    assert self_mask_key(seed, CTX).hex() == independent.self_mask_key(seed, CTX).hex() == case["key"]


def test_public_keys_of_the_second_implementation() -> None:
    assert {i: independent.public_key(k) for i, k in PRIVATE.items()} == PUBLIC


@pytest.mark.parametrize("case", PUBLISHED["rfc7748"])
def test_rfc_7748(case: dict[str, str]) -> None:
    scalar, point = bytes.fromhex(case["scalar"]), bytes.fromhex(case["u"])
    assert independent.x25519(scalar, point).hex() == case["out"]
    pair = PairwiseKeys(0, X25519PrivateKey.from_private_bytes(scalar), {1: point}, JOB, DIRECTORY)
    root = independent.derive(bytes.fromhex(case["out"]), b"root" + JOB + DIRECTORY + bytes([0, 0, 0, 1]), 64)
    assert pair.edge_seed(1, CTX) == independent.edge_seed(root[:32], CTX)


@pytest.mark.parametrize("case", PUBLISHED["rfc5869"])
def test_rfc_5869(case: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    secret, salt, info = (bytes.fromhex(case[name]) for name in ("ikm", "salt", "info"))
    length = len(case["okm"]) // 2
    assert independent.hkdf(secret, salt, info, length).hex() == case["okm"]
    monkeypatch.setattr(keys, "SALT", salt)
    assert keys._hkdf(secret, info, length).hex() == case["okm"]


@pytest.mark.parametrize("case", PUBLISHED["gcm test case 16"])
def test_gcm_of_the_second_implementation(case: dict[str, str]) -> None:
    arguments = (bytes.fromhex(case[name]) for name in ("key", "nonce", "text", "extra"))
    assert independent.gcm(*arguments).hex() == case["sealed"]


@pytest.mark.parametrize("case", VECTORS["bad_public"], ids=lambda case: case["what"])
def test_a_peer_without_a_usable_key_is_named(case: dict[str, str]) -> None:
    private = X25519PrivateKey.from_private_bytes(PRIVATE[0])
    with refused(Abort.ROSTER, 5):
        PairwiseKeys(0, private, {1: PUBLIC[1], 5: bytes.fromhex(case["key"])}, JOB, DIRECTORY)
    assert not usable(bytes.fromhex(case["key"]))
    assert usable(PUBLIC[1])


@pytest.mark.parametrize("case", VECTORS["bad_sealed"], ids=lambda case: case["what"])
def test_a_row_that_is_not_from_member_0_to_1_in_this_directory_does_not_open(case: dict[str, str]) -> None:
    with refused(Abort.BAD_SHARE, 0):
        member(1).open(0, bytes.fromhex(case["sealed"]))


@given(DIGEST, DIGEST, DIGEST, st.integers(0, 65535), st.integers(0, 65535), st.integers(0, 3), st.binary(max_size=99))
def test_both_ends_agree_and_as_the_second_implementation(
    secret: bytes, ctx: bytes, directory: bytes, one: int, other: int, slot: int, row: bytes
) -> None:
    if one == other:
        other ^= 1
    mine = X25519PrivateKey.from_private_bytes(secret)
    yours = X25519PrivateKey.generate()
    public = yours.public_key().public_bytes_raw()
    a = PairwiseKeys(one, mine, {other: public}, JOB, directory)
    b = PairwiseKeys(other, yours, {one: mine.public_key().public_bytes_raw()}, JOB, directory)
    a.advance(slot)
    b.advance(slot)
    assert a.edge_seed(other, ctx) == b.edge_seed(one, ctx)
    assert b.open(one, a.seal(other, row)) == row
    root = independent.root(secret, public, JOB, directory, one, other)
    assert a.edge_seed(other, ctx) == independent.edge_seed(independent.chain(root[:32], slot), ctx)


@given(st.lists(st.integers(0, 12), max_size=5))
def test_a_jump_ends_where_single_steps_end(stops: list[int]) -> None:
    stepwise, jump = member(0, slot=0), member(0, slot=0)
    for stop in sorted(stops):
        stepwise.advance(stop)
        stepwise.advance(stop)
    jump.advance(max(stops, default=0))
    assert stepwise.edge_seed(1, CTX) == jump.edge_seed(1, CTX)


def test_no_key_comes_twice() -> None:
    contexts, pairs = (CTX, bytes(32)), [member(0, slot=slot) for slot in range(4)]
    seeds = [pair.edge_seed(peer, ctx) for pair in pairs for peer in (1, 2) for ctx in contexts]
    seeds += [member(0, directory=bytes(32)).edge_seed(1, CTX), *(self_mask_key(bytes(33), ctx) for ctx in contexts)]
    assert len(set(seeds)) == len(seeds)
    sealed = [member(one).seal(other, bytes(40)) for one, other in permutations(range(3), 2)]
    assert len({text[:32] for text in sealed}) == 6  # of one row under one nonce: keys differ by pair and direction


def test_a_ratchet_does_not_go_back_and_overwrites() -> None:
    pair, slot = member(0), VECTORS["slot"]
    seed = pair.edge_seed(1, CTX)
    with refused(Abort.CTX_MISMATCH):
        pair.advance(slot - 1)
    assert pair.edge_seed(1, CTX) == seed
    held = [bytes(chain) for chain in _bytearrays(pair)]
    pair.advance(slot + 1)
    assert not {bytes(chain) for chain in _bytearrays(pair)} & set(held[: len(PUBLIC) - 1])
    assert pair.edge_seed(1, CTX) != seed


def test_keys_of_rows_go_alone_and_erased_keys_are_gone() -> None:
    pair, sealed = member(0), member(1).seal(0, b"row")
    held = _bytearrays(pair)
    pair.forget_rows()
    for use in (lambda: pair.seal(1, b"row"), lambda: pair.open(1, sealed)):
        with refused(Abort.ROSTER):
            use()
    assert pair.edge_seed(1, CTX) == member(0).edge_seed(1, CTX)
    pair.erase()
    pair.erase()
    assert all(chain == bytes(32) for chain in held)
    with refused(Abort.ROSTER):
        pair.edge_seed(1, CTX)


def _bytearrays(pair: PairwiseKeys) -> list[bytearray]:
    """Whatever it keeps its keys in, chains before row secrets."""
    return [key for keys in vars(pair).values() if isinstance(keys, dict) for key in keys.values()]


@pytest.mark.parametrize("stranger", [0, 3, 65535])
def test_only_edges_to_peers_of_the_epoch(stranger: int) -> None:
    pair = member(0)
    for use in (
        lambda: pair.edge_seed(stranger, CTX),
        lambda: pair.seal(stranger, b""),
        lambda: pair.open(stranger, bytes(16)),
    ):
        with refused(Abort.ROSTER):
            use()


def test_no_secret_in_repr_or_errors_or_copies() -> None:
    pair = member(1)
    secrets = [PRIVATE[1], *map(bytes, _bytearrays(pair)), pair.edge_seed(0, CTX)]
    assert len(secrets) == 6
    texts = [repr(pair), str(pair), f"{pair:}"]
    for use in (
        lambda: pair.open(0, bytes(99)),
        lambda: pair.edge_seed(9, CTX),
        lambda: pair.edge_seed(0, bytes(31)),
        lambda: pair.advance(0),
        lambda: self_mask_key(secrets[1], CTX[1:]),
    ):
        with pytest.raises(ValueError) as refusal:
            use()
        texts += [str(refusal.value), repr(refusal.value), repr(refusal.value.__dict__)]
    text = "\n".join(texts)
    assert repr(pair) == "PairwiseKeys(member 1, 2 edges, slot 7)"
    for secret in secrets:
        assert secret.hex()[:16] not in text.lower()
        assert repr(secret)[2:-1][:12] not in text
    for copies in (pickle.dumps, copy.copy, copy.deepcopy):
        with refused(Abort.POLICY):
            copies(pair)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: self_mask_key(bytes(33), CTX[1:]), "the ctx digest has 31 bytes"),
        (lambda: member(0).edge_seed(1, CTX + b"\0"), "the ctx digest has 33 bytes"),
        (lambda: PairwiseKeys(0, X25519PrivateKey.generate(), {1: PUBLIC[1]}, JOB[1:], DIRECTORY), "job digest"),
        (lambda: PairwiseKeys(0, X25519PrivateKey.generate(), {1: PUBLIC[1]}, JOB, b""), "directory digest"),
        (lambda: PairwiseKeys(0, X25519PrivateKey.generate(), {65536: PUBLIC[1]}, JOB, DIRECTORY), "member id 65536"),
        (lambda: PairwiseKeys(7, X25519PrivateKey.generate(), {7: PUBLIC[1]}, JOB, DIRECTORY), "own peer"),
    ],
)
def test_lengths_and_ids_are_checked(call: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()
