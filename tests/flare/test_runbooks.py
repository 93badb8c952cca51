"""The runbooks of deploy/, followed word for word on one machine: only addresses and folders are others.

A block says who types it (`sh site`: at each of three sites, side by side); `repeat` repeats it until the good
answer comes; `not-exercised` must be followed by the reason. The line `Good:` after a block must be part of what it
prints.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml

from fedmpt_core.audit.auditor import Anchors, audit_run
from fedmpt_core.audit.run import load_run
from fedmpt_core.kit import load_roster
from fedmpt_core.result import load_record
from fedmpt_core.run_manifest import check_manifest, read_manifest
from tests.audited import MANIPULATIONS, resign
from tests.federation import DEPLOY, REPOSITORY, free_port

pytestmark = [pytest.mark.flare, pytest.mark.slow, pytest.mark.xdist_group("administration")]

SITES = ("hospital-a", "hospital-b", "hospital-c")
PEOPLE = {"lead": "lead", "admin-user": "org_admin", "auditor": "member"}
ALONE = ("admin", "server")
PAGES = sorted((DEPLOY / "runbooks").glob("[0-9]*.md"))
FENCE = re.compile(r"^```sh (?P<words>[^\n]*)\n(?P<text>.*?)^```\n(?P<after>.*?)(?=^```|\Z)", re.MULTILINE | re.DOTALL)
LONGEST = 600  # seconds for any block; reached only when something hangs
MARK = "FEDMPT_RUNBOOK"  # in the environment of everything that a page starts


@dataclass(frozen=True)
class Block:
    """One block of commands: its page, who types it, how, and what a good answer holds."""

    page: str
    who: tuple[str, ...]
    text: str
    good: str
    repeat: bool
    exercised: bool
    after: str


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in re.finditer(
        r"^```sh (?P<words>[^\n]*)\n(?P<text>.*?)^```\n(?P<after>.*?)(?=^```|\Z)", text, re.M | re.S
    ):
        words = found["words"].split()
        good = re.match(r"\n*Good: `([^`]+)`", found["after"])
        yield Block(
            page.name,
            tuple(w for w in words if w not in ("repeat", "not-exercised")),
            found["text"],
            good[1] if good else "",
            "repeat" in words,
            "not-exercised" not in words,
            found["after"].strip(),
        )


ALL = [block for page in PAGES for block in blocks(page)]


class Rehearsal:
    """Everybody's machine as a folder; whatever was started is gone when the `with` block is left."""

    def __init__(self, root: Path) -> None:
        self.root, self.port = root, free_port()
        (root / "mail").mkdir()
        for who in (*SITES, *PEOPLE, *ALONE):
            place = root / who
            place.mkdir()
            (place / "mail").symlink_to(root / "mail")
            shutil.copytree(DEPLOY, place / "fedmpt" / "deploy")
            shutil.copytree(REPOSITORY / "jobs" / "demo", place / "fedmpt" / "jobs" / "demo")
            for file in (place / "fedmpt" / "deploy").rglob("*"):
                if file.is_file():
                    file.write_text(self._here(who, file.read_text()).replace("8002", str(self.port)))
        for who, role in PEOPLE.items():
            request = yaml.safe_load((DEPLOY / "provision" / "lead.yaml").read_text())
            request["participants"][0] |= {"name": f"{self._me(who)}@example.org", "role": role}
            (root / who / "me.yaml").write_text(yaml.safe_dump(request))

    def __enter__(self) -> "Rehearsal":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill("")

    def type(self, block: Block) -> None:
        for name in block.who:
            with ThreadPoolExecutor() as pool:
                list(pool.map(lambda who: self._type(who, block), SITES if name == "site" else (name,)))

    def kill(self, who: str) -> None:
        """End what runs on somebody's machine, or on all."""
        while alive := [p for p in psutil.process_iter() if self._runs(p, who)]:
            for process in alive:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(alive, timeout=20)

    def _type(self, who: str, block: Block) -> None:
        deadline = time.monotonic() + LONGEST
        while True:
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", self._here(who, block.text)],
                cwd=self.root / who,
                env=self._environment(who),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=LONGEST,
                check=False,
            )
            good = self._here(who, block.good) in done.stdout
            if done.returncode == 0 and good:
                return
            assert block.repeat, f"{block.page}, {who}:\n{block.text}\n{done.stdout[-4000:]}"
            assert time.monotonic() < deadline, done.stdout

    def _here(self, who: str, text: str) -> str:
        place = self.root / who
        text = text.replace("/opt/fedmpt", str(place / "opt")).replace("/var/lib/fedmpt", str(place / "state"))
        text = text.replace("fl.example.org", "localhost")
        return text.replace("hospital-a", who).replace("hospital_a", who.replace("-", "_")) if who in SITES else text

    def _environment(self, who: str) -> dict[str, str]:
        ca = self.root / "admin" / "ca" / "ca.json"
        told = json.loads(ca.read_text())["rootCA_fingerprint"] if ca.exists() else ""  # by telephone
        return {
            **os.environ,
            "HOME": str(self.root / who),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "200",
            "ROOT": told,
            "ME": self._me(who),
            MARK: f"{self.root}:{who}",
        }

    def _runs(self, process: psutil.Process, who: str) -> bool:
        try:
            mark = process.environ().get(MARK, "")
        except (psutil.Error, OSError):
            return False
        return mark.startswith(str(self.root)) and mark.endswith(f":{who}" if who else "")

    @staticmethod
    def _me(who: str) -> str:
        return who.removesuffix("-user")


def check_manipulations(run: Path, root: Path) -> None:
    """What forgers do to a run that was really downloaded; a server that lies signs it all the same."""
    anchors = Anchors(load_roster(root / "mail" / "secagg_roster.json"))

    def failures(folder: Path) -> set[str]:
        return {f.code for f in audit_run(load_run(folder, anchors)).findings if f.severity == "fail"}

    assert failures(run) == set()
    for name, (change, code) in MANIPULATIONS.items():
        folder = root / "forged" / name.replace("'", "")
        shutil.copytree(run, folder)
        change(folder)
        assert "file-changed" in failures(folder), name
        if code:
            resign(folder, root / "server" / "opt" / "server" / "startup")
            assert code in failures(folder), name


def test_every_block_is_followed_or_says_why_not() -> None:
    assert len(PAGES) == 8
    assert {block.page for block in ALL} == {page.name for page in PAGES}
    known = {"site", "everybody", *SITES, *PEOPLE, *ALONE}
    for block in ALL:
        assert block.who
        assert set(block.who) <= known
        assert block.exercised or block.after.startswith("Not exercised"), f"{block.page}: {block.text}"
    assert sum(not b.exercised for b in ALL) <= 6


def test_commands_pass_the_shell_s_linter() -> None:
    for block in ALL:
        done = subprocess.run(
            [
                Path(sys.executable).parent / "shellcheck",
                "--shell=bash",
                "--exclude=SC2046,SC2088,SC2012,SC2164,SC2086,SC1091",
                "-",
            ],
            input=block.text,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{block.page}: {done.stdout}"


def test_the_runbooks_stand_up_a_federation_and_carry_it_through(tmp_path: Path) -> None:
    with Rehearsal(tmp_path) as rehearsal:
        for block in ALL:
            if block.who == ("hospital-c",):
                rehearsal.kill("hospital-c")  # the power cut that the page is about
            if block.exercised:
                rehearsal.type(block)
        run = next((tmp_path / "auditor" / "run").glob("*/workspace"))
        manifest = read_manifest(run)
        check_manifest(manifest, run)
        assert sorted(manifest.sites) == list(SITES)
        assert [r["survivors"] for r in manifest.rounds] == [[], list(SITES), list(SITES)]
        assert load_record(run)["outcome"] == "completed"
        assert {p.name for p in (run / "privacy").iterdir()} == {
            f"{s}.{e}" for s in SITES for e in ("ledger.jsonl", "crt")
        }
        check_manipulations(run, tmp_path)
    assert not [p for p in psutil.process_iter() if rehearsal._runs(p, "")]
