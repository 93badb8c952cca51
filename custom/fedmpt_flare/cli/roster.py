"""`fedmpt roster`: show a site's key, collect the keys of all sites, check the result against a site's kit.

Nothing here travels over the federation's own network: cards go by mail, digests by telephone.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedmpt_flare.cli.options import AsJson, OwnKit

if TYPE_CHECKING:
    from fedmpt_core.secagg.roster import Roster

roster = typer.Typer(help="Fingerprints of the members' keys, for secure aggregation.", no_args_is_help=True)


@roster.command()
def show(
    kit: OwnKit,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="CARD.json", help="Also write a card for whoever collects the roster."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the fingerprint of a site's key. Run at the site."""
    from fedmpt_core.secagg.start_up_kit import key_card_of, write_key_card
    from fedmpt_flare.cli.screen import show_table

    card = key_card_of(kit)
    if out:
        write_key_card(out, card)
    if as_json:
        typer.echo(json.dumps(card.to_dict()))
        return
    show_table(
        f"Card of {card.name}",
        ("what", "value"),
        [
            ("organisation", card.org),
            ("key", _aloud(card.fingerprint)),
            ("root certificate", _aloud(card.root)),
            ("valid until", card.expires.isoformat()),
        ],
    )
    if out:
        typer.echo(f"Wrote {out}: give it to whoever collects the roster. It holds nothing secret.")


@roster.command()
def collect(
    cards: Annotated[list[Path], typer.Argument(metavar="CARD...", help="Every site's card.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Roster to write.")] = Path("secagg_roster.json"),
    as_json: AsJson = False,
) -> None:
    """Join the cards of all sites into one roster."""
    from fedmpt_core.secagg.roster import Roster
    from fedmpt_core.secagg.start_up_kit import load_key_card, write_roster

    collected = Roster.collected((str(path), load_key_card(path)) for path in cards)
    write_roster(out, collected)
    if as_json:
        typer.echo(json.dumps(_plain(collected)))
        return
    _show(collected)
    typer.echo(f"Wrote {out}. Give it to every site; `fedmpt roster check` shows there what it must be.")
    typer.echo("Compare the digest by telephone with every site before any of them uses the roster.")


@roster.command()
def check(
    path: Annotated[Path, typer.Argument(metavar="ROSTER", help="The roster that the site was given.")],
    kit: OwnKit,
    as_json: AsJson = False,
) -> None:
    """Check that a site's own kit is in a roster, under the right key and root. Run at the site."""
    from fedmpt_core.secagg.start_up_kit import check_kit, key_card_of, load_roster

    card, agreed = key_card_of(kit), load_roster(path)
    check_kit(agreed, card)
    if as_json:
        typer.echo(json.dumps({"site": card.name, "expires": card.expires.isoformat(), **_plain(agreed)}))
        return
    _show(agreed)
    typer.echo(f"OK: {card.name} is in {path} with the key of {kit}, valid until {card.expires.isoformat()}.")
    typer.echo("If the digest is what the other sites read out, name this file in fedmpt_site.toml as secagg.roster.")


def _plain(roster: "Roster") -> dict[str, object]:
    return {"digest": roster.digest().hex(), **json.loads(roster.to_json())}


def _show(roster: "Roster") -> None:
    from fedmpt_flare.cli.screen import show_table

    members = enumerate(roster.members.items())
    rows = [(str(i), name, member.org, _aloud(member.fingerprint)) for i, (name, member) in members]
    show_table("Roster", ("id", "site", "organisation", "key"), rows)
    typer.echo(f"Root certificate  {_aloud(roster.root, ' ')}")
    typer.echo(f"Digest            {_aloud(roster.digest(), ' ')}")


def _aloud(digest: bytes, between: str = "\n") -> str:
    """Hex digits in fours, for reading out; two lines unless told otherwise."""
    fours = [digest[i : i + 2].hex() for i in range(0, len(digest), 2)]
    return between.join(" ".join(fours[i : i + 8]) for i in range(0, len(fours), 8))
