"""Where the questions of NIST SP 800-226 (March 2025) are answered: its pyramid, from the claim down to the machines.

The wording is ours, in the order of that publication: epsilon and the unit on top, then the algorithm, its correctness,
utility and bias, then what it all rests on. It must say plainly what no program can answer.
"""

from collections.abc import Mapping

from fedmpt_core.audit.auditor import Audit
from fedmpt_core.audit.run_evidence import Run
from fedmpt_core.report.content import Answered, CheckItem, Utility

TOP, MIDDLE, BASE = "On top: the claim", "In the middle: the algorithm", "Below: what it rests on"
_Row = tuple[str, str, Answered, str, str]


def checklist_of(run: Run, audit: Audit, utility: Utility) -> tuple[CheckItem, ...]:
    """Every item, answered as far as this run's files allow; nothing in full where the audit fails."""
    private = run.job.privacy.private
    spent: Answered = "answered" if private and audit.spending else "outside"
    tested = any(f.code.startswith("self-test-passed") for f in audit.findings)
    capped = any(s.cap is not None for s in audit.spending.values())
    labels = any(label.gain is not None for label in utility.labels)
    rows: list[_Row] = [
        (TOP, "What epsilon is claimed, and over which releases?", spent, "Over all jobs on each data set.", "budgets"),
        (TOP, "Is epsilon small enough to mean something?", spent, "As odds, and by customary tiers.", "claim"),
        (TOP, "Is delta below one over the number of units?", "partly",
         "Each site's program refuses a larger one when its policy is read; the number is the site's declaration.",
         "claim"),
        (TOP, "What is the unit of privacy, and how much can one person contribute?", spent,
         "A record, or all records of a group. Who is in a group is the site's to say.", "mechanism"),
        (TOP, "Which neighbours: added or removed, or replaced?", spent, "Both numbers are given.", "adjacency"),
        (TOP, "Who keeps the budget, and what happens when it is used up?", "answered" if capped else "partly",
         "Signed ledgers; caps are here where a policy card was given.", "budgets"),
        (MIDDLE, "Which mechanism, with which parameters?", spent, "DP-SGD, every parameter listed.", "mechanism"),
        (MIDDLE, "Is the sampling that is charged the one that happens?", spent,
         "Poisson sampling, tested by every site before it trains.", "sampling"),
        (MIDDLE, "Was the accounting checked by somebody else's code?", spent, "Side by side.", "accountants"),
        (MIDDLE, "Was the implementation tested?", "answered" if tested else "partly",
         "Every site runs a self-test before it trains and stops if it fails; "
         + ("it was repeated for this audit." if tested else "it was not repeated for this audit."), "findings"),
        (MIDDLE, "Were settings chosen by looking at private data?", "partly", "Not known to any program.", "tuning"),
        (MIDDLE, "Is the result useful?", "answered" if utility.figures else "outside", "Overall and over the rounds.",
         "utility"),
        (MIDDLE, "Does the noise treat some groups worse?", "partly" if labels else "outside",
         "Per label; groups of people are not known to this program.", "labels"),
        (BASE, "Whom must one trust?", "answered", _trusted(run), "aggregation"),
        (BASE, "Can several parties together learn more?", "answered",
         "The claimed epsilon is against all of them together." if private else "Yes: no noise protects a record.",
         "aggregation"),
        (BASE, "Where does the randomness come from?", spent, "The operating system's, per process.", "limits"),
        (BASE, "Are floating-point attacks closed?", spent, "Integer grid; what remains is stated.", "limits"),
        (BASE, "Are side channels closed, such as timing?", "partly", "No: step times are not hidden.", "limits"),
        (BASE, "What else left the sites?", "answered", "Listed, with what protects it.", "releases"),
        (BASE, "Who could reach data, keys and machines?", "outside", "Access control is each site's.", "limits"),
        (BASE, "Was the data collected lawfully, and held securely before?", "outside", "The sites' duty.", "claim"),
        (BASE, "May people be in the data of two sites?", "outside", "Not known to any single site.", "claim"),
    ]  # fmt: skip
    if not audit.passed:  # what contradicts itself answers nothing in full
        rows = [
            (layer, text, "partly" if far == "answered" else far, where, at) for layer, text, far, where, at in rows
        ]
    return tuple(CheckItem(*row) for row in rows)


def _trusted(run: Run) -> str:
    server = "masks hide updates from the server" if run.job.secagg.masked else "the server saw single updates"
    if not run.job.privacy.private:
        return f"Everybody who sees updates or the model; {server}."
    return f"The site and this program; {server}."


ANSWERS: Mapping[Answered, str] = {
    "answered": "answered here",
    "partly": "partly",
    "outside": "outside this software",
}
