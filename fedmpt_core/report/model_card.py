"""The model card: what the model is for, what it was made of, what it can do, and what protects those it learned from.

Sections in the order of Mitchell et al. 2019 (arXiv 1810.03993). It describes training data in general words only:
nothing here is a count or a figure of a training picture.
"""

from fedmpt_core.audit.run_evidence import Run
from fedmpt_core.common.text import shown
from fedmpt_core.report.content import Claim, ModelCardSection, Report, Utility
from fedmpt_core.report.plain import count, markdown, moment, name, names, number, signed
from fedmpt_core.report.words import WORDS

MOST_LABELS = 60
TITLE = "# Model card: "


def model_card(run: Run, claim: Claim, utility: Utility) -> tuple[ModelCardSection, ...]:
    """The sections of the card."""
    job = run.job
    labels = ", ".join(name(label) for label in job.classes[:MOST_LABELS])
    rest = len(job.classes) - MOST_LABELS
    sites = sorted(run.record["sites"] or {})
    backbone = name(run.record.get("backbone") or "not recorded")
    stand_in = (
        ("The backbone only stands in for CLIP, for rehearsals and tests: do not use this model for anything else.",)
        if run.record.get("is_stand_in")
        else ()
    )
    return (
        ModelCardSection(
            "Model",
            (
                f"{job.name}: says which of {count(len(job.classes), 'label')} a picture shows. A vision-language "
                f"model, {backbone}, stays frozen; trained are prompts, adapters or gate around it (FedMPT: federated "
                "multi-label prompt tuning), by several sites together, without any of them showing a picture.",
                f"Digest of the job: {name(run.manifest.config_digest)}.",
                *stand_in,
            ),
        ),
        ModelCardSection(
            "Intended use",
            (
                "Suggesting labels for pictures of the kind that the sites trained on, to people who check them.",
                f"The labels are {labels}{f' and {rest} more' if rest > 0 else ''}.",
            ),
        ),
        ModelCardSection("Not for", ("The model must not be used",), tuple(WORDS["not_for"])),
        ModelCardSection(
            "Training data",
            (
                f"Pictures of {count(len(sites), 'site')} ({names(sites)}), each with several labels, under conditions "
                "that differ from site to site. Pictures, labels and their true numbers stayed at the sites and are "
                "not part of this card; ask the sites.",
            ),
        ),
        ModelCardSection("Figures", *_figures(utility)),
        ModelCardSection(
            "Privacy",
            (claim.headline, *(f"{fact.name}: {fact.value}" for fact in claim.facts), "Not covered:"),
            claim.not_covered,
        ),
        ModelCardSection("Limits", tuple(WORDS["card_limits"])),
    )


def to_markdown(report: Report) -> str:
    """The card as Markdown; names cannot mark anything up."""
    run_id, made = markdown(name(report.run_id)), moment(report.made)
    lines = [f"{TITLE}{markdown(name(report.job))}", "", f"Run {run_id}, written {made} by {report.release}."]
    for section in report.model_card:
        lines += ["", f"## {section.heading}"]
        for paragraph in section.paragraphs:
            lines += ["", markdown(paragraph)]
        if section.items:
            lines += ["", *(f"- {markdown(item)}" for item in section.items)]
    return "\n".join(lines) + "\n"


def is_model_card(text: str) -> bool:
    """Whether a file that begins so is a model card of this program."""
    return text.startswith(TITLE)


def _figures(utility: Utility) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if utility.round is None:
        return (f"No figures: {utility.none_since}.",), ()
    scored = [label for label in utility.labels if label.gain is not None]
    worst = [f"{name(label.name)}: {number(label.final, 1)} ({signed(label.gain)})" for label in scored]
    text = (
        f"On test pictures of {names(utility.sites)}, after round {utility.round}, in percent; zero-shot is the frozen "
        "model with a plain prompt. What differential privacy cost was not measured: it takes the same job without it."
    )
    overall = tuple(
        f"{figure}: {number(final, 1)} (zero-shot {number(start, 1)})" for figure, start, final in utility.figures
    )
    few = f"Average precision of {count(len(scored), 'label')}; {utility.worse} of them are below zero-shot. " + (
        "The rarest labels of the test pictures (change against zero-shot in brackets): "
        if any(label.share is not None for label in scored)
        else "Those that gained least (change against zero-shot in brackets): "
    )
    return (text, few + shown("; ".join(worst[:8])) + ".") if scored else (text,), overall
