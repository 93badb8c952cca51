"""C: the mechanism's self-test, run by the auditor with the job's own settings. Needs torch and the job's weights."""

from fedmpt_core.audit.finding import Finding
from fedmpt_core.audit.run_evidence import Run
from fedmpt_core.common.release import PROGRAM


def check_mechanism(run: Run) -> list[Finding]:
    """Test this installation's mechanism as the run's sites did before they trained.

    Returns:
        A note when it passes, a failure for each check that does not; a warning when the weights cannot be had here,
        or when the sites ran another release than the one that was tested.
    """
    if not run.job.privacy.private:
        return []
    try:
        from fedmpt_core.model.backbone.load import load_backbone
        from fedmpt_core.model.registry import build_model
        from fedmpt_core.privacy.mechanism.mechanism import Mechanism
        from fedmpt_core.privacy.mechanism.self_test import self_test

        job = run.job
        model = build_model(load_backbone(job.backbone), job.classes, job.model, job.seed)
        checks = self_test(model, job, Mechanism.of(job))
    except (ImportError, ValueError, OSError) as error:
        text = f"the mechanism was not tested here: {error}"
        return [Finding("self-test-not-run", "warning", "mechanism", text, "run the audit where the job's weights are")]
    others = sorted(
        {
            str(entry.details.get("code"))
            for entries in run.ledgers.values()
            for entry in entries
            if entry.kind == "reserve" and entry.job == run.manifest.run_id and entry.details.get("code") != PROGRAM
        }
    )
    findings = [
        Finding("self-test-failed", "fail", "mechanism", f"{c.name}: {c.detail}", "do not rely on this release's noise")
        for c in checks
        if not c.passed
    ]
    if others:
        text = f"tested was {PROGRAM}, the sites ran {', '.join(others)}"
        findings.append(
            Finding("self-test-of-another-release", "warning", "mechanism", text, "audit with that release")
        )
    if not any(f.severity == "fail" for f in findings):
        text = f"the self-test passes: {len(checks)} checks of noise, clipping, sampling and gradients"
        findings.append(Finding("self-test-passed", "note", "mechanism", text))
    return findings
