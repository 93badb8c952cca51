"""Secure aggregation at 1.2 million numbers: a member's and the server's CPU time in a round, memory, upload."""

import tempfile
import time
import tracemalloc
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from fedmpt_core.secagg.client import SecAggClient
from fedmpt_core.secagg.encoding import Encoding
from tests.bench.measure import Row
from tests.secagg import MODEL, Federation, names

T = TypeVar("T")
WORDS, ROUNDS = 1_200_000, 3
CLIENT_MS = {10: 20, 30: 55, 100: 250}
SERVER_MS = {(10, 0): 20, (30, 0): 45, (100, 0): 130, (100, 20): 2000}
CASES = ((10, 0), (10, 2), (30, 0), (30, 6), (100, 0), (100, 20))


class Clock:
    """CPU time of chosen calls."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, call: Callable[[], T]) -> T:
        start = time.process_time()
        found = call()
        self.seconds += time.process_time() - start
        return found


def run() -> list[Row]:
    """Members, server, memory, upload."""
    torch.set_num_threads(1)
    rows = [_encoding()]
    for members, dropped in CASES:
        client, take, server, sent = least(members, dropped)
        lost = f", {dropped} lost" if dropped else ""
        if not dropped:
            bound = CLIENT_MS[members]
            rows.append(_ms(f"a member's round, {members} members, 1.2M words", client, bound))
            rows.append(_ms(f"the server adds a masked vector, {members} members", take, None))
            rows.append(Row(f"upload beyond 4 bytes a number, {members} members", f"{sent:,} B", "–", "–", "–", None))
        rows.append(
            _ms(f"the server opens a sum of {members} members{lost}", server, SERVER_MS.get((members, dropped)))
        )
    return [*rows, *_memory()]


@cache
def least(members: int, dropped: int) -> tuple[float, float, float, int]:
    """Least CPU seconds: a member's round, a vector taken, a sum opened; and bytes sent beyond the words."""
    federation = Federation(members, WORDS)
    vector = np.random.default_rng(0).integers(0, 2**32, WORDS, dtype=np.uint32)
    rounds = [
        _round(federation, vector, number, names(members)[members - dropped :]) for number in range(1, ROUNDS + 1)
    ]
    return *(min(r[i] for r in rounds) for i in range(3)), rounds[0][3]  # type: ignore[return-value]


def _round(federation: Federation, vector: np.ndarray, number: int, lost: list[str]) -> tuple[float, float, float, int]:
    server, client, take, opening = federation.server, Clock(), Clock(), Clock()
    watched, sent = "site-001", 0
    request = federation.begin(number)
    for name, member in federation.members.items():
        clock = client if name == watched else Clock()
        if name in lost:
            continue
        clock(lambda member=member: member.begin(request, MODEL))
        message = clock(lambda member=member: member.mask(vector))
        sent += len(message) - 4 * WORDS if name == watched else 0
        take(lambda name=name, message=message: server.take_masked(name, message))
    request = server.consistency_request()
    survivors = [n for n in federation.members if n not in lost]
    for name in survivors:
        reply = (client if name == watched else Clock())(
            lambda name=name: federation.members[name].consistency(request)
        )
        sent += len(reply) if name == watched else 0
        opening(lambda name=name, reply=reply: server.take_consistency(name, reply))
    for name, asked in opening(server.unmask_requests).items():
        clock = client if name == watched else Clock()
        reply = clock(lambda name=name, asked=asked: federation.members[name].unmask(asked))
        sent += len(reply) if name == watched else 0
        opening(lambda name=name, reply=reply: server.take_unmask(name, reply))
    found = opening(server.finish)
    expected = np.multiply(vector, np.uint32(len(survivors)))
    assert np.array_equal(found.words, expected)
    return client.seconds, take.seconds / len(survivors), opening.seconds, sent


def encoding_seconds() -> float:
    """Least CPU time to make words of an update."""
    encoding, update = Encoding(WORDS - 1), np.random.default_rng(0).normal(0, 1, WORDS - 1).astype(np.float32)
    best = float("inf")
    for _ in range(5):
        clock = Clock()
        clock(lambda: encoding.encode(update))
        best = min(best, clock.seconds)
    return best


def _encoding() -> Row:
    return _ms("encoding an update of 1.2M numbers, stochastic rounding", encoding_seconds(), None)


def _memory() -> list[Row]:
    federation = Federation(10, WORDS)
    vector = np.zeros(WORDS, dtype="<u4")
    request = federation.begin()
    with tempfile.TemporaryDirectory() as folder:
        for name, member in federation.members.items():
            member.begin(request, MODEL)
            if name == "site-001":
                client = _peak(lambda member=member: Path(folder, "site-001").write_bytes(member.mask(vector)))
                # answers are kept for a server that asks again, and count
            else:
                Path(folder, name).write_bytes(member.mask(vector))
            _forget(member)

        def taking() -> None:
            federation.begin()
            for name in federation.members:
                federation.server.take_masked(name, Path(folder, name).read_bytes())

        server = _peak(taking)
    return [
        Row("the server's memory while it adds 10 vectors, in vectors", f"{server:.2f}", "–", "–", "3", server <= 3),
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
