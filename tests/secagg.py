"""Members and a server of the secure-aggregation protocol in one process, over the real bytes.

A test can put a hand between any two steps: every step is one call with bytes in and bytes out.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache

import numpy as np

from fedmpt_core.secagg.client import SecAggClient
from fedmpt_core.secagg.context import model_digest
from fedmpt_core.secagg.identity import ChainCheck, SiteIdentity
from fedmpt_core.secagg.latch import Latch
from fedmpt_core.secagg.messages import Advertisement, Confirm, Directory
from fedmpt_core.secagg.policy import Floors, Terms
from fedmpt_core.secagg.server import SecAggServer, Sum

MODEL = model_digest({"state": np.arange(3, dtype="<f4")})
OTHER_MODEL = model_digest({"state": np.arange(1, 4, dtype="<f4")})
PHASES = ("advertise", "confirm", "masked", "consistency", "unmask")


_EPHEMERAL = SiteIdentity.ephemeral  # as it is before any test replaces it


@cache
def identity(name: str) -> SiteIdentity:
    """An ephemeral identity; making its key is slow, so each name keeps its own."""
    return _EPHEMERAL(name)


def names(count: int) -> list[str]:
    """Names whose order is that of their numbers."""
    return [f"site-{i:03d}" for i in range(count)]


def terms(words: int, *, min_cohort: int = 3, colluders: int = 1, job_id: str = "job-0", **changes: int) -> Terms:
    """Terms of a small job."""
    limits = {"max_sites": 128, "rounds": 20, "attempts": 5} | changes
    return Terms(job_id, bytes(range(32)), words, Floors(min_cohort, colluders), **limits)


def member(name: str, agreed: Terms, latch: Latch | None = None, **options: object) -> SecAggClient:
    """A member; what it remembers on disk is in `client.latch`."""
    return SecAggClient(agreed, identity(name), None, None, latch, lambda latch: None, **options)  # type: ignore[arg-type]


class Federation:
    """A server and its members, keys exchanged; `lost` members never answered.

    `directory` is the message with all adverts, `confirms` has the members' signatures over it by roster id.
    """

    def __init__(
        self, count: int, words: int = 8, *, lost: Mapping[str, Collection[str]] | None = None, **limits: int
    ) -> None:
        self.terms = terms(words, **limits)
        self.server = SecAggServer(self.terms, ChainCheck(None))
        self.members = {name: member(name, self.terms) for name in names(count)}
        self.exchange_keys(lost or {})

    def exchange_keys(self, lost: Mapping[str, Collection[str]] = {}) -> None:
        """A new epoch."""
        request = self.server.open_epoch(list(self.members))
        for name, one in self._answering("advertise", self.members, lost):
            self.server.take_advertisement(name, one.advertise(request))
        self.directory = self.server.directory()
        self.confirms: dict[int, bytes] = {}
        for name, one in self._answering(
            "confirm", [n for n, _ in self._answering("advertise", self.members, lost)], lost
        ):
            reply = one.confirm(self.directory)
            self.server.take_confirm(name, reply)
            confirm = Confirm.decode(reply)
            self.confirms[confirm.member] = confirm.signature

    @property
    def adverts(self) -> list[Advertisement]:
        """What the directory holds of each member."""
        return [Advertisement.decode(a) for a in Directory.decode(self.directory, self.terms.max_sites).adverts]

    def begin(self, number: int = 1, attempt: int = 0, cohort: Sequence[str] | None = None) -> bytes:
        """The server's message that opens a round."""
        return self.server.open_round(number, attempt, cohort or self.server.members, MODEL)

    def run(
        self,
        vectors: Mapping[str, np.ndarray],
        number: int = 1,
        attempt: int = 0,
        *,
        lost: Mapping[str, Collection[str]] | None = None,
        change: Callable[[str, str, bytes], bytes] = lambda phase, name, data: data,
    ) -> Sum:
        """One whole round; `change` may replace any answer (phase, name, bytes)."""
        lost = lost or {}
        request = self.begin(number, attempt)
        for name, one in self._answering("masked", self.server.members, lost):
            assert one.begin(request, MODEL) is None
            self.server.take_masked(name, change("masked", name, one.mask(vectors[name])))
        request = self.server.consistency_request()
        survivors = [n for n, _ in self._answering("masked", self.server.members, lost)]
        for name, one in self._answering("consistency", survivors, lost):
            self.server.take_consistency(name, change("consistency", name, one.consistency(request)))
        for name, request in self.server.unmask_requests().items():
            if name not in lost.get("unmask", ()):
                self.server.take_unmask(name, change("unmask", name, self.members[name].unmask(request)))
        return self.server.finish()

    def _answering(
        self, phase: str, chosen: Collection[str], lost: Mapping[str, Collection[str]]
    ) -> list[tuple[str, SecAggClient]]:
        return [(n, self.members[n]) for n in chosen if n not in lost.get(phase, ())]


def vectors(count: int, words: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random words by member."""
    generator = np.random.default_rng(seed)
    return {n: generator.integers(0, 2**32, words, dtype=np.uint32) for n in names(count)}


def plain_sum(summands: Mapping[str, np.ndarray], survivors: Collection[str]) -> np.ndarray:
    """What the protocol must give, added up with Python's own integers."""
    columns = zip(*(summands[n].tolist() for n in survivors), strict=True)
    return np.array([sum(column) % 2**32 for column in columns], dtype=np.uint32)
