"""The privacy report: its numbers are the audit's, its words never say more, and no name can do harm."""

import json
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from math import inf, sqrt
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import norm
from typer.testing import CliRunner

from fedmpt_core.audit.auditor import Audit, audit_run
from fedmpt_core.audit.finding import Finding
from fedmpt_core.audit.known_keys import KnownKeys
from fedmpt_core.audit.run_evidence import NoRun, Run, load_run
from fedmpt_core.audit.spending import Spending
from fedmpt_core.common.files import WriteError
from fedmpt_core.config.job import PrivacyConfig
from fedmpt_core.privacy.accounting.epsilon import Steps, epsilon
from fedmpt_core.report import plain
from fedmpt_core.report.build import build_report
from fedmpt_core.report.charts import thinned
from fedmpt_core.report.content import Report
from fedmpt_core.report.html import render
from fedmpt_core.report.model_card import to_markdown
from fedmpt_core.report.strength import gaussian_delta, gaussian_mu, profiles_of
from fedmpt_core.secagg.start_up_kit import write_roster
from fedmpt_flare.cli.main import app
from fedmpt_flare.cli.options import WrongUse
from tests.audited import CAPS, JOB, MANIPULATIONS, SITES, Federation, edit_record

MADE = "2026-11-26T02:00:00+00:00"
HOSTILE = (
    "<script>alert(1)</script>\x1b[31m\u202egnp.exe\u200d\n</style>{{ 7 * 7 }}[x](javascript:y) `z` " + "w" * 10_000
)


@pytest.fixture(scope="module")
def run(audited: Federation, keys: KnownKeys) -> Run:
    return load_run(audited.root / "run-1", keys)


@pytest.fixture(scope="module")
def audit(run: Run, audited: Federation) -> Audit:
    return audit_run(run, policy_cards=[audited.policy_card(site, cap) for site, cap in zip(SITES, CAPS, strict=True)])


@pytest.fixture(scope="module")
def honest(run: Run, audit: Audit) -> Report:
    return build_report(run, audit, MADE)


class Page(HTMLParser):
    """Elements in order with their attributes, all text, and the cells of tables; an exact number stands in [ ]."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: dict[str, list[list[str]]] = {}
        self.text, self._inside = "", [""]
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        self._inside.append(tag) if tag in ("style", "th", "td") else None
        match tag:
            case "table":
                self._rows = self.rows.setdefault(attributes.get("id") or "", [])
            case "tr":
                self._rows.append([])
            case "th" | "td":
                self._rows[-1].append("")
            case "data":
                self.handle_data(f"[{attributes['value']}]")

    def handle_endtag(self, tag: str) -> None:
        if tag == self._inside[-1]:
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        if self._inside[-1] in ("th", "td"):
            self._rows[-1][-1] += data
        if self._inside[-1] != "style":
            self.text += data

    def tags(self, *names: str) -> list[dict[str, str | None]]:
        return [attrs for tag, attrs in self.elements if tag in names]


def exact(cell: str) -> float | None:
    """The machine's number in a cell, None where there is none."""
    return float(cell[1 : cell.index("]")]) if cell.startswith("[") else None


def test_the_json_has_the_audit_s_numbers(honest: Report, audit: Audit) -> None:
    ours, theirs = (json.loads(json.dumps(one.to_dict())) for one in (honest, audit))
    for key in ("findings", "spending", "sums", "releases", "passed", "run_id", "job"):
        assert ours[key] == theirs[key], key
    worst = max(spent["total"] for spent in theirs["spending"].values())
    assert ours["claim"]["epsilon"] == worst
    for budget in ours["budgets"]:
        spent = theirs["spending"][budget["site"]]
        assert budget["before"] + budget["added"] == pytest.approx(spent["total"], abs=1e-12)
        assert budget["left"] == pytest.approx(spent["cap"] - spent["total"], abs=1e-12)


def test_the_page_has_the_audit_s_numbers(honest: Report, audit: Audit) -> None:
    page, theirs = Page(render(honest)), json.loads(json.dumps(audit.to_dict()))["spending"]
    rows = {row[0]: row[1:] for row in page.rows["budget-table"][1:]}
    assert set(rows) == set(SITES)
    for site, row in rows.items():
        spent = theirs[site]
        dataset, unit, job, _, total, delta, cap, _, jobs, still_open = row
        assert [dataset, unit, int(jobs), int(still_open)] == [spent[k] for k in ("dataset", "unit", "jobs", "open")]
        numbers = {"job": exact(job), "total": exact(total), "delta": exact(delta), "cap": exact(cap)}
        assert numbers == {kind: spent[kind] for kind in numbers}
    heads, *by_site = page.rows["accountant-table"]
    for row in by_site:
        assert dict(zip(heads[1:], map(exact, row[1:]), strict=True)) == theirs[row[0]]["accountants"]
    by_round = {row[0]: exact(row[1]) for row in page.rows["round-table"][1:]}
    assert by_round == theirs[SITES[0]]["by_round"]


def test_another_number_in_the_audit_is_another_one_on_the_page(run: Run, audit: Audit) -> None:
    spending = {**audit.spending, SITES[1]: replace(audit.spending[SITES[1]], total=7.25, job=3.125)}
    page = Page(render(build_report(run, replace(audit, spending=spending), MADE)))
    row = next(row for row in page.rows["budget-table"] if row[0] == SITES[1])
    assert (exact(row[3]), exact(row[5])) == (3.125, 7.25)


def test_a_sound_run_s_claim_stands_in_plain_words(honest: Report) -> None:
    claim = honest.claim
    assert (claim.status, claim.reasons, claim.site in SITES) == ("stands", (), True)
    assert [fact.name for fact in claim.facts] == [
        "Who is protected", "Against whom", "How strongly", "For how long",
    ]  # fmt: skip
    strength = claim.facts[2]
    assert f"at most {plain.up(claim.epsilon or 0.0)}" in strength.value
    assert "1 in 100,000" in strength.value
    assert "2 jobs on the data set" in claim.facts[3].value
    missing = " ".join(claim.not_covered)
    for word in ("test", "how long", "labels", "two sites", "in general", "owner of the model", "lies"):
        assert word in missing, word


CONTRADICTED = ("edit a field", "cut the tail", "change sigma", "remove a site's ledger", "change the model")


@pytest.mark.parametrize("change", [MANIPULATIONS[name][0] for name in CONTRADICTED], ids=CONTRADICTED)
def test_no_manipulated_run_s_report_says_that_all_is_well(
    folder: Path, keys: KnownKeys, change: Callable[[Path], Any]
) -> None:
    change(folder)
    run = load_run(folder, keys)
    report = build_report(run, audit_run(run), MADE)
    page = Page(render(report))
    assert report.claim.status == "fails"
    assert report.claim.headline.startswith("The claim does not stand")
    assert report.claim.reasons
    assert "The claim stands" not in page.text
    assert not [attrs for attrs in page.tags("dl") if attrs.get("class") == "key"]
    assert not [attrs for attrs in page.tags("span") if attrs.get("class") == "tag answered"]
    assert "does not stand" in to_markdown(report)


def judged(run: Run, **changes: Any) -> Report:
    """The report of a run that was something else, audited anew."""
    other = replace(run, findings=[], record={**run.record, **changes.pop("record", {})}, **changes)
    return build_report(other, audit_run(other), MADE)


def test_what_kind_of_run_it_was_is_said_on_top(run: Run, audited: Federation) -> None:
    bare = replace(run.job, privacy=PrivacyConfig(mechanism="none"))
    assert judged(run, job=bare).claim.status == "none"
    open_job = replace(run.job, secagg=replace(run.job.secagg, mechanism="none"))
    assert any("saw every site's updates" in reason for reason in judged(run, job=open_job).claim.reasons)
    manifest = replace(run.manifest, identities="insecure")
    simulated = build_report(replace(run, manifest=manifest), replace(audit_run(run), findings=[]), MADE)
    assert simulated.claim.status == "rehearsal"
    failed = judged(run, record={"outcome": "failed: no site answered"})
    assert any("did not complete" in reason for reason in failed.claim.reasons)
    unknown = load_run(audited.root / "run-1", KnownKeys())
    doubtful = build_report(unknown, audit_run(unknown), MADE)
    assert doubtful.claim.status == "judge"
    assert any("roster" in reason for reason in doubtful.claim.reasons)
    nobody = build_report(replace(run, record={**run.record, "sites": None}), replace(audit_run(run), spending={},
                          releases={}, findings=[]), MADE)  # fmt: skip
    assert nobody.claim.status == "nothing"
    for report in (judged(run, job=bare), nobody):
        page = Page(render(report))
        assert "The claim stands" not in page.text
        assert not [attrs for attrs in page.tags("dl") if attrs.get("class") == "key"]


def test_what_cannot_be_accounted_for_is_no_number(run: Run, audit: Audit) -> None:
    broken = replace(audit.spending[SITES[0]], job=inf, total=inf, charged=((0.5, 1e-9, 10),))
    report = build_report(run, replace(audit, spending={**audit.spending, SITES[0]: broken}), MADE)
    assert report.claim.epsilon is None
    assert report.claim.facts[2].value.startswith("Not known")
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["spending"][SITES[0]]["total"] is None
    assert "unbounded" in render(report)


def spent(*charged: tuple[float, float, int], before: tuple[tuple[float, float, int], ...] = ()) -> Spending:
    total = epsilon([Steps(*kind) for kind in (*charged, *before)], 1e-5)
    return Spending("d", "record", total, total, 1e-5, 1e-5, 1, 0, None, charged=charged, charged_before=before)


def test_odds_and_mu_are_those_of_the_gaussian_mechanism_where_it_is_one() -> None:
    mu = sqrt(9) / 4.0
    (profile,) = profiles_of({"a": spent((1.0, 4.0, 9))})
    assert profile.mu == pytest.approx(mu, abs=2e-3)
    assert profile.guess == pytest.approx(100 * norm.cdf(mu / 2), abs=0.05)
    exact_named = 100 * norm.cdf(norm.ppf(0.01) + mu)
    assert exact_named <= profile.named <= exact_named + 0.2
    assert profile.replace_one == pytest.approx(epsilon([Steps(1.0, 2.0, 9)], 1e-5), abs=0.02)


def test_mu_is_the_least_that_covers_the_profile() -> None:
    (profile,) = profiles_of({"a": spent((0.25, 1.2, 40), before=((0.1, 1.0, 100),))})
    assert profile.mu is not None
    points = [(e, d) for e, d in zip(profile.epsilons, profile.deltas, strict=True) if d >= 1e-10]
    assert all(gaussian_delta(e, profile.mu) >= d * (1 - 1e-6) for e, d in points)
    assert any(gaussian_delta(e, 0.99 * profile.mu) < d for e, d in points)
    assert profile.deltas == tuple(sorted(profile.deltas, reverse=True))
    assert profile.at(8.0) is not None
    assert profile.guess < 100 and profile.named < 100


def test_mu_has_its_edge_cases() -> None:
    assert gaussian_mu([0.0, 1.0], [0.0, 1e-11]) == 0.0
    assert gaussian_mu([0.0], [1.0]) is None
    grid = [0.0, 0.5, 1.0, 4.0]
    assert gaussian_mu(grid, [gaussian_delta(e, 0.7) for e in grid]) == pytest.approx(0.7, abs=1e-6)


def test_sites_that_were_charged_alike_share_a_profile() -> None:
    spending = {"a": spent((0.1, 2.0, 10)), "b": spent((0.1, 1.0, 10)), "c": spent((0.1, 1.0, 4), (0.1, 1.0, 6))}
    assert [p.sites for p in profiles_of(spending)] == [("b", "c"), ("a",)]


def with_figures(row: dict[str, Any], **figures: Any) -> dict[str, Any]:
    return {**row, "mAP": 33.0, "AP": [20.0, 40.0], "gate": [0.2] * 5, "share": [0.4, 0.01], **figures}


def scored(run: Run, **last: Any) -> Report:
    first, *middle, final = run.record["rounds"]
    zero = {"mAP": 25.0, "AP": [30.0, 20.0]}
    rounds = [with_figures(first, zero_shot=zero), *middle, with_figures(final, **last)]
    return judged(run, record={"rounds": rounds})


def test_labels_stand_from_the_rarest_with_the_gap_to_zero_shot(run: Run) -> None:
    utility = scored(run).utility
    assert [(label.name, label.share, label.gain) for label in utility.labels] == [
        ("dog", 0.01, 20.0),
        ("cat", 0.4, -10.0),
    ]
    assert (utility.worse, utility.rare, utility.common, utility.round) == (1, 20.0, -10.0, 3)
    assert utility.figures[0] == ("mAP", 25.0, 33.0)
    text = Page(render(scored(run))).text
    assert "+20.0" in text and "−10.0" in text


def test_without_shares_labels_stand_from_the_least_gain(run: Run) -> None:
    report = scored(run, share=None)
    assert [label.name for label in report.utility.labels] == ["cat", "dog"]
    assert any("not in the record" in text for text in report.notes["labels"])
    assert "Share of test pictures" not in Page(render(report)).text


@pytest.mark.parametrize(
    "figures",
    [
        {"mAP": "high"}, {"mAP": float("nan")}, {"AP": "none"}, {"AP": [1.0] * 999}, {"AP": [None, {}]}, {"gate": 7},
        {"gate": [-1.0] * 5}, {"mAP": -(10**400)}, {"OF1": 10**400}, {"AP": [-1.0, 40.0]}, {"share": [2, "x"]},
        {"ece": []},
    ],
    ids=lambda figures: next(iter(figures)),
)  # fmt: skip
def test_figures_of_another_kind_are_dashes(run: Run, figures: dict[str, Any]) -> None:
    report = scored(run, **figures)
    json.dumps(report.to_dict(), allow_nan=False)
    assert "nan" not in Page(render(report)).text.lower().split()


def hostile(run: Run) -> Report:
    """Every name in a record that its author may choose."""
    job = replace(run.job, classes=(f"{HOSTILE[:200]}.", HOSTILE.strip()[:5000].replace("|", "")))
    joined = {"device": HOSTILE, "versions": {HOSTILE: HOSTILE}, "evaluates": True}
    record = {"sites": {HOSTILE: joined, SITES[0]: joined}, "outcome": HOSTILE, "backbone": HOSTILE}
    record["rounds"] = [with_figures(row) for row in run.record["rounds"]]
    manifest = replace(run.manifest, outcome=HOSTILE, run_id=HOSTILE, files={HOSTILE: HOSTILE})
    report = judged(run, job=job, record=record, manifest=manifest)
    return replace(report, findings=(*report.findings, Finding(HOSTILE, "note", HOSTILE, HOSTILE, HOSTILE)))


def test_hostile_names_are_shown_and_do_nothing(run: Run) -> None:
    report = hostile(run)
    text = render(report)
    page = Page(text)
    assert not page.tags("script", "img", "iframe", "object", "link", "form")
    assert len(page.tags("style")) == 1
    assert "alert(1)" in page.text and "49" not in page.text.split("alert(1)")[1][:80]
    assert all(c.isprintable() or c == "\n" for c in text)
    assert len(text) < 1_000_000
    for attrs in (attrs for _, attrs in page.elements):
        assert not [key for key in attrs if key.startswith("on")]
        assert not (attrs.get("href") or "#").removeprefix("#").strip("abcdefghijklmnopqrstuvwxyz")
    card = to_markdown(report)
    assert "<script" not in card.replace("\\<", "")
    assert "](" not in card.replace("\\]", "")
    assert all(c.isprintable() or c == "\n" for c in card)


def test_numbers_are_written_as_people_read_them() -> None:
    assert [plain.up(x) for x in (7.991, 8.0, 7.9999999999999, inf)] == ["8.00", "8.00", "8.00", "unbounded"]
    assert [plain.small(x) for x in (1e-5, 9.9999e-6, 2.5e-7, 0.0416, 0.0, None)] == [
        "1e-5", "1e-5", "2.5e-7", "0.0416", "0", "–",
    ]  # fmt: skip
    assert plain.names(["a", "b", "c"]) == "a, b and c"
    assert plain.names(map(str, range(20))) == "0, 1, 2, 3, 4, 5, 6, 7 and 12 more"
    assert plain.moment("2026-11-26T02:00:00+01:00") == "26 Nov 2026, 01:00 UTC"
    assert plain.moment("<yesterday>") == "<yesterday>"
    assert plain.one_in(1e-5) == "1 in 100,000"


def test_the_page_is_one_file_that_asks_nobody(honest: Report) -> None:
    text = render(honest)
    page = Page(text)
    policy = [a["content"] for a in page.tags("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]
    assert not page.tags("script", "link", "img", "iframe")
    assert not {"src", "srcset", "style"} & {key for _, attrs in page.elements for key in attrs}
    for asks in ("http://", "https://", "url(", "@import", "@font-face"):
        assert asks not in text


def test_the_page_can_be_read_without_eyes_or_mouse(run: Run) -> None:
    page = Page(render(scored(run)))
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    for _, attrs in page.elements:
        for target in (attrs.get("aria-labelledby") or "").split():
            assert target in ids
        if (attrs.get("href") or "").startswith("#"):
            assert str(attrs["href"])[1:] in ids
    levels = [int(tag[1]) for tag, _ in page.elements if tag in ("h1", "h2", "h3", "h4")]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert {"header", "nav", "main", "footer"} <= {tag for tag, _ in page.elements}
    assert next(attrs for tag, attrs in page.elements if tag == "a")["class"] == "skip"
    assert all("scope" in attrs for attrs in page.tags("th"))
    assert len(page.tags("caption")) == len(page.tags("table"))
    for attrs in page.tags("svg"):
        assert attrs.get("aria-hidden") == "true" or (attrs.get("role") == "img" and attrs.get("aria-labelledby"))
    for attrs in page.tags("div"):
        if attrs.get("role") == "region":
            assert attrs.get("tabindex") == "0"


def test_twenty_sites_and_two_hundred_rounds_stay_small(run: Run, audit: Audit) -> None:
    one = audit.spending[SITES[0]]
    spending = {}
    for number in range(20):
        by_round = {r: 0.01 * r + 0.001 * number for r in range(1, 201)}
        spending[f"site-{number}"] = replace(one, job=2.0 + number, total=3.0 + number, by_round=by_round)
    classes = tuple(f"label {number}" for number in range(500))
    rows = [
        with_figures({**run.record["rounds"][1], "round": r}, AP=[50.0] * 500, share=[0.1] * 500) for r in range(201)
    ]
    rows[0]["zero_shot"] = {"mAP": 20.0, "AP": [40.0] * 500}
    joined = {"device": "cpu", "versions": {"torch": "2"}, "evaluates": True}
    record = {**run.record, "rounds": rows, "sites": dict.fromkeys(spending, joined)}
    large = replace(run, record=record, job=replace(run.job, classes=classes))
    report = build_report(large, replace(audit, spending=spending), MADE)
    text = render(report)
    assert len(text.encode()) < 1_000_000
    assert len(report.to_dict()["spending"]["site-7"]["by_round"]) == 200
    assert "300 more labels are in the JSON report" in text
    assert len(Page(text).rows["round-table"]) < 30


def test_thinning_keeps_both_ends() -> None:
    points = [(float(i), float(i)) for i in range(1001)]
    kept = thinned(points, 100)
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert len(kept) <= 102
    assert thinned(points[:3], 100) == tuple(points[:3])
    assert thinned([], 100) == ()


def invoke(*words: object) -> Any:
    return CliRunner().invoke(app, ["report", *map(str, words)])


def test_the_command_writes_the_report_and_the_card(folder: Path, keys: KnownKeys, tmp_path: Path) -> None:
    assert keys.roster
    write_roster(tmp_path / "roster.json", keys.roster)
    options = ("--roster", tmp_path / "roster.json")
    done = invoke(folder, *options, "--model-card", tmp_path / "card.md")
    assert done.exit_code == 0, done.output
    assert "The claim stands" in done.output
    assert (folder / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert (tmp_path / "card.md").read_text().startswith("# Model card: audited")
    again = invoke(folder, *options, "--model-card", tmp_path / "card.md")  # its own file is written over
    assert again.exit_code == 0
    assert sorted(p.name for p in folder.iterdir()) == [
        "manifest.json", "model.safetensors", "privacy", "report.html", "result.json",
    ]  # fmt: skip


def test_json_is_all_that_is_printed_and_nothing_is_written(folder: Path) -> None:
    done = invoke(folder, "--json")
    printed = json.loads(done.output)
    run = load_run(folder, KnownKeys())
    expected = json.loads(json.dumps(build_report(run, audit_run(run), printed["made"]).to_dict()))
    assert printed == expected
    assert not (folder / "report.html").exists()
    elsewhere = invoke(folder, "--json", "--out", folder.parent / "page.html")
    assert json.loads(elsewhere.output)["run_id"] == "run-1"
    assert (folder.parent / "page.html").exists()


def test_a_failed_audit_is_exit_code_1_and_written_down(folder: Path) -> None:
    MANIPULATIONS["cut the tail"][0](folder)
    done = invoke(folder)
    assert done.exit_code == 1
    assert "does not stand" in done.output
    assert "does not stand" in (folder / "report.html").read_text()


def test_a_run_is_never_written_over(folder: Path) -> None:
    before = (folder / "result.json").read_bytes()
    for option in ("--out", "--model-card"):
        done = invoke(folder, option, folder / "result.json")
        assert isinstance(done.exception, WrongUse)
        assert "was not written by this command" in str(done.exception)
    (folder / "report.html").symlink_to(folder / "result.json")
    done = invoke(folder)
    assert isinstance(done.exception, WrongUse)
    assert (folder / "result.json").read_bytes() == before


def test_no_place_to_write_is_a_sentence(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "nowhere" / "r.html", tmp_path / "file" / "r.html", tmp_path):
        done = invoke(folder, "--out", place)
        assert isinstance(done.exception, WrongUse | WriteError), done.output
        assert str(place) in str(done.exception)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "run-1"]


def test_no_run_is_no_report(tmp_path: Path) -> None:
    done = invoke(tmp_path)
    assert isinstance(done.exception, NoRun)
    assert list(tmp_path.iterdir()) == []


def test_a_record_that_a_liar_signed_is_shown_for_what_it_is(
    folder: Path, audited: Federation, keys: KnownKeys
) -> None:
    """A server that claims less than the ledgers say."""
    edit_record(folder, lambda r: [row["privacy"][s].update(epsilon=0.1) for row in r["rounds"][1:] for s in SITES])
    audited.resign(folder)
    run = load_run(folder, keys)
    report = build_report(run, audit_run(run), MADE)
    assert report.claim.status == "fails"
    assert report.spending[SITES[0]].job > 1 > 0.1
    assert JOB.name in to_markdown(report)


# why there are no figures


@pytest.mark.parametrize(
    ("every", "evaluates", "says"),
    [
        (0, True, "No figures: the job asked for none."),
        (1, False, "No figures: the job asked for them, and no site of this run gives any."),
        (1, True, "No figures: the job asked for them, hospital-a would give them, and none are in the record."),
    ],
)
def test_why_there_are_no_figures_is_true(run: Run, audit: Audit, every: int, evaluates: bool, says: str) -> None:
    job = replace(run.job, federation=replace(run.job.federation, evaluate_every=every))
    sites = {site: {**joined, "evaluates": evaluates and site == SITES[0]} for site, joined in run.sites.items()}
    report = build_report(replace(run, job=job, record={**run.record, "sites": sites}), audit, MADE)
    assert says in to_markdown(report)
    assert says in render(report)
