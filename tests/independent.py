"""FLARE-SA/2's derivations a second time, from the standards and the standard library alone.

Slow and plain on purpose: nothing here comes from `fedmpt_core` or `cryptography`, so a known answer that both give is
not one bug written twice. Never for secrets.
"""

import hmac
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, reduce
from hashlib import sha256
from typing import Any

P = 2**255 - 19
FIELD = 2**256 + 297


# RFC 7748


def x25519(scalar: bytes, u: bytes) -> bytes:
    """The Montgomery ladder of section 5."""
    k = (int.from_bytes(scalar, "little") & ~7 & ~(128 << 8 * 31)) | 64 << 8 * 31
    x1 = int.from_bytes(u, "little") % 2**255 % P
    x2, z2, x3, z3, swap = 1, 0, x1, 1, 0
    for t in reversed(range(255)):
        bit = k >> t & 1
        if swap ^ bit:
            x2, x3, z2, z3 = x3, x2, z3, z2
        swap = bit
        a, b, c, d = x2 + z2, x2 - z2, x3 + z3, x3 - z3
        aa, bb, da, cb = a * a % P, b * b % P, d * a % P, c * b % P
        e = aa - bb
        x3, z3 = (da + cb) ** 2 % P, x1 * (da - cb) ** 2 % P
        x2, z2 = aa * bb % P, e * (aa + 121665 * e) % P
    if swap:
        x2, z2 = x3, z3
    return (x2 * pow(z2, P - 2, P) % P).to_bytes(32, "little")


def public_key(private: bytes) -> bytes:
    """Of a 32-byte scalar."""
    return x25519(private, (9).to_bytes(32, "little"))


# RFC 5869


def hkdf(secret: bytes, salt: bytes, info: bytes, length: int) -> bytes:
    """Extract, then expand, with SHA-256."""
    key, block, out, counter = hmac.digest(salt or bytes(32), secret, "sha256"), b"", b"", 0
    while len(out) < length:
        counter += 1
        block = hmac.digest(key, block + info + bytes([counter]), "sha256")
        out += block
    return out[:length]


# FIPS 197, SP 800-38A, SP 800-38D


def _double(a: int) -> int:
    return (a << 1) ^ (0x11B if a & 0x80 else 0)


def _multiply(a: int, b: int) -> int:
    out = 0
    while b:
        out, a, b = out ^ (a if b & 1 else 0), _double(a), b >> 1
    return out


@cache
def _sbox() -> bytes:
    box = []
    for a in range(256):
        inverse = reduce(_multiply, [a] * 254)  # a^254
        turns = [(inverse << n | inverse >> 8 - n) & 255 for n in range(5)]
        box.append(reduce(int.__xor__, turns) ^ 0x63)
    return bytes(box)


@cache
def _schedule(key: bytes) -> tuple[bytes, ...]:
    """The 15 round keys of AES-256."""
    words, box, constant = [key[i : i + 4] for i in range(0, 32, 4)], _sbox(), 1
    for i in range(8, 60):
        word = words[-1]
        if i % 8 == 0:
            word = bytes(box[b] for b in word[1:] + word[:1])
            word, constant = bytes([word[0] ^ constant]) + word[1:], _double(constant)
        elif i % 8 == 4:
            word = bytes(box[b] for b in word)
        words.append(bytes(a ^ b for a, b in zip(word, words[i - 8], strict=True)))
    return tuple(b"".join(words[i : i + 4]) for i in range(0, 60, 4))


def aes256(key: bytes, block: bytes) -> bytes:
    """One block of 16 bytes, encrypted."""
    keys, box = _schedule(key), _sbox()
    state = [a ^ b for a, b in zip(block, keys[0], strict=True)]
    for number in range(1, 15):
        state = [box[state[(i + 4 * (i % 4)) % 16]] for i in range(16)]  # SubBytes and ShiftRows
        if number < 14:
            mixed = []
            for column in range(0, 16, 4):
                c = state[column : column + 4]
                mixed += [_double(c[i] ^ c[i - 3]) ^ c[i - 3] ^ c[i - 2] ^ c[i - 1] for i in range(4)]
            state = mixed
        state = [a ^ b for a, b in zip(state, keys[number], strict=True)]
    return bytes(state)


def ctr(key: bytes, counter: bytes, length: int) -> bytes:
    """Keystream of AES-256 in counter mode."""
    first, blocks = int.from_bytes(counter, "big"), -(-length // 16)
    stream = [aes256(key, ((first + i) % 2**128).to_bytes(16, "big")) for i in range(blocks)]
    return b"".join(stream)[:length]


def gcm(key: bytes, nonce: bytes, text: bytes, extra: bytes) -> bytes:
    """Ciphertext and tag of AES-256-GCM; the nonce has 12 bytes."""
    start = nonce + bytes([0, 0, 0, 1])
    stream = ctr(key, start, 16 + len(text))
    sealed = bytes(a ^ b for a, b in zip(text, stream[16:], strict=True))
    h = int.from_bytes(aes256(key, bytes(16)), "big")
    sizes = (8 * len(extra)).to_bytes(8, "big") + (8 * len(sealed)).to_bytes(8, "big")
    hashed = extra + bytes(-len(extra) % 16) + sealed + bytes(-len(sealed) % 16) + sizes
    y = 0
    for place in range(0, len(hashed), 16):
        y = _ghash(y ^ int.from_bytes(hashed[place : place + 16], "big"), h)
    return sealed + (y ^ int.from_bytes(stream[:16], "big")).to_bytes(16, "big")


def _ghash(x: int, y: int) -> int:
    out = 0
    for bit in range(127, -1, -1):
        out ^= y if x >> bit & 1 else 0
        y = y >> 1 ^ (0xE1 << 120 if y & 1 else 0)
    return out


# FLARE-SA/2


def u16(value: int) -> bytes:
    """Two bytes, big-endian."""
    return value.to_bytes(2, "big")


def lp(data: bytes) -> bytes:
    """Length, then data."""
    return len(data).to_bytes(4, "big") + data


def job_digest(terms: Mapping[str, Any]) -> bytes:
    """Of the terms of a job."""
    return sha256(b"FLARE-SA/2/job\0" + lp(json.dumps(terms, sort_keys=True, separators=(",", ":")).encode())).digest()


def roster_digest(members: Iterable[tuple[str, bytes]]) -> bytes:
    """Of names and key digests."""
    raw = sorted((name.encode("utf-8"), spki) for name, spki in members)
    return sha256(b"FLARE-SA/1/roster\0" + b"".join(lp(name) + spki for name, spki in raw)).digest()


def model_digest(tensors: Iterable[tuple[str, str, Sequence[int], bytes]]) -> bytes:
    """Of (name, dtype as numpy writes it, shape, little-endian bytes)."""
    text = b"FLARE-SA/2/model\0"
    for name, dtype, shape, raw in sorted(tensors, key=lambda t: t[0].encode("utf-8")):
        sides = b"".join(n.to_bytes(4, "big") for n in shape)
        text += lp(name.encode("utf-8")) + lp(dtype.encode()) + lp(sides) + lp(raw)
    return sha256(text).digest()


def context(
    job_id: str, round_number: int, attempt: int, slot: int, *, epoch: bytes, cohort: Sequence[int], model: bytes
) -> bytes:
    """Of one list of members in one attempt."""
    numbers = round_number.to_bytes(4, "big") + u16(attempt) + u16(slot)
    rest = lp(epoch) + lp(b"".join(map(u16, cohort))) + lp(model)
    return sha256(b"FLARE-SA/2/ctx\0" + lp(job_id.encode()) + numbers + rest).digest()


def directory_digest(entries: Sequence[tuple[bytes, bytes]]) -> bytes:
    """Of (ADV1 body, session), in the order of the names."""
    text = b"".join(lp(body) + lp(session) for body, session in entries)
    return sha256(b"FLARE-SA/2/dir\0" + u16(len(entries)) + text).digest()


def epoch_digest(directory: bytes, dealings: Sequence[bytes]) -> bytes:
    """Of a directory and the texts of all dealings."""
    return sha256(b"FLARE-SA/2/epoch\0" + lp(directory) + u16(len(dealings)) + b"".join(map(lp, dealings))).digest()


def derive(secret: bytes, info: bytes, length: int = 32) -> bytes:
    """HKDF under the salt of the suite."""
    return hkdf(secret, b"FLARE-SA/2", info, length)


def root(private: bytes, public: bytes, job: bytes, directory: bytes, one: int, other: int) -> bytes:
    """The 64 bytes that an edge starts from: mask chain, row secret."""
    low, high = sorted((one, other))
    return derive(x25519(private, public), b"root" + job + directory + u16(low) + u16(high), 64)


def chain(start: bytes, slots: int) -> bytes:
    """A chain after so many slots."""
    for _ in range(slots):
        start = derive(start, b"next")
    return start


def edge_seed(mask_chain: bytes, ctx: bytes) -> bytes:
    """From the mask chain of the slot."""
    return derive(mask_chain, b"mask" + ctx)


def row_info(sender: int, recipient: int) -> bytes:
    """Info string of a row key, and the associated data of what it seals."""
    return b"row" + u16(sender) + u16(recipient)


def self_mask_key(seed: bytes, ctx: bytes) -> bytes:
    """Key of a member's own mask."""
    return derive(seed, b"self" + ctx)


def mask(key: bytes, words: int) -> list[int]:
    """Words of the mask of a key."""
    stream = ctr(key, bytes(16), 4 * words)
    return [int.from_bytes(stream[i : i + 4], "little") for i in range(0, 4 * words, 4)]


# Shamir 1979


def share(ascending: Sequence[int], x: int) -> bytes:
    """The value at x of a polynomial, which is the secret at 0."""
    return (sum(c * x**power for power, c in enumerate(ascending)) % FIELD).to_bytes(33, "big")


def interpolate(xs: Sequence[int], ys: Sequence[int], at: int = 0) -> int:
    """Lagrange's formula, one fraction at a time."""
    total = 0
    for i, x in enumerate(xs):
        top, bottom = 1, 1
        for j, other in enumerate(xs):
            if i != j:
                top, bottom = top * (at - other), bottom * (x - other)
        total += ys[i] * top * pow(bottom, -1, FIELD)
    return total % FIELD


def combine(xs: Sequence[int], shares: Sequence[bytes]) -> bytes:
    """The secret of right shares."""
    return interpolate(xs, [int.from_bytes(s, "big") for s in shares]).to_bytes(33, "big")


# Verifiable dealing


def share_leaves(label: bytes, recipient: int, row: bytes) -> list[bytes]:
    """Commitment to each share of a row."""
    head = b"FLARE-SA/2/share\0" + label + u16(recipient)
    return [sha256(head + u16(i // 33) + row[i : i + 33]).digest() for i in range(0, len(row), 33)]


def commit_row(leaves: Sequence[bytes]) -> bytes:
    """Commitment to a row."""
    return sha256(b"FLARE-SA/2/row\0" + b"".join(leaves)).digest()


def challenge(label: bytes, commitments: Sequence[bytes]) -> int:
    """At which polynomials are combined."""
    return int.from_bytes(sha256(b"FLARE-SA/2/mix\0" + label + b"".join(commitments)).digest(), "big")


def combination(polynomials: Sequence[Sequence[int]], at: int) -> list[int]:
    """Of polynomials of one length, the first times 1, the second times `at`, and so on; ascending."""
    powers = [pow(at, i, FIELD) for i in range(len(polynomials))]
    columns = zip(*polynomials, strict=True)
    return [sum(p * c for p, c in zip(powers, column, strict=True)) % FIELD for column in columns]
