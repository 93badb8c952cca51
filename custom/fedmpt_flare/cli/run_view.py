"""What a person sees of a job before it runs, of a simulated run while it goes on, and of its end."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.text import Text

from fedmpt_core.config.job import JobConfig
from fedmpt_core.federation.advice import GOOD, POOR, true_signal
from fedmpt_core.federation.preflight import warnings_of
from fedmpt_core.federation.run import record as run
from fedmpt_core.federation.terms import floors_of
from fedmpt_flare.cli.screen import show_table, table_of

_MOST_LABELS = 12  # rows of a table that is no list (chosen)


def show_check(
    job: JobConfig, size: Any, data: Mapping[str, Any], plan: Any, doubts: Sequence[str], *, verbose: bool
) -> None:
    """`fedmpt check` for people: pictures and labels, what it costs, what to look at; every key where asked for."""
    console = Console(highlight=False)
    if data:
        _show_data(console, data)
        _show_labels(console, job, data, len(job.classes) if verbose else _MOST_LABELS)
    if verbose:
        _show_keys(job)
    _show_size(console, size, job)
    _show_privacy(console, job, plan)
    if verbose:
        _show_accounting(console, job, plan)
    elif plan and data:
        ratios = true_signal(job, data, plan)
        console.print(
            f"Signal to noise of a step, at best: {', '.join(f'{escape(n)} {r:.2g}' for n, r in ratios.items())} "
            f"({GOOD:g} and more is good, below {POOR:g} hardly anything is learnt)",
            soft_wrap=True,
        )
    _show_doubts(console, doubts)
    console.print(f"Job digest {job.digest()}" + ("" if verbose else "; every key: --verbose"), soft_wrap=True)
    if doubts:
        number = "one thing" if len(doubts) == 1 else f"{len(doubts)} things"
        console.print(f"Nothing stops this job; there {'is' if len(doubts) == 1 else 'are'} {number} to look at above.")
    else:
        console.print("OK: nothing is wrong with this job.")


def _show_keys(job: JobConfig) -> None:
    rows = []
    for section, values in job.to_dict().items():
        inner = values.items() if isinstance(values, dict) else ()
        rows += [(section, key, _short(value)) for key, value in inner] or [("", section, _short(values))]
    show_table(f"Job {job.name}", ("section", "key", "value"), rows)


class RunView:
    """The screen of one simulated run."""

    def __init__(self, job: JobConfig, *, quiet: bool) -> None:
        """Draws nothing when `quiet`."""
        self._job, self._console = job, Console(highlight=False, quiet=quiet)

    def step(self, text: str) -> None:
        """What happens next."""
        self._console.print(Text("› ", style="bold") + Text(text), soft_wrap=True)

    def show_start(self, size: Any, data: Mapping[str, Any], plan: Any) -> None:
        """Job, model, privacy and data in a few lines."""
        job = self._job
        self._console.print(
            f"[bold]{escape(job.name)}[/]: {len(data)} sites, {len(job.classes)} labels, "
            f"{len(job.model.conditions)} conditions, "
            f"{job.training.rounds} rounds, seed {job.seed}"
        )
        _show_size(self._console, size, job)
        _show_privacy(self._console, job, plan)
        _show_data(self._console, data)
        _show_doubts(self._console, warnings_of(job, size, data))

    @contextlib.contextmanager
    def rounds(self) -> Iterator[Callable[[Mapping[str, Any]], None]]:
        """The table of rounds, redrawn with every event; a plain line per round where there is no terminal."""
        from fedmpt_flare.cli.rounds_table import HEADING, RoundsTable  # brings FLARE, which a check does without

        table = RoundsTable(self._job.training.rounds)
        if not self._console.is_terminal:
            self._console.print(HEADING)

            def follow_plain(event: Mapping[str, Any]) -> None:
                line = table.take(event)
                if line:
                    self._console.print(line, soft_wrap=True)

            yield follow_plain
            return
        with Live(table.draw(), console=self._console, refresh_per_second=8) as live:

            def follow(event: Mapping[str, Any]) -> None:
                table.take(event)
                live.update(table.draw())

            yield follow

    def show_end(self, record: Mapping[str, Any], folder: Path, seconds: Mapping[str, float]) -> None:
        """Where it began, where it ended, and what it left."""
        rows = [r for r in record["rounds"] if "mAP" in r]
        stand_in = ", not CLIP" if record["is_stand_in"] else ""
        lines: list[RenderableType] = [Text(f"Backbone: {record['backbone']}{stand_in}")]
        if rows:
            zero, final = rows[0]["zero_shot"]["mAP"], rows[-1]["mAP"]
            lines.append(
                Text(f"zero-shot mAP {zero:.2f}   round 0 mAP {rows[0]['mAP']:.2f}   ")
                + Text(
                    f"final mAP {final:.2f} ({final - zero:+.2f})",
                    style="bold green" if final > zero else "bold red",
                )
            )
            lines += [Text(sentence, style="bold red") for sentence in _what_training_lost(rows)]
        if record["config"]["privacy"]["mechanism"] != "none" and record["rounds"]:
            lines.append(_spent(record))
        lines.append(_protection(record))
        lines.append(Text("Seconds: " + ", ".join(f"{k} {v:.0f}" for k, v in seconds.items()), style="dim"))
        left = (run.RESULT, run.MODEL, run.CURVES, run.TIMING, run.LOG, run.LEDGERS, run.CHECKPOINTS)
        names = [name for name in left if (folder / name).exists()]
        lines.append(Text(f"Wrote {', '.join(names)} to {folder}"))
        self._console.print(Group(*lines), soft_wrap=True)


def _what_training_lost(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A plain sentence where the final model is worse than what was there before any training."""
    start, final = max(rows[0]["mAP"], rows[0]["zero_shot"]["mAP"]), rows[-1]["mAP"]
    if final >= start or len(rows) < 2:
        return []
    best = max(rows[1:], key=lambda row: row["mAP"])
    better = (
        f"the best was round {best['round']} with {best['mAP']:.2f}" if best["mAP"] > start else "no round was better"
    )
    return [
        f"Training lost: the final model (mAP {final:.2f}) is worse than the start ({start:.2f}); {better}. Take fewer "
        "or smaller steps, or less noise: `fedmpt check` proposes settings."
    ]


def _show_doubts(console: Console, doubts: Sequence[str]) -> None:
    for doubt in doubts:
        console.print(f"[yellow]Look at this:[/] {escape(doubt)}", soft_wrap=True)


def _show_size(console: Console, size: Any, job: JobConfig) -> None:
    groups = ", ".join(f"{g} {n:,}" for g, n in size.groups.items())
    note = ", not CLIP" if size.is_stand_in else ""
    console.print(f"Backbone: {escape(size.backbone)}{note}", soft_wrap=True)
    console.print(
        f"Trained: {size.floats:,} floats ({groups}); {size.mib_per_update:.2f} MiB per site and round, "
        f"{size.mib_per_update * job.training.rounds:.1f} MiB in {job.training.rounds} rounds",
        soft_wrap=True,
    )


def _show_privacy(console: Console, job: JobConfig, plan: Any) -> None:
    console.print(_aggregation(job), soft_wrap=True)
    privacy = job.privacy
    if plan is None:
        console.print("[bold red]No differential privacy:[/] updates can tell things about pictures")
        return
    console.print(
        f"Privacy: epsilon {plan.epsilons.pld:.2f} at delta {privacy.delta:g} for each {privacy.unit}, over "
        f"{plan.steps} noisy steps",
        soft_wrap=True,
    )
    if plan.sites:
        rows = [
            (n, f"{s.projection.job:.2f}", f"{s.projection.total:.2f}", f"{s.projection.cap:g}")
            for n, s in plan.sites.items()
        ]
        show_table("Budgets", ("site", "epsilon of the job", "of the data set", "cap"), rows, console=console)
    if plan.sites and privacy.distributed:
        console.print(
            f"Sites share the noise: this holds against the server and up to {job.secagg.colluders} of the sites, as "
            "long as the masks hold. If they fail, each site's own share is all that is left:",
            soft_wrap=True,
        )
        rows = [
            (n, f"{s.projection.job_alone:.2f}", f"{s.projection.total_alone:.2f}", f"{s.projection.cap_alone:g}")
            for n, s in plan.sites.items()
        ]
        columns = ("site", "epsilon of the job", "of the data set", "epsilon_alone")
        show_table("If the masks fail", columns, rows, console=console)


def _show_accounting(console: Console, job: JobConfig, plan: Any) -> None:
    """How epsilon comes about, for who plans a job; a run shows what it spends."""
    if plan is None:
        return
    privacy, spent = job.privacy, plan.epsilons
    console.print(
        f"Noise: multiplier {privacy.noise_multiplier:g} at rate {privacy.sample_rate:g}, engine {privacy.engine}, "
        f"{job.federation.max_failed_rounds} failed attempts included",
        soft_wrap=True,
    )
    console.print(
        f"Epsilon, for adding or removing one {privacy.unit}: {spent.pld:.3f} (PLD, the one that counts), "
        f"{spent.prv:.3f} (PRV, a cross-check), {spent.rdp:.3f} (RDP, looser); for replacing "
        f"one: at most {spent.replace_one:.3f}",
        soft_wrap=True,
    )
    if not plan.sites:
        return
    choices = list(next(iter(plan.sites.values())).signal_to_noise)
    noise = [
        (name, *(Text(f"{r:.2f}", "bold" if c == job.model.trained else "") for c, r in site.signal_to_noise.items()))
        for name, site in plan.sites.items()
    ]
    show_table("Best-case signal to noise of a step, by what is trained", ("site", *choices), noise, console=console)


def _aggregation(job: JobConfig) -> Text:
    secagg = job.secagg
    if not secagg.masked:
        return Text("No secure aggregation: ", style="bold red") + Text(
            "the server sees every site's updates", style=""
        )
    least = floors_of(job).threshold(job.federation.min_sites)
    made_up = ", identities made up for a simulation" if secagg.insecure_identities else ""
    return Text(
        f"Secure aggregation: the server sees sums of at least {least} sites' updates and nothing else, also when "
        f"{secagg.colluders} of them work with it{made_up}"
    )


def _protection(record: Mapping[str, Any]) -> Text:
    """One line on what protected the sites in a run."""
    privacy, masked = record["config"]["privacy"], record["aggregation"] == "masked"
    spent = [budget["epsilon"] for row in record["rounds"] for budget in row["privacy"].values()]
    sums = [len(row["sites"]) for row in record["rounds"] if row["secagg"]]
    parts = []
    if privacy["mechanism"] == "none":
        parts.append("no differential privacy (updates can tell things about pictures)")
    elif spent:
        parts.append(
            f"differential privacy (every site at most epsilon {max(spent):.3f}, delta {privacy['delta']:g}, per "
            f"{privacy['unit']})"
        )
    if not masked:
        parts.append("no secure aggregation (the server saw every site's updates)")
    elif sums:
        parts.append(f"secure aggregation (the server saw only sums of {min(sums)} or more masked updates)")
    made_up = "; identities were made up for the simulation" if record["identities"] == "insecure" and masked else ""
    bare = privacy["mechanism"] == "none" or not masked
    return Text(f"Protection: {' and '.join(parts)}{made_up}", style="bold red" if bare else "bold")


def _spent(record: Mapping[str, Any]) -> RenderableType:
    """Epsilon by site when a run has ended: what the last reply of each site said."""
    last: dict[str, Mapping[str, Any]] = {}
    for row in record["rounds"]:
        last.update(row["privacy"])
    rows = [
        (site, f"{b['epsilon']:.3f}", f"{b['delta']:g}", f"{b['head']['seq']} {b['head']['hash'][:12]}")
        for site, b in sorted(last.items())
    ]
    return Group(Text("Privacy", "italic"), table_of(("site", "epsilon spent", "delta", "ledger entry"), rows))


def _show_data(console: Console, data: Mapping[str, Any]) -> None:
    rows = [
        (name, *(str(n or "–") for n in (d.train, d.val, d.test)), str(int((d.positives > 0).sum())), str(d.unlabelled))
        for name, d in data.items()
    ]
    show_table("Pictures", ("site", "train", "val", "test", "labels seen", "without any"), rows, console=console)


def _show_labels(console: Console, job: JobConfig, data: Mapping[str, Any], most: int) -> None:
    """Training pictures by label: the rarest first, since they decide, and a line for those that are left out."""
    totals = [sum(int(d.positives[c]) for d in data.values()) for c in range(len(job.classes))]
    order = sorted(range(len(totals)), key=totals.__getitem__)
    rows = [(job.classes[c], *(str(d.positives[c] or "–") for d in data.values())) for c in order[:most]]
    left = len(order) - len(rows)
    caption = f"and {left} more labels with {totals[order[most]]} or more each" if left else ""
    show_table("Training pictures by label, the rarest first", ("label", *data), rows, caption, console)


def _short(value: object) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text if len(text) <= 90 else text[:87] + "..."
