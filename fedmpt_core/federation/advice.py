"""What a job and its sites say that is allowed and seldom meant: sentences for whoever plans it, with what to do.

For the eyes of those who hold all the data, as in a simulation: true numbers of records are in them.
"""

from collections.abc import Iterator, Mapping
from statistics import median

import tomli_w

from fedmpt_core.config.job import JobConfig
from fedmpt_core.config.profiles import profile_for
from fedmpt_core.config.site import SiteConfig
from fedmpt_core.config.starter import rounded
from fedmpt_core.federation.preflight import ModelSize, PrivacyPlan, SiteCounts, warnings_of

FAR = 1.5  # from declared to true units, either way (chosen; a declared number is a rounded one)
GOOD, POOR = 0.3, 0.08
"""Best-case signal to noise of a step: the demo learns at 0.53 and hardly at 0.09 (epsilon 1); photographs, 100 a site,
at 0.12 in few steps."""
SLOWEST = 0.05  # step size times clip bound below which some tens of private steps move nothing (chosen)
FEWEST = 8  # records that a step expects (chosen)


def advice(
    job: JobConfig,
    sites: Mapping[str, SiteConfig],
    size: ModelSize,
    data: Mapping[str, SiteCounts],
    plan: PrivacyPlan | None,
) -> list[str]:
    """Everything worth a second look; nothing where all is well.

    Args:
        job: the agreed job.
        sites: by name; none where no file of sites was at hand.
        size: what `check_model` built.
        data: what `check_data` counted; none without sites.
        plan: what `check_privacy` worked out.
    """
    sentences = warnings_of(job, size, data)
    if not sites:
        sentences.append(
            "no sites were given, so no picture, no label and no budget was checked: put a site.toml beside the job, "
            "or name one with --sites FILE"
        )
    sentences += _units(job, sites, data)
    sentences += _labels(job, data)
    return [*sentences, *_learning(job, data, plan)]


def _units(job: JobConfig, sites: Mapping[str, SiteConfig], data: Mapping[str, SiteCounts]) -> Iterator[str]:
    noun = "training pictures" if job.privacy.unit == "record" else "groups of training pictures"
    for name, counts in data.items():
        policy = sites[name].privacy
        if policy and counts.units and not 1 / FAR <= policy.units / counts.units <= FAR:
            yield (
                f"{name} declares units = {policy.units} and has {counts.units} {noun}: steps and noise are scaled to "
                f"what is declared, so write a rounded true number into [privacy] of its file, such as "
                f"{rounded(counts.units)}"
            )


def _labels(job: JobConfig, data: Mapping[str, SiteCounts]) -> Iterator[str]:
    unseen = [c for k, c in enumerate(job.classes) if data and not any(d.positives[k] for d in data.values())]
    if unseen:
        few = ", ".join(map(repr, unseen[:5]))
        more = f" and {len(unseen) - 5} more" if len(unseen) > 5 else ""
        yield (
            f"no training picture of any site shows {few}{more}: correct the spelling, or list it under "
            "unseen_classes, which are scored and not trained"
        )


def _learning(job: JobConfig, data: Mapping[str, SiteCounts], plan: PrivacyPlan | None) -> Iterator[str]:
    privacy, training = job.privacy, job.training
    if plan is None or not data:
        return
    true = true_signal(job, data, plan)
    units = int(median(d.units for d in data.values()))
    worst = min(true, key=true.__getitem__) if true else ""
    poor = bool(worst) and true[worst] < POOR
    if poor:
        yield (
            f"the noise is far stronger than what can be learnt: best-case signal to noise of a step is "
            f"{true[worst]:.2g} at {worst} ({GOOD:g} and more is good, below {POOR:g} hardly anything is learnt): "
            f"allow more epsilon (now {privacy.epsilon:g}), train fewer numbers (model.trained), take fewer steps, or "
            "gather more records"
        )
    batch = privacy.sample_rate * min((d.units for d in data.values()), default=0)
    if batch < FEWEST:
        yield (
            f"privacy.sample_rate = {privacy.sample_rate:g} takes about {batch:.1f} records into a step at the "
            f"smallest site: with so few the noise decides; good is {FEWEST} or more, here a rate of "
            f"{min(1.0, FEWEST * privacy.sample_rate / batch if batch else 1.0):.2g} or more"
        )
    slow = training.optimizer == "sgd" and training.learning_rate * privacy.max_grad_norm < SLOWEST
    many = training.rounds * job.steps_per_round > 4 * _steps(units)
    profile = profile_for(units, private=True)
    if job.model.method == "fedmpt" and (slow or many or poor) and profile.unlike(job):
        why = "steps are too small to move anything" if slow else "so many steps leave little but noise" if many else ""
        settings = tomli_w.dumps(profile.unlike(job)).strip().replace("\n", "\n    ")
        yield (
            f"{why or 'other settings may learn more'}: with about {rounded(units)} records a site these did well "
            f"({profile.words}; stand-in towers; `fedmpt init` writes them):\n    {settings}"
        )


def true_signal(job: JobConfig, data: Mapping[str, SiteCounts], plan: PrivacyPlan) -> dict[str, float]:
    """By site, the best-case signal to noise of a step with the units that it has, not those that it declares."""
    trained = job.model.trained if job.model.method == "fedmpt" else "all"
    return {n: s.signal_to_noise[trained] * data[n].units / s.units for n, s in plan.sites.items() if n in data}


def _steps(units: int) -> int:
    training = profile_for(units, private=True).sections["training"]
    return training["rounds"] * training["local_steps"]
