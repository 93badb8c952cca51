"""Our secure aggregation beside Flower's SecAgg+ in one run; `make bench-peers` installs Flower apart."""

import json
import subprocess
from pathlib import Path

from tests.bench.measure import Row
from tests.bench.secagg import ROUNDS, WORDS, encoding_seconds, least

PYTHON = Path(__file__).parents[2] / ".venv-peers" / "bin" / "python"
CLIENT_RATIO, SERVER_RATIO = 6, 20


def run() -> list[Row]:
    """Client and server at 10 and 30 members."""
    if not PYTHON.exists():
        raise SystemExit(f"error: {PYTHON} is missing: run make bench-peers, which installs it")
    rows = []
    for members in (10, 30):
        script = Path(__file__).with_name("flower_peer.py")
        arguments = [str(PYTHON), str(script), str(WORDS), str(members), str(ROUNDS)]
        said = subprocess.run(arguments, stdout=subprocess.PIPE, check=True)
        theirs = json.loads(said.stdout.splitlines()[-1])
        cost = least(members, 0)
        client, server = cost.client, cost.opening
        name = f"{members} members; other: Flower {theirs['version']} SecAgg+"
        # Flower's client quantises in the same step; both ways of comparing are shown
        encoded = client + encoding_seconds()
        rows.append(_row(f"a member's round and encoding, {name}, quantising", encoded, theirs["client"], CLIENT_RATIO))
        rows.append(_row(f"a member's round alone, {name} alone", client, theirs["masking"], CLIENT_RATIO))
        rows.append(_row(f"the server opens a sum, {name}", server, theirs["server"], SERVER_RATIO))
    return rows


def _row(what: str, ours: float, theirs: float, bound: int) -> Row:
    ratio = theirs / ours
    times = f"{1000 * ours:.1f}", f"{1000 * theirs:.0f}"
    return Row(f"{what} (CPU-ms)", *times, f"{ratio:.1f}x", f"{bound}x", ratio >= bound)
