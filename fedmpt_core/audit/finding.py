"""What an audit says: one sentence per problem, with where it is, how bad it is, and what to do."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

Severity = Literal["fail", "unshown", "warning", "note"]
ORDER: tuple[Severity, ...] = ("fail", "unshown", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """One thing that an auditor should know.

    Attributes:
        code: what kind of thing, stable for scripts, for example `ledger-cut`.
        severity: `fail`: something contradicts the claim; `unshown`: nothing contradicts it here, and what it rests on
            is missing; `warning`: it holds, and something beside it needs a person's judgement; `note`: worth knowing.
        where: the site or file.
        text: the sentence.
        remedy: what to do; empty for notes.
    """

    code: str
    severity: Severity
    where: str
    text: str
    remedy: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def worst(findings: Iterable[Finding]) -> Severity:
    """The worst severity; `note` when there is none."""
    first: Severity = "note"
    for finding in findings:
        if ORDER.index(finding.severity) < ORDER.index(first):
            first = finding.severity
    return first


def in_order(findings: Iterable[Finding]) -> list[Finding]:
    """The worst first, each once."""
    return sorted(dict.fromkeys(findings), key=lambda f: (ORDER.index(f.severity), f.where, f.code))
