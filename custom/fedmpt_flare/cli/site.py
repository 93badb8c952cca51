"""`fedmpt site`: for those who operate a site. Everything is read at the site, nothing is sent."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fedmpt_flare.cli.options import AsJson

site = typer.Typer(help="A site's own settings: what is wrong with them, what others may know.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(metavar="KIT", help="The site's kit, the folder with `startup` and `local`.")]


@site.command()
def check(kit: Folder, as_json: AsJson = False) -> None:
    """Check kit, roster, ledger, guards, rights, pictures, disk and device before the site is started."""
    from fedmpt_flare.site.check import check_site_folder

    results = list(check_site_folder(kit))
    if as_json:
        typer.echo(json.dumps([asdict(r) for r in results]))
    else:
        from fedmpt_flare.cli.screen import show_table

        rows = [("ok" if r.fine else "NO", r.what, r.text) for r in results]
        show_table(f"Site {kit}", ("", "what", "found"), rows)
    wrong = sum(not r.fine for r in results)
    if wrong:
        if not as_json:
            typer.echo(f"{wrong} of {len(results)} checks failed: put them right before the site is started.")
        raise typer.Exit(1)
    if not as_json:
        typer.echo("The site can be started.")


@site.command()
def policy(
    kit: Folder,
    out: Annotated[Path, typer.Option("--out", metavar="CARD.json", help="Card to write.")] = Path("policy.json"),
) -> None:
    """Write a card of the site's limits and of what is charged, for those who write jobs. It names no file."""
    from fedmpt_core.common.files import write_whole
    from fedmpt_core.config.toml import load_site
    from fedmpt_core.federation.site.policy_card import PolicyCard
    from fedmpt_core.privacy.ledger.site_ledger import read_site_ledger
    from fedmpt_core.secagg.start_up_kit import key_card_of
    from fedmpt_flare.workspace import SITE_FILE

    name = key_card_of(kit / "startup").name
    settings = load_site(kit / "local" / SITE_FILE, name)
    entries = read_site_ledger(settings.privacy, kit / "startup") if settings.privacy else ()
    card = PolicyCard.of(name, settings, entries)
    write_whole(out, card.to_json().encode(), mode=0o644)
    typer.echo(
        f"Wrote {out}: epsilon {card.spent:.3f} of {card.privacy.epsilon:g} is spent on '{card.privacy.dataset}'."
    )
    typer.echo("Give it to the lead: `fedmpt export --policy` refuses jobs that this site would refuse.")
