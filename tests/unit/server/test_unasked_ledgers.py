"""Ledgers of an aborted job: they come unasked, each from its own site, and what is none is dropped."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.shareable import Shareable

from fedmpt_core.config.site import SitePrivacyConfig
from fedmpt_core.privacy.ledger.site_ledger import create_ledger, ledger_copy
from fedmpt_flare import tasks
from fedmpt_flare.server.unasked_ledgers import UnaskedLedgers
from tests.audited import SITES, Federation
from tests.unit.server.test_workflow import ScriptedSite, ScriptedWorkflow, private_job

TOPIC = tasks.LEDGER_TOPIC


def from_site(name: str) -> Any:
    return SimpleNamespace(get_peer_context=lambda: SimpleNamespace(get_identity_name=lambda: name))


def of(federation: Federation, site: str) -> Shareable:
    return tasks.ledger_message(*ledger_copy(federation.policy(site), federation.kit(site)))


def test_each_site_s_own_ledger_is_taken(audited: Federation) -> None:
    ledgers = UnaskedLedgers(audited.kit(SITES[0]))
    for site in SITES[:2]:
        assert ledgers.take(TOPIC, of(audited, site), from_site(site)).get_return_code() == ReturnCode.OK
    taken = ledgers.wait_for(set(SITES), seconds=0.0)
    assert taken == {site: ledger_copy(audited.policy(site), audited.kit(site)) for site in SITES[:2]}
    assert ledgers.wait_for({SITES[0]}, seconds=1e6) == {
        SITES[0]: taken[SITES[0]]
    }  # it does not wait for what is there


@pytest.mark.parametrize("wrong", ["another site's name", "another's ledger", "cut in a line", "no bytes", "nothing"])
def test_what_is_not_the_sender_s_own_is_dropped(audited: Federation, wrong: str) -> None:
    mine, theirs = of(audited, SITES[0]), of(audited, SITES[1])
    name = SITES[1] if wrong == "another site's name" else SITES[0]
    match wrong:
        case "another's ledger":
            mine[tasks.LEDGER_COPY] = theirs[tasks.LEDGER_COPY]
        case "cut in a line":
            mine[tasks.LEDGER_COPY] = mine[tasks.LEDGER_COPY][:-1]
        case "no bytes":
            mine[tasks.LEDGER_COPY] = "text"
        case "nothing":
            mine = Shareable()
    ledgers = UnaskedLedgers(audited.kit(SITES[0]))
    assert ledgers.take(TOPIC, mine, from_site(name)).get_return_code() != ReturnCode.OK
    assert ledgers.wait_for(set(SITES), seconds=0.0) == {}


def test_an_aborted_run_has_the_ledgers_that_came(tmp_path: Path) -> None:
    """The first round is broken off; one site's ledger is there by then, the other's never comes."""

    def abort() -> Any:
        handler = workflow.handlers[TOPIC]
        assert handler(TOPIC, unsigned, from_site("a")).get_return_code() == ReturnCode.OK
        workflow.abort.trigger(True)

    policy = SitePrivacyConfig("images", 10, 5.0, 1e-5, ledger=str(tmp_path / "ledgers"))
    line = create_ledger(policy, "a", None).path.read_bytes()
    unsigned = tasks.ledger_message(line, b"")
    sites = [ScriptedSite("a", 1.0, train_1=abort), ScriptedSite("b", 1.0)]
    workflow = ScriptedWorkflow(private_job(), sites, tmp_path)
    workflow.grace = 0.0
    with pytest.raises(RuntimeError, match="aborted"):
        workflow.run()
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    kept = {name: site["ledger"] for name, site in manifest["sites"].items()}
    assert (tmp_path / kept["a"]["file"]).read_bytes() == line
    assert kept["b"] == {"kept": "the job was aborted, and the site handed over none"}
