"""Picture files as hospitals and phones leave them: deep ones are refused, intact ones taken whatever they hold."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedmpt_core.data.pictures import BadPicture, FilePicture

WIDTH, HEIGHT = 24, 16
RAMP = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
RGB = Image.fromarray(RAMP)


def encoded(kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    RGB.save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, body: bytes, crc: int | None = None) -> bytes:
    return (
        struct.pack(">L", len(body)) + kind + body + struct.pack(">L", zlib.crc32(kind + body) if crc is None else crc)
    )


def png(colour: int, bits: int, channels: int) -> bytes:
    """Twelve bits of content: what drops the low byte of sixteen shows it black."""
    values = np.tile(
        (np.arange(WIDTH) * 64).astype(">u2" if bits == 16 else ">u1")[None, :, None], (HEIGHT, 1, channels)
    )
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    head = struct.pack(">LLBBBBB", WIDTH, HEIGHT, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(bits: int = 8, sample_format: int = 1, *tags: tuple[int, int, int, bytes]) -> bytes:
    """An RGB picture, uncompressed, with further tags (number, type, count, four bytes)."""
    pixels = (RAMP.astype(f"<u{bits // 8}") if sample_format != 3 else RAMP.astype(f"<f{bits // 8}")).tobytes()
    long, short = (lambda *v: struct.pack(f"<{len(v)}L", *v)), (lambda v: struct.pack("<HH", v, 0))
    entries = [(256, 4, 1, long(WIDTH)), (257, 4, 1, long(HEIGHT)), (259, 3, 1, short(1)), (262, 3, 1, short(2))]
    entries += [(277, 3, 1, short(3)), (278, 4, 1, long(HEIGHT)), (279, 4, 1, long(len(pixels)))]
    entries += [(339, 3, 1, short(sample_format)), *tags]
    place = 8 + 2 + 12 * (len(entries) + 2) + 4
    entries += [(258, 3, 3, long(place)), (273, 4, 1, long(place + 8))]
    table = b"".join(struct.pack("<HHL", *e[:3]) + e[3] for e in sorted(entries))
    return (
        b"II*\0"
        + struct.pack("<LH", 8, len(entries))
        + table
        + long(0)
        + struct.pack("<4H", bits, bits, bits, 0)
        + pixels
    )


def deep_jpeg() -> bytes:
    """A frame header that announces twelve bits."""
    content = bytearray(encoded("JPEG"))
    content[content.find(b"\xff\xc0") + 4] = 12
    return bytes(content)


def deep_jpeg2000() -> bytes:
    """Three components of sixteen bits, in a file whose metadata names the marker too."""
    content = bytearray(encoded("JPEG2000"))
    size = content.find(b"\xff\x4f\xff\x51")
    content[size + 42 : size + 51 : 3] = bytes([15] * 3)
    box = struct.pack(">L4s", 8 + 60, b"xml ") + b"\xff\x4f\xff\x51" + bytes(56)
    return bytes(content[:12] + box + content[12:])


DEEP = {
    "grey.png": png(0, 16, 1),
    "grey-alpha.png": png(4, 16, 2),
    "rgb.png": png(2, 16, 3),
    "rgba.png": png(6, 16, 4),
    "twelve.ppm": b"P6\n24 16\n4095\n" + bytes(2304),
    "sixteen.ppm": b"P6 # radiograph\n24 # wide\n16\n65535\n" + bytes(2304),
    "plain.ppm": b"P3 2 1 1023\n1 2 3 4 5 6\n",
    "twelve.pgm": b"P5\n24 16\n4095\n" + bytes(768),
    "float.pfm": b"Pf\n2 1\n-1.0\n" + bytes(8),
    "sixteen.tif": tiff(16),
    "thirty-two.tif": tiff(32),
    "float.tif": tiff(32, 3),
    "signed.tif": tiff(16, 2),
    "twelve.jpg": deep_jpeg(),
    "sixteen.jp2": deep_jpeg2000(),
}


@pytest.mark.parametrize("name", DEEP)
def test_more_than_eight_bits_in_a_file_are_refused_whatever_the_decoder_makes_of_them(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_bytes(DEEP[name])
    with pytest.raises(
        BadPicture, match=r"more than 8 bits per channel .*: convert it to 8 bits with the range that matters"
    ):
        FilePicture(str(tmp_path / name)).load()


@pytest.mark.parametrize(
    ("kind", "values"),
    [("png", np.uint16), ("jp2", np.uint16), ("tiff", np.uint16), ("tiff", np.int32), ("tiff", np.float32)],
)
def test_deep_grey_is_refused_in_every_format_that_holds_it(tmp_path: Path, kind: str, values: type) -> None:
    Image.fromarray(np.full((4, 4), 300, values)).save(tmp_path / f"a.{kind}")
    with pytest.raises(BadPicture, match="more than 8 bits per channel"):
        FilePicture(str(tmp_path / f"a.{kind}")).load()


def test_signed_bytes_are_refused_too(tmp_path: Path) -> None:
    (tmp_path / "signed.tif").write_bytes(tiff(8, 2))
    with pytest.raises(BadPicture, match="other values than 0 to 255 per channel"):
        FilePicture(str(tmp_path / "signed.tif")).load()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("grey-alpha.png", png(4, 8, 2)),
        ("rgb.tif", tiff()),
        ("rgb.ppm", b"P6\n24 16\n255\n" + RAMP.tobytes()),
        ("four.pgm", b"P5\n24 16\n15\n" + bytes(384)),
        ("bits.pbm", b"P4\n24 16\n" + bytes(48)),
        ("rgb.jp2", encoded("JPEG2000")),
    ],
)
def test_eight_bits_and_fewer_are_taken(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert FilePicture(str(tmp_path / name)).load().size == (WIDTH, HEIGHT)


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def exif(*tags: tuple[int, int, bytes], order: str = "<") -> bytes:
    """Tags of one value each, the value behind the directory where it has more than four bytes."""
    table, data, place = b"", b"", 8 + 2 + 12 * len(tags) + 4
    for number, kind, raw in sorted(tags):
        inline = raw.ljust(4, b"\0") if len(raw) <= 4 else struct.pack(order + "L", place + len(data))
        table += struct.pack(order + "HHL", number, kind, 1) + inline
        data += raw if len(raw) > 4 else b""
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(order + "LH", 8, len(tags)) + table + struct.pack(order + "L", 0) + data


TURNED = (0x112, 3, struct.pack("<H", 6))
ODD_TAGS = {
    "signed resolution": exif(TURNED, (0x11A, 10, struct.pack("<ll", -72, 1))),
    "negative width": exif(TURNED, (0x100, 9, struct.pack("<l", -5))),
    "maker as a float": exif(TURNED, (0x10F, 11, struct.pack("<f", 1.0))),
    "resolution over zero": exif(TURNED, (0x11A, 5, bytes(8))),
    "type of no kind": exif(TURNED, (0x110, 99, b"abcd")),
    "directory beyond the end": exif(TURNED, (0x8769, 4, struct.pack("<L", 10**6))),
    "directory at itself": exif(TURNED, (0x8769, 4, struct.pack("<L", 8))),
    "orientation as a long": exif((0x112, 4, struct.pack("<L", 6))),
    "big-endian": exif((0x112, 3, struct.pack(">H", 6)), order=">"),
    "more tags announced than there are": exif(TURNED).replace(b"\x01\0\x12\x01", b"\x09\0\x12\x01", 1),
}


@pytest.mark.parametrize("tags", ODD_TAGS)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_of_exif_only_the_orientation_is_read(tmp_path: Path, kind: str, tags: str) -> None:
    block = ODD_TAGS[tags]
    content = encoded(kind, quality=95)
    plain = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    if kind == "JPEG":
        content = content[:2] + segment(0xE1, b"Exif\0\0" + block) + content[2:]
    elif kind == "PNG":
        content = content[:33] + chunk(b"eXIf", block) + content[33:]
    else:
        content = encoded(kind, quality=95, exif=b"Exif\0\0" + block)
    (tmp_path / "a").write_bytes(content)
    assert np.array_equal(np.asarray(FilePicture(str(tmp_path / "a")).load()), np.rot90(plain, -1))


def into_jpeg(*segments: bytes) -> bytes:
    content = encoded("JPEG")
    return content[:2] + b"".join(segments) + content[2:]


def into_png(*chunks: bytes) -> bytes:
    content = encoded("PNG")
    return content[:33] + b"".join(chunks) + content[33:]


HARMLESS = {
    "exif that is none": into_jpeg(segment(0xE1, b"Exif\0\0no tags at all")),
    "exif cut off": into_jpeg(segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0\x05\0")),
    "empty exif": into_jpeg(segment(0xE1, b"Exif\0\0")),
    "orientation 0": into_jpeg(segment(0xE1, b"Exif\0\0" + exif((0x112, 3, b"\0\0")))),
    "orientation as text": into_jpeg(segment(0xE1, b"Exif\0\0" + exif((0x112, 2, b"6\0")))),
    "colour profile cut off": into_jpeg(segment(0xE2, b"ICC_PROFILE\0")),
    "one of three parts of a profile": into_jpeg(segment(0xE2, b"ICC_PROFILE\0\x02\x03part")),
    "index of more pictures, broken": into_jpeg(segment(0xE2, b"MPF\0II*\0\x08\0\0\0\xff\xff")),
    "Photoshop's, cut off": into_jpeg(segment(0xED, b"Photoshop 3.0\x008BIM\x03\xed\0\0\0\0\0\x10\0\0")),
    "comments of megabytes": into_jpeg(*(segment(0xFE, b"c" * 65_000) for _ in range(40))),
    "long text": into_png(chunk(b"tEXt", b"workflow\0" + b"x" * 3_000_000)),
    "long text, compressed": into_png(chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b"x" * 5_000_000))),
    "text with another checksum": into_png(chunk(b"tEXt", b"a\0b", crc=7)),
    "broken profile": into_png(chunk(b"iCCP", b"name\0\0no zlib")),
    "profile of no known compression": into_png(chunk(b"iCCP", b"name\0\x07x")),
    "short gamma, primaries, size": into_png(chunk(b"gAMA", b"a"), chunk(b"cHRM", b"abc"), chunk(b"pHYs", b"a")),
    "animation without frames": into_png(chunk(b"acTL", b"\0\0")),
    "long comment": b"P6\n#" + b"x" * 100_000 + b"\n24 16\n255\n" + RAMP.tobytes(),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_an_intact_picture_is_taken_whatever_else_is_in_its_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "a").write_bytes(HARMLESS[name])
    lossy = HARMLESS[name].startswith(b"\xff\xd8")
    expected = np.asarray(Image.open(io.BytesIO(encoded("JPEG")))) if lossy else RAMP
    assert np.array_equal(np.asarray(FilePicture(str(tmp_path / "a")).load()), expected)


def without_last_scan_line(content: bytes) -> bytes:
    return content[:-40]


def with_a_flipped_bit(content: bytes) -> bytes:
    place = content.find(b"IDAT") + 20
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("comments of megabytes", without_last_scan_line),
        ("exif cut off", without_last_scan_line),
        ("long text", with_a_flipped_bit),
        ("long text", lambda content: content[:-12]),
        ("long text", lambda content: content[:200]),
        ("broken profile", without_last_scan_line),
        ("long comment", without_last_scan_line),
    ],
)
def test_a_damaged_picture_is_found_behind_what_is_left_out(
    tmp_path: Path, name: str, damage: Callable[[bytes], bytes]
) -> None:
    (tmp_path / "a").write_bytes(damage(HARMLESS[name]))
    with pytest.raises(BadPicture, match="truncated or damaged"):
        FilePicture(str(tmp_path / "a")).load()


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize("big", [False, True])
def test_a_tiff_is_turned_once(tmp_path: Path, compression: str | None, big: bool) -> None:
    tags = Image.Exif()
    tags[0x112] = 8
    RGB.save(tmp_path / "a.tif", exif=tags, compression=compression, big_tiff=big)
    assert np.array_equal(np.asarray(FilePicture(str(tmp_path / "a.tif")).load()), np.rot90(RAMP))
