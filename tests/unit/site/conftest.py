"""Sites for tests of the guards."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from fedmpt_core.config.secagg import SiteSecAggConfig
from fedmpt_core.config.site import DataConfig, SiteConfig, SitePrivacyConfig
from fedmpt_core.federation.site.latch_file import latch_path, write_latch
from fedmpt_core.privacy.ledger.site_ledger import create_ledger
from fedmpt_core.secagg.latch import Latch, digest_of
from fedmpt_flare import tasks
from fedmpt_flare.site.budget_gate import BudgetGate
from tests.guarded_site import ABORT, JOB_ID, MASKED_JOB, MESSAGES, SITE, UPDATE, Site
from tests.kits import write_kit
from tests.settings import OPEN


@pytest.fixture(scope="session")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kit")
    write_kit(folder, SITE)
    return folder


@pytest.fixture
def site(tmp_path: Path, kit: Path) -> Site:
    root = tmp_path / "a-secret-path"
    for folder in ("startup", "local"):
        (root / folder).mkdir(parents=True)
    for file in kit.iterdir():
        (root / "startup" / file.name).write_bytes(file.read_bytes())
    policy = SitePrivacyConfig("pictures", units=10, epsilon=5.0, delta=1e-5, ledger=str(root / "ledgers"))
    data, cache = DataConfig(path="/nowhere/manifest.csv"), str(tmp_path / "cache")
    made = Site(root, SiteConfig(data, privacy=policy, secagg=OPEN, cache_dir=cache))
    made.settle()
    create_ledger(policy, SITE, root / "startup")
    made.deploy()
    return made


@pytest.fixture(scope="module")
def gate() -> BudgetGate:
    return BudgetGate()


@pytest.fixture
def masked(site: Site) -> Site:
    """A site with a roster, in the middle of a masked job; what it said is on record, the update is committed."""
    site.settings = replace(site.settings, secagg=SiteSecAggConfig(roster="/somewhere/roster.json"))
    site.settle()
    site.deploy(MASKED_JOB)
    latch = Latch(JOB_ID, 1, release=hashlib.sha256(UPDATE).hexdigest(), stage="masked")
    latch = replace(
        latch, setup=tuple(digest_of(MESSAGES[t]) for t in (tasks.ADVERTISE, tasks.DEAL, tasks.CONFIRM, tasks.SHOW))
    )
    for message in (MESSAGES[tasks.TRAIN], MESSAGES[tasks.MASK], MESSAGES[tasks.OPEN], ABORT):
        latch = latch.saying(digest_of(message))
    write_latch(latch_path(site.settings, JOB_ID), latch)
    return site
