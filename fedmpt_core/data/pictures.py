"""Pictures, and data sets made of them: what every source of records hands on.

A picture knows its name, the digest of its content and how to decode itself; nothing is decoded before it is
needed. Orientation, transparency and colour are settled here, once, so that every backbone sees the same
upright RGB pixels. Must never hand on half a picture: truncated, damaged or oversized files are refused with
their name and manifest line.
"""

import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from fedmpt_core.common.files import file_digest
from fedmpt_core.common.text import alike, likeness
from fedmpt_core.data.container import Unfit, read_container

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000")
"""Raster formats that are opened. Others, above all those that run an interpreter (EPS), are refused."""

MAX_PIXELS = 89_478_485
"""Largest picture in pixels: the size from which Pillow suspects a decompression bomb (256 MiB of RGB)."""

EIGHT_BITS = "convert it to 8 bits with the range that matters"

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

UNKNOWN = 2
"""Target of a label of which nobody says whether the record has it; the loss leaves it out, the metrics refuse it."""


class Picture(Protocol):
    """One picture of a record: a file, or composed on demand."""

    @property
    def name(self) -> str:
        """What to show a person: a path, or a description such as `scene site-1/train/17`."""
        ...

    def digest(self) -> str:
        """SHA-256 hex of the content (file bytes, or composed pixels)."""
        ...

    def load(self) -> Image.Image:
        """The upright picture in RGB. Raises BadPicture when it cannot be decoded."""
        ...


class BadPicture(ValueError):
    """A picture that cannot be used.

    Attributes:
        name: the picture's name.
        reason: what is wrong with it, to be read after the name.
        origin: where it is listed, for example `manifest.csv line 17`; may be empty.
    """

    def __init__(self, name: str, reason: str, origin: str = "") -> None:
        """The message names the picture, where it is listed, the reason and the remedy."""
        self.name, self.reason, self.origin = name, reason, origin
        where = f" ({origin})" if origin else ""
        super().__init__(f"picture {name!r}{where} {reason}; replace the file or leave it out")

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        # An exception crosses process borders by its arguments, which are not the message here.
        return type(self), (self.name, self.reason, self.origin)


@dataclass(frozen=True, slots=True)
class FilePicture:
    """A picture file.

    Edge cases:
        - EXIF orientation -> applied; every other tag, comment, profile or text is not looked at.
        - transparency -> shown on white; hidden colours of transparent pixels never count.
        - animation or several pages -> the first one.
        - palette, grey, CMYK -> RGB.
        - more than 8 bits per channel in the file, or signed or floating-point numbers -> BadPicture: only who knows
          the pictures can say which range matters.
        - truncated, wrong checksum, wrong format, more than MAX_PIXELS, missing, no regular file ->
          BadPicture.

    Attributes:
        path: the file.
        origin: where it is listed, for messages.
    """

    path: str
    origin: str = ""

    @property
    def name(self) -> str:
        """The path."""
        return self.path

    def digest(self) -> str:
        """SHA-256 hex of the file's bytes. Raises BadPicture when it cannot be read."""
        try:
            return file_digest(self._file())
        except OSError as error:
            raise self._bad(_system_reason(error)) from None

    def load(self) -> Image.Image:
        """The upright picture in RGB. Raises BadPicture when the whole of it cannot be decoded."""
        if ImageFile.LOAD_TRUNCATED_IMAGES:
            raise self._bad(
                "was not opened, because PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set in this process "
                "and truncated pictures could not be told; unset it"
            )
        try:
            return _decode(self._file())
        except (BadPicture, MemoryError):
            raise
        except UnidentifiedImageError:
            raise self._bad(f"is not a picture in one of the formats {', '.join(FORMATS)}") from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise self._bad(f"has more than {MAX_PIXELS} pixels") from None
        except Unfit as error:
            raise self._bad(str(error)) from None
        except Exception as error:
            # A damaged file makes decoders raise whatever they trip over: OSError, SyntaxError, struct.error
            # ...
            system = isinstance(error, OSError) and error.errno is not None
            reason = _system_reason(error) if system else f"is truncated or damaged ({error})"
            raise self._bad(reason) from None

    def _file(self) -> Path:
        """The path, once it is sure that opening it cannot block or read without end."""
        path = Path(self.path)
        try:
            mode = path.stat().st_mode
        except (OSError, ValueError) as error:
            raise self._bad(_system_reason(error)) from None
        if not stat.S_ISREG(mode):
            raise self._bad("is not a regular file")
        return path

    def _bad(self, reason: str) -> BadPicture:
        return BadPicture(self.path, reason, self.origin)


def _decode(path: Path) -> Image.Image:
    with path.open("rb") as file:
        container = read_container(file)
        if container.bits > 8 or container.signed:
            signed = ", signed or floating-point numbers" if container.signed else ""
            what = "more than 8 bits" if container.bits > 8 else "other values than 0 to 255"
            raise Unfit(f"has {what} per channel ({container.bits} bits{signed}): {EIGHT_BITS}")
        with Image.open(container.pixels, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            if image.mode in ("I", "F") or image.mode.startswith("I;"):
                raise Unfit(f"has more than 8 bits per channel: {EIGHT_BITS}")
            image.load()
            return _shown(image, _TURNS.get(container.orientation))


def _shown(image: Image.Image, turn: Image.Transpose | None) -> Image.Image:
    """Upright, on white where it is transparent, in RGB."""
    upright = image if turn is None else image.transpose(turn)
    if upright.has_transparency_data:
        white = Image.new("RGBA", upright.size, "white")
        upright = Image.alpha_composite(white, upright.convert("RGBA"))
    return upright.convert("RGB")


def _system_reason(error: Exception) -> str:
    match error:
        case FileNotFoundError() | NotADirectoryError():
            return "does not exist"
        case PermissionError():
            return "may not be read by this user"
        case OSError():
            return f"cannot be read ({error.strerror or error})"
        case _:
            return f"cannot be read ({error})"


@dataclass(frozen=True, eq=False)
class Dataset:
    """R records: a picture and its labels each.

    Attributes:
        classes: C labels, in the order of every score vector.
        pictures: R of them.
        targets: (R, C) uint8: 1 where the record has the label, 0 where it has not, `UNKNOWN` where nobody says.
        groups: (R,) what records belong together (a patient), or None; in the form in which they are compared
            (`likeness`).
        skipped: pictures left out because they could not be decoded; 0 unless skipping was asked for.
    """

    classes: tuple[str, ...]
    pictures: tuple[Picture, ...]
    targets: np.ndarray
    groups: tuple[str, ...] | None = None
    skipped: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError when the parts do not fit together."""
        blank = [c for c in self.classes if not c.strip()]
        if not self.classes or blank or alike(self.classes):
            raise ValueError(f"classes={list(self.classes)}: give at least one, none of them blank or given twice")
        targets = np.asarray(self.targets)
        shape = (len(self.pictures), len(self.classes))
        if targets.shape != shape:
            raise ValueError(f"targets has shape {targets.shape}: {shape} is one row per picture, one column per class")
        if targets.dtype.kind not in "biu" or (targets.size and not 0 <= targets.min() <= targets.max() <= UNKNOWN):
            raise ValueError(f"targets of type {targets.dtype} holds other values than the integers 0, 1 and {UNKNOWN}")
        if self.groups is not None and len(self.groups) != len(self.pictures):
            raise ValueError(f"groups has {len(self.groups)} entries for {len(self.pictures)} pictures: give one each")
        if self.skipped < 0:
            raise ValueError(f"skipped={self.skipped} is negative: it counts pictures")
        object.__setattr__(self, "classes", tuple(self.classes))
        object.__setattr__(self, "pictures", tuple(self.pictures))
        object.__setattr__(self, "targets", targets.astype(np.uint8))
        object.__setattr__(self, "groups", None if self.groups is None else tuple(map(likeness, self.groups)))

    def __len__(self) -> int:
        """Number of records R."""
        return len(self.pictures)

    def take(self, indices: Sequence[int] | np.ndarray) -> "Dataset":
        """The records at `indices`, in that order; an index may repeat.

        Raises:
            ValueError: an index is no integer in [0, R).
        """
        rows = as_rows(indices, len(self))
        return replace(
            self,
            pictures=tuple(self.pictures[i] for i in rows),
            targets=self.targets[rows],
            groups=None if self.groups is None else tuple(self.groups[i] for i in rows),
        )

    def of(self, classes: Sequence[str]) -> "Dataset":
        """The same records with these labels only, in this order.

        Raises:
            ValueError: a label is not one of this data set's, or given twice.
        """
        column = {label: c for c, label in enumerate(self.classes)}
        strange = [label for label in classes if label not in column]
        if strange:
            raise ValueError(f"classes holds {strange[0]!r}, which the records know nothing of: remove it")
        return replace(self, classes=tuple(classes), targets=self.targets[:, [column[label] for label in classes]])


def as_rows(indices: Sequence[int] | np.ndarray, count: int) -> np.ndarray:
    """`indices` as (B,) int64. Raises ValueError unless every one is an integer in [0, count)."""
    rows = np.asarray(indices)
    if rows.size == 0:
        return np.zeros(0, np.int64)
    if rows.ndim != 1 or rows.dtype.kind not in "iu":
        raise ValueError(f"indices of type {rows.dtype} and shape {rows.shape}: give a flat list of integers")
    if rows.min() < 0 or rows.max() >= count:
        wrong = rows[(rows < 0) | (rows >= count)][0]
        raise ValueError(f"index {wrong} is out of range: allowed is [0, {count})")
    return rows.astype(np.int64)
