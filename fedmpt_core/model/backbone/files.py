"""Weights files, model folders and downloads, with a sentence for everything that can be wrong with them.

Must never: run code that a file brings.
"""

import difflib
import importlib.util
import json
import logging
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from fedmpt_core.common.files import known_digest

CONFIG_FILE = "open_clip_config.json"
PICKLED = (".pt", ".pth", ".bin")
SUFFIXES = (".safetensors", *PICKLED)


def near(name: str, known: Iterable[str]) -> str:
    """The end of a sentence: up to five known names that look like `name`, or the first five."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=5, cutoff=0.4) or known[:5]
    return f"; it may be one of {', '.join(map(repr, close))}" if close else ""


def fetch(what: str, get: Callable[[], Any]) -> Any:
    """Run a download that looks into its cache first.

    Raises:
        ValueError: it failed, for whatever reason.
    """
    chatter = logging.getLogger("huggingface_hub")
    level = chatter.level
    chatter.setLevel(logging.CRITICAL)  # one line for each of up to twelve attempts; the error below says it once
    try:
        return get()
    except Exception as error:
        raise ValueError(
            f"{what} is not in the local cache and could not be fetched ({type(error).__name__}): load it "
            "once where there is network access and bring the cache, or name a local file or folder"
        ) from error
    finally:
        chatter.setLevel(level)


def pinned_file(package: str, name: str, sha256: str, install: str) -> Path:
    """A file out of an installed package, which is not imported.

    Args:
        package: its import name.
        name: of the file in it.
        sha256: what it must have, hex.
        install: the command that brings the package.

    Raises:
        ValueError: the package or file is missing, or it is another file.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"the package {package} is not installed: {install}")
    path = Path(spec.submodule_search_locations[0]) / name
    if not path.is_file():
        raise ValueError(f"{path} is missing: install the package {package} again")
    digest = known_digest(path)
    if digest != sha256:
        raise ValueError(f"{path} has SHA-256 {digest}, expected {sha256}: it is not the pinned file")
    return path


def parse_seed(weights: str) -> int:
    """The seed in `random:SEED`; raises ValueError when it is none."""
    text = weights.removeprefix("random:")
    if not (text.isascii() and text.isdigit() and int(text) < 2**63):
        raise ValueError(f"weights={weights!r}: write 'random:SEED' with a whole number from 0 to 2^63-1")
    return int(text)


def read_config(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Model and preprocessing configuration of an `open_clip_config.json`.

    Raises:
        ValueError: missing, or not such a file.
    """
    if not path.is_file():
        raise ValueError(f"folder {path.parent.name!r} holds no {CONFIG_FILE}: name a folder saved by open_clip")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        config = content["model_cfg"]
        _ = config["embed_dim"], dict(config["vision_cfg"]), dict(config["text_cfg"])
        return config, dict(content.get("preprocess_cfg") or {})
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{CONFIG_FILE} is not valid: it needs model_cfg with embed_dim, vision_cfg and text_cfg"
        ) from error


def only_weights_file(folder: Path) -> Path:
    """The folder's one .safetensors file, else its one weights file; raises ValueError when unclear."""
    files = sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES)
    files = [p for p in files if p.suffix == ".safetensors"] or files
    if len(files) != 1:
        raise ValueError(
            f"weights='': folder {folder.name!r} holds {len(files)} weights files ({', '.join(SUFFIXES)}), "
            "not one: name the file"
        )
    return files[0]


def refuse_code(path: Path) -> None:
    """Raises ValueError unless the file is a kind of weights file, and one of plain tensors."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"weights file {path.name} is of an unknown kind: use {', '.join(SUFFIXES)}")
    if path.suffix not in PICKLED:
        return
    try:
        torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        raise ValueError(
            f"weights file {path.name} is not a file of plain tensors, or is damaged; reading it could run "
            "code, so it is refused: where it is trusted, convert it to .safetensors"
        ) from error
