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
from fedmpt_core.federation.site.latch_file import latch_path, open_latch, write_latch
from fedmpt_core.federation.site.states import StateRefused, States
from fedmpt_core.federation.terms import secure_terms
from fedmpt_core.model.vector import ParameterLayout
from fedmpt_core.secagg.client import SecAggClient
from fedmpt_core.secagg.context import model_digest
from fedmpt_core.secagg.encoding import Integers
from fedmpt_core.secagg.errors import Abort, SecAggError, UnexpectedMessage
from fedmpt_core.secagg.identity import SiteIdentity
from fedmpt_core.secagg.messages import RoundRequest
from fedmpt_core.secagg.start_up_kit import load_identity, load_root, load_roster


@dataclass(frozen=True)
class _Held:
    round: int
    model: bytes
    words: np.ndarray
    release: str


class MaskedUpdates:
    """One site in one masked job. Lives in the process that talks to the server, not in the one that trains.

    Attributes:
        states: which global parameters it takes.
        clamped: numbers of the newest update that were cut off. They follow from the data, so the site's owner alone is
            told.
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
            open_latch(site, run_id, job.continued),
            lambda latch: write_latch(path, latch),
            clock=clock,
        )
        self.states, self.clamped = States(job, layout, initial), 0
        self._begun: tuple[int, bytes] = (0, b"")
        self._held: _Held | None = None

    def advertise(self, request: bytes) -> bytes:
        """Keys of a new epoch. Raises SecAggError."""
        return self._client.advertise(request)

    def deal(self, request: bytes) -> bytes:
        """Check everybody's keys, and share this site's secrets with all. Raises SecAggError."""
        return self._client.deal(request)

    def confirm(self, request: bytes) -> bytes:
        """Check everybody's shares and sign what was checked. Raises SecAggError."""
        return self._client.confirm(request)

    def show(self, request: bytes) -> bytes:
        """Show what was dealt to sites that complain of it. Raises SecAggError."""
        return self._client.show(request)

    def begin(self, request: bytes, round_number: int, block: bytes) -> bytes | None:
        """Start a round.

        Args:
            request: RND1.
            round_number: of training, `job.first_round` to `training.rounds`.
            block: the global parameters in wire bytes.

        Returns:
            That the site is ready, where it still has an update for these parameters; None when it must train.

        Raises:
            SecAggError: the protocol or the site's bound on parameters refuses the round.
            LayoutError: the parameters are not of the job's layout, or not finite.
        """
        if RoundRequest.decode(request, self._job.secagg.max_sites).round != round_number:
            raise SecAggError(Abort.CTX_MISMATCH, "the protocol's message is of another round than the task")
        try:
            state = self.states.before(round_number, block)
        except StateRefused as refused:
            raise SecAggError(Abort.POLICY, str(refused)) from None
        self._begun = round_number, model_digest(self._layout.split(state))
        self._client.begin(request, self._begun[1])
        if self._held and (self._held.round, self._held.model) == self._begun:
            return self._client.ready()
        self._held = None
        return None

    def hold(self, block: bytes, weight: float, metrics: Mapping[str, float]) -> bytes:
        """Keep the update of the round that `begin` has opened, and say that the site is ready.

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
        words, self.clamped = self._words(block, weight / largest, metrics)
        ready = self._client.ready()
        self._held = _Held(*self._begun, words, sha256(block).hexdigest())
        return ready

    def _words(self, block: bytes, share: float, metrics: Mapping[str, float]) -> tuple[np.ndarray, int]:
        """What is masked, and how many numbers were cut off; where noise is shared, the integers as they are."""
        if isinstance(self._encoding, Integers):
            return self._layout.decode_words(block), 0
        chosen = {name: metrics[name] for name in self._job.secagg.metrics}
        encoded = self._encoding.encode(self._layout.decode(block), share, chosen)
        return encoded.words, encoded.clamped

    def mask(self, request: bytes) -> bytes:
        """The update under masks that cancel in the sum of a list of sites. Raises SecAggError."""
        if self._held is None:
            raise UnexpectedMessage("a list of sites", "an update of the round")
        return self._client.mask(request, self._held.words, self._held.release)

    def open(self, request: bytes) -> bytes:
        """Shares that open the one sum; from here on the update is never masked again. Raises SecAggError."""
        opened = self._client.open(request)
        self._held = None
        return opened

    def abort(self, error: SecAggError) -> bytes:
        """What the server is told of a refusal; may be empty."""
        return self._client.abort(error)

    def leave(self) -> None:
        """The round is over: what could open a mask of it is forgotten."""
        self._client.leave()
