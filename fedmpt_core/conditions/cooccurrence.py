"""A site's co-occurrence counts of labels, released once under differential privacy, to steer which pairs are asked.

Off unless a site chooses to. With P = C(C-1)/2 pairs, the vector x_u of a unit u (a record, or a group of records) has
a one for every pair of labels that occurs in one of its records:

    release = gamma * ( sum_u floor( min(1, G / |x_u|) x_u / gamma ) + round( noise_multiplier * G / gamma * Z ) )

Z is standard normal from a `Keystream`. Rounding towards zero keeps every unit's vector within norm G, so adding or
removing a unit moves the sum, an exact sum of integers, by at most G: this is the Gaussian mechanism with that noise
multiplier (sample_rate 1, one step), rounded afterwards. gamma = G * 2^-20 puts every number on a public grid.

Every release is reserved in the site's ledger before it is made and committed with the SHA-256 of its bytes. It is not
masked: whoever gets the file sees this site's noisy counts. People carry it; nothing sends it.
"""

import hashlib
import json
import secrets
from collections.abc import Sequence
from math import comb, floor, sqrt
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from fedmpt_core.common.files import WriteError, write_whole
from fedmpt_core.common.release import PROGRAM
from fedmpt_core.config.checks import checked
from fedmpt_core.config.federation import FederationConfig
from fedmpt_core.config.job import JobConfig, PrivacyConfig, TrainingConfig
from fedmpt_core.config.secagg import SecAggConfig
from fedmpt_core.config.site import SiteConfig
from fedmpt_core.config.toml import ConfigError, build
from fedmpt_core.data.source import load_split
from fedmpt_core.privacy.accounting.epsilon import cross_checked, epsilon
from fedmpt_core.privacy.charged_training import units_of
from fedmpt_core.privacy.ledger.budget import Budget, PrivacyRefused, Projection
from fedmpt_core.privacy.ledger.site_ledger import open_ledger
from fedmpt_core.privacy.mechanism.keystream import Keystream
from fedmpt_core.privacy.mechanism.mechanism import COUNTS, GRID_BITS, Mechanism

SCHEMA_VERSION = 1
PURPOSE = "co-occurrence"
KIND = "fedmpt co-occurrence counts"
LARGEST_NORM = 1000.0
LARGEST_FILE = 256 << 20  # bytes; 2000 classes are 40 MB


class CountsError(ValueError):
    """A file of counts cannot be used; the sentence says why."""


@checked
class NoisyCounts:
    """What one site released."""

    site: str
    """Its name."""
    classes: tuple[str, ...]
    """C labels."""
    counts: tuple[float, ...]
    """P numbers, pair (0, 1), (0, 2), ..., (1, 2), ...; may be negative."""
    unit: Literal["record", "group"]
    """What was protected."""
    max_norm: Annotated[float, Field(gt=0, le=LARGEST_NORM)]
    """G, bound on the norm of one unit's vector."""
    noise_multiplier: Annotated[float, Field(gt=0, le=10_000)]
    """Standard deviation of the noise over G."""
    ledger: str
    """Name of the release in the site's ledger."""
    sha256: str
    """Of the file, hex; what the ledger's commit names."""

    def __post_init__(self) -> None:
        """Raises ValueError when a field is impossible."""
        if len(self.classes) < 2 or len(set(self.classes)) != len(self.classes):
            raise ValueError("classes: give at least 2, each once")
        if len(self.counts) != comb(len(self.classes), 2):
            raise ValueError(f"counts has {len(self.counts)} numbers, {comb(len(self.classes), 2)} pairs exist")

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise in each count."""
        return self.noise_multiplier * self.max_norm

    def facts(self) -> dict[str, Any]:
        """What a list of conditions says of it: everything but the counts."""
        return {k: v for k, v in vars(self).items() if k not in ("counts", "classes")}


class CountRelease:
    """One release of a site's counts: checked against policy and ledger, then made."""

    def __init__(
        self,
        site: SiteConfig,
        name: str,
        kit: Path | None,
        classes: Sequence[str],
        *,
        noise_multiplier: float,
        max_norm: float = 1.0,
        seed: int = 0,
        in_clear: bool = False,
    ) -> None:
        """Checks everything; reads no label and charges nothing.

        Args:
            site: what the site has and allows.
            name: of the site.
            kit: its startup folder, whose key signs the ledger; None in a simulation.
            classes: C labels of the job that is to come.
            noise_multiplier: > 0.
            max_norm: G, (0, 1000]; 1 lets a picture with many pairs weigh no more than one with a single pair.
            seed: of the job; decides which pictures a simulated site has.
            in_clear: whether the site agrees that counts leave it without a mask, although its policy asks for masks.

        Raises:
            PrivacyRefused: the policy or what is left of the budget does not allow it.
            LedgerError: the ledger is missing or cannot be trusted.
            ValueError: an argument out of range.
        """
        policy = site.privacy
        if policy is None:
            raise PrivacyRefused("this site has no privacy policy (a [privacy] table in its site file)")
        if not (in_clear or site.secagg.allow_unmasked):
            raise PrivacyRefused(
                "this site lets nothing leave without a mask (secagg.allow_unmasked = false), and counts in a file "
                "have none, only their noise: agree to that with --in-clear"
            )
        if not 0 < max_norm <= LARGEST_NORM:
            raise ValueError(f"max_norm={max_norm} is out of range: allowed is (0, {LARGEST_NORM:g}]")
        mechanism = Mechanism(policy.unit, 1.0, noise_multiplier, max_norm, 1, name=COUNTS)
        one = [mechanism.steps()]
        self._job = JobConfig(
            name=PURPOSE,
            classes=tuple(classes),
            seed=seed,
            training=TrainingConfig(rounds=1, local_steps=1),
            privacy=PrivacyConfig(
                unit=policy.unit,
                epsilon=epsilon(one, policy.delta),
                delta=policy.delta,
                sample_rate=1.0,
                noise_multiplier=noise_multiplier,
                max_grad_norm=max_norm,
            ),
            secagg=SecAggConfig(mechanism="none"),
            federation=FederationConfig(min_sites=policy.min_sites, max_failed_rounds=0),
        )
        cross_checked(one, policy.delta)
        self._site, self._policy, self._name, self._kit = site, policy, name, kit
        self._id = f"{PURPOSE}-{secrets.token_hex(8)}"
        self._max_norm, self._noise = max_norm, mechanism.noise_multiplier
        self._budget = Budget(self._job, site, open_ledger(policy, name, kit), self._id, mechanism)

    @property
    def projection(self) -> Projection:
        """What the ledger will show afterwards."""
        return self._budget.projection

    def make(self) -> bytes:
        """Charge, count, add noise, commit.

        Returns:
            The file's bytes, for `read_counts`.

        Raises:
            PrivacyRefused: the budget does not allow it any more; nothing was charged.
            LedgerError: the ledger cannot be written.
            ValueError: the site's data cannot be used; nothing was charged.
        """
        train = load_split(self._job, self._site.data, "train")
        if train is None:
            raise ValueError("the site holds no training picture, so there is nothing to count")
        units = units_of(train, self._policy.unit, ())
        digests = [picture.digest() for picture in train.pictures]
        self._budget.records.claim(digests)
        keystream = Keystream()
        pairs = comb(len(train.classes), 2)
        reservation = self._budget.reserve(
            1,
            0,
            {
                "released": pairs,
                "noise_std": [self._noise * self._max_norm],
                "grid_bits": GRID_BITS,
                "rng": keystream.name,
                "rng_key_id": keystream.key_id,
                "aggregation": "unmasked",
                "identities": "start-up kits" if self._kit else "insecure",
                "config": self._job.digest(),
                "code": PROGRAM,
                "records": self._budget.records.fingerprint(digests, self._id),
            },
        )
        counts = noisy_counts(train.targets, units, self._max_norm, self._noise, keystream)
        content = {
            "schema": SCHEMA_VERSION,
            "kind": KIND,
            "site": self._name,
            "classes": list(train.classes),
            "counts": counts.tolist(),
            "unit": self._policy.unit,
            "max_norm": self._max_norm,
            "noise_multiplier": self._noise,
            "ledger": self._id,
        }
        data = (json.dumps(content, allow_nan=False) + "\n").encode()
        self._budget.commit(reservation, hashlib.sha256(data).hexdigest())
        return data


def noisy_counts(
    targets: np.ndarray, units: np.ndarray, max_norm: float, noise_multiplier: float, keystream: Keystream
) -> np.ndarray:
    """The mechanism, without the ledger.

    Args:
        targets: (R, C) in {0, 1}.
        units: (R,) int64 unit of each record, from 0 without gaps.
        max_norm: G > 0.
        noise_multiplier: > 0.
        keystream: secret randomness.

    Returns:
        (P,) float64 on the grid.

    Edge cases: no record, or none with two labels -> noise alone.
    """
    grid = max_norm * 2.0**-GRID_BITS
    total = clipped_counts(targets, units, max_norm)
    noise = np.rint(noise_multiplier * 2.0**GRID_BITS * keystream.normals(PURPOSE, len(total)))
    return (total + noise) * grid


def clipped_counts(targets: np.ndarray, units: np.ndarray, max_norm: float) -> np.ndarray:
    """The exact clipped sum in units of gamma, (P,) int64; arguments as in `noisy_counts`.

    Guarantees: a unit's part has a norm of at most 2^20 (that is G), and does not depend on any other unit.
    """
    classes = targets.shape[1]
    first, second = np.triu_indices(classes, 1)
    at = np.zeros((classes, classes), np.int64)
    at[first, second] = np.arange(len(first))
    total = np.zeros(len(first), np.int64)
    order = np.argsort(units, kind="stable")
    for rows in np.split(order, np.cumsum(np.bincount(units))[:-1]) if len(units) else ():
        of_unit = []
        for row in rows:
            labels = np.flatnonzero(targets[row])
            of_unit.append(at[labels[:, None], labels][np.triu_indices(len(labels), 1)])
        pairs = np.unique(np.concatenate(of_unit))
        if len(pairs):
            total[pairs] += floor(2**GRID_BITS * min(1 / max_norm, 1 / sqrt(len(pairs))))
    return total


def read_counts(path: Path) -> NoisyCounts:
    """A file of counts, strictly.

    Raises:
        CountsError: missing, damaged, of a later schema, or numbers out of range.
    """
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise CountsError(f"{path}: has more than {LARGEST_FILE} bytes: it is no file of counts")
        data = path.read_bytes()
        content = json.loads(data)
        if not isinstance(content, dict) or content.get("kind") != KIND:
            raise CountsError(f"{path}: is no file of `fedmpt conditions counts`")
        if content.get("schema") != SCHEMA_VERSION:
            raise CountsError(f"{path}: schema={content.get('schema')}: this release reads {SCHEMA_VERSION}")
        if "sha256" in content:
            raise CountsError(f"{path}: is damaged: unknown key 'sha256': no file holds its own digest")
        plain = {k: v for k, v in content.items() if k not in ("kind", "schema")}
        return build(NoisyCounts, plain | {"sha256": hashlib.sha256(data).hexdigest()}, str(path))
    except OSError as error:
        raise CountsError(f"{path}: cannot be read ({error.strerror})") from None
    except (ConfigError, RecursionError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CountsError(f"{path}: is damaged: {error}") from None


def write_counts(data: bytes, path: Path) -> None:
    """Put a release where it is to lie, all of it or nothing. Raises CountsError when the file exists or cannot be."""
    try:
        write_whole(path, data, mode=0o644, replace=False)
    except FileExistsError:
        raise CountsError(f"{path}: exists: name a new file; the release is charged, and has to be made anew") from None
    except WriteError as error:
        raise CountsError(f"{path}: cannot be written ({error.strerror}); the release is charged") from None


def steering_weights(counts: Sequence[NoisyCounts], classes: Sequence[str]) -> np.ndarray | None:
    """How strongly each pair is wanted: the sites' sum, less one standard deviation of its noise, at least 0.

    Args:
        counts: each site once.
        classes: C labels, the same as theirs in any order.

    Returns:
        (C, C) symmetric float64 with a zero diagonal; None without counts. It is made of released numbers only, so it
        costs no privacy.

    Raises:
        CountsError: counts of other classes, or a site twice.
    """
    if not counts:
        return None
    names = [one.site for one in counts]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise CountsError(f"counts of {', '.join(twice)} are given twice: give one file for each site")
    first, second = np.triu_indices(len(classes), 1)
    total = np.zeros(len(first))
    for one in counts:
        if set(one.classes) != set(classes):
            strange = sorted(set(one.classes) ^ set(classes))
            raise CountsError(f"the counts of {one.site} are of other classes ({', '.join(strange[:5])})")
        own = np.zeros((len(classes), len(classes)))
        own[np.triu_indices(len(classes), 1)] = one.counts
        place = [one.classes.index(c) for c in classes]
        total += (own + own.T)[np.ix_(place, place)][first, second]
    noise = sqrt(sum(one.noise_std**2 for one in counts))
    weights = np.zeros((len(classes), len(classes)))
    weights[first, second] = np.maximum(total - noise, 0)
    return weights + weights.T
