"""What a FLARE start-up kit (its `startup` folder) and a site's roster file hold, read from disk.

FLARE keeps key, certificate and root certificate of a participant there, under names that its own configuration gives.
No error holds what a file contains.
"""

import json
import time
from pathlib import Path
from typing import Any, NoReturn

from cryptography.x509.oid import NameOID

from fedmpt_core.common.files import WriteError, write_whole
from fedmpt_core.secagg.errors import Abort, SecAggError
from fedmpt_core.secagg.identity import ChainCheck, SiteIdentity, certificate_of, root_sha256
from fedmpt_core.secagg.roster import KeyCard, Roster

_CLIENT, _SERVER = "fed_client.json", "fed_server.json"


def load_identity(folder: Path) -> SiteIdentity:
    """The certificate and key of a site's kit.

    Args:
        folder: a client's `startup` folder; `client.key` and `client.crt` unless its `fed_client.json` says otherwise.

    Raises:
        SecAggError: BAD_CERT with the folder: a file is missing or is something else, or the kit is a server's.
    """
    if (folder / _SERVER).exists():
        _refuse(f"{folder} is the start-up kit of a server: point to that of the site")
    key, certificate = _file(folder, "ssl_private_key", "client.key"), _file(folder, "ssl_cert", "client.crt")
    try:
        return SiteIdentity.from_pem(_read(key), _read(certificate))
    except SecAggError as error:
        raise SecAggError(error.code, _in(folder, error)) from None


def load_root(folder: Path) -> bytes:
    """The root certificate in a site's or the server's kit.

    Args:
        folder: its `startup` folder; `rootCA.pem` unless its configuration says otherwise.

    Returns:
        PEM, one certificate.

    Raises:
        SecAggError: BAD_CERT with the path, the file is missing or is something else.
    """
    path = _file(folder, "ssl_root_cert", "rootCA.pem")
    pem = _read(path)
    try:
        root_sha256(pem)
    except SecAggError as error:
        raise SecAggError(error.code, _in(path, error)) from None
    return pem


def key_card_of(folder: Path) -> KeyCard:
    """What a site's kit tells the others of it.

    Raises:
        SecAggError: BAD_CERT or ROSTER with the folder: the kit cannot be used, or others would not accept its
            certificate now or its name ever.
    """
    identity, root = load_identity(folder), load_root(folder)
    try:
        leaf = ChainCheck(root).certificate(name=identity.name, chain=identity.chain, now=int(time.time()))
        orgs = [str(a.value) for a in leaf.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)]
        expires = min(leaf.not_valid_after_utc, certificate_of(root).not_valid_after_utc).date()
        return KeyCard(identity.name, ", ".join(orgs), identity.fingerprint, root_sha256(root), expires)
    except SecAggError as error:
        raise SecAggError(error.code, _in(folder, error)) from None


def check_kit(roster: Roster, card: KeyCard) -> None:
    """That a site's kit is the one in a roster. Raises SecAggError(ROSTER) that says how they differ."""
    if card.root != roster.root:
        _refuse(
            f"the roster is of the root certificate {roster.root.hex()[:16]}..., the kit of {card.name} has "
            f"{card.root.hex()[:16]}...: collect the roster of this federation",
            Abort.ROSTER,
        )
    roster.check_key(card.name, card.fingerprint)


def load_roster(path: Path) -> Roster:
    """A site's roster. Raises SecAggError(ROSTER) with the path."""
    try:
        return Roster.from_json(_text(path, "write it with `fedmpt roster collect`"))
    except SecAggError as error:
        raise SecAggError(error.code, _in(path, error)) from None


def load_key_card(path: Path) -> KeyCard:
    """A site's card. Raises SecAggError(ROSTER) with the path."""
    try:
        return KeyCard.from_json(_text(path, "write it with `fedmpt roster show`"))
    except SecAggError as error:
        raise SecAggError(error.code, _in(path, error)) from None


def write_roster(path: Path, roster: Roster) -> None:
    """Replace a roster's file as a whole, readable by all. Raises SecAggError(STORAGE), the old file stays."""
    _write(path, roster.to_json())


def write_key_card(path: Path, card: KeyCard) -> None:
    """Replace a card's file as a whole, readable by all. Raises SecAggError(STORAGE), the old file stays."""
    _write(path, card.to_json())


def _file(folder: Path, key: str, usual: str) -> Path:
    """Where the kit's own configuration says that a file is."""
    for name in (_CLIENT, _SERVER):
        path = folder / name
        if not path.exists():
            continue
        try:
            values: Any = json.loads(_read(path))
        except (ValueError, RecursionError) as error:
            if isinstance(error, SecAggError):
                raise
            _refuse(f"{path} is not JSON: have the site provisioned anew")
        if not isinstance(values, dict):
            _refuse(f"{path} is not a JSON object: have the site provisioned anew")
        servers = values.get("servers")
        for part in (values.get("client"), *(servers if isinstance(servers, list) else ()), values):
            if isinstance(part, dict) and key in part:
                if not isinstance(part[key], str) or not part[key]:
                    _refuse(f"{path} names no file by {key}: have the site provisioned anew")
                return folder / part[key]
    return folder / usual


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        _refuse(f"{path} cannot be read ({error.strerror}): point to the `startup` folder of the site's kit")


def _text(path: Path, remedy: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        _refuse(f"the file cannot be read ({error.strerror}): {remedy}", Abort.ROSTER)
    except UnicodeDecodeError:
        _refuse(f"the file is not UTF-8 text: {remedy}", Abort.ROSTER)


def _write(path: Path, text: str) -> None:
    try:
        write_whole(path, f"{text}\n".encode(), mode=0o644)
    except WriteError as error:
        raise SecAggError(
            Abort.STORAGE, f"{path} cannot be written ({error.strerror}): choose a folder that you may write to"
        ) from None


def _in(path: Path, error: SecAggError) -> str:
    text = str(error)
    return text if text.startswith(str(path)) else f"{path}: {text}"


def _refuse(why: str, code: Abort = Abort.BAD_CERT) -> NoReturn:
    raise SecAggError(code, why) from None
