"""The text of a first job and of its sites: short, with the settings that suit the data, and a word on each."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import tomli_w

from fedmpt_core.config.profiles import Profile, profile_for
from fedmpt_core.secagg.policy import LEAST_COHORT


@dataclass(frozen=True)
class SiteStart:
    """What is known of a site before it has a file.

    Attributes:
        name: of the site.
        manifest: path of its manifest.
        root: folder that its pictures lie in where the manifest's does not hold them; else empty.
        train: training pictures.
        judges: whether it has test pictures.
    """

    name: str
    manifest: str
    root: str
    train: int
    judges: bool


def rounded(units: int) -> int:
    """A number of units as a site may declare it: two leading digits at most, tens below 1000; at least 1."""
    digits = max(1, len(str(units)) - 2) if units >= 10 else 0
    return max(1, round(units, -digits))


def starter_job(name: str, labels: Sequence[str], sites: Sequence[SiteStart], epsilon: float | None) -> str:
    """The text of a `job.toml`.

    Args:
        name: of the job.
        labels: C of them.
        sites: that take part.
        epsilon: most that the job may spend at a site; None trains without differential privacy.
    """
    profile = profile_for(int(median(site.train for site in sites)), private=epsilon is not None)
    privacy = (
        'mechanism = "none"   # every site allows it in its own file (allow_unprotected)\n'
        if epsilon is None
        else f"epsilon = {epsilon:g}   # most that this job may spend at a site, failed attempts included\n"
        "delta = 1e-5    # below 1 / number of training pictures\n"
    )
    masked = len(sites) >= LEAST_COHORT
    secagg = (
        "# secure aggregation is on; simulated sites have no keys: fedmpt simulate ... --insecure-identities\n"
        if masked
        else 'mechanism = "none"   # fewer than three sites cannot hide: the server sees every update\n'
    )
    return (
        f"# Settings for {profile.words}.\n# All keys: `fedmpt check --schema`.\n"
        f"name = {_value(name)}\n"
        f"seed = 0\n"
        f"classes = {_value(list(labels))}   # words that a text model understands\n"
        f"\n[backbone]\n"
        f'kind = "embedded"   # a stand-in that runs at once, without CLIP\n'
        f'# kind = "open_clip"           # for real work: CLIP, whose weights are fetched on first use;\n'
        f'# architecture = "ViT-B-16"    # take the five settings of [model] from similarity_scale on away then,\n'
        f'# weights = "openai"           # and compare learning rates with `fedmpt bench --tune`\n'
        f"\n[model]\n"
        f'conditions = ["color", "background", "pose"]\n{_lines(profile, "model")}'
        f"\n[training]\n{_lines(profile, 'training')}"
        f"\n[privacy]\n{privacy}{_lines(profile, 'privacy')}"
        f"\n[secagg]\n{secagg}"
        f"\n[federation]\n"
        f"min_sites = {len(sites) if len(sites) <= LEAST_COHORT else max(LEAST_COHORT, len(sites) - 1)}\n"
        f"max_failed_rounds = 1   # attempts that may fail, planned and paid for\n"
    )


def starter_sites(sites: Sequence[SiteStart], epsilon: float | None) -> str:
    """The text of a `site.toml`; arguments as in `starter_job`."""
    parts = [
        "# What each simulated site has. A real site keeps the same keys, without [defaults] and [sites.*], in\n"
        "# its own local/fedmpt_site.toml; nothing in it is ever sent. Relative paths start from this file's folder.\n"
        "[defaults]\n"
        "threads = 1   # all sites share this machine\n"
        "\n[defaults.privacy]\n"
        'dataset = "pictures"   # name in the ledger: the same pictures must always go by the same name\n'
        f"epsilon = {epsilon or 8:g}   # most that all jobs together may ever spend on them\n"
        "delta = 1e-5\n"
    ]
    if epsilon is None:
        parts.append("allow_unprotected = true   # lets jobs train without differential privacy\n")
    if len(sites) < LEAST_COHORT:
        parts.append("min_sites = 1\n\n[defaults.secagg]\n")
        parts.append("allow_unmasked = true   # shows this site's updates to the server\n")
    for site in sites:
        root = f"root = {_value(site.root)}   # its paths may lead anywhere in here\n" if site.root else ""
        judges = "true    # its figures on val and test pictures leave it, exact" if site.judges else "false"
        parts.append(
            f"\n[sites.{site.name}.data]\n"
            f"path = {_value(site.manifest)}   # columns path, labels, split, optional group\n"
            f"{root}evaluate = {judges}\n"
            f"\n[sites.{site.name}.privacy]\n"
            f"units = {rounded(site.train)}   # declared, rounded number of training pictures\n"
        )
    return "".join(parts)


def _lines(profile: Profile, section: str) -> str:
    return "".join(f"{key} = {_value(value)}\n" for key, value in profile.sections.get(section, {}).items())


def _value(value: object) -> str:
    """As TOML writes it, on one line."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_value(v)}" for key, v in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    return tomli_w.dumps({"x": value}).removeprefix("x = ").strip()
