"""Real processes with real keys: what each site's policy allows is what its ledger shows, whatever the server asks.

One federation for all tests of this file; they run in order, and budgets that one has spent are spent for the next.
"""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from fedmpt_core.config import BackboneConfig, FederationConfig, JobConfig, ModelConfig, PrivacyConfig, TrainingConfig
from fedmpt_core.privacy.accounting import Steps, epsilon
from fedmpt_core.privacy.budget import history
from fedmpt_core.privacy.ledger import Entries, Head
from fedmpt_core.privacy.site_ledger import read_site_ledger
from tests.federation import Federation, Outcome
from tests.pictures import CLASSES, small_sites
from tests.settings import UNPROTECTED

pytestmark = [pytest.mark.flare, pytest.mark.slow, pytest.mark.xdist_group("flare")]
SITES = ("site-1", "site-2", "site-3")
DELTA, STEPS = 1e-5, 2
PRIVACY = PrivacyConfig(epsilon=8.0, delta=DELTA, sample_rate=0.5, noise_multiplier=1.5)

# A server that shows the sites the job that they agreed to, and then asks for the rounds of another.
GREEDY = """
from fedmpt_core.config_file import job_from_dict
from fedmpt_flare.workflow import FedMPTWorkflow


class Greedy(FedMPTWorkflow):
    def __init__(self, job, shown):
        super().__init__(job)
        self.shown = shown

    def start_controller(self, fl_ctx):
        super().start_controller(fl_ctx)
        shown = job_from_dict({k: v for k, v in self.shown.items() if k != "config_type"}).digest()
        object.__setattr__(self._config, "digest", lambda: shown)
"""

# A filter that lets the figures of single pictures slip into an answer.
LEAKY = """
from nvflare.apis.filter import Filter


class Leaky(Filter):
    def process(self, shareable, fl_ctx):
        if "figures" in shareable.get("fields", {}):
            shareable["fields"]["figures"]["scores"] = [0.25]
        return shareable
"""


def job(name: str, rounds: int, privacy: PrivacyConfig = PRIVACY) -> JobConfig:
    return JobConfig(
        name,
        CLASSES,
        seed=4,
        backbone=BackboneConfig(image_size=96),
        model=ModelConfig(conditions=("color", "pose"), trained="contexts"),
        training=TrainingConfig(rounds=rounds, local_steps=STEPS, optimizer="adam", learning_rate=0.01),
        privacy=privacy,
        federation=FederationConfig(join_timeout=300, round_timeout=120, max_failed_rounds=0),
    )


def spends(rounds: int) -> float:
    """Epsilon of so many rounds."""
    return epsilon([Steps(PRIVACY.sample_rate, 1.5, STEPS * rounds)], DELTA)


def cap_for(rounds: int) -> float:
    """A cap that so many rounds stay below, and one more does not."""
    return (spends(rounds) + spends(rounds + 1)) / 2


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    root = tmp_path_factory.mktemp("federation")
    (root / "pictures").mkdir()
    sites = {
        name: dataclasses.replace(
            site, privacy=dataclasses.replace(site.privacy, allow_unprotected=False, epsilon=cap_for(2))
        )
        for name, site in small_sites(root / "pictures").items()
        if site.privacy
    }
    found = Federation(root / "all", sites)
    found.allow_at_server("greedy.Greedy", GREEDY)
    with found:
        yield found
    assert found.processes() == []


def ledger(federation: Federation, site: str) -> Entries:
    """A site's ledger, every line checked with the certificate of its kit."""
    policy = federation.policies[site].privacy
    assert policy is not None
    return read_site_ledger(policy, federation.kit(site))


def rounds_of(entries: Entries, outcome: Outcome, kind: str) -> list[int]:
    return [e.round for e in entries if e.kind == kind and e.job == outcome.job_id]


def trained(outcome: Outcome) -> list[list[str]]:
    """Who took part in each round."""
    return [r["sites"] for r in outcome.record["rounds"][1:]]


def first_refusal(outcome: Outcome, site: str, phase: str) -> str:
    dropped = [e for e in outcome.events if e["event"] == "dropped"]
    return next(e["reason"] for e in dropped if (e["site"], e["phase"]) == (site, phase))


def check_heads(federation: Federation, outcome: Outcome) -> None:
    """Every head that a site has shown the server is an entry of its ledger still."""
    seen = 0
    for done in outcome.record["rounds"]:
        for site, said in done["privacy"].items():
            head = Head.from_dict(said["head"])
            entry = ledger(federation, site)[head.seq]
            assert (entry.hash, entry.sig, entry.kind, entry.job) == (head.hash, head.sig, "commit", outcome.job_id)
            assert head.sig
            seen += 1
    assert seen == sum(len(sites) for sites in trained(outcome))


def test_a_site_whose_budget_is_too_small_is_left_out_with_its_numbers(federation: Federation) -> None:
    federation.set_policy("site-3", epsilon=cap_for(1))
    outcome = federation.run_job(federation.export(job("two-rounds", 2)))

    assert outcome.meta["status"] == "FINISHED:COMPLETED"
    sentence = outcome.sentence_of("site-3")
    assert f"would reach epsilon {spends(2):.3f} (delta 1e-05); 0.000 is spent" in sentence
    assert f"the cap is {cap_for(1):g}" in sentence
    assert outcome.sentence_of("site-1").endswith("OK")
    assert trained(outcome) == [["site-1", "site-2"]] * 2
    assert outcome.record["outcome"] == "completed"
    assert "mAP" in outcome.record["rounds"][2]
    for site in ("site-1", "site-2"):
        entries = ledger(federation, site)
        assert rounds_of(entries, outcome, "reserve") == rounds_of(entries, outcome, "commit") == [1, 2]
        said = outcome.record["rounds"][2]["privacy"][site]
        assert said["epsilon"] == pytest.approx(spends(2))
    assert [e.kind for e in ledger(federation, "site-3")] == ["genesis"]
    check_heads(federation, outcome)


def test_a_server_that_asks_for_more_than_the_job_said_gets_what_each_cap_allows(federation: Federation) -> None:
    """And one site's own software slips: what it adds to the figures stays at the site, which trains all the same."""
    left = {"site-1": 3, "site-2": 3, "site-3": 2}
    before = {s: len(ledger(federation, s)) for s in SITES}
    caps = {"site-1": cap_for(2 + 3), "site-2": cap_for(2 + 3), "site-3": cap_for(2)}
    for site, cap in caps.items():
        federation.set_policy(site, epsilon=cap)
    federation.filter_before_guard("site-1", "leaky.Leaky", LEAKY)
    folder = federation.export(job("greedy", 1))
    path = folder / "app" / "config" / "config_fed_server.json"
    config = json.loads(path.read_text())
    asked: dict[str, Any] = {"config_type": "dict", **job("greedy", 6).to_dict()}
    shown = config["workflows"][0]["args"]["job"]
    config["workflows"][0] |= {"path": "greedy.Greedy", "args": {"job": asked, "shown": shown}}
    path.write_text(json.dumps(config))

    outcome = federation.run_job(folder)

    assert [outcome.sentence_of(s).endswith("OK") for s in SITES] == [True] * 3
    assert outcome.meta["status"] != "FINISHED:COMPLETED"
    assert outcome.record["outcome"].startswith("failed: round 4 failed: train: 0 sites answered")
    assert trained(outcome) == [list(SITES), list(SITES), ["site-1", "site-2"]]
    for site, cap in caps.items():
        entries = ledger(federation, site)
        rounds = list(range(1, left[site] + 1))
        assert rounds_of(entries, outcome, "reserve") == rounds_of(entries, outcome, "commit") == rounds
        assert len(entries) == before[site] + 2 * left[site]
        assert epsilon(history(entries), DELTA) <= cap
        said = first_refusal(outcome, site, "train")
        assert f"round {left[site] + 1} would raise epsilon" in said
        assert f"this site's cap is {cap:g}" in said
    check_heads(federation, outcome)
    assert "held back its answer to validate" in first_refusal(outcome, "site-1", "validate")
    assert '"scores"' not in json.dumps([outcome.events, outcome.record])
    assert not any("mAP" in done for done in outcome.record["rounds"])


def test_an_unprotected_job_is_deployed_nowhere(federation: Federation) -> None:
    before = {site: len(ledger(federation, site)) for site in SITES}
    outcome = federation.run_job(federation.export(job("open", 1, UNPROTECTED)))
    assert outcome.meta["status"] == "FINISHED:FAILED_TO_RUN"
    for site in SITES:
        assert outcome.sentence_of(site).endswith(
            "the job trains without differential privacy, which this site does not allow"
        )
        assert len(ledger(federation, site)) == before[site]


def test_no_process_of_a_job_runs_on(federation: Federation) -> None:
    lines = {p.pid: " ".join(_command(p)) for p in federation.processes()}
    assert not [line for line in lines.values() if "trainer_main" in line or ".runner_process" in line]
    assert len(lines) == 1 + len(SITES)


def test_the_guards_held_back_nothing_else(federation: Federation) -> None:
    for site in SITES:
        lines = (federation.local(site).parent / "console.log").read_text().splitlines()
        odd = [line for line in lines if "cannot be checked" in line or "was held back" in line]
        assert not [line for line in odd if "EgressGuard" not in line or "to validate was held back" not in line]
        assert bool(odd) == (site == "site-1")


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
