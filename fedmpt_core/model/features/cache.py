"""Patch features, computed once per picture and kept on disk in half precision.

No trainable parameter sits inside the image tower (method, introduction), so a picture's patch features never
change: they are stored under the digests of the picture, the backbone and its preprocessing, one file each.

Several processes may fill and read one folder at once. A file is verified before a call hands it on; one that
fails in any way is computed again. The folder's size is bounded by `max_bytes`, kept by deleting what was used
longest ago; while several processes fill it at once it may be exceeded until the next call.

Features are as private as the pictures: no file's name or content goes into a log. Must never serve a damaged
file, features of another backbone, or numbers that are not finite. The same picture may differ in the last bit
of its features when it is computed in a batch of another size.
"""

import hashlib
import os
import re
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from fedmpt_core.common.progress import Progress
from fedmpt_core.data.pictures import Picture, as_rows
from fedmpt_core.model.backbone.base import Backbone
from fedmpt_core.model.device import PieceSize, in_pieces
from fedmpt_core.model.features.file import HEADER, FeatureCacheError, FeatureSpace, cannot, stored_files

MEMORY_BYTES = 256 * 2**20
"""Up to this size a call's features stay in memory instead of being read for every batch (chosen)."""

CPU_BATCH = 4
"""Pictures that a tower on a CPU is given at once. Measured per picture, one thread: EfficientNet-Lite0 21.5 ms in
fours, 31.9 in sixteens, whose feature maps leave the cache; ViT-B/16 267 and 289 ms."""


_Item = TypeVar("_Item")
_DIGEST = re.compile(r"[0-9a-f]{64}")


class PatchFeatures:
    """Patch features of R pictures, read when asked for. Made by `FeatureCache.features`.

    Attributes:
        shape: (R, P, D).
    """

    def __init__(
        self,
        cache: "FeatureCache",
        space: FeatureSpace,
        backbone: Backbone,
        pictures: dict[str, Picture],
        rows: np.ndarray,
        memory: np.ndarray | None,
    ) -> None:
        """Takes U distinct pictures by digest, (R,) positions among them and maybe all (U, P, D) float16."""
        self.shape = (len(rows), *space.shape)
        self._cache, self._space, self._backbone = cache, space, backbone
        self._pictures, self._digests, self._rows = pictures, list(pictures), rows
        self._memory = memory

    def __len__(self) -> int:
        """Number of records R."""
        return self.shape[0]

    def batch(self, indices: Sequence[int] | np.ndarray) -> Tensor:
        """(B, P, D) float32 of the records at `indices`, in that order; an index may repeat.

        Raises:
            ValueError: an index is no integer in [0, R).

        Edge cases:
            - no index -> (0, P, D).
            - a file that another process has deleted meanwhile -> computed again.
        """
        rows = self._rows[as_rows(indices, len(self))]
        if self._memory is not None:
            return torch.from_numpy(self._memory[rows].astype(np.float32))
        features = np.empty((len(rows), *self._space.shape), np.float32)
        lost: dict[str, list[int]] = {}
        for b, row in enumerate(rows):
            digest = self._digests[row]
            try:
                features[b] = np.memmap(
                    self._space.path(digest), "<f2", "r", offset=HEADER.size, shape=self._space.shape
                )
            except (FileNotFoundError, ValueError):
                lost.setdefault(digest, []).append(b)
        if lost:
            again = {digest: self._pictures[digest] for digest in lost}
            for digest, computed in self._cache.restore(self._space, self._backbone, again):
                features[lost[digest]] = computed
        return torch.from_numpy(features)

    def take(self, indices: Sequence[int] | np.ndarray) -> "PatchFeatures":
        """The records at `indices`, in that order, sharing what is in memory; an index may repeat.

        Raises:
            ValueError: an index is no integer in [0, R).
        """
        rows = self._rows[as_rows(indices, len(self))]
        space, backbone = self._space, self._backbone
        return _used(PatchFeatures(self._cache, space, backbone, self._pictures, rows, self._memory))

    def digests(self) -> list[str]:
        """SHA-256 hex of each of the R pictures; as private as the pictures."""
        return [self._digests[row] for row in self._rows]

    def belongs_to(self, folder: Path) -> bool:
        """Whether the files are in this cache folder."""
        return self._cache.folder == folder

    def files(self) -> dict[Path, int]:
        """The files that `batch` will read and their sizes; none when all features are in memory."""
        if self._memory is not None:
            return {}
        return {self._space.path(digest): self._space.file_bytes for digest in self._digests}


# Features that this process still reads from disk: a later call must not delete their files, whichever
# FeatureCache object it goes through. Weak, so that they are forgotten with their last user.
_in_use: weakref.WeakSet[PatchFeatures] = weakref.WeakSet()
_in_use_lock = threading.Lock()


def _used(features: PatchFeatures) -> PatchFeatures:
    with _in_use_lock:
        _in_use.add(features)
    return features


class FeatureCache:
    """A folder of patch features, bounded in size, shared by every process of one user."""

    def __init__(self, folder: str | Path, *, max_bytes: int, memory_bytes: int = MEMORY_BYTES) -> None:
        """Opens the folder; creates it, readable for its owner only, when it is missing.

        Args:
            folder: the cache folder. Files that are not the cache's own are left alone.
            max_bytes: bound on the size of all files, > 0.
            memory_bytes: features of one call up to this size are kept in memory, >= 0.

        Raises:
            FeatureCacheError: the folder cannot be created.
            ValueError: a size is out of range.
        """
        if max_bytes <= 0 or memory_bytes < 0:
            raise ValueError(
                f"max_bytes={max_bytes}, memory_bytes={memory_bytes}: the first must be above 0, the other not below"
            )
        self.folder = Path(folder).absolute()
        self.max_bytes, self.memory_bytes = max_bytes, memory_bytes
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise FeatureCacheError(cannot("created", self.folder, error)) from None

    def features(
        self,
        dataset_pictures: Sequence[Picture],
        backbone: Backbone,
        *,
        batch_size: int = 16,
        on_progress: Progress | None = None,
    ) -> PatchFeatures:
        """Patch features of R pictures; those that are not in the cache yet are computed, each once.

        Args:
            dataset_pictures: R pictures; the same content may occur more than once.
            backbone: `preprocess` and `patches` are called for missing pictures only.
            batch_size: pictures per call of `patches`, at least 1; fewer where the tower is on a CPU.
            on_progress: called with (done, total) distinct pictures.

        Returns:
            The features, in the order of `dataset_pictures`.

        Raises:
            BadPicture: a picture cannot be read or decoded.
            FeatureCacheError: the folder cannot be read or written, or its bound is too small for these
                pictures.
            ValueError: the backbone gives features of another shape, or such that are not finite in half
                precision.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} is out of range: use at least 1")
        key = hashlib.sha256(f"{backbone.digest()}:{backbone.preprocessing_digest()}".encode()).hexdigest()
        grid = backbone.grid
        space = FeatureSpace(self.folder / key[:32], key, (grid[0] * grid[1], backbone.feature_dim))
        report = on_progress or (lambda done, total: None)
        with ThreadPoolExecutor(_threads()) as pool:
            pictures, rows = _distinct(dataset_pictures, pool)
            self._make_room(space, pictures)
            total = len(pictures)
            fits = total * space.file_bytes <= self.memory_bytes
            memory = np.empty((total, *space.shape), np.float16) if fits else None
            place = {digest: u for u, digest in enumerate(pictures)}

            def keep(digest: str, features: np.ndarray) -> None:
                if memory is not None:
                    memory[place[digest]] = features

            missing: dict[str, Picture] = {}
            for digests in _pieces(list(pictures), 64):
                for digest, stored in zip(digests, pool.map(space.read, digests), strict=True):
                    if stored is None:
                        missing[digest] = pictures[digest]
                    else:
                        keep(digest, stored)
        report(total - len(missing), total)
        computed = self._compute(space, backbone, missing, batch_size)
        for done, (digest, features) in enumerate(computed, start=total - len(missing) + 1):
            keep(digest, features)
            report(done, total)
        return _used(PatchFeatures(self, space, backbone, pictures, rows, memory))

    def restore(
        self, space: FeatureSpace, backbone: Backbone, pictures: dict[str, Picture]
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Compute features whose files were there and are gone; yields (digest, (P, D) float16)."""
        self._make_room(space, pictures)
        yield from self._compute(space, backbone, pictures, len(pictures))

    def _compute(
        self, space: FeatureSpace, backbone: Backbone, pictures: dict[str, Picture], batch_size: int
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Compute and store; yields (digest, (P, D) float16) as it goes, in an order of this thread's own."""
        batches = list(_pieces(list(pictures), batch_size))
        size, on_device = PieceSize(min(batch_size, CPU_BATCH)), PieceSize(batch_size)
        # Sites simulated side by side often need the same test pictures. Each takes the batches in another
        # order and passes over those that someone else has stored meanwhile, so that they share the work.
        order = np.random.default_rng([os.getpid(), threading.get_ident()]).permutation(len(batches))

        def computed(batch: Sequence[str]) -> list[np.ndarray]:
            nonlocal size
            features: list[np.ndarray] = []
            devices: set[str] = set()

            def compute(start: int, stop: int) -> None:
                rows, device = _computed([pictures[d] for d in batch[start:stop]], backbone, space.shape, pool)
                features.extend(rows)
                devices.add(device)

            in_pieces(len(batch), size, compute)
            if devices - {"cpu"}:
                size = on_device
            return features

        def one(batch: Sequence[str]) -> list[tuple[str, np.ndarray]]:
            stored = list(pool.map(space.read, batch))
            if any(features is None for features in stored):
                stored = computed(batch)
                # side by side: a network folder answers slowly
                list(pool.map(space.write, batch, stored))
            return [(d, features) for d, features in zip(batch, stored, strict=True) if features is not None]

        if not batches:
            return
        with ThreadPoolExecutor(_threads()) as pool:
            yield from one(batches[order[0]])  # alone: a tower may be built on first use
            with _towers_side_by_side() as towers:
                for rows in towers.map(one, (batches[i] for i in order[1:])):
                    yield from rows

    def _make_room(self, space: FeatureSpace, digests: Iterable[str]) -> None:
        """Deletes what was used longest ago until `digests` fit below the bound beside all that is in use."""
        kept = {space.path(digest): space.file_bytes for digest in digests}
        with _in_use_lock:
            in_use = [features for features in _in_use if features.belongs_to(self.folder)]
        for features in in_use:
            kept |= features.files()
        needed = sum(kept.values())
        if needed > self.max_bytes:
            raise FeatureCacheError(
                f"the pictures in use need {needed} bytes of patch features, max_bytes={self.max_bytes} are "
                "allowed: raise the site's bound on the cache, or use fewer pictures"
            )
        try:
            others = [entry for entry in stored_files(self.folder) if entry[1] not in kept]
            excess = sum(size for _, _, size in others) - (self.max_bytes - needed)
            for _, path, size in sorted(others):
                if excess <= 0:
                    break
                path.unlink(missing_ok=True)
                excess -= size
        except OSError as error:
            raise FeatureCacheError(cannot("kept below its bound", self.folder, error)) from None


def _distinct(pictures: Sequence[Picture], pool: ThreadPoolExecutor) -> tuple[dict[str, Picture], np.ndarray]:
    """The U distinct pictures by digest, and (R,) the position of every picture among them."""
    place: dict[str, int] = {}
    distinct: dict[str, Picture] = {}
    rows = np.zeros(len(pictures), np.int64)
    r = 0
    for piece in _pieces(pictures, 64):
        for picture, digest in zip(piece, pool.map(lambda p: p.digest(), piece), strict=True):
            if not _DIGEST.fullmatch(digest):
                raise ValueError(f"picture {picture.name!r} has digest {digest!r}: it must be SHA-256 in hex")
            rows[r] = place.setdefault(digest, len(place))
            distinct.setdefault(digest, picture)
            r += 1
    return distinct, rows


def _computed(
    pictures: Sequence[Picture], backbone: Backbone, shape: tuple[int, int], pool: ThreadPoolExecutor
) -> tuple[list[np.ndarray], str]:
    """B pictures' (P, D) float16, and the kind of device they were computed on.

    Raises ValueError with the name of a picture whose features cannot be stored.
    """
    images = torch.stack(list(pool.map(lambda p: backbone.preprocess(p.load()), pictures)))
    try:
        features = backbone.patches(images).detach()
    except ValueError as error:
        raise ValueError(f"picture {_culprit(pictures, images, backbone)!r}: {error}") from None
    if tuple(features.shape) != (len(pictures), *shape):
        raise ValueError(
            f"backbone {backbone.name!r} gave patch features of shape {tuple(features.shape)} for "
            f"{len(pictures)} pictures: its grid and feature_dim announce {(len(pictures), *shape)}"
        )
    half = features.to("cpu", torch.float16).numpy()
    for picture, stored in zip(pictures, half, strict=True):
        if not np.isfinite(stored).all():
            raise ValueError(
                f"picture {picture.name!r} has patch features that are not finite, or beyond 65504, the "
                f"largest number in half precision: backbone {backbone.name!r} cannot be used with it"
            )
    return list(half), features.device.type


def _culprit(pictures: Sequence[Picture], images: Tensor, backbone: Backbone) -> str:
    """Name of the first picture that the backbone refuses on its own, or of them all."""
    for picture, image in zip(pictures, images, strict=True):
        try:
            backbone.patches(image[None])
        except ValueError:
            return picture.name
    return ", ".join(picture.name for picture in pictures)


def _pieces(items: Sequence[_Item], size: int) -> Iterator[Sequence[_Item]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


@contextmanager
def _towers_side_by_side() -> Iterator[ThreadPoolExecutor]:
    """Threads that each run a tower on their share of torch's threads.

    A convolutional tower hardly gains from a second thread inside it (26 against 28 ms a picture), but nearly doubles
    its speed with a second picture beside it.
    """
    threads = torch.get_num_threads()
    workers = min(8, threads)
    each = threads // workers
    torch.set_num_threads(each)
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(each,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _threads() -> int:
    # Decoding and hashing leave Python's lock; more threads than this only raise the memory held (chosen).
    return min(8, os.cpu_count() or 1)
