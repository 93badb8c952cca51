"""Picture files as containers: what of one the pixels need, how deep they are, and which way up it is.

A decoder reads everything in a file, and takes an intact picture for damaged because of a comment that is too long, a
broken colour profile or a tag that nobody uses; and it drops the low bits of what is deeper than it can say. So the
parts that pixels are made of are picked out here before anything is decoded. Of all others the tag that says which way
up the picture is to be shown (Exif 2.3, Orientation) is read, and nothing else.
"""

import io
import mmap
import os
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, BinaryIO

MOST_BYTES = 2**30
"""Largest JPEG or PNG in bytes (chosen): more than 89 million pixels of four channels of 16 bits."""

_ORIENTATION, _BITS, _SAMPLE_FORMAT = 274, 258, 339  # TIFF tags
_WHOLE_NUMBERS = {1: "B", 3: "H", 4: "L"}  # TIFF types
_MOST_VALUES = 64  # of one tag that is read; chosen
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # JPEG markers of a frame's header
_PNM = re.compile(rb"P([2356])" + 3 * rb"(?:\s|#[^\r\n]*[\r\n])+(\d+)")


class Unfit(Exception):
    """A reason why a file cannot be used, to be read after its name."""


@dataclass(frozen=True)
class Container:
    """What a decoder is to be given.

    Attributes:
        pixels: the file, or only those parts of it that pixels are made of.
        bits: most bits of a channel; 8 where the format has no others.
        signed: whether channels hold negative or floating-point numbers.
        orientation: how to turn the decoded picture, 1 to 8 as Exif counts; 1 where nobody says.
    """

    pixels: IO[bytes]
    bits: int = 8
    signed: bool = False
    orientation: int = 1


def read_container(file: BinaryIO) -> Container:
    """What is in a picture file, by its first bytes; a file of no format that is known here is handed on as it is.

    Args:
        file: open for reading, at its start.

    Raises:
        Unfit: the file ends too early, its checksums are wrong, or it is larger than any picture that is read.
        OSError: it cannot be read.
    """
    head = file.read(12)
    file.seek(0)
    if head.startswith(b"\xff\xd8"):
        return _jpeg(_content(file))
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return _png(_content(file))
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        tags = _tags(file)
        return Container(file, max(tags.get(_BITS, ()), default=1), bool({*tags.get(_SAMPLE_FORMAT, ())} - {1, 4}))
    if head[:4] == b"RIFF" and head[8:] == b"WEBP":
        return Container(file, orientation=_webp_orientation(file))
    if head.startswith(b"\xff\x4f\xff\x51") or head[4:8] == b"jP  ":
        return _jpeg2000(file)
    if head[:2] in (b"Pf", b"PF"):
        return Container(file, 32, signed=True)
    return Container(file, _pnm_bits(file) if head[:1] == b"P" else 8)


def _content(file: BinaryIO) -> bytes:
    if file.seek(0, os.SEEK_END) > MOST_BYTES:
        raise Unfit(f"has more than {MOST_BYTES} bytes")
    file.seek(0)
    content = file.read()
    return content


def _jpeg(content: bytes) -> Container:
    """ITU-T T.81, annex B: everything up to the first scan, without comments and what applications add."""
    kept, bits, orientation, at = [content[:2]], 8, 1, 2
    while content[at : at + 1] == b"\xff" and at + 4 <= len(content):
        marker = content[at + 1]
        if marker in (0xD9, 0xDA):  # the end, or a scan, behind whose header no length is given
            break
        if marker == 0xFF or marker == 0x01 or 0xD0 <= marker <= 0xD8:  # padding, or a marker alone
            at += 1 if marker == 0xFF else 2
            continue
        end = at + 2 + int.from_bytes(content[at + 2 : at + 4], "big")
        body = content[at + 4 : end]
        if marker == 0xE1 and body.startswith(b"Exif\0") and orientation == 1:
            orientation = _exif_orientation(body)
        if marker in _FRAMES and body:
            bits = body[0]
        # JFIF and Adobe say how colours are stored
        says_colours = {0xE0: body[:5] == b"JFIF\0" and len(body) >= 14, 0xEE: body[:5] == b"Adobe" and len(body) >= 12}
        if says_colours.get(marker, not (0xE0 <= marker <= 0xEF or marker == 0xFE)):
            kept.append(content[at:end])
        at = end
    return Container(io.BytesIO(b"".join([*kept, content[at:]])), bits, orientation=orientation)


def _png(content: bytes) -> Container:
    """PNG, third edition: the chunks without which no pixel is right, and transparency."""
    kept, bits, orientation = [content[:8]], 8, 1
    for kind, body, chunk in _png_chunks(content):
        if kind == b"eXIf":
            orientation = _exif_orientation(body)
        if kind == b"IHDR" and len(body) > 8:
            bits = body[8]
        if kind[0] & 0x20 and kind != b"tRNS":  # not critical
            continue
        if zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:], "big"):
            raise Unfit(f"is truncated or damaged (wrong checksum of its {kind.decode('ascii')})")
        kept.append(chunk)
    return Container(io.BytesIO(b"".join(kept)), bits, orientation=orientation)


def _png_chunks(content: bytes) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Kind, body and the whole of every chunk down to the last."""
    at, kind = 8, b""
    while kind != b"IEND":
        length, kind = int.from_bytes(content[at : at + 4], "big"), content[at + 4 : at + 8]
        end = at + 12 + length
        if not (kind.isalpha() and len(kind) == 4 and end <= len(content)):
            raise Unfit("is truncated or damaged (it ends before its last chunk, or a chunk in it is broken)")
        yield kind, content[at + 8 : end - 4], content[at:end]
        at = end


def _webp_orientation(file: BinaryIO) -> int:
    at = 12
    while len(head := _read(file, at, 8)) == 8:
        kind, length = struct.unpack("<4sL", head)
        if kind == b"EXIF":
            return _exif_orientation(_read(file, at + 8, length))
        at += 8 + length + length % 2
    return 1


def _jpeg2000(file: BinaryIO) -> Container:
    """ITU-T T.800: the size marker of the code stream, which lies in a box or begins the file."""
    at = 0
    while _read(file, at, 4) != b"\xff\x4f\xff\x51":
        length, kind = int.from_bytes(_read(file, at, 4), "big"), _read(file, at + 4, 4)
        long = int.from_bytes(_read(file, at + 8, 8), "big") if length == 1 else length
        if len(kind) < 4 or (kind != b"jp2c" and long < 8):
            return Container(file)
        at += (16 if length == 1 else 8) if kind == b"jp2c" else long
    size = _read(file, at + 40, 2 + 3 * _MOST_VALUES)
    depths = size[2 : 2 + 3 * int.from_bytes(size[:2], "big") : 3]
    return Container(file, max((1 + (d & 0x7F) for d in depths), default=8), any(d & 0x80 for d in depths))


def _pnm_bits(file: BinaryIO) -> int:
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        header = _PNM.match(content)
        return int(header[4]).bit_length() if header else 1


def _exif_orientation(block: bytes) -> int:
    while block.startswith(b"Exif\0"):
        block = block[6:]
    value = next(iter(_tags(io.BytesIO(block)).get(_ORIENTATION, ())), 1)
    return value if 1 <= value <= 8 else 1


def _tags(file: IO[bytes]) -> dict[int, tuple[int, ...]]:
    """Those tags of the first directory that are read here (TIFF 6.0, and BigTIFF); what is broken is left out."""
    head = _read(file, 0, 16)
    order = {b"II": "<", b"MM": ">"}.get(head[:2], "")
    version = struct.unpack(order + "H", head[2:4])[0] if order and len(head) >= 8 else 0
    big = version == 43
    if version not in (42, 43) or (big and len(head) < 16):
        return {}
    place, count, entry = (
        (order + "Q", order + "Q", order + "HHQ") if big else (order + "L", order + "H", order + "HHL")
    )
    at = struct.unpack(place, head[8:16] if big else head[4:8])[0]
    width, inline = struct.calcsize(count), struct.calcsize(place)
    step = struct.calcsize(entry) + inline
    table = _read(
        file, at + width, step * min(int.from_bytes(_read(file, at, width), "little" if order == "<" else "big"), 65535)
    )
    tags: dict[int, tuple[int, ...]] = {}
    for row in range(0, len(table) - step + 1, step):
        tag, kind, values = struct.unpack_from(entry, table, row)
        if tag not in (_ORIENTATION, _BITS, _SAMPLE_FORMAT) or kind not in _WHOLE_NUMBERS:
            continue
        form = f"{order}{min(values, _MOST_VALUES)}{_WHOLE_NUMBERS[kind]}"
        data = table[row + step - inline : row + step]
        if struct.calcsize(form) > inline:
            data = _read(file, struct.unpack(place, data)[0], struct.calcsize(form))
        if len(data) >= struct.calcsize(form):
            tags[tag] = struct.unpack_from(form, data)
    return tags


def _read(file: IO[bytes], at: int, size: int) -> bytes:
    """Bytes at a place; fewer where the file ends, none at a place that no file has."""
    if at >= 2**63:
        return b""
    end = file.seek(0, os.SEEK_END)
    file.seek(at)
    return file.read(max(0, min(size, end - at)))  # Python sets aside as much memory as is asked for
