"""Features are computed once, served only when every byte is right, bounded in size and private."""

import errno
import gc
import hashlib
import multiprocessing
import os
import stat
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fedmpt_core.data.pictures import BadPicture, FilePicture
from fedmpt_core.model.features import file as feature_file
from fedmpt_core.model.features.cache import CPU_BATCH, FeatureCache, PatchFeatures
from fedmpt_core.model.features.file import ABANDONED_SECONDS, HEADER, FeatureCacheError, FeatureSpace

ROWS, COLUMNS, WIDTH = 2, 3, 4
FILE = HEADER.size + 2 * ROWS * COLUMNS * WIDTH
PLENTY = 1 << 30


@dataclass(frozen=True)
class Dot:
    """A picture of one colour."""

    value: int

    @property
    def name(self) -> str:
        return f"dot {self.value}"

    def digest(self) -> str:
        return hashlib.sha256(f"dot {self.value}".encode()).hexdigest()

    def load(self) -> Image.Image:
        return Image.new("RGB", (2, 2), (self.value, 0, 0))


@dataclass
class Counting:
    """What the cache needs of a backbone; counts pictures and calls."""

    seed: int = 0
    preprocessing: str = "resize"
    grid: tuple[int, int] = (ROWS, COLUMNS)
    feature_dim: int = WIDTH
    name: str = "counting"
    scale: float = 1.0
    preprocessed: list[int] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)

    def digest(self) -> str:
        return hashlib.sha256(f"weights {self.seed}".encode()).hexdigest()

    def preprocessing_digest(self) -> str:
        return hashlib.sha256(self.preprocessing.encode()).hexdigest()

    def preprocess(self, image: Image.Image) -> Tensor:
        value = np.asarray(image)[0, 0, 0]
        self.preprocessed.append(int(value))
        return torch.full((3, 2, 2), float(value))

    def patches(self, images: Tensor) -> Tensor:
        self.batches.append(len(images))
        cells = torch.arange(ROWS * COLUMNS * WIDTH, dtype=torch.float32).reshape(1, ROWS * COLUMNS, WIDTH)
        return self.scale * (images[:, 0, 0, 0].reshape(-1, 1, 1) + cells / 64 + self.seed / 8)


def expected(values: Sequence[int], seed: int = 0) -> Tensor:
    images = torch.stack([torch.full((3, 2, 2), float(v)) for v in values])
    return Counting(seed).patches(images)


def dots(*values: int) -> list[Dot]:
    return [Dot(v) for v in values]


def get(
    folder: Path, values: Sequence[int], backbone: Any = None, *, bound: int = PLENTY, memory: int = 0, **options: Any
) -> PatchFeatures:
    cache = FeatureCache(folder, max_bytes=bound, memory_bytes=memory)
    tower: Any = backbone or Counting()
    return cache.features(dots(*values), tower, **options)


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.features"))


@pytest.mark.parametrize("memory", [0, PLENTY])
def test_features_are_those_of_the_backbone_in_half_precision(tmp_path: Path, memory: int) -> None:
    features = get(tmp_path, [5, 9, 7], memory=memory)
    assert features.shape == (3, ROWS * COLUMNS, WIDTH)
    assert len(features) == 3
    batch = features.batch([2, 0, 2])
    assert batch.dtype == torch.float32
    assert torch.equal(batch, expected([7, 5, 7]).half().float())
    batch += 1  # a caller's own copy
    assert torch.equal(features.batch(np.array([1])), expected([9]).half().float())
    assert features.batch([]).shape == (0, ROWS * COLUMNS, WIDTH)
    assert torch.equal(features.batch(range(3)), expected([5, 9, 7]).half().float())


@pytest.mark.parametrize("memory", [0, PLENTY])
@pytest.mark.parametrize("indices", [[3], [-1], [0.5]])
def test_what_is_no_index_is_refused(tmp_path: Path, memory: int, indices: list[Any]) -> None:
    with pytest.raises(ValueError, match="ind"):
        get(tmp_path, [5, 9, 7], memory=memory).batch(indices)


def test_a_picture_is_computed_once_in_batches_of_the_size_asked_for(tmp_path: Path) -> None:
    backbone = Counting()
    first = get(tmp_path, [1, 2, 1, 3, 4, 2, 5], backbone, batch_size=2)
    assert sorted(backbone.preprocessed) == [1, 2, 3, 4, 5]
    assert sorted(backbone.batches) == [1, 2, 2]
    assert torch.equal(first.batch(range(7)), expected([1, 2, 1, 3, 4, 2, 5]).half().float())
    again = get(tmp_path, [5, 1, 6], backbone)
    assert sorted(backbone.preprocessed) == [1, 2, 3, 4, 5, 6]
    assert torch.equal(again.batch(range(3)), expected([5, 1, 6]).half().float())
    assert len(files(tmp_path)) == 6


class OnADevice(Tensor):
    """A tensor that says it is on a GPU."""

    device = property(lambda self: torch.device("cuda"))  # type: ignore[assignment]


class Elsewhere(Counting):
    def patches(self, images: Tensor) -> Tensor:
        return super().patches(images).as_subclass(OnADevice)


def test_a_cpu_gets_small_batches_and_a_device_the_size_asked_for(tmp_path: Path) -> None:
    backbone = Counting()
    get(tmp_path / "cpu", range(40), backbone)
    assert set(backbone.batches) == {CPU_BATCH}

    backbone = Elsewhere()
    found = get(tmp_path / "cuda", range(40), backbone, batch_size=10)
    assert sorted(backbone.batches) == [2, 4, 4, 10, 10, 10]  # the first in small pieces: nobody knows yet
    assert torch.equal(found.batch(range(40)), expected(range(40)).half().float())


@pytest.mark.parametrize("after", [1, 7, 12])
def test_what_was_computed_before_a_break_is_not_computed_again(tmp_path: Path, after: int) -> None:
    class Broken(Counting):
        def patches(self, images: Tensor) -> Tensor:
            if len(self.batches) == after:
                raise KeyboardInterrupt
            return super().patches(images)

    first, second = Broken(), Counting()
    with pytest.raises(KeyboardInterrupt):
        get(tmp_path, range(60), first)
    kept = len(files(tmp_path))
    assert 0 < kept < 60 or after == 1
    found = get(tmp_path, range(60), second)
    assert sum(second.batches) == 60 - kept
    assert torch.equal(found.batch(range(60)), expected(range(60)).half().float())
    assert not list(tmp_path.rglob("*.partial"))


def test_nothing_but_digests_and_shape_is_asked_of_the_backbone_when_all_is_there(tmp_path: Path) -> None:
    class Closed:
        grid, feature_dim = (ROWS, COLUMNS), WIDTH
        digest, preprocessing_digest = Counting().digest, Counting().preprocessing_digest

    get(tmp_path, [1, 2])
    assert torch.equal(get(tmp_path, [2, 1], Closed()).batch([0, 1]), expected([2, 1]).half().float())


@pytest.mark.parametrize("change", [{"seed": 1}, {"preprocessing": "crop"}])
def test_another_backbone_or_preprocessing_shares_nothing(tmp_path: Path, change: dict[str, Any]) -> None:
    get(tmp_path, [1, 2])
    backbone = Counting(**change)
    found = get(tmp_path, [1, 2], backbone)
    assert sorted(backbone.preprocessed) == [1, 2]
    assert torch.equal(found.batch([0, 1]), expected([1, 2], backbone.seed).half().float())
    assert torch.equal(get(tmp_path, [1, 2]).batch([0, 1]), expected([1, 2]).half().float())


def test_no_pictures_make_no_features(tmp_path: Path) -> None:
    assert get(tmp_path, []).batch([]).shape == (0, ROWS * COLUMNS, WIDTH)


def test_progress_counts_distinct_pictures(tmp_path: Path) -> None:
    get(tmp_path, [1])
    seen: list[tuple[int, int]] = []
    get(tmp_path, [1, 2, 3, 2], batch_size=1, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_files_are_private(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        get(tmp_path / "cache", [1])
    finally:
        os.umask(before)
    (file,) = files(tmp_path)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    for folder in [tmp_path / "cache", file.parent, file.parent.parent]:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert file.stat().st_size == FILE
    assert [p for p in (tmp_path / "cache").rglob("*") if p.is_file()] == [file]


def flip(position: int) -> Any:
    def change(content: bytearray) -> bytearray:
        content[position] ^= 1
        return content

    return change


def put(position: int, number: int) -> Any:
    def change(content: bytearray) -> bytearray:
        content[position : position + 4] = struct.pack("<I", number)
        return content

    return change


CORRUPTIONS = {
    "magic": flip(0),
    "version": put(8, 2),
    "patches": put(12, WIDTH),
    "width": put(16, ROWS * COLUMNS),
    "number size": put(20, 4),
    "key": flip(24),
    "checksum": flip(56),
    "padding": flip(100),
    "last header byte": flip(127),
    "first payload byte": flip(128),
    "last payload byte": flip(-1),
    "one byte short": lambda content: content[:-1],
    "one byte more": lambda content: content + b"\0",
    "header only": lambda content: content[:128],
    "half a header": lambda content: content[:64],
    "empty": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
}


@pytest.mark.parametrize("memory", [0, PLENTY])
@pytest.mark.parametrize("change", CORRUPTIONS.values(), ids=CORRUPTIONS)
def test_a_damaged_file_is_computed_again_and_never_served(tmp_path: Path, change: Any, memory: int) -> None:
    get(tmp_path, [1, 2])
    for file in files(tmp_path):
        if Dot(1).digest() in file.name:
            good = file.read_bytes()
            file.write_bytes(change(bytearray(good)))
            assert file.read_bytes() != good
    backbone = Counting()
    assert torch.equal(get(tmp_path, [1, 2], backbone, memory=memory).batch([0, 1]), expected([1, 2]).half().float())
    assert backbone.preprocessed == [1]
    get(tmp_path, [1, 2], backbone)
    assert backbone.preprocessed == [1]


def test_every_single_flipped_bit_is_noticed(tmp_path: Path) -> None:
    space, digest = FeatureSpace(tmp_path / "space", "key", (ROWS * COLUMNS, WIDTH)), Dot(1).digest()
    space.write(digest, np.ones(space.shape, np.float16))
    assert space.read(digest) is not None
    file = space.path(digest)
    good = file.read_bytes()
    for bit in range(0, 8 * len(good), 3):
        content = bytearray(good)
        content[bit // 8] ^= 1 << bit % 8
        file.write_bytes(content)
        assert space.read(digest) is None, bit


def test_a_file_under_another_picture_s_name_is_not_served(tmp_path: Path) -> None:
    get(tmp_path, [1, 2])
    one, two = (next(f for f in files(tmp_path) if Dot(v).digest() in f.name) for v in (1, 2))
    one.write_bytes(two.read_bytes())
    assert torch.equal(get(tmp_path, [1]).batch([0]), expected([1]).half().float())


def test_a_file_deleted_by_another_process_is_computed_again(tmp_path: Path) -> None:
    backbone = Counting()
    features = get(tmp_path, [1, 2, 3, 1], backbone)
    for file in files(tmp_path):
        if Dot(2).digest() not in file.name:
            file.unlink()
    assert torch.equal(features.batch([3, 1, 2, 0]), expected([1, 2, 3, 1]).half().float())
    assert sorted(backbone.preprocessed) == [1, 1, 2, 3, 3]
    assert len(files(tmp_path)) == 3


def test_a_file_cut_short_while_in_use_is_computed_again(tmp_path: Path) -> None:
    features = get(tmp_path, [1])
    (file,) = files(tmp_path)
    file.write_bytes(file.read_bytes()[:-8])
    assert torch.equal(features.batch([0]), expected([1]).half().float())


def test_what_was_used_longest_ago_is_deleted(tmp_path: Path) -> None:
    for value in (1, 2, 3):
        get(tmp_path, [value])
    for value, age in ((1, 30), (2, 10), (3, 20)):
        for file in files(tmp_path):
            if Dot(value).digest() in file.name:
                os.utime(file, (1_000_000 - age, 1_000_000 - age))
    get(tmp_path, [1])  # used: now the newest
    gc.collect()
    get(tmp_path, [4], bound=3 * FILE)
    left = {value for value in range(1, 5) if any(Dot(value).digest() in f.name for f in files(tmp_path))}
    assert left == {1, 2, 4}


def test_the_bound_holds_after_every_call(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        values = rng.integers(0, 12, rng.integers(1, 5)).tolist()
        features = get(tmp_path, values, bound=4 * FILE + 7)
        assert sum(f.stat().st_size for f in files(tmp_path)) <= 4 * FILE + 7
        assert torch.equal(features.batch(range(len(values))), expected(values).half().float())
        del features


def test_a_set_beyond_the_bound_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    get(tmp_path, [9])
    gc.collect()
    backbone = Counting()
    with pytest.raises(FeatureCacheError, match=f"need {3 * FILE} bytes of patch features, max_bytes={3 * FILE - 1}"):
        get(tmp_path, [1, 2, 3, 3], backbone, bound=3 * FILE - 1)
    assert not backbone.preprocessed
    assert len(files(tmp_path)) == 1  # nor was anything deleted
    get(tmp_path, [1, 2, 3, 3], backbone, bound=3 * FILE)
    assert len(files(tmp_path)) == 3


def test_features_in_use_are_not_deleted_by_a_later_call(tmp_path: Path) -> None:
    backbone = Counting()
    train = get(tmp_path, [1, 2], backbone, bound=3 * FILE)
    val = get(tmp_path, [3], backbone, bound=3 * FILE)
    with pytest.raises(FeatureCacheError, match=f"need {5 * FILE} bytes"):
        get(tmp_path, [4, 5], backbone, bound=3 * FILE)
    assert torch.equal(train.batch([0, 1]), expected([1, 2]).half().float())
    assert sorted(backbone.preprocessed) == [1, 2, 3]
    del train, val
    gc.collect()
    get(tmp_path, [4, 5], backbone, bound=3 * FILE)
    assert sorted(backbone.preprocessed) == [1, 2, 3, 4, 5]


def test_features_in_memory_need_their_files_no_longer(tmp_path: Path) -> None:
    backbone = Counting()
    train = get(tmp_path, [1, 2], backbone, bound=2 * FILE, memory=PLENTY)
    get(tmp_path, [3, 4], backbone, bound=2 * FILE, memory=PLENTY)
    assert torch.equal(train.batch([1, 0]), expected([2, 1]).half().float())
    assert sorted(backbone.preprocessed) == [1, 2, 3, 4]


def test_foreign_files_are_left_alone_and_abandoned_ones_removed(tmp_path: Path) -> None:
    get(tmp_path, [1])
    (file,) = files(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    foreign = [tmp_path / "notes.features", tmp_path / "a" / "b" / "c.features", file.parent / "readme"]
    fresh, old = file.parent / "tmpx.partial", file.parent / "tmpy.partial"
    for path in (*foreign, fresh, old):
        path.write_bytes(bytes(10 * FILE))
    age = fresh.stat().st_mtime - ABANDONED_SECONDS - 5
    os.utime(old, (age, age))
    gc.collect()
    get(tmp_path, [2], bound=FILE)
    assert all(path.exists() for path in foreign)
    assert fresh.exists()
    assert not old.exists()
    assert not file.exists()


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1e6])
def test_features_that_are_not_finite_in_half_precision_are_refused_by_name(tmp_path: Path, scale: float) -> None:
    with pytest.raises(ValueError, match="picture 'dot 3' has patch features that are not finite"):
        get(tmp_path, [3], Counting(scale=scale))
    assert not files(tmp_path)


@pytest.mark.parametrize(
    ("refused", "named"), [(lambda v: 7 in v, "dot 7"), (lambda v: len(v) > 1, "dot 5, dot 7, dot 9")]
)
def test_pictures_that_the_backbone_refuses_are_named(tmp_path: Path, refused: Any, named: str) -> None:
    class Picky(Counting):
        def patches(self, images: Tensor) -> Tensor:
            if refused(images[:, 0, 0, 0].tolist()):
                raise ValueError("patch features are not finite")
            return super().patches(images)

    with pytest.raises(ValueError, match=f"picture '{named}': patch features are not finite"):
        get(tmp_path, [5, 7, 9], Picky())
    assert not files(tmp_path)


def test_a_backbone_that_breaks_its_word_on_the_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"backbone 'counting' gave patch features of shape \(1, 6, 4\)"):
        get(tmp_path, [3], Counting(feature_dim=5))


def test_a_bad_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_text("no picture")
    cache = FeatureCache(tmp_path / "cache", max_bytes=PLENTY)
    for path in ("bad.png", "nowhere.png"):
        picture = FilePicture(str(tmp_path / path), "m.csv line 4")
        with pytest.raises(BadPicture, match=rf"{path}' \(m.csv line 4\)"):
            cache.features([Dot(1), picture], Counting())  # type: ignore[arg-type]


def test_a_digest_that_is_no_digest_never_becomes_a_path(tmp_path: Path) -> None:
    class Evil(Dot):
        def digest(self) -> str:
            return "../../" + "a" * 58

    with pytest.raises(ValueError, match="it must be SHA-256 in hex"):
        FeatureCache(tmp_path, max_bytes=PLENTY).features([Evil(1)], Counting())  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "value"), [("max_bytes", 0), ("memory_bytes", -1)])
def test_sizes_out_of_range_are_refused(tmp_path: Path, name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name}={value}"):
        FeatureCache(tmp_path, **({"max_bytes": 1} | {name: value}))


def test_a_batch_size_below_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_size=0"):
        get(tmp_path, [1], batch_size=0)


def test_a_folder_that_cannot_be_created_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "cache"):
        with pytest.raises(FeatureCacheError, match="cannot be created"):
            FeatureCache(folder, max_bytes=1)


@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC, errno.EACCES])
def test_a_folder_that_cannot_be_written_is_named_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(feature_file.Path, "replace", refuse)
    with pytest.raises(FeatureCacheError, match=f"cannot be written to .{os.strerror(code)}"):
        get(tmp_path, [1])
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_serves_what_it_holds(tmp_path: Path) -> None:
    get(tmp_path, [1])
    inner = files(tmp_path)[0].parent
    for folder in (inner, inner.parent, tmp_path):
        folder.chmod(0o500)
    try:
        assert torch.equal(get(tmp_path, [1]).batch([0]), expected([1]).half().float())
        with pytest.raises(FeatureCacheError, match="cannot be written to"):
            get(tmp_path, [2])
    finally:
        for folder in (tmp_path, inner.parent, inner):
            folder.chmod(0o700)


def test_a_use_that_cannot_be_noted_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    get(tmp_path, [1])
    monkeypatch.setattr(feature_file.os, "utime", refuse)
    backbone = Counting()
    get(tmp_path, [1], backbone)
    assert not backbone.preprocessed


def test_something_else_in_a_file_s_place_is_an_error(tmp_path: Path) -> None:
    get(tmp_path, [1])
    (file,) = files(tmp_path)
    file.unlink()
    file.mkdir()
    with pytest.raises(FeatureCacheError, match="cannot be written to"):
        get(tmp_path, [1])


def test_batches_that_someone_else_stores_meanwhile_are_not_computed(tmp_path: Path) -> None:
    class Overtaken(Counting):
        def patches(self, images: Tensor) -> Tensor:
            get(tmp_path, range(8), Counting())
            return super().patches(images)

    backbone = Overtaken()
    features = get(tmp_path, range(8), backbone, batch_size=2)
    assert backbone.batches == [2]
    assert torch.equal(features.batch(range(8)), expected(range(8)).half().float())


def fill(folder: str, start: Any, answers: Any) -> None:
    """Runs in a process of its own."""
    torch.set_num_threads(1)
    backbone = Counting()
    start.wait()
    features = get(Path(folder), range(60), backbone, batch_size=3)
    answers.put((len(backbone.preprocessed), features.batch(range(60)).numpy()))


@pytest.mark.slow
def test_two_processes_fill_one_folder_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start, answers = context.Barrier(2), context.Queue()
    workers = [context.Process(target=fill, args=(str(tmp_path), start, answers)) for _ in range(2)]
    for worker in workers:
        worker.start()
    found = [answers.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join(timeout=60)
        assert worker.exitcode == 0
    for computed, features in found:
        assert computed <= 60
        assert np.array_equal(features, expected(range(60)).half().float().numpy())
    assert sum(computed for computed, _ in found) >= 60
    backbone = Counting()
    get(tmp_path, range(60), backbone)
    assert not backbone.preprocessed
    assert len(files(tmp_path)) == 60
    assert not list(tmp_path.rglob("*.partial"))
