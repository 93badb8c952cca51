"""What masked vectors, texts, logs and a server's memory say of a member: nothing. Broken twins prove the searches."""

import ast
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import combinations, product
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
from scipy import stats

import fedmpt_core.secagg.client as client_module
import fedmpt_core.secagg.key_exchange as exchange_module
import fedmpt_core.secagg.keys as keys_module
from fedmpt_core.secagg.client import SecAggClient
from fedmpt_core.secagg.errors import SecAggError
from fedmpt_core.secagg.keys import self_mask_key
from fedmpt_core.secagg.masking import add_all
from fedmpt_core.secagg.server import RoundLost
from fedmpt_core.secagg.shamir import Lagrange
from tests.malicious import MaliciousServer
from tests.secagg import MODEL, Federation, member, names, plain_sum, terms, vectors

ROOT = Path(__file__).parents[3]
MODULES = sorted((ROOT / "fedmpt_core" / "secagg").glob("*.py"))
WORDS = 60_000
LEAST_P = 1e-7  # chance that a right vector fails, per test


def byte_p(words: np.ndarray) -> float:
    """p-value that all four bytes of words are uniform; each place on its own."""
    places = words.astype("<u4").view(np.uint8).reshape(-1, 4)
    return min(float(stats.chisquare(np.bincount(places[:, k], minlength=256)).pvalue) for k in range(4))


def correlation(words: np.ndarray, vector: np.ndarray) -> float:
    """Of signed values, in standard deviations from none."""
    one, other = words.astype("<i4").astype(float), vector.astype("<i4").astype(float)
    return abs(float(np.corrcoef(one, other)[0, 1])) * len(words) ** 0.5


def update(seed: int = 0) -> np.ndarray:
    """What an encoded update looks like: small numbers of both signs, many of them zero."""
    generator = np.random.default_rng(seed)
    values = np.rint(generator.standard_normal(WORDS) * 2000) * (generator.random(WORDS) < 0.7)
    return values.astype(np.int64).astype("<u4")


# ---- statistics --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vector", [np.zeros(WORDS, "<u4"), update()], ids=["zeros", "update"])
def test_masked_words_are_uniform_and_uncorrelated_with_the_vector(vector: np.ndarray) -> None:
    server = MaliciousServer(3, WORDS)
    ctx = server.collect(range(3), [vector] * 3)
    for i in range(3):
        words = server.masked[ctx, i].vector
        assert byte_p(words) > LEAST_P
        assert not vector.any() or correlation(words, vector) < 6
        assert abs(np.corrcoef(words[:-1].astype(float), words[1:].astype(float))[0, 1]) * WORDS**0.5 < 6
    pairs = [server.masked[ctx, i].vector - server.masked[ctx, j].vector for i, j in combinations(range(3), 2)]
    assert all(byte_p(words) > LEAST_P for words in pairs)


def no_mask(vector: np.ndarray, plus: list[bytes], minus: list[bytes]) -> None:
    """Twin: the vector as it is."""


def one_number(vector: np.ndarray, plus: list[bytes], minus: list[bytes]) -> None:
    """Twin: one secret number for all words."""
    vector += np.frombuffer(plus[0][:4], "<u4")[0]


def low_half(vector: np.ndarray, plus: list[bytes], minus: list[bytes]) -> None:
    """Twin: masks of 16 bits."""
    masks = np.zeros(len(vector), "<u4")
    add_all(masks, plus, minus)
    vector += masks & np.uint32(0xFFFF)


def edges_only(vector: np.ndarray, plus: list[bytes], minus: list[bytes]) -> None:
    """Twin: no self mask."""
    add_all(vector, plus[1:], minus)


def self_only(vector: np.ndarray, plus: list[bytes], minus: list[bytes]) -> None:
    """Twin: no edges."""
    add_all(vector, plus[:1], [])


@pytest.mark.parametrize("twin", [no_mask, one_number, low_half], ids=lambda f: f.__name__)
def test_the_statistics_see_a_broken_mask(twin: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "add_all", twin)
    server = MaliciousServer(3, WORDS)
    ctx = server.collect(range(3), [update()] * 3)
    assert byte_p(server.masked[ctx, 0].vector) < LEAST_P


def test_without_self_masks_vectors_of_a_cohort_add_up_to_their_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "add_all", edges_only)
    server = MaliciousServer(3, WORDS)
    ctx = server.collect(range(3), [update()] * 3)
    added = np.asarray(np.sum([server.masked[ctx, i].vector for i in range(3)], axis=0, dtype=np.uint32))
    assert np.array_equal(added, update() * np.uint32(3))
    assert byte_p(added) < LEAST_P


def test_with_self_masks_vectors_of_a_cohort_add_up_to_noise() -> None:
    server = MaliciousServer(3, WORDS)
    ctx = server.collect(range(3), [update()] * 3)
    added = np.sum([server.masked[ctx, i].vector for i in range(3)], axis=0, dtype=np.uint32)
    assert byte_p(np.asarray(added)) > LEAST_P


def test_a08_a_vector_whose_list_was_not_opened_stays_uniform_after_all_that_the_server_may_learn() -> None:
    """A member's vector comes too late: the next list is opened without it, and nothing of the first list ever is."""
    server = MaliciousServer(5, WORDS)
    inputs = [update(i) for i in range(5)]
    first = server.collect(range(5), inputs)
    second = server.collect(range(4), inputs, turn=2)
    server.open(second, range(4), range(4))
    assert np.array_equal(server.sum(second, range(4)), plain_sum(dict(zip("01234", inputs, strict=True)), "0123"))
    for ctx, i in ((first, 4), (first, 0)):
        words = server.masked[ctx, i].vector
        assert byte_p(words) > LEAST_P
        assert correlation(words, inputs[i]) < 6
    # with the seeds of the second list in hand: those of the first are others, and edges of both lists differ
    lists = [server.masked[ctx, 0].vector for ctx in (first, second)]
    assert byte_p(lists[0] - lists[1]) > LEAST_P


def test_without_edges_what_was_opened_takes_the_mask_off_each_single_vector(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: self masks alone would leave every vector bare as soon as their sum is opened."""
    monkeypatch.setattr(client_module, "add_all", self_only)
    server = MaliciousServer(4, WORDS)
    ctx = server.collect(range(4), [update(i) for i in range(4)])
    server.open(ctx, range(4), range(4))
    assert np.array_equal(bared(server, ctx, 2), update(2))


def test_what_was_opened_leaves_each_single_vector_uniform() -> None:
    server = MaliciousServer(4, WORDS)
    ctx = server.collect(range(4), [update(i) for i in range(4)])
    server.open(ctx, range(4), range(4))
    for i in range(4):
        assert byte_p(bared(server, ctx, i)) > LEAST_P
        assert correlation(bared(server, ctx, i), update(i)) < 6


def bared(server: MaliciousServer, ctx: bytes, i: int) -> np.ndarray:
    """A vector without the self mask whose shares came."""
    shares = server.shares[ctx]
    seed = Lagrange([1, 2, 3]).combine([shares[holder][i] for holder in range(3)])
    words = server.masked[ctx, i].vector.copy()
    add_all(words, [], [self_mask_key(seed, ctx)])
    return words


# ---- texts and logs ----------------------------------------------------------------------------------------------


@pytest.fixture
def secrets_seen(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Every secret of 16 bytes or more that members make, as it is made."""
    seen: list[bytes] = []

    def noting(made: Callable[..., bytes]) -> Callable[..., bytes]:
        def make(*given: object) -> bytes:
            secret = made(*given)
            seen.append(bytes(secret))
            return secret

        return make

    monkeypatch.setattr(keys_module, "_hkdf", noting(keys_module._hkdf))
    monkeypatch.setattr(exchange_module, "random_element", noting(exchange_module.random_element))
    generate = exchange_module.X25519PrivateKey.generate

    class Exchange:
        @staticmethod
        def generate() -> object:
            key = generate()
            seen.append(key.private_bytes_raw())
            return key

    class Signing:
        @staticmethod
        def generate() -> object:
            key = signing()
            seen.append(key.private_bytes_raw())
            return key

    signing = exchange_module.Ed25519PrivateKey.generate
    monkeypatch.setattr(exchange_module, "X25519PrivateKey", Exchange)
    monkeypatch.setattr(exchange_module, "Ed25519PrivateKey", Signing)
    return seen


def holds(text: bytes, secret: bytes) -> bool:
    """A secret or either half of it, raw, in hex of any case, or as Python shows bytes."""
    lower = text.lower()
    parts = (secret, secret[-32:-16], secret[-16:])  # a share may begin with a zero
    return any(p in text or p.hex().encode() in lower or repr(p)[2:-1].encode() in text for p in parts)


def test_no_secret_is_in_a_message_a_text_or_a_log(secrets_seen: list[bytes], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    texts: list[bytes] = []

    def heard(phase: str, name: str, data: bytes) -> bytes:
        texts.append(data)
        return data

    federation, summands = Federation(4, 8, change=heard), vectors(4, 8)
    federation.run(summands, 1, change=heard)
    federation.run(summands, 2, lost={"mask": ["site-003"]}, change=heard)
    with pytest.raises(RoundLost) as lost:
        federation.run(summands, 3, lost={"mask": names(4)[:2]}, change=heard)
    refusals: list[BaseException] = [lost.value]
    for one in federation.members.values():
        ways = (one.advertise, one.deal, one.confirm, one.show, one.open)
        more = (lambda d, one=one: one.begin(d, MODEL), lambda d, one=one: one.mask(d, summands[one.name]))
        for call, data in product((*ways, *more), (*texts[:4], b"", b"\xffOPQ1" + bytes(32), federation.directory)):
            try:
                call(data)
            except SecAggError as error:
                refusals.append(error)
                texts.append(one.abort(error))
        exchange = one._exchange
        assert exchange is not None
        texts += [repr(thing).encode() for thing in (one, exchange, exchange.pairs, one._identity, one._round)]
        texts += [one.latch.to_json().encode(), repr(one.latch).encode()]
    texts += [repr(e).encode() + str(e).encode() + repr(e.__context__).encode() for e in refusals]
    texts += [record.getMessage().encode() for record in caplog.records]
    assert len(refusals) > 50
    assert len(secrets_seen) > 100
    for secret in secrets_seen:
        assert len(secret) >= 32
        assert not any(holds(text, secret) for text in texts)


def test_the_search_for_secrets_finds_them_in_every_form(secrets_seen: list[bytes]) -> None:
    Federation(3)
    secret = secrets_seen[0]
    forms = (secret, b"x" + secret[-16:], secret.hex().encode(), secret.hex().upper().encode(), repr(secret).encode())
    assert all(holds(b"before " + form + b" after", secret) for form in forms)


# ---- source ------------------------------------------------------------------------------------------------------

BANNED_IMPORTS = {"random", "logging", "torch", "nvflare", "socket", "pickle", "subprocess", "requests", "urllib"}
BANNED_NAMES = {"print", "open", "eval", "exec", "input", "breakpoint"}


def offences(source: str) -> set[str]:
    """What secure code must not use."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.split(".")[0] in BANNED_IMPORTS}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in BANNED_IMPORTS:
            found.add(str(node.module))
        elif isinstance(node, ast.Name) and node.id in BANNED_NAMES:
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith(("np.random", "numpy.random")):
            found.add("np.random")
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_the_protocol_draws_no_weak_numbers_and_neither_prints_logs_nor_opens(path: Path) -> None:
    assert not offences(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "source",
    ["import random", "from random import choice", "x = np.random.rand(3)", "import logging", "print(1)", "open('x')"],
)
def test_the_search_of_the_source_sees_each_of_them(source: str) -> None:
    assert offences(source)


# ---- a server's memory -------------------------------------------------------------------------------------------

CHILD = """
import pickle, sys
from tests.secagg import MODEL, terms, names
from fedmpt_core.secagg.identity import ChainCheck
from fedmpt_core.secagg.server import SecAggServer
server = SecAggServer(terms({words}), ChainCheck(None))
kept = []  # what a careless server is sent
while True:
    size = sys.stdin.buffer.read(8)
    if not size:
        break
    call, given = pickle.loads(sys.stdin.buffer.read(int.from_bytes(size, 'big')))
    del size
    answer = kept.append(given[0]) if call == 'keep' else getattr(server, call)(*given)
    del given
    if call == 'finish':
        answer = answer.words
    data = pickle.dumps(answer)
    sys.stdout.buffer.write(len(data).to_bytes(8, 'big') + data)
    sys.stdout.buffer.flush()
"""
MEMORY_WORDS = 4096


class ServerProcess:
    """A real server in a process of its own, whose memory can be read."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", CHILD.format(words=MEMORY_WORDS)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def call(self, name: str, *given: object) -> Any:
        """One call of the server."""
        data = pickle.dumps((name, given))
        into, out = self._pipes()
        into.write(len(data).to_bytes(8, "big") + data)
        into.flush()
        size = int.from_bytes(out.read(8), "big")
        assert size, "the server's process has ended"
        return pickle.loads(out.read(size))

    def memory(self) -> bytes:
        """All writable memory of the process."""
        parts = []
        folder = Path("/proc", str(self._process.pid))
        with (folder / "maps").open() as maps, (folder / "mem").open("rb", buffering=0) as memory:
            for line in maps:
                area, rights = line.split()[:2]
                if not rights.startswith("rw") or "[v" in line:
                    continue
                start, end = (int(x, 16) for x in area.split("-"))
                try:
                    memory.seek(start)
                    parts.append(memory.read(end - start) or b"")
                except (OSError, ValueError, OverflowError):
                    continue
        return b"".join(parts)

    def end(self) -> None:
        """Close the pipes and wait."""
        into, out = self._pipes()
        into.close()
        self._process.wait(timeout=60)
        out.close()

    def _pipes(self) -> tuple[IO[bytes], IO[bytes]]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        return self._process.stdin, self._process.stdout


@pytest.fixture
def process() -> Iterator[ServerProcess]:
    """Skips where the memory of a child may not be read."""
    made = ServerProcess()
    try:
        made.call("open_epoch", 1)
        try:
            if len(made.memory()) < 1 << 20:
                pytest.skip("the memory of a child process cannot be read here")
        except OSError:
            pytest.skip("the memory of a child process cannot be read here")
        yield made
    finally:
        made.end()


def traces(values: np.ndarray) -> list[bytes]:
    """A vector's middle parts as an encoded vector, as float32 and as float64."""
    part = values[1000:1008]
    scaled = part.astype("<i4") / 2.0**20
    return [part.tobytes(), scaled.astype("<f4").tobytes(), scaled.astype("<f8").tobytes()]


def whose(inputs: dict[str, np.ndarray], dump: bytes) -> set[str]:
    """The members whose vectors can be read there."""
    return {name for name, vector in inputs.items() for trace in traces(vector) if trace in dump}


def exchange_keys(process: ServerProcess, members: dict[str, SecAggClient]) -> None:
    """What a round starts from."""
    request = process.call("open_epoch", 1)
    for name, one in members.items():
        process.call("take_advertisement", name, one.advertise(request))
    directory = process.call("directory")
    for name, one in members.items():
        process.call("take_deal", name, one.deal(directory))
    for name, request in process.call("deals").items():
        process.call("take_confirm", name, members[name].confirm(request))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> tuple[list[bytes], list[bytes]]:
    """Secrets of slots and keys of masks, as members make them: those of edges, then that of the own mask."""
    seeds: list[bytes] = []
    keys: list[bytes] = []
    draw, derive = exchange_module.random_element, keys_module._hkdf

    def deriving(secret: bytes, info: bytes, *length: int) -> bytes:
        key = derive(secret, info, *length)
        if info.startswith((b"mask", b"self")):
            keys.append(key)
        return key

    monkeypatch.setattr(exchange_module, "random_element", lambda: seeds.append(draw()) or seeds[-1])
    monkeypatch.setattr(keys_module, "_hkdf", deriving)
    return seeds, keys


def keep_plain(process: ServerProcess, vector: np.ndarray) -> None:
    """What a careless program would send beside the masked vector."""
    for trace in (vector, vector.astype("<i4") / 2.0**20):
        process.call("keep", trace)
        process.call("keep", trace.astype("<f4"))


@pytest.mark.slow
@pytest.mark.parametrize("careless", [False, True], ids=["real", "twin-that-is-sent-the-vector"])
def test_a_server_s_memory_holds_no_vector_and_no_key_that_opens_one(
    process: ServerProcess, made: tuple[list[bytes], list[bytes]], careless: bool
) -> None:
    seeds, keys = made
    agreed = terms(MEMORY_WORDS)
    members = {n: member(n, agreed) for n in names(4)}
    inputs = {n: np.random.default_rng(i).integers(0, 2**32, MEMORY_WORDS, np.uint32) for i, n in enumerate(members)}
    exchange_keys(process, members)
    dumps = {"setup": process.memory()}
    request = process.call("open_round", 1, 0, MODEL)
    for name, one in members.items():
        one.begin(request, MODEL)
        process.call("take_ready", name, one.ready())
    request, replies = process.call("mask_request"), {}
    for name, one in members.items():
        replies[name] = one.mask(request, inputs[name])
        if careless:
            keep_plain(process, inputs[name])
    for name in names(3):  # the last vector comes too late, and the second list is without it
        process.call("take_masked", name, replies[name])
    dumps["masked"] = process.memory()
    request = process.call("mask_request", ["site-003"])
    for name in names(3):
        process.call("take_masked", name, members[name].mask(request, inputs[name]))
    # of each member, the secrets of the two slots that were used; then all keys of masks of both lists
    secrets = [seeds[32 * i + slot] for i in range(4) for slot in range(2)] + keys
    assert (len(seeds), len(keys)) == (128, 4 * 4 + 3 * 3)
    request = process.call("open_request")
    dumps["open"] = process.memory()
    for name in names(3):
        process.call("take_opened", name, members[name].open(request))
    total = process.call("finish")
    dumps["finish"] = process.memory()

    assert np.array_equal(total, plain_sum(inputs, names(3)))
    assert traces(np.asarray(total))[0] in dumps["finish"]  # what a server may know is found, so the search works
    assert replies["site-000"][5:37] in dumps["masked"]
    leaks = {phase: whose(inputs, dump) for phase, dump in dumps.items()}
    if careless:
        assert leaks == {phase: set() if phase == "setup" else set(names(4)) for phase in dumps}
        return
    assert leaks == {phase: set() for phase in dumps}
    opened = {seeds[32 * i + 1] for i in range(3)} | set(keys[18::3])  # of the second list, own masks only
    for phase, dump in dumps.items():
        allowed = opened if phase == "finish" else set()
        assert not [secret for secret in secrets if secret in dump and secret not in allowed], phase
