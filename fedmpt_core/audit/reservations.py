"""Every field of a reservation, worked out anew from the job; what cannot be is held against the site's other entries.

A site signs what it charged, how, and with which noise. The job says the same: a difference means that one of the two
was changed, or that the site ran something else.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import isclose, prod, sqrt
from typing import Any

from fedmpt_core.audit.run_evidence import Run
from fedmpt_core.federation.site.policy_card import PolicyCard
from fedmpt_core.model.vector import ParameterLayout
from fedmpt_core.privacy.ledger.chain import Entry, plain_details
from fedmpt_core.privacy.mechanism.keystream import Keystream
from fedmpt_core.privacy.mechanism.mechanism import Mechanism

DERIVED = ("noise_std", "released", "trained", "expected_batch_size")
"""Details that follow from the job together with the trained tensors and the site's declared number of units."""

WITNESSED = ("code", "records", "rng_key_id")
"""Details that nothing else follows from: held against the run's release and the site's other entries."""

SAME = 1e-9  # of a number that was worked out by another formula
_HEX = re.compile(r"[0-9a-f]{64}")


def check_reservations(
    run: Run, site: str, entries: Sequence[Entry], layout: ParameterLayout | None, card: PolicyCard | None
) -> None:
    """Adds a finding to the run for every detail that differs, once, with the first round that has it.

    Args:
        run: as loaded.
        site: whose ledger it is.
        entries: of that ledger.
        layout: of what was trained; None where there is no model.
        card: the site's policy for this data set, where the auditor has it.
    """
    own = [e for e in entries if e.kind == "reserve" and e.job in run.jobs]
    mechanism = Mechanism.of(run.job)
    agreed = {**mechanism.describe(), "rng": Keystream.name, "grid_bits": mechanism.grid_bits}
    here = {"aggregation": run.manifest.aggregation, "identities": run.manifest.identities}
    here |= {"config": run.manifest.config_digest}
    differs: dict[str, str] = {}
    for entry in own:
        expected = {**agreed, **(here if entry.job == run.manifest.run_id else {})}
        for name, value in expected.items():
            if entry.details.get(name) != plain_details(value, name):
                differs.setdefault(name, _charged(entry, name, f", the job says {str(value)[:80]}"))
        for name, text in _derived(run, mechanism, entry.details, layout, card):
            differs.setdefault(name, _charged(entry, name, f": {text}"))
        if more := sorted({*entry.details} - {*expected, *here, *DERIVED, *WITNESSED}):
            text = f"its reservations say {', '.join(more)[:80]} too, which this release does not know"
            run.say("reservation-says-more", site, text, "audit with the release that the site runs", "warning")
    for name, text in differs.items():
        code = "config-changed" if name == "config" else "mechanism-differs"
        run.say(code, site, text, "the job or the entry was changed, or the site ran something else")
    if entries[0].unit != mechanism.unit:
        text = f"its ledger protects each {entries[0].unit}, the job each {mechanism.unit}"
        run.say("mechanism-differs", site, text, "the two numbers cannot be compared: the claim does not hold")
    _check_witnessed(run, site, own)


def _charged(entry: Entry, name: str, text: str) -> str:
    return f"round {entry.round} was charged with {name}={str(entry.details.get(name))[:80]}{text}"


def declared_units(details: Mapping[str, Any]) -> int | None:
    """The number of units that a site declared when it charged a round; None where the entry makes no sense."""
    try:
        expected, rate = float(details["expected_batch_size"]), float(details["sample_rate"])
        units = round(expected / rate)
    except (KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError):
        return None
    return units if units >= 1 and isclose(expected, rate * units, rel_tol=SAME) else None


def check_alike(run: Run, sites: Sequence[str]) -> None:
    """All sites release the same numbers of the same tensors."""
    for name in ("trained", "released", "noise_std"):
        values = {
            str(entry.details.get(name))
            for site in sites
            for entry in run.ledgers[site]
            if entry.kind == "reserve" and entry.job == run.manifest.run_id
        }
        if len(values) > 1:
            text = f"its sites were charged with {len(values)} different values of {name}"
            run.say("mechanism-differs", "run", text, "a site trained something else: ask which")


def check_weights(run: Run, sites: Sequence[str]) -> None:
    """A site weighs 1, or as many units as it declares in its own reservations."""
    by_units = run.job.federation.weighting == "records"
    for site in sites:
        own = [e for e in run.ledgers[site] if e.kind == "reserve" and e.job == run.manifest.run_id]
        weight = run.sites.get(site, {}).get("weight")
        if {declared_units(e.details) for e in own} - {weight} if by_units else weight != 1:
            text = f"it weighs {weight} in the record, which is not {'what it declares' if by_units else '1'}"
            run.say("weight-differs", site, text, "the record was edited, or the server divides by a false number")


def _derived(
    run: Run, mechanism: Mechanism, details: Mapping[str, Any], layout: ParameterLayout | None, card: PolicyCard | None
) -> Iterator[tuple[str, str]]:
    """(name, what is wrong)."""
    trained, released = details.get("trained"), details.get("released")
    if not (isinstance(trained, list) and trained and all(isinstance(name, str) for name in trained)):
        yield "trained", "it is no list of tensors"
    elif layout and trained != [*layout.names]:
        yield "trained", f"the model has {', '.join(layout.names)[:80]}"
    if type(released) is not int or released < 1:
        yield "released", "it is no number of numbers"
    else:
        if layout and not _released(run, mechanism, layout)(released):
            yield "released", f"the model has {layout.size} trained numbers"
        if not _stds_fit(mechanism, details.get("noise_std"), released):
            yield "noise_std", f"the job's noise on {released} numbers is another"
    units = declared_units(details)
    if units is None:
        yield "expected_batch_size", "it is no sample rate times a number of units"
    elif card and units != card.privacy.units:
        yield "expected_batch_size", f"the site's policy card declares {card.privacy.units} units"


def _released(run: Run, mechanism: Mechanism, layout: ParameterLayout) -> Callable[[int], bool]:
    """Whether so many numbers get noise: those trained, or with `feature_space` text features in place of contexts."""
    sizes = {name: prod(shape) for name, shape in zip(layout.names, layout.shapes, strict=True)}
    head = sum(size for name, size in sizes.items() if not name.startswith("contexts."))
    if mechanism.engine != "feature_space" or head == layout.size:
        return lambda released: released == layout.size
    return lambda released: released > head and (released - head) % len(run.job.classes) == 0


def _stds_fit(mechanism: Mechanism, stds: Any, released: int) -> bool:
    """Each clip group's noise is that of the bound and a number of released numbers, which add up.

    sigma_g = share_multiplier sqrt(m) G_g (1 + 2^-grid_bits sqrt(d_g)) for m groups with bounds G_g, in order of their
    names, and sum_g d_g = released. Solved for d_g, which must be whole.
    """
    bounds = mechanism.bounds
    norms = [bound for _, bound in sorted(bounds.items())] if isinstance(bounds, Mapping) else [bounds]
    if not isinstance(stds, list) or len(stds) != len(norms):
        return False
    total = 0
    for text, bound in zip(stds, norms, strict=True):
        base = mechanism.share_multiplier * sqrt(len(norms)) * bound
        try:
            size = (max(0.0, float(text) / base - 1) * 2.0**mechanism.grid_bits) ** 2
            whole = round(size)
        except (TypeError, ValueError, OverflowError):
            return False
        expected = base * (1 + 2.0**-mechanism.grid_bits * sqrt(whole))
        if abs(size - whole) > 0.1 or not isclose(float(text), expected, rel_tol=SAME):
            return False
        total += whole
    return total == released


def _check_witnessed(run: Run, site: str, own: Sequence[Entry]) -> None:
    """Release, records and noise key: what else is known of them."""
    release = f"fedmpt {run.manifest.server['versions'].get('fedmpt')}"
    joined = f"fedmpt {run.sites.get(site, {}).get('versions', {}).get('fedmpt')}"
    here = [e for e in own if e.job == run.manifest.run_id]
    for code in sorted({str(e.details.get("code")) for e in here} | {joined}):
        if code != release:
            text = f"it ran {code[:40]}, the run's release is {release[:40]}"
            run.say("release-differs", site, text, "the record was edited, or the site was upgraded: ask it")
    before: Entry | None = None
    keys: list[str] = []
    for entry in own:
        key, records = entry.details.get("rng_key_id"), entry.details.get("records")
        if not (isinstance(key, str) and _HEX.fullmatch(key) and isinstance(records, str)):
            text = f"round {entry.round} was charged without a noise key, or without records"
            run.say("mechanism-differs", site, text, "nothing says that its noise was fresh: ask the site")
            return
        if key in keys and key != keys[-1]:
            text = f"round {entry.round} was charged with a noise key that another one had replaced"
            run.say("noise-key-reused", site, text, "no key comes back: treat its updates as unprotected")
            return
        if before and before.job == entry.job and records != before.details["records"]:
            restarted = key != keys[-1]
            text = f"its records changed between rounds {before.round} and {entry.round}" + (
                ", when its trainer was restarted" if restarted else " in one process, where they cannot"
            )
            run.say("records-changed", site, text, "ask the site", "warning" if restarted else "fail")
        keys.append(key) if key not in keys else None
        before = entry
