"""The table of rounds, built from the workflow's events."""

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedmpt_flare import tasks

_PHASES = {
    tasks.JOIN: "sites are starting",
    tasks.ADVERTISE: "sites exchange keys",
    tasks.DEAL: "sites check each other's keys",
    tasks.CONFIRM: "sites check each other's shares",
    tasks.SHOW: "sites settle a complaint",
    tasks.TRAIN: "training",
    tasks.MASK: "sites mask their updates",
    tasks.OPEN: "opening the sum",
    tasks.VALIDATE: "evaluating",
    tasks.LEDGER: "sites hand over their ledgers",
}
_TROUBLES = {
    "dropped": "{site} dropped out of {phase}: {reason}",
    "shortened": "round {round}: its mean was longer than honest sites can make it",
    "round_failed": "round {round} failed: {reason}",
}
_PLAIN = "{round:>5}  {sites:>5}  {mAP:>6}  {CF1:>6}  {OF1:>6}  {epsilon:>9}  {gate:>6}  {mib:>6}  {seconds:>7}"
_HEADS = ("round", "sites", "mAP", "CF1", "OF1", "epsilon")
HEADING = _PLAIN.format(**{name: name for name in (*_HEADS, "seconds")}, gate="gateH", mib="MiB")
"""Column heads of the plain lines."""


class RoundsTable:
    """Takes events, gives a table for a terminal or one line per round for a log."""

    def __init__(self, rounds: int) -> None:
        """Empty, for a job of that many rounds."""
        self._rounds, self._rows = rounds, list[dict[str, str]]()
        self._status, self._notes, self._answered, self._asked = "starting", list[str](), 0, 0
        self._where = ""

    def take(self, event: Mapping[str, Any]) -> str | None:
        """Note an event; returns a line when there is something to say in a log."""
        match event["event"]:
            case "round":
                row = _cells(event)
                self._rows.append(row)
                return _PLAIN.format(**row)
            case "joining" | "joined" as step:
                return f"{', '.join(event['sites'])}: {'starting' if step == 'joining' else 'started'}"
            case "training" | "evaluating":
                self._where = f"round {event['round']}: "
            case "phase":
                self._answered, self._asked = 0, len(event["sites"])
                self._status = f"{self._where}{_PHASES[event['phase']]}"
            case "answered":
                self._answered += 1
            case "left_out":
                return self._note(f"left out: {', '.join(event['sites'])}: {event['reason']}")
            case trouble if trouble in _TROUBLES:
                return self._note(_TROUBLES[trouble].format(**event))
            case "completed" | "failed" as outcome:
                self._status = outcome
        return None

    def draw(self) -> RenderableType:
        """The table and a line on what goes on."""
        table = Table(*_HEADS, "gate entropy", "MiB sent", "seconds")
        for row in self._rows:
            table.add_row(*row.values())
        ended = self._status in ("completed", "failed")
        waiting = "" if ended else f" ({self._answered} of {self._asked} sites answered)"
        return Group(
            table,
            *[Text(n, style="yellow") for n in self._notes[-4:]],
            Text(self._status + waiting, style="dim"),
        )

    def _note(self, text: str) -> str:
        self._notes.append(text)
        return text


def _cells(event: Mapping[str, Any]) -> dict[str, str]:
    def number(key: str, form: str) -> str:
        return format(event[key], form) if key in event else "–"

    spent = sorted({f"{budget['epsilon']:.2f}" for budget in event.get("privacy", {}).values()}, key=float)
    sent = sum(event["bytes_sent"].values()) / 2**20
    cohort = event.get("secagg", {}).get("cohort", [])
    return {
        "round": str(event["round"]),
        "sites": f"{len(event['sites'])}/{len(cohort)}" if cohort else str(len(event["sites"]) or "–"),
        "mAP": number("mAP", ".2f"),
        "CF1": number("CF1", ".2f"),
        "OF1": number("OF1", ".2f"),
        "epsilon": "–".join(dict.fromkeys((spent[0], spent[-1]))) if spent else "–",
        "gate": number("gate_entropy", ".3f"),
        "mib": f"{sent:.2f}",
        "seconds": f"{event['seconds']:.1f}",
    }
