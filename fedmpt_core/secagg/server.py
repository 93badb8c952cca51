"""The server's half of FLARE-SA/2: it adds masked vectors as they arrive and learns one sum a round.

No network and no knowledge of the vectors. Whatever a member sends is checked against the keys of its advert; a fault
costs the member that made it, by name, and a round that cannot be opened is lost without anything revealed.
"""

import hmac
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedmpt_core.secagg import messages as wire
from fedmpt_core.secagg.context import context as context_of
from fedmpt_core.secagg.context import directory_digest, epoch_digest
from fedmpt_core.secagg.dealing import ROUNDS, are_shares, slots_of
from fedmpt_core.secagg.errors import Abort, SecAggError, UnexpectedMessage
from fedmpt_core.secagg.identity import CLOCK_SKEW, EPOCH_SECONDS, ChainCheck, Session
from fedmpt_core.secagg.keys import self_mask_key, usable
from fedmpt_core.secagg.masking import add_all
from fedmpt_core.secagg.policy import Terms
from fedmpt_core.secagg.shamir import Lagrange


class RoundLost(Exception):
    """The round ends without a sum, and nothing of any vector is known.

    Attributes:
        culprits: by name, what members were shown to have done; nothing goes on with them.
        used_up: whether members have been asked to open a sum, so that they refuse this round of training from now on.
    """

    def __init__(self, text: str, *, culprits: Mapping[str, str] | None = None, used_up: bool = False) -> None:
        super().__init__(text)
        self.culprits, self.used_up = dict(culprits or {}), used_up


@dataclass(frozen=True)
class Sum:
    """What a round reveals.

    Attributes:
        words: (words,) uint32, the sum of the cohort's vectors mod 2^32.
        cohort: their names.
        culprits: by name, what members did wrong that the sum did without.
        transcript: hex SHA-256 over context, cohort and sum.
    """

    words: np.ndarray
    cohort: tuple[str, ...]
    culprits: dict[str, str]
    transcript: str


@dataclass
class _Member:
    name: str
    advert: wire.Advertisement
    raw: bytes
    voice: Ed25519PublicKey
    deal: wire.Deal | None = None
    confirm: bytes = b""


@dataclass
class _Round:
    number: int
    attempt: int
    model: bytes
    ready: set[int] = field(default_factory=set)
    cohort: tuple[int, ...] = ()
    slot: int = 0
    context: bytes = bytes(32)
    total: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype="<u4"))
    masked: set[int] = field(default_factory=set)
    opening: bool = False
    shares: dict[int, wire.Opened] = field(default_factory=dict)


class SecAggServer:
    """One run. `take_...` may be called from several threads."""

    def __init__(self, terms: Terms, check: ChainCheck, *, clock: Callable[[], float] = time.time) -> None:
        """Sends nothing.

        Args:
            terms: worked out by the server.
            check: whom it takes for a member of the federation.
            clock: seconds since 1970.
        """
        self.terms, self._check, self._clock = terms, check, clock
        self._lock = threading.Lock()
        self._epoch, self._opened = 0, 0.0
        self._adverts: dict[str, _Member] = {}  # by name, while they come
        self._members: list[_Member] = []  # in the directory's order
        self._directory, self._digest = b"", b""
        self._first, self._slot = 0, 0  # first round of the epoch, last slot that was used
        self._largest = 0  # members of the largest directory that any have confirmed
        self._complaints: dict[tuple[int, int], bytes] = {}  # by accuser and accused
        self._shown: dict[tuple[int, int], bytes] = {}  # rows that complaints have made public, likewise
        self._round: _Round | None = None

    @property
    def epoch(self) -> int:
        """Number of the newest key exchange; 0 before the first."""
        return self._epoch

    @property
    def members(self) -> list[str]:
        """Names that have confirmed the epoch, in the directory's order."""
        return [m.name for m in self._members if m.confirm]

    @property
    def size(self) -> int:
        """Members of the directory."""
        return len(self._members)

    @property
    def threshold(self) -> int:
        """Of the directory: fewest members of a sum, and fewest that open it."""
        return self.terms.floors.threshold(self.size)

    @property
    def least(self) -> int:
        """Fewest members of a sum, as members of the largest directory so far demand it."""
        return self.terms.floors.threshold(max(self.size, self._largest))

    def serves(self, number: int) -> bool:
        """Whether this epoch can do a round of training: it has members and secrets for it, and is not too old."""
        young = self._clock() - self._opened <= EPOCH_SECONDS
        return young and 0 <= number - self._first < ROUNDS and len(self.members) >= self.threshold

    @property
    def cohort(self) -> list[str]:
        """Names whose vectors are to be in the sum."""
        return self._names(self._now().cohort)

    def open_epoch(self, number: int) -> bytes:
        """Start a key exchange for rounds of training from `number` on; any open round is given up.

        Returns:
            ADQ1, for every site.
        """
        self._epoch, self._opened, self._round = self._epoch + 1, self._clock(), None
        self._adverts, self._members, self._complaints, self._shown = {}, [], {}, {}
        self._directory, self._digest, self._first, self._slot = b"", b"", number, 0
        return wire.AdvertiseRequest(self.terms.digest, self._epoch, number).encode()

    def take_advertisement(self, site: str, data: bytes) -> None:
        """Note a member's keys. Raises SecAggError when they are not its own or not for this job and epoch."""
        advert = wire.Advertisement.decode(data)
        if (advert.job_digest, advert.epoch, advert.round) != (self.terms.digest, self._epoch, self._first):
            raise SecAggError(Abort.CTX_MISMATCH, f"{site} advertises for another job, release or epoch")
        try:
            voice = Ed25519PublicKey.from_public_bytes(advert.signing_key)
        except ValueError:
            raise SecAggError(Abort.ROSTER, f"{site} has no signing key") from None
        _verify(voice, advert.signature, advert.body, site)
        now = int(self._clock())
        self._check.check(name=site, job_id=self.terms.job_id, now=now, **advert.credentials)
        _check_lasts(site, Session.decode(advert.session), now)
        if not usable(advert.exchange_key):
            raise SecAggError(Abort.ROSTER, f"{site} has an exchange key of low order")
        with self._lock:
            if self._directory or site in self._adverts:
                raise UnexpectedMessage(f"an advert of {site}", "one advert of each site")
            adverts = [advert, *(m.advert for m in self._adverts.values())]
            keys = [key for one in adverts for key in (one.exchange_key, one.signing_key)]
            if len(set(keys)) != len(keys):
                raise SecAggError(Abort.ROSTER, f"{site} advertises a key of another site, or one key twice")
            self._adverts[site] = _Member(site, advert, data, voice)

    def directory(self) -> bytes:
        """DRC1, all adverts that agree on the roster.

        Raises:
            RoundLost: they are fewer than a sum needs; the culprits rely on another roster than most.
        """
        rosters = Counter(m.advert.roster_digest for m in self._adverts.values())
        common = rosters.most_common(1)[0][0] if rosters else b""
        odd = {
            name: "its roster is not that of the other sites: all must collect the same one"
            for name, m in self._adverts.items()
            if m.advert.roster_digest != common
        }
        if odd:
            raise RoundLost(f"{', '.join(sorted(odd))} rely on another roster", culprits=odd)
        if len(self._adverts) < self.terms.floors.min_cohort:
            raise RoundLost(f"{len(self._adverts)} sites advertised keys, min_cohort={self.terms.floors.min_cohort}")
        self._members = [self._adverts[name] for name in sorted(self._adverts, key=str.encode)]
        self._directory = directory_digest([(m.advert.body, m.advert.session) for m in self._members])
        return wire.Directory(tuple(m.raw for m in self._members)).encode()

    def take_deal(self, site: str, data: bytes) -> None:
        """Note a member's shared secrets. Raises SecAggError."""
        deal = wire.Deal.decode(data, members=len(self._members), threshold=self.threshold)
        member = self._member(site, deal.member)
        if deal.directory != self._directory or member.deal:
            raise SecAggError(Abort.CTX_MISMATCH, f"the dealing of {site} is for another directory, or a second one")
        _verify(member.voice, deal.signature, deal.text, site)
        member.deal = deal

    def deals(self) -> dict[str, bytes]:
        """DLS1 by site, for every member that has dealt.

        Raises:
            RoundLost: fewer than the threshold have, or members do not accept each other's keys: culprits.
        """
        self._judge_adverts()
        dealers = [i for i, m in enumerate(self._members) if m.deal]
        if len(dealers) < self.threshold:
            raise RoundLost(f"{len(dealers)} of {len(self._members)} sites dealt, the threshold is {self.threshold}")
        self._digest = epoch_digest(self._directory, [m.deal.text for m in self._members if m.deal])
        return {self._members[i].name: self._deals_to(i) for i in dealers}

    def shown_deals(self) -> dict[str, bytes]:
        """DLS1 once more by site, for those that complained: with the rows that `judge` found right, in the clear."""
        accusers = sorted({accuser for accuser, _ in self._shown})
        return {self._members[i].name: self._deals_to(i) for i in accusers if not self._members[i].confirm}

    def take_confirm(self, site: str, data: bytes) -> None:
        """Note that a member has checked directory and dealings. Raises SecAggError."""
        confirm = wire.Confirm.decode(data)
        member = self._member(site, confirm.member)
        if not member.deal:
            raise UnexpectedMessage(f"a confirmation of {site}", "one of a member that has dealt")
        _verify(member.voice, confirm.signature, wire.confirm_text(self._digest), site)
        member.confirm, self._largest = confirm.signature, max(self._largest, self.size)

    def show_requests(self) -> dict[str, bytes]:
        """SHW1 by dealer, where members complain of the rows that it dealt them; empty where none does."""
        return {
            self._members[dealer].name: wire.ShowRequest(
                tuple(self._complaints[accuser, dealer] for accuser in self._accusers(dealer))
            ).encode()
            for dealer in sorted({accused for _, accused in self._complaints})
        }

    def judge(self, shown: Mapping[str, bytes]) -> dict[str, str]:
        """Who is at fault where members complained of rows, by name.

        Nobody can tell whether a right row was sealed as garbage or the complaint is false; so it is handed on in the
        clear (`shown_deals`), which is all that its member can ask for.

        Args:
            shown: SHO1 by dealer; a dealer that shows nothing is at fault, and so is a member that complains again of a
                row that was shown.
        """
        faults: dict[str, str] = {}
        for dealer in sorted({accused for _, accused in self._complaints}):
            name, accusers = self._members[dealer].name, self._accusers(dealer)
            rows = self._rows(dealer, accusers, shown.get(name, b""))
            for accuser in accusers:
                if (accuser, dealer) in self._shown:
                    faults[self._members[accuser].name] = f"it complained of shares of {name} that it saw to be right"
                elif accuser in rows:
                    self._shown[accuser, dealer] = wire.shown(rows[accuser])
                else:
                    faults[name] = "the shares that it dealt do not fit, or it did not show them"
        self._complaints.clear()
        return faults

    def open_round(self, number: int, attempt: int, model_digest: bytes) -> bytes:
        """Start a round of training; RND1, for every member.

        Args:
            number: of the round.
            attempt: from 0, larger than that of the last attempt.
            model_digest: of the global parameters that go with it.

        Raises:
            RoundLost: fewer than the threshold have confirmed the epoch.
        """
        if len(self.members) < self.threshold:
            raise RoundLost(
                f"{len(self.members)} of {len(self._members)} sites confirmed each other's keys, the threshold is "
                f"{self.threshold}"
            )
        self._round = _Round(number, attempt, model_digest)
        confirms = tuple((i, m.confirm) for i, m in enumerate(self._members) if m.confirm)
        return wire.RoundRequest(self._digest, number, attempt, model_digest, confirms).encode()

    def take_ready(self, site: str, data: bytes) -> None:
        """Note that a member has an update for the round. Raises SecAggError."""
        now, ready = self._now(), wire.Ready.decode(data)
        member = self._member(site, ready.member)
        if (ready.epoch, ready.round, ready.attempt) != (self._digest, now.number, now.attempt) or not member.confirm:
            raise SecAggError(Abort.CTX_MISMATCH, f"{site} is ready for another round or has not confirmed the keys")
        _verify(member.voice, ready.signature, ready.text, site)
        with self._lock:
            now.ready.add(ready.member)

    def mask_request(self, without: Iterable[str] = ()) -> bytes:
        """Name whose vectors shall be summed, MRQ1, for each of them; every call takes another slot.

        Args:
            without: names that were ready and are not any more.

        Raises:
            RoundLost: too few are left; nothing was opened, so another attempt may follow.
        """
        now, gone = self._now(), set(without)
        now.ready = {i for i in now.ready if self._members[i].name not in gone}
        if len(now.ready) < self.least:
            raise RoundLost(f"{len(now.ready)} of {self.size} sites have an update, the threshold is {self.least}")
        slots = slots_of(now.number - self._first)
        self._slot = max(slots[0], self._slot + 1)
        if self._slot not in slots:
            raise RoundLost(f"sites failed {len(slots)} times while they masked their updates")
        now.slot, now.cohort = self._slot, tuple(sorted(now.ready))
        now.context = context_of(
            self.terms.job_id, now.number, now.attempt, now.slot,
            epoch=self._digest, cohort=now.cohort, model=now.model,
        )  # fmt: skip
        now.total, now.masked = np.zeros(self.terms.words, dtype="<u4"), set()
        return wire.MaskRequest(self._digest, now.number, now.attempt, now.slot, now.cohort).encode()

    def take_masked(self, site: str, data: bytes) -> None:
        """Add a masked vector to the sum; the vector itself is not kept. Raises SecAggError when it is not used."""
        now = self._now()
        masked = wire.Masked.decode(data, self.terms.words)
        member = self._member(site, masked.member)
        if not hmac.compare_digest(masked.context, now.context) or masked.member not in now.cohort:
            raise SecAggError(Abort.CTX_MISMATCH, f"the vector of {site} is of another job, round or attempt")
        _verify(member.voice, masked.signature, masked.text, site)
        if not hmac.compare_digest(masked.digest, sha256(masked.vector.data).digest()):
            raise SecAggError(Abort.MALFORMED, f"the vector of {site} is not the one it signed")
        with self._lock:
            if now.opening or masked.member in now.masked:
                raise UnexpectedMessage(f"a vector of {site}", "one vector of each member, before the sum is opened")
            np.add(now.total, masked.vector, out=now.total)
            now.masked.add(masked.member)

    @property
    def missing(self) -> list[str]:
        """Names of the cohort whose masked vector has not come: the sum cannot be opened without it."""
        now = self._now()
        return self._names(i for i in now.cohort if i not in now.masked)

    def open_request(self) -> bytes:
        """Ask to open the sum, OPQ1; for every member of the cohort, whose vectors are all there."""
        now = self._now()
        if not now.cohort or self.missing:
            raise UnexpectedMessage("an opening", "the masked vectors of the whole cohort")
        now.opening = True
        return wire.OpenRequest(now.context).encode()

    def take_opened(self, site: str, data: bytes) -> None:
        """Note a member's shares. Raises SecAggError."""
        now = self._now()
        opened = wire.Opened.decode(data, len(now.cohort))
        member = self._member(site, opened.member)
        if not now.opening or opened.member not in now.cohort or not hmac.compare_digest(opened.context, now.context):
            raise SecAggError(Abort.CTX_MISMATCH, f"the shares of {site} are of another round")
        _verify(member.voice, opened.signature, opened.text, site)
        with self._lock:
            now.shares[opened.member] = opened

    def finish(self) -> Sum:
        """Take the masks off the sum. Wrong shares are told from right ones by what their dealers committed to.

        Raises:
            RoundLost: too few right shares.
        """
        now, wrong = self._now(), dict[str, str]()
        senders = [i for i, opened in sorted(now.shares.items()) if self._right(now, opened, wrong)]
        if len(senders) < self.threshold:
            raise RoundLost(
                f"{len(senders)} of {len(now.cohort)} sites sent their shares, the threshold is {self.threshold}",
                culprits=wrong,
                used_up=True,
            )
        chosen = senders[: self.threshold]
        lagrange = Lagrange([i + 1 for i in chosen])
        seeds = [lagrange.combine([now.shares[i].shares[place] for i in chosen]) for place in range(len(now.cohort))]
        add_all(now.total, [], [self_mask_key(seed, now.context) for seed in seeds])
        text = wire.result_text(now.context, now.cohort, sha256(now.total.data).digest())
        self._round = None
        return Sum(now.total, tuple(self._names(now.cohort)), wrong, sha256(text).hexdigest())

    def take_abort(self, site: str, data: bytes) -> tuple[Abort, str]:
        """Read why a member left: the reason, and the name of the member that it blames or ''. Raises SecAggError."""
        abort = wire.AbortMessage.decode(data)
        member = self._member(site, abort.member)
        _verify(member.voice, abort.signature, abort.text, site)
        # adverts are complained of before anybody has dealt, dealings after
        due = abort.context == self._directory and (abort.code == Abort.BAD_SHARE) == bool(self._digest)
        if not due or abort.culprit >= len(self._members) or abort.culprit == abort.member:
            return abort.code, ""
        if self._digest and not self._members[abort.culprit].deal:
            return abort.code, ""  # it was silent, which is no fault, and nobody has a row of it
        with self._lock:
            self._complaints[abort.member, abort.culprit] = data
        return abort.code, self._members[abort.culprit].name

    def _judge_adverts(self) -> None:
        """Where members do not accept each other's adverts: honest ones have one roster and say the same."""
        faults: dict[str, str] = {}
        for accused in sorted({accused for _, accused in self._complaints}):
            name, accusers = self._members[accused].name, self._accusers(accused)
            if 2 * len(accusers) > len(self._members) - 1:
                faults[name] = f"{len(accusers)} sites do not know its key or refuse its advert"
            else:
                faults |= {self._members[i].name: f"it alone refuses the advert of {name}" for i in accusers}
        if faults:
            raise RoundLost(f"left out: {'; '.join(f'{n}: {why}' for n, why in faults.items())}", culprits=faults)

    def _accusers(self, accused: int) -> list[int]:
        return sorted(accuser for accuser, other in self._complaints if other == accused)

    def _deals_to(self, recipient: int) -> bytes:
        deals = tuple(m.deal for m in self._members if m.deal)
        rows = tuple(
            self._shown.get((recipient, deal.member)) or deal.sealed[recipient - (deal.member < recipient)]
            for deal in deals
            if deal.member != recipient
        )
        return wire.Deals(deals, rows).encode()

    def _rows(self, dealer: int, accusers: list[int], data: bytes) -> dict[int, bytes]:
        """The rows that a dealer shows, by accuser, where they are what it committed to and fit."""
        member = self._members[dealer]
        try:
            show = wire.Show.decode(data, len(accusers))
            _verify(member.voice, show.signature, show.text, member.name)
        except SecAggError:
            return {}
        if not member.deal or (show.directory, show.member) != (self._directory, dealer):
            return {}
        return {i: row for i, row in zip(accusers, show.rows, strict=True) if member.deal.dealing.fits(i, row)}

    def _right(self, now: _Round, opened: wire.Opened, wrong: dict[str, str]) -> bool:
        """Whether all shares of a member are those that were dealt to it; else its name and why go to `wrong`."""
        deals = [deal for i in now.cohort if (deal := self._members[i].deal)]
        labels = [deal.dealing.label for deal in deals]
        committed = [deal.leaf(opened.member, now.slot) for deal in deals]
        if are_shares(labels, opened.member, now.slot, opened.shares, committed):
            return True
        wrong[self._members[opened.member].name] = "it sent other shares than were dealt to it"
        return False

    def _now(self) -> _Round:
        if self._round is None:
            raise UnexpectedMessage("a message of a round", "the start of one")
        return self._round

    def _member(self, site: str, number: int) -> _Member:
        if number >= len(self._members) or self._members[number].name != site:
            raise SecAggError(Abort.ROSTER, f"{site} speaks as member {number}, which it is not")
        return self._members[number]

    def _names(self, members: Iterable[int]) -> list[str]:
        return [self._members[i].name for i in members]


def _check_lasts(site: str, session: Session, now: int) -> None:
    """Members judge a session by their own clocks, at different times: one that some refuse would have them blamed."""
    margin = CLOCK_SKEW // 2
    if session.not_before + margin > now or session.not_after < now + EPOCH_SECONDS + margin:
        raise SecAggError(
            Abort.BAD_CERT,
            f"the session of {site} begins too late or ends too early for all members' clocks: its clock and the "
            f"server's may differ by {margin} s",
        )


def _verify(voice: Ed25519PublicKey, signature: bytes, text: bytes, site: str) -> None:
    try:
        voice.verify(signature, text)
    except InvalidSignature:
        raise SecAggError(
            Abort.BAD_SIG, f"the message of {site} is not signed with the key that it advertised"
        ) from None
