"""Start-up kits that FLARE itself made, centrally and distributed, and `fedmpt roster` over them."""

import json
import os
import shutil
import stat
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.padding import MGF1, PSS
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID
from nvflare.private.fed.utils.identity_utils import IdentityAsserter
from typer.testing import CliRunner, Result

from fedmpt_core.secagg.errors import Abort, SecAggError
from fedmpt_core.secagg.identity import SESSION_SECONDS, ChainCheck, Session, SiteIdentity, Trust
from fedmpt_core.secagg.roster import KeyCard, Roster
from fedmpt_core.secagg.start_up_kit import (
    check_kit,
    key_card_of,
    load_identity,
    load_key_card,
    load_root,
    load_roster,
    write_roster,
)
from fedmpt_flare.cli.main import main
from fedmpt_flare.cli.roster import roster as roster_app

PROJECT, SERVER, ADMIN = "fedmpt", "fedmpt-server", "admin@fedmpt.test"
SITES = ("site-1", "site-2", "site-3")
VOICE = bytes(range(32))


@dataclass(frozen=True)
class Kits:
    """Two federations of one name.

    Attributes:
        central: where `nvflare provision` put everybody's kit.
        state: what stays with whoever ran it: the root key and all private keys, in clear.
        distributed: site-1's kit by `nvflare cert` and `nvflare package`; its key never left its request folder.
        other_root: the root certificate of that federation.
    """

    central: Path
    state: dict[str, Any]
    distributed: Path
    other_root: Path

    def startup(self, who: str) -> Path:
        return self.central / who / "startup"


def nvflare(home: Path, *arguments: object) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "nvflare.cli", *map(str, arguments)]
    environment = {**os.environ, "HOME": str(home)}  # FLARE keeps records of requests there
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


def provision(home: Path) -> None:
    impl = "nvflare.lighter.impl"
    server = {"name": SERVER, "type": "server", "org": "org", "fed_learn_port": 8002, "default_host": "localhost"}
    sites: list[dict[str, Any]] = [{"name": name, "type": "client", "org": name.replace("-", "_")} for name in SITES]
    # whoever listens for processes of its own gets a second key under its own name
    sites[0]["listening_host"] = {"default_host": "localhost", "port": 8102}
    static = {"path": f"{impl}.static_file.StaticFileBuilder", "args": {"config_folder": "config", "scheme": "tcp"}}
    project = {
        "api_version": 3,
        "name": PROJECT,
        "description": "kits",
        "participants": [server, *sites, {"name": ADMIN, "type": "admin", "org": "org", "role": "project_admin"}],
        "builders": [
            {"path": f"{impl}.workspace.WorkspaceBuilder"},
            static,
            {"path": f"{impl}.cert.CertBuilder"},
            {"path": f"{impl}.signature.SignatureBuilder"},
        ],
    }
    (home / "project.yml").write_text(json.dumps(project))  # JSON is YAML
    nvflare(home, "provision", "--force", "-p", "project.yml", "-w", "central")


def distribute(home: Path) -> None:
    server = {"host": "localhost", "fed_learn_port": 8002, "admin_port": 8002}
    profile = {"name": PROJECT, "scheme": "tcp", "connection_security": "mtls", "server": server}
    (home / "profile.yml").write_text(json.dumps(profile))
    site = {"name": "site-1", "type": "client", "org": "site_1"}
    (home / "site.yml").write_text(json.dumps({"name": PROJECT, "description": "kits", "participants": [site]}))
    nvflare(home, "cert", "init", "--profile", "profile.yml", "-o", "ca")
    nvflare(home, "cert", "request", "-p", "site.yml", "--out", "request")
    asked = ("request/site-1.request.zip", "-c", "ca", "--profile", "profile.yml", "--out", "site-1.signed.zip")
    nvflare(home, "cert", "approve", *asked)
    root = x509.load_pem_x509_certificate((home / "ca" / "rootCA.pem").read_bytes()).fingerprint(SHA256())
    seen = ":".join(f"{byte:02X}" for byte in root)
    nvflare(home, "package", "site-1.signed.zip", "-w", "made", "--request-dir", "request", "--fingerprint", seen)


@pytest.fixture(scope="session")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Kits:
    home = tmp_path_factory.mktemp("flare")
    provision(home)
    distribute(home)
    central = home / "central" / PROJECT
    return Kits(
        central / "prod_00",
        json.loads((central / "state" / "cert.json").read_text()),
        home / "made" / PROJECT / "prod_00" / "site-1" / "startup",
        home / "ca" / "rootCA.pem",
    )


@pytest.fixture(scope="session")
def trust(kits: Kits) -> Trust:
    cards = [(name, key_card_of(kits.startup(name))) for name in SITES]
    return Trust(Roster.collected(cards), load_root(kits.startup("site-2")))


def pinned(trust: Trust) -> Roster:
    """Its roster, which a federation of kits has."""
    assert trust.roster is not None
    return trust.roster


def advert(identity: SiteIdentity, name: str = "site-1", *, signature: bytes | None = None) -> dict[str, Any]:
    now = int(datetime.now(UTC).timestamp())  # not before the certificates, which begin when they are made
    window = now - 300, now + SESSION_SECONDS
    session = Session("job-1", name, identity.certificate_sha256, VOICE, *window).encode()
    return {
        "name": name,
        "job_id": "job-1",
        "session": session,
        "session_signature": signature or identity.sign(session),
        "signing_key": VOICE,
        "chain": identity.chain,
        "now": now,
    }


def pair(folder: Path, stem: str) -> SiteIdentity:
    return SiteIdentity.from_pem((folder / f"{stem}.key").read_bytes(), (folder / f"{stem}.crt").read_bytes())


def secrets(kits: Kits) -> set[str]:
    """Lines of every private key that these kits hold."""
    files = [*kits.central.glob("*/startup/*.key"), *kits.distributed.glob("*.key")]
    assert len(files) == 7
    return {line for f in files for line in f.read_text().splitlines()[1:-1] if len(line) > 20}


# What is in a kit


def test_a_kit_s_identity_is_that_of_its_certificate(kits: Kits) -> None:
    for folder in (kits.startup("site-1"), kits.distributed):
        identity, pem = load_identity(folder), (folder / "client.crt").read_bytes()
        assert identity.name == "site-1" and not identity.insecure
        assert identity.chain == pem
        assert identity.certificate_sha256 == x509.load_pem_x509_certificate(pem).fingerprint(SHA256())


def test_site_and_server_have_the_root_of_their_federation(kits: Kits) -> None:
    assert load_root(kits.startup("site-1")) == load_root(kits.startup(SERVER))
    assert load_root(kits.startup("site-1")).decode() == kits.state["root_cert"]
    assert load_root(kits.distributed) == kits.other_root.read_bytes() != load_root(kits.startup("site-1"))


@pytest.mark.parametrize("nested", [True, False])
def test_files_are_named_by_the_kit_s_configuration(kits: Kits, tmp_path: Path, nested: bool) -> None:
    found = {"ssl_private_key": "a.pem", "ssl_cert": "b.pem", "ssl_root_cert": "c.pem"}
    (tmp_path / "fed_client.json").write_text(json.dumps({"client": found} if nested else found))
    for new, old in (("a.pem", "client.key"), ("b.pem", "client.crt"), ("c.pem", "rootCA.pem")):
        shutil.copy(kits.startup("site-2") / old, tmp_path / new)
    # what lies there under the usual names is not the kit's
    shutil.copy(kits.startup("site-3") / "client.key", tmp_path)
    shutil.copy(kits.startup("site-3") / "client.crt", tmp_path)
    assert load_identity(tmp_path).name == "site-2"
    assert load_root(tmp_path) == load_root(kits.startup("site-2"))


def test_without_a_configuration_the_usual_names_hold(kits: Kits, tmp_path: Path) -> None:
    for name in ("client.key", "client.crt", "rootCA.pem"):
        shutil.copy(kits.startup("site-2") / name, tmp_path)
    assert load_identity(tmp_path).name == "site-2" and load_root(tmp_path)


@pytest.fixture
def copied(kits: Kits, tmp_path: Path) -> Path:
    """A kit of site-1 to break."""
    return Path(shutil.copytree(kits.startup("site-1"), tmp_path / "startup"))


def renamed(startup: Path, configuration: str, **files: str) -> None:
    """Give files of a real kit other names, in its folder and in its configuration."""
    path = startup / configuration
    written = path.read_text()
    for old, new in files.items():
        assert written.count(f'"{old}"') == 1
        (startup / old).rename(startup / new)
        written = written.replace(f'"{old}"', f'"{new}"')
    path.write_text(written)


@pytest.mark.parametrize("made", ["central", "distributed"])
def test_a_real_kit_s_files_are_found_under_other_names(kits: Kits, tmp_path: Path, made: str) -> None:
    kit = kits.startup("site-1") if made == "central" else kits.distributed
    copy = Path(shutil.copytree(kit, tmp_path / "startup"))
    renamed(copy, "fed_client.json", **{"client.key": "own.key", "client.crt": "own.crt", "rootCA.pem": "root.crt"})
    assert load_identity(copy) == load_identity(kit) and load_root(copy) == load_root(kit)
    assert key_card_of(copy) == key_card_of(kit)


def test_a_real_server_s_root_is_found_under_another_name(kits: Kits, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(kits.startup(SERVER), tmp_path / "startup"))
    renamed(copy, "fed_server.json", **{"rootCA.pem": "root.crt"})
    assert load_root(copy) == load_root(kits.startup("site-1"))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("client.key", None, r"client.key cannot be read \(No such file or directory\): point to the `startup` folder"),
        ("client.crt", None, "client.crt cannot be read"),
        ("client.key", "", "the key of the start-up kit is not a PEM private key"),
        ("client.crt", "x", "is not a PEM certificate that can be read"),
        ("fed_client.json", "{", "fed_client.json is not JSON: have the site provisioned anew"),
        ("fed_client.json", "[]", "fed_client.json is not a JSON object"),
        ("fed_client.json", "[" * 100_000, "fed_client.json is not JSON"),
        ("fed_client.json", '{"client": {"ssl_private_key": 1}}', "names no file by ssl_private_key"),
        ("fed_client.json", '{"client": {"ssl_private_key": ""}}', "names no file by ssl_private_key"),
        ("fed_client.json", '{"client": {"ssl_private_key": "no.key"}}', "no.key cannot be read"),
    ],
)
def test_a_broken_kit_is_refused_with_its_path(
    kits: Kits, copied: Path, name: str, content: str | None, says: str
) -> None:
    (copied / name).unlink()
    if content is not None:
        (copied / name).write_text(content)
    with pytest.raises(SecAggError, match=says) as error:
        load_identity(copied)
    assert error.value.code is Abort.BAD_CERT and str(copied) in str(error.value)
    assert not any(secret in str(error.value) for secret in secrets(kits))


def test_a_root_that_is_missing_or_none_is_refused_with_its_path(copied: Path) -> None:
    for change, says in ((Path.unlink, "cannot be read"), (Path.touch, "is not a PEM certificate")):
        change(copied / "rootCA.pem")
        with pytest.raises(SecAggError, match=says) as error:
            load_root(copied)
        assert error.value.code is Abort.BAD_CERT and str(copied / "rootCA.pem") in str(error.value)


def test_a_server_s_kit_is_no_site_s(kits: Kits) -> None:
    with pytest.raises(SecAggError, match="is the start-up kit of a server: point to that of the site"):
        load_identity(kits.startup(SERVER))


def test_a_person_s_kit_has_no_card(kits: Kits) -> None:
    with pytest.raises(SecAggError, match=r"is not a site's, its role is \['project_admin'\]"):
        key_card_of(kits.startup(ADMIN))


def test_a_name_that_would_hide_itself_has_no_card(kits: Kits, copied: Path) -> None:
    for name, content in zip(("client.key", "client.crt"), minted(kits, "site-\u202e1"), strict=True):
        (copied / name).write_bytes(content)
    with pytest.raises(SecAggError, match=r"the name 'site-\\u202e1' must be of 1 to 256 printable bytes") as error:
        key_card_of(copied)
    assert error.value.code is Abort.ROSTER and str(error.value).startswith(str(copied))


# Held against a roster


@pytest.mark.parametrize("name", SITES)
def test_every_site_is_accepted_by_the_others_and_by_the_server(kits: Kits, trust: Trust, name: str) -> None:
    sent = advert(load_identity(kits.startup(name)), name)
    trust.check(**sent)
    ChainCheck(load_root(kits.startup(SERVER))).check(**sent)


def test_a_site_of_distributed_provisioning_is_accepted_in_its_federation_alone(kits: Kits, trust: Trust) -> None:
    sent = advert(load_identity(kits.distributed))
    ChainCheck(kits.other_root.read_bytes()).check(**sent)
    with pytest.raises(SecAggError, match="the certificate of site-1 does not come from this federation's root"):
        trust.check(**sent)


def minted(kits: Kits, name: str) -> tuple[bytes, bytes]:
    """What whoever ran `nvflare provision` can make: another key under a site's name and FLARE's own root."""
    root = x509.load_pem_x509_certificate(kits.state["root_cert"].encode())
    root_key = load_pem_private_key(kits.state["root_pri_key"].encode(), None)
    assert isinstance(root_key, rsa.RSAPrivateKey)
    key = rsa.generate_private_key(65537, 2048)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    begin = datetime.now(UTC) - timedelta(hours=1)
    builder = x509.CertificateBuilder(
        root.subject, subject, key.public_key(), x509.random_serial_number(), begin, begin + timedelta(days=30)
    )
    signed_by = x509.AuthorityKeyIdentifier.from_issuer_public_key(root_key.public_key())
    certificate = builder.add_extension(signed_by, False).sign(root_key, SHA256())
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())
    return pem, certificate.public_bytes(Encoding.PEM)


def test_what_only_the_roster_can_tell(kits: Kits, trust: Trust) -> None:
    listener = pair(kits.startup("site-1"), "server")
    assert listener.name == "site-1" and listener != load_identity(kits.startup("site-1"))
    for imposter in (listener, SiteIdentity.from_pem(*minted(kits, "site-1"))):
        sent = advert(imposter)
        ChainCheck(load_root(kits.startup(SERVER))).check(**sent)  # FLARE's certificates alone let it pass
        with pytest.raises(SecAggError, match=r"site-1 has key .*, the roster has") as error:
            trust.check(**sent)
        assert error.value.code is Abort.ROSTER


def test_nobody_else_s_certificate_passes_for_a_site(kits: Kits, trust: Trust) -> None:
    others = {
        SERVER: pair(kits.startup(SERVER), "server"),
        ADMIN: pair(kits.startup(ADMIN), "client"),
        "site-2": load_identity(kits.startup("site-2")),
    }
    for name, identity in others.items():
        with pytest.raises(SecAggError, match=rf"site-1 sent is for \['{name}'\], not for site-1 alone") as error:
            trust.check(**advert(identity))
        assert error.value.code is Abort.BAD_CERT
        if name != "site-2":
            says = "is not in the roster" if name == SERVER else "is not a site's, its role is"
            with pytest.raises(SecAggError, match=f"{name} {says}"):
                trust.check(**advert(identity, name))


def test_what_a_site_signs_while_it_registers_is_no_session(kits: Kits, trust: Trust) -> None:
    folder = kits.startup("site-1")
    asserter = IdentityAsserter(str(folder / "client.key"), str(folder / "client.crt"))
    wanted = advert(load_identity(folder))

    # a server chooses the nonce: the best text that it can have signed still begins with the site's name
    nonce = wanted["session"].decode("utf-8", "replace")
    signature = bytes(asserter.sign_common_name(nonce))  # type: ignore[arg-type]
    signed = f"site-1{nonce}".encode()
    flare_s = PSS(MGF1(SHA256()), 222)
    public = x509.load_pem_x509_certificate((folder / "client.crt").read_bytes()).public_key()
    assert isinstance(public, rsa.RSAPublicKey)
    public.verify(signature, signed, flare_s, SHA256())
    with pytest.raises(SecAggError, match="site-1 sent a session that cannot be read") as error:
        trust.check(**{**wanted, "session": signed, "session_signature": signature})
    assert error.value.code is Abort.MALFORMED

    # and if FLARE ever signed the very bytes of a session, its salt gives the signature away
    signature = bytes(asserter.sign(wanted["session"], return_str=False))  # type: ignore[arg-type]
    public.verify(signature, wanted["session"], flare_s, SHA256())
    with pytest.raises(SecAggError, match="is not signed with its certificate's key") as error:
        trust.check(**{**wanted, "session_signature": signature})
    assert error.value.code is Abort.BAD_SIG


# Cards and rosters on disk


def test_a_card_says_what_the_certificate_says(kits: Kits) -> None:
    for folder in (kits.startup("site-1"), kits.distributed):
        card, leaf = key_card_of(folder), x509.load_pem_x509_certificate((folder / "client.crt").read_bytes())
        spki = leaf.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        root = x509.load_pem_x509_certificate(load_root(folder))
        assert (card.name, card.org) == ("site-1", "site_1")
        assert card.fingerprint.hex() == _sha256(spki) and card.root == root.fingerprint(SHA256())
        assert card.expires == leaf.not_valid_after_utc.date()


def _sha256(data: bytes) -> str:
    return subprocess.run(["sha256sum"], input=data, capture_output=True, check=True).stdout.decode()[:64]


def test_a_card_ends_when_the_root_does(kits: Kits, copied: Path) -> None:
    root = x509.load_pem_x509_certificate(kits.state["root_cert"].encode())
    root_key = load_pem_private_key(kits.state["root_pri_key"].encode(), None)
    assert isinstance(root_key, rsa.RSAPrivateKey)
    begin, end = root.not_valid_before_utc, datetime.now(UTC) + timedelta(days=3)
    short = x509.CertificateBuilder(
        root.subject, root.subject, root_key.public_key(), x509.random_serial_number(), begin, end, [*root.extensions]
    )
    (copied / "rootCA.pem").write_bytes(short.sign(root_key, SHA256()).public_bytes(Encoding.PEM))
    assert key_card_of(copied).expires == end.date() < key_card_of(kits.startup("site-1")).expires


def test_a_kit_is_held_against_the_roster(kits: Kits, trust: Trust) -> None:
    for name in SITES:
        check_kit(pinned(trust), key_card_of(kits.startup(name)))
    two = Roster(pinned(trust).root, {n: m for n, m in pinned(trust).members.items() if n != "site-3"})
    swapped = {**pinned(trust).members, "site-1": two.members["site-2"], "site-2": two.members["site-1"]}
    cases = [
        (two, kits.startup("site-3"), "site-3 is not in the roster"),
        (Roster(pinned(trust).root, swapped), kits.startup("site-2"), "site-2 has key .*, the roster has"),
        (pinned(trust), kits.distributed, "the roster is of the root certificate .* the kit of site-1 has"),
    ]
    for found, folder, says in cases:
        with pytest.raises(SecAggError, match=says) as error:
            check_kit(found, key_card_of(folder))
        assert error.value.code is Abort.ROSTER


def test_a_roster_is_replaced_as_a_whole_and_readable_by_all(trust: Trust, tmp_path: Path) -> None:
    path = tmp_path / "roster.json"
    path.write_text("old")
    path.chmod(0o600)
    usual = os.umask(0o077)
    try:
        write_roster(path, pinned(trust))
    finally:
        os.umask(usual)
    assert load_roster(path) == pinned(trust)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert list(tmp_path.iterdir()) == [path]


def test_a_roster_that_cannot_be_written_leaves_the_old_one(
    trust: Trust, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "roster.json"
    path.write_text("old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SecAggError, match=rf"{path} cannot be written \(No space left on device\)") as error:
        write_roster(path, pinned(trust))
    assert error.value.code is Abort.STORAGE
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_roster_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "roster.json"
    cases = [
        (None, r"the file cannot be read \(No such file or directory\): write it with `fedmpt roster collect`"),
        (b"\xff", "the file is not UTF-8 text"),
        (b"{}", "the version is None, not 1"),
    ]
    for content, says in cases:
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(SecAggError, match=rf"{path}: {says}") as error:
            load_roster(path)
        assert error.value.code is Abort.ROSTER


# The command


def run(*arguments: object) -> Result:
    return CliRunner().invoke(roster_app, list(map(str, arguments)))


def printed(*arguments: object) -> Any:
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_cards_travel_from_sites_to_a_roster_that_every_site_accepts(kits: Kits, tmp_path: Path) -> None:
    cards = [tmp_path / f"{name}.json" for name in SITES]
    for name, card in zip(SITES, cards, strict=True):
        shown = run("show", "--kit", kits.startup(name), "--out", card)
        assert shown.exit_code == 0 and f"Card of {name}" in shown.stdout and name.replace("-", "_") in shown.stdout
        digits = load_key_card(card).fingerprint.hex()
        rows = [digits[:32], digits[32:]]
        assert all(" ".join(row[i : i + 4] for i in range(0, 32, 4)) in shown.stdout for row in rows)
        assert load_key_card(card).expires.isoformat() in shown.stdout
        digits = load_key_card(card).root.hex()
        rows = [digits[:32], digits[32:]]
        assert all(" ".join(row[i : i + 4] for i in range(0, 32, 4)) in shown.stdout for row in rows)
    path = tmp_path / "roster.json"
    collected = run("collect", *cards, "--out", path)
    assert collected.exit_code == 0
    digest = load_roster(path).digest().hex()
    grouped = " ".join(digest[i : i + 4] for i in range(0, 64, 4))
    assert grouped in collected.stdout and "by telephone" in collected.stdout
    root = load_roster(path).root.hex()
    assert " ".join(root[i : i + 4] for i in range(0, 64, 4)) in collected.stdout
    for name in SITES:
        checked = run("check", path, "--kit", kits.startup(name))
        assert checked.exit_code == 0 and f"OK: {name} is in {path}" in checked.stdout and grouped in checked.stdout
        plain = printed("check", path, "--kit", kits.startup(name), "--json")
        assert (plain["site"], plain["digest"]) == (name, digest) and set(plain["members"]) == set(SITES)
        assert plain["expires"] == key_card_of(kits.startup(name)).expires.isoformat()
    assert printed("collect", *cards, "--out", path, "--json")["digest"] == digest
    card = printed("show", "--kit", kits.startup("site-1"), "--json")
    assert card == json.loads(cards[0].read_text()) and card["name"] == "site-1"
    texts = [f.read_text() for f in tmp_path.iterdir()] + [collected.stdout]
    assert not any(secret in text for secret in secrets(kits) for text in texts)


def test_a_refused_collection_writes_nothing(kits: Kits, tmp_path: Path) -> None:
    cards = [tmp_path / f"{name}.json" for name in ("site-1", "site-2", "alien")]
    for folder, card in zip((kits.startup("site-1"), kits.startup("site-2"), kits.distributed), cards, strict=True):
        printed("show", "--kit", folder, "--out", card, "--json")
    for chosen, says in ((cards[:2], "2 cards are too few"), (cards, "of different federations")):
        done = run("collect", *chosen, "--out", tmp_path / "roster.json")
        assert isinstance(done.exception, SecAggError) and says in str(done.exception)
    assert not (tmp_path / "roster.json").exists()


def test_no_name_and_no_key_is_cut_off_on_a_narrow_screen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    cards = []
    for i in range(3):
        cards.append(tmp_path / f"{i}.json")
        name, key = "s" * 60 + str(i), f"{i + 1:x}" * 64
        cards[-1].write_text(KeyCard(name, "o" * 64, bytes.fromhex(key), bytes(32), date(2030, 12, 31)).to_json())
    done = run("collect", *cards, "--out", tmp_path / "roster.json")
    table = done.stdout[: done.stdout.index("Root certificate")]
    assert done.exit_code == 0 and "…" not in table
    assert table.count("s") >= 3 * 60 and table.count("o") >= 3 * 64
    assert [table.count(f"{i}" * 4) for i in (1, 2, 3)] == [16, 16, 16]


def test_names_are_shown_as_text_and_not_as_markup(tmp_path: Path) -> None:
    entry = {"version": 1, "root_sha256": "ab" * 32, "expires": "2030-12-31", "org": "[red]org"}
    cards = []
    for i in range(3):
        cards.append(tmp_path / f"{i}.json")
        cards[-1].write_text(json.dumps({**entry, "name": f"[b]{i}", "spki_sha256": f"{i:064x}"}))
    done = run("collect", *cards, "--out", tmp_path / "roster.json")
    assert done.exit_code == 0 and "[b]2" in done.stdout and "[red]org" in done.stdout


def test_a_kit_that_is_not_the_roster_s_is_refused_at_the_site(kits: Kits, trust: Trust, tmp_path: Path) -> None:
    path, members = tmp_path / "roster.json", pinned(trust).members
    swapped = {**members, "site-1": members["site-2"], "site-2": members["site-1"]}
    two = {name: members[name] for name in ("site-1", "site-2")}
    cases = [
        (two, kits.startup("site-3"), "site-3 is not in the roster: every site must add it"),
        (swapped, kits.startup("site-1"), "if its key was renewed, every site must collect the roster anew"),
        (members, kits.distributed, "collect the roster of this federation"),
        (members, kits.startup(SERVER), "is the start-up kit of a server"),
        (members, kits.startup(ADMIN), "its role is"),
    ]
    for chosen, folder, says in cases:
        write_roster(path, Roster(pinned(trust).root, chosen))
        for more in ([], ["--json"]):
            done = run("check", path, "--kit", folder, *more)
            assert isinstance(done.exception, SecAggError) and says in str(done.exception)
            assert "OK" not in done.output and "digest" not in done.output.lower()


def test_a_refused_check_is_one_sentence_and_exit_code_2(
    kits: Kits, trust: Trust, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_roster(tmp_path / "roster.json", pinned(trust))
    with pytest.raises(SystemExit) as ended:
        main(["roster", "check", str(tmp_path / "roster.json"), "--kit", str(kits.distributed)])
    printed = capsys.readouterr()
    assert ended.value.code == 2 and printed.out == ""
    assert "error: the roster is of the root certificate" in " ".join(printed.err.split())


def test_a_card_or_roster_that_cannot_be_written_is_an_error(kits: Kits, tmp_path: Path) -> None:
    nowhere = tmp_path / "missing" / "file.json"
    cards = [tmp_path / f"{name}.json" for name in SITES]
    for name, card in zip(SITES, cards, strict=True):
        printed("show", "--kit", kits.startup(name), "--out", card, "--json")
    for arguments in (["show", "--kit", kits.startup("site-1")], ["collect", *cards]):
        for out in (nowhere, tmp_path, Path()):
            done = run(*arguments, "--out", out, "--json")
            assert isinstance(done.exception, SecAggError) and done.stdout == ""
            assert f"{out} cannot be written" in str(done.exception)
    assert sorted(tmp_path.iterdir()) == sorted(cards)


def test_a_collection_names_the_card_that_it_cannot_read(kits: Kits, tmp_path: Path) -> None:
    card, broken = tmp_path / "good.json", tmp_path / "broken.json"
    values = printed("show", "--kit", kits.startup("site-1"), "--out", card, "--json")
    cases = [
        (None, "the file cannot be read (No such file or directory): write it with `fedmpt roster show`"),
        (json.dumps(values | {"private": "x"}), "'private' is unknown in the card"),
        (json.dumps(values | {"spki_sha256": values["spki_sha256"].upper()}), "64 lower-case hex digits"),
        (json.dumps(values)[:-1] + ', "name": "site-2"}', "'name' is there twice in the card"),
    ]
    for content, says in cases:
        if content is not None:
            broken.write_text(content)
        done = run("collect", card, broken, "--out", tmp_path / "roster.json")
        assert isinstance(done.exception, SecAggError)
        assert str(done.exception).startswith(f"{broken}: ") and says in str(done.exception)
    assert not (tmp_path / "roster.json").exists()


def test_an_error_is_one_sentence_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["roster", "show", "--kit", str(tmp_path)])
    printed = capsys.readouterr()
    assert ended.value.code == 2 and printed.out == ""
    assert f"{tmp_path / 'client.key'} cannot be read" in " ".join(printed.err.split())
