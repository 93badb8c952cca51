"""Every message in every state, faults of disks and members, and hundreds of broken messages: a clean refusal each."""

import pickle
import sys
from collections.abc import Callable
from itertools import product
from types import FrameType
from typing import Any

import numpy as np
import pytest

from fedmpt_core.secagg import messages as wire
from fedmpt_core.secagg.client import SecAggClient
from fedmpt_core.secagg.errors import Abort, SecAggError, UnexpectedMessage
from fedmpt_core.secagg.identity import ChainCheck, Trust
from fedmpt_core.secagg.key_exchange import KeyExchange
from fedmpt_core.secagg.latch import Latch
from fedmpt_core.secagg.policy import Terms
from fedmpt_core.secagg.server import RoundLost, SecAggServer
from tests.malicious import Insider, MaliciousServer
from tests.secagg import MODEL, OTHER_MODEL, Federation, identity, names, plain_sum, terms, vectors

STEPS = ("advertise", "deal", "confirm", "begin", "ready", "mask", "open")
STATES = ("NEW", "ADVERTISED", "DEALT", "READY", "BEGUN", "BEGUN", "MASKED", "READY")
ME = "site-000"
WORDS = 6


class Disk:
    """What a member has stored; says that it is full from the n-th time on."""

    def __init__(self, full_from: int = 1000) -> None:
        self.kept: list[Latch] = []
        self.full_from = full_from

    def __call__(self, latch: Latch) -> None:
        if len(self.kept) >= self.full_from:
            raise SecAggError(Abort.STORAGE, "the disk is full")
        self.kept.append(latch)


class Stage:
    """One member watched through a round with three honest others; the next message for it is always at hand."""

    def __init__(self, disk: Disk | None = None, latch: Latch | None = None, agreed: Terms | None = None) -> None:
        self.terms = agreed or terms(WORDS)
        self.disk, self.vectors = disk or Disk(), vectors(4, WORDS)
        self.others, self.epochs = {n: self._client(n, Disk(), None) for n in names(4)[1:]}, 0
        self.restart(latch)

    def _client(self, name: str, disk: Disk, latch: Latch | None) -> SecAggClient:
        return SecAggClient(self.terms, identity(name), None, None, latch, disk)

    def restart(self, latch: Latch | None) -> None:
        """A new process of the member; the server begins anew too."""
        self.me, self.server = self._client(ME, self.disk, latch), SecAggServer(self.terms, ChainCheck(None))
        while self.server.epoch < self.epochs:  # the others take none that they had
            self.server.open_epoch(1)
        self.requests: dict[str, bytes] = {}
        self.replies: dict[str, bytes] = {}

    def prepare(self, step: str, number: int = 1, attempt: int = 0) -> None:
        """Have the server make the request of a step out of what came before."""
        others, server, requests = self.others, self.server, self.requests
        match step:
            case "advertise":
                requests[step] = server.open_epoch(1)
                self.epochs = server.epoch
            case "deal":
                self._take(server.take_advertisement, "advertise", lambda o: o.advertise(requests["advertise"]))
                requests[step] = server.directory()
            case "confirm":
                self._take(server.take_deal, "deal", lambda o: o.deal(requests["deal"]))
                self.deals = server.deals()
                requests[step] = self.deals[ME]
            case "begin":
                self._take(server.take_confirm, "confirm", lambda o: o.confirm(self.deals[o.name]))
                requests[step] = server.open_round(number, attempt, MODEL)
            case "mask":
                for one in others.values():
                    one.begin(requests["begin"], MODEL)
                self._take(server.take_ready, "ready", lambda o: o.ready())
                requests[step] = server.mask_request()
            case "open":
                self._take(server.take_masked, "mask", lambda o: o.mask(requests["mask"], self.vectors[o.name]))
                requests[step] = server.open_request()

    def _take(self, take: Callable[[str, bytes], None], step: str, answer: Callable[[SecAggClient], bytes]) -> None:
        for name, one in self.others.items():
            take(name, answer(one))
        take(ME, self.replies[step])

    def do(self, step: str) -> bytes | None:
        """The member's answer to the prepared request."""
        match step:
            case "begin":
                return self.me.begin(self.requests[step], MODEL)
            case "ready":
                return self.me.ready()
            case "mask":
                return self.me.mask(self.requests[step], self.vectors[ME])
        return getattr(self.me, step)(self.requests[step])

    def go(self, until: int, number: int = 1, attempt: int = 0) -> None:
        """The first steps, each with the right request."""
        for step in STEPS[:until]:
            self.prepare(step, number, attempt)
            self.replies[step] = self.do(step) or b""


def everything(agreed: Terms | None = None) -> dict[str, bytes]:
    """One right request of each kind, and one of each kind that members send themselves, from another run."""
    other = Stage(agreed=agreed or terms(WORDS))
    other.go(len(STEPS))
    return other.requests | {f"reply to {step}": data for step, data in other.replies.items() if data}


def entries(stage: Stage) -> dict[str, Callable[[bytes], object]]:
    """A member's ways in for bytes."""
    me = stage.me
    return {
        "advertise": me.advertise,
        "deal": me.deal,
        "confirm": me.confirm,
        "show": me.show,
        "begin": lambda data: me.begin(data, MODEL),
        "mask": lambda data: me.mask(data, stage.vectors[ME]),
        "open": me.open,
    }


# ---- the member --------------------------------------------------------------------------------------------------


def test_a_member_goes_through_the_documented_states() -> None:
    stage = Stage()
    for until, expected in enumerate(STATES):
        if until:
            stage.prepare(STEPS[until - 1])
            stage.replies[STEPS[until - 1]] = stage.do(STEPS[until - 1]) or b""
        assert stage.me.state == expected
    for name, one in stage.others.items():
        stage.server.take_opened(name, one.open(stage.requests["open"]))
    stage.server.take_opened(ME, stage.replies["open"])
    assert np.array_equal(stage.server.finish().words, plain_sum(stage.vectors, names(4)))


@pytest.fixture(scope="module")
def foreign() -> dict[str, bytes]:
    """Messages of another run of the same members."""
    return everything()


@pytest.mark.parametrize(("until", "step"), list(product(range(len(STATES)), STEPS)), ids=str)
def test_each_step_is_taken_in_its_state_only(until: int, step: str, foreign: dict[str, bytes]) -> None:
    """The right message of every step, where there is one yet, else that of another run; in every state."""
    stage = Stage()
    stage.go(until)
    done, state = STEPS[:until], STATES[until]
    if until < len(STEPS) and step == STEPS[until]:
        return  # shown by the walk above
    stage.requests = foreign | stage.requests
    before, stored = stage.me.latch, len(stage.disk.kept)
    if step == "ready" and state == "BEGUN":
        assert stage.do(step) == stage.replies[step]
        return
    used_up = step == "begin" and "open" in done  # the round is over, so its start opens nothing again
    if step in done and step != "ready" and not used_up:
        # the same request again: the same bytes, no other state
        assert stage.do(step) == (stage.replies[step] or None)
        assert stage.me.state == state
    else:
        with pytest.raises(SecAggError) as error:
            stage.do(step)
        assert error.value.code == (Abort.LATCHED if used_up else Abort.CTX_MISMATCH)
        # `ready` is called by the site's own program, with no message that could be wrong
        ends = state in ("BEGUN", "MASKED") and step != "ready"
        assert stage.me.state == ("READY" if ends else state)
    assert stage.me.latch == before
    assert len(stage.disk.kept) == stored
    for other in set(done) - {"begin", "ready"}:  # what was answered is answered again
        assert stage.do(other) == stage.replies[other]


@pytest.mark.parametrize("until", range(len(STATES)), ids=lambda u: f"after-{u}-steps")
def test_a_message_of_any_kind_at_any_other_way_in_is_refused(until: int, foreign: dict[str, bytes]) -> None:
    stage = Stage()
    stage.go(until)
    latch = stage.me.latch
    for (kind, data), way in product(foreign.items(), entries(stage)):
        if kind != way:
            with pytest.raises(SecAggError):
                entries(stage)[way](data)
            assert stage.me.latch == latch
    assert stage.me.state == {"ADVERTISED": "NEW", "BEGUN": "READY", "MASKED": "READY"}.get(
        STATES[until], STATES[until]
    )


@pytest.mark.parametrize("step", ["mask", "open"])
def test_a_refusal_ends_the_round(step: str) -> None:
    stage = Stage()
    stage.go(STEPS.index(step))
    with pytest.raises(SecAggError):
        stage.me.open(b"\xffOPQ1")
    stage.prepare(step)
    with pytest.raises(UnexpectedMessage, match="in state READY"):
        stage.do(step)


def test_a_round_that_comes_again_with_another_model_is_refused() -> None:
    """The same message, and beside it other parameters than before: one member would train on a model of its own."""
    stage = Stage()
    stage.go(STEPS.index("ready"))
    assert stage.me.begin(stage.requests["begin"], MODEL) is None
    with pytest.raises(SecAggError, match="the model that came is not the one that the round names"):
        stage.me.begin(stage.requests["begin"], OTHER_MODEL)
    with pytest.raises(UnexpectedMessage):
        stage.me.ready()


def test_members_keys_are_neither_copied_nor_pickled() -> None:
    stage = Stage()
    stage.go(3)
    exchange = KeyExchange(stage.terms, identity(ME), Trust(None, None), 1, 1)
    for secret in (stage.me, exchange, identity(ME)):
        with pytest.raises(SecAggError, match="may not be copied or stored"):
            pickle.dumps(secret)


# ---- what is forgotten -------------------------------------------------------------------------------------------


class Watched(Insider):
    """Shows what a member still holds."""

    def shares(self, slot: int) -> set[bytes]:
        """Of one slot."""
        return set(self.keys.shares(slot, sorted(self.keys.dealers)))

    def edges(self, context: bytes) -> set[bytes]:
        """Keys of edges as the member could derive them now."""
        others = [m for m in range(len(self.keys.names)) if m != self.keys.own]
        return {self.keys.pairs.edge_seed(m, context) for m in others}


def watched() -> tuple[MaliciousServer, Watched]:
    """Four members, the first of which can be looked into."""
    server = MaliciousServer(4, WORDS, kinds={ME: Watched})
    one = server.clients[0]
    assert isinstance(one, Watched)
    return server, one


def test_who_masked_and_left_cannot_answer_the_opening_and_holds_no_share_of_it() -> None:
    server, one = watched()
    ctx = server.collect(range(4), list(vectors(4, WORDS).values()))
    assert all(map(any, one.shares(1)))
    one.leave()
    with pytest.raises(UnexpectedMessage, match="a request to open a sum in state READY"):
        one.open(wire.OpenRequest(ctx).encode())
    assert one.shares(1) == {bytes(33)}
    assert all(map(any, one.shares(2)))


@pytest.mark.parametrize("how", ["opened", "refused", "next-list", "next-round", "next-epoch"])
def test_shares_of_a_slot_are_gone_when_its_round_is_over(how: str) -> None:
    server, one = watched()
    ctx = server.collect(range(4), list(vectors(4, WORDS).values()), turn=3)
    match how:
        case "opened":
            server.open(ctx, range(4), [0])
        case "refused":
            with pytest.raises(SecAggError):
                one.open(wire.OpenRequest(bytes(32)).encode())
        case "next-list":
            server.collect(range(1, 4), list(vectors(4, WORDS).values()), turn=4, only=[1])
            server.collect([0, 1, 2], list(vectors(4, WORDS).values()), turn=4, only=[0])
        case "next-round":
            one.begin(server.open_round(2), MODEL)
        case "next-epoch":
            old = one.keys
            one.advertise(wire.AdvertiseRequest(server.terms.digest, 2, 1).encode())
            assert old.dealers == set()
            return
    assert [one.shares(slot) for slot in (1, 2, 3)] == [{bytes(33)}] * 3
    assert len(one.shares(5)) == 4


def test_own_seeds_and_edges_are_gone_right_after_masking() -> None:
    """A thief of a member's memory after it must not take its masks off a recorded vector."""
    server, one = watched()
    ctx = server.context(range(4))
    one.keys.pairs.advance(1)
    before = one.edges(ctx)
    server.collect(range(4), list(vectors(4, WORDS).values()))
    assert not before & one.edges(ctx)
    with pytest.raises(SecAggError, match="slot 1 came, but the keys before slot 2 are erased"):
        one.keys.pairs.advance(1)
    with pytest.raises(SecAggError, match="slot 1 is not of round 1, or it is used up"):
        one.keys.take_seed(1, 1)


@pytest.mark.parametrize("slot", [0, 1, 5, 33, 65535])
def test_a_slot_that_is_used_up_or_not_the_round_s_masks_nothing(slot: int) -> None:
    server = MaliciousServer(4, WORDS)
    server.collect(range(4), list(vectors(4, WORDS).values()))
    request = server.mask_request([0, 1, 2], slot)  # the round is the epoch's first
    with pytest.raises(SecAggError, match=f"slot {slot} is not of round 1, or it is used up"):
        server.clients[0].mask(request, np.zeros(WORDS, "<u4"))


# ---- the member's disk -------------------------------------------------------------------------------------------

SAVING = ("advertise", "deal", "confirm", "confirm", "begin", "ready", "mask", "open")


@pytest.mark.parametrize("nth", range(len(SAVING)), ids=lambda n: f"{n}-{SAVING[n]}")
def test_nothing_leaves_when_the_disk_is_full(nth: int) -> None:
    stage, step = Stage(Disk(full_from=nth)), SAVING[nth]
    stage.go(STEPS.index(step))
    stage.prepare(step)
    for _ in range(2):
        with pytest.raises(SecAggError) as error:
            stage.do(step)
        assert error.value.code in (Abort.STORAGE, Abort.CTX_MISMATCH, Abort.ROSTER)
    assert len(stage.disk.kept) == nth
    stage.disk.full_from = 1000  # even with room again nothing of this round leaves by asking again
    if step in ("mask", "open"):
        with pytest.raises(UnexpectedMessage):
            stage.do(step)


def test_every_message_is_on_disk_before_it_leaves() -> None:
    stage = Stage()
    for step in STEPS:
        stage.prepare(step)
        stored = len(stage.disk.kept)
        reply = stage.do(step)
        stage.replies[step] = reply or b""
        assert len(stage.disk.kept) == stored + SAVING.count(step)
        assert reply is None or stage.disk.kept[-1].has_said(reply)
        assert Latch.from_json(stage.disk.kept[-1].to_json()) == stage.disk.kept[-1]


@pytest.mark.parametrize("until", range(1, len(STATES)), ids=lambda u: f"after-{STEPS[u - 1]}")
def test_a_member_restarts_from_its_disk_at_every_stage(until: int, foreign: dict[str, bytes]) -> None:
    stage = Stage()
    stage.go(until)
    stage.restart(stage.disk.kept[-1])
    with pytest.raises(UnexpectedMessage, match="in state NEW"):
        stage.me.begin(foreign["begin"], MODEL)
    stage.go(3)
    stage.prepare("begin", 1, 0 if until < 4 else 1)
    if until >= STEPS.index("mask") + 1:
        with pytest.raises(SecAggError, match="round 1 is used up at this site") as error:
            stage.do("begin")
        assert error.value.code == Abort.LATCHED
        return
    if until >= 4:  # the attempt that was begun before the restart
        again = wire.RoundRequest.decode(stage.requests["begin"], 9)
        with pytest.raises(UnexpectedMessage, match="round 1 attempt 0 came"):
            stage.me.begin(wire.RoundRequest(again.epoch, 1, 0, MODEL, again.confirms).encode(), MODEL)
    stage.do("begin")
    stage.replies["ready"] = stage.do("ready") or b""
    stage.prepare("mask")
    assert stage.do("mask")


# ---- the server --------------------------------------------------------------------------------------------------


def test_the_server_takes_each_message_in_its_phase_only(foreign: dict[str, bytes]) -> None:
    """Every kind of a member's message of another run at every way in of the server, after each of its own steps."""

    def after(step: int) -> SecAggServer:
        stage = Stage()
        stage.go(step)
        if step < len(STEPS):
            stage.prepare(STEPS[step])
        return stage.server

    for step in range(len(STATES)):
        server = after(step)
        ways = (
            server.take_advertisement, server.take_deal, server.take_confirm, server.take_ready,
            server.take_masked, server.take_opened, server.take_abort,
        )  # fmt: skip
        for (kind, data), way in product(foreign.items(), ways):
            if kind == "reply to advertise" and way == server.take_advertisement and step == 0:
                continue  # what the members of the other run have advertised is genuine
            with pytest.raises(SecAggError):
                way(ME, data)


def test_the_server_asks_for_nothing_before_its_phase() -> None:
    federation = Federation(4)
    fresh = SecAggServer(federation.terms, ChainCheck(None))
    with pytest.raises(RoundLost, match="0 sites advertised keys"):
        fresh.directory()
    for early in ("mask_request", "open_request", "finish"):
        for server in (fresh, federation.server):
            with pytest.raises(UnexpectedMessage, match="a message of a round came"):
                getattr(server, early)()
    with pytest.raises(SecAggError, match="0 members cannot protect each other"):
        fresh.open_round(1, 0, MODEL)
    federation.server.open_round(1, 0, MODEL)
    with pytest.raises(RoundLost, match="0 of 4 sites have an update, the threshold is 3"):
        federation.server.mask_request()
    with pytest.raises(UnexpectedMessage, match="the masked vectors of the whole cohort"):
        federation.server.open_request()


@pytest.mark.parametrize("phase", ["train", "mask", "open"])
@pytest.mark.parametrize("count", [4, 5, 10])
def test_a_round_works_at_the_threshold_and_is_lost_one_below(phase: str, count: int) -> None:
    federation, summands = Federation(count, WORDS), vectors(count, WORDS)
    threshold = federation.terms.floors.threshold(count)
    result = federation.run(summands, lost={phase: names(count)[threshold:]})
    assert len(result.cohort) == (count if phase == "open" else threshold)
    assert np.array_equal(result.words, plain_sum(summands, result.cohort))
    with pytest.raises(RoundLost, match=f"{threshold - 1} of .* the threshold is {threshold}") as lost:
        federation.run(summands, 2, lost={phase: names(count)[threshold - 1 :]})
    assert lost.value.used_up == (phase == "open")
    assert lost.value.culprits == {}


@pytest.mark.parametrize(("count", "dropped"), [(4, 0), (7, 0), (10, 0), (10, 1), (10, 3)])
def test_wrong_shares_are_left_out_and_named_while_enough_right_ones_are_left(count: int, dropped: int) -> None:
    """Any threshold of right shares gives the sum; with fewer there is none, and never a wrong one."""
    threshold, left = terms(WORDS).floors.threshold(count), names(count)[: count - dropped]
    federation = Federation(count, WORDS, kinds=dict.fromkeys(names(count), Insider))
    for liars in range(count - dropped - threshold + 2):
        summands = vectors(count, WORDS, liars)

        def change(phase: str, name: str, data: bytes, liars: int = liars) -> bytes:
            return wrong_shares(federation, name, data) if phase == "open" and name in left[:liars] else data

        lost = {"mask": names(count)[count - dropped :]}
        if liars <= count - dropped - threshold:
            result = federation.run(summands, liars + 1, lost=lost, change=change)
            assert np.array_equal(result.words, plain_sum(summands, left))
            assert list(result.culprits) == left[:liars]
        else:
            with pytest.raises(RoundLost, match=f"{threshold - 1} of {count - dropped} sites sent their") as error:
                federation.run(summands, liars + 1, lost=lost, change=change)
            assert error.value.used_up
            assert list(error.value.culprits) == left[:liars]  # no honest member is blamed


def wrong_shares(federation: Federation, name: str, data: bytes) -> bytes:
    """OPN1 with another number in place of every share."""
    evil = federation.members[name]
    assert isinstance(evil, Insider)
    opened = wire.Opened.decode(data, (len(data) - 103) // 33)
    shares = tuple(bytes(1) + bytes(b ^ 0x55 for b in share[1:]) for share in opened.shares)
    return evil.signed(wire.Opened(opened.context, opened.member, shares, bytes(64)))


def test_opening_takes_the_same_work_whatever_members_send() -> None:
    """Counted in calls: every member's shares are held against commitments once, and one set of shares is combined."""
    federation = Federation(7, WORDS, kinds=dict.fromkeys(names(7), Insider))
    calls = {liars: finishing(federation, number, liars) for number, liars in enumerate((0, 1, 2, 7), start=1)}
    assert calls[0]["combine"] == calls[1]["combine"] == calls[2]["combine"] == 7
    assert "combine" not in calls[7]
    assert {counts["are_shares"] for counts in calls.values()} == {7}
    assert max(sum(counts.values()) for counts in calls.values()) <= 1.1 * sum(calls[0].values())


def finishing(federation: Federation, number: int, liars: int) -> dict[str, int]:
    """Calls of Python functions by name while a sum is opened to which some members send wrong shares, and often."""
    server, summands = federation.server, vectors(7, WORDS)
    counts: dict[str, int] = {}

    def count(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            counts[frame.f_code.co_name] = counts.get(frame.f_code.co_name, 0) + 1

    request = server.open_round(number, 0, MODEL)
    for name, one in federation.members.items():
        one.begin(request, MODEL)
        server.take_ready(name, one.ready())
    request = server.mask_request()
    for name, one in federation.members.items():
        server.take_masked(name, one.mask(request, summands[name]))
    request = server.open_request()
    for place, (name, one) in enumerate(federation.members.items()):
        data = one.open(request)
        for _ in range(5):
            server.take_opened(name, wrong_shares(federation, name, data) if place < liars else data)
    sys.setprofile(count)
    try:
        server.finish()
    except RoundLost:
        pass
    finally:
        sys.setprofile(None)
    return counts


def test_an_answer_after_its_phase_or_from_nobody_is_refused() -> None:
    federation, summands = Federation(5, WORDS), vectors(5, WORDS)
    server, members = federation.server, federation.members
    request = server.open_round(1, 0, MODEL)
    for name, one in members.items():
        one.begin(request, MODEL)
        server.take_ready(name, one.ready())
    with pytest.raises(SecAggError, match="site-003 speaks as member 0"):
        server.take_ready("site-003", members[ME].ready())
    request = server.mask_request()
    masked = {name: one.mask(request, summands[name]) for name, one in members.items()}
    for name in names(4):
        server.take_masked(name, masked[name])
    with pytest.raises(UnexpectedMessage, match="one vector of each member"):
        server.take_masked(ME, masked[ME])
    request = server.mask_request(server.missing)
    with pytest.raises(SecAggError, match="another job, round or attempt"):
        server.take_masked("site-004", masked["site-004"])  # late: the list is another one now
    again = {name: members[name].mask(request, summands[name]) for name in names(4)}
    for name, data in again.items():
        server.take_masked(name, data)
    context = wire.Masked.decode(again[ME], WORDS).context
    opened = members[ME].open(wire.OpenRequest(context).encode())
    with pytest.raises(SecAggError, match="the shares of site-000 are of another round"):
        server.take_opened(ME, opened)  # nobody has asked for them yet
    request = server.open_request()
    with pytest.raises(UnexpectedMessage, match="before the sum is opened"):
        server.take_masked(ME, again[ME])
    for name in names(4)[1:]:
        server.take_opened(name, members[name].open(request))
    server.take_opened(ME, opened)
    assert np.array_equal(server.finish().words, plain_sum(summands, names(4)))
    with pytest.raises(UnexpectedMessage, match="a message of a round came"):
        server.take_opened(ME, opened)


# ---- hundreds of broken messages ---------------------------------------------------------------------------------


def mutated(data: bytes, others: list[bytes], generator: np.random.Generator) -> bytes:
    """One broken version of a message."""
    at = int(generator.integers(len(data)))
    match int(generator.integers(7)):
        case 0:
            return data[:at]
        case 1:
            return data + generator.bytes(int(generator.integers(1, 70)))
        case 2:
            return data[:at] + bytes([data[at] ^ 1 << int(generator.integers(8))]) + data[at + 1 :]
        case 3:  # another message's end
            other = others[int(generator.integers(len(others)))]
            return data[:at] + other[int(generator.integers(len(other))) :]
        case 4:  # a count or a length somewhere
            return data[:at] + generator.choice([b"\xff\xff", b"\x00\x00", b"\x7f\xff\xff\xff"]) + data[at + 2 :]
        case 5:  # a message of another job, round or kind as it is
            return others[int(generator.integers(len(others)))]
        case _:
            size = int(generator.integers(1, 80))
            return data[:at] + data[at + size :]


def tolerable(step: str, right: bytes, broken: bytes) -> bool:
    """Whether a message that was taken says what the server may choose, or the same in other bytes of PEM."""
    match step:
        case "advertise":  # any later epoch
            one, other = (wire.AdvertiseRequest.decode(d) for d in (right, broken))
            return one.job_digest == other.job_digest
        case "deal":
            one, other = ([_core(a) for a in wire.Directory.decode(d, 128).adverts] for d in (right, broken))
            return one == other
        case "begin":  # any later round or attempt; confirmations that were checked before
            one, other = (wire.RoundRequest.decode(d, 128) for d in (right, broken))
            return (one.epoch, one.model_digest) == (other.epoch, other.model_digest)
        case "mask":  # any later slot; any list above the threshold with this member in it
            one, other = (wire.MaskRequest.decode(d, 128) for d in (right, broken))
            listed = 0 in other.cohort and len(other.cohort) >= 3
            return (one.epoch, one.round, one.attempt) == (other.epoch, other.round, other.attempt) and listed
        case "reply to advertise":
            return _core(right) == _core(broken)
    return False


def _core(advert: bytes) -> tuple[bytes, ...]:
    read = wire.Advertisement.decode(advert)
    return read.body, read.signature, read.session, read.session_signature


@pytest.fixture(scope="module")
def swaps(foreign: dict[str, bytes]) -> list[bytes]:
    """Messages of another run and of another job."""
    return [*foreign.values(), *everything(terms(WORDS, job_id="job-1")).values()]


def at(step: str) -> Stage:
    """A member about to take this step."""
    stage = Stage(agreed=terms(WORDS, attempts=65535))
    stage.go(STEPS.index(step))
    stage.prepare(step)
    return stage


# a refused directory or opening costs its epoch or slot, so that fewer are tried
TRIES = {"advertise": 500, "deal": 50, "confirm": 300, "begin": 300, "mask": 300, "open": 20}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")
@pytest.mark.parametrize("step", TRIES)
def test_broken_requests_are_refused_and_the_right_one_is_taken_after_them(step: str, swaps: list[bytes]) -> None:
    generator = np.random.default_rng(20 + STEPS.index(step))
    stage, taken, attempt = at(step), 0, 0
    for _ in range(TRIES[step]):
        right = stage.requests[step]
        broken = mutated(right, [d for d in swaps if d != right], generator)
        latch = stage.me.latch
        if broken == right:
            continue
        try:
            entries(stage)[step](broken)
        except SecAggError:
            assert stage.me.latch == latch
            assert stage.me.state in ("NEW", "DEALT", "READY")
            if step in ("deal", "open"):
                stage = at(step)
            if step == "mask":  # the round has ended: the next attempt, and the same list for it
                attempt += 1
                stage.me.begin(stage.server.open_round(1, attempt, MODEL), MODEL)
                asked = wire.MaskRequest.decode(right, 9)
                stage.requests[step] = wire.MaskRequest(asked.epoch, 1, attempt, asked.slot, asked.cohort).encode()
        else:
            assert tolerable(step, right, broken)
            stage, taken, attempt = at(step), taken + 1, 0
    assert taken < TRIES[step] / 6
    assert stage.do(step) or step == "begin"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")
@pytest.mark.parametrize("step", [step for step in STEPS if step != "begin"])
def test_broken_replies_are_refused_and_the_right_one_is_taken(step: str, swaps: list[bytes]) -> None:
    generator = np.random.default_rng(30 + STEPS.index(step))

    def waiting() -> tuple[Callable[[str, bytes], None], bytes]:
        stage = at(step)
        server, right = stage.server, stage.do(step) or b""
        return {
            "advertise": server.take_advertisement, "deal": server.take_deal, "confirm": server.take_confirm,
            "ready": server.take_ready, "mask": server.take_masked, "open": server.take_opened,
        }[step], right  # fmt: skip

    take, right = waiting()
    for _ in range(200):
        broken = mutated(right, [d for d in swaps if d != right], generator)
        if broken != right:
            try:
                take(ME, broken)
            except SecAggError:
                continue
            # what the members of another run have advertised is genuine
            assert tolerable(f"reply to {step}", right, broken) or (step == "advertise" and broken in swaps)
            take, right = waiting()
    take(ME, right)
