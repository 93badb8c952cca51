"""A site's half of secure aggregation in a job: config, identity, record on disk, encoding and protocol in one place.

Bytes of the carrier go in and come out. The update of a round is masked here and nowhere else; it is kept only until
the round's survivors are signed, so that a repeated attempt needs no second training.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from fedmpt_core.config.job import JobConfig
from fedmpt_core.config.site import SiteConfig
from fedmpt_core.federation.site.latch_file import latch_path, read_latch, write_latch
from fedmpt_core.federation.site.states import StateRefused, States
from fedmpt_core.federation.terms import secure_terms
from fedmpt_core.model.vector import ParameterLayout
from fedmpt_core.secagg.client import SecAggClient
from fedmpt_core.secagg.context import model_digest
from fedmpt_core.secagg.errors import Abort, SecAggError
from fedmpt_core.secagg.identity import SiteIdentity
from fedmpt_core.secagg.start_up_kit import load_identity, load_root, load_roster


@dataclass(frozen=True)
class _Pending:
    number: int  # of the protocol's round: in another one the same update could be in a second sum
    round: int
    model: bytes
    words: np.ndarray
    release: str


class MaskedUpdates:
    """One site in one masked job. Lives in the process that talks to the server, not in the one that trains.

    Attributes:
        states: which global parameters it takes.
    """

    def __init__(
        self,
        job: JobConfig,
        site: SiteConfig,
        *,
        name: str,
        run_id: str,
        kit: Path | None,
        layout: ParameterLayout,
        initial: bytes,
        backbone_digest: str,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Loads keys and roster, and what the site has said in this run before.

        Args:
            job: the agreed job.
            site: what the site has and allows; `admission.check_site` let the job in.
            name: the site's name in the federation.
            run_id: name of the run, the same at all sites.
            kit: the FLARE start-up kit; None in a simulation.
            layout: of the trained tensors.
            initial: the site's own initial parameters in wire bytes.
            backbone_digest: SHA-256 hex of the frozen weights.
            clock: seconds since 1970.

        Raises:
            SecAggError: keys, roster or record cannot be used.
        """
        self._job, self._layout = job, layout
        terms, self._encoding = secure_terms(job, run_id, layout, backbone_digest)
        identity = load_identity(kit) if kit else SiteIdentity.ephemeral(name)
        if identity.name != name:
            raise SecAggError(Abort.BAD_CERT, f"the start-up kit is of {identity.name}, the site is {name}")
        path = latch_path(site, run_id)
        self._client = SecAggClient(
            terms,
            identity,
            load_roster(Path(site.secagg.roster)) if kit else None,
            load_root(kit) if kit else None,
            read_latch(path),
            lambda latch: write_latch(path, latch),
            clock=clock,
        )
        self.states = States(job, layout, initial)
        self._asked: tuple[int, int, bytes] = (0, 0, b"")
        self._pending: _Pending | None = None

    def advertise(self, request: bytes) -> bytes:
        """Keys of a new epoch. Raises SecAggError."""
        return self._client.advertise(request)

    def confirm(self, request: bytes) -> bytes:
        """Check everybody's keys and sign the directory. Raises SecAggError."""
        return self._client.confirm(request)

    def begin(self, request: bytes, round_number: int, block: bytes) -> bytes | None:
        """Start a round.

        Args:
            request: RND1.
            round_number: of training, `job.first_round` to `training.rounds`.
            block: the global parameters in wire bytes.

        Returns:
            The masked update, where the site still has an update for these parameters; None when it must be trained.

        Raises:
            SecAggError: the protocol or the site's bound on parameters refuses the round.
            LayoutError: the parameters are not of the job's layout, or not finite.
        """
        digest = model_digest(self._layout.split(self._layout.decode(block)))
        masked = self._client.begin(request, digest)
        if masked is not None:
            return masked
        try:
            self.states.before(round_number, block)
        except StateRefused as refused:
            self._client.leave()
            raise SecAggError(Abort.POLICY, str(refused)) from None
        self._asked = self._client.round, round_number, digest
        held = self._pending
        if held and (held.number, held.round, held.model) == self._asked:
            return self._client.mask(held.words, held.release)
        self._pending = None
        return None

    def mask(self, block: bytes, weight: float, metrics: Mapping[str, float]) -> bytes:
        """The masked update of the round that `begin` has opened.

        Args:
            block: the update in wire bytes.
            weight: this site's weight, at most `secagg.max_weight`.
            metrics: figures of training; those that the job names are summed, others stay here.

        Raises:
            SecAggError: a number is not finite, the weight too large, or no round is open.
        """
        largest = self._job.secagg.max_weight if self._job.federation.weighting == "records" else 1
        if largest is None or weight > largest:
            raise SecAggError(Abort.OVERFLOW, f"this site's weight is above secagg.max_weight={largest} of the job")
        chosen = {name: metrics[name] for name in self._job.secagg.metrics}
        words = self._encoding.encode(self._layout.decode(block), weight / largest, chosen).words
        release = sha256(block).hexdigest()
        masked = self._client.mask(words, release)
        self._pending = _Pending(*self._asked, words, release)
        return masked

    def consistency(self, request: bytes) -> bytes:
        """Sign the list of survivors; from here on the update is never masked again. Raises SecAggError."""
        signed = self._client.consistency(request)
        self._pending = None
        return signed

    def unmask(self, request: bytes) -> bytes:
        """Shares that open the one signed sum. Raises SecAggError."""
        return self._client.unmask(request)

    def abort(self, error: SecAggError) -> bytes:
        """What the server is told of a refusal; may be empty."""
        return self._client.abort(error)
