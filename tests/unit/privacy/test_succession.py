"""What becomes of a ledger: its key changes, its data set is renamed or merged; nothing is ever charged less."""

import errno
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fedmpt_core.common.canonical import canonical
from fedmpt_core.common.signing import SigningError, load_signer, verifier
from fedmpt_core.config.job import JobConfig, PrivacyConfig, TrainingConfig
from fedmpt_core.config.site import DataConfig, SiteConfig, SitePrivacyConfig
from fedmpt_core.privacy.accounting.epsilon import Steps, epsilon
from fedmpt_core.privacy.ledger import succession
from fedmpt_core.privacy.ledger.budget import Budget, PrivacyRefused, charges, history, resolved
from fedmpt_core.privacy.ledger.chain import PROOF_PREFIX, SIGNED_PREFIX, LedgerError
from fedmpt_core.privacy.ledger.ledger import Ledger, read_ledger
from fedmpt_core.privacy.ledger.site_ledger import create_ledger, ledger_path, open_ledger, read_site_ledger
from fedmpt_core.privacy.ledger.statement import spending_plan, statement
from tests.kits import write_kit

SITE = "hospital-a"
JOB = resolved(
    JobConfig(
        "audited",
        ("cat", "dog"),
        training=TrainingConfig(rounds=2, local_steps=3),
        privacy=PrivacyConfig(epsilon=4.0),
    )
)


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("kits")
    for name in ("old", "new", "third"):
        write_kit(root / name, SITE)
    return root


@pytest.fixture
def policy(tmp_path: Path) -> SitePrivacyConfig:
    return SitePrivacyConfig("chest", 1000, 10.0, 1e-5, ledger=str(tmp_path / "ledgers"))


def budget(policy: SitePrivacyConfig, kit: Path | None, run_id: str, job: JobConfig = JOB) -> Budget:
    site = SiteConfig(DataConfig("scenes"), privacy=policy)
    return Budget(job, site, open_ledger(policy, SITE, kit), run_id)


def spend(policy: SitePrivacyConfig, kit: Path | None, run_id: str, rounds: int = 2) -> None:
    found = budget(policy, kit, run_id)
    for number in range(1, rounds + 1):
        reserved = found.reserve(number, 0, {})
        found.commit(reserved, hashlib.sha256(run_id.encode()).hexdigest())


# keys


def test_a_ledger_goes_on_under_a_new_key_and_is_verified_from_its_first_line(
    policy: SitePrivacyConfig, kits: Path
) -> None:
    create_ledger(policy, SITE, kits / "old")
    spend(policy, kits / "old", "first")
    path = ledger_path(policy)
    before = read_site_ledger(policy, kits / "old")
    assert succession.rotate(policy, SITE, kits / "old", kits / "new") == [path]
    assert succession.rotate(policy, SITE, kits / "old", kits / "new") == []  # done already
    spend(policy, kits / "new", "second")
    after = read_site_ledger(policy, kits / "new")
    assert after[: len(before)] == before
    assert [e.kind for e in after] == ["genesis", *["reserve", "commit"] * 2, "rotate", *["reserve", "commit"] * 2]
    assert epsilon(history(after), 1e-5) > epsilon(history(before), 1e-5)
    succession.rotate(policy, SITE, kits / "new", kits / "third")
    assert len(read_site_ledger(policy, kits / "third")) == len(after) + 1
    with pytest.raises(LedgerError, match="ledger rotate"):
        read_site_ledger(policy, kits / "old")


def test_who_has_not_the_old_key_cannot_take_a_ledger_over(policy: SitePrivacyConfig, kits: Path) -> None:
    create_ledger(policy, SITE, kits / "old")
    before = ledger_path(policy).read_bytes()
    with pytest.raises(LedgerError, match="signed by the key"):
        succession.rotate(policy, SITE, kits / "third", kits / "new")
    with pytest.raises(LedgerError, match="the same key"):
        succession.rotate(policy, SITE, kits / "old", kits / "old")
    with pytest.raises(LedgerError, match="ledger rotate"):
        open_ledger(policy, SITE, kits / "new")
    assert ledger_path(policy).read_bytes() == before


def test_a_certificate_that_ran_out_still_hands_its_ledger_over(
    policy: SitePrivacyConfig, kits: Path, tmp_path: Path
) -> None:
    key = write_kit(tmp_path / "in-time", SITE)
    create_ledger(policy, SITE, tmp_path / "in-time")
    write_kit(tmp_path / "ran-out", SITE, key=key, days=(-3, -1))
    with pytest.raises(SigningError, match="is valid from"):
        open_ledger(policy, SITE, tmp_path / "ran-out")
    assert succession.rotate(policy, SITE, tmp_path / "ran-out", kits / "new") == [ledger_path(policy)]
    assert [e.kind for e in read_site_ledger(policy, kits / "new")] == ["genesis", "rotate"]


def forged(kits: Path, **changes: Any) -> Callable[[dict[str, Any]], bytes]:
    """A rotate line that the old key signs, with other fields than an honest one."""
    sign, _, _ = load_signer(kits / "old" / "client.key", kits / "old" / "client.crt")

    def line(entry: dict[str, Any]) -> bytes:
        body = {k: v for k, v in {**entry, **changes}.items() if k not in ("hash", "sig")}
        digest = hashlib.sha256(canonical(body)).hexdigest()
        return canonical({**body, "hash": digest, "sig": sign(SIGNED_PREFIX + bytes.fromhex(digest))}) + b"\n"

    return line


def test_a_key_whose_holder_did_not_agree_takes_nothing_over(policy: SitePrivacyConfig, kits: Path) -> None:
    """Else a forger could write a whole ledger and let it end with the site's own key."""
    create_ledger(policy, SITE, kits / "old")
    succession.rotate(policy, SITE, kits / "old", kits / "new")
    path = ledger_path(policy)
    first, rotation = path.read_bytes().splitlines(keepends=True)
    entry = json.loads(rotation)
    assert path.read_bytes() == first + forged(kits)(entry)[:0] + rotation
    mine, _, _ = load_signer(kits / "third" / "client.key", kits / "third" / "client.crt")
    small = rsa.generate_private_key(65537, 1024).public_key()
    der = small.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    for changes, says in (
        ({"proof": mine(PROOF_PREFIX + bytes.fromhex(entry["prev"]))}, "did not agree"),
        ({"proof": ""}, "did not agree"),
        ({"public_key": mine.public_key}, "another digest"),
        ({"public_key": ""}, "or to none"),
        ({"public_key": der.hex(), "key_spki": hashlib.sha256(der).hexdigest()}, "cannot be used"),
    ):
        path.write_bytes(first + forged(kits, **changes)(entry))
        with pytest.raises(LedgerError, match=says):
            read_ledger(path, verifier(kits / "new" / "client.crt"))


def test_an_unsigned_ledger_has_no_key_to_hand_over(policy: SitePrivacyConfig, kits: Path) -> None:
    create_ledger(policy, SITE, None)
    new, _, _ = load_signer(kits / "new" / "client.key", kits / "new" / "client.crt")
    with pytest.raises(LedgerError, match="unsigned"):
        open_ledger(policy, SITE, None).rotate(new)


# data sets


def test_a_renamed_data_set_takes_every_charge_with_it(policy: SitePrivacyConfig, kits: Path) -> None:
    create_ledger(policy, SITE, kits / "old")
    spend(policy, kits / "old", "first")
    old = read_site_ledger(policy, kits / "old")
    renamed = replace(policy, dataset="thorax")
    assert succession.migrate(renamed, SITE, kits / "old", ["chest"]) == 1
    new = read_site_ledger(renamed, kits / "old")
    assert epsilon(history(new), 1e-5) == epsilon(history(old), 1e-5) > 0
    carried = new[0].details["carried"]
    assert [(c["dataset"], c["job"], c["steps"]) for c in carried] == [("chest", "first", 6)]
    assert carried[0]["head"] == read_site_ledger(policy, kits / "old")[-1].hash
    # the old one is no place to spend any more, and the new one counts what was spent before
    with pytest.raises(LedgerError, match="go on as 'thorax'"):
        budget(policy, kits / "old", "second").reserve(1, 0, {})
    with pytest.raises(PrivacyRefused, match=r"would reach epsilon .*; [0-9.]+ is spent and the cap is 4.1"):
        budget(replace(renamed, epsilon=4.1), kits / "old", "second")
    spend(renamed, kits / "old", "second")
    total = epsilon(history(read_site_ledger(renamed, kits / "old")), 1e-5)
    assert total == epsilon([*history(old), *history(old)], 1e-5)
    # a closed ledger still changes hands, so that all of a site's can be read with one key
    assert len(succession.rotate(renamed, SITE, kits / "old", kits / "new")) == 2
    assert read_site_ledger(policy, kits / "new")[-1].kind == "rotate"
    with pytest.raises(LedgerError, match="go on as 'thorax'"):
        budget(policy, kits / "new", "third").reserve(1, 0, {})


def test_merged_data_sets_carry_both_histories(policy: SitePrivacyConfig) -> None:
    other = replace(policy, dataset="hand")
    for one in (policy, other):
        create_ledger(one, SITE, None)
        spend(one, None, f"of-{one.dataset}")
    merged = replace(policy, dataset="bones", epsilon=20.0)
    assert succession.migrate(merged, SITE, None, ["chest", "hand"]) == 2
    entries = read_site_ledger(merged, None)
    assert sorted(c.job for c in charges(entries)) == ["of-chest", "of-hand"]
    account = statement(entries, 20.0)
    assert [(j.job, j.steps, j.first) for j in account.jobs] == [("of-chest", 6, ""), ("of-hand", 6, "")]
    assert statement(read_site_ledger(policy, None), None).successor == "bones"


def test_a_broken_off_migration_is_done_again(policy: SitePrivacyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    create_ledger(policy, SITE, None)
    spend(policy, None, "first")
    renamed = replace(policy, dataset="thorax")

    def full(path: Path, flags: int, *rest: Any, open: Any = os.open) -> int:
        if flags & os.O_EXCL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return open(path, flags, *rest)

    with monkeypatch.context() as broken:
        broken.setattr(os, "open", full)
        with pytest.raises(LedgerError, match="No space left"):
            succession.migrate(renamed, SITE, None, ["chest"])
    with pytest.raises(LedgerError, match="goes on as 'thorax', not as 'other'"):
        succession.migrate(replace(policy, dataset="other"), SITE, None, ["chest"])
    assert succession.migrate(renamed, SITE, None, ["chest"]) == 1


def test_what_cannot_be_migrated_is_said_and_nothing_is_touched(policy: SitePrivacyConfig) -> None:
    create_ledger(policy, SITE, None)
    before = ledger_path(policy).read_bytes()
    renamed = replace(policy, dataset="thorax")
    for target, sources, says in (
        (policy, ["chest"], "old names"),
        (renamed, [], "old names"),
        (renamed, ["chest", "chest"], "each once"),
        (replace(renamed, unit="group"), ["chest"], "protects each record, the policy each group"),
        (renamed, ["nothing"], "is missing"),
    ):
        with pytest.raises(LedgerError, match=says):
            succession.migrate(target, SITE, None, sources)
    assert ledger_path(policy).read_bytes() == before
    create_ledger(renamed, SITE, None)
    with pytest.raises(LedgerError, match="exists"):
        succession.migrate(renamed, SITE, None, ["chest"])
    assert ledger_path(policy).read_bytes() == before


# the account


def test_an_account_says_what_each_job_spent_and_what_another_would_cost(policy: SitePrivacyConfig) -> None:
    create_ledger(policy, SITE, None)
    spend(policy, None, "first")
    found = budget(policy, None, "second")
    found.reserve(1, 0, {})
    found.commit(found.reserve(1, 1, {}), "0" * 64)
    entries = read_site_ledger(policy, None)
    account = statement(entries, policy.epsilon)
    noise = JOB.privacy.noise_multiplier
    assert noise
    assert [(j.job, j.rounds, j.attempts, j.released, j.steps) for j in account.jobs] == [
        ("first", 2, 2, 2, 6),
        ("second", 1, 2, 1, 6),
    ]
    assert account.open == 1
    assert account.total == epsilon([Steps(0.25, noise, 12)], 1e-5)
    assert account.jobs[0].epsilon == epsilon([Steps(0.25, noise, 6)], 1e-5)
    assert account.left == pytest.approx(10.0 - account.total)
    planned = spending_plan(JOB, policy, entries)
    steps = 3 * (2 + JOB.federation.max_failed_rounds)
    assert planned.epsilon == epsilon([Steps(0.25, noise, steps)], 1e-5)
    assert planned.total == epsilon([Steps(0.25, noise, 12 + steps)], 1e-5)
    within = epsilon([Steps(0.25, noise, 12 + steps * planned.repeats)], 1e-5)
    beyond = epsilon([Steps(0.25, noise, 12 + steps * (planned.repeats + 1))], 1e-5)
    assert within <= policy.epsilon < beyond


def test_an_account_of_nothing_is_zero(policy: SitePrivacyConfig) -> None:
    ledger = create_ledger(policy, SITE, None)
    account = statement(ledger.entries(), 10.0)
    assert (account.total, account.jobs, account.left, account.successor) == (0.0, (), 10.0, "")


@pytest.mark.parametrize(
    "details", [{}, {"sample_rate": "0.5", "noise_multiplier": "0", "steps": 1}, {"sample_rate": "x"}]
)
def test_an_entry_that_does_not_say_what_it_charges_is_no_account(
    policy: SitePrivacyConfig, details: dict[str, Any]
) -> None:
    ledger = create_ledger(policy, SITE, None)
    ledger.reserve(job="j", round=1, attempt=0, details=details, admit=lambda _: None)
    with pytest.raises(LedgerError, match="entry 1 of 'chest' does not say what it charges"):
        statement(ledger.entries(), None)
    assert isinstance(ledger, Ledger)
