"""One round of training, one sum: no honest site is in two that a server can open, and in none with too few others.

First every schedule of a server over few members, against a model of what a member answers; then real members against
the model; then a thousand random schedules of an adversary that keeps every share that it was ever sent.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from itertools import chain, combinations, combinations_with_replacement, permutations, product
from random import Random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedmpt_core.secagg import messages as wire
from fedmpt_core.secagg.client import SecAggClient
from fedmpt_core.secagg.dealing import LISTS, SLOTS
from fedmpt_core.secagg.dealing import ROUNDS as RENEWED
from fedmpt_core.secagg.errors import Abort, SecAggError
from fedmpt_core.secagg.keys import self_mask_key
from fedmpt_core.secagg.masking import add_all
from fedmpt_core.secagg.policy import Floors
from fedmpt_core.secagg.server import RoundLost
from fedmpt_core.secagg.shamir import Lagrange
from tests.malicious import Insider, MaliciousServer
from tests.secagg import MODEL, OTHER_MODEL, Federation, member, names, plain_sum, vectors

WORDS = 4


def refused(code: Abort, match: str, client: SecAggClient, call: str, *given: object) -> None:
    """That a member refuses a call for this reason."""
    with pytest.raises(SecAggError, match=match) as refusal:
        getattr(client, call)(*given)
    assert refusal.value.code == code


def lists(count: int) -> list[np.ndarray]:
    """Vectors by place."""
    return list(vectors(count, WORDS).values())


# ---- halves ------------------------------------------------------------------------------------------------------


def test_two_halves_of_one_directory_are_not_summed() -> None:
    server = MaliciousServer(6, WORDS)  # threshold 5
    for half in ((0, 1, 2), (3, 4, 5)):
        for i in half:
            server.clients[i].begin(server.open_round(), MODEL)
            refused(Abort.BELOW_THRESHOLD, "3 members are to be summed of a directory of 6, the threshold is 5",
                    server.clients[i], "mask", server.mask_request(half), lists(6)[i])  # fmt: skip


@pytest.mark.parametrize("masked", [False, True], ids=["before-the-round", "after-all-masked"])
@pytest.mark.parametrize("restart", [False, True], ids=["same-process", "restarted"])
def test_two_halves_are_not_summed_by_smaller_directories_either(masked: bool, restart: bool) -> None:
    server = MaliciousServer(6, WORDS)
    federation = server.federation
    if masked:
        server.collect(range(6), lists(6))
    if restart:
        for name, one in federation.members.items():
            federation.members[name] = member(name, server.terms, one.latch)
    for half in (names(6)[:3], names(6)[3:]):
        request = federation.server.open_epoch(1)
        for name in half:
            federation.server.take_advertisement(name, federation.members[name].advertise(request))
        directory = federation.server.directory()
        for name in half:
            refused(Abort.POLICY, "has 3 members, but one of 6 was confirmed before .* fewer than its threshold of 5",
                    federation.members[name], "deal", directory)  # fmt: skip


def test_a_directory_as_large_as_the_threshold_of_the_largest_may_follow_and_all_of_it_must_be_summed() -> None:
    server = MaliciousServer(6, WORDS)
    server.federation.exchange_keys(lost={"advertise": names(6)[5:]})
    assert server.terms.floors.threshold(5) == 4
    server.clients[0].begin(server.open_round(), MODEL)
    refused(Abort.BELOW_THRESHOLD, "4 members are to be summed of a directory of 5, the threshold is 5",
            server.clients[0], "mask", server.mask_request(range(4)), lists(6)[0])  # fmt: skip
    ctx = server.collect(range(5), lists(6), attempt=1)
    server.open(ctx, range(5), range(5))
    assert np.array_equal(server.sum(ctx, range(5)), plain_sum(vectors(6, WORDS), names(5)))


# ---- once --------------------------------------------------------------------------------------------------------


def opened_once() -> MaliciousServer:
    """Round 1 is opened by all."""
    server = MaliciousServer(4, WORDS)
    ctx = server.collect(range(4), lists(4))
    server.open(ctx, range(4), range(4))
    assert np.array_equal(server.sum(ctx, range(4)), plain_sum(vectors(4, WORDS), names(4)))
    return server


def restarted(server: MaliciousServer) -> MaliciousServer:
    """Every member in a new process, with what is on its disk."""
    for name, one in server.federation.members.items():
        server.federation.members[name] = member(name, server.terms, one.latch)
    return server


def begun_again(server: MaliciousServer, how: str) -> None:
    """Ready for the same round once more: nothing new for another attempt, else new keys and maybe new processes."""
    if how == "restart":
        restarted(server)
    if how == "continued":
        latches = {n: one.latch.continued("job-1") for n, one in server.federation.members.items()}
        server.federation = Federation(4, WORDS, job_id="job-1", latches=latches)
    elif how != "attempt":
        server.federation.exchange_keys()


@pytest.mark.parametrize("how", ["attempt", "epoch", "restart", "continued"])
def test_a_round_is_opened_once(how: str) -> None:
    server = opened_once()
    begun_again(server, how)
    for attempt in (1, 2):
        refused(Abort.LATCHED, "round 1 is used up at this site: go on with the next",
                server.clients[0], "begin", server.open_round(attempt=attempt), MODEL)  # fmt: skip
    ctx = server.collect(range(4), lists(4), turn=2, number=2)
    server.open(ctx, range(4), range(4))
    assert np.array_equal(server.sum(ctx, range(4)), plain_sum(vectors(4, WORDS), names(4)))
    refused(Abort.CTX_MISMATCH, "round 2 or a later one", server.clients[0], "begin", server.open_round(1, 5), MODEL)


@pytest.mark.parametrize("attempts", [1, 2])
@pytest.mark.parametrize("how", ["epoch", "restart", "continued"])
def test_a_round_that_was_masked_in_one_epoch_is_refused_in_the_next(how: str, attempts: int) -> None:
    """Its sum may be opened without this member, by those who masked with it; also when it was begun anew since."""
    server = MaliciousServer(4, WORDS)
    server.collect(range(4), lists(4))
    for attempt in range(1, attempts):
        for one in server.clients:
            one.begin(server.open_round(attempt=attempt), MODEL)
    begun_again(server, how)
    refused(Abort.LATCHED, "used up", server.clients[0], "begin", server.open_round(attempt=attempts), MODEL)


@pytest.mark.parametrize("how", ["attempt", "epoch", "restart", "continued"])
def test_a_round_that_was_begun_goes_on_from_the_same_parameters_only(how: str) -> None:
    server = MaliciousServer(4, WORDS)
    for one in server.clients:
        one.begin(server.open_round(), MODEL)
    begun_again(server, how)
    refused(Abort.LATCHED, "round 1 was begun here from other parameters",
            server.clients[0], "begin", server.open_round(attempt=1, model=OTHER_MODEL), OTHER_MODEL)  # fmt: skip
    ctx = server.collect(range(4), lists(4), attempt=2)
    server.open(ctx, range(4), range(4))
    assert np.array_equal(server.sum(ctx, range(4)), plain_sum(vectors(4, WORDS), names(4)))


# ---- every schedule of a server, against a model -----------------------------------------------------------------

KINDS = ("list", "attempt", "epoch", "smaller")  # of the second list: in the same attempt, the next, a new epoch, ...
STEPS = [way for size in range(5) for way in permutations(("mask 1", "open 1", "mask 2", "open 2"), size)]


def threshold(members: int, colluders: int) -> int:
    """Of a directory; 99 where the floors allow none."""
    try:
        return Floors(3, colluders).threshold(members)
    except SecAggError:
        return 99


@dataclass(frozen=True)
class Schedule:
    """Two lists of one round of training, and how the second comes about.

    Attributes:
        count: members of the first directory.
        colluders: how many of them work with the server.
        kind: of `KINDS`; a `smaller` directory holds the second list's members only.
        lists: places of the members.
    """

    count: int
    colluders: int
    kind: str
    lists: tuple[tuple[int, ...], tuple[int, ...]]

    @property
    def directories(self) -> tuple[int, int]:
        """Members of each list's directory."""
        return self.count, len(self.lists[1]) if self.kind == "smaller" else self.count

    @property
    def least(self) -> int:
        """Fewest members of a list."""
        return threshold(self.count, self.colluders)

    def seat(self, place: int) -> tuple[str, tuple[bool, ...], bool]:
        """All that it is to one member: the kind, which lists it may be summed in, whether it gets the second keys."""
        listed = tuple(place in one and len(one) >= self.least for one in self.lists)
        moves = self.kind == "epoch" or (self.kind == "smaller" and place in self.lists[1])
        return self.kind, listed, moves


def answers(seat: tuple[str, tuple[bool, ...], bool], steps: Sequence[str]) -> frozenset[str]:
    """What an honest member answers: the model. A refusal ends the attempt."""
    kind, listed, moves = seat
    given: set[str] = set()
    epoch, begun, masked, now, alive = 1, 0, 0, 0, False  # `now` is the list that it would open
    for step in steps:
        number = int(step[-1])
        fresh = number == 2 and kind in ("epoch", "smaller")
        if fresh and moves and epoch == 1:
            epoch, now, alive = 2, 0, False
        attempt = 1 if kind == "list" else number
        if step.startswith("mask") and epoch == 1 + fresh:
            used_up = bool(given & {"open 1", "open 2"}) or (fresh and "mask 1" in given)
            if not (alive and attempt == begun) and attempt > begun and not used_up:
                begun, alive = attempt, True
            if alive and attempt == begun and listed[number - 1] and number > masked:
                given.add(step)
                masked = now = number
                continue
        elif step.startswith("open") and now == number:
            given.add(step)
        now, alive = 0, False
    return frozenset(given)


@cache
def possible(seat: tuple[str, tuple[bool, ...], bool]) -> frozenset[frozenset[str]]:
    """Whatever a server asks of a member, in any order."""
    return frozenset(answers(seat, steps) for steps in STEPS)


def opened(plan: Schedule, given: Mapping[int, frozenset[str]]) -> int:
    """How many sums the answers of honest members open. That is the lemma: none has a member of the other."""
    sums: list[set[int]] = []
    for number, listed, members in zip((1, 2), plan.lists, plan.directories, strict=True):
        openers = sum(f"open {number}" in one for one in given.values())
        inside = {i for i, one in given.items() if i in listed and f"mask {number}" in one}
        # whoever holds enough shares takes the masks off; where an honest vector lacks, its edges stay
        if openers + plan.colluders < threshold(members, plan.colluders) or inside != set(given) & set(listed):
            continue
        assert openers >= threshold(members, plan.colluders) - plan.colluders
        assert len(inside) >= plan.least - plan.colluders >= 2
        sums.append(inside)
    assert len(sums) < 2 or not sums[0] & sums[1]
    return len(sums)


def schedules() -> Iterator[Schedule]:
    """All pairs of lists of 3 to 5 members; who colludes are the last ones, as places mean nothing."""
    for count, colluders, kind in product((3, 4, 5), (0, 1), KINDS):
        every = [c for size in range(1, count + 1) for c in combinations(range(count), size)]
        yield from (Schedule(count, colluders, kind, pair) for pair in product(every, every))


def test_no_schedule_over_few_members_opens_two_sums_with_an_honest_member_in_both() -> None:
    """Members of the same lists are alike, so that it only counts how many give which answers."""
    tally: Counter[int] = Counter()
    for plan in schedules():
        groups: dict[tuple[bool, ...], list[int]] = {}
        for i in range(plan.count - plan.colluders):
            groups.setdefault(tuple(i in one for one in plan.lists), []).append(i)
        order = [i for members in groups.values() for i in members]
        ways = [combinations_with_replacement(possible(plan.seat(g[0])), len(g)) for g in groups.values()]
        for chosen in product(*ways):
            tally[opened(plan, dict(zip(order, chain(*chosen), strict=True)))] += 1
    assert tally[0] > tally[1] > 100
    assert not tally[2]  # of one round; two would need more members than there are


@pytest.mark.parametrize("kind", KINDS)
def test_real_members_answer_as_the_model_says(kind: str) -> None:
    generator = Random(KINDS.index(kind))
    every = [plan for plan in schedules() if plan.kind == kind and min(map(len, plan.lists)) >= plan.least - 1]
    seen: Counter[frozenset[str]] = Counter()
    for plan in generator.sample(every, 8):
        steps = [generator.choice(STEPS) for _ in range(plan.count)]
        expected = [answers(plan.seat(i), way) for i, way in enumerate(steps)]
        assert answered(plan, steps) == expected, (plan, steps)
        seen.update(expected)
    assert len(seen) >= 4


def answered(plan: Schedule, steps: Sequence[Sequence[str]]) -> list[frozenset[str]]:
    """What real members answer; a new epoch comes before the first step of the second list."""
    server = MaliciousServer(plan.count, WORDS, colluders=plan.colluders)
    members, later = list(server.federation.members.values()), plan.kind in ("epoch", "smaller")
    given: list[set[str]] = [set() for _ in steps]
    cuts = [next((k for k, step in enumerate(way) if later and step[-1] == "2"), len(way)) for way in steps]
    requests = {"1": asked(server, plan.lists[0]), "2": asked(server, plan.lists[1], 2, int(plan.kind == "attempt"))}
    for one, way, cut, into in zip(members, steps, cuts, given, strict=True):
        into |= {step for step in way[:cut] if takes(one, step, requests[step[-1]])}
    if later:
        requests["2"] = asked_anew(server, plan)
    for one, way, cut, into in zip(members, steps, cuts, given, strict=True):
        into |= {step for step in way[cut:] if takes(one, step, requests[step[-1]])}
    return [frozenset(one) for one in given]


def asked(server: MaliciousServer, listed: Sequence[int], turn: int = 1, attempt: int = 0) -> tuple[bytes, ...]:
    """Round, list and opening."""
    opening = wire.OpenRequest(server.context(listed, turn, attempt=attempt)).encode()
    return server.open_round(attempt=attempt), server.mask_request(listed, turn, attempt=attempt), opening


def asked_anew(server: MaliciousServer, plan: Schedule) -> tuple[bytes, ...]:
    """The same after fresh keys, which members may refuse."""
    chosen = plan.lists[1] if plan.kind == "smaller" else tuple(range(plan.count))
    absent = [n for i, n in enumerate(names(plan.count)) if i not in chosen]
    try:
        server.federation.exchange_keys(lost={"advertise": absent})
    except (RoundLost, SecAggError):
        assert len(chosen) < plan.least
        return b"", b"", b""
    return asked(server, [chosen.index(i) for i in plan.lists[1]], attempt=1)


def takes(client: SecAggClient, step: str, requests: tuple[bytes, ...]) -> bool:
    """Whether a real member takes a step."""
    begin, mask, opening = requests
    try:
        if step.startswith("mask"):
            client.begin(begin, MODEL)
            client.mask(mask, np.zeros(WORDS, "<u4"))
        else:
            client.open(opening)
    except SecAggError:
        return False
    return True


# ---- a thousand schedules of an adversary that keeps every share -------------------------------------------------

ROUNDS = 16  # of training for an example: each is a schedule of its own


@dataclass
class Epoch:
    """What the adversary has of one key exchange.

    Attributes:
        names: the directory.
        holds: by slot and dealer's place, the shares that came and those of the insider, by holder's place.
    """

    names: list[str]
    least: int
    digest: bytes
    holds: dict[tuple[int, int], dict[int, bytes]] = field(default_factory=lambda: defaultdict(dict))


@dataclass
class Call:
    """One list and what came for it."""

    epoch: Epoch
    slot: int
    cohort: tuple[int, ...]
    context: bytes
    vectors: dict[int, np.ndarray] = field(default_factory=dict)
    openers: set[int] = field(default_factory=set)


class Adversary:
    """A server with one insider, who asks members for anything in any order; one example of the property."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        count = self.random.choice((3, 3, 4, 5))
        self.insider = names(count)[-1]
        self.server = MaliciousServer(count, WORDS, kinds={self.insider: Insider}, rounds=ROUNDS)
        self.plain = vectors(count, WORDS, seed)
        self.least = 0
        self.epoch = self._noted()

    def new_epoch(self, number: int) -> None:
        """Of all or of fewer; some members are in a new process. Where members refuse it, everybody is back."""
        federation = self.server.federation
        for name, one in federation.members.items():
            if self.random.random() < 0.3:
                kind = Insider if name == self.insider else SecAggClient
                federation.members[name] = member(name, federation.terms, one.latch, kind)
        absent = [n for n in federation.members if n != self.insider and self.random.random() < 0.2]
        try:
            federation.exchange_keys(lost={"advertise": absent}, number=number)
        except (RoundLost, SecAggError):
            federation.exchange_keys(number=number)
        self.epoch = self._noted()

    def play(self, number: int) -> list[Call]:
        """One round of training: some lists, each in the same attempt as the last or a later one."""
        calls: dict[bytes, Call] = {}
        attempt, turn = 0, 0
        for _ in range(self.random.choice((1, 2, 2, 3))):
            if number - self.server.federation.first >= RENEWED or self.random.random() < 0.03:
                self.new_epoch(number)
            # the next slot of the round, seldom the same again or one of another round
            turn += self.random.choice((1, 1, 1, 0))
            call = self._call(number, attempt, self.random.choice((turn, turn, turn, turn, turn - LISTS, turn + LISTS)))
            calls.setdefault(call.context, call)
            attempt += self.random.random() < 0.5
            for call in calls.values():
                if call.epoch is self.epoch and self.random.random() < 0.5:
                    self._open(call)
        return list(calls.values())

    def sums(self, calls: list[Call]) -> list[Call]:
        """Those whose masks can be taken off: all honest vectors are there, and a threshold of shares of each mask."""
        return [call for call in calls if self.honest(call) and self._opens(call)]

    def honest(self, call: Call) -> set[str]:
        """Names."""
        return {call.epoch.names[i] for i in call.cohort} - {self.insider}

    def _noted(self) -> Epoch:
        federation = self.server.federation
        count = len(federation.names)
        limit = federation.terms.floors.threshold(count)
        self.least = max(self.least, limit)
        epoch = Epoch(list(federation.names), limit, federation.digest)
        evil = federation.members[self.insider]
        assert isinstance(evil, Insider)
        for slot, dealer in product(range(1, SLOTS + 1), range(count)):
            epoch.holds[slot, dealer][evil.keys.own] = evil.keys.shares(slot, [dealer])[0]
        return epoch

    def _call(self, number: int, attempt: int, turn: int) -> Call:
        server, count = self.server, len(self.epoch.names)
        size = self.random.choice((count, count, max(1, count - 1), self.random.randint(1, count)))
        cohort = tuple(sorted(self.random.sample(range(count), size)))
        slot = LISTS * (number - server.federation.first) + turn
        if not 1 <= slot <= SLOTS:
            turn, slot = turn % LISTS + 1, LISTS * (number - server.federation.first) + turn % LISTS + 1
        call = Call(self.epoch, slot, cohort, server.context(cohort, turn, number, attempt))
        begin, mask = server.open_round(number, attempt), server.mask_request(cohort, turn, number, attempt)
        for i in self.random.sample(range(count), count):
            if self.random.random() < 0.9:
                with suppress(SecAggError):
                    one = server.clients[i]
                    one.begin(begin, MODEL)
                    reply = wire.Masked.decode(one.mask(mask, self.plain[one.name]), WORDS)
                    call.vectors[i] = reply.vector
        return call

    def _open(self, call: Call) -> None:
        for i in self.random.sample(range(len(call.epoch.names)), len(call.epoch.names)):
            if self.random.random() < 0.8:
                with suppress(SecAggError):
                    reply = self.server.clients[i].open(wire.OpenRequest(call.context).encode())
                    shares = wire.Opened.decode(reply, len(call.cohort)).shares
                    for dealer, share in zip(call.cohort, shares, strict=True):
                        call.epoch.holds[call.slot, dealer][i] = share
                    call.openers.add(i)

    def _opens(self, call: Call) -> bool:
        evil = call.epoch.names.index(self.insider)
        if not set(call.cohort) - {evil} <= call.vectors.keys():
            return False
        held = [call.epoch.holds[call.slot, dealer] for dealer in call.cohort]
        if min(map(len, held)) < call.epoch.least:
            return False
        if set(call.cohort) == call.vectors.keys():  # the insider's vector came too: add up what is there
            total = np.asarray(np.sum(list(call.vectors.values()), axis=0, dtype=np.uint32))
            for shares in held:
                chosen = sorted(shares)[: call.epoch.least]
                seed = Lagrange([i + 1 for i in chosen]).combine([shares[i] for i in chosen])
                add_all(total, [], [self_mask_key(seed, call.context)])
            assert np.array_equal(total, plain_sum(self.plain, [call.epoch.names[i] for i in call.cohort]))
        return True


def test_a_thousand_random_schedules_open_one_sum_of_enough_members_of_each_round() -> None:
    tally: Counter[int] = Counter()

    @settings(max_examples=65, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.integers(0, 2**32 - 1))
    def example(seed: int) -> None:
        adversary = Adversary(seed)
        for number in range(1, ROUNDS + 1):
            sums = adversary.sums(adversary.play(number))
            tally[len(sums)] += 1
            for call in sums:
                assert len(adversary.honest(call)) >= adversary.least - 1
                assert len({call.epoch.names[i] for i in call.openers} - {adversary.insider}) >= call.epoch.least - 1
            for one, other in combinations(sums, 2):
                assert not adversary.honest(one) & adversary.honest(other)

    example()
    assert sum(tally.values()) >= 1000
    assert tally[1] > 100
