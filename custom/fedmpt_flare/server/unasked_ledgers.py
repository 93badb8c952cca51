"""Ledgers that sites hand over when their job is aborted: FLARE ends the sites' tasks before the server hears of it.

They come as auxiliary messages, in which a sender names itself. So a ledger counts only where the certificate beside it
is that site's, follows from the federation's root, and its key signed the ledger's end.
"""

import time
from collections.abc import Set
from pathlib import Path
from threading import Condition

from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply

from fedmpt_core.common.signing import SigningError, verifier_of
from fedmpt_core.privacy.ledger.chain import Chain, LedgerError
from fedmpt_core.secagg.errors import SecAggError
from fedmpt_core.secagg.identity import ChainCheck
from fedmpt_flare import tasks

GRACE = 5.0  # seconds; FLARE kills the server's process of an aborted job after 10


class UnaskedLedgers:
    """What came, by site."""

    def __init__(self, kit: Path | None) -> None:
        """The server's start-up kit; None in a simulation, where nobody has a key."""
        self._kit, self._came = kit, Condition()
        self._ledgers: dict[str, tuple[bytes, bytes]] = {}

    def take(self, topic: str, request: Shareable, fl_ctx: FLContext) -> Shareable:
        """FLARE's handler of `tasks.LEDGER_TOPIC`; what is no site's own ledger is dropped."""
        peer = fl_ctx.get_peer_context()
        site = str(peer.get_identity_name()) if peer else ""
        try:
            ledger = self._checked(site, request.get(tasks.LEDGER_COPY), request.get(tasks.CERTIFICATE))
        except (SecAggError, SigningError, LedgerError, ValueError):
            return make_reply(ReturnCode.BAD_REQUEST_DATA)
        with self._came:
            self._ledgers[site] = ledger
            self._came.notify_all()
        return make_reply(ReturnCode.OK)

    def wait_for(self, sites: Set[str], seconds: float) -> dict[str, tuple[bytes, bytes]]:
        """Ledger and certificate of each of these sites whose ledger comes in time."""
        with self._came:
            self._came.wait_for(lambda: sites <= self._ledgers.keys(), seconds)
            return {site: self._ledgers[site] for site in sorted(sites & self._ledgers.keys())}

    def _checked(self, site: str, copy: object, certificate: object) -> tuple[bytes, bytes]:
        """Both, as they are. Raises one of the errors that `take` knows."""
        if not isinstance(copy, bytes) or not isinstance(certificate, bytes):
            raise ValueError("it is no ledger")
        verify = None
        if self._kit:
            root = (self._kit / "rootCA.pem").read_bytes()
            ChainCheck(root).certificate(name=site, chain=certificate, now=int(time.time()))
            verify = verifier_of(certificate, site)
        chain = Chain(Path(site), verify)
        if chain.follow(copy) or chain.entries[0].site != site:
            raise ValueError("it is another site's, or torn")
        return copy, certificate
