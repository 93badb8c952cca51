"""Keys of an edge: known answers, both ends alike, a ratchet that goes forward, rows that open only where meant."""

import copy
import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import independent
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from fedmpt_core.secagg import keys
from fedmpt_core.secagg.errors import Abort, SecAggError
from fedmpt_core.secagg.keys import PairwiseKeys, commit_edge, commit_self, self_mask_key

ALL = json.loads((Path(__file__).parents[2] / "vectors" / "secagg_primitives.json").read_text())
PUBLISHED, VECTORS = ALL["published"], ALL["keys"]
CTX, JOB, DIRECTORY = (bytes.fromhex(VECTORS[name]) for name in ("context", "job", "directory"))
PRIVATE = {int(member): bytes.fromhex(key) for member, key in VECTORS["private"].items()}
PUBLIC = {int(member): bytes.fromhex(key) for member, key in VECTORS["public"].items()}
DIGEST = st.binary(min_size=32, max_size=32)


def member(own: int, *, round_number: int = VECTORS["round"], directory: bytes = DIRECTORY) -> PairwiseKeys:
    """A member of the vectors' cohort."""
    private = X25519PrivateKey.from_private_bytes(PRIVATE[own])
    found = PairwiseKeys(own, private, {i: p for i, p in PUBLIC.items() if i != own}, JOB, directory)
    found.advance(round_number)
    return found


@contextmanager
def refused(code: Abort, culprit: int | None = None) -> Iterator[None]:
    """Expects a SecAggError of this code and culprit."""
    with pytest.raises(SecAggError) as refusal:
        yield
    assert (refusal.value.code, refusal.value.culprit) == (code, culprit)


def test_the_labels_reproduce_the_frozen_answers_of_the_suite() -> None:
    assert CTX.hex() == "7d404d31bfcf5f8aa085467a874c6c57a1785300e999ee4dc6637f476edcb2a3"
    pair = member(0)
    edge = pair.edge_seed(1, CTX)
    assert edge.hex() == "af918d5b983bd805d935f5f9f451c77fa2f53dee9540aae721298fac1d2d1fdf"
    assert pair._share_key(0, 1, CTX)[0].hex() == "fee381e6e01445622f6db7fd5ca484e1976a39c77abe7f81af9abb11b9f0e3df"
    own = self_mask_key(bytes(32), CTX)
    assert own.hex() == "2b1c62d0cb10f081e73d049cf9a7f04295fffaed062aa9d0e429bc5f39adead4"
    said = commit_self(bytes(32), CTX)
    assert said.hex() == "602a8ebc59288f0f108d926d1bb425ca5b987eadbfb90a5801b18928d8e0298a"
    known = commit_edge(edge, CTX, 1, 0)
    assert known.hex() == "c3be04c924ab19551bf3b2760ef8dfc9578c864f4272ec42dfae616bf1c5d3d0"


@pytest.mark.parametrize("edge", VECTORS["edges"], ids=lambda e: f"{e['one']}-{e['other']}")
def test_an_edge_at_both_ends(edge: dict[str, Any]) -> None:
    one, other = edge["one"], edge["other"]
    for own, peer in ((one, other), (other, one)):
        fresh, then = member(own, round_number=0), member(own)
        assert b"".join(fresh._chains[peer]).hex() == edge["root"]
        assert [bytes(chain).hex() for chain in then._chains[peer]] == [edge["mask_chain"], edge["share_chain"]]
        seed = then.edge_seed(peer, CTX)
        assert seed.hex() == edge["edge_seed"]
        assert commit_edge(seed, CTX, own, peer).hex() == edge["commitment"]
    for share in edge["shares"]:
        row, sealed = bytes.fromhex(share["row"]), bytes.fromhex(share["sealed"])
        assert member(share["from"]).seal(share["to"], CTX, row) == sealed
        assert member(share["to"]).open(share["from"], CTX, sealed) == row


@pytest.mark.parametrize("edge", VECTORS["edges"], ids=lambda e: f"{e['one']}-{e['other']}")
def test_the_second_implementation_gives_the_same_edge(edge: dict[str, Any]) -> None:
    one, other, rounds = edge["one"], edge["other"], VECTORS["round"]
    assert independent.x25519(PRIVATE[one], PUBLIC[other]).hex() == edge["shared"]
    root = independent.root(PRIVATE[other], PUBLIC[one], JOB, DIRECTORY, other, one)
    masks, shares = independent.chain(root[:32], rounds), independent.chain(root[32:], rounds)
    assert (root.hex(), masks.hex(), shares.hex()) == (edge["root"], edge["mask_chain"], edge["share_chain"])
    seed = independent.edge_seed(masks, CTX)
    assert seed.hex() == edge["edge_seed"]
    assert independent.commit_edge(seed, CTX, other, one).hex() == edge["commitment"]
    for share in edge["shares"]:
        info = independent.share_info(CTX, share["from"], share["to"])
        key = independent.derive(shares, info)
        assert key.hex() == share["key"]
        assert independent.gcm(key, bytes(12), bytes.fromhex(share["row"]), info).hex() == share["sealed"]


@pytest.mark.parametrize("case", VECTORS["self"])
def test_the_self_mask(case: dict[str, str]) -> None:
    seed = bytes.fromhex(case["seed"])
    assert self_mask_key(seed, CTX).hex() == independent.self_mask_key(seed, CTX).hex() == case["key"]
    assert commit_self(seed, CTX).hex() == independent.commit_self(seed, CTX).hex() == case["commitment"]


def test_public_keys_of_the_second_implementation() -> None:
    assert {i: independent.public_key(k) for i, k in PRIVATE.items()} == PUBLIC


@pytest.mark.parametrize("case", PUBLISHED["rfc7748"])
def test_rfc_7748(case: dict[str, str]) -> None:
    scalar, point = bytes.fromhex(case["scalar"]), bytes.fromhex(case["u"])
    assert independent.x25519(scalar, point).hex() == case["out"]
    pair = PairwiseKeys(0, X25519PrivateKey.from_private_bytes(scalar), {1: point}, JOB, DIRECTORY)
    root = independent.derive(bytes.fromhex(case["out"]), b"root" + JOB + DIRECTORY + bytes([0, 0, 0, 1]), 64)
    assert b"".join(pair._chains[1]) == root


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


@pytest.mark.parametrize("case", VECTORS["bad_sealed"], ids=lambda case: case["what"])
def test_a_row_that_is_not_from_member_0_to_1_in_this_round_does_not_open(case: dict[str, str]) -> None:
    with refused(Abort.BAD_SHARE, 0):
        member(1).open(0, CTX, bytes.fromhex(case["sealed"]))


@given(DIGEST, DIGEST, DIGEST, st.integers(0, 65535), st.integers(0, 65535), st.integers(0, 3), st.binary(max_size=99))
def test_both_ends_agree_and_as_the_second_implementation(
    secret: bytes, ctx: bytes, directory: bytes, one: int, other: int, rounds: int, row: bytes
) -> None:
    if one == other:
        other ^= 1
    mine = X25519PrivateKey.from_private_bytes(secret)
    yours = X25519PrivateKey.generate()
    public = yours.public_key().public_bytes_raw()
    a = PairwiseKeys(one, mine, {other: public}, JOB, directory)
    b = PairwiseKeys(other, yours, {one: mine.public_key().public_bytes_raw()}, JOB, directory)
    a.advance(rounds)
    b.advance(rounds)
    assert a.edge_seed(other, ctx) == b.edge_seed(one, ctx)
    assert b.open(one, ctx, a.seal(other, ctx, row)) == row
    root = independent.root(secret, public, JOB, directory, one, other)
    assert a.edge_seed(other, ctx) == independent.edge_seed(independent.chain(root[:32], rounds), ctx)


@given(st.lists(st.integers(0, 12), max_size=5))
def test_a_jump_ends_where_single_steps_end(stops: list[int]) -> None:
    stepwise, jump = member(0, round_number=0), member(0, round_number=0)
    for stop in sorted(stops):
        stepwise.advance(stop)
        stepwise.advance(stop)
    jump.advance(max(stops, default=0))
    assert stepwise.edge_seed(1, CTX) == jump.edge_seed(1, CTX)
    assert stepwise.seal(1, CTX, b"row") == jump.seal(1, CTX, b"row")


def test_no_key_comes_twice() -> None:
    other_ctx = bytes(32)
    found = [pair.edge_seed(peer, ctx) for r in range(4) for pair in [member(0, round_number=r)]
             for peer in (1, 2) for ctx in (CTX, other_ctx)]  # fmt: skip
    found += [pair._share_key(*way, ctx)[0] for r in range(4) for pair in [member(0, round_number=r)]
              for way in ((0, 1), (1, 0), (0, 2), (2, 0)) for ctx in (CTX, other_ctx)]  # fmt: skip
    found += [member(0, directory=bytes(32)).edge_seed(1, CTX)]
    found += [bytes(chain) for chains in member(0)._chains.values() for chain in chains]
    found += [self_mask_key(bytes(32), ctx) for ctx in (CTX, other_ctx)]
    assert len(set(found)) == len(found)


def test_a_ratchet_does_not_go_back_and_overwrites() -> None:
    pair = member(0)
    before = [(chain, bytes(chain)) for chains in pair._chains.values() for chain in chains]
    with refused(Abort.CTX_MISMATCH):
        pair.advance(VECTORS["round"] - 1)
    assert all(chain == copied for chain, copied in before)
    pair.advance(VECTORS["round"] + 1)
    assert all(chain != copied for chain, copied in before)  # the same bytearrays hold other keys


def test_erased_keys_are_gone_and_every_use_is_refused() -> None:
    pair = member(0)
    sealed = member(1).seal(0, CTX, b"row")
    held = [chain for chains in pair._chains.values() for chain in chains]
    pair.erase()
    pair.erase()
    assert all(chain == bytes(32) for chain in held)
    for use in (
        lambda: pair.edge_seed(1, CTX),
        lambda: pair.seal(1, CTX, b"row"),
        lambda: pair.open(1, CTX, sealed),
        lambda: pair.advance(VECTORS["round"]),
        lambda: pair.advance(VECTORS["round"] + 1),
    ):
        with refused(Abort.CTX_MISMATCH):
            use()


@pytest.mark.parametrize("stranger", [0, 3, -1, 65536])
def test_only_edges_to_peers_of_the_epoch(stranger: int) -> None:
    pair = member(0)
    for use in (
        lambda: pair.edge_seed(stranger, CTX),
        lambda: pair.seal(stranger, CTX, b""),
        lambda: pair.open(stranger, CTX, bytes(16)),
    ):
        with refused(Abort.ROSTER):
            use()


def test_no_secret_in_repr_or_errors_or_copies() -> None:
    pair = member(1)
    secrets = [PRIVATE[1], *(bytes(chain) for chains in pair._chains.values() for chain in chains)]
    secrets += [pair.edge_seed(0, CTX), pair._share_key(0, 1, CTX)[0], pair._share_key(1, 0, CTX)[0]]
    said = [repr(pair), str(pair), f"{pair:}"]
    for use in (
        lambda: pair.open(0, CTX, bytes(99)),
        lambda: pair.edge_seed(9, CTX),
        lambda: pair.edge_seed(0, bytes(31)),
        lambda: pair.advance(0),
        lambda: self_mask_key(secrets[1][:31], CTX),
        lambda: commit_edge(secrets[1] + b"\0", CTX, 0, 1),
    ):
        with pytest.raises(ValueError) as refusal:
            use()
        said += [str(refusal.value), repr(refusal.value), repr(refusal.value.__dict__)]
    text = "\n".join(said)
    assert repr(pair) == "PairwiseKeys(member 1, 2 edges, round 7)"
    for secret in secrets:
        assert secret.hex()[:16] not in text.lower()
        assert repr(secret)[2:-1][:12] not in text
    for copies in (pickle.dumps, copy.copy, copy.deepcopy):
        with refused(Abort.POLICY):
            copies(pair)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: self_mask_key(bytes(31), CTX), "a seed has 31 bytes"),
        (lambda: self_mask_key(bytes(32), CTX[1:]), "the ctx digest has 31 bytes"),
        (lambda: commit_self(bytes(33), CTX), "a seed has 33 bytes"),
        (lambda: commit_self(bytes(31), CTX + b"\0"), "the ctx digest has 33 bytes"),
        (lambda: commit_edge(bytes(32), CTX, 0, 65536), "member id 65536"),
        (lambda: commit_edge(bytes(32), CTX, -1, 1), "member id -1"),
        (lambda: commit_edge(bytes(32), CTX, 4, 4), "both are member 4"),
        (lambda: PairwiseKeys(0, X25519PrivateKey.generate(), {1: PUBLIC[1]}, JOB[1:], DIRECTORY), "job digest"),
        (lambda: PairwiseKeys(0, X25519PrivateKey.generate(), {1: PUBLIC[1]}, JOB, b""), "directory digest"),
        (lambda: PairwiseKeys(0, X25519PrivateKey.generate(), {65536: PUBLIC[1]}, JOB, DIRECTORY), "member id 65536"),
        (lambda: PairwiseKeys(7, X25519PrivateKey.generate(), {7: PUBLIC[1]}, JOB, DIRECTORY), "own peer"),
    ],
)
def test_lengths_and_ids_are_checked(call: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()


def test_commitments_bind_every_field() -> None:
    edge = bytes(range(32))
    found = [
        commit_edge(edge, CTX, 0, 1),
        commit_edge(edge, CTX, 0, 2),
        commit_edge(edge, CTX, 1, 2),
        commit_edge(edge, bytes(32), 0, 1),
        commit_edge(bytes(32), CTX, 0, 1),
        commit_self(edge, CTX),
        commit_self(edge, bytes(32)),
        commit_self(bytes(32), CTX),
    ]
    assert len(set(found)) == len(found)
    assert commit_edge(edge, CTX, 300, 2) == commit_edge(edge, CTX, 2, 300)
