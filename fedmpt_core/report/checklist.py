"""Where the questions of NIST SP 800-226 (March 2025) are answered: its pyramid, from the claim down to the machines.

The wording is ours, in the order of that publication: epsilon and the unit on top, then the algorithm, its correctness,
utility and bias, then what it all rests on. It must say plainly what no program can answer.
"""

from fedmpt_core.audit.auditor import Audit
from fedmpt_core.audit.run_evidence import Run
from fedmpt_core.report.content import Answered, CheckItem, Utility
from fedmpt_core.report.words import WORDS


def checklist_of(run: Run, audit: Audit, utility: Utility) -> tuple[CheckItem, ...]:
    """Every item, answered as far as this run's files allow; nothing in full where the audit fails."""
    private = run.job.privacy.private
    tested = any(f.code.startswith("self-test-passed") for f in audit.findings)
    far: dict[str, Answered] = {
        "answered": "answered",
        "partly": "partly",
        "outside": "outside",
        "spent": "answered" if private and audit.spending else "outside",
        "capped": "answered" if any(s.cap is not None for s in audit.spending.values()) else "partly",
        "tested": "answered" if tested else "partly",
        "useful": "answered" if utility.figures else "outside",
        "labelled": "partly" if any(label.gain is not None for label in utility.labels) else "outside",
    }
    server = "masks hide updates from the server" if run.job.secagg.masked else "the server saw single updates"
    trusted = "The site and this program" if private else "Everybody who sees updates or the model"
    of_this_run = {
        "repeated": "repeated" if tested else "not repeated",
        "trust": f"{trusted}; {server}.",
        "together": "The claimed epsilon is against all of them together."
        if private
        else "Yes: no noise protects a record.",
    }
    items = []
    for row in WORDS["checklist"]:
        how = far[row["how"]]
        if not audit.passed and how == "answered":  # what contradicts itself answers nothing in full
            how = "partly"
        items.append(CheckItem(row["layer"], row["question"], how, row["where"].format_map(of_this_run), row["anchor"]))
    return tuple(items)
