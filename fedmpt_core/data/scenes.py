"""Embedded multi-label pictures: scenes composed at run time, from a seed, out of real sprites in two drawing styles.

A site's training scenes carry spurious pairs of its own: with probability `spurious_strength` a drawn label brings
its partner along, and partners differ between sites (`co_occurrence` is the matrix the sampler uses). Validation and
test scenes are the same at every site, their labels independent of each other. What they show is partly unseen:

| unseen in training | how |
|---|---|
| sprites | one drawing of each class that has several in a style is kept for test |
| style | a site draws nine tenths of its objects in its own style (every third site mixes); test mixes evenly |
| transforms | rotations beyond 12 and up to 25 degrees, and a quarter of the scenes in grey tones |
| backgrounds | stripes and checks; training has plain colours and gradients |

Objects stand in quarters of their own, so nothing hides a labelled object. A scene depends on the seed, site, split and
index alone. This is a composed benchmark: it says nothing of photographs.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Annotated, Literal

import numpy as np
from PIL import Image
from pydantic import Field

from fedmpt_core.config.checks import checked
from fedmpt_core.data.pictures import Dataset

Split = Literal["train", "val", "test", "correlated"]

CLASSES = (
    *("airplane", "banana", "bicycle", "boat", "bus", "camera", "car", "cat", "chair", "chicken", "clock", "dog"),
    *("elephant", "fish", "guitar", "horse", "motorcycle", "pizza", "train", "umbrella"),
)
STYLES = ("fluent", "noto")
SIDE = 224  # pixels
MOST_OBJECTS = 4  # one per quarter of the picture
GREY_SHARE = 0.25  # of validation and test scenes
_OWN_STYLE = 0.9  # share of a site's objects in its own style
_SPLIT_KEY = {"train": 0, "val": 1, "test": 2, "correlated": 4}
_PAIRS_KEY = 3
_PAIRED = ("train", "correlated")  # splits with a site's own pairs


@checked
class SceneConfig:
    """What fixes the scenes of a federation."""

    seed: Annotated[int, Field(ge=0, le=2**32 - 1)]
    """Every scene follows from it."""
    spurious_strength: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Probability that a drawn label brings its partner at the site along."""


@dataclass(frozen=True)
class Placed:
    """One object of a scene: class index, sprite file, box (left, top, side) in pixels, degrees, mirrored."""

    label: int
    sprite: str
    box: tuple[int, int, int]
    degrees: float
    mirrored: bool

    def drawn(self) -> Image.Image:
        """What is pasted into its box, RGBA."""
        side = self.box[2]
        sprite = _opened(self.sprite).resize((side, side), Image.Resampling.BILINEAR)
        if self.mirrored:
            sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return sprite.rotate(self.degrees, Image.Resampling.BILINEAR)


@dataclass(frozen=True)
class ScenePicture:
    """A `Picture` that is composed when it is needed."""

    config: SceneConfig
    site: int
    split: Split
    index: int

    @property
    def name(self) -> str:
        """Where it belongs."""
        owner = f"site-{self.site + 1}/" if self.split in _PAIRED else ""
        return f"scene {owner}{self.split}/{self.index}"

    def digest(self) -> str:
        """SHA-256 hex of the composed pixels."""
        return hashlib.sha256(self.load().tobytes()).hexdigest()

    def objects(self) -> tuple[Placed, ...]:
        """What the scene shows, in drawing order."""
        return _plan(self.config, self.site, self.split, self.index)[1]

    def load(self) -> Image.Image:
        """The composed RGB picture, `SIDE` pixels square."""
        rng, placed = _plan(self.config, self.site, self.split, self.index)
        picture = _background(rng, plain=self.split == "train")
        for thing in placed:
            sprite = thing.drawn()
            picture.paste(sprite, thing.box[:2], sprite)
        if self.split != "train" and rng.random() < GREY_SHARE:
            picture = picture.convert("L").convert("RGB")
        return picture


def scenes(config: SceneConfig, *, site: int, sites: int, split: Split, count: int) -> Dataset:
    """The scenes of one split at one site.

    Args:
        config: seed and strength of the spurious pairs.
        site: from 0, below `sites`.
        sites: number of sites; at most 19 have pairs of their own.
        split: `val` and `test` are the same at every site; `correlated` is drawn like `test` but with the site's pairs.
        count: number of scenes, >= 0.

    Raises:
        ValueError: too many sites.
    """
    if sites > len(CLASSES) - 1:
        raise ValueError(f"sites={sites}: at most {len(CLASSES) - 1} sites can have label pairs of their own")
    pictures = tuple(ScenePicture(config, site if split in _PAIRED else 0, split, i) for i in range(count))
    targets = np.zeros((count, len(CLASSES)), np.uint8)
    for row, picture in enumerate(pictures):
        targets[row, [thing.label for thing in picture.objects()]] = 1
    return Dataset(CLASSES, pictures, targets)


@lru_cache(maxsize=256)
def co_occurrence(config: SceneConfig, site: int) -> np.ndarray:
    """(C, C) float64, read-only: entry (i, j) is the probability that a drawn label i brings j along at this site.

    Each site's pairs are another round of one round-robin tournament over the seed's order of the classes, so no pair
    occurs at two of the first C - 1 sites.
    """
    count = len(CLASSES)
    order = np.random.default_rng([config.seed, _PAIRS_KEY]).permutation(count)
    ring = np.roll(np.arange(1, count), site)
    circle = np.concatenate(([0], ring))
    matrix = np.zeros((count, count))
    for i in range(count // 2):
        one, other = order[circle[i]], order[circle[count - 1 - i]]
        matrix[one, other] = matrix[other, one] = config.spurious_strength
    matrix.setflags(write=False)
    return matrix


def _plan(config: SceneConfig, site: int, split: Split, index: int) -> tuple[np.random.Generator, tuple[Placed, ...]]:
    """What to draw, and the generator that goes on to draw it."""
    rng = np.random.default_rng([config.seed, _SPLIT_KEY[split], site, index])
    labels = _paired_labels(rng, config, site) if split in _PAIRED else _independent_labels(rng)
    size = SIDE // 2
    spots = rng.permutation(MOST_OBJECTS)
    placed = []
    for spot, label in zip(spots, labels, strict=False):
        sprite = _sprite(rng, label, site, training=split == "train")
        side = int(size * rng.uniform(0.75, 1.0))
        x, y = (int(c * size + rng.uniform(0, size - side)) for c in (spot % 2, spot // 2))
        degrees = rng.uniform(-12, 12) if split == "train" else rng.uniform(-25, 25)
        placed.append(Placed(int(label), sprite, (x, y, side), float(degrees), bool(rng.random() < 0.5)))
    return rng, tuple(placed)


def _paired_labels(rng: np.random.Generator, config: SceneConfig, site: int) -> list[int]:
    matrix = co_occurrence(config, site)
    labels = rng.choice(len(CLASSES), size=rng.integers(1, 3), replace=False).tolist()
    for label in list(labels):
        for partner in np.flatnonzero(matrix[label]):
            if int(partner) not in labels and rng.random() < matrix[label, partner]:
                labels.append(int(partner))
    return labels[:MOST_OBJECTS]


def _independent_labels(rng: np.random.Generator) -> list[int]:
    while True:
        labels = np.flatnonzero(rng.random(len(CLASSES)) < 0.12)
        if 1 <= len(labels) <= MOST_OBJECTS:
            return rng.permutation(labels).tolist()


def _sprite(rng: np.random.Generator, label: int, site: int, *, training: bool) -> str:
    if training and site % 3 < 2:
        style = STYLES[site % 3 if rng.random() < _OWN_STYLE else 1 - site % 3]
    else:
        style = STYLES[rng.integers(2)]
    known, held_out = _index()[CLASSES[label], style]
    choice = known if training else known + held_out
    return choice[rng.integers(len(choice))]


def _background(rng: np.random.Generator, *, plain: bool) -> Image.Image:
    one, other = rng.integers(80, 256, (2, 3)).astype(np.float32)
    x = np.arange(SIDE, dtype=np.float32)[None, :] / SIDE
    y = x.T
    if plain:
        angle = rng.uniform(0, 2 * np.pi)
        tilt = (x - 0.5) * np.float32(np.cos(angle)) + (y - 0.5) * np.float32(np.sin(angle))
        mix = np.clip(0.5 + tilt, 0, 1) * np.float32(rng.random() < 0.7)
    else:
        waves = rng.integers(3, 9)
        stripes = (np.floor(x * waves) % 2 + (np.floor(y * waves) % 2) * (rng.random() < 0.5)) % 2
        mix = np.float32(0.25) * stripes
    colours = one + (other - one) * mix[..., None]  # stays within 0..255: both ends do
    return Image.fromarray(colours.astype(np.uint8))


@lru_cache(maxsize=128)
def _opened(name: str) -> Image.Image:
    with files("fedmpt_core.data").joinpath("sprites", name).open("rb") as stream, Image.open(stream) as sprite:
        return sprite.convert("RGBA")


@lru_cache(maxsize=1)
def _index() -> dict[tuple[str, str], tuple[list[str], list[str]]]:
    """(class, style) -> sprites seen in training, sprites kept for test."""
    text = files("fedmpt_core.data").joinpath("sprites", "index.json").read_text(encoding="utf-8")
    sprites: dict[tuple[str, str], tuple[list[str], list[str]]] = {}
    for row in json.loads(text)["sprites"]:
        sprites.setdefault((row["class"], row["style"]), ([], []))[bool(row["held_out"])].append(row["file"])
    return sprites
