"""The report in headless Chromium: nothing cut off, no console error, no request, no accessibility violation."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedmpt_core.audit.auditor import audit_run
from fedmpt_core.audit.run_evidence import load_run
from fedmpt_core.report.build import build_report
from fedmpt_core.report.html import render
from tests.audited import MANIPULATIONS, SITES, Federation, provision, roster_of

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium"),
    pytest.mark.xdist_group("browser"),
]

VARIANTS = [(width, scheme) for width in (1280, 360) for scheme in ("light", "dark")]
PAGES = ("honest", "tampered", "hostile")
LONG = "<b>\u202egnp</b>" + "W" * 10_000

# elements that stick out of the window, of what scrolls, or of the chart that they are in
CUT_OFF = """() => {
  const cut = [], wide = innerWidth + 0.5;
  for (const e of document.body.querySelectorAll('*')) {
    const box = e.getBoundingClientRect();
    if (!box.width || !box.height || e.closest('details:not([open]) > :not(summary)')) continue;
    const scroll = e.closest('.scroll'), chart = e.closest('svg.chart');
    if (!scroll && (box.left < -0.5 || box.right > wide)) cut.push(e.outerHTML.slice(0, 120));
    if (scroll && e !== scroll) {
      const start = scroll.getBoundingClientRect().left - scroll.scrollLeft;
      if (box.left < start - 0.5 || box.right > start + scroll.scrollWidth + 0.5) cut.push(e.outerHTML.slice(0, 120));
    }
    if (chart && e.tagName === 'text') {
      const frame = chart.getBoundingClientRect();
      if (box.left < frame.left - 0.5 || box.right > frame.right + 0.5 || box.bottom > frame.bottom + 0.5
          || box.top < frame.top - 0.5) cut.push('chart: ' + e.textContent);
    }
    const style = getComputedStyle(e);
    if (['hidden', 'clip'].includes(style.overflowX) && e.tagName !== 'svg' && e.scrollWidth > e.clientWidth + 1)
      cut.push('clipped: ' + e.outerHTML.slice(0, 120));
  }
  return cut;
}"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Reports of an honest run with figures, of a manipulated one, and of one whose names want to do harm."""
    root = tmp_path_factory.mktemp("reports")
    kits = provision(root)
    federation = Federation(root, kits)
    folder = federation.run("run-1")
    keys = roster_of(kits)

    def write(name: str, run: Any, **changes: Any) -> Path:
        run = replace(run, findings=[], **changes) if changes else run
        policy_cards = [federation.policy_card(site, 16.0) for site in SITES]
        path = root / f"{name}.html"
        path.write_text(
            render(build_report(run, audit_run(run, policy_cards=policy_cards), "2026-11-26T02:00:00+00:00"))
        )
        return path

    run = load_run(folder, keys)
    figures = {"mAP": 30.0, "AP": [20.0, 40.0], "gate": [0.2] * 5, "share": [0.4, 0.01]}
    rows = [{**row, **figures} for row in run.record["rounds"]]
    rows[0]["zero_shot"] = {"mAP": 25.0, "AP": [30.0, 20.0]}
    written = {"honest": write("honest", run, record={**run.record, "rounds": rows})}
    joined = {"device": LONG, "versions": {LONG: LONG}, "evaluates": True}
    record = {**run.record, "rounds": rows, "backbone": LONG, "outcome": LONG}
    record["sites"] = {LONG: joined, SITES[0]: joined}
    job = replace(run.job, classes=("dog", LONG))
    written["hostile"] = write("hostile", run, record=record, job=job)
    MANIPULATIONS["cut the tail"][0](folder)
    written["tampered"] = write("tampered", load_run(folder, keys))
    return written


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM)
        yield chromium
        chromium.close()


@pytest.fixture(params=VARIANTS, ids=lambda v: f"{v[0]}-{v[1]}")
def view(browser: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """A tab of that width and colour scheme; at its end, whatever was said or asked for is a failure."""
    width, scheme = request.param
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    noise: list[str] = []
    page.on("console", lambda message: noise.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: noise.append(str(error)))
    page.on("request", lambda asked: noise.append(asked.url) if not asked.url.startswith("file://") else None)
    yield page
    page.close()
    assert noise == []


@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_cut_off_and_everybody_can_use_it(view: Any, pages: dict[str, Path], name: str) -> None:
    from axe_playwright_python.sync_playwright import Axe

    view.goto(pages[name].as_uri())
    view.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert view.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
    assert view.evaluate(CUT_OFF) == []
    response = Axe().run(view).response
    assert [(v["id"], [n["html"][:200] for n in v["nodes"]]) for v in response["violations"]] == []
    assert any(check["id"] == "color-contrast" for check in response["passes"])


def test_keyboard_and_paper(view: Any, pages: dict[str, Path]) -> None:
    view.goto(pages["honest"].as_uri())
    view.keyboard.press("Tab")
    assert view.evaluate("document.activeElement.className") == "skip"
    box = view.evaluate(
        "(() => { const b = document.activeElement.getBoundingClientRect(); return [b.top, b.left]; })()"
    )
    assert min(box) >= 0
    view.keyboard.press("Enter")
    assert view.evaluate("location.hash") == "#claim"
    reached = set()
    for _ in range(80):
        view.keyboard.press("Tab")
        reached.add(view.evaluate("document.activeElement.className || document.activeElement.tagName"))
    assert {"A", "scroll", "SUMMARY"} <= reached
    view.emulate_media(media="print")
    assert view.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert view.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"


def test_the_check_for_what_is_cut_off_can_fail(browser: Any) -> None:
    page = browser.new_page(viewport={"width": 360, "height": 900})
    page.set_content("<p style='width:500px'>wide</p><div style='width:50px;overflow:hidden'>Unbreakable-word</div>")
    assert len(page.evaluate(CUT_OFF)) == 2
    page.close()
