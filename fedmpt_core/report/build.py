"""A report from a run and its audit. Decides nothing that the audit has decided, and recomputes none of its numbers."""

from fedmpt_core.audit.auditor import Audit
from fedmpt_core.audit.run_evidence import Run
from fedmpt_core.common.release import PROGRAM
from fedmpt_core.report.checklist import checklist_of
from fedmpt_core.report.claim import claim_of
from fedmpt_core.report.content import Report
from fedmpt_core.report.model_card import model_card
from fedmpt_core.report.notes import notes_of
from fedmpt_core.report.sections import accountants_of, manifest_of, mechanism_of, sites_of, spans_of
from fedmpt_core.report.strength import accounts_of, profiles_of
from fedmpt_core.report.utility import gate_of, utility_of


def build_report(run: Run, audit: Audit, made: str) -> Report:
    """The report.

    Args:
        run: as loaded.
        audit: of this run.
        made: when, UTC, ISO 8601.
    """
    profiles, utility = profiles_of(audit.spending), utility_of(run)
    claim = claim_of(run, audit, profiles)
    return Report(
        made=made,
        release=PROGRAM,
        run_id=audit.run_id,
        job=audit.job,
        outcome=str(run.record["outcome"]),
        ended=run.manifest.ended,
        claim=claim,
        passed=audit.passed,
        findings=tuple(audit.findings),
        spending=dict(audit.spending),
        sums=audit.sums,
        releases={site: tuple(left) for site, left in audit.releases.items()},
        budgets=accounts_of(audit.spending),
        profiles=profiles,
        mechanism=mechanism_of(run, audit),
        accountants=accountants_of(audit),
        spans=spans_of(run),
        utility=utility,
        gate=gate_of(run),
        manifest=manifest_of(run),
        sites=sites_of(run),
        files=dict(run.manifest.files),
        checklist=checklist_of(run, audit, utility),
        model_card=model_card(run, claim, utility),
        notes=notes_of(run, audit, profiles, utility),
    )
