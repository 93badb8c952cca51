"""Messages between the executor and its trainer process: one line of JSON and an optional block of bytes each."""

import json
import struct
from typing import IO, Any

_HEAD = struct.Struct(">4sIQ")  # magic, length of the JSON, length of the block
_MAGIC = b"FMP1"
MAX_JSON = 1 << 24
MAX_BLOCK = 1 << 32


def write_frame(stream: IO[bytes], fields: dict[str, Any], block: bytes = b"") -> None:
    """Send one message and flush."""
    text = json.dumps(fields).encode()
    stream.write(_HEAD.pack(_MAGIC, len(text), len(block)) + text + block)
    stream.flush()


def read_frame(stream: IO[bytes]) -> tuple[dict[str, Any], bytes]:
    """Receive one message.

    Raises:
        EOFError: the other side is gone.
        ValueError: the bytes are not a frame, or it is larger than the bounds.
    """
    magic, text_length, block_length = _HEAD.unpack(_exactly(stream, _HEAD.size))
    if magic != _MAGIC or text_length > MAX_JSON or block_length > MAX_BLOCK:
        raise ValueError("not a trainer frame: something else wrote to the trainer's pipe")
    fields = json.loads(_exactly(stream, text_length))
    return fields, _exactly(stream, block_length)


def _exactly(stream: IO[bytes], count: int) -> bytes:
    data = stream.read(count) if count else b""
    if len(data) != count:
        raise EOFError("the trainer's pipe was closed")
    return data
