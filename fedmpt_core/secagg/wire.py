"""Strict reading of bytes: every length is checked before anything is taken, and nothing may be left over."""

from functools import lru_cache
from itertools import pairwise

from fedmpt_core.secagg.errors import Abort, SecAggError


def kind_of(data: bytes) -> str:
    """The four letters that say what a message is; `unknown` when it does not begin like one. Never raises."""
    if not isinstance(data, bytes):
        return "unknown"
    tag = data[1:5]
    return tag.decode() if len(tag) == 4 and data[0] == 0xFF and tag.isalnum() and tag.isascii() else "unknown"


class Reader:
    """Takes fields off a message. Every failure is SecAggError(MALFORMED) that names the kind of message."""

    def __init__(self, data: bytes, kind: str) -> None:
        """Takes the tag."""
        self._data, self._kind, self._at = data, kind, 5
        if not isinstance(data, bytes) or len(data) < 5 or kind_of(data) != kind:
            raise SecAggError(Abort.MALFORMED, f"{kind} was expected, {kind_of(data) if data else 'nothing'} came")

    @property
    def left(self) -> int:
        """Bytes not yet taken."""
        return len(self._data) - self._at

    def take(self, count: int) -> bytes:
        """The next bytes."""
        if count > self.left:
            self.refuse(f"has {self.left} bytes left where {count} are needed")
        self._at += count
        return self._data[self._at - count : self._at]

    def number(self, size: int) -> int:
        """A big-endian unsigned integer of `size` bytes."""
        return int.from_bytes(self.take(size), "big")

    def count(self, most: int, size: int = 2) -> int:
        """A number of things that follow, at most `most`."""
        number = self.number(size)
        if number > most:
            self.refuse(f"announces {number} things, at most {most} are allowed")
        return number

    def sized(self, most: int) -> bytes:
        """Bytes after their length, at most `most` of them."""
        return self.take(self.count(most, 4))

    def ids(self, most: int) -> tuple[int, ...]:
        """A set of member ids: their number, then each, ascending."""
        number = self.count(most)
        if 2 * number > self.left:
            self.refuse(f"announces {number} ids and has {self.left} bytes left")
        ids = tuple(self.number(2) for _ in range(number))
        self.ascending(ids)
        return ids

    def ascending(self, ids: tuple[int, ...]) -> None:
        """Ids of a set come in ascending order, each once."""
        if any(a >= b for a, b in pairwise(ids)):
            self.refuse("lists members twice or out of order")

    def signatures(self, most: int) -> tuple[tuple[int, bytes], ...]:
        """Ids ascending, each with 64 bytes."""
        number = self.count(most)
        if 66 * number > self.left:
            self.refuse(f"announces {number} signatures and has {self.left} bytes left")
        pairs = tuple((self.number(2), self.take(64)) for _ in range(number))
        self.ascending(tuple(member for member, _ in pairs))
        return pairs

    def exactly(self, length: int) -> None:
        """The whole message must have this many bytes; before anything of that length is allocated."""
        if len(self._data) != length:
            self.refuse(f"has {len(self._data)} bytes, expected are {length}")

    def end(self) -> None:
        """Nothing may be left."""
        if self.left:
            self.refuse(f"has {self.left} bytes too many")

    def refuse(self, why: str) -> None:
        """Raise."""
        raise SecAggError(Abort.MALFORMED, f"{self._kind} {why}")


def tag(kind: str) -> bytes:
    """How a message begins. No UTF-8 text begins with 0xff, so no name signed elsewhere can be taken for a message."""
    return b"\xff" + kind.encode()


def u16(value: int) -> bytes:
    """Two bytes, big-endian."""
    return value.to_bytes(2, "big")


def u32(value: int) -> bytes:
    """Four bytes, big-endian."""
    return value.to_bytes(4, "big")


@lru_cache(maxsize=4)  # a server says the same to everybody; only public things pass here
def id_list(ids: tuple[int, ...]) -> bytes:
    """The number of ids and each of them."""
    return u16(len(ids)) + b"".join(map(u16, ids))


@lru_cache(maxsize=4)
def signature_list(pairs: tuple[tuple[int, bytes], ...]) -> bytes:
    """The number of signatures, and each after its member."""
    return u16(len(pairs)) + b"".join(u16(member) + signature for member, signature in pairs)
