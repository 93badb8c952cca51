"""Small inline SVG: bars and line charts. Colours come from the page's style sheet, every text through escaping.

A chart never stands alone: the page has its numbers in a table beside it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor, isfinite, log10

from markupsafe import Markup, escape

from fedmpt_core.audit.spending import Spending
from fedmpt_core.report.content import Profile, Utility
from fedmpt_core.report.plain import number, small

MOST_POINTS = 100  # of a line; chosen, a screen shows no more
MOST_LINES = 4
WIDTH, HEIGHT = 420, 250
LEFT, RIGHT, TOP, BOTTOM = 66, 14, 14, 44  # margins of the plot

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """A line of a chart and the sites that share it."""

    sites: tuple[str, ...]
    points: tuple[Point, ...]


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> tuple[Point, ...]:
    """Every n-th point and the last, at most `most` and one."""
    stride = ceil(len(points) / most) or 1
    kept = list(points[::stride])
    return tuple(kept if not points or kept[-1] == points[-1] else [*kept, points[-1]])


def spending_lines(spending: Mapping[str, Spending]) -> tuple[Line, ...]:
    """Epsilon over the rounds; sites that spent alike share a line."""
    alike: dict[tuple[Point, ...], list[str]] = {}
    for site, spent in spending.items():
        points = [(float(r), e) for r, e in sorted(spent.by_round.items()) if 0 < r < 10**9 and isfinite(e)]
        if points:
            alike.setdefault(((0.0, 0.0), *points), []).append(site)
    return tuple(Line(tuple(sites), points) for points, sites in alike.items())


def epsilon_chart(lines: Sequence[Line]) -> Markup:
    """Epsilon over rounds."""
    most = max((point[1] for line in lines for point in line.points), default=1.0)
    last = max((point[0] for line in lines for point in line.points), default=1.0)
    text = f"Epsilon of the run rises from 0 to {number(most, 2)} in {last:g} rounds."
    plane = _Plane(_ticks(0, last, whole=True), _ticks(0, most))
    return _chart("rounds", "Epsilon over rounds", text, [*plane.axes("round", "epsilon"), *plane.lines(lines)])


def profile_chart(profiles: Sequence[Profile], spending: Mapping[str, Spending]) -> Markup:
    """Delta over epsilon, delta on a logarithmic axis down to 1e-10; a ring marks what is claimed."""
    lines = [
        Line(p.sites, tuple((e, log10(d)) for e, d in zip(p.epsilons, p.deltas, strict=True) if d >= 1e-10))
        for p in profiles
    ]
    right = max((point[0] for line in lines for point in line.points), default=1.0)
    first = profiles[0] if profiles else None
    ends = f"from {small(first.deltas[0])} at epsilon 0 to {small(first.deltas[-1])}" if first else ""
    text = f"Delta falls {ends} at epsilon {right:g}, on a logarithmic axis."
    claimed = [(spending[p.sites[0]].total, log10(spending[p.sites[0]].delta)) for p in profiles]
    plane = _Plane(_ticks(0, right), [-10, -8, -6, -4, -2, 0])
    parts = [*plane.axes("epsilon", "delta", powers=True), *plane.lines(lines, dots=False), *plane.rings(claimed)]
    return _chart("profile", "Privacy profile", text, parts)


def utility_chart(utility: Utility) -> Markup:
    """Mean average precision over rounds, zero-shot as a level."""
    zero = next((start for figure, start, _ in utility.figures if figure == "mAP"), None)
    points = tuple((float(r), v) for r, v in utility.curve)
    top = max([value for _, value in points] + [zero or 0.0, 1.0])
    last = max(points[-1][0], 1.0)
    text = f"Mean average precision goes from {points[0][1]:.1f} to {points[-1][1]:.1f} percent."
    plane = _Plane(_ticks(0, last, whole=True), _ticks(0, top))
    level = [] if zero is None else plane.level(zero, "zero-shot")
    parts = [*plane.axes("round", "mAP, %"), *level, *plane.lines([Line((), points)])]
    return _chart("map", "mAP over rounds", text, parts)


def budget_bar(before: float, added: float, cap: float | None, scale: float) -> Markup:
    """Spent before, added by this run, and the cap, as shares of `scale`; the row beside it has the numbers."""

    def part(start: float, width: float, kind: str) -> str:
        x, w = (min(100.0, max(0.0, 100 * v / scale)) for v in (start, width))
        return f'<rect class="{kind}" x="{x:.2f}%" y="0" width="{w:.2f}%" height="100%"/>'

    parts = [part(0, scale, "track"), part(0, before, "before"), part(before, added, "added")]
    if cap is not None:
        parts.append(f'<rect class="cap" x="{min(99.4, 100 * cap / scale):.2f}%" y="0" width="3" height="100%"/>')
    return Markup(  # noqa: S704 - numbers only
        f'<svg class="bar" width="100%" height="16" aria-hidden="true" focusable="false">{"".join(parts)}</svg>'
    )


def gain_bar(start: float | None, final: float | None) -> Markup:
    """From zero-shot (ring) to the trained model (dot), of 100 percent; the row beside it has the numbers."""
    if start is None or final is None:
        return Markup("")
    a, b = (min(98.5, max(1.5, value)) for value in (start, final))
    kind = "worse" if final < start else "better"
    return Markup(  # noqa: S704 - numbers only
        '<svg class="gain" width="100%" height="16" aria-hidden="true" focusable="false">'
        '<line class="rail" x1="0" x2="100%" y1="8" y2="8"/>'
        f'<line class="{kind}" x1="{a:.1f}%" x2="{b:.1f}%" y1="8" y2="8"/>'
        f'<circle class="start" cx="{a:.1f}%" cy="8" r="4"/><circle class="{kind}" cx="{b:.1f}%" cy="8" r="4.5"/></svg>'
    )


def round_above(value: float) -> float:
    """A round number above a value, with some room."""
    return _ticks(0.0, max(1.1 * value, 1.0))[-1]


@dataclass(frozen=True)
class _Plane:
    """Where values stand in a chart, and its parts as SVG; each axis goes from its first tick to its last."""

    across: Sequence[float]
    upright: Sequence[float]

    def x(self, value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - self.across[0]) / (self.across[-1] - self.across[0])

    def y(self, value: float) -> float:
        share = (value - self.upright[0]) / (self.upright[-1] - self.upright[0])
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share

    def axes(self, across: str, up: str, *, powers: bool = False) -> Iterator[str]:
        """Grid, ticks and what the axes show; `powers` labels the upright one with powers of ten."""
        for tick in self.upright:
            label = f"1e{tick:.0f}" if powers and tick else "1" if powers else f"{tick:g}"
            y = self.y(tick)
            yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            yield f'<text class="tick end" x="{LEFT - 7}" y="{y + 4:.1f}">{label}</text>'
        for tick in self.across:
            yield f'<text class="tick mid" x="{self.x(tick):.1f}" y="{HEIGHT - BOTTOM + 18}">{tick:g}</text>'
        yield f'<text class="axis mid" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}">{escape(across)}</text>'
        turned = f"translate(17 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)"
        yield f'<text class="axis mid" transform="{turned}">{escape(up)}</text>'

    def level(self, value: float, label: str) -> Iterator[str]:
        y = self.y(value)
        yield f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text class="tick end" x="{WIDTH - RIGHT}" y="{y + 15:.1f}">{escape(label)}</text>'

    def lines(self, lines: Sequence[Line], *, dots: bool = True) -> Iterator[str]:
        """The lines, and a dot at the end of each that has a colour of its own."""
        for index, line in enumerate(lines):
            where = " ".join(f"{self.x(a):.1f},{self.y(b):.1f}" for a, b in thinned(line.points))
            yield f'<polyline class="line l{min(index, MOST_LINES)}" points="{where}"/>'
            if line.points and index < MOST_LINES and dots:
                a, b = line.points[-1]
                yield f'<circle class="dot l{index}" cx="{self.x(a):.1f}" cy="{self.y(b):.1f}" r="3.5"/>'

    def rings(self, points: Sequence[Point]) -> Iterator[str]:
        for a, b in points:
            y = self.y(max(b, self.upright[0]))
            yield f'<circle class="mark" cx="{self.x(a):.1f}" cy="{y:.1f}" r="4.5"/>'


def _chart(key: str, title: str, text: str, parts: Sequence[str]) -> Markup:
    return Markup(  # noqa: S704 - every text was escaped where its part was made
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="{key}-t {key}-d">'
        f'<title id="{key}-t">{escape(title)}</title><desc id="{key}-d">{escape(text)}</desc>{"".join(parts)}</svg>'
    )


def _ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Four to seven round numbers from `low` that reach `high`."""
    if not high > low:
        return [low, low + 1]
    step = 10.0 ** floor(log10((high - low) / 4))
    while (high - low) / step > 6:
        step *= 2.5 if f"{step:e}".startswith("2") else 2
    step = max(1.0, round(step)) if whole else step
    return [low + i * step for i in range(ceil((high - low) / step - 1e-9) + 1)]
