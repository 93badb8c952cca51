"""Every message in every state, faults of disks and members, and ten thousand broken messages: a clean refusal each."""

import pickle
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest

from fedmpt_core.secagg import messages as wire
from fedmpt_core.secagg.client import SecAggClient
from fedmpt_core.secagg.errors import Abort, SecAggError, UnexpectedMessage
from fedmpt_core.secagg.identity import ChainCheck, Trust
from fedmpt_core.secagg.key_exchange import KeyExchange
from fedmpt_core.secagg.latch import Latch
from fedmpt_core.secagg.policy import Terms
from fedmpt_core.secagg.roster import Roster
from fedmpt_core.secagg.server import RoundLost, SecAggServer
from tests.malicious import Insider
from tests.secagg import MODEL, Federation, identity, names, plain_sum, terms, vectors

STEPS = ("advertise", "confirm", "begin", "mask", "consistency", "unmask")
STATES = ("NEW", "ADVERTISED", "READY", "TRAINING", "MASKED", "CONSISTENT", "READY")
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
        self.disk, self.found = disk or Disk(), vectors(4, WORDS)
        self.others, self.epochs = {n: self._client(n, Disk(), None) for n in names(4)[1:]}, 0
        self.restart(latch)

    def _client(self, name: str, disk: Disk, latch: Latch | None) -> SecAggClient:
        return SecAggClient(self.terms, identity(name), None, None, latch, disk)

    def restart(self, latch: Latch | None) -> None:
        """A new process of the member; the server begins anew too."""
        self.me, self.server = self._client(ME, self.disk, latch), SecAggServer(self.terms, ChainCheck(None))
        while self.server.epoch < self.epochs:  # the others take none that they had
            self.server.open_epoch()
        self.requests: dict[str, bytes] = {}
        self.replies: dict[str, bytes] = {}

    @property
    def members(self) -> dict[str, SecAggClient]:
        """All four."""
        return {ME: self.me, **self.others}

    def prepare(self, step: str, number: int = 1, attempt: int = 0) -> None:
        """Have the server make the request of a step out of what came before."""
        match step:
            case "advertise":
                self.requests[step] = self.server.open_epoch(names(4))
                self.epochs = self.server.epoch
            case "confirm":
                for name, one in self.others.items():
                    self.server.take_advertisement(name, one.advertise(self.requests["advertise"]))
                self.server.take_advertisement(ME, self.replies["advertise"])
                self.requests[step] = self.server.directory()
            case "begin":
                for name, one in self.others.items():
                    self.server.take_confirm(name, one.confirm(self.requests["confirm"]))
                self.server.take_confirm(ME, self.replies["confirm"])
                self.requests[step] = self.server.open_round(number, attempt, names(4), MODEL)
            case "consistency":
                for name, one in self.others.items():
                    one.begin(self.requests["begin"], MODEL)
                    self.server.take_masked(name, one.mask(self.found[name]))
                self.server.take_masked(ME, self.replies["mask"])
                self.requests[step] = self.server.consistency_request()
            case "unmask":
                for name, one in self.others.items():
                    self.server.take_consistency(name, one.consistency(self.requests["consistency"]))
                self.server.take_consistency(ME, self.replies["consistency"])
                self.requests[step] = self.server.unmask_requests()[ME]

    def do(self, step: str) -> bytes | None:
        """The member's answer to the prepared request."""
        match step:
            case "begin":
                return self.me.begin(self.requests[step], MODEL)
            case "mask":
                return self.me.mask(self.found[ME])
        return getattr(self.me, step)(self.requests[step])

    def go(self, until: int, number: int = 1, attempt: int = 0) -> None:
        """The first steps, each with the right request."""
        for step in STEPS[:until]:
            self.prepare(step, number, attempt)
            self.replies[step] = self.do(step) or b""


def everything() -> dict[str, bytes]:
    """One right request of each kind, and one of each kind that members send themselves, from another run."""
    other = Stage(agreed=terms(WORDS))
    other.go(6)
    return other.requests | {f"reply to {step}": data for step, data in other.replies.items() if data}


def entries(stage: Stage) -> dict[str, Callable[[bytes], object]]:
    """A member's ways in for bytes."""
    me = stage.me
    return {
        "advertise": me.advertise,
        "confirm": me.confirm,
        "begin": lambda data: me.begin(data, MODEL),
        "consistency": me.consistency,
        "unmask": me.unmask,
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
        stage.server.take_unmask(name, one.unmask(stage.server.unmask_requests()[name]))
    stage.server.take_unmask(ME, stage.replies["unmask"])
    assert np.array_equal(stage.server.finish().words, plain_sum(stage.found, names(4)))


@pytest.mark.parametrize(("until", "step"), list(product(range(7), STEPS)), ids=str)
def test_each_step_is_taken_in_its_state_only(until: int, step: str) -> None:
    """The right message of every step, where there is one yet, else that of another run; in every state."""
    stage = Stage()
    stage.go(until)
    done, legal = STEPS[:until], STEPS[until] if until < 6 else ""
    if step == legal:
        return  # shown by the walk above
    foreign = everything() if step not in done and step != "mask" else {}
    stage.requests = foreign | stage.requests
    before, stored = stage.me.latch, len(stage.disk.kept)
    if step in done and step not in ("begin", "mask"):
        assert stage.do(step) == stage.replies[step]  # the same request again: the same bytes, no other state
        assert stage.me.state == STATES[until]
    elif step == "begin" and step in done:
        assert stage.do(step) == (stage.replies.get("mask") or None)
        assert stage.me.state == STATES[until]
    else:
        with pytest.raises(UnexpectedMessage) as error:
            stage.do(step)
        assert error.value.code == Abort.CTX_MISMATCH
        left = {"TRAINING": "READY", "MASKED": "READY", "CONSISTENT": "READY"}
        keeps = step == "mask"  # called by the site's own program, with no message that could be wrong
        assert stage.me.state == (STATES[until] if keeps else left.get(STATES[until], STATES[until]))
    assert stage.me.latch == before
    assert len(stage.disk.kept) == stored
    for other in [s for s in done if s not in ("begin", "mask")]:  # what was answered is answered again
        assert stage.do(other) == stage.replies[other]


@pytest.mark.parametrize("until", range(7), ids=lambda u: f"after-{u}-steps")
def test_a_message_of_any_kind_at_any_other_way_in_is_refused(until: int) -> None:
    """Requests of other steps and every reply, at every way in, each before a fresh member."""
    kinds = everything()
    stage = Stage()
    stage.go(until)
    for (kind, data), way in product(kinds.items(), entries(stage)):
        if kind == way:
            continue
        before = stage.me.latch
        with pytest.raises(SecAggError):
            entries(stage)[way](data)
        assert stage.me.latch == before
    assert stage.me.state in ("NEW", "ADVERTISED", "READY")
    assert not stage.me.round


@pytest.mark.parametrize("step", STEPS)
def test_a_refusal_in_a_round_forgets_what_could_open_it(step: str) -> None:
    stage = Stage()
    stage.go(STEPS.index(step))
    if step in ("mask", "consistency", "unmask"):
        with pytest.raises(SecAggError):
            stage.me.consistency(b"\xffCSY1")
        assert not stage.me.round
        stage.prepare(step)
        with pytest.raises(UnexpectedMessage, match="in state READY"):
            stage.do(step)


def test_members_keys_are_neither_copied_nor_pickled() -> None:
    stage = Stage()
    stage.go(3)
    exchange = KeyExchange(stage.terms, identity(ME), Trust(Roster.unpinned(names(4)), None), 1)
    for secret in (stage.me, exchange, identity(ME)):
        with pytest.raises(SecAggError, match="may not be copied or stored"):
            pickle.dumps(secret)


# ---- the member's disk -------------------------------------------------------------------------------------------

SAVING = ("advertise", "confirm", "mask", "consistency", "unmask")


@pytest.mark.parametrize("nth", range(5), ids=SAVING)
def test_nothing_leaves_when_the_disk_is_full(nth: int) -> None:
    stage = Stage(Disk(full_from=nth))
    stage.go(STEPS.index(SAVING[nth]))
    before = stage.me.latch
    stage.prepare(SAVING[nth])
    for _ in range(2):
        with pytest.raises(SecAggError) as error:
            stage.do(SAVING[nth])
        assert error.value.code in (Abort.STORAGE, Abort.CTX_MISMATCH)
    assert stage.me.latch == before
    assert not stage.me.round
    stage.disk.full_from = 1000  # even with room again nothing of this round leaves by asking again
    if SAVING[nth] in ("mask", "consistency", "unmask"):
        with pytest.raises(UnexpectedMessage):
            stage.do(SAVING[nth])


def test_every_message_is_on_disk_before_it_leaves() -> None:
    stage = Stage()
    for until, step in enumerate(STEPS):
        stage.prepare(step)
        stored = len(stage.disk.kept)
        reply = stage.do(step)
        stage.replies[step] = reply or b""
        if reply:
            assert len(stage.disk.kept) == stored + 1, until
            assert stage.disk.kept[-1].has_said(reply)
            assert Latch.from_json(stage.disk.kept[-1].to_json()) == stage.disk.kept[-1]


@pytest.mark.parametrize("until", range(1, 7), ids=lambda u: f"after-{STEPS[u - 1]}")
def test_a_member_restarts_from_its_disk_at_every_stage(until: int) -> None:
    stage = Stage()
    stage.go(until)
    stage.restart(stage.disk.kept[-1])
    with pytest.raises(UnexpectedMessage, match="in state NEW"):
        stage.me.begin(everything()["begin"], MODEL)
    signed = until >= 5
    stage.go(2)
    stage.prepare("begin", 1, 0 if until < 4 else 1)
    if signed:
        with pytest.raises(SecAggError, match="cannot be repeated") as error:
            stage.do("begin")
        assert error.value.code == Abort.LATCHED
    else:
        assert stage.do("begin") is None
        stage.replies["mask"] = stage.do("mask") or b""
        assert stage.replies["mask"]
    if until == 4:  # the attempt whose vector had left before the restart
        stage.restart(stage.disk.kept[-1])
        stage.go(2)
        stage.prepare("begin", 1, 0)
        with pytest.raises(UnexpectedMessage, match="round 1 attempt 0 came"):
            stage.do("begin")


# ---- the server --------------------------------------------------------------------------------------------------


def test_the_server_takes_each_message_in_its_phase_only() -> None:
    """Every kind of a member's message at every way in of the server, after each of its own steps."""
    sent = Federation(4)
    kinds = everything()

    def after(step: int) -> SecAggServer:
        stage = Stage()
        stage.go(step)
        if step < 6 and STEPS[step] != "mask":
            stage.prepare(STEPS[step])
        return stage.server

    for step in range(7):
        server = after(step)
        ways = (server.take_advertisement, server.take_confirm, server.take_masked, server.take_consistency)
        for (kind, data), way in product(kinds.items(), (*ways, server.take_unmask, server.take_abort)):
            if kind == "reply to advertise" and way == server.take_advertisement and step == 0:
                continue  # what the members of the other run have advertised is genuine
            with pytest.raises(SecAggError):
                way(ME, data)
    with pytest.raises(RoundLost, match="0 sites advertised keys"):
        SecAggServer(sent.terms, ChainCheck(None)).directory()
    for early in ("consistency_request", "unmask_requests", "finish"):
        with pytest.raises(UnexpectedMessage, match="a message of a round came"):
            getattr(sent.server, early)()
    with pytest.raises(SecAggError, match="cannot protect its members"):
        SecAggServer(sent.terms, ChainCheck(None)).open_round(1, 0, names(4), MODEL)
    sent.begin()
    for early in ("unmask_requests", "finish"):
        with pytest.raises(RoundLost, match="the threshold is 3"):
            getattr(sent.server, early)()


@pytest.mark.parametrize("phase", ["masked", "consistency", "unmask"])
@pytest.mark.parametrize("count", [4, 5, 10])
def test_a_round_works_at_the_threshold_and_is_lost_one_below(phase: str, count: int) -> None:
    federation, found = Federation(count, WORDS), vectors(count, WORDS)
    threshold = federation.terms.floors.threshold(count)
    missing = {phase: names(count)[threshold:]}
    result = federation.run(found, lost=missing)
    survivors = names(count)[:threshold] if phase == "masked" else names(count)
    assert np.array_equal(result.words, plain_sum(found, survivors))
    with pytest.raises(RoundLost, match=f"{threshold - 1} of .* the threshold is {threshold}") as lost:
        federation.run(found, 2, lost={phase: names(count)[threshold - 1 :]})
    assert lost.value.signed == (phase != "masked")
    assert lost.value.culprits == ()


@pytest.mark.parametrize(("count", "dropped"), [(4, 0), (7, 0), (10, 0), (10, 1), (10, 3)])
def test_wrong_shares_are_corrected_and_named_while_enough_right_ones_are_left(count: int, dropped: int) -> None:
    """Any threshold of right shares gives the sum; with fewer there is none, and never a wrong one."""
    threshold = terms(WORDS).floors.threshold(count)
    for liars in range(count - dropped - threshold + 2):
        federation, found = Federation(count, WORDS), vectors(count, WORDS)
        survivors = names(count)[: count - dropped]
        evil = {n: Insider(federation.members[n], range(count), WORDS) for n in survivors[:liars]}

        def change(phase: str, name: str, data: bytes, evil=evil, survivors=survivors) -> bytes:  # type: ignore[no-untyped-def]
            if phase != "unmask" or name not in evil:
                return data
            owners = range(len(survivors))
            data = evil[name].with_bad_shares_for(data, owners, owners, edges=True)
            return evil[name].with_bad_shares_for(data, owners, owners)

        lost = {"masked": names(count)[count - dropped :]}
        if liars <= count - dropped - threshold:
            result = federation.run(found, lost=lost, change=change)
            assert np.array_equal(result.words, plain_sum(found, survivors))
            assert result.culprits == tuple(survivors[:liars])
        else:
            with pytest.raises(RoundLost, match="does not open") as error:
                federation.run(found, lost=lost, change=change)
            assert error.value.signed
            assert set(error.value.culprits) <= set(survivors[:liars])  # no honest member is blamed


def test_an_answer_after_its_phase_or_from_nobody_is_refused() -> None:
    federation, found = Federation(4, WORDS), vectors(4, WORDS)
    server, request = federation.server, federation.begin()
    replies = {}
    for name, one in federation.members.items():
        one.begin(request, MODEL)
        replies[name] = one.mask(found[name])
    for name in names(3):
        server.take_masked(name, replies[name])
    listed = server.consistency_request()
    with pytest.raises(UnexpectedMessage, match="before the round is closed"):
        server.take_masked("site-003", replies["site-003"])
    signed = {n: federation.members[n].consistency(listed) for n in names(3)}
    with pytest.raises(SecAggError, match="site-003 speaks as member 0"):
        server.take_consistency("site-003", signed["site-000"])
    forged = wire.Consistent(3, wire.Consistent.decode(signed["site-000"]).signature).encode()
    with pytest.raises(UnexpectedMessage, match="one of a survivor"):
        server.take_consistency("site-003", forged)
    for name in names(3):
        server.take_consistency(name, signed[name])
    shares = {n: federation.members[n].unmask(r) for n, r in server.unmask_requests().items()}
    for name, data in shares.items():
        server.take_unmask(name, data)
    assert np.array_equal(server.finish().words, plain_sum(found, names(3)))
    for take, data in ((server.take_unmask, shares[ME]), (server.take_consistency, signed[ME])):
        with pytest.raises(UnexpectedMessage, match="a message of a round came"):
            take(ME, data)


# ---- ten thousand broken messages --------------------------------------------------------------------------------


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
        case "advertise":  # any later epoch; any names, where identities are ephemeral
            one, other = (wire.AdvertiseRequest.decode(d, 128) for d in (right, broken))
            return one.job_digest == other.job_digest and ME in other.names
        case "begin":  # any later round; confirmations that were checked before
            one, other = (wire.RoundRequest.decode(d, 128) for d in (right, broken))
            return (one.epoch, one.model_digest, one.cohort) == (other.epoch, other.model_digest, other.cohort)
        case "confirm":
            one, other = ([_core(a) for a in wire.Directory.decode(d, 128).adverts] for d in (right, broken))
            return one == other
        case "reply to advertise":
            return _core(right) == _core(broken)
    return False


def _core(advert: bytes) -> tuple[bytes, ...]:
    said = wire.Advertisement.decode(advert)
    return said.body, said.signature, said.session, said.session_signature


def messages_to_swap() -> tuple[dict[str, bytes], list[bytes]]:
    """Every message of one job, and those of another."""
    another = Stage(agreed=terms(WORDS, job_id="job-1"))
    another.go(6)
    return everything(), [d for d in (*another.requests.values(), *another.replies.values()) if d]


def at(step: str) -> Stage:
    """A member about to take this step."""
    stage = Stage()
    stage.go(STEPS.index(step))
    stage.prepare(step)
    return stage


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")
@pytest.mark.parametrize("step", [s for s in STEPS if s != "mask"])
def test_a_thousand_broken_requests_are_refused_and_rounds_go_on(step: str) -> None:
    generator = np.random.default_rng(20 + STEPS.index(step))
    own, foreign = messages_to_swap()
    stage, taken = at(step), 0
    for _ in range(1000):
        right, others = stage.requests[step], foreign + [d for k, d in own.items() if k != step]
        broken = mutated(right, others, generator)
        latch, state, opened = stage.me.latch, stage.me._state, stage.me._round
        if broken == right:
            continue
        try:
            entries(stage)[step](broken)
        except SecAggError:
            assert stage.me.latch == latch
            assert not stage.me.round
            stage.me._state, stage.me._round = state, opened  # a refusal ends the round; the next begins there
        else:
            assert tolerable(step, right, broken)
            taken += 1
            stage = at(step)
    assert taken < 150
    assert stage.do(step) or step == "begin"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")
@pytest.mark.parametrize("step", [s for s in STEPS if s != "begin"])
def test_a_thousand_broken_replies_are_refused_and_the_right_one_is_taken(step: str) -> None:
    generator = np.random.default_rng(30 + STEPS.index(step))
    own, foreign = messages_to_swap()
    stage, reply = at(step), f"reply to {step}"
    right = stage.do(step) or b""
    server = stage.server
    take = {
        "advertise": server.take_advertisement,
        "confirm": server.take_confirm,
        "mask": server.take_masked,
        "consistency": server.take_consistency,
        "unmask": server.take_unmask,
    }[step]
    if step == "confirm":
        for name, one in stage.others.items():
            server.take_confirm(name, one.confirm(stage.requests["confirm"]))
    for _ in range(1000):
        broken = mutated(right, foreign + [d for k, d in own.items() if k != reply], generator)
        if broken == right:
            continue
        try:
            take(ME, broken)
        except SecAggError:
            continue
        assert tolerable(reply, right, broken)
        server._members.clear()
    take(ME, right)
