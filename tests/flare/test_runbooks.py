"""The runbooks of deploy/, followed word for word on one machine: only addresses and folders are others.

A block says who types it (`sh site`: at each of three sites, side by side, or `once` at one of them); `repeat` repeats
it until the good answer comes; `not-exercised` must be followed by the reason. The line `Good:` after a block must be
part of what it prints.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml

from fedmpt_core.audit.auditor import audit_run
from fedmpt_core.audit.known_keys import KnownKeys
from fedmpt_core.audit.run_evidence import load_run
from fedmpt_core.federation.run.manifest import check_manifest, read_manifest
from fedmpt_core.federation.run.record import load_record
from fedmpt_core.secagg.start_up_kit import load_roster
from tests.audited import MANIPULATIONS, resign
from tests.federation import DEPLOY, REPOSITORY, free_port

pytestmark = [pytest.mark.flare, pytest.mark.slow, pytest.mark.xdist_group("runbooks")]

SITES = ("hospital-a", "hospital-b", "hospital-c")
PEOPLE = {"lead": "lead", "admin-user": "org_admin", "auditor": "member"}
ALONE = ("admin", "server")
PAGES = sorted((DEPLOY / "runbooks").glob("[0-9]*.md"))
FENCE = re.compile(r"^```sh (?P<words>[^\n]*)\n(?P<text>.*?)^```\n(?P<after>.*?)(?=^```|\Z)", re.MULTILINE | re.DOTALL)
MODES = {"repeat", "once", "not-exercised"}
# a block that is added here needs a reason on its page
NOT_EXERCISED = [
    ("01-provision.md", "everybody"),
    ("01-provision.md", "server"),
    ("01-provision.md", "server"),
    ("02-admit-a-site.md", "site"),
    ("03-approve-and-submit.md", "admin-user"),
    ("04-watch.md", "site"),
    ("06-a-site-drops-out.md", "lead"),
    ("07-revoke-a-site.md", "hospital-a"),
    ("07-revoke-a-site.md", "hospital-c"),
    ("08-upgrade.md", "everybody"),
    ("08-upgrade.md", "hospital-a"),
    ("08-upgrade.md", "admin"),
    ("08-upgrade.md", "hospital-a"),
    ("08-upgrade.md", "everybody"),
]
LONGEST = 600  # seconds for any block; reached only when something hangs
PAUSE = 1.0  # seconds between two tries of a block that is repeated; each try is a process of its own
SHARED = ('"admin_timeout": 10.0', '"admin_timeout": 120.0')  # here three sites' accountants share two processors
MARK = "FEDMPT_RUNBOOK"  # in the environment of everything that a page starts


@dataclass(frozen=True)
class Block:
    """One block of commands: its page, who types it, how, and what a good answer holds."""

    page: str
    who: tuple[str, ...]
    text: str
    good: str
    modes: frozenset[str]
    after: str

    @property
    def exercised(self) -> bool:
        return "not-exercised" not in self.modes


def blocks(page: Path) -> Iterator[Block]:
    for fence in FENCE.finditer(page.read_text(encoding="utf-8")):
        words = fence["words"].split()
        good = re.match(r"\n*Good: `([^`]+)`", fence["after"])
        yield Block(
            page.name,
            tuple(w for w in words if w not in MODES),
            fence["text"],
            good[1] if good else "",
            frozenset(words) & MODES,
            fence["after"].strip(),
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
                    text = self._here(who, file.read_text()).replace("8002", str(self.port))
                    file.write_text(text.replace(*SHARED))
        for who, role in PEOPLE.items():
            request = yaml.safe_load((DEPLOY / "provision" / "lead.yaml").read_text())
            request["participants"][0] |= {"name": f"{self._me(who)}@example.org", "role": role}
            (root / who / "me.yaml").write_text(yaml.safe_dump(request))

    def __enter__(self) -> "Rehearsal":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill("")

    def type(self, block: Block) -> None:
        sites = SITES[:1] if "once" in block.modes else SITES
        for name in block.who:
            with ThreadPoolExecutor() as pool:
                list(pool.map(lambda who: self._type(who, block), sites if name == "site" else (name,)))

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
            assert "repeat" in block.modes, f"{block.page}, {who}:\n{block.text}\n{done.stdout[-4000:]}"
            assert time.monotonic() < deadline, done.stdout
            time.sleep(PAUSE)

    def _here(self, who: str, text: str) -> str:
        place = self.root / who
        text = text.replace("/opt/fedmpt", str(place / "opt")).replace("/var/lib/fedmpt", str(place / "state"))
        text = text.replace("fl.example.org", "localhost")
        return text.replace("hospital-a", who).replace("hospital_a", who.replace("-", "_")) if who in SITES else text

    def _environment(self, who: str) -> dict[str, str]:
        ca = self.root / "admin" / "ca" / "ca.json"
        fingerprint = json.loads(ca.read_text())["rootCA_fingerprint"] if ca.exists() else ""  # by telephone
        return {
            **os.environ,
            "HOME": str(self.root / who),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "200",
            "ROOT": fingerprint,
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
    anchors = KnownKeys(load_roster(root / "mail" / "secagg_roster.json"))

    def failures(folder: Path) -> set[str]:
        return {f.code for f in audit_run(load_run(folder, anchors)).findings if f.severity in ("fail", "unshown")}

    assert failures(run) == set()
    for name, (change, code) in MANIPULATIONS.items():
        folder = root / "forged" / name.replace("'", "")
        shutil.copytree(run, folder)
        change(folder)
        assert "file-changed" in failures(folder), name
        if code:
            resign(folder, root / "server" / "opt" / "server" / "startup")
            assert code in failures(folder), name


def contents(folder: Path) -> Iterator[bytes]:
    """Every file below a folder, and every file in each zip."""
    for path in (p for p in folder.rglob("*") if p.is_file()):
        yield path.read_bytes()
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                yield from (archive.read(name) for name in archive.namelist())


def check_keys(root: Path) -> None:
    """Distributed provisioning: a private key is where it was made, and in nothing that anybody else has."""
    people = [*SITES, *PEOPLE, "server"]
    keys = {who: next((root / who / "request").rglob("*.key")).read_bytes() for who in people}
    assert len(set(keys.values())) == len(people)
    for who in people:
        assert any(key == keys[who] for key in contents(root / who / "request"))
    places = {place: list(contents(root / place)) for place in (*people, "admin", "mail")}
    assert len(places["mail"]) > 3 * len(people)  # requests and certificates, each in a zip
    for who, key in keys.items():
        line = key.splitlines()[len(key.splitlines()) // 2]  # whatever the lines around it are
        assert [p for p, files in places.items() if any(line in data for data in files)] == [who]
    with zipfile.ZipFile(root / "mail" / "leak.zip", "w", zipfile.ZIP_DEFLATED) as leak:
        leak.writestr("key.txt", keys["server"])
    assert any(keys["server"] in data for data in contents(root / "mail"))


def test_every_block_is_followed_or_says_why_not() -> None:
    assert len(PAGES) == 8
    assert {block.page for block in ALL} == {page.name for page in PAGES}
    known = {"site", "everybody", *SITES, *PEOPLE, *ALONE}
    for block in ALL:
        assert block.who
        assert set(block.who) <= known
        assert block.exercised or block.after.startswith("Not exercised"), f"{block.page}: {block.text}"
    assert [(b.page, *b.who) for b in ALL if not b.exercised] == NOT_EXERCISED


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


@pytest.mark.thorough
def test_the_runbooks_stand_up_a_federation_and_carry_it_through(tmp_path: Path) -> None:
    console = tmp_path / "hospital-c" / "opt" / "site" / "parent.log"
    with Rehearsal(tmp_path) as rehearsal:
        for block in (b for b in ALL if b.exercised):
            if block.who == ("hospital-c",) and "repeat" not in block.modes:
                rehearsal.kill("hospital-c")  # the power cut that the page is about
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
        check_keys(tmp_path)
        assert "Successfully registered client:hospital-c" in console.read_text()  # after the power cut
    assert not [p for p in psutil.process_iter() if rehearsal._runs(p, "")]
