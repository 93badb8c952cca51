"""A job's privacy at one site, end to end: ledger, accountants, self-test, noise.

`budget` decides; this module joins its decisions with the mechanism, so that no update exists that was not charged
first.
"""

import copy
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedmpt_core.common.release import PROGRAM
from fedmpt_core.config.job import JobConfig
from fedmpt_core.config.site import SiteConfig, SitePrivacyConfig
from fedmpt_core.data.pictures import Dataset
from fedmpt_core.model.base import TunedModel
from fedmpt_core.privacy.accounting.epsilon import cross_checked
from fedmpt_core.privacy.ledger.budget import Budget, PrivacyRefused, lasting, planned_steps
from fedmpt_core.privacy.ledger.chain import Entry, LedgerHead
from fedmpt_core.privacy.ledger.site_ledger import open_ledger
from fedmpt_core.privacy.mechanism.keystream import Keystream
from fedmpt_core.privacy.mechanism.machinery import REAL, Machinery
from fedmpt_core.privacy.mechanism.mechanism import Mechanism
from fedmpt_core.privacy.mechanism.noise import PrivateOptimizer
from fedmpt_core.privacy.mechanism.placement import block_rows, depends_on_place, device_of
from fedmpt_core.privacy.mechanism.private_update import private_update
from fedmpt_core.privacy.mechanism.self_test import ROWS, Trainer, require_self_test
from fedmpt_core.training.local import LocalUpdate, TrainingRecords

PAIRS = 5  # pictures in two splits that a refusal names


class ChargedTraining:
    """The ledger and the mechanism of one job at one site.

    Attributes:
        mechanism: what is charged, run and tested.
        machinery: what does its steps.
        keystream: the run's secret randomness, which the ledger's entries commit to.
    """

    def __init__(
        self, job: JobConfig, policy: SitePrivacyConfig, budget: Budget, machinery: Machinery, micro_batch: int
    ) -> None:
        """Use `open`."""
        self._job, self._policy, self._budget, self._micro_batch = job, policy, budget, micro_batch
        self.mechanism, self.machinery = budget.mechanism, machinery
        self.keystream = machinery.keystream()
        self._records: Sequence[str] = ()
        self._claimed = False
        self._tested_on: torch.device | None = None
        self._details: dict[str, Any] = {}

    @staticmethod
    def open(
        job: JobConfig,
        site: SiteConfig,
        name: str,
        run_id: str,
        kit: Path | None,
        *,
        mechanism: Mechanism | None = None,
        machinery: Machinery = REAL,
    ) -> "ChargedTraining":
        """Open the site's ledger, check the whole job against it, and hold what the job plans until `end`.

        Args:
            job: the agreed job.
            site: what the site has and allows.
            name: of the site.
            run_id: name of the run in the ledger.
            kit: folder with the key that signs the ledger; None in a simulation.
            mechanism: what is charged, run and tested; None is the job's. A test puts one here that lies.
            machinery: what does the steps.

        Raises:
            PrivacyRefused: the job does not fit the policy or what is left.
            LedgerError: the ledger is missing or cannot be trusted.
            AccountingError: the two accountants disagree on the plan.
        """
        policy = site.privacy
        if policy is None:
            raise PrivacyRefused("this site has no privacy policy (a [privacy] table in its site file)")
        ledger = open_ledger(policy, name, kit)
        budget = Budget(job, site, ledger, run_id, mechanism)
        cross_checked([budget.mechanism.steps(planned_steps(job))], job.privacy.delta)
        budget.hold(lasting(job))
        return ChargedTraining(job, policy, budget, machinery, site.micro_batch)

    def test_mechanism(self, model: TunedModel) -> None:
        """Run the self-test and note the mechanism for the ledger. Raises SelfTestFailed."""
        engine, optimizer = self.machinery.round(
            self.mechanism, model, self._job, 1, self._policy.units, self.keystream
        )
        self._details = {
            "trained": list(model.trainable_parameters()),
            "released": sum(prod(p.shape) for p in engine.private.values()),
            "noise_std": optimizer.noise_stds(),
            "expected_batch_size": optimizer.expected_batch_size,
            "grid_bits": self.mechanism.grid_bits,
            "rng": self.keystream.name,
            "rng_key_id": self.keystream.key_id,
            "aggregation": "masked" if self._job.secagg.masked else "unmasked",
            "identities": "insecure" if self._job.secagg.insecure_identities else "start-up kits",
            "config": self._job.digest(),
            "code": PROGRAM,
        }
        own = Trainer(self._policy.units, lambda *parts: self._with(*parts).train)
        require_self_test(model, self._job, self.mechanism, self.machinery, own)
        self._test_places(model)

    def _test_places(self, model: TunedModel) -> None:
        """One record at a time from now on where a gradient depends on those beside it, on the model's device."""
        self._tested_on = device_of(model)
        try:
            rows = block_rows(self.mechanism.sample_rate * self._policy.units, self._micro_batch)
            where = depends_on_place(model, self._job, rows, self.machinery) if rows > 1 else ""
        except torch.OutOfMemoryError:
            where = "beside others, for which its memory does not suffice,"
        if where:
            self._micro_batch = 1
            logging.getLogger(__name__).warning(
                "this machine's arithmetic gives %s another gradient than alone, so that leaving one record out would "
                "change others: gradients are computed one record at a time, which takes longer",
                where,
            )

    def _with(self, mechanism: Mechanism, machinery: Machinery, keystream: Keystream) -> "ChargedTraining":
        """The same way to an update with other parts, which the self-test looks into."""
        rehearsed = copy.copy(self)
        rehearsed.mechanism, rehearsed.machinery, rehearsed.keystream = mechanism, machinery, keystream
        rehearsed._micro_batch = min(ROWS, self._micro_batch)
        return rehearsed

    def know_records(self, digests: Sequence[str]) -> None:
        """Note the training records' digests. Raises LedgerError when some were trained on under another name."""
        self._budget.records.check(digests)
        self._records, self._claimed = digests, False

    def check_head(self, head: LedgerHead) -> None:
        """Raises PrivacyRefused when the ledger no longer holds an entry that the server has seen."""
        self._budget.check_head(head)

    def reserve(self, round_number: int, attempt: int) -> Entry:
        """Charge a round before it starts. Raises PrivacyRefused or LedgerError."""
        if not self._claimed:
            self._budget.records.claim(self._records)
            self._claimed = True
        records = self._budget.records.fingerprint(self._records, self._budget.id)
        return self._budget.reserve(round_number, attempt, {**self._details, "records": records})

    def end(self) -> None:
        """The job asks for no more: what it holds and was not charged is free for others. Raises LedgerError."""
        self._budget.free()

    def train(
        self,
        model: TunedModel,
        records: TrainingRecords,
        *,
        state: np.ndarray,
        round_number: int,
        plant: Callable[[PrivateOptimizer], None] | None = None,
    ) -> LocalUpdate:
        """The noisy update of a reserved round; see `private_update`."""
        if self._tested_on not in (None, device_of(model)):
            self._test_places(model)
        return private_update(
            model,
            records,
            state=state,
            round_number=round_number,
            job=self._job,
            mechanism=self.mechanism,
            declared_units=self._policy.units,
            keystream=self.keystream,
            machinery=self.machinery,
            micro_batch=self._micro_batch,
            plant=plant,
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


def require_apart(train: Dataset, digests: Sequence[str], judged: Mapping[str, tuple[Dataset, Sequence[str]]]) -> None:
    """That no picture is both trained on and judged: figures on val and test leave the site exactly as they are.

    Args:
        train: R training records.
        digests: SHA-256 of their pictures' bytes.
        judged: records and digests of `val` and `test`, where the site has them.

    Raises:
        ValueError: a picture's bytes are in both; names the first pairs of files. For the site's own eyes.
    """
    trained = dict(zip(digests, train.pictures, strict=True))
    pairs = [
        f"{trained[digest].name} (train) is {picture.name} ({split})"
        for split, (dataset, others) in judged.items()
        for digest, picture in zip(others, dataset.pictures, strict=True)
        if digest in trained
    ]
    if pairs:
        raise ValueError(
            f"{len(pairs)} pictures are in training and, byte for byte, in val or test, whose figures are not private: "
            f"{'; '.join(pairs[:PAIRS])}{' ...' if len(pairs) > PAIRS else ''}; take them out of one split"
        )
