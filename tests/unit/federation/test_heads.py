"""The server remembers the newest ledger entry of every site over all jobs."""

import subprocess
import sys
from pathlib import Path

import pytest

from fedmpt_core.federation.server.heads import FILE, LedgerHeads
from fedmpt_core.privacy.ledger.chain import LedgerError, LedgerHead


def head(seq: int) -> dict[str, int | str]:
    return LedgerHead(seq, f"{seq:064x}", "").to_dict()


def test_heads_outlive_a_job_and_the_newest_counts(tmp_path: Path) -> None:
    first = LedgerHeads(tmp_path / "new" / "folder")
    assert first.of(["a", "b"]) == {}
    first.note({"a": {"epsilon": 1.0, "head": head(3)}, "b": {"head": head(1)}})
    first.note({"a": {"head": head(5)}})
    first.note({})
    later = LedgerHeads(tmp_path / "new" / "folder")
    assert later.of(["a", "c"]) == {"a": head(5)}
    assert later.of(["b"]) == {"b": head(1)}


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}', '{"a": {"seq": 1}}', '{"a": null}'])
def test_a_file_that_is_no_list_of_heads_is_not_taken_for_an_empty_one(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    for ask in (lambda: LedgerHeads(tmp_path).of(["a"]), lambda: LedgerHeads(tmp_path).note({"b": {"head": head(1)}})):
        with pytest.raises(LedgerError, match=r"ledger_heads\.json is no list of ledger heads .*: restore it"):
            ask()
    assert (tmp_path / FILE).read_text() == text


def test_a_head_that_is_none_is_not_kept(tmp_path: Path) -> None:
    heads = LedgerHeads(tmp_path)
    with pytest.raises(LedgerError):
        heads.note({"a": {"head": {"seq": "x", "hash": "", "sig": ""}}})
    assert heads.of(["a"]) == {}


def test_the_server_needs_no_torch_for_it() -> None:
    code = "import sys, fedmpt_core.federation.server.heads; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
