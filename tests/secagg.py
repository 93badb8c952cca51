"""Members and a server of the secure-aggregation protocol in one process, over the real bytes.

A test can put a hand between any two steps: every step is one call with bytes in and bytes out.
"""

import time
from collections.abc import Callable, Collection, Mapping
from functools import cache
from typing import Any

import numpy as np

from fedmpt_core.secagg.client import SecAggClient
from fedmpt_core.secagg.context import directory_digest, epoch_digest, model_digest
from fedmpt_core.secagg.identity import ChainCheck, SiteIdentity
from fedmpt_core.secagg.latch import Latch
from fedmpt_core.secagg.messages import Advertisement, Confirm, Deal, Deals, Directory
from fedmpt_core.secagg.policy import Floors, Terms
from fedmpt_core.secagg.server import SecAggServer, Sum

MODEL = model_digest({"state": np.arange(3, dtype="<f4")})
OTHER_MODEL = model_digest({"state": np.arange(1, 4, dtype="<f4")})
PHASES = ("advertise", "deal", "confirm", "train", "mask", "open")

_EPHEMERAL = SiteIdentity.ephemeral  # as it is before any test replaces it

Lost = Mapping[str, Collection[str]]
Change = Callable[[str, str, bytes], bytes]


@cache
def identity(name: str) -> SiteIdentity:
    """An ephemeral identity; making its key is slow, so each name keeps its own."""
    return _EPHEMERAL(name)


def names(count: int) -> list[str]:
    """Names whose order is that of their numbers."""
    return [f"site-{i:03d}" for i in range(count)]


def terms(words: int, *, min_cohort: int = 3, colluders: int = 1, job_id: str = "job-0", **changes: Any) -> Terms:
    """Terms of a small job."""
    limits = {"max_sites": 128, "first_round": 1, "rounds": 20, "attempts": 5} | changes
    return Terms(job_id, bytes(range(32)), words, Floors(min_cohort, colluders), **limits)


def member(
    name: str,
    agreed: Terms,
    latch: Latch | None = None,
    kind: type[SecAggClient] = SecAggClient,
    clock: Callable[[], float] = time.time,
) -> SecAggClient:
    """A member; what it remembers on disk is in `client.latch`."""
    return kind(agreed, identity(name), None, None, latch, lambda latch: None, clock=clock)


class Federation:
    """A server and its members, keys exchanged; `lost` members do not answer a phase, `change` may replace an answer.

    `directory` is the message with all adverts, `names` are in its order, `deals` has DLS1 by name, `digest` is the
    epoch's, `confirms` has the members' signatures over it by place.
    """

    def __init__(
        self,
        count: int,
        words: int = 8,
        *,
        lost: Lost | None = None,
        change: Change = lambda phase, name, data: data,
        kinds: Mapping[str, type[SecAggClient]] | None = None,
        latches: Mapping[str, Latch] | None = None,
        clock: Callable[[], float] = time.time,
        **limits: Any,
    ) -> None:
        """By name, `kinds` of members that are not honest ones, and `latches` of members that go on."""
        self.terms, kinds, latches = terms(words, **limits), kinds or {}, latches or {}
        self.server = SecAggServer(self.terms, ChainCheck(None), clock=clock)
        self.members = {
            n: member(n, self.terms, latches.get(n), kinds.get(n, SecAggClient), clock) for n in names(count)
        }
        self.exchange_keys(lost or {}, change)

    def exchange_keys(
        self, lost: Lost | None = None, change: Change = lambda phase, name, data: data, *, number: int = 1
    ) -> None:
        """A new epoch, for rounds of training from `number` on."""
        request, server, lost = self.server.open_epoch(number), self.server, lost or {}
        known = self._answering("advertise", list(self.members), lost)
        for name in known:
            server.take_advertisement(name, change("advertise", name, self.members[name].advertise(request)))
        self.directory, self.names, self.first = server.directory(), known, number
        for name in self._answering("deal", known, lost):
            server.take_deal(name, change("deal", name, self.members[name].deal(self.directory)))
        self.confirms: dict[int, bytes] = {}
        self.deals = server.deals()
        directory = directory_digest([(a.body, a.session) for a in self.adverts])
        self.digest = epoch_digest(directory, [deal.text for deal in self.dealings])
        for name in self._answering("confirm", list(self.deals), lost):
            reply = change("confirm", name, self.members[name].confirm(self.deals[name]))
            server.take_confirm(name, reply)
            confirm = Confirm.decode(reply)
            self.confirms[confirm.member] = confirm.signature

    @property
    def adverts(self) -> list[Advertisement]:
        """What the directory holds of each member."""
        return [Advertisement.decode(a) for a in Directory.decode(self.directory, self.terms.max_sites).adverts]

    @property
    def dealings(self) -> list[Deal]:
        """What all may see of the dealings."""
        sizes = {"members": len(self.names), "threshold": self.server.threshold}
        return list(Deals.decode(next(iter(self.deals.values())), **sizes).deals)

    def run(
        self,
        vectors: Mapping[str, np.ndarray],
        number: int = 1,
        attempt: int = 0,
        *,
        lost: Lost | None = None,
        change: Change = lambda phase, name, data: data,
    ) -> Sum:
        """One whole round. A member that is lost in `mask` costs a further list, without it."""
        lost, server = lost or {}, self.server
        request = server.open_round(number, attempt, MODEL)
        for name in self._answering("train", server.members, lost):
            self.members[name].begin(request, MODEL)
            server.take_ready(name, change("train", name, self.members[name].ready()))
        gone: list[str] = []
        while True:
            request = server.mask_request(gone)
            for name in self._answering("mask", server.cohort, lost):
                server.take_masked(name, change("mask", name, self.members[name].mask(request, vectors[name])))
            if not (gone := server.missing):
                break
        request = server.open_request()
        for name in self._answering("open", server.cohort, lost):
            server.take_opened(name, change("open", name, self.members[name].open(request)))
        return server.finish()

    def _answering(self, phase: str, chosen: Collection[str], lost: Lost) -> list[str]:
        return [n for n in chosen if n not in lost.get(phase, ())]


def vectors(count: int, words: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random words by member."""
    generator = np.random.default_rng(seed)
    return {n: generator.integers(0, 2**32, words, dtype=np.uint32) for n in names(count)}


def plain_sum(summands: Mapping[str, np.ndarray], chosen: Collection[str]) -> np.ndarray:
    """What the protocol must give, added up with Python's own integers."""
    columns = zip(*(summands[n].tolist() for n in chosen), strict=True)
    return np.array([sum(column) % 2**32 for column in columns], dtype=np.uint32)
