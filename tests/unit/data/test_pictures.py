"""Pictures are decoded whole and upright, or refused by name; data sets hold together."""

import hashlib
import os
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from fedmpt_core.data.pictures import UNKNOWN, BadPicture, Dataset, FilePicture, as_rows


def noise(width: int = 40, height: int = 30) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def save(image: Image.Image, path: Path, **options: Any) -> FilePicture:
    image.save(path, **options)
    return FilePicture(str(path), "manifest.csv line 3")


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("suffix", ["png", "bmp", "ppm", "tiff"])
def test_a_lossless_picture_keeps_its_pixels(tmp_path: Path, suffix: str) -> None:
    image = noise()
    assert np.array_equal(pixels(save(image, tmp_path / f"a.{suffix}").load()), np.asarray(image))


def test_digest_is_the_sha256_of_the_bytes(tmp_path: Path) -> None:
    picture = save(noise(), tmp_path / "a.jpg")
    assert picture.digest() == hashlib.sha256((tmp_path / "a.jpg").read_bytes()).hexdigest()


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = noise()
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    turned = pixels(save(image, tmp_path / "a.png", exif=exif).load())
    assert np.array_equal(turned, np.rot90(np.asarray(image), k=-1))


def test_transparent_pixels_are_white_whatever_colour_they_hide(tmp_path: Path) -> None:
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = [9, 8, 7, 255]
    rgba[0, 1] = [200, 0, 0, 0]
    shown = pixels(save(Image.fromarray(rgba), tmp_path / "a.png").load())
    assert shown[0, 0].tolist() == [9, 8, 7]
    assert shown[0, 1].tolist() == [255, 255, 255]


def test_a_palette_with_transparency_is_shown_on_white(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 0, 0])
    image.putdata([0, 1])
    shown = pixels(save(image, tmp_path / "a.png", transparency=bytes([255, 0])).load())
    assert shown[0].tolist() == [[10, 20, 30], [255, 255, 255]]


@pytest.mark.parametrize("mode", ["L", "1", "LA", "P", "CMYK"])
def test_every_common_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    image = noise().convert(mode)
    suffix = "tiff" if mode == "CMYK" else "png"
    assert pixels(save(image, tmp_path / f"a.{suffix}").load()).shape == (30, 40, 3)


def test_the_first_frame_of_an_animation_is_taken(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    shown = pixels(save(frames[0], tmp_path / "a.gif", save_all=True, append_images=frames[1:]).load())
    assert shown[0, 0].tolist() == [255, 0, 0]


def test_more_than_eight_bits_are_refused_not_saturated(tmp_path: Path) -> None:
    deep = Image.fromarray(np.full((4, 4), 30_000, np.uint16))
    with pytest.raises(BadPicture, match="8 bits per channel"):
        save(deep, tmp_path / "a.png").load()


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff", "bmp"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_a_truncated_picture_is_refused_by_name_and_line(tmp_path: Path, suffix: str, share: float) -> None:
    path = tmp_path / f"a.{suffix}"
    picture = save(noise(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(BadPicture) as error:
        picture.load()
    assert str(path) in str(error.value)
    assert "manifest.csv line 3" in str(error.value)
    assert error.value.reason in str(error.value)


def test_a_png_without_its_last_chunk_is_truncated_although_all_pixels_are_there(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    picture = save(noise(), path)
    path.write_bytes(path.read_bytes()[:-12])
    with Image.open(path) as image:
        image.load()  # Pillow alone does not notice
    with pytest.raises(BadPicture, match="truncated or damaged"):
        picture.load()


def test_a_png_with_a_flipped_bit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    picture = save(noise(), path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(BadPicture, match="truncated or damaged"):
        picture.load()


@pytest.mark.parametrize("content", [b"", b"not a picture", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_what_is_no_raster_picture_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    with pytest.raises(BadPicture, match="is not a picture in one of the formats JPEG"):
        FilePicture(str(path)).load()


def test_a_format_that_is_not_listed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadPicture, match="is not a picture in one of the formats"):
        save(noise(), tmp_path / "a.ico").load()


def bomb(path: Path, side: int) -> FilePicture:
    """A tiny PNG whose header announces side * side pixels."""
    save(noise(), path)
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", side, side)
    content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))
    path.write_bytes(content)
    return FilePicture(str(path))


@pytest.mark.parametrize("side", [9_500, 20_000])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path: Path, side: int) -> None:
    with pytest.raises(BadPicture, match="has more than 89478485 pixels"):
        bomb(tmp_path / "a.png", side).load()


def test_the_bound_on_pixels_is_our_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # a user's own wish
    with pytest.raises(BadPicture, match="has more than 89478485 pixels"):
        bomb(tmp_path / "a.png", 9_500).load()


@pytest.mark.parametrize("method", ["load", "digest"])
def test_files_that_are_missing_or_not_regular_are_refused(tmp_path: Path, method: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, reason in [
        (tmp_path / "nowhere.png", "does not exist"),
        (tmp_path / "nowhere.png" / "a.png", "does not exist"),
        (tmp_path, "is not a regular file"),
        (tmp_path / "pipe", "is not a regular file"),
    ]:
        with pytest.raises(BadPicture, match=reason):
            getattr(FilePicture(str(path)), method)()


def test_pillows_switch_for_truncated_pictures_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = save(noise(), tmp_path / "a.png")
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(BadPicture, match="LOAD_TRUNCATED_IMAGES"):
        picture.load()


def test_bad_picture_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(BadPicture("a.png", "is truncated", "m.csv line 2")))
    assert (error.name, error.reason, error.origin) == ("a.png", "is truncated", "m.csv line 2")
    assert str(error) == "picture 'a.png' (m.csv line 2) is truncated; replace the file or leave it out"


def dataset(**changes: object) -> Dataset:
    fields = {
        "classes": ("cat", "dog"),
        "pictures": tuple(FilePicture(f"{i}.png") for i in range(3)),
        "targets": np.array([[1, 0], [0, 1], [1, 1]]),
        "groups": ("a", "b", "b"),
    }
    return Dataset(**(fields | changes))  # type: ignore[arg-type]


def test_targets_are_a_uint8_copy() -> None:
    given = np.array([[1, 0], [0, 1], [1, 1]])
    made = dataset(targets=given)
    given[0, 0] = 0
    assert made.targets.dtype == np.uint8
    assert made.targets.tolist() == [[1, 0], [0, 1], [1, 1]]
    assert len(made) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": ()}, "classes"),
        ({"classes": ("cat", "cat")}, "given twice"),
        ({"classes": ("cat", " ")}, "blank"),
        ({"targets": np.zeros((2, 2), int)}, r"shape \(2, 2\)"),
        ({"targets": np.zeros((3, 3), int)}, r"shape \(3, 3\)"),
        ({"targets": np.full((3, 2), 3)}, "0, 1 and 2"),
        ({"targets": np.full((3, 2), -1)}, "0, 1 and 2"),
        ({"targets": np.zeros((3, 2))}, "0, 1 and 2"),
        ({"groups": ("a",)}, "groups has 1 entries"),
        ({"skipped": -1}, "skipped=-1"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataset(**changes)


def test_take_keeps_record_target_and_group_together() -> None:
    taken = dataset().take([2, 0, 2])
    assert [p.name for p in taken.pictures] == ["2.png", "0.png", "2.png"]
    assert taken.targets.tolist() == [[1, 1], [1, 0], [1, 1]]
    assert taken.groups == ("b", "a", "b")
    assert len(dataset().take([])) == 0
    assert len(dataset(groups=None).take(np.arange(2))) == 2


def test_some_of_the_labels_in_another_order() -> None:
    assert dataset().of(("dog", "cat")).targets.tolist() == [[0, 1], [1, 0], [1, 1]]
    one = dataset(targets=np.array([[1, UNKNOWN], [0, 1], [1, 1]])).of(["dog"])
    assert (one.classes, one.targets.tolist(), one.groups) == (("dog",), [[UNKNOWN], [1], [1]], ("a", "b", "b"))
    with pytest.raises(ValueError, match="'horse', which the records know nothing of"):
        dataset().of(("cat", "horse"))
    with pytest.raises(ValueError, match="given twice"):
        dataset().of(("cat", "cat"))


@pytest.mark.parametrize("indices", [[3], [-1], [0.0], [True], [[0]], ["0"]])
def test_what_is_no_index_is_refused(indices: list[object]) -> None:
    with pytest.raises(ValueError, match=r"indices|index"):
        as_rows(indices, 3)  # type: ignore[arg-type]
