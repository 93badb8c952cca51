"""The pages for people who are new, typed as they stand: pictures, a private run, its audit.

A block says what it is: `sh` is typed; `toml NAME` or `python NAME` is a file that the reader writes; `text` is part of
what the block before it prints, with other numbers.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedmpt_core.federation.run.record import load_record
from tests.federation import REPOSITORY

pytestmark = [pytest.mark.flare, pytest.mark.slow, pytest.mark.thorough, pytest.mark.xdist_group("pages")]

PAGES = ("your-pictures.md", "your-audit.md")
FENCE = re.compile(r"^```(?P<words>[^\n]+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
LABELS = ("apple", "bicycle", "bird", "boat", "person")
PICTURES = 300


def draw(folder: Path) -> None:
    """Pictures with a square of one colour for each of their labels, and the table that names them."""
    generator = np.random.default_rng(0)
    (folder / "pictures").mkdir()
    rows = ["file,labels"]
    for number in range(PICTURES):
        pixels = generator.integers(90, 160, (64, 64, 3), dtype=np.uint8)
        shown = [k for k in range(len(LABELS)) if generator.random() < 0.4]
        for k in shown:
            top, left = generator.integers(0, 44, 2)
            pixels[top : top + 20, left : left + 20] = (50 * k, 250 - 50 * k, 25 * k)
        Image.fromarray(pixels).save(folder / "pictures" / f"{number:04}.jpg")
        rows.append(f"{number:04}.jpg,{'|'.join(LABELS[k] for k in shown)}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")


def alike(line: str) -> str:
    """A printed line with one mark for every number and every run of blanks."""
    return re.sub(r"\s+", " ", re.sub(r"[-+]?\d+(\.\d+)?|–", "#", line)).strip()


def typed(text: str, folder: Path) -> str:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "200"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{text}\n{done.stdout[-3000:]}"
    return done.stdout


def test_the_pages_lead_from_pictures_to_a_private_model_and_its_audit(tmp_path: Path) -> None:
    draw(tmp_path)
    printed, shown = "", 0
    for page in PAGES:
        for fence in FENCE.finditer((REPOSITORY / "docs" / page).read_text()):
            match fence["words"].split():
                case ["sh"]:
                    printed = typed(fence["text"], tmp_path)
                case ["text"]:
                    lines = {alike(line) for line in printed.splitlines()}
                    missing = [line for line in fence["text"].splitlines() if alike(line) not in lines]
                    assert not missing, f"{page}: {missing}\n{printed}"
                    shown += 1
                case ["toml" | "python", name]:
                    (tmp_path / name).write_text(fence["text"])
    assert shown >= len(PAGES)
    record = load_record(tmp_path / "runs" / "photos")
    assert record["outcome"] == "completed"
    assert all(spent["epsilon"] < 8 for spent in record["rounds"][-1]["privacy"].values())
    assert (tmp_path / "runs" / "photos" / "report.html").stat().st_size > 10_000
