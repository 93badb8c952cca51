"""`fedmpt roster`: show a site's key, collect the keys of all sites, check the result against a site's kit.

Nothing here travels over the federation's own network: cards go by mail, digests by telephone.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedmpt_core.secagg.roster import Roster
from fedmpt_core.secagg.start_up_kit import (
    check_kit,
    key_card_of,
    load_key_card,
    load_roster,
    write_key_card,
    write_roster,
)
from fedmpt_flare.cli.screen import say

roster = typer.Typer(help="Fingerprints of the members' keys, for secure aggregation.", no_args_is_help=True)

Kit = Annotated[Path, typer.Option("--kit", metavar="DIR", help="The site's startup folder, with key and certificate.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


@roster.command()
def show(
    kit: Kit,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="CARD.json", help="Also write a card for whoever collects the roster."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the fingerprint of a site's key. Run at the site."""
    card = key_card_of(kit)
    if out:
        write_key_card(out, card)
    if as_json:
        typer.echo(json.dumps(card.to_dict()))
        return
    _print(
        Table("what", "value", title=f"Card of {escape(card.name)}", title_justify="left"),
        [
            ("organisation", card.org),
            ("key", _aloud(card.fingerprint)),
            ("root certificate", _aloud(card.root)),
            ("valid until", card.expires.isoformat()),
        ],
    )
    if out:
        say(f"Wrote {out}: give it to whoever collects the roster. It holds nothing secret.")


@roster.command()
def collect(
    cards: Annotated[list[Path], typer.Argument(metavar="CARD...", help="Every site's card.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Roster to write.")] = Path("secagg_roster.json"),
    as_json: AsJson = False,
) -> None:
    """Join the cards of all sites into one roster."""
    found = Roster.collected((str(path), load_key_card(path)) for path in cards)
    write_roster(out, found)
    if as_json:
        typer.echo(json.dumps(_plain(found)))
        return
    _show(found)
    say(f"Wrote {out}. Give it to every site; `fedmpt roster check` shows there what it must be.")
    say("Compare the digest by telephone with every site before any of them uses the roster.")


@roster.command()
def check(
    path: Annotated[Path, typer.Argument(metavar="ROSTER", help="The roster that the site was given.")],
    kit: Kit,
    as_json: AsJson = False,
) -> None:
    """Check that a site's own kit is in a roster, under the right key and root. Run at the site."""
    card, found = key_card_of(kit), load_roster(path)
    check_kit(found, card)
    if as_json:
        typer.echo(json.dumps({"site": card.name, "expires": card.expires.isoformat(), **_plain(found)}))
        return
    _show(found)
    say(f"OK: {card.name} is in {path} with the key of {kit}, valid until {card.expires.isoformat()}.")
    say("If the digest is what the other sites read out, name this file in fedmpt_site.toml as secagg.roster.")


def _plain(found: Roster) -> dict[str, object]:
    return {"digest": found.digest().hex(), **json.loads(found.to_json())}


def _show(found: Roster) -> None:
    table = Table("id", "site", "organisation", "key", title="Roster", title_justify="left")
    members = enumerate(found.members.items())
    _print(table, [(str(i), name, member.org, _aloud(member.fingerprint)) for i, (name, member) in members])
    say(f"Root certificate  {_aloud(found.root, ' ')}")
    say(f"Digest            {_aloud(found.digest(), ' ')}")


def _print(table: Table, rows: Iterable[tuple[str, ...]]) -> None:
    for column in table.columns:
        column.overflow = "fold"  # cut off, long names of two sites could look the same
    for row in rows:
        table.add_row(*map(escape, row))
    Console(highlight=False).print(table)


def _aloud(digest: bytes, between: str = "\n") -> str:
    """Hex digits in fours, for reading out; two lines unless told otherwise."""
    fours = [digest[i : i + 2].hex() for i in range(0, len(digest), 2)]
    return between.join(" ".join(fours[i : i + 8]) for i in range(0, len(fours), 8))
