"""Secure aggregation at 1.2 million numbers: a member's and the server's CPU time in a round, memory, upload; and what
a key exchange costs before."""

import tempfile
import time
import tracemalloc
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from fedmpt_core.secagg.client import SecAggClient
from fedmpt_core.secagg.encoding import Encoding
from tests.bench.measure import Row
from tests.secagg import MODEL, Federation, names

T = TypeVar("T")
WORDS, ROUNDS = 1_200_000, 3
WATCHED = "site-001"
CLIENT_MS = {10: 20, 30: 55, 100: 250}
SERVER_MS = {(10, 0): 20, (30, 0): 45, (100, 0): 130, (100, 20): 130}
CASES = ((10, 0), (10, 2), (30, 0), (30, 6), (100, 0), (100, 20))


class Clock:
    """CPU time of chosen calls."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, call: Callable[..., T], *given: object) -> T:
        start = time.process_time()
        result = call(*given)
        self.seconds += time.process_time() - start
        return result


class Cost(NamedTuple):
    """Least CPU seconds, and bytes beyond the words.

    Attributes:
        client: a member's round.
        take: a vector taken by the server.
        opening: a sum opened.
        sent: by a member in a round.
        exchange: a member's key exchange.
        dealt: bytes of a member's dealing.
    """

    client: float
    take: float
    opening: float
    sent: int
    exchange: float
    dealt: int


def run() -> list[Row]:
    """Members, server, memory, upload."""
    torch.set_num_threads(1)
    rows = [_encoding()]
    for members, dropped in CASES:
        cost = least(members, dropped)
        lost = f", {dropped} lost" if dropped else ""
        if not dropped:
            rows.append(_ms(f"a member's round, {members} members, 1.2M words", cost.client, CLIENT_MS[members]))
            rows.append(_ms(f"the server adds a masked vector, {members} members", cost.take, None))
            rows.append(_bytes(f"upload beyond 4 bytes a number, {members} members", cost.sent))
            rows.append(_ms(f"a member's key exchange, {members} members", cost.exchange, None))
            rows.append(_bytes(f"a dealing, {members} members", cost.dealt))
        bound = SERVER_MS.get((members, dropped))
        rows.append(_ms(f"the server opens a sum of {members} members{lost}", cost.opening, bound))
    return [*rows, *_memory()]


@cache
def least(members: int, dropped: int) -> Cost:
    """Of several rounds, after one key exchange."""
    federation = Federation(members, WORDS)
    exchange, dealt = _exchange(federation)
    vector = np.random.default_rng(0).integers(0, 2**32, WORDS, dtype=np.uint32)
    rounds = [
        _round(federation, vector, number, names(members)[members - dropped :]) for number in range(1, ROUNDS + 1)
    ]
    client, take, opening = (min(one[i] for one in rounds) for i in range(3))
    return Cost(client, take, opening, rounds[0][3], exchange, dealt)


def _exchange(federation: Federation) -> tuple[float, int]:
    """A key exchange again, in which one member is watched."""
    server, clock, sizes = federation.server, Clock(), list[int]()
    other, members = Clock(), federation.members

    def watched(name: str) -> Clock:
        return clock if name == WATCHED else other

    request = server.open_epoch(1)
    for name, one in members.items():
        server.take_advertisement(name, watched(name)(one.advertise, request))
    request = server.directory()
    for name, one in members.items():
        data = watched(name)(one.deal, request)
        sizes.append(len(data))
        server.take_deal(name, data)
    for name, request in server.deals().items():
        server.take_confirm(name, watched(name)(members[name].confirm, request))
    return clock.seconds, sizes[0]


def _round(federation: Federation, vector: np.ndarray, number: int, lost: list[str]) -> tuple[float, float, float, int]:
    """A round that some members begin and do not end."""
    server, client, take, opening = federation.server, Clock(), Clock(), Clock()
    members, other, sent = federation.members, Clock(), 0
    left = [name for name in members if name not in lost]

    def watched(name: str, call: Callable[..., bytes], *given: object) -> bytes:
        nonlocal sent
        data = (client if name == WATCHED else other)(call, *given)
        sent += len(data or b"") if name == WATCHED else 0
        return data

    request = server.open_round(number, 0, MODEL)
    for name, one in members.items():
        watched(name, one.begin, request, MODEL)
        server.take_ready(name, watched(name, one.ready))
    request = server.mask_request(lost)
    for name in left:
        take(server.take_masked, name, watched(name, members[name].mask, request, vector))
    request = server.open_request()
    for name in left:
        opening(server.take_opened, name, watched(name, members[name].open, request))
    total = opening(server.finish)
    assert np.array_equal(total.words, np.multiply(vector, np.uint32(len(left))))
    return client.seconds, take.seconds / len(left), opening.seconds, sent - 4 * WORDS


def encoding_seconds() -> float:
    """Least CPU time to make words of an update."""
    encoding, update = Encoding(WORDS), np.random.default_rng(0).normal(0, 1, WORDS).astype(np.float32)
    best = float("inf")
    for _ in range(5):
        clock = Clock()
        clock(encoding.encode, update)
        best = min(best, clock.seconds)
    return best


def _encoding() -> Row:
    return _ms("encoding an update of 1.2M numbers, stochastic rounding", encoding_seconds(), None)


def _memory() -> list[Row]:
    federation = Federation(10, WORDS)
    server, vector, members = federation.server, np.zeros(WORDS, dtype="<u4"), federation.members
    request = server.open_round(1, 0, MODEL)
    for name, one in members.items():
        one.begin(request, MODEL)
        server.take_ready(name, one.ready())
    request, client = server.mask_request(), 0.0
    with tempfile.TemporaryDirectory() as folder:
        for name, one in members.items():
            # answers are kept for a server that asks again, and count
            peak = _peak(lambda one=one, name=name: Path(folder, name).write_bytes(one.mask(request, vector)))
            client = peak if name == WATCHED else client
            _forget(one)

        def taking() -> None:
            for name in members:
                server.take_masked(name, Path(folder, name).read_bytes())

        memory = _peak(taking)
    return [
        Row("the server's memory while it adds 10 vectors, in vectors", f"{memory:.2f}", "–", "–", "3", memory <= 3),
        Row("a member's memory while it masks, in vectors", f"{client:.2f}", "–", "–", "2", client <= 2.05),
    ]


def _forget(member: SecAggClient) -> None:
    member._answers.clear()  # ten members in one process would keep ten vectors


def _peak(call: Callable[[], object]) -> float:
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / (4 * WORDS)


def _ms(what: str, seconds: float, bound: float | None) -> Row:
    good = None if bound is None else 1000 * seconds <= bound
    return Row(f"{what} (CPU-ms)", f"{1000 * seconds:.1f}", "–", "–", f"{bound}" if bound else "–", good)


def _bytes(what: str, count: int) -> Row:
    return Row(what, f"{count:,} B", "–", "–", "–", None)
