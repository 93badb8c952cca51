"""What a site promised to spend at most, whether that was changed, and whether every charge kept to it."""

from pathlib import Path

import pytest

from fedmpt_core.audit.caps import cap_of, check_caps
from fedmpt_core.privacy.ledger.chain import Entry
from fedmpt_core.privacy.ledger.ledger import Ledger

STEPS = {"sample_rate": 0.5, "noise_multiplier": 1.5, "steps": 2}  # epsilon 2.73, then 3.74, then 4.53


def ledger(folder: Path, *events: float | str, cap: float | None) -> tuple[Entry, ...]:
    """Caps that are stated, and rounds that are charged."""
    made = Ledger.create(folder / "x.ledger.jsonl", site="a", dataset="x", delta=1e-5, signer=None, caps={"cap": cap})
    for number, event in enumerate(events):
        if isinstance(event, float):
            made.state_caps({"cap": event})
        else:
            made.reserve(job="j", round=number, attempt=0, details=STEPS, admit=lambda entries: None)
    return tuple(made.entries())


RAISED, ABOVE, OTHER = ("cap-changed", "warning"), ("epsilon-above-the-cap", "fail"), ("cap-differs", "warning")
LOWERED = ("cap-changed", "note")


@pytest.mark.parametrize(
    ("cap", "events", "card", "expected"),
    [
        (3.0, ["round"], None, []),
        (3.0, ["round"], 3.0, []),
        (3.0, ["round", "round"], None, [ABOVE]),
        (3.0, ["round", 4.0, "round"], None, [RAISED]),
        (3.0, ["round", 4.0, "round"], 4.0, [RAISED]),
        (3.0, ["round", 4.0, "round"], 3.0, [RAISED, OTHER, ABOVE]),  # not what the card promised
        (3.0, ["round", 4.0], 3.0, [RAISED, OTHER]),
        (3.0, ["round", "round", 4.0, "round"], 4.0, [ABOVE, ABOVE, RAISED]),  # raised after it was passed
        (3.0, ["round", "round", 4.0], 4.0, [ABOVE, RAISED]),
        (4.0, ["round", "round", 3.0], 3.0, [LOWERED]),  # nothing was charged since
        (4.0, ["round", "round", 3.0, "round"], 3.0, [ABOVE, LOWERED]),
        (4.0, ["round", 3.0, 5.0, "round"], 5.0, [RAISED]),
        (4.0, ["round"], 9.0, [OTHER]),
        (None, ["round", "round"], None, []),  # begun by a release that stated none
        (None, ["round", "round"], 3.0, [ABOVE]),
        (None, ["round", 4.0, "round"], 4.0, []),
    ],
)
def test_a_charge_is_held_to_the_cap_of_its_time_and_the_card_to_what_is_stated(
    tmp_path: Path, cap: float | None, events: list[float | str], card: float | None, expected: list[tuple[str, str]]
) -> None:
    assert [(f.code, f.severity) for f in check_caps(ledger(tmp_path, *events, cap=cap), card)] == expected


def test_old_new_and_when_are_said(tmp_path: Path) -> None:
    entries = ledger(tmp_path, "round", 4.0, "round", cap=3.0)
    changed, differs, above = check_caps(entries, 3.0)
    day = entries[2].time[:10]
    assert changed.text == f"its cap on 'x' was changed from 3 to 4 on {day}"
    assert differs.text == f"its policy card or export caps 'x' at 3, its ledger states 4 since {day}"
    assert above.text == "all jobs on 'x' spent epsilon 3.738, its cap is 3"
    assert (cap_of(entries, None), cap_of(entries, 3.0)) == (4.0, 3.0)
