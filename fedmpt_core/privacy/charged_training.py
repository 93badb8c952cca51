"""A job's privacy at one site, end to end: ledger, accountants, self-test, noise.

`budget` decides; this module joins its decisions with the mechanism, so that no update exists that was not charged
first.
"""

import hashlib
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from fedmpt_core.common.release import PROGRAM
from fedmpt_core.config.job import JobConfig
from fedmpt_core.config.site import SiteConfig, SitePrivacyConfig
from fedmpt_core.data.pictures import Dataset
from fedmpt_core.model.base import TunedModel
from fedmpt_core.model.features.cache import PatchFeatures
from fedmpt_core.privacy.accounting.epsilon import cross_checked
from fedmpt_core.privacy.ledger.budget import Budget, PrivacyRefused, planned_steps, steps_of
from fedmpt_core.privacy.ledger.chain import Entry, LedgerHead
from fedmpt_core.privacy.ledger.fingerprint import fingerprint, site_key
from fedmpt_core.privacy.ledger.site_ledger import open_ledger
from fedmpt_core.privacy.mechanism.keystream import Keystream
from fedmpt_core.privacy.mechanism.noise import GRID_BITS
from fedmpt_core.privacy.mechanism.private_update import mechanism, private_update
from fedmpt_core.privacy.mechanism.self_test import require_self_test
from fedmpt_core.training.local import LocalUpdate, StepRecord

FINGERPRINT_KEY = "fingerprint.key"


class ChargedTraining:
    """The ledger and the mechanism of one job at one site."""

    def __init__(self, job: JobConfig, policy: SitePrivacyConfig, budget: Budget) -> None:
        """Use `open`."""
        self._job, self._policy, self._budget = job, policy, budget
        self._keystream = Keystream()
        self._fingerprint = ""
        self._mechanism: dict[str, Any] = {}

    @staticmethod
    def open(job: JobConfig, site: SiteConfig, name: str, run_id: str, kit: Path | None) -> "ChargedTraining":
        """Open the site's ledger and check the whole job against it.

        Raises:
            PrivacyRefused: the job does not fit the policy or what is left.
            LedgerError: the ledger is missing or cannot be trusted.
            AccountingError: the two accountants disagree on the plan.
        """
        policy = site.privacy
        if policy is None:
            raise PrivacyRefused("this site has no privacy policy (a [privacy] table in its site file)")
        ledger = open_ledger(policy, name, kit)
        budget = Budget(job, site, ledger, run_id)
        cross_checked([steps_of(job, planned_steps(job))], job.privacy.delta)
        return ChargedTraining(job, policy, budget)

    @property
    def declared_units(self) -> int:
        """The site's public number of units."""
        return self._policy.units

    @property
    def keystream(self) -> Keystream:
        """The run's secret randomness, which the ledger's entries commit to."""
        return self._keystream

    def test_mechanism(self, model: TunedModel) -> None:
        """Run the self-test and note the mechanism for the ledger. Raises SelfTestFailed."""
        engine, optimizer = mechanism(model, self._job, 1, self._policy.units, self._keystream)
        privacy = self._job.privacy
        self._mechanism = {
            "mechanism": "poisson-subsampled-gaussian",
            "unit": privacy.unit,
            "engine": privacy.engine,
            "trained": list(model.trainable_parameters()),
            "released": sum(prod(p.shape) for p in engine.private.values()),
            "noise_std": optimizer.noise_stds(),
            "max_grad_norm": dict(privacy.group_norms) or privacy.max_grad_norm,
            "expected_batch_size": optimizer.expected_batch_size,
            "grid_bits": GRID_BITS,
            "rng": self._keystream.name,
            "rng_key_id": self._keystream.key_id,
            "aggregation": "masked" if self._job.secagg.masked else "unmasked",
            "identities": "insecure" if self._job.secagg.insecure_identities else "start-up kits",
            "config": self._job.digest(),
            "code": PROGRAM,
        }
        require_self_test(model, self._job)

    def know_records(self, digests: Sequence[str]) -> None:
        """Note the keyed fingerprint of the training records."""
        key = site_key(Path(self._policy.ledger) / FINGERPRINT_KEY)
        self._fingerprint = fingerprint(digests, key)

    def check_head(self, head: LedgerHead) -> None:
        """Raises PrivacyRefused when the ledger no longer holds an entry that the server has seen."""
        self._budget.check_head(head)

    def reserve(self, round_number: int, attempt: int) -> Entry:
        """Charge a round before it starts. Raises PrivacyRefused or LedgerError."""
        return self._budget.reserve(round_number, attempt, {**self._mechanism, "records": self._fingerprint})

    def train(
        self,
        model: TunedModel,
        features: PatchFeatures,
        targets: np.ndarray,
        units: np.ndarray,
        *,
        state: np.ndarray,
        round_number: int,
        on_step: Callable[[StepRecord], None] | None,
    ) -> LocalUpdate:
        """The noisy update of a reserved round; see `private_update`."""
        return private_update(
            model,
            features,
            targets,
            units,
            state=state,
            round_number=round_number,
            job=self._job,
            declared_units=self._policy.units,
            keystream=self._keystream,
            on_step=on_step,
        )

    def commit(self, reservation: Entry, block: bytes) -> dict[str, Any]:
        """Note what leaves; returns what the server is told."""
        self._budget.commit(reservation, hashlib.sha256(block).hexdigest())
        return {
            "epsilon": self._budget.spent(),
            "delta": self._job.privacy.delta,
            "head": self._budget.head().to_dict(),
        }


def units_of(train: Dataset, unit: str, judged: Sequence[Dataset | None]) -> np.ndarray:
    """The unit of each training record, (R,) int64 from 0 without gaps.

    Args:
        train: R training records.
        unit: `record` or `group`.
        judged: val and test records of the site, whose figures leave it exactly as they are.

    Raises:
        ValueError: groups are asked for and not given, or one group is in training and in val or test.
    """
    if unit == "record":
        return np.arange(len(train))
    if train.groups is None or not all(train.groups):
        raise ValueError(
            "privacy.unit='group' needs a group for every training record: fill the manifest's group column"
        )
    names, units = np.unique(np.array(train.groups), return_inverse=True)
    for dataset in judged:
        shared = set(names) & set(dataset.groups or ()) if dataset is not None else set()
        if shared:
            raise ValueError(
                f"{len(shared)} groups are in training and in val or test, the first is {min(shared)!r}: a group's "
                "records must all be in one split, as figures on val and test are not private"
            )
    return units.astype(np.int64)
