"""Runs as an auditor downloads them, without training: signed ledgers, records and manifests, and what forgers do."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from fedmpt_core.audit.known_keys import KnownKeys
from fedmpt_core.common.canonical import canonical
from fedmpt_core.common.files import file_digest
from fedmpt_core.common.release import PROGRAM, RELEASE
from fedmpt_core.common.signing import load_signer
from fedmpt_core.config.job import FederationConfig, JobConfig, PrivacyConfig, TrainingConfig
from fedmpt_core.config.site import DataConfig, SiteConfig, SitePrivacyConfig
from fedmpt_core.config.toml import job_from_dict
from fedmpt_core.federation.run.manifest import RunManifest, read_manifest, round_facts
from fedmpt_core.federation.run.record import MANIFEST, RunRecord, save_model
from fedmpt_core.federation.site.policy_card import PolicyCard
from fedmpt_core.model.vector import ParameterLayout
from fedmpt_core.privacy.ledger import succession
from fedmpt_core.privacy.ledger.budget import Budget, resolved
from fedmpt_core.privacy.ledger.chain import PROOF_PREFIX, SIGNED_PREFIX
from fedmpt_core.privacy.ledger.site_ledger import create_ledger, ledger_copy, open_ledger
from fedmpt_core.secagg.policy import Floors
from fedmpt_core.secagg.roster import Member, Roster
from fedmpt_core.secagg.start_up_kit import key_card_of
from tests.federation import DEPLOY
from tests.kits import write_kit
from tests.provisioning import flare

SITES, SERVER = ("hospital-a", "hospital-b", "hospital-c"), "fl.example.org"
CAPS = (20.0, 16.0, 12.0)
JOB = resolved(
    JobConfig(
        "audited",
        ("cat", "dog"),
        training=TrainingConfig(rounds=3, local_steps=2),
        privacy=PrivacyConfig(epsilon=6.0),
        federation=FederationConfig(max_failed_rounds=1, evaluate_every=0),
    )
)
JOINED = {"device": "cpu", "versions": {"fedmpt": RELEASE}, "evaluates": False, "backbone_digest": "aa", "weight": 1}
LAYOUT = ParameterLayout(("contexts.class", "head.bias"), ((2, 8), (2,)))
UNITS = 1000


def provision(root: Path, sites: Sequence[str] = SITES) -> Path:
    """Kits of a federation, provisioned by FLARE from deploy/'s project file."""
    project = yaml.safe_load((DEPLOY / "provision" / "project.yml").read_text())
    others = [p for p in project["participants"] if p["type"] != "client"]
    project["participants"] = others + [{"name": s, "type": "client", "org": s.replace("-", "_")} for s in sites]
    (root / "project.yml").write_text(yaml.safe_dump(project))
    flare("provision", "-p", root / "project.yml", "-w", root / "kits", home=root)
    return root / "kits" / "fedmpt" / "prod_00"


def roster_of(kits: Path, sites: Sequence[str] = SITES) -> KnownKeys:
    """What an auditor knows who was given the roster."""
    key_cards = [key_card_of(kits / site / "startup") for site in sites]
    members = {card.name: Member(card.fingerprint, card.org) for card in key_cards}
    return KnownKeys(Roster(key_cards[0].root, members))


def renewed_kit(kits: Path, site: str, folder: Path) -> Path:
    """A kit with a new key for a site, whose certificate the federation's root signs."""
    state = json.loads((kits.parent / "state" / "cert.json").read_text())
    root = x509.load_pem_x509_certificate(state["root_cert"].encode())
    root_key: Any = load_pem_private_key(state["root_pri_key"].encode(), None)
    old = x509.load_pem_x509_certificate((kits / site / "startup" / "client.crt").read_bytes())
    key = write_kit(folder, site)
    builder = x509.CertificateBuilder(root.subject, old.subject, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(old.not_valid_before_utc).not_valid_after(old.not_valid_after_utc)
    for extension in old.extensions:
        if extension.oid != x509.SubjectKeyIdentifier.oid:
            builder = builder.add_extension(extension.value, extension.critical)
    (folder / "client.crt").write_bytes(builder.sign(root_key, SHA256()).public_bytes(Encoding.PEM))
    shutil.copy(kits / site / "startup" / "rootCA.pem", folder)
    return folder


class Federation:
    """Ledgers that go on from run to run, and the runs that a server would leave."""

    def __init__(
        self, root: Path, kits: Path, sites: Sequence[str] = SITES, cap: float | Mapping[str, float] = 20.0
    ) -> None:
        self.root, self.kits = root, kits
        self.renewed: dict[str, Path] = {}
        self.sites = {}
        for site in sites:
            most = cap[site] if isinstance(cap, Mapping) else cap
            policy = SitePrivacyConfig("images", UNITS, most, 1e-5, ledger=str(root / "ledgers" / site))
            self.sites[site] = SiteConfig(DataConfig("scenes"), privacy=policy)
            create_ledger(policy, site, self.kit(site))

    def kit(self, who: str) -> Path:
        return self.renewed.get(who, self.kits / who / "startup")

    def renew(self, site: str) -> None:
        """The site gets a new key under a certificate of the same root, and hands its ledgers over."""
        old, new = self.kit(site), renewed_kit(self.kits, site, self.root / f"{site}-{len(self.renewed)}")
        succession.rotate(self.policy(site), site, old, new)
        self.renewed[site] = new

    def run(
        self,
        run_id: str,
        job: JobConfig = JOB,
        *,
        rounds: int | None = None,
        dropouts: Mapping[int, Sequence[str]] | None = None,
    ) -> Path:
        """A run of the job, completed unless it has fewer rounds; round 2 was tried twice.

        Args:
            run_id: its name.
            job: what it trains; one that continues a run begins with that run's rounds.
            rounds: at which it ends; None is all.
            dropouts: by round, who was asked and is in no sum; it has released an update all the same.
        """
        folder = self.root / run_id
        (folder / "privacy").mkdir(parents=True)
        record = RunRecord.start(job, run_id).joined(
            {site: {"backbone": "b", "is_stand_in": True, **JOINED} for site in self.sites}
        )
        if job.resume:
            record = replace(record, rounds=tuple(self._record(job.resume.job)["rounds"][: job.first_round]))
        else:
            record = record.with_round(0, 0.1, {}, {})
        budgets = {site: self.budget(site, job, run_id) for site in self.sites}
        ended = job.training.rounds if rounds is None else rounds
        for number in range(job.first_round, ended + 1):
            gone, privacy = (dropouts or {}).get(number, ()), {}
            for site, budget in budgets.items():
                for attempt in range(2 if number == 2 else 1):
                    reserved = budget.reserve(number, attempt, details(job, f"{run_id} {site}"))
                budget.commit(reserved, hashlib.sha256(f"{run_id} {site} {number}".encode()).hexdigest())
                head = budget.head().to_dict()
                privacy[site] = {"epsilon": budget.spent(), "delta": job.privacy.delta, "head": head}
            there = [site for site in self.sites if site not in gone]
            facts = {
                "cohort": there,
                "members": len(self.sites),
                "threshold": Floors(3, 1).threshold(len(self.sites)),
                "epoch": 1,
                "left_out": dict.fromkeys(gone, "it did not answer"),
                "faults": {},
                "beyond": 0,
            }
            facts |= {"attempt": int(number == 2), "transcript": f"{run_id}-{number}"}
            privacy = {site: privacy[site] for site in there}
            record = record.with_round(
                number, 0.1, dict.fromkeys(there, 10), {}, privacy, facts if job.secagg.masked else {}
            )
        record = record.ended_as("completed" if ended == job.training.rounds else "failed: the server lost its power")
        (folder / "result.json").write_text(json.dumps(asdict(record)))
        (folder / "model.safetensors").write_bytes(save_model(LAYOUT, np.zeros(LAYOUT.size, np.float32)))
        copies = {}
        for site in self.sites:
            ledger, certificate = ledger_copy(self.policy(site), self.kit(site))
            copies[site] = {"file": f"privacy/{site}.ledger.jsonl", "certificate": f"privacy/{site}.crt"}
            (folder / copies[site]["file"]).write_bytes(ledger)
            (folder / copies[site]["certificate"]).write_bytes(certificate)
        manifest = RunManifest.of(record, folder, ledgers=copies, kit=self.kit(SERVER))
        (folder / MANIFEST).write_text(manifest.to_json())
        return folder

    def resign(self, folder: Path, **changes: Any) -> None:
        """A server that lies signs what was changed."""
        resign(folder, self.kit(SERVER), **changes)

    def policy_card(self, site: str, cap: float) -> PolicyCard:
        changed = replace(self.sites[site], privacy=replace(self.policy(site), epsilon=cap))
        return PolicyCard.of(site, changed, open_ledger(self.policy(site), site, self.kit(site)).entries())

    def policy(self, site: str) -> SitePrivacyConfig:
        policy = self.sites[site].privacy
        assert policy
        return policy

    def budget(self, site: str, job: JobConfig, run_id: str) -> Budget:
        return Budget(job, self.sites[site], open_ledger(self.policy(site), site, self.kit(site)), run_id)

    def hand_over(self, folder: Path) -> None:
        """The sites' ledgers as they are now, in a run's folder, and the server's signature over them."""
        for site in self.sites:
            ledger, _ = ledger_copy(self.policy(site), self.kit(site))
            (folder / "privacy" / f"{site}.ledger.jsonl").write_bytes(ledger)
        self.resign(folder)

    def _record(self, run_id: str) -> dict[str, Any]:
        return json.loads((self.root / run_id / "result.json").read_text())


def details(job: JobConfig, process: str) -> dict[str, Any]:
    """What a site's trainer adds to the mechanism in a reservation; worked out by hand."""
    released = 2 * 2 * 8 + 2  # text features of two conditions and two classes, and the bias
    bound, noise = job.privacy.max_grad_norm, job.privacy.noise_multiplier or 0.0
    return {
        "trained": list(LAYOUT.names),
        "released": released,
        "noise_std": [noise * bound * (1 + 2.0**-20 * released**0.5)],
        "expected_batch_size": job.privacy.sample_rate * UNITS,
        "grid_bits": 20,
        "rng": "AES-256-CTR",
        "rng_key_id": hashlib.sha256(process.encode()).hexdigest(),
        "aggregation": "masked" if job.secagg.masked else "unmasked",
        "identities": "start-up kits",
        "config": job.digest(),
        "code": PROGRAM,
        "records": "ab" * 32,
    }


SHARED = ("run_id", "config_digest", "outcome", "started", "ended", "aggregation", "identities", "resumed")


def resign(folder: Path, kit: Path, **changes: Any) -> None:
    """A server that lies signs what was changed; its manifest says of sites, rounds and files what the record says."""
    old = read_manifest(folder)
    record = json.loads((folder / "result.json").read_text())
    heads = {site: spent["head"] for row in record["rounds"] for site, spent in row["privacy"].items() if spent != 1}
    none: dict[str, Any] = {"ledger": {"kept": "the site gave none"}}
    sites = {
        site: {**old.sites.get(site, none), **facts, "head": heads.get(site)} for site, facts in record["sites"].items()
    }
    for site in sites.values():
        if not (folder / site["ledger"].get("file", "")).is_file():
            site["ledger"] = none["ledger"]
    copies = {name for site in sites.values() for key, name in site["ledger"].items() if key != "kept"}
    files = {name for name in old.files if name in copies or not name.startswith("privacy")}
    stated = {
        "sites": sites,
        "files": {name: file_digest(folder / name) for name in sorted(files) if (folder / name).exists()},
        "rounds": [round_facts(row) for row in record["rounds"]],
        **{name: record[name] for name in SHARED},
        "signature": "",
    }
    new = replace(old, **{**stated, **changes})
    sign, _, _ = load_signer(kit / "server.key", kit / "server.crt")
    (folder / MANIFEST).write_text(replace(new, signature=sign(new.signed_text())).to_json())


def ledger_of(folder: Path, number: int = 0) -> Path:
    """The copy of a site's ledger, the first site's unless another is asked for."""
    return sorted((folder / "privacy").glob("*.ledger.jsonl"))[number]


def lines(folder: Path) -> list[bytes]:
    return ledger_of(folder).read_bytes().splitlines(keepends=True)


def write(folder: Path, changed: list[bytes]) -> None:
    ledger_of(folder).write_bytes(b"".join(changed))


def edit_record(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads((folder / "result.json").read_text())
    change(values)
    (folder / "result.json").write_text(json.dumps(values))


def edit_field(folder: Path) -> None:
    changed = lines(folder)
    number, entry = next((i, e) for i, e in enumerate(map(json.loads, changed)) if e["kind"] == "reserve")
    entry["details"]["steps"] -= 1
    changed[number] = canonical(entry) + b"\n"
    write(folder, changed)


def forge(folder: Path) -> None:
    changed = lines(folder)
    entry = json.loads(changed[-1])
    changed[-1] = canonical({**entry, "sig": "00" * 256}) + b"\n"
    write(folder, changed)


def swap(folder: Path) -> None:
    names = [ledger_of(folder, number).name.removesuffix(".ledger.jsonl") for number in (0, 1)]
    for kind in ("ledger.jsonl", "crt"):
        a, b = (folder / "privacy" / f"{name}.{kind}" for name in names)
        a_bytes, b_bytes = a.read_bytes(), b.read_bytes()
        a.write_bytes(b_bytes)
        b.write_bytes(a_bytes)


def another_key(folder: Path) -> None:
    """The whole ledger again, under a key that its forger made."""
    kit, site = folder.parent / "forged", ledger_of(folder).name.removesuffix(".ledger.jsonl")
    write_kit(kit, site)
    write(folder, written_by(kit, lines(folder)))
    shutil.copy(kit / "client.crt", folder / "privacy" / f"{site}.crt")


def written_by(kit: Path, ledger: Sequence[bytes], start: int = 0) -> list[bytes]:
    """A ledger whose lines from `start` on a forger chains and signs anew; each change of key in them names his."""
    sign, _, spki = load_signer(kit / "client.key", kit / "client.crt")
    forged, renamed = [*ledger[:start]], {}
    for line in ledger[start:]:
        before = json.loads(forged[-1])["hash"] if forged else "0" * 64
        old = json.loads(line)
        entry = {**old, "seq": len(forged), "prev": before}
        if entry["kind"] == "commit":
            entry |= {"reservation": renamed.get(old["reservation"], old["reservation"])}
        if entry["kind"] in ("genesis", "rotate"):
            entry |= {"key_spki": spki, "public_key": sign.public_key}
        if entry["kind"] == "rotate":
            entry |= {"proof": sign(PROOF_PREFIX + bytes.fromhex(before))}
        body = {k: v for k, v in entry.items() if k not in ("hash", "sig")}
        digest = renamed[old["hash"]] = hashlib.sha256(canonical(body)).hexdigest()
        forged.append(canonical({**body, "hash": digest, "sig": sign(SIGNED_PREFIX + bytes.fromhex(digest))}) + b"\n")
    return forged


def change_job(section: str, **values: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        agreed = job_from_dict(json.loads((folder / "result.json").read_text())["config"], "")
        job = replace(agreed, **{section: replace(getattr(agreed, section), **values)})
        edit_record(folder, lambda r: r.update(config=job.to_dict(), config_digest=job.digest()))

    return change


def repeat_round(folder: Path) -> None:
    edit_record(folder, lambda r: r["rounds"].append(r["rounds"][-1]))


def before_this_run(folder: Path) -> None:
    """An old ledger, as it was when the run began."""
    run_id, copy = read_manifest(folder).run_id, lines(folder)
    write(folder, copy[: next(i for i, line in enumerate(copy) if json.loads(line).get("job") == run_id)])


# what is done, and what an auditor finds when the server signs the change all the same; nothing a site signs speaks of
# the model, so a server that lies may publish another
MANIPULATIONS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "edit a field": (edit_field, "ledger-damaged"),
    "drop an entry": (lambda f: write(f, [*lines(f)[:-3], *lines(f)[-2:]]), "ledger-damaged"),
    "reorder": (lambda f: write(f, [*lines(f)[:-2], *lines(f)[:-3:-1]]), "ledger-damaged"),
    "cut the tail": (lambda f: write(f, lines(f)[:-1]), "ledger-cut"),
    "replay another job's entry": (lambda f: write(f, [*lines(f), lines(f)[1]]), "ledger-damaged"),
    "swap sites": (swap, "ledger-damaged"),
    "change sigma": (change_job("privacy", noise_multiplier=9.0), "mechanism-differs"),
    "change rate": (change_job("privacy", sample_rate=0.125), "mechanism-differs"),
    "change the bound": (change_job("privacy", max_grad_norm=2.0), "mechanism-differs"),
    "forge a signature": (forge, "ledger-damaged"),
    "re-sign with another key": (another_key, "ledger-damaged"),
    "remove a site's ledger": (lambda f: ledger_of(f).unlink(), "ledger-missing"),
    "change the config": (change_job("training", learning_rate=0.5), "config-changed"),
    "change the model": (lambda f: (f / "model.safetensors").write_bytes(b"another"), ""),
    "duplicate a round": (repeat_round, "round-twice"),
    "restore an old ledger": (before_this_run, "ledger-cut"),
}
